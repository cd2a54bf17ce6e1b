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
        output.past_key_values.batch_select_indices(torch.tensor([0, 1]))
        with pytest.raises(SequenceError, match="decided for 3 sequences is now used for 2"):
            model.model(input_ids=batch.ids[:2, :1], past_key_values=output.past_key_values)


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
