"""The slots of a memory pool, and what becomes of them as texts come in: see `adapters.pool`.

The states lie in one preallocated tensor. A permutation says which row is which slot: dropping K slots frees their rows
for the new ones, and no other state is moved. What is dropped may move to a long-term store (`adapters.long_term`).

A pool begins with N slots that hold nothing. They are drawn and dropped like others, so that every update leaves
1 − K/N of all that was written before, from the first one on; nobody reads them.

Knows tensors and random draws. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from errata.adapters.long_term import Accounting, LongTermStore
from errata.errors import ConfigError, NumericsError

__all__ = ["Pool", "last_ones"]

_STORED = "stored "  # what the tensors of the store begin with


class Pool:
    """The slots of all layers, what each was written with, and by which text.

    Args:
        layers, slots, hidden: L, N and d; new: K, slots that an update drops and appends per layer.
        seed: of the draws; each layer has a generator of its own, whose seed is drawn from it.
        store: takes the slots that updates drop; None where they are lost.

    Attributes:
        states: [L, N, d], rows in no order.
        order: [L, N], the rows from the oldest slot to the newest.
        born: [L, N], by row, the update that wrote it, counted from 1; 0 where a row holds nothing.
        places: [L, N], by row, which of its update's tokens it is. Only a store asks for it.
        updates: how many there were.
        forgotten: [L], slots that were taken out on request.
        texts: for each update of which a slot may be left, the text it came from.
        version: grows with every change.

    Raises:
        ConfigError: not 1 ≤ K ≤ N.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        new: int,
        hidden: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        store: LongTermStore | None = None,
    ) -> None:
        if not 1 <= new <= slots:
            raise ConfigError(f"an update of {new} new tokens does not fit into {slots} slots; give 1 ≤ new ≤ slots")
        self.new, self.seed = new, seed
        self.states = torch.zeros(layers, slots, hidden, dtype=dtype)
        self.store = store
        self.version = 0
        self.clear()

    def clear(self) -> None:
        """As it was made: empty, with the draws begun anew."""
        layers, slots = self.states.shape[:2]
        self.states.zero_()
        self.order = torch.arange(slots).repeat(layers, 1)
        self.born, self.places = (torch.zeros(layers, slots, dtype=torch.long) for _ in range(2))
        seeds = torch.randint(2**62, (layers,), generator=torch.Generator().manual_seed(self.seed)).tolist()
        self.generators = [torch.Generator().manual_seed(one) for one in seeds]
        self.forgotten = torch.zeros(layers, dtype=torch.long)
        self.updates = 0
        self.texts: dict[int, str] = {}
        self._kept_texts = 0
        self.version += 1
        if self.store is not None:
            self.store.clear()

    @property
    def slots(self) -> int:
        """N."""
        return int(self.states.shape[1])

    @property
    def is_empty(self) -> bool:
        return self.updates == 0

    @property
    def counts(self) -> Tensor:
        """How many slots each layer holds, [L]."""
        return (self.born > 0).sum(dim=1)

    def survival(self, updates: int) -> float:
        """The probability that a slot is still there after so many updates, (1 − K/N)^t."""
        return float((1 - self.new / self.slots) ** updates)

    def newest(self) -> Tensor:
        """The K newest slots in their order, [L, K, d]; where a layer holds fewer, those again and again."""
        held = self.counts.clamp(min=1, max=self.new).unsqueeze(1)
        rows = self.order.gather(1, self.slots - held + last_ones(self.new, held))
        return self.states[self._layers(), rows.to(self.states.device)]

    def positions(self) -> Tensor:
        """By row, how many slots before the text it stands, [L, N], from −N to −1."""
        return self.order.argsort(dim=1) - self.slots

    def _layers(self) -> Tensor:
        """[L, 1], to index with rows [L, n]."""
        return torch.arange(self.states.shape[0], device=self.states.device).unsqueeze(1)

    def update(self, tokens: Tensor, text: str) -> None:
        """Drop K slots of each layer, into the store if there is one, and append new ones.

        Args:
            tokens: [L, K, d], oldest first; of fewer, as the first text of a pool may bring, K are made by repeating.
            text: where they come from, an edit's id or a document's name.

        Raises:
            NumericsError: they are not finite; the pool is as it was.
        """
        if not bool(torch.isfinite(tokens).all()):
            raise NumericsError("the new memory tokens are not finite (NaN or infinity); load the model in bfloat16")
        tokens = tokens.to(self.states)
        tokens = tokens[:, last_ones(self.new, tokens.shape[1])]
        drawn = [torch.randperm(self.slots, generator=one)[: self.new] for one in self.generators]
        kept = torch.ones_like(self.order, dtype=torch.bool).scatter_(1, torch.stack(drawn), False)
        rows = self.order[~kept].view(len(drawn), self.new)
        self.order = torch.cat([self.order[kept].view(len(drawn), -1), rows], dim=1)
        if self.store is not None:
            dropped = self.states[self._layers(), rows.to(self.states.device)]
            self.store.take(dropped, self.born.gather(1, rows), self.places.gather(1, rows))
        self.updates += 1
        self.states[self._layers(), rows.to(self.states.device)] = tokens
        self.born.scatter_(1, rows, self.updates)
        self.places.scatter_(1, rows, torch.arange(rows.shape[1]).expand(rows.shape))
        self.texts[self.updates] = text
        self.version += 1
        if len(self.texts) > 2 * self._kept_texts + 64:  # now and then, so that a million updates keep no million names
            self.texts = {number: self.texts[number] for number in self.living()}
            self._kept_texts = len(self.texts)

    def living(self) -> list[int]:
        """The updates of which slots are left, here or in the store, in their order."""
        born = torch.unique(self.born)
        if self.store is not None:
            born = torch.unique(torch.cat([born, self.store.born.flatten()]))
        return [number for number in born.tolist() if number]

    def updates_of(self, text: str) -> list[int]:
        """The updates that a text made, as far as slots of them may be left."""
        return [number for number, name in self.texts.items() if name == text]

    def left_of(self, updates: Sequence[int]) -> Tensor:
        """How many slots of each layer were written by these updates, [L]."""
        return torch.isin(self.born, torch.tensor(updates, dtype=torch.long)).sum(dim=1)

    def stored_of(self, updates: Sequence[int]) -> Tensor:
        """How many slots in the store were written by these updates, [L]."""
        return torch.zeros(len(self.order), dtype=torch.long) if self.store is None else self.store.left_of(updates)

    def accounting(self) -> Accounting:
        """Where all slots are that were ever written."""
        written = torch.full_like(self.forgotten, self.new * self.updates)
        stored, forgotten = torch.zeros_like(written), self.forgotten.clone()
        if self.store is not None:
            stored, forgotten = self.store.counts, forgotten + self.store.forgotten
        return Accounting(written, self.counts, stored, written - self.counts - stored - forgotten, forgotten)

    def forget(self, updates: Sequence[int]) -> bool:
        """Hold nothing any more that these updates wrote, in the store neither.

        Returns:
            False if a layer holds nothing else: the pool is as it was.
        """
        gone = torch.isin(self.born, torch.tensor(updates, dtype=torch.long))
        if bool((gone.sum(dim=1) == self.counts).any()):
            return False
        self.forgotten += gone.sum(dim=1)
        self.born[gone] = self.places[gone] = 0
        self.states[gone.to(self.states.device)] = 0
        self.order = self.order.gather(1, (self.born.gather(1, self.order) > 0).long().argsort(dim=1, stable=True))
        if self.store is not None:
            self.store.forget(updates)
        self.texts = {number: name for number, name in self.texts.items() if number not in set(updates)}
        self.version += 1
        return True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it as tensors and JSON."""
        tensors = {"states": self.states, "order": self.order, "born": self.born, "forgotten": self.forgotten}
        tensors["generators"] = torch.stack([one.get_state() for one in self.generators])
        texts = {str(number): name for number, name in self.texts.items()}
        state = {"new": self.new, "seed": self.seed, "updates": self.updates, "texts": texts}
        if self.store is not None:
            stored, state["store"] = self.store.state()
            tensors |= {"places": self.places} | {f"{_STORED}{name}": tensor for name, tensor in stored.items()}
        return tensors, state

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Pool:
        layers, slots, hidden = tensors["states"].shape
        store = LongTermStore.from_state(_stored(tensors), state["store"]) if "store" in state else None
        pool = cls(layers, slots, state["new"], hidden, state["seed"], tensors["states"].dtype, store)
        pool.put_back(tensors, state)
        return pool

    def put_back(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Hold what `state` gave of a pool of this size, and go on as that one would; nothing of it is shared."""
        self.states = tensors["states"].to(self.states.device, copy=True)
        self.order, self.born, self.forgotten = (tensors[name].clone() for name in ("order", "born", "forgotten"))
        for one, its in zip(self.generators, tensors["generators"], strict=True):
            one.set_state(its.clone())  # which reads a tensor's storage from its beginning, so no view
        if self.store is not None:
            self.places = tensors["places"].clone()
            self.store.put_back(_stored(tensors))
        self.seed, self.updates = state["seed"], state["updates"]
        self.texts = {int(number): name for number, name in state["texts"].items()}
        self._kept_texts = 0
        self.version += 1


def last_ones(wanted: int, count: int | Tensor) -> Tensor:
    """Numbers of the last `wanted` of `count` things, the very last one last; of fewer, all again and again.

    Args:
        count: one number, or [..., 1] for as many rows of what is returned, [..., wanted].
    """
    return (torch.arange(wanted) - wanted) % count


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the store, by the names that it has for them."""
    return {name.removeprefix(_STORED): own for name, own in tensors.items() if name.startswith(_STORED)}
