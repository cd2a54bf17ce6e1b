"""What a routed adapter reads once its router has chosen an entry.

A memory turns a route into a *selection*, a tuple of tensors whose first dimension is the sequence; the selection is
what lives with the KV cache. Reading then needs the selection and the layer's inputs, nothing else.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from errata.adapters.base import check_change
from errata.routing import Route, TopHashRouter

__all__ = ["ColumnMemory", "Memory"]

Selection = tuple[Tensor, ...]


class Memory(abc.ABC):
    """Beside one linear layer: what chosen entries add to, or put in place of, its output."""

    @abc.abstractmethod
    def select(self, route: Route, router: TopHashRouter) -> Selection: ...

    @abc.abstractmethod
    def read(self, inputs: Tensor, outputs: Tensor, selection: Selection) -> Tensor:
        """New outputs [rows, columns, width] for inputs [rows, columns, D]."""

    @abc.abstractmethod
    def norm(self) -> float:
        """Frobenius norm of everything that was written."""

    @abc.abstractmethod
    def with_random_content(self, generator: torch.Generator) -> Memory: ...

    @abc.abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...


class ColumnMemory(Memory):
    """MEMOIR's residual matrix W_m, zero at first; an entry reads the columns that its mask marks.

        y_t = W_0 x_t + W_m (m ⊙ x_t)      at every position of the sequence, prompt and answer

    Args:
        weight: W_m, [outputs, D] in float32 whatever the model's precision.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @classmethod
    def empty(cls, outputs: int, width: int) -> ColumnMemory:
        return cls(torch.zeros(outputs, width))

    def select(self, route: Route, router: TopHashRouter) -> Selection:
        return route.entry >= 0, router.masks(route.entry)

    def read(self, inputs: Tensor, outputs: Tensor, selection: Selection) -> Tensor:
        hit, masks = selection
        if not bool(hit.any()):
            return outputs
        weight = self.weight.to(device=inputs.device, dtype=inputs.dtype)
        rows = hit.nonzero().squeeze(1).to(inputs.device)
        masked = inputs[rows] * masks.to(inputs.device)[rows].unsqueeze(1)
        return outputs.index_add(0, rows, (masked @ weight.T).to(outputs.dtype))

    def write(self, columns: Tensor, values: Tensor) -> None:
        """Replace columns [k] by values [outputs, k]. Raises NumericsError if they are not finite, or no change."""
        check_change(values - self.weight[:, columns], "the memory's change")
        self.weight[:, columns] = values

    def norm(self) -> float:
        return float(self.weight.norm())

    def with_random_content(self, generator: torch.Generator) -> ColumnMemory:
        noise = torch.randn(self.weight.shape, generator=generator)
        return ColumnMemory(noise * (self.weight.norm() / noise.norm()))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"weight": self.weight}, {"kind": "columns"}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor]) -> ColumnMemory:
        return cls(tensors["weight"])
