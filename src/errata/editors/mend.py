"""MEND: a trained network turns the raw gradient of an edit into a change of weight (Mitchell et al. 2022, 2110.11309).

The network (`gradient_network`) is trained once per base model, on edits of which it is known how else they may be
asked and what they must leave alone:

    L = c_edit · −log p(y | x′; W̃) + c_loc · KL(p(· | x_loc; W) ‖ p(· | x_loc; W̃))

with x′ another wording of the edit, x_loc an unrelated prompt, or x′ with the target behind it, and W̃ = W − α Σ g̃ ũᵀ.
An edit then costs one forward and one backward pass through the last blocks, and the network's own; its change has the
rank of its tokens.

What we do differently. Training never copies a weight: each row of a batch is answered with its own edit's factors
beside the layers, so the edits of a step run side by side. Only blocks from the lowest edited one up run more than
once. The edit's own prompt is one of its wordings. Steps begin where they serve best, found by trying a few.

The gradient is always taken at the base weights, where the network was trained, never at edited ones. So an edit's
change follows from the base and the edit alone: batches and sequences give the same, an edit of the same prompt takes
the place of the earlier one, and reverting is exact.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.adapters import DeltaAdapter, WeightChange
from errata.edit import Edit
from errata.editors.base import EditorConfig, Written, _question
from errata.editors.gradient_network import FactoredUpdate, GradientNetwork, GradientRows, per_row_change
from errata.editors.layers import shape_key
from errata.editors.memory import MemoryPart
from errata.editors.training import (
    TrainedEditor,
    TrainingConfig,
    TrainingData,
    find_trained,
)
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.anatomy import mlp_projections, weight_of
from errata.model.probes import adding
from errata.model.tail import Tail
from errata.progress import Progress

__all__ = ["Mend", "MendConfig", "MendTraining", "gradient_rows"]

_UNTRAINED = "untrained"
_OBSERVED_UNTRAINED = 20  # edits whose gradients an untrained network's statistics are made of
_OBSERVED_TOGETHER = 10

# The code counts edits and not steps: at most 100,000 (EasyEdit), asked every 5,000, patience 20,000.
_PAPER = {
    "rank": 1920,
    "learning_rate": 1e-6,
    "validate_every": 500,
    "patience": 4,
    "source": "MEND, hparams (last three MLPs, rank 1920, Adam 1e-6)",
}
_PUBLISHED: dict[tuple[str, int, int], dict[str, Any]] = {
    # A rank at which the network stays under 5 MB: docs/methods/mend.md.
    ("llama", 6, 256): {
        "rank": 128,
        "learning_rate": 3e-4,
        "steps": 3000,
        "edit_weight": 0.3,
        "source": "MEND, layers and losses; rank, rates, steps and c_edit ours, docs/methods/mend.md",
    },
    ("gpt2", 48, 1600): _PAPER,
    ("gptj", 28, 4096): _PAPER,
    ("llama", 32, 4096): _PAPER,
}


@dataclass(frozen=True, kw_only=True)
class MendConfig(EditorConfig):
    """Settings of MEND.

    Attributes:
        network: folder of a network that `errata train mend` wrote; None for the one that comes with errata for this
            model; "untrained" for one that only normalises, so that an edit is a step along normalised gradients.
        step: factor on the learned steps. With the untrained network, a token's change is about this share of the
            weight's norm.
        full_forward: take gradients through whole forward passes instead of the tail (slow; for comparison).
    """

    adjustable: ClassVar[frozenset[str]] = EditorConfig.adjustable | {"network", "step"}

    network: str | None = None
    step: float = 1.0
    full_forward: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step > 0:
            raise ConfigError(f"step must be more than 0, not {self.step:g}")

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        return {"source": "the network's, as it was trained"}


@dataclass(frozen=True, kw_only=True)
class MendTraining(TrainingConfig):
    """Settings of the training, beside those of `TrainingConfig`.

    Attributes:
        layers: blocks whose MLP is changed, all of its projections; negative numbers count from the last.
        rank: of the network's factors.
        edit_weight, locality_weight: c_edit and c_loc.
        step_rate: learning rate of log α.
        probes: locality prompts per edit and step.
        statistics: edits whose gradients the running statistics are made of.
    """

    layers: tuple[int, ...] = (-3, -2, -1)
    rank: int = 1920
    learning_rate: float = 1e-6
    edit_weight: float = 0.1
    locality_weight: float = 1.0
    step_rate: float = 1e-2
    probes: int = 2
    statistics: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.rank, self.probes, self.statistics) < 1 or not self.layers:
            raise ConfigError("mend needs at least one layer, and rank, probes and statistics of at least 1")

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        return _PUBLISHED.get(shape_key(model))

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        # Published for Llama-2's rows of 4096 + 11008 numbers.
        width = model.anatomy.hidden_size + max(model.anatomy.key_width)
        return {
            "layers": tuple(range(-min(3, model.layer_count), 0)),
            "rank": max(1, round(1920 * min(1.0, width / 15104))),
            "learning_rate": 1e-4,
            "source": "MEND for Llama, rank in proportion; learning rate ours",
        }


def gradient_rows(
    model: EditableModel, tail: Tail, paths: Sequence[str], edits: Sequence[Edit]
) -> dict[str, GradientRows]:
    """What the gradients of matrices are made of, for each edit's mean loss over its target's tokens, at the weights as
    they are now. Tokens whose gradient vanishes are left out, and so is a prompt's first one, if there are others.

    Args:
        paths: of linear layers in the tail.
    """
    batch = model.batch([model.passage(edit.prompt, edit.target) for edit in edits], side="right")
    rows, columns, labels = batch.answer_places()
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[[Tensor], Tensor]:
        """Adds a zero, by whose gradient the output's is known."""
        width = weight_of(model.module(path)).shape[0]

        def zero(own: Tensor) -> Tensor:
            inputs[path] = own.detach()
            outputs[path] = own.new_zeros(*own.shape[:2], width).requires_grad_(True)
            return outputs[path]

        return zero

    recording = tail.record(batch)
    with torch.enable_grad(), adding(model.model, {path: watch(path) for path in paths}, len(edits)):
        states = tail.states(recording, {}, rows, columns)
    with torch.enable_grad():
        logits = model.head(states).float()
        losses = F.cross_entropy(logits, labels.to(logits.device), reduction="none")
        per_edit = torch.bincount(rows, minlength=len(edits))
        # A sum over edits: what each edit's gradient is does not depend on who is in the batch.
        loss = (losses / per_edit[rows].to(losses.device)).sum()
        found = torch.autograd.grad(loss, [outputs[path] for path in paths])
    # The first token is an attention sink, much the same in all prompts: what is written there acts on all of them.
    beyond = (batch.positions > 0) | (batch.prompt_lengths == 1).unsqueeze(1)
    rows_of: dict[str, GradientRows] = {}
    for path, gradient in zip(paths, found, strict=True):
        counted = gradient.any(dim=2) & beyond.to(gradient.device)
        owner = counted.nonzero()[:, 0]
        rows_of[path] = GradientRows(inputs[path][counted].float(), gradient[counted].float(), owner)
    return rows_of


def _paths(model: EditableModel, layers: Sequence[int]) -> list[str]:
    anatomy = model.anatomy
    chosen = sorted({anatomy.layer(layer) for layer in layers})
    return [path for layer in chosen for path in mlp_projections(model.model, anatomy.mlp_output[layer])]


def _shapes(model: EditableModel, paths: Sequence[str]) -> dict[str, tuple[int, int]]:
    shapes = {path: weight_of(model.module(path)).shape for path in paths}
    return {path: (shape[0], shape[1]) for path, shape in shapes.items()}


def _observe(
    model: EditableModel, network: GradientNetwork, tail: Tail, edits: Sequence[Edit], progress: Progress
) -> None:
    """Give a network the statistics of the gradients of edits."""
    progress.start("statistics of gradients", len(edits))
    for start in range(0, len(edits), _OBSERVED_TOGETHER):
        batch = edits[start : start + _OBSERVED_TOGETHER]
        network.observe(gradient_rows(model, tail, list(network.shapes), batch))
        progress.advance(len(batch))


def _unit_steps(model: EditableModel, paths: Sequence[str]) -> dict[str, float]:
    """Steps at which one token of normalised numbers changes a weight by about its own norm."""
    weights = {path: weight_of(model.module(path)).float() for path in paths}
    return {path: float(weight.norm()) / weight.numel() ** 0.5 for path, weight in weights.items()}


class _Mending:
    """The training of a network, as `run_training` takes it."""

    def __init__(self, model: EditableModel, config: MendTraining) -> None:
        self.model, self.config = model, config
        self.paths = _paths(model, config.layers)
        generator = torch.Generator().manual_seed(config.seed)
        self.network = GradientNetwork(_shapes(model, self.paths), config.rank, generator).to(model.device)
        self.tail = Tail(model, config.layers)

    def _batches(self, edits: Sequence[Edit]) -> list[Sequence[Edit]]:
        size = self.config.batch_size
        return [edits[start : start + size] for start in range(0, len(edits), size)]

    def prepare(self, data: TrainingData, progress: Progress) -> None:
        """Statistics of gradients, and the steps to begin with: those of a few that serve best."""
        _observe(self.model, self.network, self.tail, data.training[: self.config.statistics], progress)
        unit = _unit_steps(self.model, self.paths)
        shares = [10 ** (-power / 2) for power in range(1, 10)]
        progress.start("steps to begin with", len(shares))
        losses = {}
        for share in shares:
            self.network.set_steps({path: share * size for path, size in unit.items()})
            losses[share] = self.examine(data.training[: self.config.batch_size])["loss"]
            progress.advance(1)
        best = min(shares, key=lambda share: losses[share])
        self.network.set_steps({path: best * size for path, size in unit.items()})

    def optimizer(self) -> torch.optim.Adam:
        steps = self.network.log_steps
        others = [parameter for parameter in self.network.parameters() if parameter is not steps]
        return torch.optim.Adam(
            [{"params": others, "lr": self.config.learning_rate}, {"params": [steps], "lr": self.config.step_rate}]
        )

    def _rows(self, edits: Sequence[Edit]) -> dict[str, GradientRows]:
        return gradient_rows(self.model, self.tail, self.paths, edits)

    def learn(self, edits: Sequence[Edit], rng: random.Random) -> float:
        loss = self._scores(edits, rng)["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @torch.no_grad()
    def examine(self, edits: Sequence[Edit]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for number, batch in enumerate(self._batches(edits)):
            for name, score in self._scores(batch, random.Random(f"examine {number}")).items():
                totals[name] = totals.get(name, 0.0) + float(score) * len(batch) / len(edits)
        return totals

    def _scores(self, edits: Sequence[Edit], rng: random.Random) -> dict[str, Tensor]:
        """The loss; "edited", the share of edits whose target is the first choice at every place; and "kept", the share
        of places in other questions whose first choice stayed."""
        updates = self.network(self._rows(edits))
        probes = [
            (number, probe)
            for number, edit in enumerate(edits)
            for probe in rng.sample(edit.locality, min(self.config.probes, len(edit.locality)))
        ]
        asked = [self.model.passage(rng.choice((edit.prompt, *edit.rephrases)), edit.target) for edit in edits]
        beside = [self.model.passage(probe.prompt, probe.answer or "") for _, probe in probes]
        batch = self.model.batch([*asked, *beside], side="right")
        whose = torch.tensor([*range(len(edits)), *(number for number, _ in probes)])
        recording = self.tail.record(batch)
        rows, columns, labels = batch.answer_places()
        target = rows < len(edits)
        rows, columns, labels = rows[target], columns[target], labels[target]
        # Of other questions all that is predicted from the prompt's last token on, also what follows the answer; of the
        # edit's own only that: the model shall go on behind the target as it would have.
        real = batch.mask.bool()
        predicting = real & (batch.positions >= batch.prompt_lengths.unsqueeze(1) - 1)
        predicting[: len(edits)] &= real[: len(edits)].flip(1).cumsum(1).flip(1) == 1
        other_rows, other_columns = predicting.nonzero(as_tuple=True)
        with torch.no_grad():
            before = self.model.head(self.tail.states(recording, {}, other_rows, other_columns)).float().log_softmax(-1)
        with self._changed(updates, whose):
            states = self.tail.states(recording, {}, torch.cat([rows, other_rows]), torch.cat([columns, other_columns]))
        logits = self.model.head(states).float()
        said, after = logits[: len(rows)], logits[len(rows) :].log_softmax(-1)
        losses = F.cross_entropy(said, labels.to(said.device), reduction="none")
        per_edit = torch.bincount(rows, minlength=len(edits))[rows].to(losses.device)
        edit_loss = (losses / per_edit).sum() / len(edits)
        drift = (before.exp() * (before - after)).sum(-1).mean()
        wrong = (said.argmax(-1) != labels.to(said.device)).nonzero().squeeze(1).to(rows.device)
        return {
            "loss": self.config.edit_weight * edit_loss + self.config.locality_weight * drift,
            "edited": (torch.bincount(rows[wrong], minlength=len(edits)) == 0).float().mean(),
            "kept": (before.argmax(-1) == after.argmax(-1)).float().mean(),
        }

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        factors = (".inner", ".outer")  # nearly all of the numbers; bfloat16 is enough for them
        state = self.network.state_dict()
        tensors = {name: tensor.bfloat16() if name.endswith(factors) else tensor for name, tensor in state.items()}
        return tensors, {"paths": self.paths, "rank": self.config.rank}

    def _changed(self, updates: Mapping[str, FactoredUpdate], whose: Tensor) -> AbstractContextManager[None]:
        """A context in which row i is answered with the change of edit whose[i]."""
        changes = {path: per_row_change(update, whose.to(update.owner)) for path, update in updates.items()}
        context: AbstractContextManager[None] = adding(self.model.model, changes, len(whose))
        return context


class Mend(TrainedEditor[MendConfig]):
    """Writes each edit as a change that a trained network makes of its gradient."""

    name = "mend"
    summary = "a trained network turns the gradient of an edit into a low-rank change of the last MLPs"
    paper = "MEND, 2110.11309"
    Config = MendConfig
    Training = MendTraining
    writes_jointly = True

    @cached_property
    def _network(self) -> GradientNetwork:
        if self.config.network == _UNTRAINED:
            training = MendTraining.for_model(self.model)
            return GradientNetwork(_shapes(self.model, _paths(self.model, training.layers)), 1).to(self.model.device)
        tensors, record = find_trained(self.name, self.model, self.config.network)
        network = GradientNetwork(_shapes(self.model, record["paths"]), record["rank"])
        network.load_state_dict(tensors)
        return network.to(self.model.device).requires_grad_(False)

    def _new_adapter(self) -> DeltaAdapter:
        return DeltaAdapter.for_layers(self.model, list(self._network.shapes), self.name, self.config.to_record())

    @cached_property
    def _tail(self) -> Tail:
        anatomy, paths = self.model.anatomy, self._network.shapes
        edited = [n for n, block in enumerate(anatomy.blocks) if any(path.startswith(f"{block}.") for path in paths)]
        return Tail(self.model, tuple(edited), full=self.config.full_forward)

    def _memory_to_write(self, edits: Sequence[Edit]) -> list[MemoryPart]:
        # An edit's change has the rank of its tokens.
        tokens = max(len(self.model.passage(edit.prompt, edit.target).ids) for edit in edits)
        blocks = self.model.layer_count - self._tail.first
        return [self._backward_pass(edits, blocks), *self._memory_of_changes(len(edits), tokens)]

    def _prepare(self, progress: Progress) -> None:
        if self.config.network == _UNTRAINED:
            from errata.atlas.edits import training_edits

            with self.model.bare():
                _observe(self.model, self._network, self._tail, training_edits(_OBSERVED_UNTRAINED), progress)
            self._network.set_steps(_unit_steps(self.model, list(self._network.shapes)))

    @torch.no_grad()
    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        assert isinstance(self.adapter, DeltaAdapter)
        with self.model.bare():
            updates = self._network(gradient_rows(self.model, self._tail, list(self._network.shapes), edits))
        changes, of = [], []
        for number, edit in enumerate(edits):
            for path, update in updates.items():
                left, right = (factor.cpu().contiguous() for factor in update.of(number))
                changes.append(WeightChange(path, (edit.id,), self.config.step * left, right, alone=True))
                of.append(number)
        asked = {_question(edit) for edit in edits}
        earlier = [old.id for old in self.adapter.edits() if _question(old) in asked]
        measured = self.adapter.measured(changes, [edit.prompt for edit in edits], self.model, of=of)
        self.adapter.add(measured, instead_of=earlier)
        return Written((1,) * len(edits))

    @classmethod
    def _trainee(cls, model: EditableModel, config: MendTraining) -> _Mending:
        return _Mending(model, config)
