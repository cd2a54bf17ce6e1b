"""Greedy generation is the argmax of the model's logits; sampled texts are spaced as the model wrote them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tokenizers.processors import ByteLevel

from errata.editors.contexts import rome_contexts, wise_contexts
from errata.model import EditableModel
from errata.model.generation import _FEW, Written, greedy, sample, write
from errata.model.scoring import forced_answers
from errata.model.tokens import Passage
from errata.testing import byte_tokenizer, metaspace_tokenizer, tiny_hf_model, tiny_model

PROMPTS = ("The capital of France is", "Who?", "Ann plays")


def by_argmax(model: EditableModel, prompt: str, count: int) -> str:
    ids = list(model.passage(prompt).ids)
    first = len(ids)
    with torch.no_grad():
        for _ in range(count):
            token = int(model.model(torch.tensor([ids])).logits[0, -1].argmax())
            if token in model.stop_tokens:
                break
            ids.append(token)
    return str(model.tokenizer.decode(ids[first:], skip_special_tokens=True))


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 3.0},
        {"min_new_tokens": 12},
        {"min_length": 40},
        {"suppress_tokens": list(range(100, 300))},
        {"begin_suppress_tokens": list(range(3, 300))},
        {"bad_words_ids": [[i] for i in range(100, 300)]},
        {"no_repeat_ngram_size": 1},
        {"forced_eos_token_id": 2},
        {"do_sample": True, "temperature": 5.0, "num_beams": 2},
    ],
    ids=lambda own: next(iter(own)),
)
def test_greedy_is_the_argmax_whatever_the_model_says_of_itself(own: dict[str, Any]) -> None:
    model = tiny_model("llama")
    expected = [by_argmax(model, prompt, 12) for prompt in PROMPTS]
    for name, value in own.items():
        setattr(model.model.generation_config, name, value)
    settings = model.model.generation_config
    assert greedy(model, PROMPTS, max_new_tokens=12) == expected
    assert model.model.generation_config is settings


def test_the_models_own_end_tokens_still_end_an_answer() -> None:
    model = tiny_model("llama")
    ids = model.batch([model.passage(PROMPTS[0])]).ids
    output = model.model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    continuation = output[0, ids.shape[1] :].tolist()
    ended = tiny_model("llama")
    ended.model.generation_config.eos_token_id = [2, continuation[3]]
    kept = continuation[: continuation.index(continuation[3])]
    found = greedy(ended, PROMPTS[:1], max_new_tokens=6)
    assert found == [model.tokenizer.decode(kept, skip_special_tokens=True)]


def saying(word: str, tokenizer: Any) -> EditableModel:
    """A model that says one token, whatever it is asked."""
    hf = tiny_hf_model("llama", vocabulary=600)
    answer = torch.nn.functional.one_hot(torch.tensor(tokenizer.get_vocab()[word]), 600).float() * 9
    hf.lm_head.register_forward_hook(lambda module, inputs, output: answer.expand_as(output))
    return EditableModel(hf, tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "word"), [(byte_tokenizer(), "ĠFrance"), (metaspace_tokenizer(), "▁France")], ids=["bytes", "marked"]
)
def test_sampled_texts_keep_the_space_in_front_of_them(tokenizer: Any, word: str) -> None:
    model = saying(word, tokenizer)
    generator = torch.Generator().manual_seed(0)
    assert sample(model, "Because", tokens=2, top_k=1, generator=generator) == " France France"
    assert wise_contexts(model, 0)[0] == "I France France France France France"
    assert rome_contexts(model, 0)[0] == "France France France France France."


def test_without_a_beginning_token_text_begins_after_the_end_of_another() -> None:
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.backend_tokenizer.post_processor = ByteLevel()
    tokenizer.bos_token, tokenizer.eos_token = None, "ĠFrance"
    model = EditableModel(tiny_hf_model("llama"), tokenizer)
    assert model.passage("").ids == ()
    first: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: first.append(int(kwargs["input_ids"][0, 0])), with_kwargs=True
    )
    sample(model, "", tokens=1, top_k=5, generator=torch.Generator().manual_seed(0))
    assert first == [tokenizer.eos_token_id]
    assert min(model.stop_tokens) < tokenizer.eos_token_id, "the smallest end token is not meant"


def test_short_and_long_answers_are_the_argmax_alike() -> None:
    model = tiny_model("llama")
    prompts = [
        f"{name} {verb} {what}" for name in ("Ann", "Bob", "Zed") for verb in ("plays", "was") for what in "abcd"
    ]
    longest = 2 * _FEW + 3
    model.model.generation_config.eos_token_id = list(range(0, 400, 7))
    expected = [by_argmax(model, prompt, longest) for prompt in prompts]
    ends = [len(one.ids) < _FEW for one in write(model, prompts, max_new_tokens=longest)]
    assert any(ends)
    assert not all(ends)
    assert greedy(model, prompts, max_new_tokens=longest) == expected
    # The order in which batches end does not matter, nor how large they are.
    assert greedy(model, prompts[::-1], max_new_tokens=longest, batch_tokens=64) == expected[::-1]


def test_what_was_written_says_what_teacher_forcing_would_predict() -> None:
    one = Written("Rome", (5, 6, 2))
    assert one.predictions((5, 6)) == (5, 6)
    assert one.predictions((5, 7)) == (5, 6)
    assert one.predictions((5, 6, 9)) == (5, 6, 2)
    assert one.predictions((7,)) == (5,)
    assert one.predictions((7, 6)) is None
    assert one.predictions((5, 6, 2, 4)) is None
    assert one.predictions(()) == ()
    model = tiny_model("llama")
    (said,) = write(model, PROMPTS[:1], max_new_tokens=6)
    for answer in (said.ids, (*said.ids[:2], 9), (*said.ids[:3], 9, 9)):
        passage = Passage(model.passage(PROMPTS[0]).ids, answer)
        known = said.predictions(answer)
        assert known is None or known == forced_answers(model, [passage])[0].predicted
    assert said.predictions((*said.ids[:2], 9)) is not None
