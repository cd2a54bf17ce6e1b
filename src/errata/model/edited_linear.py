"""The module that stands in a linear layer's place while adapters are attached to it.

It shares the base layer's parameters (same objects, same names, so a state dict and `.to()` see no difference),
adds what each attached contribution gives, and is taken out again when the last one leaves: the base layer itself
is never written to, which is what makes detaching bit-exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from errata.errors import SequenceError
from errata.model.anatomy import weight_of
from errata.model.probes import by_rows

if TYPE_CHECKING:
    from errata.model.sequences import ForwardPass, RowAdapters, SequenceTracker

__all__ = ["Contribution", "EditedLinear"]

_KEPT_WEIGHTS = 16  # merged weights of one layer: a copy of the weight for each set of adapters in use


class Contribution:
    """What one adapter contributes to one linear layer: a change of weight, a change of output, or both.

    `version` must grow whenever `weight_change` would answer differently.
    """

    version: int = 0

    def weight_change(self) -> Tensor | None:
        """[outputs, inputs] in float32, or None when the weight stays as it is."""
        return None

    def change_output(self, inputs: Tensor, outputs: Tensor, forward_pass: ForwardPass) -> Tensor:
        """New outputs [rows, columns, outputs] of the layer, given its inputs and what stands there so far."""
        return outputs

    @property
    def is_routed(self) -> bool:
        """True when `change_output` needs to know the sequences of the pass."""
        return type(self).change_output is not Contribution.change_output

    @property
    def changes_weight(self) -> bool:
        return type(self).weight_change is not Contribution.weight_change

    @property
    def shared(self) -> object:
        """Whose change of weight it is. Where several adapters have the same one, it is merged once, and added once."""
        return self


class EditedLinear(nn.Module):
    """A linear layer together with the contributions attached to it, in the order of attachment.

    Where sequences have adapters of their own (`RouteStore.adapters`), each row gets what it would get with those alone
    attached: rows with the same changes of weight are computed together, by the same merged weight.
    """

    is_edited_linear = True

    def __init__(self, base: nn.Module, tracker: SequenceTracker) -> None:
        super().__init__()
        # A tuple keeps the base out of the module tree: its parameters are registered here, under their own names.
        self._base = (base,)
        self._tracker = tracker
        self.weight = base.weight
        self.bias = getattr(base, "bias", None)
        self.is_transposed = isinstance(base, Conv1D)
        if (weight := weight_of(base)).dim() == 2:  # a contribution that changes no weight may stand beside a norm
            self.out_features, self.in_features = weight.shape  # as other libraries ask for them
        self.contributions: list[Contribution] = []
        # For sets of changes, by whose they are: their versions, and the base weight with them.
        self._merged: dict[tuple[object, ...], tuple[tuple[int, ...], Tensor]] = {}
        self.train(base.training)

    @property
    def base(self) -> nn.Module:
        return self._base[0]

    def remove(self, contribution: Contribution) -> None:
        """Take a contribution out, and what was merged with it."""
        self.contributions = [c for c in self.contributions if c is not contribution]
        left = {c.shared for c in self.contributions}
        self._merged = {own: kept for own, kept in self._merged.items() if left.issuperset(own)}

    def _changed_weight(self, changing: tuple[Contribution, ...]) -> Tensor | None:
        """The base weight plus changes of weight, summed in float32 and kept until one of them moves."""
        versions = tuple(c.version for c in changing)
        base, own = weight_of(self.base), tuple(c.shared for c in changing)
        merged = self._merged.get(own)
        if merged is None or merged[0] != versions or (merged[1].device, merged[1].dtype) != (base.device, base.dtype):
            changes = [change for c in changing if (change := c.weight_change()) is not None]
            if not changes:
                return None
            total = base.float()
            for change in changes:
                total = total + change.to(device=base.device)
            merged = (versions, total.to(base.dtype))
            self._merged.pop(own, None)
            if len(self._merged) >= _KEPT_WEIGHTS:
                del self._merged[next(iter(self._merged))]
            self._merged[own] = merged
        return merged[1]

    @staticmethod
    def _changing(contributions: Iterable[Contribution]) -> tuple[Contribution, ...]:
        """Those that change the weight, each change once."""
        return tuple({c.shared: c for c in contributions if c.changes_weight}.values())

    def _linear(self, inputs: Tensor, changing: tuple[Contribution, ...]) -> Tensor:
        weight = self._changed_weight(changing) if changing else None
        outputs: Tensor = self.base(inputs) if weight is None else F.linear(inputs, weight, self.bias)
        return outputs

    def _linear_by_rows(self, inputs: Tensor, adapters: RowAdapters) -> Tensor:
        """The same with the changes of weight that each row has."""
        owners = self._tracker.owners
        per_set = [self._changing(c for c in self.contributions if owners.get(c) in names) for names in adapters.sets]
        of_changes = [tuple(c.shared for c in own) for own in per_set]
        sets = dict(zip(of_changes, per_set, strict=True))
        groups: dict[tuple[object, ...], list[int]] = {}
        for row, number in enumerate(adapters.rows.tolist()):
            groups.setdefault(of_changes[number], []).append(row)
        if len(groups) == 1:
            return self._linear(inputs, sets[next(iter(groups))])
        order = torch.tensor([row for rows in groups.values() for row in rows], device=inputs.device)
        parts = torch.split(by_rows(inputs, len(order))[order], [len(rows) for rows in groups.values()])
        outputs = torch.cat([self._linear(part, sets[own]) for part, own in zip(parts, groups, strict=True)])
        return outputs[order.argsort()].reshape(*inputs.shape[:-1], -1)

    def _kept(self, kept: object) -> tuple[Contribution, ...]:
        """The change of weight that acts while all others are suspended."""
        return next(((c,) for c in self.contributions if c.shared is kept), ())

    def forward(self, inputs: Tensor) -> Tensor:
        tracker = self._tracker
        if tracker.is_suspended:
            kept = tracker.kept
            return self._linear(inputs, () if kept is None else self._kept(kept))
        current = tracker.current
        adapters = None if current is None else current.store.adapters
        if adapters is None:
            outputs = self._linear(inputs, self._changing(self.contributions))
        else:
            outputs = self._linear_by_rows(inputs, adapters)
        for contribution in self.contributions:
            if not contribution.is_routed:
                continue
            if current is None:
                raise SequenceError(
                    "a layer with a routed adapter was run outside of its model's forward pass, so its sequences "
                    "are unknown; call the model (or its trunk), not the layer"
                )
            acts = None if adapters is None else adapters.having(tracker.owners.get(contribution))
            if acts is not None and not bool(acts.any()):
                continue
            before = by_rows(outputs, current.rows)
            changed = contribution.change_output(by_rows(inputs, current.rows), before, current)
            if acts is not None and not bool(acts.all()):
                changed = torch.where(acts.to(changed.device).view(-1, 1, 1), changed, before)
            outputs = changed.reshape(outputs.shape)
        return outputs
