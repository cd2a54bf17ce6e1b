"""What a routed adapter reads once its router has chosen an entry.

A memory turns a route into a *selection*, a tuple of tensors whose first dimension is the sequence; the selection is
what lives with the KV cache. Reading then needs the selection and the layer's inputs, nothing else.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from errata.adapters.base import check_change, random_rotation
from errata.errors import ConfigError
from errata.model.sequences import ForwardPass
from errata.routing import Route, Router, TopHashRouter

__all__ = ["ColumnMemory", "Memory", "Selection"]

Selection = tuple[Tensor, ...]


class Memory(abc.ABC):
    """Beside one linear layer: what chosen entries add to its output, or put in its place.

    Attributes:
        kind: its name in saved adapters.
    """

    kind: ClassVar[str]

    @abc.abstractmethod
    def select(self, route: Route, router: Router, device: torch.device) -> Selection:
        """What the chosen entries' sequences will read, on the layer's device as far as reading needs it there."""

    @abc.abstractmethod
    def read(self, inputs: Tensor, outputs: Tensor, selection: Selection, forward_pass: ForwardPass) -> Tensor:
        """New outputs [rows, columns, outputs] of the layer, from its inputs [rows, columns, D] and what stands there.

        A memory may ignore `outputs` and give its own; `forward_pass` tells where prompts end, for those that act at
        a single place. Sequences without an entry get `outputs` back, bit for bit.
        """

    @abc.abstractmethod
    def forget(self, entries: Sequence[int]) -> str | None:
        """The router has dropped these entries: drop what belongs to them alone.

        Returns:
            Why something of them stays, in words; None when nothing does.
        """

    @abc.abstractmethod
    def clear(self) -> None:
        """Become empty again."""

    @abc.abstractmethod
    def norm(self) -> float:
        """Frobenius norm of everything that was written."""

    @abc.abstractmethod
    def with_random_content(self, generator: torch.Generator) -> Memory:
        """A copy that moves outputs equally far in random directions, see `Adapter.with_random_content`."""

    @abc.abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON that `from_state` makes the same memory of."""

    @classmethod
    @abc.abstractmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self: ...


class ColumnMemory(Memory):
    """MEMOIR's residual matrix W_m, zero at first; an entry reads the columns that its mask marks.

        y_t = W_0 x_t + W_m (m ⊙ x_t)      at every position of the sequence, prompt and answer

    Args:
        weight: W_m, [outputs, D] in float32 whatever the model's precision. Changed only through the methods here:
            a copy on the model's device and in its precision is kept from one change to the next.
    """

    kind: ClassVar[str] = "columns"

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._version = 0
        self._copy: tuple[tuple[int, torch.device, torch.dtype], Tensor] | None = None

    @classmethod
    def empty(cls, outputs: int, width: int) -> ColumnMemory:
        return cls(torch.zeros(outputs, width))

    def select(self, route: Route, router: Router, device: torch.device) -> Selection:
        """Which rows have an entry [rows], kept on the CPU where asking costs nothing; their columns [rows, k]."""
        if not isinstance(router, TopHashRouter):
            raise ConfigError(f"a memory of columns needs a router that marks columns, not {type(router).__name__}")
        hit = route.entry >= 0
        columns = torch.zeros(len(hit), router.marked, dtype=torch.long)
        columns[hit] = router.masks(route.entry[hit]).nonzero()[:, 1].view(-1, router.marked)
        return hit, columns.to(device)

    def read(self, inputs: Tensor, outputs: Tensor, selection: Selection, forward_pass: ForwardPass) -> Tensor:
        hit, columns = selection
        if not bool(hit.any()):
            return outputs
        rows = hit.nonzero().squeeze(1).to(inputs.device)
        own, chosen, weight = inputs[rows], columns.to(inputs.device)[rows], self._transposed(inputs)
        # Gathering moves k columns three times for each row (read, write, read), the whole product moves all D once for
        # all rows. Where the first is no more than the second it is faster, for it multiplies no unmarked column.
        if 3 * chosen.numel() <= weight.shape[0]:
            parts = [
                row.index_select(1, mine) @ weight.index_select(0, mine) for row, mine in zip(own, chosen, strict=True)
            ]
            change = torch.stack(parts)
        else:
            marks = torch.zeros(len(chosen), weight.shape[0], dtype=own.dtype, device=own.device)
            change = (own * marks.scatter_(1, chosen, 1.0).unsqueeze(1)) @ weight
        return outputs.index_add(0, rows, change.to(outputs.dtype))

    def _transposed(self, like: Tensor) -> Tensor:
        """W_mᵀ [D, outputs] on the device and in the precision of a tensor; columns of W_m are rows here."""
        key = (self._version, like.device, like.dtype)
        if self._copy is None or self._copy[0] != key:
            self._copy = (key, self.weight.to(device=like.device, dtype=like.dtype).T.contiguous())
        return self._copy[1]

    def write(self, columns: Tensor, values: Tensor) -> None:
        """Replace columns [k] by values [outputs, k]. Raises NumericsError if they are not finite, or no change."""
        check_change(values - self.weight[:, columns], "the memory's change")
        self.weight[:, columns] = values
        self._version += 1

    def fade(self, columns: Tensor, kept: float) -> None:
        """Multiply columns, given by number or by mark, by what is kept of them."""
        self.weight[:, columns] *= kept
        self._version += 1

    def forget(self, entries: Sequence[int]) -> str | None:
        return "what it wrote stays in columns that other edits may share"

    def clear(self) -> None:
        self.weight.zero_()
        self._version += 1

    def norm(self) -> float:
        return float(self.weight.norm())

    def with_random_content(self, generator: torch.Generator) -> ColumnMemory:
        return ColumnMemory(random_rotation(self.weight.shape[0], generator) @ self.weight)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"weight": self.weight}, {}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        return cls(tensors["weight"])
