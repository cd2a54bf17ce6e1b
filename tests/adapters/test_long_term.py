"""The long-term store: which slots it keeps, what a sequence retrieves, and that this is read as slots are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.adapters import AutoAdapter, PoolAdapter
from errata.adapters.long_term import LongTermStore
from errata.adapters.pool import Pool, PoolExplanation
from errata.adapters.pool_network import PoolNetwork
from errata.adapters.pool_reading import retrieved_spacing
from errata.adapters.retriever import Retriever, retriever_width
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.generation import continued
from errata.model.prefixed_attention import PrefixedAttention
from errata.model.sequences import BASE
from errata.model.tail import Tail
from errata.testing import tiny_model

FAMILIES = ("llama", "mistral", "qwen3", "gpt_neox", "phi3", "olmo2")
PROMPTS = ("The capital of France", "Who?", "Bob wrote Hamlet and", "The flute of Ann plays")
SLOTS, NEW, STORED, RETRIEVED = 9, 3, 14, 5


def network_of(model: EditableModel, seed: int = 0) -> PoolNetwork:
    """An untrained network with a retriever that prefers some slots to others."""
    generator = torch.Generator().manual_seed(seed)
    retriever = Retriever.to_train(model.layer_count, model.anatomy.hidden_size, generator).state()
    tensors = PoolNetwork.untrained(model, NEW).state()
    return PoolNetwork.from_state({**tensors, **{f"retriever {name}": own for name, own in retriever.items()}})


def stored_pool(model: EditableModel, seed: int = 0, updates: int = 9, **sizes: Any) -> PoolAdapter:
    """A pool of noise with a store; each text is an update."""
    given = {"slots": SLOTS, "new": NEW, "long_term": STORED, "retrieved": RETRIEVED, **sizes}
    adapter = PoolAdapter.for_model(model, "", {}, seed=seed, network=network_of(model), **given)
    generator = torch.Generator().manual_seed(seed)
    for number in range(updates):
        tokens = torch.randn(model.layer_count, NEW, model.anatomy.hidden_size, generator=generator)
        adapter.update(tokens, f"text {number}")
    return adapter


def store_of(adapter: PoolAdapter) -> LongTermStore:
    assert adapter.pool.store is not None
    return adapter.pool.store


def ends(model: EditableModel, prompts: Sequence[str] = PROMPTS, side: Any = "left") -> Tensor:
    """Logits behind each prompt, [prompts, vocabulary]."""
    batch = model.batch([model.passage(prompt) for prompt in prompts], side=side)
    with torch.no_grad():
        logits: Tensor = model.forward(batch).logits
    return logits[torch.arange(len(prompts)), batch.next_columns()]


def said(model: EditableModel, prompts: Sequence[str] = PROMPTS, **settings: Any) -> list[list[int]]:
    batch = model.batch([model.passage(prompt) for prompt in prompts])
    found: list[list[int]] = continued(model, batch, max_new_tokens=6, min_new_tokens=6, **settings).tolist()
    return found


# --- the store --------------------------------------------------------------------------------------------------------


class ByHand:
    """A pool and its store as lists, one layer of them: slots are pairs of an update and a number of its own."""

    def __init__(self, stored: int) -> None:
        self.short: list[tuple[int, int]] = []
        self.stored: list[tuple[int, int]] = []
        self.written, self.lost, self.most = 0, 0, stored

    def update(self, dropped: list[tuple[int, int]], new: list[tuple[int, int]]) -> None:
        self.written += len(new)
        self.short = [slot for slot in self.short if slot not in dropped] + new
        self.stored = sorted(self.stored + dropped)
        lost = max(0, len(self.stored) - self.most)
        self.stored, self.lost = self.stored[lost:], self.lost + lost


def marked(layers: int, update: int, count: int) -> Tensor:
    """[layers, count, 2]: slots that say who they are."""
    return torch.tensor([[float(update), float(number)] for number in range(count)]).expand(layers, -1, -1)


def slots_of(states: Tensor) -> list[tuple[int, int]]:
    return [(int(update), int(number)) for update, number in states.tolist()]


@pytest.mark.parametrize("most", [1, 2, 7, 40])
def test_every_slot_ever_written_is_in_the_pool_in_the_store_or_counted_as_lost(most: int) -> None:
    layers, slots, new = 3, 8, 3
    pool = Pool(layers, slots, new, 2, 0, store=LongTermStore(layers, most, 2, 4))
    lists = [ByHand(most) for _ in range(layers)]
    place = store_states = None
    for update in range(1, 30):
        before = [slots_of(pool.states[layer, pool.order[layer]]) for layer in range(layers)]
        pool.update(marked(layers, update, new), str(update))
        assert pool.store is not None
        place, store_states = place or pool.store.states.data_ptr(), pool.store.states
        assert store_states.data_ptr() == place, "nothing is allocated anew"
        for layer, own in enumerate(lists):
            now = [slot for slot in slots_of(pool.states[layer, pool.order[layer]]) if slot[0]]
            dropped = [slot for slot in before[layer] if slot[0] and slot not in now]
            own.update(dropped, [slot for slot in now if slot[0] == update])
            held = pool.store.held(layer)
            assert slots_of(store_states[layer, held]) == own.stored, "by age, the oldest lost first"
            assert pool.store.born[layer, held].tolist() == [born for born, _ in own.stored]
            assert now == own.short
        found = pool.accounting()
        assert found.written.tolist() == [own.written for own in lists]
        assert found.short_term.tolist() == [len(own.short) for own in lists]
        assert max(found.short_term.tolist()) <= slots
        assert found.stored.tolist() == [len(own.stored) for own in lists]
        assert found.lost.tolist() == [own.lost for own in lists]
        assert torch.equal(found.written, found.short_term + found.stored + found.lost + found.forgotten)
    assert all(own.lost > 0 for own in lists) or most == 40
    assert set(pool.living()) <= pool.texts.keys()


def test_what_is_forgotten_is_in_the_store_no_more_and_is_counted() -> None:
    pool = Pool(2, 6, 2, 2, 0, store=LongTermStore(2, 8, 2, 4))
    for update in range(1, 9):
        pool.update(marked(2, update, 2), str(update))
    store = pool.store
    assert store is not None
    gone = next(number for number in range(4, 8) if bool((store.left_of([number]) > 0).any()))
    before, held = pool.accounting(), [store.born[layer, store.held(layer)].tolist() for layer in range(2)]
    assert pool.forget([gone])
    after = pool.accounting()
    assert store.left_of([gone]).tolist() == pool.left_of([gone]).tolist() == [0, 0]
    for layer in range(2):
        kept = [born for born in held[layer] if born != gone]
        assert store.born[layer, store.held(layer)].tolist() == kept, "the others, in their order"
        assert slots_of(store.states_of(layer, store.held(layer)))[0][0] == kept[0]
    assert torch.equal(after.forgotten, before.stored + before.short_term - after.stored - after.short_term)
    assert torch.equal(after.written, after.short_term + after.stored + after.lost + after.forgotten)
    pool.update(marked(2, 9, 2), "9")
    again = pool.accounting()
    assert torch.equal(again.written, again.short_term + again.stored + again.lost + again.forgotten)
    pool.clear()
    assert store.counts.tolist() == pool.accounting().written.tolist() == store.forgotten.tolist() == [0, 0]


def test_accounts_and_order_stay_right_whatever_is_forgotten_in_between() -> None:
    pool = Pool(3, 9, 3, 2, 1, store=LongTermStore(3, 11, 2, 4))
    store, generator, lost = pool.store, torch.Generator().manual_seed(0), torch.zeros(3, dtype=torch.long)
    assert store is not None
    for update in range(1, 60):
        pool.update(marked(3, update, 3), str(update))
        found = pool.accounting()
        assert bool(((found.lost == lost) | (found.stored == 11)).all()), "lost only where there is no room"
        lost = found.lost
        if update % 4 == 0:
            pool.forget([update - 1 - int(torch.randint(3, (1,), generator=generator))])
            found = pool.accounting()
            assert torch.equal(found.lost, lost), "what is forgotten is not lost"
        assert torch.equal(found.written, found.short_term + found.stored + found.lost + found.forgotten)
        for layer in range(3):
            held = slots_of(store.states_of(layer, store.held(layer)))
            assert held == sorted(held)
            assert held == list(zip(store.born[layer, store.held(layer)].tolist(),
                                    store.places[layer, store.held(layer)].tolist(), strict=True))  # fmt: skip
            assert sorted(store.order[layer].tolist()) == list(range(11))
    assert bool((found.forgotten > 0).all())
    assert bool((found.lost > 0).all())


def test_a_key_is_made_once_for_each_slot() -> None:
    store = LongTermStore(1, 6, 2, 2)
    asked: list[int] = []

    def make(slots: Tensor) -> Tensor:
        asked.extend(int(slot[0]) for slot in slots)
        return -slots

    for born in range(1, 9):
        store.take(torch.full((1, 2, 2), float(born)), torch.full((1, 2), born), torch.arange(2).view(1, 2))
        keys = store.keys_of(0, store.held(0), make)
        assert torch.equal(keys, -store.states_of(0, store.held(0)))
    assert asked == [born for born in range(1, 9) for _ in range(2)]


def test_a_store_is_as_it_was_after_it_was_put_back() -> None:
    store = LongTermStore(2, 5, 3, 2)
    for born in range(1, 5):
        store.take(torch.randn(2, 2, 3), torch.full((2, 2), born), torch.arange(2).repeat(2, 1))
    store.keys_of(0, store.held(0)[:2], lambda slots: slots[:, :2])
    store.forget([4])
    tensors, state = store.state()
    other = LongTermStore.from_state(copy.deepcopy(tensors), state)
    for one in (store, other):
        one.take(torch.ones(2, 2, 3), torch.full((2, 2), 2), torch.arange(2).repeat(2, 1))
    for layer in range(2):
        rows = [one.held(layer) for one in (store, other)]
        for name in ("states", "born", "places", "keyed", "keys"):
            mine, its = (getattr(one, name)[layer, own] for one, own in zip((store, other), rows, strict=True))
            assert torch.equal(mine, its), name
    assert torch.equal(store.forgotten, other.forgotten)
    empty = LongTermStore.from_state(*LongTermStore(2, 5, 3, 2).state())
    assert empty.counts.tolist() == [0, 0]


def test_a_store_changes_nothing_about_the_pool() -> None:
    model = tiny_model("llama")
    with_store = stored_pool(model)
    plain = PoolAdapter.for_model(model, "", {}, slots=SLOTS, new=NEW, seed=0, network=with_store.network)
    generator = torch.Generator().manual_seed(0)
    for number in range(9):
        plain.update(torch.randn(model.layer_count, NEW, 32, generator=generator), f"text {number}")
    assert torch.equal(plain.pool.states, with_store.pool.states)
    assert torch.equal(plain.pool.order, with_store.pool.order)
    tensors, state = plain._state()
    assert not any(name.startswith("stored") for name in tensors)
    assert not {"retrieved", "own_spacing", "store"} & {*state, *state["pool"]}
    found = plain.pool.accounting()
    assert found.lost.tolist() == (NEW * 9 - plain.pool.counts).tolist()


# --- what is retrieved ------------------------------------------------------------------------------------------------


def test_scores_are_means_over_the_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = Retriever.to_train(2, 48, torch.Generator().manual_seed(0))
    assert retriever.width == retriever_width(48) == 16
    assert retriever_width(4096) == 204
    states, keys = torch.randn(3, 5, 48), torch.randn(7, 16)
    prompt = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    found = retriever.scores(1, states, prompt, keys)
    for row in range(2):
        queries = retriever.queries(1, states[row, prompt[row]])
        assert torch.allclose(found[row], (queries @ keys.T).sigmoid().mean(0), atol=1e-6)
    assert found[2].tolist() == [0.0] * 7
    monkeypatch.setattr("errata.adapters.retriever._AT_ONCE", 13)
    assert torch.allclose(retriever.scores(1, states, prompt, keys), found, atol=1e-6), "in several pieces"


def test_what_is_planted_is_found_and_read_by_age() -> None:
    """A retriever that says one vector for all tokens, and keys that agree with it where slots were planted."""
    model = tiny_model("llama")
    adapter = stored_pool(model)
    store, width = store_of(adapter), adapter.network.retriever.width  # type: ignore[union-attr]
    tensors = {name: torch.zeros_like(own) for name, own in adapter.network.state().items() if "retriever" in name}
    tensors["retriever query_out_bias"] = torch.ones(model.layer_count, 1, width)
    network = PoolNetwork.from_state({**adapter.network.state(), **tensors})
    adapter._hold(adapter.paths, adapter.pool, network, 1.0, retrieved=4)
    planted = []
    for layer in range(model.layer_count):
        rows = store.held(layer)
        assert len(rows) == STORED
        chosen = rows[torch.tensor([1, 4, 7, 12]) - layer % 2]
        store.keys[layer], store.keyed[layer] = -1.0, True
        store.keys[layer, chosen] = 1.0
        planted.append(store.born[layer, chosen].tolist())
    adapter.attach(model)
    for own in adapter.retrieve(PROMPTS):
        assert [born.tolist() for born in own] == planted


def by_hand(model: EditableModel, adapter: PoolAdapter, prompt: str, answer: Sequence[int] = ()) -> Tensor:
    """Logits [vocabulary] behind a prompt: each block is run over the row [r ; b ; θ ; h], r the best by the scores."""
    ids = torch.tensor([[*model.passage(prompt).ids, *answer]])
    asked = ids.shape[1] - len(answer)
    trunk: Any = model.module(model.anatomy.trunk)
    pool, store, retriever = adapter.pool, store_of(adapter), adapter.network.retriever
    assert retriever is not None
    seen: list[Tensor] = []

    def through(layer: int, row: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """What leaves a block, and what its attention read."""
        mask = torch.full((row.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
        handle = model.module(adapter.paths[layer]).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        rotary = trunk.rotary_emb(row, position_ids=places.unsqueeze(0))
        with model.bare():
            found = model.module(model.anatomy.blocks[layer])(row, attention_mask=mask, position_embeddings=rotary)
        handle.remove()
        return (found[0] if isinstance(found, tuple) else found), seen[-1]

    with torch.no_grad():
        text = model.model.get_input_embeddings()(ids)
        behind = torch.arange(ids.shape[1])
        slots = torch.arange(-pool.slots - 1, 0)
        for layer in range(model.layer_count):
            rows = store.held(layer)
            _, read = through(layer, text, behind)
            _, kept = through(layer, store.states[layer, rows].unsqueeze(0), torch.zeros(len(rows)))
            pairs = retriever.queries(layer, read[0, :asked]) @ retriever.keys(layer, kept[0]).T
            best = sorted(pairs.sigmoid().mean(0).argsort(descending=True)[: adapter.retrieved].tolist())
            far = -(pool.slots + 1) + adapter.own_spacing * torch.arange(-len(best), 0)
            held = pool.born[layer][pool.order[layer]] > 0
            memory = torch.cat([store.states[layer, rows[best]], adapter.network.beginning[layer].unsqueeze(0),
                                pool.states[layer][pool.order[layer][held]]])  # fmt: skip
            places = torch.cat([far, slots[:1], slots[1:][held], behind])
            text, _ = through(layer, torch.cat([memory.unsqueeze(0), text], 1), places)
            text = text[:, len(memory) :]
        assert model.anatomy.final_norm is not None
        logits: Tensor = model.head(model.module(model.anatomy.final_norm)(text))
    return logits[0, -1]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_retrieved_is_read_as_slots_are(family: str, implementation: str) -> None:
    model = tiny_model(family, attn_implementation=implementation)
    adapter = stored_pool(model)
    expected = torch.stack([by_hand(model, adapter, prompt) for prompt in PROMPTS])
    base = ends(model)
    adapter._hold(adapter.paths, adapter.pool, adapter.network, adapter.spacing)
    adapter.attach(model)
    short = ends(model)
    adapter.detach()
    assert float((expected - short).abs().max()) > 1e-2, "the store does something"
    adapter = stored_pool(model)
    adapter.attach(model)
    for side in ("left", "right"):
        assert torch.allclose(ends(model, side=side), expected, atol=3e-4), side
    for prompt, logits in zip(PROMPTS, expected, strict=True):
        assert torch.allclose(ends(model, [prompt])[0], logits, atol=3e-4)
    own = adapter.retrieve(PROMPTS)
    assert any(not torch.equal(mine, its) for mine, its in zip(own[0], own[2], strict=True)), "each prompt its own"
    together = said(model)
    assert together == said(model, use_cache=False)
    assert together == [said(model, [prompt])[0] for prompt in PROMPTS]
    assert said(model, PROMPTS[:1], prefill_chunk_size=2) == together[:1]
    assert said(model, num_beams=3) == said(model, num_beams=3, use_cache=False)
    adapter.detach()
    assert torch.equal(ends(model), base)
    for layer in range(model.layer_count):
        assert not PrefixedAttention(model, layer).attention._forward_pre_hooks


def test_what_is_retrieved_stands_in_front_of_a_pool_that_is_partly_empty() -> None:
    model = tiny_model("llama")
    adapter = stored_pool(model, 1, updates=3)
    counts = adapter.pool.counts
    assert bool((counts < SLOTS).all())
    assert bool((store_of(adapter).counts > 0).any())
    expected = torch.stack([by_hand(model, adapter, prompt) for prompt in PROMPTS])
    adapter.attach(model)
    assert torch.allclose(ends(model), expected, atol=3e-4)


def test_an_answer_that_is_scored_asks_nothing() -> None:
    """The prompt alone decides, whatever is put behind it."""
    model = tiny_model("llama")
    adapter = stored_pool(model)
    passages = [model.passage(PROMPTS[0], "is Rome or is it Paris"), model.passage(PROMPTS[3], "the piano")]
    expected = [by_hand(model, adapter, p, one.answer[:-1]) for p, one in zip(PROMPTS[::3], passages, strict=True)]
    adapter.attach(model)
    for side in ("left", "right"):
        batch = model.batch(passages, side=side)  # type: ignore[arg-type]
        with torch.no_grad():
            logits = model.forward(batch).logits
        rows, columns, _ = batch.answer_places()
        for row, own in enumerate(expected):
            assert torch.allclose(logits[row, columns[rows == row].max()], own, atol=3e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_each_sequence_of_a_batch_may_have_its_own_store(family: str, implementation: str) -> None:
    model = tiny_model(family, attn_implementation=implementation)
    plain = stored_pool(model, 3, updates=4, slots=7, long_term=0)
    pools = {"ann": stored_pool(model, 1), "bob": stored_pool(model, 2, slots=7, updates=5), "zed": plain}
    assert int(store_of(pools["bob"]).counts.max()) > RETRIEVED
    alone: dict[str, tuple[Tensor, list[list[int]]]] = {BASE: (ends(model), said(model))}
    for name, adapter in pools.items():
        adapter.attach(model, name)
        alone[name] = ends(model), said(model)
        adapter.detach()
    for name, adapter in pools.items():
        adapter.attach(model, name)
    for names in (["ann", "bob", BASE, "zed"], ["bob", "ann", "ann", BASE], ["zed", "bob", BASE, "ann"]):
        with model.selecting(names):
            found = ends(model)
            assert torch.allclose(found, torch.stack([alone[n][0][row] for row, n in enumerate(names)]), atol=2e-4)
            assert said(model) == said(model, use_cache=False) == [alone[n][1][row] for row, n in enumerate(names)]
            beams = said(model, num_beams=2)
        for row, name in enumerate(names):
            with model.selecting(name):
                assert said(model, PROMPTS[row : row + 1], num_beams=2)[0] == beams[row]
    for adapter in pools.values():
        adapter.detach()
    assert torch.equal(ends(model), alone[BASE][0])


def test_a_sequence_goes_on_with_what_it_retrieved_when_it_began() -> None:
    model = tiny_model("llama")
    adapter = stored_pool(model)
    adapter.attach(model)
    ids = torch.tensor([model.passage(PROMPTS[2]).ids, model.passage(PROMPTS[2]).ids[::-1]])

    def last(cache: Any, rows: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model.model(input_ids=ids[rows, -1:], past_key_values=cache, use_cache=True).logits
        return logits[:, -1]

    def begun() -> Any:
        with torch.no_grad():
            return model.model(input_ids=ids[:, :-1], use_cache=True).past_key_values

    both = torch.arange(2)
    before = last(begun(), both)
    assert float((before[0] - before[1]).abs().max()) > 1e-3
    for chosen in (torch.tensor([1, 0]), torch.tensor([1, 1, 0])):
        cache = begun()
        cache.reorder_cache(chosen)
        assert torch.allclose(last(cache, chosen), before[chosen], atol=1e-5), "it follows its row"
    cache, kept = begun(), copy.deepcopy(begun())
    for _ in range(5):
        adapter.update(torch.randn(model.layer_count, NEW, model.anatomy.hidden_size), "later")
    assert torch.equal(last(cache, both), before)
    assert torch.equal(last(kept, both), before)
    assert float((last(begun(), both) - before).abs().max()) > 1e-3, "new ones read what is stored now"


def test_in_half_precision_slots_are_stored_in_it_and_scored_in_full() -> None:
    whole = tiny_model("llama")
    model = EditableModel(whole.model.to(torch.bfloat16), whole.tokenizer, model_id="half")
    base = ends(model)
    adapter = stored_pool(model)
    assert (store_of(adapter).states.dtype, store_of(adapter).keys.dtype) == (torch.bfloat16, torch.float32)
    adapter.attach(model)
    found = ends(model)
    assert bool(torch.isfinite(found).all())
    assert torch.allclose(found[2:3], ends(model, PROMPTS[2:3]), atol=0.1)
    adapter.detach()
    assert torch.equal(ends(model), base)


def test_positions_go_on_before_the_slots_and_closer_where_the_model_knows_no_more() -> None:
    model = tiny_model("llama")  # 256 positions
    assert retrieved_spacing(model, 99, 1.0, 50) == 1.0
    assert retrieved_spacing(model, 99, 1.0, 78) == 1.0, "as many as half of what is left"
    assert retrieved_spacing(model, 99, 1.0, 156) == 0.5
    with pytest.raises(ConfigError, match="reach as far as the 256 positions"):
        retrieved_spacing(model, 255, 1.0, 10)
    adapter = stored_pool(model, updates=0, slots=127, retrieved=128)
    assert (adapter.spacing, adapter.own_spacing) == (1.0, 0.5)


def test_a_store_needs_a_retriever_and_room() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"no retriever.*errata train memoryllm .*--set retriever_of=NETWORK"):
        PoolAdapter.for_model(model, "", {}, slots=4, new=1, seed=0, long_term=5)
    with pytest.raises(ConfigError, match="retrieved=0 at least 1"):
        stored_pool(model, retrieved=0)
    with pytest.raises(ConfigError, match="long_term=-1 must be at least 0"):
        stored_pool(model, long_term=-1)
    assert stored_pool(model, retrieved=None, updates=0).retrieved == SLOTS // 4


# --- what is kept and said --------------------------------------------------------------------------------------------


def test_a_saved_pool_retrieves_and_goes_on_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    adapter = stored_pool(model)
    adapter.attach(model)
    before, keyed = ends(model), store_of(adapter).keyed.clone()
    assert bool(keyed.all(dim=1).all())
    adapter.detach()
    adapter.save_pretrained(tmp_path)
    loaded = AutoAdapter.from_pretrained(tmp_path, model=model)
    assert isinstance(loaded, PoolAdapter)
    assert bool(store_of(loaded).keyed[store_of(loaded).born > 0].all()), "keys are not made again"
    assert torch.equal(ends(model), before)
    loaded.detach()
    tokens = torch.randn(model.layer_count, NEW, model.anatomy.hidden_size)
    for one in (adapter, loaded):
        for number in range(5):
            one.update(tokens + number, "later")
    assert adapter.explain(PROMPTS, model) == loaded.explain(PROMPTS, model)
    assert adapter.pool.texts == loaded.pool.texts
    mine, its = adapter.pool.accounting(), loaded.pool.accounting()
    assert all(torch.equal(getattr(mine, name), getattr(its, name)) for name in vars(mine))


def test_a_pool_can_be_set_back_with_its_store() -> None:
    model = tiny_model("llama")
    adapter, plain = stored_pool(model), stored_pool(model)
    adapter.attach(model)
    before, restore = ends(model), adapter.snapshot()
    tokens = torch.randn(model.layer_count, NEW, model.anatomy.hidden_size)
    for _ in range(2):
        for number in range(6):
            adapter.update(tokens - number, "between")
        assert float((ends(model) - before).abs().max()) > 1e-3
        restore()
        assert torch.equal(ends(model), before)
    adapter.update(tokens, "later")
    plain.update(tokens, "later")
    adapter.detach()
    assert adapter.explain(PROMPTS, model) == plain.explain(PROMPTS, model)


def test_a_reverted_text_is_retrieved_no_more() -> None:
    model = tiny_model("llama")
    adapter = stored_pool(model, updates=12)
    adapter.attach(model)
    text = f"text {int(adapter.retrieve(PROMPTS[:1])[0][1][-1]) - 1}"
    (update,) = adapter.pool.updates_of(text)
    held = int(adapter.pool.stored_of([update]).sum())
    result = adapter.forget(text)
    assert result.exactness == "approximate"
    assert f"its {held} slots in the long-term store are gone" in result.reason
    assert not any(update in born for own in adapter.retrieve(PROMPTS) for born in own)
    assert adapter.pool.updates_of(text) == []
    gone = next(
        name
        for number, name in adapter.pool.texts.items()
        if not int(adapter.pool.left_of([number]).sum()) and int(adapter.pool.stored_of([number]).sum())
    )
    assert "empty" not in adapter.forget(gone).reason, "the pool held none of it"
    assert adapter.pool.updates_of(gone) == []


def test_where_a_pool_holds_nothing_else_its_store_is_emptied_with_it() -> None:
    model = tiny_model("llama")
    adapter = stored_pool(model, slots=NEW, updates=4)  # every update takes all slots
    assert store_of(adapter).counts.tolist() == [9] * model.layer_count
    adapter.forget("text 3")
    assert adapter.pool.is_empty
    assert store_of(adapter).counts.tolist() == [0] * model.layer_count
    assert not bool(store_of(adapter).states.any())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_edits_are_trained_in_sight_of_what_is_retrieved(implementation: str) -> None:
    model = tiny_model("llama", attn_implementation=implementation)
    stored_pool(model).attach(model)
    batch = model.batch([model.passage(prompt) for prompt in PROMPTS])
    tail = Tail(model, 2)
    found = tail.run(tail.record(batch), {}, torch.arange(len(PROMPTS)), batch.next_columns())
    assert torch.allclose(found, ends(model), atol=2e-4)


def test_explaining_says_what_comes_from_the_store_and_how_old_it_is() -> None:
    model = tiny_model("llama", attn_implementation="sdpa")
    adapter = stored_pool(model)
    adapter.attach(model, "mine")
    stored_pool(model, 7).attach(model, "another")
    explained = adapter.explain(PROMPTS)
    retrieved = adapter.retrieve(PROMPTS)
    model.model.set_attn_implementation("eager")
    for prompt, one, born in zip(PROMPTS, explained, retrieved, strict=True):
        assert isinstance(one, PoolExplanation)
        with model.selecting("mine"), torch.no_grad():
            arguments = model.batch([model.passage(prompt)]).arguments()
            seen = model.model(**arguments, output_attentions=True).attentions
        shares = [layer[0, :, -1].mean(0) for layer in seen]
        far = sum(float(own[:RETRIEVED].sum()) for own in shares) / len(shares)
        counts = adapter.pool.counts.tolist()
        near = sum(
            float(own[RETRIEVED + 1 : RETRIEVED + 1 + count].sum()) for own, count in zip(shares, counts, strict=True)
        ) / len(shares)
        assert one.retrieved == pytest.approx(far, abs=1e-5)
        assert one.memory == pytest.approx(far + near, abs=1e-5)
        ages = {9 - number for own in born for number in own.tolist()}
        assert {age for age, _ in one.retrieved_by_age} == ages
        old = sum((9 - own.float()) @ part[:RETRIEVED] for own, part in zip(born, shares, strict=True)) / len(shares)
        assert one.retrieved_mean_age == pytest.approx(float(old) / far, abs=1e-4)
        assert one.mean_age is not None
        assert sum(share for _, share in one.by_age) == pytest.approx(one.memory)
        assert one.edit_id is not None


def test_random_content_is_retrieved_as_before_and_says_something_else() -> None:
    model = tiny_model("llama")
    adapter = stored_pool(model)
    control = adapter.with_random_content(torch.Generator().manual_seed(1))
    attention, states = PrefixedAttention(model, 0), torch.randn(2, 3, model.anatomy.hidden_size)
    prompt = torch.tensor([[True, True, False], [False, False, False]])
    mine, other = (
        one.contributions()[attention.path].own_prefix(attention, states, prompt)  # type: ignore[attr-defined]
        for one in (adapter, control)
    )
    assert mine.rows.tolist() == other.rows.tolist() == [0, -1]
    assert torch.equal(mine.prefix.keys, other.prefix.keys)
    assert not torch.allclose(mine.prefix.values, other.prefix.values)
    assert torch.allclose(mine.prefix.values.norm(dim=-1), other.prefix.values.norm(dim=-1), rtol=1e-4)
