"""Following forward passes: prefill and decode, prompts and padding, routes tied to the cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

from errata.errors import SequenceError
from errata.model import EditableModel
from errata.model.edited_linear import Contribution
from errata.model.sequences import ForwardPass, positions_of, prompt_mask
from errata.testing import tiny_model

PATH = "model.layers.2.mlp.down_proj"


class Recorder(Contribution):
    """Keeps what every pass knows, and decides once per sequence how many prompt tokens it saw."""

    def __init__(self) -> None:
        self.passes: list[tuple[bool, list[int], int]] = []
        self.decisions: list[list[int]] = []

    def change_output(self, inputs: Tensor, outputs: Tensor, forward_pass: ForwardPass) -> Tensor:
        store = forward_pass.store
        self.passes.append((forward_pass.is_prefill, forward_pass.prompt.sum(1).tolist(), forward_pass.past))
        if not store.frozen:
            seen = forward_pass.prompt.sum(1) + store.gathered.get(self, 0)
            store.gathered[self] = seen
            store.decided[self] = seen
        self.decisions.append(store.expanded(store.decided[self], inputs.shape[0]).tolist())
        return outputs


@contextmanager
def recording(family: str = "llama") -> Iterator[tuple[EditableModel, Recorder]]:
    model, recorder = tiny_model(family), Recorder()
    path = model.anatomy.mlp_output[2]
    model.contribute(path, recorder)
    try:
        yield model, recorder
    finally:
        model.withdraw(path, recorder)


def batch_of(model: EditableModel, side: Any = "left") -> tuple[Any, list[int]]:
    passages = [model.passage(text) for text in ("The capital of France is", "Who?", "Ann plays")]
    return model.batch(passages, side=side), [len(p.ids) for p in passages]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_generate_freezes_the_route_of_the_prompt(family: str) -> None:
    with recording(family) as (model, recorder):
        batch, lengths = batch_of(model)
        model.model.generate(
            input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        assert recorder.passes[0][:2] == (True, lengths)
        assert all(not prefill for prefill, _, _ in recorder.passes[1:])
        assert recorder.decisions == [lengths] * 4


def test_without_a_cache_the_answer_never_becomes_prompt() -> None:
    with recording() as (model, recorder):
        batch, lengths = batch_of(model)
        model.model.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            use_cache=False,
        )
        assert recorder.decisions == [lengths] * 4


def test_beams_share_the_route_of_their_prompt() -> None:
    with recording() as (model, recorder):
        batch, lengths = batch_of(model)
        model.model.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            num_beams=2,
        )
        assert all(d == [n for n in lengths for _ in range(2)] for d in recorder.decisions)


def test_chunks_are_decided_ahead() -> None:
    with recording() as (model, recorder):
        ids = model.batch([model.passage("The capital of France is")]).ids
        model.model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, prefill_chunk_size=2)
        assert all(decision == [ids.shape[1]] for decision in recorder.decisions)


def test_a_static_cache_is_followed_too() -> None:
    with recording() as (model, recorder):
        batch, lengths = batch_of(model)
        cache = StaticCache(config=model.model.config, max_cache_len=64)
        model.model.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            past_key_values=cache,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            disable_compile=True,
        )
        assert recorder.decisions == [lengths] * 4


def test_a_plain_loop_over_a_cache_keeps_its_route() -> None:
    with recording() as (model, recorder):
        ids = model.batch([model.passage("Ann plays the")]).ids
        length = ids.shape[1]
        output = model.model(input_ids=ids, use_cache=True)
        for _ in range(3):
            step = output.logits[:, -1:].argmax(-1)
            output = model.model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        assert recorder.decisions == [[length]] * 4
        assert [prefill for prefill, _, _ in recorder.passes] == [True, False, False, False]


def test_a_prompt_given_in_parts_is_gathered_until_the_first_single_token() -> None:
    with recording() as (model, recorder):
        ids = model.batch([model.passage("The capital of France is")]).ids
        output = model.model(input_ids=ids[:, :3], use_cache=True)
        output = model.model(input_ids=ids[:, 3:], past_key_values=output.past_key_values, use_cache=True)
        model.model(input_ids=ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
        assert recorder.decisions == [[3], [ids.shape[1]], [ids.shape[1]]]


def test_a_copied_cache_goes_its_own_way() -> None:
    with recording() as (model, recorder):
        first = model.batch([model.passage("Ann plays the")]).ids
        output = model.model(input_ids=first, use_cache=True)
        copied = copy.deepcopy(output.past_key_values)
        step = first[:, :1]
        model.model(input_ids=step, past_key_values=copied, use_cache=True)
        other = model.batch([model.passage("Who?")]).ids
        model.model(input_ids=other, use_cache=True)
        model.model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        assert recorder.decisions == [[first.shape[1]], [first.shape[1]], [other.shape[1]], [first.shape[1]]]


def test_a_cache_used_for_another_number_of_sequences_is_an_error() -> None:
    with recording() as (model, _):
        batch, _ = batch_of(model)
        output = model.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=True)
        for layer in output.past_key_values.layers:  # behind the cache's back
            layer.batch_select_indices(torch.tensor([0, 1]))
        with pytest.raises(SequenceError, match="decided for 3 sequences is now used for 2"):
            model.model(input_ids=batch.ids[:2, :1], past_key_values=output.past_key_values)


@pytest.mark.parametrize(
    ("method", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([2, 0, 1]), [2, 0, 1]),
        ("batch_select_indices", torch.tensor([1, 1, 0, 0]), [1, 1, 0, 0]),
        ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ],
)
@pytest.mark.parametrize("is_complete", [False, True])
def test_routes_follow_the_rows_of_their_cache(method: str, argument: Any, rows: list[int], is_complete: bool) -> None:
    with recording() as (model, recorder):
        batch, lengths = batch_of(model)
        output = model.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=True)
        cache = output.past_key_values
        assert isinstance(cache, DynamicCache)
        step = batch.ids[:, -1:]
        mask = torch.cat([batch.mask, torch.ones_like(step)], 1)
        if is_complete:
            model.model(input_ids=step, attention_mask=mask, past_key_values=cache)
            mask = torch.cat([mask, torch.ones_like(step)], 1)
        copied = copy.deepcopy(cache)
        getattr(cache, method)(argument)
        model.model(input_ids=step[rows], attention_mask=mask[rows], past_key_values=cache)
        assert recorder.decisions[-1] == [lengths[row] for row in rows]
        model.model(input_ids=step, attention_mask=mask, past_key_values=copied)
        assert recorder.decisions[-1] == lengths, "a copy made before stays as it was"
        getattr(copied, method)(argument)
        model.model(input_ids=step[rows], past_key_values=copied)
        assert recorder.decisions[-1] == [lengths[row] for row in rows], "a copy moves its own rows"


def test_what_a_prompt_has_gathered_follows_the_rows_too() -> None:
    with recording() as (model, recorder):
        batch, lengths = batch_of(model)
        cache = model.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        more = torch.cat([batch.mask[[1, 2, 0]], torch.ones(3, 2, dtype=torch.long)], 1)
        model.model(input_ids=batch.ids[:, -2:], attention_mask=more, past_key_values=cache)
        assert recorder.decisions[-1] == [lengths[row] + 2 for row in (1, 2, 0)]


def test_rows_moved_while_nothing_is_attached_are_followed_all_the_same() -> None:
    model, recorder = tiny_model("llama"), Recorder()
    batch, lengths = batch_of(model)
    model.contribute(PATH, recorder)
    cache = model.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=True).past_key_values
    model.withdraw(PATH, recorder)
    cache.batch_select_indices(torch.tensor([2]))
    model.contribute(PATH, recorder)
    model.model(input_ids=batch.ids[2:, -1:], past_key_values=cache)
    model.withdraw(PATH, recorder)
    assert recorder.decisions[-1] == lengths[2:]


def test_a_prompt_that_may_go_on_cannot_be_cropped_but_an_answer_can() -> None:
    with recording() as (model, recorder):
        ids = model.batch([model.passage("The capital of France is")]).ids
        length = ids.shape[1]
        cache = model.model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(SequenceError, match="cannot be unread"):
            cache.crop(-2)
        assert cache.get_seq_length() == length
        with model.sequences.prompts([length - 2]):
            cache = model.model(input_ids=ids, use_cache=True).past_key_values
        cache.crop(-2)
        model.model(input_ids=ids[:, -2:], past_key_values=cache)
        assert recorder.decisions == [[length], [length - 2], [length - 2]]


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}])
def test_drafted_tokens_leave_the_route_alone(how: dict[str, Any]) -> None:
    with recording() as (model, recorder):
        ids = model.batch([model.passage("The capital of France is the capital of")]).ids
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        plain = model.model.generate(input_ids=ids, **settings)
        if "assistant_model" in how:
            how = {"assistant_model": tiny_model("llama", seed=1).model}
        assert torch.equal(model.model.generate(input_ids=ids, **settings, **how), plain)
        assert {tuple(decision) for decision in recorder.decisions} == {(ids.shape[1],)}


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma2", {}), ("gemma3", {}), ("gemma3", {"sliding_window": 4}), ("mistral", {"sliding_window": 8})],
)
def test_sliding_windows_in_a_static_cache(family: str, changes: dict[str, Any]) -> None:
    model, recorder = tiny_model(family, **changes), Recorder()
    path = model.anatomy.mlp_output[2]
    batch, lengths = batch_of(model)
    settings = {"attention_mask": batch.mask, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    plain = model.model.generate(input_ids=batch.ids, **settings)
    model.contribute(path, recorder)
    for kind in ("dynamic", "static"):
        found = model.model.generate(input_ids=batch.ids, cache_implementation=kind, disable_compile=True, **settings)
        assert torch.equal(found, plain)
    model.withdraw(path, recorder)
    assert recorder.decisions == [lengths] * 40


def test_a_scorer_that_pads_on_the_right_and_passes_no_mask() -> None:
    """As lm-eval's HFLM computes log-likelihoods: zeros behind the shorter rows, and nothing but token ids."""
    with recording() as (model, recorder):
        rows = [
            list(model.passage(text).ids[:-1]) for text in ("The capital of France is", "Who? Bob", "Ann plays the")
        ]
        for row in rows:
            model.model(torch.tensor([row]))
        alone = [decision[0] for decision in recorder.decisions]
        width = max(len(row) for row in rows)
        model.model(torch.tensor([row + [0] * (width - len(row)) for row in rows]))
        assert recorder.decisions[-1] == alone == [len(row) for row in rows]


def test_tokens_that_end_every_row_are_no_padding() -> None:
    with recording() as (model, recorder):
        model.model(torch.tensor([[1, 7, 0, 0], [1, 7, 8, 0]]))
        model.model(torch.tensor([[1, 7, 0, 0]]))
        model.model(torch.tensor([[1, 7, 0, 0], [1, 7, 8, 9]]), attention_mask=torch.ones(2, 4))
        assert recorder.decisions == [[4, 4], [4], [4, 4]]


def test_announced_prompts_are_counted_from_the_beginning_of_the_cache() -> None:
    with recording() as (model, recorder):
        ids = torch.arange(3, 13)[None]
        for cuts in ([2, 3, 5], [4, 1, 5], [2, 2, 1, 1, 4], [1] * 10):
            cache, column = DynamicCache(), 0
            with model.sequences.prompts([5]):
                for count in cuts:
                    model.model(input_ids=ids[:, column : column + count], past_key_values=cache)
                    column += count
            assert recorder.decisions[-1] == [5], cuts
            model.model(input_ids=ids[:, :3], past_key_values=cache)
            assert recorder.decisions[-1] == [5], "and the prompt stays complete afterwards"


def test_a_cache_of_the_time_before_is_an_error() -> None:
    model = tiny_model("llama")
    ids = model.batch([model.passage("Ann")]).ids
    old = model.model(input_ids=ids, use_cache=True).past_key_values
    recorder = Recorder()
    model.contribute(PATH, recorder)
    with pytest.raises(SequenceError, match="before the adapter was attached"):
        model.model(input_ids=ids[:, :1], past_key_values=old)
    model.withdraw(PATH, recorder)


def test_announced_prompts_end_where_they_were_said_to() -> None:
    with recording() as (model, recorder):
        passages = [model.passage("The capital of France is", "Rome"), model.passage("Who?", "Ann Bob")]
        for side in ("left", "right"):
            model.forward(model.batch(passages, side=side))  # type: ignore[arg-type]
        assert recorder.decisions == [[len(p.prompt) for p in passages]] * 2


def ends_of(passes: list[ForwardPass]) -> list[list[list[int]]]:
    """Per pass and row, the columns of the whole sequence at which a prompt ends."""
    return [[(row.nonzero().squeeze(1) + p.past).tolist() for row in p.prompt_ends] for p in passes]


class Keeper(Contribution):
    """Keeps the passes themselves."""

    def __init__(self) -> None:
        self.passes: list[ForwardPass] = []

    def change_output(self, inputs: Tensor, outputs: Tensor, forward_pass: ForwardPass) -> Tensor:
        self.passes.append(forward_pass)
        return outputs


@contextmanager
def keeping(family: str = "llama") -> Iterator[tuple[EditableModel, list[ForwardPass]]]:
    model, keeper = tiny_model(family), Keeper()
    path = model.anatomy.mlp_output[2]
    model.contribute(path, keeper)
    try:
        yield model, keeper.passes
    finally:
        model.withdraw(path, keeper)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_that_is_read_at_once_ends_at_its_last_real_token(side: str) -> None:
    with keeping() as (model, passes):
        batch, lengths = batch_of(model, side)
        last = [[int(start) + length - 1] for start, length in zip(batch.starts, lengths, strict=True)]
        model.model(input_ids=batch.ids, attention_mask=batch.mask)
        model.forward(batch)
        assert ends_of(passes) == [last] * 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_answer_in_the_same_pass_does_not_move_the_end(side: Any) -> None:
    with keeping() as (model, passes):
        passages = [
            model.passage("The capital of France is", "Rome"),
            model.passage("Who?", "Ann Bob"),
            model.passage("x"),
        ]
        batch = model.batch(passages, side=side)
        model.forward(batch)
        ends = [[int(start) + len(p.prompt) - 1] for start, p in zip(batch.starts, passages, strict=True)]
        assert ends_of(passes) == [ends]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
def test_the_answer_of_generate_does_not_move_the_end(use_cache: bool, beams: int) -> None:
    with keeping() as (model, passes):
        batch, lengths = batch_of(model)
        settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": beams}
        model.model.generate(input_ids=batch.ids, attention_mask=batch.mask, use_cache=use_cache, **settings)
        rows = len(passes[0].real)
        end, none = [[batch.ids.shape[1] - 1]] * rows, [[]] * rows
        assert rows in (len(lengths), len(lengths) * beams)
        assert ends_of(passes) == [end] + [none if use_cache else end] * 2


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_only_the_chunk_that_holds_the_last_token_says_so(side: Any, beams: int) -> None:
    """Padding on the right makes no sense to generate, but lets prompts end in different chunks."""
    with keeping() as (model, passes):
        batch, lengths = batch_of(model, side)
        model.model.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            num_beams=beams,
            prefill_chunk_size=2,
        )
        last = [int(start) + length - 1 for start, length in zip(batch.starts, lengths, strict=True)]
        ahead, *chunks = passes
        assert ends_of([ahead]) == [[[end] for end in last]]
        found = ends_of(chunks)
        assert sum(bool(p.prompt.any()) for p in chunks) == -(-batch.ids.shape[1] // 2)
        for row, end in enumerate([end for end in last for _ in range(beams)]):
            assert [columns for columns in (ends[row] for ends in found) if columns] == [[end]]
            assert found[end // 2][row] == [end]


def test_a_prompt_announced_over_several_chunks_ends_once() -> None:
    with keeping() as (model, passes):
        ids = torch.arange(3, 23).view(2, 10)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        for cuts in ([2, 3, 5], [4, 1, 5], [1] * 10):
            passes.clear()
            cache, column = DynamicCache(), 0
            with model.sequences.prompts([6, 2]):
                for count in cuts:
                    model.model(
                        input_ids=ids[:, column : column + count],
                        attention_mask=mask[:, : column + count],
                        past_key_values=cache,
                    )
                    column += count
            found = ends_of(passes)
            assert [[end for ends in found for end in ends[row]] for row in range(2)] == [[5], [4]], cuts


def test_without_an_announcement_each_chunk_may_be_the_last() -> None:
    with keeping() as (model, passes):
        ids = torch.arange(3, 13)[None]
        cache = DynamicCache()
        for part in (ids[:, :3], ids[:, 3:7], ids[:, 7:8], ids[:, 8:]):
            model.model(input_ids=part, past_key_values=cache)
        assert ends_of(passes) == [[[2]], [[6]], [[]], [[]]]


def answering_of(passes: list[ForwardPass]) -> list[list[list[int]]]:
    """Per pass and row, the columns of the whole sequence that say what comes next."""
    return [[(row.nonzero().squeeze(1) + p.past).tolist() for row in p.answering] for p in passes]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_answers_from_the_last_token_of_its_prompt_on(side: Any) -> None:
    with keeping() as (model, passes):
        passages = [
            model.passage("The capital of France is", "Rome"),
            model.passage("Who?", "Ann Bob"),
            model.passage("x"),
        ]
        batch = model.batch(passages, side=side)
        model.forward(batch)
        expected = []
        for start, passage in zip(batch.starts.tolist(), passages, strict=True):
            expected.append(list(range(start + len(passage.prompt) - 1, start + len(passage.ids))))
        assert answering_of(passes) == [expected]
        assert torch.equal(passes[0].ids, batch.ids)  # type: ignore[arg-type]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
def test_all_that_generate_adds_is_an_answer(use_cache: bool, beams: int) -> None:
    with keeping() as (model, passes):
        batch, _ = batch_of(model)
        settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": beams}
        model.model.generate(input_ids=batch.ids, attention_mask=batch.mask, use_cache=use_cache, **settings)
        end, rows = batch.ids.shape[1] - 1, len(passes[0].real)
        expected = [[end + step] if use_cache else list(range(end, end + step + 1)) for step in range(3)]
        assert answering_of(passes) == [[columns] * rows for columns in expected]


@pytest.mark.parametrize("side", ["left", "right"])
def test_in_chunks_a_row_answers_where_it_would_at_once(side: Any) -> None:
    with keeping() as (model, passes):
        batch, lengths = batch_of(model, side)
        model.model.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            prefill_chunk_size=2,
        )
        ahead, *chunks = answering_of(passes)
        for row, (start, length) in enumerate(zip(batch.starts.tolist(), lengths, strict=True)):
            end = start + length - 1
            assert ahead[row] == [end]
            found = [column for chunk in chunks for column in chunk[row]]
            assert found[0] == end
            assert all(column >= end for column in found)


def test_a_pass_that_is_given_embeddings_knows_no_tokens() -> None:
    with keeping() as (model, passes):
        ids = model.batch([model.passage("The capital of France is")]).ids
        model.model(inputs_embeds=model.model.get_input_embeddings()(ids))
        model.model(input_ids=ids)
        assert passes[0].ids is None
        assert torch.equal(passes[1].ids, ids)  # type: ignore[arg-type]
        assert torch.equal(passes[0].answering, passes[1].answering)


def test_packed_batches_are_refused() -> None:
    with recording() as (model, _), pytest.raises(SequenceError, match="packed"):
        model.module("model")(input_ids=torch.ones(1, 4, dtype=torch.long), cu_seq_lens_q=torch.tensor([0, 2, 4]))


def test_a_layer_run_by_hand_is_an_error() -> None:
    with recording() as (model, _), pytest.raises(SequenceError, match="outside of its model"):
        model.module(PATH)(torch.zeros(1, 2, 96))


def test_after_a_failing_pass_nothing_is_left() -> None:
    with recording() as (model, _):
        with pytest.raises(IndexError):
            model.model(input_ids=torch.tensor([[100_000]]))
        assert model.sequences.current is None


def test_a_generate_that_somebody_else_put_there_stays() -> None:
    model, recorder, calls = tiny_model("llama"), Recorder(), []
    hf, plain = model.model, model.model.generate
    ids = model.batch([model.passage("Ann")]).ids

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append("theirs")
        return plain(*args, **kwargs)

    hf.generate = theirs
    model.contribute(PATH, recorder)
    hf.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    model.withdraw(PATH, recorder)
    assert hf.generate is theirs
    assert calls == ["theirs"]
    del hf.generate

    model.contribute(PATH, recorder)
    ours = hf.generate

    def around(*args: Any, **kwargs: Any) -> Any:
        calls.append("around")
        return ours(*args, **kwargs)

    hf.generate = around
    model.withdraw(PATH, recorder)
    assert hf.generate is around
    model.contribute(PATH, recorder)  # ours around theirs around ours of before, which only passes on
    hf.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    assert calls == ["theirs", "around"]
    model.withdraw(PATH, recorder)
    assert hf.generate is around


def test_two_wrappers_of_one_model_follow_the_same_passes() -> None:
    first = tiny_model("llama")
    second = EditableModel(first.model, first.tokenizer)
    one, two = Recorder(), Recorder()
    first.contribute(PATH, one)
    second.contribute("model.layers.1.mlp.down_proj", two)
    passage = first.passage("The capital of France is", "Rome")
    for model in (first, second):
        model.forward(model.batch([passage]))
    assert one.decisions == two.decisions == [[len(passage.prompt)]] * 2
    first.withdraw(PATH, one)
    second.forward(second.batch([passage]))
    assert len(two.decisions) == 3
    second.withdraw("model.layers.1.mlp.down_proj", two)
    assert "generate" not in vars(first.model)


def test_a_copied_model_generates_by_itself() -> None:
    with recording() as (model, recorder):
        ids = model.batch([model.passage("The capital of France is")]).ids
        copied = copy.deepcopy(model.model)
        with torch.no_grad():
            copied.lm_head.weight.zero_()
        found = copied.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert not recorder.decisions
        other = copied.model.layers[2].mlp.down_proj.contributions[0]
        assert other.decisions == [[ids.shape[1]]] * 3
        assert len(set(found[0, -3:].tolist())) == 1


class Shift(Contribution):
    def __init__(self) -> None:
        self.change = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))

    def weight_change(self) -> Tensor:
        return self.change


def test_bare_is_the_base_whatever_is_attached() -> None:
    model, recorder, shift = tiny_model("llama"), Recorder(), Shift()
    batch, _ = batch_of(model)
    base = model.forward(batch).logits
    model.contribute(PATH, recorder)
    model.contribute(PATH, shift)
    changed = model.forward(batch).logits
    with model.bare():
        with model.bare():
            assert torch.equal(model.forward(batch).logits, base)
        assert torch.equal(model.forward(batch).logits, base)
        texts = model.generate(["Ann plays"], max_new_tokens=4)
    assert len(recorder.passes) == 1
    assert torch.equal(model.forward(batch).logits, changed)
    assert not torch.equal(changed, base)
    model.withdraw(PATH, shift)
    model.withdraw(PATH, recorder)
    assert texts == model.generate(["Ann plays"], max_new_tokens=4)


def test_a_changed_weight_follows_the_precision_of_the_model() -> None:
    model, shift = tiny_model("llama"), Shift()
    batch, _ = batch_of(model)
    model.contribute(PATH, shift)
    model.forward(batch)
    model.model.bfloat16()
    half = model.forward(batch).logits
    assert half.dtype == torch.bfloat16
    model.model.float()
    assert model.forward(batch).logits.dtype == torch.float32
    model.withdraw(PATH, shift)


def test_nothing_is_left_when_the_last_adapter_has_gone() -> None:
    with recording() as (model, _):
        assert "generate" in vars(model.model)
    assert "generate" not in vars(model.model)
    assert not model.module("model")._forward_pre_hooks
    assert type(model.module(PATH)) is torch.nn.Linear


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=4), st.booleans()
)
def test_prompt_masks_and_positions_ignore_padding(rows: list[tuple[int, int, int]], left: bool) -> None:
    width = max(padding + length for padding, length, _ in rows)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (_, length, _) in enumerate(rows):
        real[row, width - length :] = left
        real[row, :length] |= not left
    lengths = torch.tensor([prompt for _, _, prompt in rows])
    mask = prompt_mask(real, lengths)
    positions = positions_of(real)
    for row, (_, length, prompt) in enumerate(rows):
        assert int(mask[row].sum()) == min(prompt, length)
        assert positions[row][real[row]].tolist() == list(range(length))
        assert positions[row][mask[row]].tolist() == list(range(min(prompt, length)))


def test_an_empty_cache_passed_in_is_the_one_that_carries_the_route() -> None:
    with recording() as (model, recorder):
        cache = DynamicCache(config=model.model.config)
        ids = model.batch([model.passage("Ann plays")]).ids
        model.model(input_ids=ids, past_key_values=cache, use_cache=True)
        model.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.reset()
        assert recorder.decisions == [[ids.shape[1]]] * 2
