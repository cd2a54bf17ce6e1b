"""Changes of weight: low-rank factors per edit, or dense, summed in float32 beside an untouched base.

Factors are kept, not multiplied out, so that an edit costs rank x (outputs + inputs) numbers on disk and can be
subtracted. What a dense method wrote and its factors do not hold is kept as one `residue` per layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.adapters.base import (
    Adapter,
    BaseIdentity,
    Explanation,
    LayerChange,
    RevertResult,
    check_change,
    random_rotation,
)
from errata.errors import ConfigError, EditError
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.model.edited_linear import Contribution
from errata.model.probes import capturing_inputs
from errata.model.scoring import length_batches

__all__ = ["DeltaAdapter", "WeightChange"]

_BLOCK = 64
_FIRES = 0.5
_IN_JSON = ("path", "edit_ids", "own", "recorded", "batch", "alone")


@dataclass(frozen=True)
class WeightChange:
    """What one batch of edits, or one edit of it, added to one layer: left @ rightᵀ.

    Attributes:
        left: [outputs, rank]; right: [inputs, rank]; float32.
        own: how strongly it acts on its edits' own prompts, see `DeltaAdapter.measured`; scores are relative to it.
        recorded: share of the squared norm of the whole change that the factors hold; 1 when they are all of it.
        keys: [inputs, any], what it was written at, if later edits are to spare that.
        batch: number of the batch that it was computed with, given by `DeltaAdapter.add`.
        alone: it follows from the base model and its edits alone, whatever else was in place.
    """

    path: str
    edit_ids: tuple[str, ...]
    left: Tensor
    right: Tensor
    own: float = 1.0
    recorded: float = 1.0
    keys: Tensor | None = None
    batch: int = 0
    alone: bool = False

    def strength(self, inputs: Tensor, counted: Tensor) -> Tensor:
        """[rows]: the largest norm of its effect on inputs [rows, columns, D] where counted [rows, columns] is True."""
        effect = (inputs.float() @ self.right.to(inputs.device)) @ self.left.to(inputs.device).T
        sizes: Tensor = effect.norm(dim=-1)
        return sizes.masked_fill(~counted.to(inputs.device), 0.0).amax(dim=1)


class _Sum:
    """The sum of factor products of one layer, in blocks of a fixed size.

    Adding changes one by one and adding them all after loading then do the same products in the same order: bit-equal.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.closed = torch.zeros(shape)
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []

    def _open(self) -> Tensor:
        return torch.cat(self.left, dim=1) @ torch.cat(self.right, dim=1).T

    def add(self, change: WeightChange) -> None:
        self.left.append(change.left)
        self.right.append(change.right)
        if len(self.left) == _BLOCK:
            self.closed = self.closed + self._open()
            self.left, self.right = [], []

    def total(self) -> Tensor:
        return self.closed + self._open() if self.left else self.closed


class _WeightContribution(Contribution):
    """The changes of one layer as they enter its weight."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.sum = _Sum(shape)
        self.residue: Tensor | None = None

    def weight_change(self) -> Tensor | None:
        total = self.sum.total()
        return total if self.residue is None else total + self.residue


class DeltaAdapter(Adapter):
    """Weight changes to chosen linear layers.

    Args:
        shapes: [outputs, inputs] of each layer that may be changed, by module path.

    Attributes:
        notes, kept: what an editor needs besides to go on, as JSON and as tensors by name; a tensor is replaced and
            never written to.
    """

    adapter_type: ClassVar[str] = "delta"

    def __init__(
        self,
        base: BaseIdentity,
        editor: str = "",
        editor_config: Mapping[str, Any] | None = None,
        *,
        shapes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(base, editor, editor_config)
        self._layers: dict[str, _WeightContribution] = {p: _WeightContribution(s) for p, s in (shapes or {}).items()}
        self._changes: list[WeightChange] = []
        self.notes: dict[str, Any] = {}
        self.kept: dict[str, Tensor] = {}

    @classmethod
    def for_layers(
        cls, model: EditableModel, paths: Sequence[str], editor: str, config: Mapping[str, Any]
    ) -> DeltaAdapter:
        """An empty adapter for linear layers of a model."""
        shapes = {
            path: (weight.shape[0], weight.shape[1]) for path in paths for weight in [weight_of(model.module(path))]
        }
        return cls(BaseIdentity.of(model), editor, config, shapes=shapes)

    def contributions(self) -> Mapping[str, Contribution]:
        return self._layers

    def add(
        self,
        changes: Sequence[WeightChange],
        residues: Mapping[str, Tensor] | None = None,
        *,
        instead_of: Collection[str] = (),
    ) -> None:
        """Take in the changes of one batch of edits, all or none of them.

        Args:
            instead_of: ids of edits whose own changes give way to these.

        Raises:
            ConfigError: a change of a layer that this adapter does not cover.
            NumericsError: a change is not finite, or none of them changes anything.
        """
        residues = residues or {}
        for path in (*(change.path for change in changes), *residues):
            if path not in self._layers:
                raise ConfigError(
                    f"this adapter covers {', '.join(self._layers)}, not {path}; begin a new adapter for other layers"
                )
        for factors in ([change.left for change in changes], [change.right for change in changes]):  # 0 on either side
            flat = torch.cat([part.detach().flatten() for part in (*factors, *residues.values())])
            check_change(flat, "the change of weight")
        batch = 1 + max((change.batch for change in self._changes), default=0)
        if instead_of:
            self._changes = [one for one in self._changes if not set(one.edit_ids) & set(instead_of)]
            self._rebuild()
        for change in changes:
            self._changes.append(replace(change, batch=batch))
            self._layers[change.path].sum.add(change)
        for path, residue in residues.items():
            layer = self._layers[path]
            layer.residue = residue if layer.residue is None else layer.residue + residue
        self._moved()

    def stored_keys(self, path: str) -> list[Tensor]:
        """The keys of the edits it holds in one layer, [inputs, any] each, where they were kept."""
        return [change.keys for change in self._changes if change.path == path and change.keys is not None]

    def factors(self, path: str) -> tuple[Tensor, Tensor] | None:
        """A layer's whole change as left [outputs, rank] and right [inputs, rank], or None where it is dense."""
        own = [change for change in self._changes if change.path == path]
        if self._layers[path].residue is not None:
            return None
        shape = self._layers[path].shape
        none = [torch.zeros(size, 0) for size in shape]
        left = torch.cat([none[0], *(change.left for change in own)], dim=1)
        return left, torch.cat([none[1], *(change.right for change in own)], dim=1)

    def _moved(self) -> None:
        self.memory_version += 1
        for layer in self._layers.values():
            layer.version += 1

    def _rebuild(self) -> None:
        for layer in self._layers.values():
            layer.sum = _Sum(layer.shape)
        for change in self._changes:
            self._layers[change.path].sum.add(change)
        self._moved()

    def _revert(self, edit_id: str) -> RevertResult:
        own = [change for change in self._changes if edit_id in change.edit_ids]
        shared = next((change for change in own if len(change.edit_ids) > 1), None)
        if shared is not None:
            raise EditError(
                f"edit {edit_id!r} was written in one batch with {len(shared.edit_ids) - 1} others and cannot be told "
                "apart from them; apply the remaining edits anew, or edit with batch_size=1"
            )
        recorded = min((change.recorded for change in own), default=1.0)
        self._changes = [change for change in self._changes if edit_id not in change.edit_ids]
        last = max((change.batch for change in own), default=0)
        others = [change for change in self._changes if not change.alone]
        later = sum(change.batch > last for change in others)
        beside = sum(change.batch in {one.batch for one in own} for change in others)
        if not self._changes:
            for layer in self._layers.values():
                layer.residue = None
            self._rebuild()
            return RevertResult(edit_id, "exact", "it was the only edit; the weights are the base's again")
        self._rebuild()
        reasons = []
        if later:
            reasons.append(f"{later} later changes were computed with it in place")
        if beside:
            reasons.append(f"{beside} changes of its own batch were computed together with it")
        if recorded < 1.0 - 1e-6:
            reasons.append(f"only {recorded:.1%} of its squared norm was recorded in factors and could be removed")
        if reasons:
            return RevertResult(edit_id, "approximate", "its own change is subtracted, but " + " and ".join(reasons))
        if any(change.batch >= last for change in self._changes):
            return RevertResult(edit_id, "exact", "it is subtracted whole, and no other change depends on it")
        return RevertResult(edit_id, "exact", "it was the last change and is subtracted whole")

    def _supersede(self, old_id: str, new_id: str) -> None:
        self._changes = [
            replace(change, edit_ids=tuple(new_id if i == old_id else i for i in change.edit_ids))
            for change in self._changes
        ]

    def layer_changes(self, model: EditableModel) -> list[LayerChange]:
        found = []
        for path, layer in self._layers.items():
            change = layer.weight_change()
            norm = 0.0 if change is None else float(change.norm())
            weight = weight_of(model.module(path)).float()
            base = float(weight.norm())
            shared = 0.0 if change is None else float((weight * change.to(weight.device)).sum())
            edited = math.sqrt(max(0.0, base**2 + 2 * shared + norm**2))  # norm of the weight with its change
            similarity = (base**2 + shared) / (base * edited) if base and edited else 0.0
            entries = len({i for c in self._changes if c.path == path for i in c.edit_ids})
            found.append(LayerChange(path, norm, norm / base if base else 0.0, entries, similarity))
        return found

    @torch.no_grad()
    def _strengths(self, changes: Sequence[WeightChange], prompts: Sequence[str], model: EditableModel) -> Tensor:
        """[prompts, changes]: how strongly each change acts on each prompt, at the token where it acts most.

        A prompt's first token is left out, as it is from the statistics of keys: it is an attention sink, much the same
        in all prompts, and large. Where it is the only token it counts. Changes that follow from the base model alone
        are read there, where they were made.
        """
        of_base = all(change.alone for change in changes)
        found = torch.zeros(len(prompts), len(changes))
        passages = [model.passage(prompt) for prompt in prompts]
        for indices in length_batches([len(p.ids) for p in passages], 4096):
            batch = model.batch([passages[i] for i in indices], side="right")
            with (
                capturing_inputs(model.model, {change.path for change in changes}, len(indices)) as inputs,
                model.sequences.narrowed(indices, len(prompts)),
                model.bare() if of_base else nullcontext(),
            ):
                model.trunk_states(batch)
            counted = batch.mask.bool() & ((batch.positions > 0) | (batch.prompt_lengths == 1).unsqueeze(1))
            for number, change in enumerate(changes):
                found[indices, number] = change.strength(inputs[change.path], counted).cpu()
        return found

    def measured(
        self,
        changes: Sequence[WeightChange],
        prompts: Sequence[str],
        model: EditableModel,
        of: Sequence[int] | None = None,
    ) -> list[WeightChange]:
        """Changes to be added, each with `own` as `explain` will measure it on the bare prompts of its edits.

        Args:
            of: for each change, which of the prompts it belongs to; if not given, all of them.
        """
        strengths = self._strengths(changes, prompts, model)
        own = strengths.amax(dim=0) if of is None else strengths[list(of), range(len(changes))]
        return [replace(change, own=float(strength)) for change, strength in zip(changes, own, strict=True)]

    def explain(self, prompts: Sequence[str], model: EditableModel | None = None) -> list[Explanation]:
        """Score of an edit on a prompt: how strongly it acts there, at the token where it acts most, relative to the
        same on its own prompt, in the mean over its layers. A change of weight always acts; "fires" means at least half
        as much as there."""
        strengths = self._strengths(self._changes, prompts, model or self.model)
        explanations = []
        for prompt, row in zip(prompts, strengths.tolist(), strict=True):
            relative: dict[tuple[str, int], list[float]] = {}
            for change, strength in zip(self._changes, row, strict=True):
                for edit_id in change.edit_ids:
                    relative.setdefault((edit_id, change.batch), []).append(strength / max(change.own, 1e-12))
            scores: dict[str, float] = {}
            for (edit_id, _), own in relative.items():
                scores[edit_id] = max(scores.get(edit_id, 0.0), sum(own) / len(own))
            held = sorted(((s, i) for i, s in scores.items() if i in self._edits), key=lambda pair: -pair[0])
            best = held[0] if held else (0.0, None)
            second = held[1] if len(held) > 1 else (None, None)
            explanations.append(Explanation(prompt, best[1], best[0], _FIRES, best[0] >= _FIRES, second[1], second[0]))
        return explanations

    def with_random_content(self, generator: torch.Generator) -> DeltaAdapter:
        shapes = {path: layer.shape for path, layer in self._layers.items()}
        control = DeltaAdapter(self.base, self.editor, self.editor_config, shapes=shapes)
        if self._changes:
            turns = {path: random_rotation(shape[0], generator) for path, shape in shapes.items()}
            control.add(
                [replace(change, left=turns[change.path] @ change.left) for change in self._changes],
                {p: turns[p] @ layer.residue for p, layer in self._layers.items() if layer.residue is not None},
            )
        return control

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        rows = []
        for number, change in enumerate(self._changes):
            tensors[f"change.{number}.left"] = change.left
            tensors[f"change.{number}.right"] = change.right
            if change.keys is not None:
                tensors[f"change.{number}.keys"] = change.keys
            rows.append({name: getattr(change, name) for name in _IN_JSON})
        tensors |= {
            f"residue.{path}": layer.residue for path, layer in self._layers.items() if layer.residue is not None
        }
        tensors |= {f"kept.{name}": tensor for name, tensor in self.kept.items()}
        shapes = {path: list(layer.shape) for path, layer in self._layers.items()}
        return tensors, {"shapes": shapes, "changes": rows, "notes": self.notes}

    def _load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        for path, shape in state["shapes"].items():
            layer = self._layers.setdefault(path, _WeightContribution((shape[0], shape[1])))
            layer.sum, layer.residue = _Sum(layer.shape), tensors.get(f"residue.{path}")
            layer.version += 1
        self._changes = [
            WeightChange(
                row["path"],
                tuple(row["edit_ids"]),
                tensors[f"change.{n}.left"],
                tensors[f"change.{n}.right"],
                row["own"],
                row["recorded"],
                tensors.get(f"change.{n}.keys"),
                row.get("batch", n),  # where batches were not numbered yet, each change is its own
                row.get("alone", False),
            )
            for n, row in enumerate(state["changes"])
        ]
        for change in self._changes:
            self._layers[change.path].sum.add(change)
        self.notes = dict(state["notes"])
        self.kept = {name.removeprefix("kept."): t for name, t in tensors.items() if name.startswith("kept.")}
