"""The module that stands in a linear layer's place while adapters are attached to it.

It shares the base layer's parameters (same objects, same names, so a state dict and `.to()` see no difference),
adds what each attached contribution gives, and is taken out again when the last one leaves: the base layer itself
is never written to, which is what makes detaching bit-exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from errata.errors import SequenceError
from errata.model.anatomy import weight_of
from errata.model.probes import by_rows

if TYPE_CHECKING:
    from errata.model.sequences import ForwardPass, SequenceTracker

__all__ = ["Contribution", "EditedLinear"]


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


class EditedLinear(nn.Module):
    """A linear layer together with the contributions attached to it, in the order of attachment."""

    is_edited_linear = True

    def __init__(self, base: nn.Module, tracker: SequenceTracker) -> None:
        super().__init__()
        # A tuple keeps the base out of the module tree: its parameters are registered here, under their own names.
        self._base = (base,)
        self._tracker = tracker
        self.weight = base.weight
        self.bias = getattr(base, "bias", None)
        self.is_transposed = isinstance(base, Conv1D)
        self.contributions: list[Contribution] = []
        self._merged: tuple[tuple[tuple[int, int], ...], Tensor] | None = None
        self.train(base.training)

    @property
    def base(self) -> nn.Module:
        return self._base[0]

    def _changed_weight(self) -> Tensor | None:
        """The base weight plus all weight changes, summed in float32 and kept until one of them moves."""
        key = tuple((id(c), c.version) for c in self.contributions)
        base = weight_of(self.base)
        merged = self._merged
        if merged is None or merged[0] != key or (merged[1].device, merged[1].dtype) != (base.device, base.dtype):
            changes = [change for c in self.contributions if (change := c.weight_change()) is not None]
            if not changes:
                return None
            total = base.float()
            for change in changes:
                total = total + change.to(device=base.device)
            self._merged = merged = (key, total.to(base.dtype))
        return merged[1]

    def forward(self, inputs: Tensor) -> Tensor:
        if self._tracker.is_suspended:
            bare: Tensor = self.base(inputs)
            return bare
        weight = self._changed_weight()
        outputs: Tensor = self.base(inputs) if weight is None else F.linear(inputs, weight, self.bias)
        for contribution in self.contributions:
            if not contribution.is_routed:
                continue
            if self._tracker.current is None:
                raise SequenceError(
                    "a layer with a routed adapter was run outside of its model's forward pass, so its sequences "
                    "are unknown; call the model (or its trunk), not the layer"
                )
            rows = self._tracker.current.rows
            changed = contribution.change_output(by_rows(inputs, rows), by_rows(outputs, rows), self._tracker.current)
            outputs = changed.reshape(outputs.shape)
        return outputs
