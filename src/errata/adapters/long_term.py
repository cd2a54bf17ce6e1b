"""M+'s long-term memory: slots that a pool dropped are kept, and may be read again (2502.00592, section 3.1).

    UPDATE    the K slots that an update drops from θ_l move to Θ_l, with the number of the update that wrote them
    OVERFLOW  of more than M slots in Θ_l the oldest are lost
    READ      `adapters.pool_reading`, by the scores of `adapters.retriever`

Θ_l may lie on another device than the model, usually the computer's own memory: an update moves K slots of each layer
there, a sequence that begins fetches those it reads. The retriever's key of a slot is made once, when the slot is asked
for the first time, so that pools can be written where no model is at hand, and is then kept beside it.

The tensors are preallocated. A permutation says which row is which slot, as in the pool: no state is ever moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Accounting", "LongTermStore"]

_TOGETHER = 4096  # slots of which keys are made at once
_LATER = 2**31  # more than there are places of an update: orders slots by update first


@dataclass(frozen=True)
class Accounting:
    """Where all the slots are that were ever written, [L] each: written = short_term + stored + lost + forgotten.

    Attributes:
        written: K by each update.
        short_term: in the pool; stored: in the long-term store.
        lost: dropped, and too old for the store, or there is none.
        forgotten: taken out of either on request.
    """

    written: Tensor
    short_term: Tensor
    stored: Tensor
    lost: Tensor
    forgotten: Tensor


class LongTermStore:
    """At most M slots per layer, in the order in which they were written, whenever they were dropped.

    Args:
        layers, slots, hidden: L, M and d; width: w, of the retriever's keys.
        device: where it lies.

    Attributes:
        states: [L, M, d], rows in no order.
        keys: [L, M, w], float32; keyed: [L, M] bool, of which rows they have been made.
        order: [L, M], the rows from the oldest slot to the newest; before them those that hold nothing.
        born: [L, M], by row, the update that wrote it; 0 where a row holds nothing. places: [L, M], which of that
            update's tokens it is. On the CPU, like `order`.
        forgotten: [L], slots that were taken out on request.
        version: grows with every change.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        hidden: int,
        width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.states = torch.zeros(layers, slots, hidden, dtype=dtype, device=device)
        self.keys = torch.zeros(layers, slots, width, device=device)
        self.version = 0
        self.clear()

    def clear(self) -> None:
        """As it was made."""
        layers, slots = self.states.shape[:2]
        self.states.zero_()
        self.keyed = torch.zeros(layers, slots, dtype=torch.bool)
        self.order = torch.arange(slots).repeat(layers, 1)
        self.born, self.places = (torch.zeros(layers, slots, dtype=torch.long) for _ in range(2))
        self.forgotten = torch.zeros(layers, dtype=torch.long)
        self.version += 1

    @property
    def slots(self) -> int:
        """M."""
        return int(self.states.shape[1])

    @property
    def nbytes(self) -> int:
        """All that it takes, in bytes."""
        return sum(one.nbytes for one in vars(self).values() if isinstance(one, Tensor))

    @property
    def counts(self) -> Tensor:
        """How many slots each layer holds, [L]."""
        return (self.born > 0).sum(dim=1)

    def to(self, device: torch.device | str) -> None:
        """Lie on this device from now on."""
        self.states, self.keys = self.states.to(device), self.keys.to(device)

    def held(self, layer: int) -> Tensor:
        """The rows of a layer's slots, the oldest first, [n]."""
        count = int((self.born[layer] > 0).sum())
        return self.order[layer, self.slots - count :]

    def take(self, states: Tensor, born: Tensor, places: Tensor) -> None:
        """Keep slots that a pool dropped; the oldest of all are lost where there is no room.

        Args:
            states: [L, n, d]; born, places: [L, n], the updates that wrote them, and which of their tokens they are; a
                slot that no update wrote takes no room.
        """
        layers, count = born.shape
        ages, by_age = (born * _LATER + places).sort(dim=1, stable=True)
        there = (self.born * _LATER + self.places).gather(1, self.order)
        ranks = torch.searchsorted(there, ages, right=True) + torch.arange(count)  # among all
        is_new = torch.zeros(layers, self.slots + count, dtype=torch.bool).scatter_(1, ranks, True)
        merged = torch.empty(is_new.shape, dtype=torch.long)
        merged[~is_new] = self.order.flatten()
        merged[is_new] = self.slots + torch.arange(count).repeat(layers)
        gone, kept = merged[:, :count], merged[:, count:].contiguous()
        free, arrives = gone < self.slots, kept >= self.slots  # as many of each in every layer
        layer, rows = arrives.nonzero()[:, 0], gone[free]
        number = by_age[layer, kept[arrives] - self.slots]
        kept[arrives] = rows
        self.order = kept
        self.born[layer, rows], self.places[layer, rows] = born[layer, number], places[layer, number]
        self.keyed[layer, rows] = False
        chosen = states[layer.to(states.device), number.to(states.device)]
        self.states[layer.to(self.states.device), rows.to(self.states.device)] = chosen.to(self.states)
        self.version += 1

    def states_of(self, layer: int, rows: Tensor) -> Tensor:
        """[..., d], for rows of any shape."""
        return self.states[layer][rows.to(self.states.device)]

    def keys_of(self, layer: int, rows: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """The retriever's keys of some rows, [n, w].

        Args:
            make: gives [m, w] for slots [m, d]; called for those rows alone of which no key has been made.
        """
        for missing in torch.split(rows[~self.keyed[layer, rows]], _TOGETHER):
            places = missing.to(self.keys.device)
            self.keys[layer, places] = make(self.states[layer, places]).to(self.keys)
            self.keyed[layer, missing] = True
        return self.keys[layer, rows.to(self.keys.device)]

    def left_of(self, updates: Sequence[int]) -> Tensor:
        """How many slots of each layer were written by these updates, [L]."""
        return torch.isin(self.born, torch.tensor(updates, dtype=torch.long)).sum(dim=1)

    def forget(self, updates: Sequence[int]) -> None:
        """Hold nothing any more that these updates wrote."""
        gone = torch.isin(self.born, torch.tensor(updates, dtype=torch.long))
        self.forgotten += gone.sum(dim=1)
        self.born[gone], self.keyed[gone] = 0, False
        self.states[gone.to(self.states.device)] = 0
        self.order = self.order.gather(1, self.born.gather(1, self.order).argsort(dim=1, stable=True))
        self.version += 1

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it as tensors and JSON; rows that no layer needs are left out."""
        rows = self.order[:, self.slots - int(self.counts.max()) :]
        layers = torch.arange(len(rows)).unsqueeze(1)
        there, where = layers.to(self.states.device), rows.to(self.states.device)
        tensors = {"states": self.states[there, where], "keys": self.keys[there, where]}
        tensors |= {name: getattr(self, name)[layers, rows] for name in ("keyed", "born", "places")}
        tensors["forgotten"] = self.forgotten.clone()
        return tensors, {"slots": self.slots}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> LongTermStore:
        """One on the CPU that holds what `state` gave."""
        (layers, _, hidden), width = tensors["states"].shape, tensors["keys"].shape[2]
        made = cls(layers, state["slots"], hidden, width, tensors["states"].dtype)
        made.put_back(tensors)
        return made

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold what `state` gave of a store of this size; nothing of it is shared."""
        self.clear()
        count = tensors["born"].shape[1]
        self.order = self.order.roll(-count, dims=1)  # the first rows are the newest slots
        for name in ("states", "keys", "keyed", "born", "places"):
            own: Tensor = getattr(self, name)
            own[:, :count] = tensors[name].to(own)
        self.forgotten = tensors["forgotten"].clone()
