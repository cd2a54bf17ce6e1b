"""MemoryLLM's self-update, against a computation by hand, and what becomes of texts and edits in a pool.

The contract suite runs too (test_contract.py), but for what only a trained model could do: have an edit take. What its
checks ask besides is asked here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.adapters import AutoAdapter, PoolAdapter
from errata.atlas.documents import documents
from errata.edit import Edit
from errata.editors.compression import Compression, Injected
from errata.editors.memoryllm import MemoryLLM, MemoryLLMConfig
from errata.errors import BaseMismatchError, ConfigError, EditError
from errata.evaluation.metrics import answers_exactly
from errata.model import EditableModel
from errata.testing import tiny_model
from errata.testing.conformance import EDITS, UNRELATED

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")
SMALL: dict[str, Any] = {"network": "untrained", "slots": 20, "new": 4}
LONG = "Bob wrote Hamlet, and Alice plays the flute in Paris."


def tokens_of(model: EditableModel, text: str) -> list[int]:
    found: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def logits(model: EditableModel) -> Tensor:
    prompts = (*(edit.prompt for edit in EDITS), *UNRELATED)
    with torch.no_grad():
        found: Tensor = model.forward(model.batch([model.passage(prompt) for prompt in prompts])).logits[:, -1]
    return found


def same_pools(one: PoolAdapter, other: PoolAdapter, tolerance: float = 0.0) -> bool:
    mine, its = one.pool, other.pool
    equal = torch.equal(mine.order, its.order) and torch.equal(mine.born, its.born) and mine.texts == its.texts
    return equal and torch.allclose(mine.states, its.states, rtol=0, atol=tolerance)


def compressed_by_hand(model: EditableModel, adapter: PoolAdapter, ids: list[int]) -> Tensor:
    """[L, K, d]: each block is run over the whole row [b ; e ; h], and the last K of what leaves it are kept."""
    pool = adapter.pool
    trunk: Any = model.module(model.anatomy.trunk)
    held = 0 if pool.is_empty else pool.new
    places = torch.arange(-pool.new - 1, len(ids)).unsqueeze(0)
    if pool.is_empty:
        places = torch.cat([places[:, :1], places[:, pool.new + 1 :]], dim=1)
    mask = torch.full((places.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
    made = []
    with torch.no_grad(), model.bare():
        text = model.model.get_input_embeddings()(torch.tensor([ids]))
        rotary = trunk.rotary_emb(text, position_ids=places)
        for layer, path in enumerate(model.anatomy.blocks):
            newest = pool.states[layer, pool.order[layer, pool.slots - held :]]
            row = torch.cat([adapter.network.beginning[layer].view(1, 1, -1), newest.unsqueeze(0), text], dim=1)
            found = model.module(path)(row, attention_mask=mask, position_embeddings=rotary)
            found = found[0] if isinstance(found, tuple) else found
            made.append(found[0, 1:][-pool.new :])
            text = found[:, 1 + held :]
    return torch.stack(made)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_new_tokens_are_what_whole_rows_of_memory_and_text_give(family: str, implementation: str) -> None:
    model = tiny_model(family, attn_implementation=implementation)
    editor = MemoryLLM(model, **SMALL)
    compression, ids = Compression(model), tokens_of(model, LONG)
    assert len(ids) > 6
    for count in (2, 6, 4, 3, 1):  # of an empty pool fewer than K, then more, as many and fewer
        expected = compressed_by_hand(model, editor.adapter, ids[:count])
        (found,) = compression([editor.adapter], [ids[:count]])
        assert found.shape == (model.layer_count, 2 if editor.adapter.pool.is_empty else 4, 32)
        assert torch.allclose(found, expected, atol=2e-4), count
        editor.adapter.update(found, str(count))
    assert editor.adapter.pool.updates == 5


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_pools_that_are_updated_together_are_as_if_each_were_alone(family: str) -> None:
    model, compression = tiny_model(family), Compression(tiny_model(family))
    texts = {"a": LONG, "b": "x", "c": "The capital of France is Rome", "d": LONG * 2}
    ids = {name: tokens_of(model, text) for name, text in texts.items()}

    def pools() -> list[PoolAdapter]:
        made = [PoolAdapter.for_model(model, "", {}, slots=12, new=4, seed=seed) for seed in range(4)]
        for one in made[1:]:  # one is empty
            compression.inject([one], [("first", ids["a"])], 8)
        return made

    together, alone = pools(), pools()
    receipts = compression.inject(together, list(ids.items()), 8)
    for one, (name, its) in zip(alone, ids.items(), strict=True):
        compression.inject([one], [(name, its)], 8)
    assert [receipt.updates for receipt in receipts] == [-(-len(its) // 8) for its in ids.values()]
    for one, other in zip(together, alone, strict=True):
        assert same_pools(one, other, 1e-4)
    odd = PoolAdapter.for_model(model, "", {}, slots=12, new=3, seed=0)
    with pytest.raises(ConfigError, match="same network and number of new slots"):
        compression([together[0], odd], [ids["a"], ids["b"]])
    with pytest.raises(ConfigError, match="one text at a time"):
        compression.inject([odd, odd], list(ids.items())[:2], 8)
    with pytest.raises(BaseMismatchError, match="was made for"):
        Compression(tiny_model(family, seed=1)).inject([odd], [("a", ids["a"])], 8)


def test_a_long_text_is_as_many_updates_as_it_has_chunks() -> None:
    model = tiny_model("llama")
    whole, parts = (MemoryLLM(model, **SMALL, chunk_tokens=5) for _ in range(2))
    ids = tokens_of(model, LONG)
    (receipt,) = whole.inject({"a text": LONG})
    assert receipt == Injected("a text", len(ids), -(-len(ids) // 5))
    compression = Compression(model)
    for at in range(0, len(ids), 5):
        compression.inject([parts.adapter], [("a text", ids[at : at + 5])], 5)
    assert same_pools(whole.adapter, parts.adapter)
    assert whole.adapter.pool.updates == receipt.updates == len(whole.adapter.pool.updates_of("a text"))
    assert whole.adapter.memory_version == receipt.updates
    assert whole.adapter.documents == 1


def test_what_is_written_does_not_depend_on_what_is_attached() -> None:
    model = tiny_model("llama")
    editor = MemoryLLM(model, **SMALL)
    editor.inject({"a": LONG})
    other = copy.deepcopy(editor.adapter.pool)
    beside = PoolAdapter.for_model(model, "", {}, slots=8, new=2, seed=9)
    Compression(model).inject([beside], [("z", tokens_of(model, "Zed"))], 8)
    editor.adapter.detach()
    beside.attach(model)
    Compression(model).inject([editor.adapter], [("b", tokens_of(model, "Ann"))], 8)
    beside.detach()
    fresh = MemoryLLM(model, **SMALL)
    fresh.inject({"a": LONG})
    assert torch.equal(fresh.adapter.pool.states, other.states)
    fresh.inject({"b": "Ann"})
    assert same_pools(fresh.adapter, editor.adapter)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_edit_is_an_update_and_detaching_is_bit_exact(family: str) -> None:
    model = tiny_model(family)
    base = logits(model)
    editor = MemoryLLM(model, **SMALL)
    assert torch.equal(logits(model), base), "an empty pool"
    outcome = editor.edit(EDITS)
    assert len(outcome.applied) == 3
    assert not outcome.refused
    assert editor.adapter.pool.updates == outcome.memory_version == 3
    assert [editor.adapter.pool.updates_of(edit.id) for edit in EDITS] == [[1], [2], [3]]
    assert editor.adapter.pool.left_of([3]).tolist() == [4] * model.layer_count
    statement = model.passage(EDITS[2].prompt, EDITS[2].target).ids
    assert statement[0] == model.tokenizer.bos_token_id
    two = MemoryLLM(model, **SMALL)
    two.edit(EDITS[:2])
    (tokens,) = Compression(model)([two.adapter], [statement[1:]])
    assert torch.equal(tokens, editor.adapter.pool.newest()), "without a beginning token of its own"
    two.adapter.detach()
    assert not torch.equal(logits(model), base)
    editor.adapter.detach()
    assert torch.equal(logits(model), base)


def revised(**changes: Any) -> Edit:
    return EDITS[0].model_copy(update={"target": "Berlin", **changes})


def test_a_new_answer_takes_the_place_of_the_old_one() -> None:
    for edit in (revised(id="new"), revised()):  # under an id of its own, and under the same one
        editor = MemoryLLM(tiny_model("llama"), **SMALL)
        editor.edit(EDITS)
        before = editor.adapter.pool.left_of([1])
        outcome = editor.edit([edit])
        assert outcome.superseded == [(EDITS[0].id, edit.id)]
        assert [held.target for held in editor.adapter.edits()] == ["Alice", "piano", "Berlin"]
        pool = editor.adapter.pool
        assert pool.left_of([1]).tolist() == [0] * 4, "nothing is left of the old statement"
        assert pool.updates_of(edit.id) == [4]
        assert pool.left_of([4]).tolist() == [4] * 4
        found = pool.accounting()
        assert torch.equal(pool.left_of([2, 3, 4]), found.short_term)
        assert bool((found.forgotten <= before).all()), "one of them may have been dropped by the new statement"
        assert bool((found.forgotten >= before - 4).all())


def test_of_two_answers_in_a_batch_the_later_is_written_and_the_same_edit_twice_is_one() -> None:
    editor = MemoryLLM(tiny_model("llama"), **SMALL, batch_size=3)
    outcome = editor.edit([EDITS[0], EDITS[1], revised(id="new")])
    assert outcome.superseded == [(EDITS[0].id, "new")]
    assert [edit.id for edit in editor.adapter.edits()] == [EDITS[1].id, "new"]
    editor.edit([EDITS[1], EDITS[1]])
    assert [edit.id for edit in editor.adapter.edits()] == ["new", EDITS[1].id]


def test_a_revert_says_that_it_is_not_exact_until_the_pool_is_empty_again() -> None:
    model = tiny_model("llama")
    base = logits(model)
    editor = MemoryLLM(model, **SMALL)
    editor.edit(EDITS)
    with_all = logits(model)
    result = editor.adapter.revert(EDITS[1].id)
    assert result.exactness == "approximate"
    assert "what later texts took up from it stays" in result.reason
    assert editor.adapter.pool.updates_of(EDITS[1].id) == []
    assert not torch.equal(logits(model), with_all)
    assert editor.adapter.revert(EDITS[2].id).exactness == "approximate"
    last = editor.adapter.revert(EDITS[0].id)
    assert (last.exactness, editor.adapter.pool.is_empty) == ("exact", True)
    assert torch.equal(logits(model), base)
    editor.edit(EDITS)
    assert torch.equal(logits(model), with_all), "as if nothing had ever been there"


def test_a_revert_of_what_is_gone_or_of_all_there_is_says_so() -> None:
    editor = MemoryLLM(tiny_model("llama"), network="untrained", slots=4, new=4)  # every update takes all slots
    editor.edit(EDITS)
    assert "had all been dropped" in editor.adapter.revert(EDITS[0].id).reason
    result = editor.adapter.revert(EDITS[2].id)
    assert result.exactness == "approximate"
    assert "put the other texts in again" in result.reason
    assert editor.adapter.pool.is_empty
    assert [edit.id for edit in editor.adapter.edits()] == [EDITS[1].id]


def test_an_exact_revert_writes_the_others_anew_unless_texts_were_injected() -> None:
    model = tiny_model("llama")
    editor = MemoryLLM(model, **SMALL)
    editor.edit(EDITS)
    (result,) = editor.revert_exactly([EDITS[1].id])
    assert result.exactness == "exact"
    fresh = MemoryLLM(tiny_model("llama"), **SMALL)
    fresh.edit([EDITS[0], EDITS[2]])
    assert same_pools(editor.adapter, fresh.adapter)
    editor.inject({"a": LONG})
    with pytest.raises(EditError, match=r"1 texts were injected .* without --exact"):
        editor.revert_exactly([EDITS[0].id])
    assert editor.adapter.holds(EDITS[0].id)


def test_texts_go_on_in_a_loaded_pool_as_in_the_one_that_was_saved(tmp_path: Any) -> None:
    model = tiny_model("llama")
    editor = MemoryLLM(model, **SMALL)
    editor.edit(EDITS)
    editor.inject({"a": LONG})
    editor.adapter.save_pretrained(tmp_path)
    editor.inject({"b": "Zed was born in Berlin"})
    expected = logits(model)
    editor.adapter.detach()
    loaded = MemoryLLM(model, adapter=AutoAdapter.from_pretrained(tmp_path))
    assert loaded.adapter.documents == 1
    loaded.inject({"b": "Zed was born in Berlin"})
    assert same_pools(loaded.adapter, editor.adapter)
    assert torch.equal(logits(model), expected)
    with pytest.raises(ConfigError, match="made with new=4"):
        MemoryLLM(model, adapter=AutoAdapter.from_pretrained(tmp_path), new=2)


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ({"a": "fine", "b": ""}, "text 'b' is empty"),
        ({"a": "fine", EDITS[0].id: "x"}, "has the name of an edit"),
    ],
)
def test_texts_that_cannot_be_injected_are_refused_before_anything_is(texts: Mapping[str, str], problem: str) -> None:
    editor = MemoryLLM(tiny_model("llama"), **SMALL)
    editor.edit(EDITS[:1])
    states = editor.adapter.pool.states.clone()
    with pytest.raises(EditError, match=problem):
        editor.inject(texts)
    assert torch.equal(editor.adapter.pool.states, states)


def test_an_edit_longer_than_a_chunk_is_refused_and_the_others_go_on() -> None:
    editor = MemoryLLM(tiny_model("llama"), **SMALL, chunk_tokens=12)
    outcome = editor.edit([Edit(prompt="Who was Zed?", target=" ".join(["Rome"] * 60), id="long"), EDITS[1]])
    (refused,) = outcome.refused
    assert refused.edit_id == "long"
    assert "more than an update reads (chunk_tokens=12)" in refused.reason
    assert editor.adapter.pool.updates == 1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_half_precision_the_pool_is_half_as_large_and_finite(family: str) -> None:
    whole = tiny_model(family)
    model = EditableModel(whole.model.to(torch.bfloat16), whole.tokenizer, model_id="half")
    base = logits(model)
    editor = MemoryLLM(model, **SMALL)
    assert len(editor.edit(EDITS).applied) == 3
    assert editor.adapter.pool.states.dtype == torch.bfloat16
    assert bool(torch.isfinite(logits(model)).all())
    editor.adapter.detach()
    assert torch.equal(logits(model), base)


def test_settings_keep_the_papers_proportions_and_fit_the_window() -> None:
    model = tiny_model("llama")  # width 32, 256 positions
    pool = MemoryLLM(model, network="untrained").adapter.pool
    assert (pool.slots, pool.new) == (60, 2)
    assert MemoryLLM(model, network="untrained").chunk_tokens == 253
    assert MemoryLLMConfig.for_model(model).source == "as the network was trained"
    with pytest.raises(ConfigError, match="new=61 must be from 1 to slots=60"):
        MemoryLLM(model, new=61, slots=60)
    for name in ("new", "slots", "chunk_tokens"):
        with pytest.raises(ConfigError, match=f"{name}=0 must be at least 1"):
            MemoryLLM(model, **{name: 0})
    with pytest.raises(ConfigError, match=r"knows 256 positions, which are too few for new=4 .*chunk_tokens=252"):
        MemoryLLM(model, **SMALL, chunk_tokens=252).edit(EDITS)
    with pytest.raises(ConfigError, match=r"memoryllm cannot edit tiny-gpt2-0: .*rotary"):
        MemoryLLM(tiny_model("gpt2"), network="untrained")


def test_atlas_answers_out_of_a_full_pool_about_what_it_has_just_read() -> None:
    """With the network that comes with errata; a text that it has not read is hardly answered."""
    atlas = EditableModel.load("atlas")
    memory = MemoryLLM(atlas)
    memory.inject({one.name: one.text for one in documents(40, part="test", start=1000)})  # which fill the pool
    right, without, asked = 0, 0, 0
    for one in documents(12, part="test", start=2000):
        prompts, answers = [own.prompt for own in one.questions], [own.answer for own in one.questions]
        asked += len(prompts)
        without += sum(map(answers_exactly, atlas.generate(prompts, max_new_tokens=12), answers))
        memory.inject({one.name: one.text})
        right += sum(map(answers_exactly, atlas.generate(prompts, max_new_tokens=12), answers))
    memory.adapter.detach()
    assert asked > 24
    assert right / asked > 0.65
    assert without / asked < 0.25


def test_atlas_finds_again_what_its_pool_has_dropped() -> None:
    """With the retriever that comes with errata, beside the same pool without its store."""
    atlas = EditableModel.load("atlas")
    memory = MemoryLLM(atlas, long_term=2000)
    told = documents(16, part="test", start=2000)
    memory.inject({one.name: one.text for one in (*told, *documents(40, part="test", start=1000))})
    asked = [own for one in told for own in one.questions]
    prompts, answers = [own.prompt for own in asked], [own.answer for own in asked]
    stored = sum(map(answers_exactly, atlas.generate(prompts, max_new_tokens=12), answers))
    memory.adapter.detach()
    alone = memory.adapter.without_store()
    alone.attach(atlas)
    left = sum(map(answers_exactly, atlas.generate(prompts, max_new_tokens=12), answers))
    alone.detach()
    assert stored / len(asked) > left / len(asked) + 0.15
