"""Fine-tuning one layer on the target: FT-M, and FT-L as it is published. The plain baseline, honestly done.

FT-M is objective "target_new" of EasyEdit: ordinary causal cross-entropy on the target tokens, the prompt masked. FT-L
is objective "prompt_last": every target token is scored from the one distribution behind the prompt, so a target of
several tokens asks for all of them in the same place. It is here to be compared with, quirk and all.

What we do differently: one leading space, label boundaries by token ids, optimiser state per batch, the change kept
beside the weight. Each batch's own change is recorded as low-rank factors so that it can be subtracted later; what
the factors do not hold stays in the adapter's residue, and `revert` says how much that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.adapters import DeltaAdapter, WeightChange
from errata.edit import Edit
from errata.editors.base import Editor, EditorConfig, Written
from errata.editors.layers import scaled_layer, shape_key
from errata.editors.losses import target_loss
from errata.editors.memory import MemoryPart, weight_entries
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.model.tail import Tail
from errata.progress import Progress

__all__ = ["FineTune", "FineTuneConfig"]

# EasyEdit's hyperparameter files for FT: Llama layer 21; GPT-J layer 21; Adam, 5e-4, 25 steps, no constraint.
_PUBLISHED: dict[tuple[str, int, int], dict[str, Any]] = {
    ("llama", 32, 4096): {"layers": (21,), "source": "EasyEdit FT for Llama: layer 21, unconstrained"},
    ("gptj", 28, 4096): {"layers": (21,), "source": "EasyEdit FT for GPT-J: layer 21, unconstrained"},
    ("gpt2", 48, 1600): {"layers": (1,), "source": "EasyEdit FT for GPT-2 XL: layer 1, unconstrained"},
}


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(EditorConfig):
    """Settings of FT-M and FT-L.

    Attributes:
        objective: "target_new" (FT-M) scores each target token behind those before it, "prompt_last" (FT-L) all of them
            behind the prompt.
        layers: blocks whose MLP output projection is trained.
        learning_rate, steps, weight_decay: of Adam, started anew for each batch.
        stop_loss: no further step once the loss is below this.
        clamp: largest change of a single weight by one batch, or None for no limit.
        recorded_rank: rank of the factors recorded for each batch.
        full_forward: train through whole forward passes instead of the tail (slow; for comparison).
    """

    adjustable: ClassVar[frozenset[str]] = EditorConfig.adjustable | {"objective", "recorded_rank"}

    objective: Literal["target_new", "prompt_last"] = "target_new"
    layers: tuple[int, ...] = (0,)
    learning_rate: float = 5e-4
    steps: int = 25
    weight_decay: float = 0.0
    stop_loss: float = 1e-2
    clamp: float | None = None
    recorded_rank: int = 8
    full_forward: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.learning_rate <= 0 or self.recorded_rank < 1 or not self.layers:
            raise ConfigError("ft needs at least one layer, one step, rank 1 and a positive learning rate")

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        return _PUBLISHED.get(shape_key(model))

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        # A step of Adam moves every weight by the learning rate, so what one step does to the output grows with
        # the key width; 5e-4 is published for widths of about 11,000.
        width = model.anatomy.key_width[0]
        return {
            "layers": (scaled_layer(model, 21, 32),),
            "learning_rate": 5e-4 * max(1.0, (11008 / width) ** 0.5),
            "source": "EasyEdit FT for Llama, depth and learning rate scaled to this model",
        }


class FineTune(Editor[FineTuneConfig]):
    """Fine-tunes the MLP output projection of chosen layers on each edit's target."""

    name = "ft"
    summary = "fine-tune one MLP output projection on the target tokens (FT-M; objective 'prompt_last' for FT-L)"
    paper = "EasyEdit's FT-M (target_new) and FT-L (prompt_last), 2308.07269"
    Config = FineTuneConfig
    edits_encoders = True
    writes_jointly = True

    def _new_adapter(self) -> DeltaAdapter:
        paths = [self.model.anatomy.mlp_output[self.model.anatomy.layer(layer)] for layer in self.config.layers]
        return DeltaAdapter.for_layers(self.model, paths, self.name, self.config.to_record())

    def _memory_to_write(self, edits: Sequence[Edit]) -> list[MemoryPart]:
        entries = weight_entries(self.model, list(self.adapter.contributions()))
        blocks = self.model.layer_count - min(self.model.anatomy.layer(layer) for layer in self.config.layers)
        fewer = "train fewer layers"
        return [
            self._backward_pass(edits, blocks),
            *self._memory_of_changes(len(edits), self.config.recorded_rank),
            MemoryPart("a change, its gradient and Adam's two moments", 4 * 4 * entries, fewer),
            MemoryPart("what has no factors, and taking these", 3 * 4 * entries, fewer, on_host=True),
        ]

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        model, config = self.model, self.config
        assert isinstance(self.adapter, DeltaAdapter)
        layers = [model.anatomy.layer(layer) for layer in config.layers]
        batch = model.batch([model.passage(edit.prompt, edit.target) for edit in edits], side="right")
        rows, columns, labels = batch.answer_places()
        if config.objective == "prompt_last":
            columns = batch.next_columns()[rows]
        tail = Tail(model, tuple(layers), full=config.full_forward)
        recording = tail.record(batch)
        weights = {layer: weight_of(model.module(model.anatomy.mlp_output[layer])) for layer in layers}
        changes = {layer: torch.zeros(weight.shape, device=weight.device) for layer, weight in weights.items()}
        for change in changes.values():
            change.requires_grad_(True)
        optimizer = torch.optim.Adam(changes.values(), lr=config.learning_rate, weight_decay=config.weight_decay)

        def product(change: Tensor) -> Any:
            return lambda inputs: inputs @ change.to(inputs.dtype).T

        taken = 0
        for _ in range(config.steps):
            logits = tail.run(recording, {layer: product(change) for layer, change in changes.items()}, rows, columns)
            loss = target_loss(logits, labels, rows, len(edits))
            if loss.item() < config.stop_loss:
                break
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            taken += 1
            if config.clamp is not None:
                with torch.no_grad():
                    for change in changes.values():
                        change.clamp_(-config.clamp, config.clamp)
        self._add(edits, {layer: c.detach().cpu() for layer, c in changes.items()})
        return Written((taken,) * len(edits))

    def _add(self, edits: Sequence[Edit], changes: dict[int, Tensor]) -> None:
        assert isinstance(self.adapter, DeltaAdapter)
        recorded: list[WeightChange] = []
        residues: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(self.config.seed)
        for layer, change in changes.items():
            path = self.model.anatomy.mlp_output[layer]
            left, right = _low_rank(change, self.config.recorded_rank, generator)
            whole = float(change.square().sum())
            residue = change - left @ right.T
            share = 1.0 - float(residue.square().sum()) / whole if whole else 1.0
            ids = tuple(edit.id for edit in edits)
            recorded.append(WeightChange(path, ids, left, right, recorded=share))
            residues[path] = residue
        self.adapter.add(self.adapter.measured(recorded, [edit.prompt for edit in edits], self.model), residues)


def _low_rank(change: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors [outputs, r], [inputs, r] of a near-best rank-r approximation, by randomised range finding
    (Halko, Martinsson and Tropp 2011, with two power iterations)."""
    rank = min(rank, *change.shape)
    sketch = torch.randn(change.shape[1], min(rank + 4, change.shape[1]), generator=generator)
    basis = torch.linalg.qr(change @ sketch).Q
    for _ in range(2):
        basis = torch.linalg.qr(change @ (change.T @ basis)).Q
    left, values, right = torch.linalg.svd(basis.T @ change, full_matrices=False)
    return (basis @ left[:, :rank]) * values[:rank], right[:rank].T.contiguous()
