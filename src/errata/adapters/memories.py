"""What a routed adapter reads once its router has chosen an entry.

A memory turns a route into a *selection*, a tuple of tensors whose first dimension is the sequence; the selection is
what lives with the KV cache. Reading then needs the selection and the layer's inputs, nothing else.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from errata.adapters.base import random_rotation
from errata.errors import ConfigError
from errata.model.sequences import ForwardPass
from errata.routing import Route, Router, TopHashRouter

__all__ = ["Acts", "ColumnMemory", "Memory", "Selection", "Written"]

Selection = tuple[Tensor, ...]
Acts = Literal["answer", "all"]


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

    def count(self, entries: int) -> int:
        """How many of the router's entries have something here; all of them, where there is no other memory."""
        return entries

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


@dataclass(frozen=True)
class Written:
    """What one edit has in a memory of columns.

    Attributes:
        columns: [k], those it may write, ascending.
        keys: [n, k] in bfloat16, the layer's inputs at the edit's own places, in those columns: what later edits spare.
        outputs, inputs: [outputs, r] and [r, k] in bfloat16, factors of the very change it made; None if it is not
            known, because what was written has faded since.
    """

    columns: Tensor
    keys: Tensor
    outputs: Tensor | None
    inputs: Tensor | None

    def change(self) -> Tensor | None:
        """[outputs, k] in float32."""
        if self.outputs is None or self.inputs is None:
            return None
        return self.outputs.float() @ self.inputs.float()


class ColumnMemory(Memory):
    """MEMOIR's residual matrix W_m, zero at first; an entry reads the columns that its mask marks.

        y_t = W_0 x_t + W_m (m ⊙ x_t)

    Args:
        weight: W_m, [outputs, D] in float32 whatever the model's precision. Changed only through the methods here:
            a copy on the model's device and in its precision is kept from one change to the next.
        acts: "answer" from the prompt's last token on, "all" at every position of the sequence, as published.

    Attributes:
        written: per entry of the router what it has here; None where an entry stands in another layer's memory.
            Entries beyond the list are read like others, and nothing is known of them.
    """

    kind: ClassVar[str] = "columns"

    def __init__(self, weight: Tensor, acts: Acts = "answer") -> None:
        self.weight, self.acts = weight, acts
        self.written: list[Written | None] = []
        self._version = 0
        self._copy: tuple[tuple[int, torch.device, torch.dtype], Tensor] | None = None
        self._moment: Tensor | None = None

    @classmethod
    def empty(cls, outputs: int, width: int, acts: Acts = "answer") -> ColumnMemory:
        return cls(torch.zeros(outputs, width), acts)

    # --- reading ------------------------------------------------------------------------------------------------

    def select(self, route: Route, router: Router, device: torch.device) -> Selection:
        """Which rows have an entry here [rows], kept on the CPU where asking costs nothing; their columns [rows, k]."""
        if not isinstance(router, TopHashRouter):
            raise ConfigError(f"a memory of columns needs a router that marks columns, not {type(router).__name__}")
        hit = torch.tensor([entry >= 0 and self._stands_here(entry) for entry in route.entry.tolist()])
        columns = torch.zeros(len(hit), router.marked, dtype=torch.long)
        if bool(hit.any()):
            columns[hit] = router.masks(route.entry[hit]).nonzero()[:, 1].view(-1, router.marked)
        return hit, columns.to(device)

    def _stands_here(self, entry: int) -> bool:
        return entry >= len(self.written) or self.written[entry] is not None

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
        if self.acts == "answer":
            places = forward_pass.answering.to(rows.device)[rows]
            change = change.masked_fill(~places.unsqueeze(2), 0.0)
        return outputs.index_add(0, rows, change.to(outputs.dtype))

    def _transposed(self, like: Tensor) -> Tensor:
        """W_mᵀ [D, outputs] on the device and in the precision of a tensor; columns of W_m are rows here."""
        key = (self._version, like.device, like.dtype)
        if self._copy is None or self._copy[0] != key:
            self._copy = (key, self.weight.to(device=like.device, dtype=like.dtype).T.contiguous())
        return self._copy[1]

    # --- writing ------------------------------------------------------------------------------------------------

    @property
    def moment(self) -> Tensor:
        """[D, D] in float32, the sum of z zᵀ over the keys z of everything that is written; zero outside their columns.

        Made when it is first asked for, and kept up to date from then on.
        """
        if self._moment is None:
            self._moment = torch.zeros(self.weight.shape[1], self.weight.shape[1])
            for one in self.written:
                if one is not None:
                    self._count(one, 1.0)
        return self._moment

    def _count(self, one: Written, times: float) -> None:
        assert self._moment is not None
        keys = one.keys.float()
        self._moment[one.columns.unsqueeze(1), one.columns] += times * (keys.T @ keys)

    def append(self, one: Written | None, change: Tensor | None = None) -> None:
        """Enter what the router's newest entry has here, and write it.

        Args:
            one: None if the entry stands in another layer's memory.
            change: [outputs, k], where it is not that of the entry's factors.
        """
        self.written.append(one)
        if one is None:
            return
        change = one.change() if change is None else change
        assert change is not None
        self.weight[:, one.columns] += change
        self._version += 1
        if self._moment is not None:
            self._count(one, 1.0)

    def fade(self, kept: Tensor) -> None:
        """Multiply every column by what is kept of it, [D]; no entry knows its own change any more."""
        self.weight *= kept
        for number, one in enumerate(self.written):
            if one is not None and one.outputs is not None:
                self.written[number] = Written(one.columns, one.keys, None, None)
        self._version += 1

    def forget(self, entries: Sequence[int]) -> str | None:
        reasons = [self._forget(entry) for entry in sorted(entries, reverse=True)]
        return next((reason for reason in reasons if reason), None)

    def _forget(self, entry: int) -> str | None:
        if entry >= len(self.written):
            return "what it wrote stays in columns that other edits may share"
        one = self.written.pop(entry)
        if one is None:
            return None
        if self._moment is not None:
            self._count(one, -1.0)
        change = one.change()
        if change is None:
            return "what it wrote stays in columns that other edits may share"
        self.weight[:, one.columns] -= change
        self._version += 1
        later = sum(other is not None for other in self.written[entry:])
        return "its change is subtracted from the memory, to rounding" + (
            f"; {later} later edits were trained beside it" if later else ""
        )

    def clear(self) -> None:
        self.weight.zero_()
        self.written, self._moment = [], None
        self._version += 1

    def count(self, entries: int) -> int:
        return sum(self._stands_here(entry) for entry in range(entries))

    def norm(self) -> float:
        return float(self.weight.norm())

    def with_random_content(self, generator: torch.Generator) -> ColumnMemory:
        noise = ColumnMemory(random_rotation(self.weight.shape[0], generator) @ self.weight, self.acts)
        noise.written = [
            None if one is None else Written(one.columns, one.keys, None, None) for one in self.written
        ]  # so that each entry is read where it stands
        return noise

    # --- saving -------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Ragged parts one behind another, with how many rows of them belong to each entry; -1 keys: none here."""
        held = [one for one in self.written if one is not None]
        changes = [(one.outputs.T, one.inputs) for one in held if one.outputs is not None and one.inputs is not None]
        keys = [-1 if one is None else len(one.keys) for one in self.written]
        ranks = [0 if one is None or one.inputs is None else len(one.inputs) for one in self.written]
        parts = {
            "columns": [one.columns.int().unsqueeze(0) for one in held],
            "keys": [one.keys for one in held],
            "change_outputs": [outputs for outputs, _ in changes],
            "change_inputs": [inputs for _, inputs in changes],
        }
        tensors = {name: torch.cat(rows) for name, rows in parts.items() if rows}
        tensors |= {"weight": self.weight, "key_counts": torch.tensor(keys), "change_ranks": torch.tensor(ranks)}
        return tensors, {"acts": self.acts}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        memory = cls(tensors["weight"], settings["acts"])
        numbers = iter(range(len(tensors.get("columns", ()))))
        counts, ranks = tensors["key_counts"].tolist(), tensors["change_ranks"].tolist()
        first_key = first_rank = 0
        for count, rank in zip(counts, ranks, strict=True):
            if count < 0:
                memory.written.append(None)
                continue
            outputs = inputs = None
            if rank:
                outputs = tensors["change_outputs"][first_rank : first_rank + rank].T
                inputs = tensors["change_inputs"][first_rank : first_rank + rank]
            keys = tensors["keys"][first_key : first_key + count]
            memory.written.append(Written(tensors["columns"][next(numbers)].long(), keys, outputs, inputs))
            first_key, first_rank = first_key + count, first_rank + rank
        return memory
