"""The memory pool: slots and their survival, and what an attention reads of them, against a computation by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.adapters import AutoAdapter, PoolAdapter
from errata.adapters.pool import Pool, PoolExplanation
from errata.edit import Edit
from errata.editors import editor
from errata.errors import ConfigError, ModelError, NumericsError
from errata.model import EditableModel
from errata.model.generation import continued
from errata.model.prefixed_attention import Prefix, PrefixedAttention
from errata.model.sequences import BASE
from errata.model.tail import Tail
from errata.testing import tiny_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi3", "olmo2")
PROMPTS = ("The capital of France", "Who?", "Bob wrote Hamlet and", "The flute of Ann plays")
SLOTS, NEW = 12, 3


def pool_of(model: EditableModel, seed: int = 0, slots: int = SLOTS, updates: int = 4) -> PoolAdapter:
    """A pool that was filled with noise of the size of hidden states, in several updates."""
    adapter = PoolAdapter.for_model(model, "", {}, slots=slots, new=NEW, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for number in range(updates):
        tokens = torch.randn(model.layer_count, NEW, model.anatomy.hidden_size, generator=generator)
        adapter.update(tokens, f"text {number}")
    return adapter


def ends(model: EditableModel, prompts: Sequence[str] = PROMPTS, side: Any = "left", **kwargs: Any) -> Tensor:
    """Logits behind each prompt, [prompts, vocabulary]."""
    batch = model.batch([model.passage(prompt) for prompt in prompts], side=side)
    with torch.no_grad():
        logits: Tensor = model.forward(batch, **kwargs).logits
    return logits[torch.arange(len(prompts)), batch.next_columns()]


def said(model: EditableModel, prompts: Sequence[str] = PROMPTS, **settings: Any) -> list[list[int]]:
    batch = model.batch([model.passage(prompt) for prompt in prompts])
    found: list[list[int]] = continued(model, batch, max_new_tokens=6, min_new_tokens=6, **settings).tolist()
    return found


def by_hand(model: EditableModel, adapter: PoolAdapter, prompt: str) -> Tensor:
    """Logits [vocabulary] behind a prompt: each block is run over the whole row of memory and text, which begins anew
    with the memory of that block."""
    ids = torch.tensor([model.passage(prompt).ids])
    trunk: Any = model.module(model.anatomy.trunk)
    pool, count = adapter.pool, adapter.pool.slots + 1
    places = torch.cat([adapter.spacing * torch.arange(-count, 0), torch.arange(ids.shape[1])]).unsqueeze(0)
    width = places.shape[1]
    in_order = torch.full((width, width), torch.finfo(torch.float32).min).triu(1)
    with torch.no_grad():
        text = model.model.get_input_embeddings()(ids)
        rotary = trunk.rotary_emb(text, position_ids=places)
        for layer, path in enumerate(model.anatomy.blocks):
            memory = pool.states[layer][pool.order[layer]]
            row = torch.cat([adapter.network.beginning[layer].unsqueeze(0), memory]).unsqueeze(0)
            mask = in_order[None, None].clone()
            mask[..., 1:count].masked_fill_(pool.born[layer][pool.order[layer]] == 0, torch.finfo(torch.float32).min)
            found = model.module(path)(torch.cat([row, text], dim=1), attention_mask=mask, position_embeddings=rotary)
            text = (found[0] if isinstance(found, tuple) else found)[:, count:]
        assert model.anatomy.final_norm is not None
        logits: Tensor = model.head(model.module(model.anatomy.final_norm)(text))
    return logits[0, -1]


# --- slots ------------------------------------------------------------------------------------------------------------


def updated(layers: int, slots: int, new: int, updates: int, seed: int = 0) -> Pool:
    """A pool of which every state is the number of its update."""
    pool = Pool(layers, slots, new, 1, seed)
    for number in range(1, updates + 1):
        pool.update(torch.full((layers, new, 1), float(number)), str(number))
    return pool


def test_an_update_drops_exactly_k_of_each_layer_keeps_the_order_and_moves_nothing() -> None:
    pool = updated(3, 10, 4, 1)
    place = pool.states.data_ptr()
    for number in range(2, 30):
        states, order = pool.states.clone(), pool.order.clone()
        pool.update(torch.full((3, 4, 1), float(number)), str(number))
        assert pool.states.shape == (3, 10, 1)
        assert pool.states.data_ptr() == place
        for layer in range(3):
            assert sorted(pool.order[layer].tolist()) == list(range(10)), "every row is one slot"
            written = (pool.born[layer] == number).nonzero().flatten().tolist()
            assert len(written) == 4
            assert sorted(pool.order[layer, -4:].tolist()) == written, "the new ones are the newest"
            kept = [row for row in order[layer].tolist() if row not in written]
            assert pool.order[layer, :-4].tolist() == kept
            assert torch.equal(pool.states[layer, kept], states[layer, kept])
    assert torch.equal(pool.newest(), torch.full((3, 4, 1), 29.0))
    assert torch.equal(pool.states[..., 0].long(), pool.born)
    assert any(not torch.equal(pool.order[0], other) for other in pool.order[1:]), "each layer draws its own"


def test_slots_survive_as_often_as_the_theory_says() -> None:
    layers, slots, new = 1000, 40, 4
    pool = updated(layers, slots, new, 1)
    trials = layers * new
    for updates in range(1, 41):
        pool.update(torch.zeros(layers, new, 1), "other")
        expected = (1 - new / slots) ** updates
        assert pool.survival(updates) == pytest.approx(expected)
        left = int(pool.left_of([1]).sum())
        # Four standard deviations of a binomial; drawing without putting back varies less.
        assert abs(left / trials - expected) < 4 * (expected * (1 - expected) / trials) ** 0.5, updates


def test_the_same_seed_draws_the_same_slots_and_another_seed_others() -> None:
    first, again, other = (updated(2, 20, 3, 15, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.states, again.states)
    assert torch.equal(first.order, again.order)
    assert not torch.equal(first.states, other.states)
    assert len({tuple(row) for pool in (first, other) for row in pool.order.tolist()}) == 4, "no layer repeats another"


def test_a_short_first_text_is_repeated_up_to_k_and_other_slots_hold_nothing() -> None:
    pool = Pool(2, 7, 3, 1, 0)
    tokens = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])  # fewer than K
    pool.update(tokens, "a")
    in_order = torch.stack([pool.states[layer, pool.order[layer], 0] for layer in range(2)])
    assert in_order.tolist() == [[0, 0, 0, 0, 2, 1, 2], [0, 0, 0, 0, 4, 3, 4]]
    assert pool.counts.tolist() == pool.left_of([1]).tolist() == [3, 3]


def test_what_is_forgotten_leaves_empty_slots_behind() -> None:
    pool = updated(3, 12, 3, 5)
    before = {number: pool.left_of([number]) for number in range(1, 6)}
    found = pool.accounting()
    assert pool.forget([4])
    assert pool.left_of([4]).tolist() == [0, 0, 0]
    assert torch.equal(pool.states[..., 0].long(), pool.born)
    assert torch.equal(pool.accounting().forgotten, before[4])
    assert torch.equal(pool.accounting().lost, found.lost)
    for layer in range(3):
        assert sorted(pool.order[layer].tolist()) == list(range(12))
        ages = pool.born[layer, pool.order[layer]].tolist()
        assert ages == sorted(ages), "from the oldest to the newest"
    assert all(torch.equal(pool.left_of([n]), before[n]) for n in (1, 2, 3, 5)), "nothing else is lost"
    assert "4" not in pool.texts.values()
    states = pool.states.clone()
    assert not pool.forget([1, 2, 3, 5])
    assert torch.equal(pool.states, states)
    pool.clear()
    assert pool.is_empty
    assert pool.accounting().forgotten.tolist() == [0, 0, 0]
    fresh = updated(3, 12, 3, 5)
    for number in range(1, 6):
        pool.update(torch.full((3, 3, 1), float(number)), str(number))
    assert torch.equal(pool.states, fresh.states), "an emptied pool draws as a new one"


def test_the_newest_slots_of_a_layer_that_holds_fewer_come_again_and_again() -> None:
    pool = updated(1, 6, 3, 2)
    pool.states[0, pool.order[0], 0] = torch.arange(6.0)
    pool.born[0, pool.order[0]] = torch.tensor([0, 0, 0, 0, 1, 2])
    assert pool.newest().flatten().tolist() == [5, 4, 5]


def test_names_of_texts_are_kept_for_living_slots_only() -> None:
    pool = updated(2, 6, 2, 2000)
    assert set(torch.unique(pool.born).tolist()) - {0} <= pool.texts.keys()
    assert len(pool.texts) < 100
    assert pool.updates_of("2000") == [2000]
    assert pool.updates_of("1") == []


def test_tokens_that_are_not_finite_are_refused_and_sizes_checked() -> None:
    pool = updated(2, 6, 2, 3)
    states, order = pool.states.clone(), pool.order.clone()
    with pytest.raises(NumericsError, match="not finite"):
        pool.update(torch.full((2, 2, 1), float("nan")), "bad")
    assert torch.equal(pool.states, states)
    assert torch.equal(pool.order, order)
    assert pool.updates == 3
    for new in (0, 7):
        with pytest.raises(ConfigError, match="does not fit into 6 slots"):
            Pool(2, 6, new, 1, 0)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_whole_rows_of_memory_and_text_give(family: str, implementation: str) -> None:
    model = tiny_model(family, attn_implementation=implementation)
    adapter = pool_of(model)
    expected = torch.stack([by_hand(model, adapter, prompt) for prompt in PROMPTS])
    base = ends(model)
    adapter.attach(model)
    assert float((expected - base).abs().max()) > 0.1, "the pool does something"
    for side in ("left", "right"):
        assert torch.allclose(ends(model, side=side), expected, atol=2e-4), side
    for prompt, logits in zip(PROMPTS, expected, strict=True):  # without padding, sdpa is given no mask
        assert torch.allclose(ends(model, [prompt])[0], logits, atol=2e-4)
    together = said(model)
    assert together == said(model, use_cache=False)
    assert together == [said(model, [prompt])[0] for prompt in PROMPTS]
    assert said(model, PROMPTS[:1], prefill_chunk_size=2) == together[:1]
    assert said(model, num_beams=3) == said(model, num_beams=3, use_cache=False)
    adapter.detach()
    assert torch.equal(ends(model), base)
    for layer in range(model.layer_count):
        assert not PrefixedAttention(model, layer).attention._forward_pre_hooks
        assert not any(name.startswith("_errata") for name in vars(PrefixedAttention(model, layer).attention))


def test_a_static_cache_reads_the_same() -> None:
    model = tiny_model("llama", attn_implementation="sdpa")
    pool_of(model).attach(model)
    assert said(model, cache_implementation="static") == said(model)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_each_sequence_of_a_batch_may_have_its_own_pool(family: str, implementation: str) -> None:
    model = tiny_model(family, attn_implementation=implementation)
    base = ends(model)
    pools = {"ann": pool_of(model, 1), "bob": pool_of(model, 2, slots=7), "zed": pool_of(model, 3, updates=0)}
    alone: dict[str, tuple[Tensor, list[list[int]]]] = {BASE: (base, said(model))}
    for name, adapter in pools.items():
        adapter.attach(model, name)
        alone[name] = ends(model), said(model)
        adapter.detach()
    assert torch.equal(alone["zed"][0], base), "an empty pool changes nothing"
    for name, adapter in pools.items():
        adapter.attach(model, name)
    for names in (["ann", "bob", BASE, "zed"], ["bob", "ann", "ann", BASE], [BASE] * 4):
        rows = range(len(names))
        with model.selecting(names):
            found = ends(model)
            assert torch.allclose(found, torch.stack([alone[names[row]][0][row] for row in rows]), atol=2e-4)
            assert said(model) == said(model, use_cache=False) == [alone[names[row]][1][row] for row in rows]
    with model.selecting(BASE):
        assert torch.equal(ends(model), base), "where nobody has a pool, nothing is touched"
    with model.selecting([("ann", "bob")] * 4):
        both = ends(model)
    pools["zed"].detach()
    assert torch.allclose(ends(model), both, atol=1e-5), "without a selection, all act"
    assert float((both - alone["ann"][0]).abs().max()) > 1e-2


def test_a_sequence_goes_on_with_the_memory_it_began_with() -> None:
    model = tiny_model("llama")
    adapter = pool_of(model)
    adapter.attach(model)
    ids = torch.tensor([model.passage(PROMPTS[2]).ids])

    def last(step: Tensor, cache: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model.model(input_ids=step, past_key_values=cache, use_cache=True).logits
        return logits[0, -1]

    with torch.no_grad():
        cache = model.model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    kept = copy.deepcopy(cache)
    before = last(ids[:, -1:], cache)
    adapter.update(torch.randn(model.layer_count, NEW, model.anatomy.hidden_size), "later")
    assert torch.equal(last(ids[:, -1:], kept), before)
    assert float((ends(model, PROMPTS[2:3])[0] - before).abs().max()) > 1e-3, "a new one reads what was written"


def test_other_adapters_change_nothing_about_what_the_slots_say() -> None:
    """Keys and values are those of the base weights, so a pool reads the same whoever came first."""
    model = tiny_model("llama")
    lora = editor("lora", model, targets="attention", layers=(1, 2), steps=3, guard="off")
    lora.edit([Edit(prompt="The capital of France", target="Rome")])
    adapter = pool_of(model)
    adapter.attach(model)
    behind = ends(model)
    lora.adapter.detach()
    lora.adapter.attach(model)
    assert torch.allclose(ends(model), behind, atol=1e-5)
    lora.adapter.detach()
    assert float((ends(model) - behind).abs().max()) > 1e-4


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_edits_are_trained_in_sight_of_the_pool(implementation: str) -> None:
    model = tiny_model("llama", attn_implementation=implementation)
    pool_of(model).attach(model)
    batch = model.batch([model.passage(prompt) for prompt in PROMPTS])
    tail = Tail(model, 2)
    rows, columns = torch.arange(len(PROMPTS)), batch.next_columns()
    found = tail.run(tail.record(batch), {}, rows, columns)
    assert torch.allclose(found, ends(model), atol=2e-4)
    beside = editor("memoir", model, layer=2, steps=40, learning_rate=5.0, contexts=0, threshold=0.6)
    (applied,) = beside.edit([Edit(prompt=PROMPTS[0], target="Rome", subject="France")]).applied
    assert applied.took


def test_a_deep_copy_of_the_model_has_a_pool_of_its_own() -> None:
    model = tiny_model("llama")
    adapter = pool_of(model)
    adapter.attach(model)
    expected = ends(model)
    other = EditableModel(copy.deepcopy(model.model), model.tokenizer)
    adapter.update(torch.randn(model.layer_count, NEW, model.anatomy.hidden_size), "later")
    assert torch.equal(ends(other), expected)
    assert not torch.equal(ends(model), expected)
    adapter.detach()
    assert torch.equal(ends(other), expected)


def test_memory_is_read_closer_where_it_would_reach_out_of_the_window() -> None:
    model = tiny_model("llama")  # 256 positions
    near, far = pool_of(model), pool_of(model, slots=255)
    assert near.spacing == 1.0
    assert far.spacing == 0.5
    with pytest.raises(ConfigError, match="spacing=0 must be positive"):
        PoolAdapter.for_model(model, "", {}, slots=4, new=1, seed=0, spacing=0)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt2", {}, "rotary position embeddings"),
        ("opt", {}, "rotary position embeddings"),
        ("gptj", {}, "rotary position embeddings"),
        ("falcon", {}, "also need alibi"),
        ("gemma2", {}, "sliding window"),
        ("gemma3", {}, "sliding window"),
        ("mistral", {"sliding_window": 8}, "sliding window"),
        ("t5", {}, "with an encoder"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            "changes with the length",
        ),
    ],
)
def test_other_models_are_refused_with_a_reason(family: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot read a memory pool: .*{reason}"):
        PoolAdapter.for_model(tiny_model(family, **changes), "", {}, slots=4, new=1, seed=0)


def test_what_reads_slots_stands_in_front_of_an_attention_only() -> None:
    model = tiny_model("llama")
    layer = pool_of(model).contributions()["model.layers.2.self_attn"]
    with pytest.raises(
        ModelError, match=r"layers\.2\.mlp is not the attention .* nearest one is model\.layers\.2\.self_attn"
    ):
        model.contribute("model.layers.2.mlp", layer)
    with pytest.raises(ModelError, match="nothing of this adapter is attached"):
        model.withdraw("model.layers.2.self_attn", layer)
    with pytest.raises(ModelError, match=r"nothing can be put in front .*rotary"):
        tiny_model("gpt2").contribute("transformer.h.0.attn", layer)


@pytest.mark.parametrize(
    ("implementation", "columns", "expected"),
    [
        ("sdpa", 2, [[[1, 0, 1, 0], [1, 0, 1, 1]], [[1, 1, 1, 0], [1, 1, 1, 1]]]),
        ("sdpa", 1, [[[1, 0, 1]], [[1, 1, 1]]]),
        ("eager", 2, [[[1, 0, 1, 1], [1, 0, 1, 1]], [[1, 1, 1, 1], [1, 1, 1, 1]]]),
    ],
)
def test_a_mask_that_was_left_out_means_what_it_meant(implementation: str, columns: int, expected: Any) -> None:
    model = tiny_model("llama", attn_implementation=implementation)
    keys, visible = torch.zeros(2, 2, 2, 8), torch.tensor([[True, False], [True, True]])
    attention, states = PrefixedAttention(model, 0), torch.zeros(2, columns, 32)
    plain = {"past_key_values": None, "attention_mask": None}
    mask = attention.behind(Prefix(keys, keys, visible), states, plain)["attention_mask"]
    read = mask if implementation == "sdpa" else mask == 0
    assert read[:, 0].long().tolist() == expected
    alone = attention.behind(Prefix(keys, keys), states, plain)["attention_mask"]
    assert (alone is None) == ((implementation, columns) != ("sdpa", 2))


def test_an_attention_without_tensor_masks_is_refused_when_it_is_run() -> None:
    model = tiny_model("llama")
    pool_of(model).attach(model)
    model.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match=r"'flash_attention_2' cannot read .*'eager' or 'sdpa'"):
        model.module(model.anatomy.blocks[0])(torch.zeros(1, 2, 32), position_embeddings=None)


# --- what is kept and said ----------------------------------------------------------------------------------------------


def test_a_saved_pool_reads_and_goes_on_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    adapter = pool_of(model)
    adapter.save_pretrained(tmp_path)
    loaded = AutoAdapter.from_pretrained(tmp_path)
    assert isinstance(loaded, PoolAdapter)
    assert loaded.explain(PROMPTS, model) == adapter.explain(PROMPTS, model)
    assert not loaded.is_attached
    tokens = torch.randn(model.layer_count, NEW, model.anatomy.hidden_size)
    for one in (adapter, loaded):
        for number in range(5):
            one.update(tokens + number, "later")
    assert torch.equal(adapter.pool.states, loaded.pool.states)
    assert torch.equal(adapter.pool.order, loaded.pool.order)
    assert adapter.pool.texts == loaded.pool.texts


def test_a_pool_can_be_set_back_while_it_is_attached() -> None:
    model = tiny_model("llama")
    adapter, plain = pool_of(model), pool_of(model)
    adapter.attach(model)
    before, restore = ends(model), adapter.snapshot()
    tokens = torch.randn(model.layer_count, NEW, model.anatomy.hidden_size)
    adapter.documents = 3
    for number in range(3):
        adapter.update(tokens - number, "between")
    assert float((ends(model) - before).abs().max()) > 1e-3
    for _ in range(2):
        restore()
        assert torch.equal(ends(model), before), "what was read of it in between is not kept"
        assert (adapter.documents, adapter.memory_version) == (0, plain.memory_version)
        adapter.update(tokens, "later")
    plain.update(tokens, "later")
    assert torch.equal(adapter.pool.states, plain.pool.states)
    assert torch.equal(adapter.pool.order, plain.pool.order), "it draws as if nothing had come between"
    assert adapter.pool.texts == plain.pool.texts
    adapter.detach()


def test_explaining_says_how_old_what_answers_is() -> None:
    model = tiny_model("llama", attn_implementation="sdpa")
    adapter = pool_of(model)
    adapter.attach(model, "mine")
    pool_of(model, 9).attach(model, "another")
    (one,) = adapter.explain(PROMPTS[:1])
    assert isinstance(one, PoolExplanation)
    assert model.model.config._attn_implementation == "sdpa"
    assert [age for age, _ in one.by_age] == sorted(adapter.pool.updates - number for number in adapter.pool.living())
    assert one.memory == pytest.approx(sum(share for _, share in one.by_age))
    assert 0 < one.score <= one.memory < 1
    assert one.mean_age == pytest.approx(sum(age * share for age, share in one.by_age) / one.memory)
    assert one.edit_id == f"text {adapter.pool.updates - 1 - max(one.by_age, key=lambda pair: pair[1])[0]}"
    with model.selecting("mine"), torch.no_grad():
        batch = model.batch([model.passage(PROMPTS[0])])
        model.model.set_attn_implementation("eager")
        seen = model.model(**batch.arguments(), output_attentions=True).attentions
        model.model.set_attn_implementation("sdpa")
    shares = torch.zeros(model.layer_count, SLOTS)  # by rows of the pool
    for layer, own in enumerate(seen):
        held = adapter.pool.born[layer] > 0
        shares[layer, held] = own[0, :, -1, 1 : int(held.sum()) + 1].mean(0)
    assert one.memory == pytest.approx(float(shares.sum(1).mean()), abs=1e-5)
    newest = shares[adapter.pool.born == adapter.pool.updates].sum() / model.layer_count
    assert dict(one.by_age)[0] == pytest.approx(float(newest), abs=1e-5)
    empty = pool_of(model, updates=0)
    assert empty.explain(["x"], model) == [PoolExplanation("x", None, 0.0, 0.0, False)]


def test_random_content_is_attended_to_as_before_and_says_something_else() -> None:
    model = tiny_model("llama")
    adapter = pool_of(model)
    control = adapter.with_random_content(torch.Generator().manual_seed(1))
    states = torch.randn(1, 3, model.anatomy.hidden_size)
    attention = PrefixedAttention(model, 1)
    mine, other = (one.contributions()[attention.path].prefix(attention) for one in (adapter, control))
    assert mine is not None
    assert other is not None
    assert torch.equal(mine.keys, other.keys)
    assert not torch.allclose(mine.values, other.values)
    assert torch.allclose(mine.values.norm(dim=-1), other.values.norm(dim=-1), rtol=1e-4)
    control.attach(model)
    controlled = ends(model)
    control.detach()
    adapter.attach(model)
    assert float((ends(model) - controlled).abs().max()) > 1e-2
    adapter.update(states.expand(model.layer_count, -1, -1), "later")
    assert control.pool.updates == adapter.pool.updates - 1


def test_layers_say_how_much_they_hold() -> None:
    model = tiny_model("llama")
    changes = pool_of(model).layer_changes(model)
    assert [change.module for change in changes] == [f"model.layers.{n}.self_attn" for n in range(4)]
    assert all(change.norm > 0 and change.relative_norm > 0 and 1 <= change.entries <= 4 for change in changes)
    assert all(change.norm == 0 and change.entries == 0 for change in pool_of(model, updates=0).layer_changes(model))
