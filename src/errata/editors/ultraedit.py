"""UltraEdit: one gradient, normalised by all that was seen before, and one ridge solve (Gu et al. 2025, 2505.14679).

Nothing is trained and no subject is needed. For a batch of edits, at every place that predicts an answer token, each
chosen MLP output projection gives a row h of inputs and a row g of the gradient of the loss behind it. Both are
z-scored with statistics that go on over all batches, and the rows become wanted changes of output and a change of
weight:

    v = −η ‖ĥ‖² ĝ,   Δᵀ = (Hᵀ H + λ I)⁻¹ Hᵀ V = Hᵀ (H Hᵀ + λ I)⁻¹ V

The right-hand form is what is solved: a system of the size of the answer tokens, never of the key width.

What we do differently from the authors' code: statistics are merged exactly (Chan et al. 1983), so that a batch of one
token does not make them NaN and the variance is not overestimated; they begin with a few texts of errata's own, without
which the first token of all would have nothing to be compared with; the loss is the sum over tokens, so that an edit
weighs the same in a small batch and in a large one; the change is summed in float32 beside the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.adapters import DeltaAdapter, WeightChange
from errata.datasets.builtin import plain_texts
from errata.edit import Edit
from errata.editors.base import Editor, EditorConfig, Written
from errata.editors.layers import scaled_layer, shape_key
from errata.editors.memory import MemoryPart
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.scoring import length_batches
from errata.model.tail import Tail
from errata.model.tokens import Passage
from errata.progress import Progress

__all__ = ["RunningStatistics", "UltraEdit", "UltraEditConfig", "ridge_factors"]

_BATCH_TOKENS = 4096
_WARM_UP_TOKENS = 64  # of each text
_CODE = "XiaojieGu/UltraEdit, config"
_PUBLISHED: dict[tuple[str, int, int], dict[str, Any]] = {
    # atlas: docs/methods/ultraedit.md.
    ("llama", 6, 256): {
        "layers": (5,),
        "learning_rate": 3e-4,
        "steps": 6,
        "stop_loss": 0.3,
        "source": "ours, measured in docs/methods/ultraedit.md",
    },
    ("gptj", 28, 4096): {"layers": tuple(range(18, 27)), "source": _CODE},
    ("mistral", 32, 4096): {"layers": (29, 30), "source": _CODE},
    ("phi3", 40, 5120): {"layers": tuple(range(30, 39)), "source": _CODE},  # Phi-4
}


@dataclass(frozen=True, kw_only=True)
class UltraEditConfig(EditorConfig):
    """Settings of UltraEdit.

    Attributes:
        layers: blocks whose MLP output projection is changed.
        learning_rate: η.
        ridge: λ.
        warm_up: texts of errata's own that the statistics begin with; 0 as published, and then the first batch needs
            several answer tokens.
        steps: how often it is done over for a batch, with what it gave before in place; 1 as published.
        stop_loss: not once more when no answer token's loss is above this.
        full_forward: take the gradient through whole forward passes instead of the tail (slow; for comparison).
    """

    adjustable: ClassVar[frozenset[str]] = EditorConfig.adjustable | {"ridge"}

    batch_size: int = 100
    layers: tuple[int, ...] = (29, 30)
    learning_rate: float = 1e-6
    ridge: float = 1.0
    warm_up: int = 100
    steps: int = 1
    stop_loss: float = 0.1
    full_forward: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers or self.steps < 1 or self.learning_rate <= 0 or self.ridge <= 0 or self.warm_up < 0:
            raise ConfigError("ultraedit needs at least one layer, one step, and a positive learning rate and ridge")

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        return _PUBLISHED.get(shape_key(model))

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        # ‖v‖ is about η width √hidden, because each z-scored feature has variance 1.
        layers = tuple(sorted({scaled_layer(model, layer, 32) for layer in (29, 30)}))
        size = model.anatomy.key_width[layers[0]] * model.anatomy.hidden_size**0.5
        return {
            "layers": layers,
            "learning_rate": 1e-6 * 14336 * 4096**0.5 / size,
            "source": "UltraEdit's for Mistral, depth and learning rate scaled to this model",
        }


@dataclass(frozen=True)
class RunningStatistics:
    """Count, mean and sum of squared deviations of rows, merged exactly however the rows come.

    Attributes:
        count: rows so far; mean, squares: [features], float64.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, features: int) -> RunningStatistics:
        return cls(0, torch.zeros(features, dtype=torch.float64), torch.zeros(features, dtype=torch.float64))

    def merged(self, rows: Tensor) -> RunningStatistics:
        """With more rows, [n, features] (Chan, Golub and LeVeque 1983, equation 2.1)."""
        rows = rows.double()
        total = self.count + len(rows)
        apart = rows.mean(0) - self.mean
        within = (rows - rows.mean(0)).square().sum(0)
        return RunningStatistics(
            total,
            self.mean + apart * (len(rows) / total),
            self.squares + within + apart.square() * (self.count * len(rows) / total),
        )

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows [n, features] in standard deviations, float64; 0 for features that have not varied yet."""
        deviation = (self.squares / max(1, self.count - 1)).sqrt()
        return torch.where(deviation > 0, rows.double() / deviation, 0.0)

    def normalised(self, rows: Tensor) -> Tensor:
        """z-scores of rows [n, features], float64. Of rows that were merged, none is larger than √count."""
        return self.scaled(rows.double() - self.mean)


def ridge_factors(inputs: Tensor, wanted: Tensor, ridge: float) -> tuple[Tensor, Tensor, float]:
    """Δ of least ‖Δ Hᵀ − Vᵀ‖² + λ ‖Δ‖² as factors, and the condition of the system.

    Args:
        inputs: H, [n, inputs]; wanted: V, [n, outputs].

    Returns:
        left [outputs, n] and right [inputs, n], float64: Δ = left @ rightᵀ, column i being what row i contributes.
    """
    inputs, wanted = inputs.double(), wanted.double()
    system = inputs @ inputs.T + ridge * torch.eye(len(inputs), dtype=torch.float64)
    solved = torch.cholesky_solve(wanted, torch.linalg.cholesky(system))
    values = torch.linalg.eigvalsh(system)
    return solved.T, inputs.T, float(values[-1] / values[0])


@dataclass(frozen=True)
class _Rows:
    """What stands at the places that predict answer tokens.

    Attributes:
        of_layer: inputs [n, width] and gradients [n, hidden], float32 on the CPU.
        owners: which passage each belongs to, [n]; losses: of the tokens, [n].
    """

    of_layer: dict[int, tuple[Tensor, Tensor]]
    owners: Tensor
    losses: Tensor

    @classmethod
    def joined(cls, parts: Sequence[_Rows]) -> _Rows:
        return cls(
            {
                layer: (
                    torch.cat([part.of_layer[layer][0] for part in parts]),
                    torch.cat([part.of_layer[layer][1] for part in parts]),
                )
                for layer in parts[0].of_layer
            },
            torch.cat([part.owners for part in parts]),
            torch.cat([part.losses for part in parts]),
        )


class _Reading:
    """A change of a layer's output that remembers what it was given, and a probe of zeros for the gradient there."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left, self._right = left, right

    def __call__(self, inputs: Tensor) -> Tensor:
        self.inputs = inputs.detach()
        left, right = self._left.to(inputs.device), self._right.to(inputs.device)
        self.probe = torch.zeros(*inputs.shape[:2], len(left), device=inputs.device, requires_grad=True)
        return inputs.float() @ right @ left.T + self.probe


def _merged(statistics: Mapping[int, RunningStatistics], rows: _Rows) -> dict[int, RunningStatistics]:
    found = dict(statistics)
    for inputs, gradients in rows.of_layer.values():
        width = inputs.shape[1]
        found[width] = found[width].merged(torch.cat([inputs, gradients], dim=1))
    return found


class UltraEdit(Editor[UltraEditConfig]):
    """Writes a batch of edits in closed form, from one backward pass."""

    name = "ultraedit"
    summary = "a batch of edits in closed form from one normalised gradient; no training, no subject"
    paper = "UltraEdit, 2505.14679"
    Config = UltraEditConfig
    writes_jointly = True

    @property
    def _layers(self) -> tuple[int, ...]:
        return tuple(sorted({self.model.anatomy.layer(layer) for layer in self.config.layers}))

    @property
    def _delta(self) -> DeltaAdapter:
        assert isinstance(self.adapter, DeltaAdapter)
        return self.adapter

    def _new_adapter(self) -> DeltaAdapter:
        paths = [self.model.anatomy.mlp_output[layer] for layer in self._layers]
        return DeltaAdapter.for_layers(self.model, paths, self.name, self.config.to_record())

    def _memory_to_write(self, edits: Sequence[Edit]) -> list[MemoryPart]:
        # A factor for every token that predicts one of the target's.
        tokens = max(len(self.model.passage(edit.prompt, edit.target).answer) for edit in edits)
        blocks = self.model.layer_count - self._layers[0]
        return [self._backward_pass(edits, blocks), *self._memory_of_changes(len(edits), tokens)]

    # --- statistics -------------------------------------------------------------------------------------------------

    def _statistics(self) -> dict[int, RunningStatistics]:
        """By key width, shared by all layers of one shape, as the adapter holds them."""
        kept = self._delta.kept
        found = {}
        for width in {self.model.anatomy.key_width[layer] for layer in self._layers}:
            found[width] = RunningStatistics.empty(width + self.model.anatomy.hidden_size)
            if f"mean.{width}" in kept:
                found[width] = RunningStatistics(
                    int(kept[f"count.{width}"]), kept[f"mean.{width}"], kept[f"squares.{width}"]
                )
        return found

    def _keep(self, statistics: dict[int, RunningStatistics]) -> None:
        self._delta.kept = {
            name: tensor
            for width, one in statistics.items()
            for name, tensor in (
                (f"count.{width}", torch.tensor(one.count)),
                (f"mean.{width}", one.mean),
                (f"squares.{width}", one.squares),
            )
        }

    def _nothing(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Per layer, the factors of no change."""
        anatomy = self.model.anatomy
        return {
            layer: (torch.zeros(anatomy.hidden_size, 0), torch.zeros(anatomy.key_width[layer], 0))
            for layer in self._layers
        }

    def _prepare(self, progress: Progress) -> None:
        if self._delta.kept or not self.config.warm_up:
            return
        # As surprising as edits are: each text ends in the last word of another.
        texts = [text.rsplit(None, 1) for text in plain_texts(self.config.warm_up) if len(text.split()) > 1]
        whole = [
            self.model.passage(text, following[1])
            for (text, _), following in zip(texts, [*texts[1:], *texts[:1]], strict=True)
        ]
        passages = [replace(passage, prompt=passage.prompt[:_WARM_UP_TOKENS]) for passage in whole]
        with self.model.bare():
            self._keep(_merged(self._statistics(), self._rows(passages, self._nothing())))

    # --- edits ------------------------------------------------------------------------------------------------------

    def _rows(self, passages: Sequence[Passage], factors: Mapping[int, tuple[Tensor, Tensor]]) -> _Rows:
        """What stands at the places that predict answers while a change of weight, [hidden, n] and [width, n], is in
        place in each layer."""
        tail = Tail(self.model, self._layers, full=self.config.full_forward)
        parts: list[_Rows] = []
        for indices in length_batches([len(passage.ids) for passage in passages], _BATCH_TOKENS):
            batch = self.model.batch([passages[n] for n in indices], side="right")
            rows, columns, labels = batch.answer_places()
            recording = tail.record(batch)
            read = {layer: _Reading(left, right) for layer, (left, right) in factors.items()}
            logits = tail.run(recording, read, rows, columns)
            losses = F.cross_entropy(logits.float(), labels.to(logits.device), reduction="none")
            gradients = torch.autograd.grad(losses.sum(), [reading.probe for reading in read.values()])
            found: dict[int, tuple[Tensor, Tensor]] = {}
            for (layer, reading), gradient in zip(read.items(), gradients, strict=True):
                places = rows.to(gradient.device), columns.to(gradient.device)
                found[layer] = reading.inputs[places].float().cpu(), gradient[places].float().cpu()
            parts.append(_Rows(found, torch.tensor(indices)[rows.cpu()], losses.detach().cpu()))
        return _Rows.joined(parts)

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        passages = [self.model.passage(edit.prompt, edit.target) for edit in edits]
        statistics, condition, taken = self._statistics(), 1.0, 0
        factors = self._nothing()
        owners = torch.empty(0, dtype=torch.long)
        for _ in range(self.config.steps):
            rows = self._rows(passages, factors)
            if not taken:
                statistics = _merged(statistics, rows)
            elif float(rows.losses.max()) < self.config.stop_loss:
                break
            for layer, (inputs, gradients) in rows.of_layer.items():
                width, both = inputs.shape[1], torch.cat([inputs, gradients], dim=1)
                sizes = statistics[width].normalised(both)[:, :width].square().sum(1, keepdim=True)
                # Done over, it has to come to rest where the gradient does, which is not the mean of all gradients.
                behind = (statistics[width].scaled if taken else statistics[width].normalised)(both)[:, width:]
                wanted = -self.config.learning_rate * sizes * behind
                left, right, solved = ridge_factors(inputs, wanted, self.config.ridge)
                condition = max(condition, solved)
                before = factors[layer]
                factors[layer] = torch.cat([before[0], left.float()], 1), torch.cat([before[1], right.float()], 1)
            owners = torch.cat([owners, rows.owners])
            taken += 1
        changes = [
            WeightChange(
                self.model.anatomy.mlp_output[layer], (edit.id,), left[:, owners == number], right[:, owners == number]
            )
            for layer, (left, right) in factors.items()
            for number, edit in enumerate(edits)
        ]
        of = [*range(len(edits))] * len(factors)
        self._delta.add(self._delta.measured(changes, [edit.prompt for edit in edits], self.model, of))
        self._keep(statistics)
        return Written((taken,) * len(edits), condition=condition)
