"""How a pool is read: one layer's slots as its attention meets them, and what a prompt made of them.

    in front of h_l:   [r_1 … r_R ; b_l ; θ_l]     r the slots that a sequence retrieves from the long-term store

b_l and θ_l are the same for all sequences. r are chosen by each sequence's prompt when it begins, the R of the highest
scores (`adapters.retriever`), the oldest first.

Positions: slot j of N stands `spacing` · (j − N) tokens before the text, b_l before them, where a network has learned
to find it. Retrieved slots stand before that at the same distances, or closer together: of the positions that N slots
and b_l leave of those the model knows, they take half at most, and the text has the other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from errata.adapters.base import Explanation, random_rotation
from errata.adapters.pool_network import PoolNetwork
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.prefixed_attention import Prefix, PrefixContribution, PrefixedAttention, RowPrefix
from errata.model.probes import probing
from errata.model.tokens import TokenBatch

if TYPE_CHECKING:
    from errata.adapters.pool_slots import Pool

__all__ = [
    "Attended",
    "PoolExplanation",
    "PoolLayer",
    "Retrieved",
    "attended",
    "default_spacing",
    "retrieved_places",
    "retrieved_spacing",
    "window_of",
]


def window_of(model: EditableModel) -> int | None:
    """Tokens up to which a model knows positions; None where its configuration does not say."""
    found = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def default_spacing(model: EditableModel, slots: int) -> float:
    """Between neighbouring slots: 1, or less where they would reach further than half of the positions it knows."""
    return min(1.0, (window_of(model) or 2 * (slots + 1)) / (2 * (slots + 1)))


def retrieved_spacing(model: EditableModel, slots: int, spacing: float, retrieved: int) -> float:
    """Between neighbouring slots that are retrieved, R of them in front of N at a spacing.

    Raises:
        ConfigError: the N slots leave none of the positions that the model knows.
    """
    window = window_of(model)
    if window is None:
        return spacing
    left = window - spacing * (slots + 1)
    if left <= 0:
        raise ConfigError(
            f"{slots} slots with spacing={spacing:g} reach as far as the {window} positions that {model.model_id} "
            "knows, so none are left for retrieved ones; give a smaller spacing"
        )
    return min(spacing, left / 2 / retrieved)


def retrieved_places(slots: int, spacing: float, own_spacing: float, count: int) -> Tensor:
    """Positions of retrieved slots, the oldest first, [count], in tokens before the text's first one."""
    return -spacing * (slots + 1) + own_spacing * torch.arange(-count, 0.0)


class Retrieved(Prefix):
    """Slots from a long-term store.

    Attributes:
        born: [rows, places], the updates that wrote them.
    """

    def __init__(self, keys: Tensor, values: Tensor, born: Tensor) -> None:
        super().__init__(keys, values)
        self.born = born


class PoolLayer(PrefixContribution):
    """One layer's slots, as its attention reads them: [b_l ; θ_l], the slots by those rows of the pool that hold one.

    Attributes:
        network: that reads them.
        turned_by: seed of a rotation of the values, for `PoolAdapter.with_random_content`; None for none.
        retrieved: R, most slots that a sequence reads of the long-term store; 0 for none. own_spacing: between them.
    """

    def __init__(
        self,
        pool: Pool,
        layer: int,
        network: PoolNetwork,
        spacing: float,
        turned_by: int | None = None,
        retrieved: int = 0,
        own_spacing: float = 1.0,
    ) -> None:
        self.pool, self.layer, self.network, self.spacing = pool, layer, network, spacing
        self.turned_by, self.retrieved, self.own_spacing = turned_by, retrieved, own_spacing
        # For a state of the pool, the device and the dtype: what is read then.
        self._read: tuple[tuple[int, torch.device, torch.dtype], Prefix] | None = None
        # For a state of the store and the device: its rows by age, and their keys.
        self._held: tuple[tuple[int, torch.device], Tensor, Tensor] | None = None

    @property
    def held(self) -> Tensor:
        """Which rows of the pool hold a slot, [N] bool."""
        return self.pool.born[self.layer] > 0

    def prefix(self, attention: PrefixedAttention) -> Prefix | None:
        if self.pool.is_empty:
            return None
        parameter = next(attention.attention.parameters())
        now = self.pool.version, parameter.device, parameter.dtype
        if self._read is None or self._read[0] != now:
            with torch.inference_mode(False), torch.no_grad():
                states = self.pool.states[self.layer][self.held.to(self.pool.states.device)]
                beginning = self.network.beginning[self.layer].to(states)
                states = torch.cat([beginning.unsqueeze(0), states]).unsqueeze(0)
                slots = self.pool.positions()[self.layer, self.held]
                places = self.spacing * torch.cat([torch.tensor([-self.pool.slots - 1]), slots])
                keys, values = attention.keys_and_values(states, places.unsqueeze(0), self.network)
                self._read = now, Prefix(keys, self._turned(values))
        return self._read[1]

    def own_prefix(self, attention: PrefixedAttention, states: Tensor, prompt: Tensor) -> RowPrefix | None:
        """The slots that each sequence retrieves. A prompt that is fed in pieces by hand does so by the first piece."""
        store, prompt = self.pool.store, prompt.to(states.device)
        asking = prompt.any(dim=1)
        if store is None or not self.retrieved or not bool(asking.any()):
            return None
        with torch.inference_mode(False), torch.no_grad():
            rows, keys = self._stored(attention, states.device)
            if not len(rows):
                return None
            retriever = self.network.retriever
            assert retriever is not None, "no pool has a store without it"
            scores = retriever.scores(self.layer, states[asking], prompt[asking], keys)
            best = scores.topk(min(self.retrieved, len(rows)), dim=1).indices
            chosen = rows[best.cpu().sort(dim=1).values]  # by age again
            places = retrieved_places(self.pool.slots, self.spacing, self.own_spacing, chosen.shape[1])
            slots = store.states_of(self.layer, chosen)
            found = attention.keys_and_values(slots, places.expand(chosen.shape), self.network)
            prefix = Retrieved(found[0], self._turned(found[1]), store.born[self.layer][chosen])
        numbers = asking.long().cumsum(0) - 1
        return RowPrefix(prefix, torch.where(asking, numbers, -1).cpu())

    def _stored(self, attention: PrefixedAttention, device: torch.device) -> tuple[Tensor, Tensor]:
        """The store's rows, the oldest first, [n], and their keys, [n, w], on a device."""
        store, retriever = self.pool.store, self.network.retriever
        assert store is not None
        assert retriever is not None

        def made(slots: Tensor) -> Tensor:
            return retriever.keys(self.layer, attention.entering(slots.unsqueeze(0))[0])

        now = store.version, device
        if self._held is None or self._held[0] != now:
            rows = store.held(self.layer)
            self._held = now, rows, store.keys_of(self.layer, rows, made).to(device)
        return self._held[1:]

    def _turned(self, values: Tensor) -> Tensor:
        if self.turned_by is None:
            return values
        generator = torch.Generator().manual_seed(self.turned_by + self.layer)
        return values @ random_rotation(values.shape[-1], generator).to(values)


@dataclass(frozen=True)
class PoolExplanation(Explanation):
    """What a prompt reads from a pool, by the attention of its last token, a mean over heads and layers.

    Attributes:
        edit_id: the text most is read from: an edit's id, or the name of a document; None when the pool is empty.
        score: the share of all attention that goes to that text's slots; threshold: 0, since a pool always acts.
        memory: the share that goes to all slots, those from the long-term store among them.
        mean_age: of what is read, in updates since it was written; None when nothing is.
        by_age: pairs of an age and the share that goes to slots of that age, the newest first.
        retrieved: the share that goes to slots from the long-term store; retrieved_mean_age, retrieved_by_age: as
            above, of these alone.
    """

    memory: float = 0.0
    mean_age: float | None = None
    by_age: tuple[tuple[int, float], ...] = ()
    retrieved: float = 0.0
    retrieved_mean_age: float | None = None
    retrieved_by_age: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Attended:
    """What the last token of one prompt attends to, per layer and a mean over heads.

    Attributes:
        shares: [L, N], by rows of the pool.
        born, retrieved: per layer, of what is retrieved there, [n]: the updates that wrote it, and the shares.
    """

    shares: Tensor
    born: tuple[Tensor, ...]
    retrieved: tuple[Tensor, ...]

    def explanation(self, prompt: str, pool: Pool) -> PoolExplanation:
        """In words of texts and ages."""
        layers = len(self.shares)
        short = self._by_age(pool, pool.born.flatten(), self.shares.flatten() / layers)
        stored = self._by_age(pool, torch.cat(self.born), torch.cat(self.retrieved) / layers)
        by_age = dict(short)
        for age, share in stored.items():
            by_age[age] = by_age.get(age, 0.0) + share
        by_text: dict[str, float] = {}
        for age, share in by_age.items():
            text = pool.texts[pool.updates - age]
            by_text[text] = by_text.get(text, 0.0) + share
        ranked = sorted(by_text.items(), key=lambda item: -item[1])
        return PoolExplanation(
            prompt,
            ranked[0][0],
            ranked[0][1],
            0.0,
            True,
            ranked[1][0] if len(ranked) > 1 else None,
            ranked[1][1] if len(ranked) > 1 else None,
            sum(by_age.values()),
            _mean_age(by_age),
            tuple(sorted(by_age.items())),
            sum(stored.values()),
            _mean_age(stored),
            tuple(sorted(stored.items())),
        )

    @staticmethod
    def _by_age(pool: Pool, born: Tensor, shares: Tensor) -> dict[int, float]:
        by_update = torch.zeros(pool.updates + 1).scatter_add_(0, born, shares)
        return {pool.updates - number: float(by_update[number]) for number in torch.unique(born).tolist() if number}


def attended(
    model: EditableModel, layers: Sequence[PoolLayer], paths: Sequence[str], batch: TokenBatch, name: str | None
) -> list[Attended]:
    """What each row of a batch, padded on the left, attends to in the end, while one adapter acts.

    Args:
        layers, paths: of the adapter, and where they are; name: under which it is attached.
    """
    shares: list[Tensor] = []
    retrieved: list[list[tuple[Tensor, Tensor]]] = [[] for _ in batch.ids]

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        current, layer = model.sequences.current, layers[len(shares)]
        assert current is not None
        _, own = current.store.decided[layer]
        born = torch.zeros(len(retrieved), 0, dtype=torch.long)
        if own is not None:
            assert isinstance(own.prefix, Retrieved)
            born = own.prefix.born[own.rows]
        weights, count = output[1][:, :, -1].float().mean(dim=1).cpu(), born.shape[1]
        for row, found in enumerate(retrieved):
            found.append((born[row], weights[row, :count]))
        read = weights.new_zeros(len(weights), layer.pool.slots)
        read[:, layer.held] = weights[:, count + 1 : count + 1 + int(layer.held.sum())]
        shares.append(read)

    config = model.model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, "eager"  # which says what it looked at
    try:
        with model.selecting(name), probing(model.model, after=dict.fromkeys(paths, look)):
            model.trunk_states(batch)
    finally:
        config._attn_implementation = before
    return [
        Attended(own, tuple(born for born, _ in found), tuple(share for _, share in found))
        for own, found in zip(torch.stack(shares, dim=1), retrieved, strict=True)
    ]


def _mean_age(by_age: dict[int, float]) -> float | None:
    total = sum(by_age.values())
    return sum(age * share for age, share in by_age.items()) / total if total else None
