"""MemoryLLM's memory pool: a fixed number of slots in front of every block's attention (ICML 2024, 2402.04624).

    READ      queries from h_l,  keys and values from [b_l ; θ_l ; h_l]                                     (figure 1a)
    UPDATE    θ_l ← [θ_l without K slots drawn at random, order kept ; e'_l]                                (figure 1b)
    SURVIVAL  a slot is still there after t updates with probability (1 − K/N)^t            (its analysis of forgetting)

θ_l are N hidden states as they enter block l, b_l is the state of the beginning token there, and e'_l, K new ones, are
made by the model as it reads a text (`editors.memoryllm`). Every block draws its own K, with its own generator.

Positions: slot j of N, the oldest being 0, stands `spacing` · (j − N) tokens before the text, b_l one more, so that
distances are those of one row of memory and text. The paper scales all positions down where that grows longer than what
the model was trained on; here only those of the slots are, and text keeps the distances that the base knows.

The states lie in one preallocated tensor. A permutation says which row is which slot: dropping K slots frees their rows
for the new ones, and no other state is moved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.adapters.base import Adapter, BaseIdentity, Explanation, LayerChange, RevertResult, random_rotation
from errata.errors import ConfigError, NumericsError
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.model.generation import beginning_token
from errata.model.prefixed_attention import (
    Prefix,
    PrefixContribution,
    PrefixedAttention,
    attention_path,
    unprefixable,
)
from errata.model.probes import probing
from errata.model.scoring import READ_TOKENS, length_batches
from errata.model.tokens import Passage

__all__ = ["Pool", "PoolAdapter", "PoolExplanation", "PoolLayer", "window_of"]


def window_of(model: EditableModel) -> int | None:
    """Tokens up to which a model knows positions; None where its configuration does not say."""
    found = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


class Pool:
    """The slots of all layers, what each was written with, and by which text.

    Args:
        layers, slots, hidden: L, N and d; new: K, slots that an update drops and appends per layer.
        seed: of the draws; each layer has a generator of its own, whose seed is drawn from it.

    Attributes:
        states: [L, N, d], rows in no order.
        order: [L, N], the rows from the oldest slot to the newest.
        born: [L, N], by row, the update that wrote it, counted from 1; 0 while the pool is empty.
        updates: how many there were.
        texts: for each update of which a slot may be left, the text it came from.
        version: grows with every change.

    Raises:
        ConfigError: not 1 ≤ K ≤ N.
    """

    def __init__(
        self, layers: int, slots: int, new: int, hidden: int, seed: int, dtype: torch.dtype = torch.float32
    ) -> None:
        if not 1 <= new <= slots:
            raise ConfigError(f"an update of {new} new tokens does not fit into {slots} slots; give 1 ≤ new ≤ slots")
        self.new, self.seed = new, seed
        self.states = torch.zeros(layers, slots, hidden, dtype=dtype)
        self.version = 0
        self.clear()

    def clear(self) -> None:
        """As it was made: empty, with the draws begun anew."""
        layers, slots = self.states.shape[:2]
        self.states.zero_()
        self.order = torch.arange(slots).repeat(layers, 1)
        self.born = torch.zeros(layers, slots, dtype=torch.long)
        seeds = torch.randint(2**62, (layers,), generator=torch.Generator().manual_seed(self.seed)).tolist()
        self.generators = [torch.Generator().manual_seed(one) for one in seeds]
        self.updates = 0
        self.texts: dict[int, str] = {}
        self._kept_texts = 0
        self.version += 1

    @property
    def slots(self) -> int:
        """N."""
        return int(self.states.shape[1])

    @property
    def is_empty(self) -> bool:
        return self.updates == 0

    def survival(self, updates: int) -> float:
        """The probability that a slot is still there after so many updates, (1 − K/N)^t."""
        return float((1 - self.new / self.slots) ** updates)

    def newest(self) -> Tensor:
        """The K newest slots in their order, [L, K, d]."""
        rows = self.order[:, -self.new :]
        return self.states[self._layers(), rows.to(self.states.device)]

    def positions(self) -> Tensor:
        """By row, how many slots before the text it stands, [L, N], from −N to −1."""
        return self.order.argsort(dim=1) - self.slots

    def _layers(self) -> Tensor:
        """[L, 1], to index with rows [L, n]."""
        return torch.arange(self.states.shape[0], device=self.states.device).unsqueeze(1)

    def update(self, tokens: Tensor, text: str) -> None:
        """Drop K slots of each layer and append new ones; the first update fills the pool with them, repeated.

        Args:
            tokens: [L, K, d], oldest first; the first update may bring fewer than K.
            text: where they come from, an edit's id or a document's name.

        Raises:
            NumericsError: they are not finite; the pool is as it was.
        """
        if not bool(torch.isfinite(tokens).all()):
            raise NumericsError("the new memory tokens are not finite (NaN or infinity); load the model in bfloat16")
        tokens = tokens.to(self.states)
        if self.is_empty:
            rows, count = self.order, tokens.shape[1]
            tokens = tokens[:, (torch.arange(self.slots) - self.slots) % count]  # so that the last ones stand last
        else:
            drawn = [torch.randperm(self.slots, generator=one)[: self.new] for one in self.generators]
            kept = torch.ones_like(self.order, dtype=torch.bool).scatter_(1, torch.stack(drawn), False)
            rows = self.order[~kept].view(len(drawn), self.new)
            self.order = torch.cat([self.order[kept].view(len(drawn), -1), rows], dim=1)
        self.updates += 1
        self.states[self._layers(), rows.to(self.states.device)] = tokens
        self.born.scatter_(1, rows, self.updates)
        self.texts[self.updates] = text
        self.version += 1
        if len(self.texts) > 2 * self._kept_texts + 64:  # now and then, so that a million updates keep no million names
            self.texts = {number: self.texts[number] for number in torch.unique(self.born).tolist()}
            self._kept_texts = len(self.texts)

    def updates_of(self, text: str) -> list[int]:
        """The updates that a text made, as far as slots of them may be left."""
        return [number for number, name in self.texts.items() if name == text]

    def left_of(self, updates: Sequence[int]) -> Tensor:
        """How many slots of each layer were written by these updates, [L]."""
        return torch.isin(self.born, torch.tensor(updates, dtype=torch.long)).sum(dim=1)

    def forget(self, updates: Sequence[int]) -> bool:
        """Put copies of other slots, spread evenly over those there are, in the place of all that these updates wrote.

        Returns:
            False if a layer holds nothing else: the pool is as it was.
        """
        gone = torch.isin(self.born, torch.tensor(updates, dtype=torch.long))
        if bool(gone.all(dim=1).any()):
            return False
        for layer, rows in enumerate(self.order):
            dead, alive = rows[gone[layer, rows]], rows[~gone[layer, rows]]
            copied = alive[torch.arange(len(dead)) * len(alive) // max(len(dead), 1)]
            states = self.states[layer]
            states[dead.to(states.device)] = states[copied.to(states.device)]
            self.born[layer, dead] = self.born[layer, copied]
            rows = torch.cat([alive, dead])
            self.order[layer] = rows[self.born[layer, rows].argsort(stable=True)]
        self.texts = {number: name for number, name in self.texts.items() if number not in set(updates)}
        self.version += 1
        return True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it as tensors and JSON."""
        tensors = {"states": self.states, "order": self.order, "born": self.born}
        tensors["generators"] = torch.stack([one.get_state() for one in self.generators])
        texts = {str(number): name for number, name in self.texts.items()}
        return tensors, {"new": self.new, "seed": self.seed, "updates": self.updates, "texts": texts}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Pool:
        layers, slots, hidden = tensors["states"].shape
        pool = cls(layers, slots, state["new"], hidden, state["seed"], tensors["states"].dtype)
        pool.states, pool.order, pool.born = (tensors[name].clone() for name in ("states", "order", "born"))
        for one, its in zip(pool.generators, tensors["generators"], strict=True):
            one.set_state(its.clone())  # which reads a tensor's storage from its beginning, so no view
        pool.updates = state["updates"]
        pool.texts = {int(number): name for number, name in state["texts"].items()}
        return pool


class PoolLayer(PrefixContribution):
    """One layer's slots, as its attention reads them: [b_l ; θ_l], the slots by rows of the pool.

    Attributes:
        turned_by: seed of a rotation of the values, for `PoolAdapter.with_random_content`; None for none.
    """

    def __init__(self, pool: Pool, layer: int, beginning: Tensor, spacing: float, turned_by: int | None = None) -> None:
        self.pool, self.layer, self.beginning, self.spacing = pool, layer, beginning, spacing
        self.turned_by = turned_by
        # For a state of the pool, the device and the dtype: what is read then.
        self._read: tuple[tuple[int, torch.device, torch.dtype], Prefix] | None = None

    def prefix(self, attention: PrefixedAttention) -> Prefix | None:
        if self.pool.is_empty:
            return None
        parameter = next(attention.attention.parameters())
        now = self.pool.version, parameter.device, parameter.dtype
        if self._read is None or self._read[0] != now:
            with torch.inference_mode(False), torch.no_grad():
                states = self.pool.states[self.layer]
                states = torch.cat([self.beginning.to(states).unsqueeze(0), states]).unsqueeze(0)
                slots = self.pool.positions()[self.layer]
                places = self.spacing * torch.cat([torch.tensor([-self.pool.slots - 1]), slots])
                keys, values = attention.keys_and_values(states, places.unsqueeze(0))
                if self.turned_by is not None:
                    generator = torch.Generator().manual_seed(self.turned_by + self.layer)
                    values = values @ random_rotation(values.shape[-1], generator).to(values)
            self._read = now, Prefix(keys, values)
        return self._read[1]


@dataclass(frozen=True)
class PoolExplanation(Explanation):
    """What a prompt reads from a pool, by the attention of its last token, a mean over heads and layers.

    Attributes:
        edit_id: the text most is read from: an edit's id, or the name of a document; None when the pool is empty.
        score: the share of all attention that goes to that text's slots; threshold: 0, since a pool always acts.
        memory: the share that goes to all slots.
        mean_age: of what is read, in updates since it was written; None when nothing is.
        by_age: pairs of an age and the share that goes to slots of that age, the newest first.
    """

    memory: float = 0.0
    mean_age: float | None = None
    by_age: tuple[tuple[int, float], ...] = ()


class PoolAdapter(Adapter):
    """A pool in front of every block of a model, with the texts that were put into it.

    Attributes:
        pool: the slots; beginning: [L, d], b_l; spacing: between the positions of neighbouring slots, in tokens.
        documents: texts put into it since it was last empty that were no edits; their wording is not kept.
    """

    adapter_type: ClassVar[str] = "pool"

    def __init__(self, base: BaseIdentity, editor: str = "", editor_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(base, editor, editor_config)
        self.paths: tuple[str, ...] = ()
        self.documents = 0
        self._layers: tuple[PoolLayer, ...] = ()

    @classmethod
    def for_model(
        cls,
        model: EditableModel,
        editor: str,
        editor_config: Mapping[str, Any],
        *,
        slots: int,
        new: int,
        seed: int,
        spacing: float | None = None,
    ) -> PoolAdapter:
        """An empty pool of a model.

        Args:
            slots, new: N and K, per layer.
            spacing: None for 1, or less where the slots would reach further than half of the positions the model knows.

        Raises:
            ConfigError: the model can read no pool; or not 1 ≤ K ≤ N; or a spacing that is not positive.
        """
        if (reason := unprefixable(model)) is not None:
            raise ConfigError(f"{model.model_id} cannot read a memory pool: {reason}")
        if spacing is None:
            spacing = min(1.0, (window_of(model) or 2 * (slots + 1)) / (2 * (slots + 1)))
        if spacing <= 0:
            raise ConfigError(f"spacing={spacing} must be positive; 1 is that of tokens")
        adapter = cls(BaseIdentity.of(model), editor, editor_config)
        pool = Pool(model.layer_count, slots, new, model.anatomy.hidden_size, seed, model.dtype)
        paths = [attention_path(model, layer) for layer in range(model.layer_count)]
        adapter._hold(paths, pool, _beginning_states(model), spacing)
        return adapter

    def _hold(
        self, paths: Sequence[str], pool: Pool, beginning: Tensor, spacing: float, turned_by: int | None = None
    ) -> None:
        self.paths, self.pool, self.beginning, self.spacing = tuple(paths), pool, beginning, spacing
        self._layers = tuple(
            PoolLayer(pool, layer, beginning[layer], spacing, turned_by) for layer in range(len(self.paths))
        )

    def contributions(self) -> Mapping[str, PoolLayer]:
        return dict(zip(self.paths, self._layers, strict=True))

    def attach(self, model: EditableModel, name: str | None = None) -> None:
        super().attach(model, name)
        self.pool.states = self.pool.states.to(model.device)

    @contextmanager
    def _acting_on(self, model: EditableModel) -> Iterator[None]:
        """Attached to a model for a while, if it is not anyway."""
        if self._model is model:
            yield
            return
        with self.detached():
            self.attach(model)
            try:
                yield
            finally:
                self.detach()

    # --- content ------------------------------------------------------------------------------------------------

    def update(self, tokens: Tensor, text: str) -> None:
        """Append new memory tokens, [L, K, d], that a text was compressed into; see `Pool.update`."""
        self.pool.update(tokens, text)
        self.memory_version += 1

    def forget(self, text: str, updates: Sequence[int] | None = None) -> RevertResult:
        """Take out what is left of a text's slots, or of some of its updates alone, and say how exactly."""
        gone = self.pool.updates_of(text) if updates is None else updates
        left = int(self.pool.left_of(gone).sum())
        others = [one.id for one in self.edits() if one.id != text]
        if not left:
            return RevertResult(
                text, "approximate", "its slots had all been dropped; what later texts took up from it stays"
            )
        if self.pool.forget(gone):
            return RevertResult(
                text,
                "approximate",
                f"its {left} slots hold copies of others now; what later texts took up from it stays, and the slots "
                "that it pushed out do not come back",
            )
        self.pool.clear()
        documents, self.documents = self.documents, 0
        if not others and not documents:
            return RevertResult(text, "exact", "it was all the pool held; the pool is empty again")
        return RevertResult(
            text, "approximate", "some layer held nothing else, so the pool is empty now; put the other texts in again"
        )

    def _revert(self, edit_id: str) -> RevertResult:
        return self.forget(edit_id)

    def _supersede(self, old_id: str, new_id: str) -> None:
        self.forget(old_id)

    @torch.no_grad()
    def explain(self, prompts: Sequence[str], model: EditableModel | None = None) -> list[Explanation]:
        """What each prompt reads; see `PoolExplanation`. One pass of `eager` attention per prompt."""
        model = model or self.model
        if self.pool.is_empty:
            return [PoolExplanation(prompt, None, 0.0, 0.0, False) for prompt in prompts]
        with self._acting_on(model):
            found: dict[int, Explanation] = {}
            passages = [model.passage(prompt) for prompt in prompts]
            for indices in length_batches([len(p.ids) for p in passages], READ_TOKENS):
                shares = self._shares(model, [passages[i].ids for i in indices])
                for index, row in zip(indices, shares, strict=True):
                    found[index] = self._explained(prompts[index], row)
        return [found[index] for index in range(len(prompts))]

    def _shares(self, model: EditableModel, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """[rows, L, N], by rows of the pool, the attention of the last token of each text, a mean over heads."""
        batch = model.batch([Passage(ids, ()) for ids in rows], side="left")
        weights: list[Tensor] = []

        def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            weights.append(output[1][:, :, -1, 1 : self.pool.slots + 1].float().mean(dim=1).cpu())

        config = model.model.config.get_text_config()
        before, config._attn_implementation = config._attn_implementation, "eager"  # which says what it looked at
        try:
            with model.selecting(self.name), probing(model.model, after=dict.fromkeys(self.paths, look)):
                model.trunk_states(batch)
        finally:
            config._attn_implementation = before
        return torch.stack(weights, dim=1)

    def _explained(self, prompt: str, shares: Tensor) -> PoolExplanation:
        """From [L, N]."""
        pool, by_update = self.pool, torch.zeros(self.pool.updates + 1)
        by_update.scatter_add_(0, pool.born.flatten(), shares.flatten() / len(self.paths))
        by_age = {pool.updates - number: float(by_update[number]) for number in torch.unique(pool.born).tolist()}
        by_text: dict[str, float] = {}
        for age, share in by_age.items():
            text = pool.texts[pool.updates - age]
            by_text[text] = by_text.get(text, 0.0) + share
        ranked = sorted(by_text.items(), key=lambda item: -item[1])
        memory = sum(by_age.values())
        return PoolExplanation(
            prompt,
            ranked[0][0],
            ranked[0][1],
            0.0,
            True,
            ranked[1][0] if len(ranked) > 1 else None,
            ranked[1][1] if len(ranked) > 1 else None,
            memory,
            sum(age * share for age, share in by_age.items()) / memory if memory else None,
            tuple(sorted(by_age.items())),
        )

    def layer_changes(self, model: EditableModel) -> list[LayerChange]:
        """Norms of the slots of each layer, relative to the weight of its attention's output; texts that have some."""
        changes = []
        for layer, path in enumerate(self.paths):
            norm = float(self.pool.states[layer].float().norm())
            base = float(weight_of(model.module(model.anatomy.attention_output[layer])).float().norm())
            texts = {self.pool.texts[number] for number in torch.unique(self.pool.born[layer]).tolist() if number}
            changes.append(LayerChange(path, norm, norm / base if base else 0.0, len(texts)))
        return changes

    def with_random_content(self, generator: torch.Generator) -> PoolAdapter:
        """A copy whose slots are attended to as before, while what is read there is turned at random, per layer."""
        turned_by = int(torch.randint(2**31, (1,), generator=generator))
        made = type(self)(self.base, self.editor, self.editor_config)
        made._hold(self.paths, copy.deepcopy(self.pool), self.beginning, self.spacing, turned_by)
        return made

    # --- saving -------------------------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, pool = self.pool.state()
        state = {"paths": self.paths, "spacing": self.spacing, "documents": self.documents, "pool": pool}
        return {**tensors, "beginning": self.beginning}, {**state, "turned_by": self._layers[0].turned_by}

    def _load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        pool = Pool.from_state(tensors, state["pool"])
        self._hold(state["paths"], pool, tensors["beginning"], state["spacing"], state["turned_by"])
        self.documents = state["documents"]


@torch.no_grad()
def _beginning_states(model: EditableModel) -> Tensor:
    """[L, d], the beginning token as it enters each block; the paper trains such a vector per layer."""
    entering: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        entering.append(states[0, 0].cpu())

    ids = torch.tensor([[beginning_token(model)]], device=model.device)
    with model.bare(), probing(model.model, before=dict.fromkeys(model.anatomy.blocks, look)):
        model.module(model.anatomy.trunk)(input_ids=ids, use_cache=False)
    return torch.stack(entering)
