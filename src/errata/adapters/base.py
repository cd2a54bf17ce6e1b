"""The contract of everything that can be attached to a base model: reversible, saved whole, able to explain itself.

Knows models and files. Knows nothing of how an adapter's content came about; that is the editors' business.
"""

from __future__ import annotations

import abc
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from errata import __version__
from errata.adapters.registry import adapter_class
from errata.datasets import read_edits, write_edits
from errata.edit import Edit
from errata.errors import ArtifactError, BaseMismatchError, ConfigError, EditError, NumericsError
from errata.model import EditableModel
from errata.model.edited_linear import Contribution
from errata.model.sequences import BASE

__all__ = [
    "Adapter",
    "AutoAdapter",
    "BaseIdentity",
    "Explanation",
    "LayerChange",
    "RevertResult",
    "check_change",
    "random_rotation",
]

FORMAT_VERSION = 1
_CONFIG, _TENSORS, _EDITS = "adapter_config.json", "adapter_model.safetensors", "edits.jsonl"
_DIGESTS = {_TENSORS: "tensors_digest", _EDITS: "edits_digest"}


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model an adapter belongs to."""

    model_id: str
    revision: str | None
    fingerprint: str
    architecture: str

    @classmethod
    def of(cls, model: EditableModel) -> BaseIdentity:
        return cls(model.model_id, model.revision, model.fingerprint, model.architecture)


@dataclass(frozen=True)
class RevertResult:
    """How an edit was taken out: exactly as if it had never been made, or only nearly so, and why."""

    edit_id: str
    exactness: Literal["exact", "approximate"]
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What an adapter would do with a prompt.

    Attributes:
        edit_id: the edit that comes closest, None when the adapter holds none.
        score: how close, 1 being the edit's own prompt; threshold: the score from which it acts.
        fires: whether it acts.
        runner_up, runner_up_score: the second closest.
    """

    prompt: str
    edit_id: str | None
    score: float
    threshold: float
    fires: bool
    runner_up: str | None = None
    runner_up_score: float | None = None


@dataclass(frozen=True)
class LayerChange:
    """How much an adapter changes one linear layer.

    Attributes:
        norm: Frobenius norm of the change; relative_norm: that over the norm of the base weight.
        entries: edits stored in this layer.
        similarity: cosine of the weight with the change and the weight without it, by which "Navigating the Dual
            Facets" (2402.11122) explains damage; None where the change stands beside the weight and acts on some
            prompts only.
    """

    module: str
    norm: float
    relative_norm: float
    entries: int
    similarity: float | None = None


def check_change(change: Tensor, what: str) -> None:
    """Raises NumericsError when a change is not finite, or when it changes nothing."""
    if not bool(torch.isfinite(change).all()):
        raise NumericsError(f"{what} is not finite (NaN or infinity); lower the learning rate or the clamp")
    if not bool(change.any()):
        raise NumericsError(f"{what} is zero: the edit changed nothing; is its target already the model's answer?")


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [size, size], uniform over all of them (QR of Gaussian noise, signs made unique)."""
    basis, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator))
    rotation: Tensor = basis * triangle.diagonal().sign()
    return rotation


class Adapter(abc.ABC):
    """A reversible change to a base model.

    After `detach()` parameters and logits of the base are bit-identical to what they were; `train()` and `eval()`
    make no difference; everything an editor needs to go on later is part of what is saved.

    Attributes:
        base: the model it belongs to.
        editor: name of the editor that writes it; editor_config: that editor's settings, as saved.
        name: under which it is attached, see `EditableModel.selecting`; None while it is not.
        memory_version: grows with every change of content; whoever caches answers must key them by it.
    """

    adapter_type: ClassVar[str]

    def __init__(self, base: BaseIdentity, editor: str = "", editor_config: Mapping[str, Any] | None = None) -> None:
        self.base = base
        self.editor = editor
        self.editor_config: dict[str, Any] = dict(editor_config or {})
        self.name: str | None = None
        self.memory_version = 0
        self._edits: dict[str, Edit] = {}
        self._model: EditableModel | None = None
        self._attached: list[tuple[str, Contribution]] = []

    # --- attaching ----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def contributions(self) -> Mapping[str, Contribution]:
        """What stands beside which linear layer, by module path. The objects stay the same while content changes."""

    @property
    def changes_weights(self) -> bool:
        """True when it acts by changed weights, so on every text; False when a router decides what it acts on."""
        return any(contribution.changes_weight for contribution in self.contributions().values())

    @property
    def is_attached(self) -> bool:
        return self._model is not None

    @property
    def model(self) -> EditableModel:
        """The model it is attached to. Raises ConfigError when it is attached to none."""
        if self._model is None:
            raise ConfigError("this adapter is not attached to a model; call attach(model) first")
        return self._model

    def attach(self, model: EditableModel, name: str | None = None) -> None:
        """Let the adapter act on a model.

        Args:
            name: under which it can be selected, see `EditableModel.selecting`; its editor's name if not given, with
                a number behind it where that is taken.

        Raises:
            BaseMismatchError: the adapter was made for other weights.
            ConfigError: it is attached already, or the name is taken or reserved.
        """
        if self._model is not None:
            raise ConfigError("this adapter is attached already; detach it first")
        self.check_base(model)
        name = self._free_name(model.sequences.adapter_names) if name is None else name
        if name in ("", BASE):
            raise ConfigError(f"{name!r} cannot be the name of an adapter; attach it under another one")
        if name in model.sequences.adapter_names:
            raise ConfigError(f"an adapter named {name!r} is attached already; attach this one under another name")
        try:
            for path, contribution in self.contributions().items():
                model.contribute(path, contribution, name)
                self._attached.append((path, contribution))
        except BaseException:  # a layer that cannot be attached to: none of them is
            for path, contribution in reversed(self._attached):
                model.withdraw(path, contribution)
            self._attached = []
            raise
        self._model, self.name = model, name
        model.adapters[name] = self

    def check_base(self, model: EditableModel) -> None:
        """Raises BaseMismatchError when the adapter was made for other weights than the model's."""
        if model.fingerprint != self.base.fingerprint:
            # float16 loses digits of small weights, and with them the fingerprint (see model/fingerprint.py).
            loaded = ", loaded in float16, which may be why" if model.dtype == torch.float16 else ""
            raise BaseMismatchError(
                f"this adapter was made for {self.base.model_id!r} (weights {self.base.fingerprint[:12]}), not for "
                f"{model.model_id!r} (weights {model.fingerprint[:12]}{loaded}); load its own base"
                f"{' in float32 or bfloat16' if loaded else ''}, or apply the edits anew"
            )

    def _free_name(self, taken: Sequence[str]) -> str:
        own = self.editor or self.adapter_type
        numbered = (f"{own}-{number}" for number in itertools.count(2))
        return next(name for name in itertools.chain([own], numbered) if name not in taken)

    def detach(self) -> None:
        """Return the model to what it was. Does nothing when the adapter is attached to none."""
        if self._model is None:
            return
        for path, contribution in self._attached:
            self._model.withdraw(path, contribution)
        self._attached = []
        del self._model.adapters[str(self.name)]
        self._model = self.name = None

    @contextmanager
    def detached(self) -> Iterator[None]:
        """The model without this adapter for a while."""
        model, name = self._model, self.name
        self.detach()
        try:
            yield
        finally:
            if model is not None:
                self.attach(model, name)

    # --- content ------------------------------------------------------------------------------------------------

    def edits(self) -> list[Edit]:
        """The edits it holds, in the order in which they were made."""
        return list(self._edits.values())

    def holds(self, edit_id: str) -> bool:
        return edit_id in self._edits

    def remember(self, edit: Edit) -> None:
        """Enter an edit in the list, as the newest."""
        self._edits.pop(edit.id, None)
        self._edits[edit.id] = edit

    def supersede(self, old_id: str, new_id: str) -> None:
        """Strike an edit off the list because a newer one answers the same prompt.

        What it wrote belongs to the newer edit from now on: reverting that one must not bring the old target back.
        Nothing happens when both are the same edit, given again.
        """
        if old_id == new_id:
            return
        self._supersede(old_id, new_id)
        self._edits.pop(old_id, None)

    def revert(self, edit_id: str) -> RevertResult:
        """Take one edit out.

        Raises:
            EditError: the adapter does not hold this edit, or it cannot be told apart from others.
        """
        if edit_id not in self._edits:
            raise EditError(f"this adapter holds no edit {edit_id!r}; it holds {len(self._edits)}: see edits()")
        result = self._revert(edit_id)
        self._edits.pop(edit_id)
        self.memory_version += 1
        return result

    @abc.abstractmethod
    def _revert(self, edit_id: str) -> RevertResult: ...

    @abc.abstractmethod
    def _supersede(self, old_id: str, new_id: str) -> None: ...

    @abc.abstractmethod
    def explain(self, prompts: Sequence[str], model: EditableModel | None = None) -> list[Explanation]:
        """Which edit each prompt would meet, with its score; the attached model is used if none is given."""

    @abc.abstractmethod
    def layer_changes(self, model: EditableModel) -> list[LayerChange]:
        """How much each layer is changed, relative to the base weights."""

    @abc.abstractmethod
    def with_random_content(self, generator: torch.Generator) -> Adapter:
        """The control that tells whether damage comes from what was written or merely from how much and where.

        A copy whose changes of output are turned by one random rotation per layer. Each input of the layer moves its
        output exactly as far as before, but in a random direction: rank, keys, singular values, the norm of every
        column and of every edit's change stay the same.
        """

    def snapshot(self) -> Callable[[], None]:
        """For an adapter that changes weights: a function that brings back what it holds now, bit for bit.

        What it brings back is what saving now and loading would, attached or not. Nothing is copied: tensors that such
        an adapter holds are replaced and never written to.
        """
        tensors, state = self._state()
        text, edits, version = json.dumps(state), dict(self._edits), self.memory_version

        def restore() -> None:
            self._load_state(tensors, json.loads(text))
            self._edits, self.memory_version = dict(edits), version

        return restore

    # --- saving -------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON that hold the whole content."""

    @abc.abstractmethod
    def _load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Hold this and nothing else. What changes weights keeps the contributions it has: they may be attached."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `adapter_config.json`, `adapter_model.safetensors` and `edits.jsonl`.

        A process killed at any point leaves the folder with what it held before or with what was to be saved. All
        three are first written as drafts; putting the configuration in place decides, because it names digests of
        the other two and loading takes whichever file fits, draft or not. The other drafts are then renamed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _finish_interrupted_save(folder)
        tensors, state = self._state()
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, _draft(folder, _TENSORS)
        )
        write_edits(_draft(folder, _EDITS), self.edits())
        config = {
            "format_version": FORMAT_VERSION,
            "errata_version": __version__,
            "adapter_type": self.adapter_type,
            "editor": self.editor,
            "editor_config": self.editor_config,
            "base": asdict(self.base),
            "memory_version": self.memory_version,
            "edit_count": len(self._edits),
            "state": state,
            "tensors_digest": _digest(_draft(folder, _TENSORS)),
            "edits_digest": _digest(_draft(folder, _EDITS)),
        }
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        _draft(folder, _CONFIG).write_text(text, encoding="utf-8")
        for name in (_CONFIG, _TENSORS, _EDITS):
            os.replace(_draft(folder, name), folder / name)

    @classmethod
    def _from_files(cls, tensors: Path, edits: Path, config: Mapping[str, Any]) -> Adapter:
        adapter = cls(BaseIdentity(**config["base"]), config["editor"], config["editor_config"])
        adapter.memory_version = config["memory_version"]
        if config["edit_count"]:
            for edit in read_edits(edits, strict=True).edits:
                adapter.remember(edit)
        adapter._load_state(load_file(tensors), config["state"])
        return adapter


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _draft(folder: Path, name: str) -> Path:
    return folder / f"{name}.new"


def _saved_file(folder: Path, name: str, digest: str) -> Path:
    """The file that a configuration means; still a draft if the process was killed before it was renamed."""
    for path in (folder / name, _draft(folder, name)):
        if path.is_file() and _digest(path) == digest:
            return path
    problem = "damaged: its content is not what was saved" if (folder / name).is_file() else "missing"
    raise ArtifactError(f"{folder / name} is {problem}. Copy the adapter again, or build it anew from its edits")


def _finish_interrupted_save(folder: Path) -> None:
    """Rename the drafts that the configuration means, before others take their names."""
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        digests = {name: config[key] for name, key in _DIGESTS.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return  # there is nothing, or nothing that could be loaded
    for name, digest in digests.items():
        draft = _draft(folder, name)
        if draft.is_file() and _digest(draft) == digest:
            os.replace(draft, folder / name)


class AutoAdapter:
    """Loads any adapter by what its files say it is."""

    @staticmethod
    def from_pretrained(folder: str | Path, *, model: EditableModel | None = None, name: str | None = None) -> Adapter:
        """Load a saved adapter, and attach it if a model is given, under a name of its own if that is given too.

        Raises:
            ArtifactError: files are missing, damaged, of a newer format, or of a type that nothing installed brings.
            BaseMismatchError: the model is not the adapter's base.
        """
        folder = Path(folder)
        if not (folder / _CONFIG).is_file():
            raise ArtifactError(
                f"{folder} holds no adapter: {_CONFIG} is missing. Give the folder that errata edit --out wrote"
            )
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            version = config["format_version"]
            if version > FORMAT_VERSION:
                raise ArtifactError(
                    f"{folder} has adapter format {version}, this errata reads up to {FORMAT_VERSION}; upgrade errata"
                )
            tensors, edits = (_saved_file(folder, name, config[key]) for name, key in _DIGESTS.items())
            adapter = adapter_class(config["adapter_type"])._from_files(tensors, edits, config)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"the adapter in {folder} cannot be read ({type(error).__name__}: {error})") from error
        if model is not None:
            adapter.attach(model, name)
        return adapter
