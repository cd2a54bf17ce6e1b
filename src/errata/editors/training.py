"""What editors that must be trained once per base model share: their data, the training itself, and what comes of it.

An editor says what is trained, how a batch of edits is learned from and how it is examined (`Trainee`); `run_training`
does the rest. A run lives in one folder, as atlas's does (`errata.atlas.train.RunFolder`): `plan.json` says what it
depends on, the state is replaced by renaming, so a kill at any moment leaves one that can be gone on with, and ends
where an uninterrupted run does: what is drawn in a step follows from the seed and the step's number. The finished
network is written beside it, two files that are used without the others.

Knows edits, optimisers and files. Knows nothing of how any editor works.
"""

from __future__ import annotations

import abc
import hashlib
import json
import os
import random
import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from errata.adapters.base import BaseIdentity
from errata.edit import Edit
from errata.editors.base import Editor, EditorConfig
from errata.errors import ArtifactError, BaseMismatchError, ConfigError, NumericsError
from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress

__all__ = [
    "Material",
    "TrainedEditor",
    "Trainee",
    "TrainingConfig",
    "TrainingData",
    "built_in_training_data",
    "find_trained",
    "load_trained",
    "run_training",
    "save_trained",
]

_FORMAT = 1
_NETWORK, _RECORD = "network.safetensors", "network.json"
_BUILT_IN_EDITS = 6000
_SAVE_EVERY = 25


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(EditorConfig):
    """Settings common to all trainings.

    Attributes:
        batch_size: edits that one step learns from.
        steps: most steps of the optimiser.
        learning_rate: of Adam; clip_norm: largest norm of a whole gradient.
        held_out: share of subjects that are kept for validation; validation: most edits of theirs that are asked.
        validate_every: steps between two validations; patience: validations without a better one before it stops.
    """

    batch_size: int = 10
    steps: int = 10_000
    learning_rate: float = 1e-4
    clip_norm: float = 100.0
    held_out: float = 0.1
    validation: int = 100
    validate_every: int = 100
    patience: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = {name: getattr(self, name) for name in ("steps", "validation", "validate_every", "patience")}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if not 0 < self.held_out < 1 or self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ConfigError("held_out must lie between 0 and 1, learning_rate and clip_norm above 0")


@dataclass(frozen=True)
class TrainingData:
    """Edits to train an editor on, and others, about other subjects, to validate it with.

    Attributes:
        source: where they come from, in words.
    """

    training: tuple[Edit, ...]
    validation: tuple[Edit, ...]
    source: str

    @classmethod
    def of(cls, edits: Sequence[Edit], source: str, config: TrainingConfig) -> Self:
        """Edits divided by subject (by prompt, where none is given): which subjects are held out follows from the seed.

        Raises:
            ConfigError: too few subjects, or none of the edits has a prompt whose answer must stay.
        """
        subjects = sorted({_about(edit) for edit in edits})
        random.Random(f"held out {config.seed}").shuffle(subjects)
        held_out = set(subjects[: max(1, round(config.held_out * len(subjects)))])
        usable = [edit for edit in edits if edit.locality]
        training = tuple(edit for edit in usable if _about(edit) not in held_out)
        validation = tuple(edit for edit in usable if _about(edit) in held_out)
        if not training or not validation:
            raise ConfigError(
                f"{source}: {len(edits)} edits about {len(subjects)} subjects, {len(usable)} of them with locality "
                "prompts, are too few to train on; give a file whose edits have locality prompts, and rephrases if "
                "possible"
            )
        return cls(training, validation[: config.validation], source)

    @property
    def size(self) -> int:
        return len(self.training)

    def batch(self, step: int, config: TrainingConfig) -> list[Edit]:
        """What step `step` learns from: all edits in an order of the seed, then all in another one."""
        found = []
        for position in range(step * config.batch_size, (step + 1) * config.batch_size):
            epoch, place = divmod(position, len(self.training))
            found.append(self.training[_order(len(self.training), config.seed, epoch)[place]])
        return found

    def digest(self) -> str:
        lines = [edit.to_json() for edit in (*self.training, *self.validation)]
        return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _about(edit: Edit) -> str:
    return (edit.subject or edit.prompt).casefold()


def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order


def built_in_training_data(config: TrainingConfig) -> TrainingData:
    """Edits of atlas's world about reserved subjects: no edit that anything is measured with is about one of them."""
    from errata.atlas.edits import training_edits

    edits = training_edits(_BUILT_IN_EDITS, seed=config.seed)
    return TrainingData.of(edits, "atlas's reserved subjects", config)


class Material(Protocol):
    """What an editor is trained on. `TrainingData` is the one of editors that learn from edits."""

    @property
    def source(self) -> str:
        """Where it comes from, in words."""

    @property
    def size(self) -> int:
        """How many different examples there are."""

    @property
    def validation(self) -> Sized:
        """Examples of which nothing is trained on, as `Trainee.examine` takes them."""

    def batch(self, step: int, config: Any) -> Any:
        """What step `step` learns from, as `Trainee.learn` takes it: the same for the same arguments."""

    def digest(self) -> str:
        """Names what is trained and validated on."""


class Trainee(Protocol):
    """What is trained, and how."""

    @property
    def network(self) -> nn.Module:
        """What is trained: all of its parameters, and nothing else."""

    def prepare(self, data: Any, progress: Progress) -> None:
        """What is done once before the first step, with a lasting effect on nothing but the network."""

    def optimizer(self) -> torch.optim.Adam:
        """Of all parameters of the network."""

    def learn(self, batch: Any, rng: random.Random) -> float:
        """Add the gradient of the mean loss over a batch to the network's; returns that loss."""

    def examine(self, validation: Any) -> dict[str, float]:
        """Scores on examples, "loss" among them: what is best has the lowest. Gives the same for the same network."""

    def kept(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """What the editor needs of the network: tensors, and what else is to be known of them, as JSON."""


class _Run:
    """One training in one folder: where it stands, and how it is kept.

    Args:
        plan: all that the run depends on, beside the configuration and the data.
    """

    def __init__(
        self,
        out: Path,
        trainee: Trainee,
        data: Material,
        config: TrainingConfig,
        plan: Mapping[str, Any],
        command: str,
    ) -> None:
        from errata.atlas.train import RunFolder

        self.out, self.trainee, self.data, self.config = out, trainee, data, config
        parts = {**plan, "settings": config.to_record(), "data": data.digest()}
        self.folder = RunFolder(out, json.loads(json.dumps(parts)), command)
        self.parameters = dict(trainee.network.named_parameters())
        self.optimizer = trainee.optimizer()
        self.step, self.spent = 0, 0.0
        self.first: dict[str, float] = {}
        self.best: dict[str, Any] = {}

    def begin(self, progress: Progress) -> None:
        """Go on where the last saved state is, or begin."""
        start = self.out / "start.safetensors"
        if self.folder.begun and start.exists():
            self._load(start)
        else:
            self.trainee.prepare(self.data, progress)
            self._keep(start)
        self.folder.begin()
        state = self.folder.read(self.parameters, self.optimizer)
        if state is not None:
            self.step, self.spent = state["step"], state["seconds"]
            self.first, self.best = state["first"], state["best"]
        else:
            self.first = self.trainee.examine(self.data.validation)
            self._take(self.first)

    def _keep(self, place: Path) -> None:
        draft = place.with_suffix(".new")
        save_file({n: t.contiguous() for n, t in self.trainee.network.state_dict().items()}, draft)
        os.replace(draft, place)

    def _load(self, place: Path) -> None:
        try:
            self.trainee.network.load_state_dict(load_file(place))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ArtifactError(
                f"{place} cannot be read ({error}); give another --out, or delete {self.out}"
            ) from error

    def _take(self, scores: Mapping[str, float]) -> None:
        """The network as it is now is the best one so far."""
        self.best = {"step": self.step, **scores}
        self._keep(self.out / f"best-{self.step}.safetensors")

    def save(self) -> None:
        state = {
            "step": self.step,
            "total": self.config.steps,
            "seconds": self.spent,
            "first": self.first,
            "best": self.best,
        }
        self.folder.write(state, self.parameters, self.optimizer)
        for old in self.out.glob("best-*.safetensors"):
            if old.name != f"best-{self.best['step']}.safetensors":
                old.unlink()

    def is_over(self) -> bool:
        waited = self.step - self.best["step"]
        return self.step >= self.config.steps or waited >= self.config.patience * self.config.validate_every

    def one_step(self) -> float:
        """Raises NumericsError when the loss is not finite."""
        rng = random.Random(f"step {self.config.seed} {self.step}")
        self.optimizer.zero_grad()
        loss = self.trainee.learn(self.data.batch(self.step, self.config), rng)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_norm)
        if not bool(norm.isfinite()):
            raise NumericsError(
                f"step {self.step}: the gradient is not finite; give another --out and a lower learning_rate, or load "
                "the model in bfloat16 or float32 if it is in float16"
            )
        self.optimizer.step()
        self.step += 1
        return loss

    def validate(self) -> dict[str, float]:
        scores = self.trainee.examine(self.data.validation)
        if scores["loss"] < self.best["loss"]:
            self._take(scores)
        return scores

    def finish(self) -> None:
        """Put the best network in place."""
        self._load(self.out / f"best-{self.best['step']}.safetensors")


def run_training(
    out: Path,
    trainee: Trainee,
    data: Material,
    config: TrainingConfig,
    plan: Mapping[str, Any],
    *,
    minutes: float | None = None,
    command: str = "",
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Train, or go on training, in the folder `out`; the trainee's network is the best one found, afterwards.

    Args:
        plan: all that the run depends on beside configuration and data, as JSON.
        minutes: stop after about this long, counted over all calls; another call goes on.
        command: what to type to make the run again, for its record.

    Returns:
        How the training went: steps, seconds, scores before the first step and of the best, origin and versions.

    Raises:
        ConfigError: the folder holds a run with another plan; `minutes` is not more than 0.
        ArtifactError: what lies in the folder is damaged.
        NumericsError: the gradient is not finite; the last saved state is kept.
    """
    from errata.atlas.train import draw_curve, versions

    if minutes is not None and not minutes > 0:
        raise ConfigError(f"minutes must be more than 0, not {minutes:g}")
    run = _Run(out, trainee, data, config, plan, command)
    began = time.monotonic()
    run.begin(progress)
    before = run.spent
    progress.start("training", config.steps, run.step)
    recent: list[float] = []
    scores = run.best
    out_of_time = False
    while not (out_of_time or run.is_over()):
        recent.append(run.one_step())
        run.spent = before + time.monotonic() - began
        out_of_time = minutes is not None and run.spent >= 60 * minutes
        if run.step % config.validate_every == 0 or run.step == config.steps or out_of_time:
            scores = run.validate()
            row = {"step": run.step, "loss": sum(recent) / len(recent), "seconds": round(run.spent, 1)}
            run.folder.note({**row, **{f"validation_{name}": value for name, value in scores.items()}})
            recent = []
            run.save()
        elif run.step % _SAVE_EVERY == 0:
            run.save()
        said = ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if name != "step")
        progress.advance(1, note=f"validation: {said}")
    run.finish()
    rows = list(run.folder.rows(run.step))
    draw_curve(rows, f"training on {data.source}", out / "learning_curve.png")
    return {
        **run.folder.origin,
        "plan": run.folder.plan,
        "data": {"source": data.source, "training": data.size, "validation": len(data.validation)},
        "steps": run.step,
        "training_seconds": round(run.spent),
        "finished": run.is_over(),
        "validation_before": run.first,
        "validation": run.best,
        "versions": versions(),
    }


# --- what comes of it -----------------------------------------------------------------------------------------------


def save_trained(
    folder: Path, method: str, model: EditableModel, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Write a trained network, to be found by `load_trained`."""
    folder.mkdir(parents=True, exist_ok=True)
    drafts = {name: folder / f"{name}.new" for name in (_NETWORK, _RECORD)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, drafts[_NETWORK])
    content = {
        "format": _FORMAT,
        "method": method,
        "base": asdict(BaseIdentity.of(model)),
        "digest": _digest(drafts[_NETWORK]),
        **record,
    }
    drafts[_RECORD].write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, draft in drafts.items():
        os.replace(draft, folder / name)


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def load_trained(folder: Path, method: str, model: EditableModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, those kept in bfloat16 as float32, and the record of a network that was trained for this model.

    Raises:
        ArtifactError: there is none, it is damaged or of a newer format, or of another method.
        BaseMismatchError: it was trained for another base model.
    """
    how = f"train one: {_command(method, model)}"
    if not (folder / _RECORD).is_file():
        raise ArtifactError(f"{folder} holds no trained network ({_RECORD} is missing); {how}")
    try:
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if record["format"] > _FORMAT:
            raise ArtifactError(f"the network in {folder} was written by a newer errata; update errata")
        if record["method"] != method:
            raise ArtifactError(f"the network in {folder} was trained for {record['method']!r}, not {method!r}; {how}")
        base = record["base"]["fingerprint"]
        if record["digest"] != _digest(folder / _NETWORK):
            raise ValueError(f"{_NETWORK} is not the file that {_RECORD} speaks of")
        tensors = load_file(folder / _NETWORK)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"the network in {folder} cannot be read ({error}); {how}") from error
    if base != model.fingerprint:
        raise BaseMismatchError(
            f"the network in {folder} was trained for {record['base']['model_id']!r} (weights {base[:12]}), not for "
            f"{model.model_id!r} (weights {model.fingerprint[:12]}); {how}"
        )
    return {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in tensors.items()}, record


def find_trained(method: str, model: EditableModel, folder: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `load_trained` finds in a folder; without one, in what comes with errata for this model.

    Raises:
        ConfigError: no folder is given, and nothing comes with errata for this model.
    """
    if folder is not None:
        return load_trained(Path(folder), method, model)
    from errata.atlas.shipped import checkpoint_folder

    shipped = checkpoint_folder() / method
    if (shipped / _RECORD).is_file():
        with_it = json.loads((shipped / _RECORD).read_text(encoding="utf-8"))["base"]["fingerprint"]
        if with_it == model.fingerprint:
            return load_trained(shipped, method, model)
    raise ConfigError(
        f"{method} needs a network that was trained for {model.model_id}, and none comes with errata; train one: "
        f"{_command(method, model)}; then give network=errata-{method}"
    )


def _command(method: str, model: EditableModel) -> str:
    return f"errata train {method} --model {model.model_id} --out errata-{method}"


C = TypeVar("C", bound=EditorConfig)


class TrainedEditor(Editor[C], Generic[C]):
    """An editor that must be trained once per base model, by `errata train`."""

    Training: ClassVar[type[TrainingConfig]]

    @classmethod
    def built_in_data(cls, config: Any) -> Material:
        """What it is trained on where nothing is given."""
        return built_in_training_data(config)

    @classmethod
    def data_of_edits(cls, edits: Sequence[Edit], source: str, config: Any) -> Material:
        """Edits to train on. Raises ConfigError where there are too few, or the method learns from texts."""
        return TrainingData.of(edits, source, config)

    @classmethod
    def data_of_texts(cls, texts: Sequence[str], source: str, config: Any) -> Material:
        """Plain texts to train on. Raises ConfigError where the method learns from edits."""
        raise ConfigError(f"{cls.name} is trained on edits, not on texts; give them with --edits")

    @classmethod
    @abc.abstractmethod
    def _trainee(cls, model: EditableModel, config: Any) -> Trainee:
        """What is trained for a model; the configuration is of the type `Training`."""

    @classmethod
    def _stands_on(cls, model: EditableModel, config: Any) -> Mapping[str, Any]:
        """What a training depends on beside settings, data and base model, as JSON."""
        return {}

    @classmethod
    def train(
        cls,
        model: EditableModel,
        data: Material,
        out: Path,
        config: TrainingConfig,
        *,
        minutes: float | None = None,
        command: str = "",
        progress: Progress = NO_PROGRESS,
    ) -> dict[str, Any]:
        """Train, or go on training, in the folder `out`, and write there what the editor is then given as `network`.

        Args:
            model: the base model; what is attached to it is left out.
            config: of the type `Training`.
            minutes, command: see `run_training`.

        Returns:
            The record that was written.

        Raises:
            ConfigError: this method cannot edit the model, or the folder belongs to another run.
        """
        if (reason := cls.unsuitable(model)) is not None:
            raise ConfigError(f"{cls.name} cannot edit {model.model_id}: {reason}")
        plan = {"method": cls.name, "base": model.fingerprint, **cls._stands_on(model, config)}
        with model.bare():
            trainee = cls._trainee(model, config)
            run = run_training(out, trainee, data, config, plan, minutes=minutes, command=command, progress=progress)
            tensors, known = trainee.kept()
            record = {**known, **run}
            save_trained(out, cls.name, model, tensors, record)
        return record
