"""MemoryLLM's memory pool: a fixed number of slots in front of every block's attention (ICML 2024, 2402.04624).

    READ      queries from h_l,  keys and values from [b_l ; θ_l ; h_l]                                     (figure 1a)
    UPDATE    θ_l ← [θ_l without K slots drawn at random, order kept ; e'_l]                                (figure 1b)
    SURVIVAL  a slot is still there after t updates with probability (1 − K/N)^t            (its analysis of forgetting)

θ_l are N hidden states as they enter block l, b_l is the state of the beginning token there, and e'_l, K new ones, are
made by the model as it reads a text (`editors.memoryllm`). Every block draws its own K, with its own generator.

Positions: slot j of N, the oldest being 0, stands `spacing` · (j − N) tokens before the text, b_l one more, so that
distances are those of one row of memory and text. The paper scales all positions down where that grows longer than what
the model was trained on; here only those of the slots are, and text keeps the distances that the base knows.

What is dropped may move to a long-term store, of which each sequence reads what its prompt retrieves (M+, 2502.00592):
`adapters.long_term`. The slots themselves: `adapters.pool_slots`. How they are read: `adapters.pool_reading`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.adapters.base import Adapter, BaseIdentity, Explanation, LayerChange, RevertResult
from errata.adapters.long_term import LongTermStore
from errata.adapters.pool_network import PoolNetwork
from errata.adapters.pool_reading import (
    Attended,
    PoolExplanation,
    PoolLayer,
    attended,
    default_spacing,
    retrieved_spacing,
    window_of,
)
from errata.adapters.pool_slots import Pool
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.model.edited_linear import Contribution
from errata.model.prefixed_attention import attention_path, unprefixable
from errata.model.scoring import READ_TOKENS, length_batches
from errata.model.tokens import Passage

__all__ = ["Pool", "PoolAdapter", "PoolExplanation", "PoolLayer", "default_spacing", "window_of"]


class PoolAdapter(Adapter):
    """A pool in front of every block of a model, with the texts that were put into it.

    Attributes:
        pool: the slots; spacing: between the positions of neighbouring slots, in tokens.
        retrieved: R, how many slots of the pool's long-term store each sequence reads of each layer; own_spacing:
            between those.
        network: what the model was trained to have for it. Its changes of weight act once the pool holds something.
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
        network: PoolNetwork | None = None,
        long_term: int = 0,
        retrieved: int | None = None,
        store_device: torch.device | str = "cpu",
    ) -> PoolAdapter:
        """An empty pool of a model.

        Args:
            slots, new: N and K, per layer.
            network: what the model was trained to have, with the same K; None for a model as it is.
            spacing: None for 1, or less where the slots would reach further than half of the positions the model knows.
            long_term: M, how many dropped slots of each layer a store keeps, on `store_device`; 0 for no store.
            retrieved: R, how many of them a sequence reads; None for a quarter of N, as the paper does.

        Raises:
            ConfigError: the model can read no pool; or not 1 ≤ K ≤ N; or a spacing that is not positive; or a network
                that was trained with another K; or a store without a retriever in the network, or without room for
                what is retrieved.
        """
        if (reason := unprefixable(model)) is not None:
            raise ConfigError(f"{model.model_id} cannot read a memory pool: {reason}")
        spacing = default_spacing(model, slots) if spacing is None else spacing
        if spacing <= 0:
            raise ConfigError(f"spacing={spacing} must be positive; 1 is that of tokens")
        network = PoolNetwork.untrained(model, new) if network is None else network
        if network.new != new:
            raise ConfigError(f"the network was trained with new={network.new}, not {new}; give new={network.new}")
        shape, store = (model.layer_count, model.anatomy.hidden_size), None
        most, own_spacing = max(1, slots // 4) if retrieved is None else retrieved, spacing
        if long_term:
            if min(long_term, most) < 1:
                raise ConfigError(f"long_term={long_term} must be at least 0, and retrieved={most} at least 1")
            if network.retriever is None:
                raise ConfigError(
                    "this network has no retriever, without which nothing is found in a long-term store; train one: "
                    f"errata train memoryllm --model {model.model_id} --set retriever_of=NETWORK --out errata-retriever"
                )
            own_spacing = retrieved_spacing(model, slots, spacing, most)
            store = LongTermStore(shape[0], long_term, shape[1], network.retriever.width, model.dtype, store_device)
        adapter = cls(BaseIdentity.of(model), editor, editor_config)
        pool = Pool(shape[0], slots, new, shape[1], seed, model.dtype, store)
        paths = [attention_path(model, layer) for layer in range(model.layer_count)]
        adapter._hold(paths, pool, network, spacing, retrieved=most if long_term else 0, own_spacing=own_spacing)
        return adapter

    def _hold(
        self,
        paths: Sequence[str],
        pool: Pool,
        network: PoolNetwork,
        spacing: float,
        *,
        turned_by: int | None = None,
        retrieved: int = 0,
        own_spacing: float = 1.0,
    ) -> None:
        self.paths, self.pool, self.network, self.spacing = tuple(paths), pool, network, spacing
        self.retrieved, self.own_spacing = retrieved, own_spacing
        self._layers = tuple(
            PoolLayer(pool, layer, network, spacing, turned_by, retrieved, own_spacing)
            for layer in range(len(self.paths))
        )
        self._changes = network.contributions(lambda: not pool.is_empty)

    def contributions(self) -> Mapping[str, Contribution]:
        return {**dict(zip(self.paths, self._layers, strict=True)), **self._changes}

    @property
    def changes_weights(self) -> bool:
        """False: its network changes weights only beside slots, for sequences that read them."""
        return False

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
        left, stored = int(self.pool.left_of(gone).sum()), int(self.pool.stored_of(gone).sum())
        others = [one.id for one in self.edits() if one.id != text]
        if not left and not stored:
            return RevertResult(
                text, "approximate", "its slots had all been dropped; what later texts took up from it stays"
            )
        if self.pool.forget(gone):
            done = [f"its {left} slots are empty now"] if left else []
            done += [f"its {stored} slots in the long-term store are gone"] if stored else []
            return RevertResult(
                text,
                "approximate",
                f"{', '.join(done)}; what later texts took up from it stays, and the slots that it pushed out do not "
                "come back",
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

    def explain(self, prompts: Sequence[str], model: EditableModel | None = None) -> list[Explanation]:
        """What each prompt reads; see `PoolExplanation`. One pass of `eager` attention per prompt."""
        if self.pool.is_empty:
            return [PoolExplanation(prompt, None, 0.0, 0.0, False) for prompt in prompts]
        seen = self._seen(prompts, model or self.model)
        return [one.explanation(prompt, self.pool) for prompt, one in zip(prompts, seen, strict=True)]

    def retrieve(self, prompts: Sequence[str], model: EditableModel | None = None) -> list[tuple[Tensor, ...]]:
        """For each prompt and layer, which updates wrote the slots that it retrieves, [n] each, the oldest first."""
        if self.pool.is_empty:
            return [(torch.zeros(0, dtype=torch.long),) * len(self.paths) for _ in prompts]
        return [one.born for one in self._seen(prompts, model or self.model)]

    @torch.no_grad()
    def _seen(self, prompts: Sequence[str], model: EditableModel) -> list[Attended]:
        """What the last token of each prompt attends to while this adapter alone acts."""
        found: dict[int, Attended] = {}
        passages = [model.passage(prompt) for prompt in prompts]
        with self._acting_on(model):
            for indices in length_batches([len(passage.ids) for passage in passages], READ_TOKENS):
                batch = model.batch([Passage(passages[i].ids, ()) for i in indices], side="left")
                found |= zip(indices, attended(model, self._layers, self.paths, batch, self.name), strict=True)
        return [found[index] for index in range(len(prompts))]

    def layer_changes(self, model: EditableModel) -> list[LayerChange]:
        """Norms of the slots of each layer, relative to the weight of its attention's output; texts that have some."""
        changes = []
        for layer, path in enumerate(self.paths):
            norm = float(self.pool.states[layer].float().norm())
            base = float(weight_of(model.module(model.anatomy.attention_output[layer])).float().norm())
            texts = {self.pool.texts[number] for number in torch.unique(self.pool.born[layer]).tolist() if number}
            changes.append(LayerChange(path, norm, norm / base if base else 0.0, len(texts)))
        return changes

    def without_store(self) -> PoolAdapter:
        """Another adapter on the same pool, which reads nothing of its store: MemoryLLM beside M+."""
        made = type(self)(self.base, self.editor, self.editor_config)
        made._hold(self.paths, self.pool, self.network, self.spacing)
        return made

    def with_random_content(self, generator: torch.Generator) -> PoolAdapter:
        """A copy whose slots are attended to as before, while what is read there is turned at random, per layer."""
        turned_by = int(torch.randint(2**31, (1,), generator=generator))
        made = type(self)(self.base, self.editor, self.editor_config)
        made._hold(
            self.paths,
            copy.deepcopy(self.pool),
            self.network,
            self.spacing,
            turned_by=turned_by,
            retrieved=self.retrieved,
            own_spacing=self.own_spacing,
        )
        return made

    def snapshot(self) -> Callable[[], None]:
        """A function that brings back what it holds now, bit for bit, also while it is attached.

        Copied, unlike what `Adapter.snapshot` keeps: an update writes into a pool's tensors.
        """
        tensors, state = copy.deepcopy(self.pool.state())
        edits, version, documents = dict(self._edits), self.memory_version, self.documents

        def restore() -> None:
            self.pool.put_back(tensors, state)
            self._edits, self.memory_version, self.documents = dict(edits), version, documents

        return restore

    # --- saving -------------------------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, pool = self.pool.state()
        state = {"paths": self.paths, "spacing": self.spacing, "documents": self.documents, "pool": pool}
        if self.pool.store is not None:
            state |= {"retrieved": self.retrieved, "own_spacing": self.own_spacing}
        tensors |= {f"network {name}": tensor for name, tensor in self.network.state().items()}
        return tensors, {**state, "turned_by": self._layers[0].turned_by}

    def _load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        pool = Pool.from_state(tensors, state["pool"])
        mine = "network "
        network = PoolNetwork.from_state({n.removeprefix(mine): t for n, t in tensors.items() if n.startswith(mine)})
        reading = {name: state[name] for name in ("turned_by", "retrieved", "own_spacing") if name in state}
        self._hold(state["paths"], pool, network, state["spacing"], **reading)
        self.documents = state["documents"]
