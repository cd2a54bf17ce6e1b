"""Greedy generation in batches, and seeded sampling with a generator of its own.

Greedy means the argmax of the model's logits and nothing else. What a checkpoint's own generation settings would add
(penalties, least lengths, forced, banned or suppressed tokens) is left out, except for its end tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from errata.model.scoring import length_batches
from errata.model.tokens import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from errata.model.editable import EditableModel
    from errata.model.tokens import TokenBatch

_FEW = 8  # tokens within which most answers end

__all__ = [
    "Written",
    "beginning_token",
    "continued",
    "end_token",
    "greedy",
    "plain_generation",
    "sample",
    "stop_tokens",
    "write",
]


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Let `generate` do what its arguments say and no more, whatever the model's own generation settings are.

    They are put aside for a while, because `generate` merges them into any settings that it is given.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def stop_tokens(model: EditableModel) -> tuple[int, ...]:
    """Ids at which an answer ends: the model's end tokens, and every token that contains a line break."""
    tokenizer = model.tokenizer
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return tuple(sorted({*_ends(model), *(i for i, piece in enumerate(pieces) if "\n" in piece)}))


def end_token(model: EditableModel) -> int | None:
    """The id that a model writes where its answer ends; None where it has none."""
    own, ends = model.tokenizer.eos_token_id, _ends(model)
    return own if own in ends else next(iter(ends), None)


def _ends(model: EditableModel) -> list[int]:
    """Ids that are configured to end an answer."""
    configured = getattr(model.model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = model.tokenizer.eos_token_id
    return [int(i) for i in (configured if isinstance(configured, list) else [configured]) if i is not None]


@torch.no_grad()
def continued(model: EditableModel, batch: TokenBatch, **settings: Any) -> Tensor:
    """The tokens that the model's own `generate` writes behind left-padded prompts, [rows, new tokens].

    Greedy unless `settings`, which go to `generate`, say otherwise.
    """
    arguments, given = batch.generation()
    settings = {"do_sample": False, "pad_token_id": model.tokenizer.pad_token_id, **settings}
    with plain_generation(model.model):
        output: Tensor = model.model.generate(**arguments, **settings)
    return output[:, given:]


@dataclass(frozen=True)
class Written:
    """What a model wrote greedily behind a prompt.

    Attributes:
        text: without the end; ids: its tokens, and the one that ended it where one did.
    """

    text: str
    ids: tuple[int, ...]

    def predictions(self, answer: Sequence[int]) -> tuple[int, ...] | None:
        """The most likely token at each of an answer's places if the model were shown the answer's own beginning.

        Known as far as the model wrote that beginning itself; None where it did not write it to the last place.
        """
        known = self.ids[: len(answer)]
        return known if len(known) == len(answer) and known[:-1] == tuple(answer[:-1]) else None


def greedy(
    model: EditableModel, prompts: Sequence[str], *, max_new_tokens: int = 20, batch_tokens: int = 8192
) -> list[str]:
    """Greedy continuations of prompts, in their order; see `EditableModel.generate`."""
    return [one.text for one in write(model, prompts, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)]


@torch.no_grad()
def write(
    model: EditableModel, prompts: Sequence[str], *, max_new_tokens: int = 20, batch_tokens: int = 8192
) -> list[Written]:
    """As `greedy`, with the tokens.

    Answers are mostly short, and a batch takes as long as its longest. So all prompts get a few tokens first, and those
    that have not ended by then start anew with all of them, among their like. Where most do not end, that is given up.
    """
    passages = [model.passage(prompt) for prompt in prompts]
    stops = model.stop_tokens
    results = [Written("", ())] * len(prompts)
    waiting = list(range(len(prompts)))
    for limit in (_FEW, max_new_tokens) if max_new_tokens >= 2 * _FEW else (max_new_tokens,):
        asked = 0
        unfinished: list[int] = []
        for part in length_batches([len(passages[i].ids) + limit for i in waiting], batch_tokens):
            indices = [waiting[place] for place in part]
            if limit < max_new_tokens and 2 * len(unfinished) > asked:
                unfinished += indices
                continue
            batch = model.batch([passages[i] for i in indices], side="left")
            with model.sequences.narrowed(indices, len(prompts)):
                output = continued(model, batch, max_new_tokens=limit, eos_token_id=list(stops) or None)
            asked += len(indices)
            for index, row in zip(indices, output.tolist(), strict=True):
                end = next((at for at, token in enumerate(row) if token in stops), None)
                if end is None and limit < max_new_tokens:
                    unfinished.append(index)
                else:
                    text = model.tokenizer.decode(row[:end], skip_special_tokens=True)
                    results[index] = Written(text, tuple(row if end is None else row[: end + 1]))
        waiting = unfinished
    return results


@torch.no_grad()
def sample(model: EditableModel, prompt: str, *, tokens: int, top_k: int, generator: torch.Generator) -> str:
    """A sampled continuation of exactly `tokens` tokens, drawn with the generator that is passed.

    The end token and line breaks are never drawn: the text is to be put in front of another. It begins with a space
    where it begins with a new word: the prompt with the text behind it reads as the model wrote it. What an
    encoder-decoder model answers is a text of its own and always begins with a space.
    """
    ids = list(model.passage(prompt).ids) or [beginning_token(model)]
    first = len(ids)
    cache = None
    step, write = _writer(model, ids)
    for _ in range(tokens):
        output = write(step, len(ids), cache)
        cache = output.past_key_values
        logits = output.logits[0, -1].float()
        logits[torch.tensor(model.stop_tokens, dtype=torch.long, device=logits.device)] = float("-inf")
        values, candidates = logits.topk(min(top_k, logits.numel()))
        drawn = torch.multinomial(values.softmax(-1).cpu(), 1, generator=generator)
        ids.append(int(candidates[int(drawn)]))
        step = torch.tensor([[ids[-1]]], device=model.device)
    # Decoded by themselves, tokens in the manner of sentencepiece would lose their leading space.
    if model.is_encoder_decoder:
        return " " + str(model.tokenizer.decode(ids[first:], skip_special_tokens=True)).lstrip()
    before, whole = (str(model.tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:first], ids))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(model.tokenizer.decode(ids[first:], skip_special_tokens=True))


def _writer(model: EditableModel, ids: list[int]) -> tuple[Tensor, Callable[[Tensor, int, Any], Any]]:
    """The tokens that the writing stack begins with, [1, tokens], and the call that writes one token more.

    The call takes the tokens it has not seen yet, how many there are in all, and the KV cache.
    """
    if model.is_encoder_decoder:
        batch = model.batch([Passage(tuple(ids), ())])
        arguments = {**batch.trunk_arguments(), "encoder_outputs": (model.trunk_states(batch),)}

        def answer(step: Tensor, count: int, cache: Any) -> Any:
            return model.model(**arguments, decoder_input_ids=step, past_key_values=cache, use_cache=True)

        return batch.arguments()["decoder_input_ids"], answer

    def go_on(step: Tensor, count: int, cache: Any) -> Any:
        mask = torch.ones(1, count, dtype=torch.long, device=model.device)
        return model.model(input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True)

    return torch.tensor([ids], device=model.device), go_on


def beginning_token(model: EditableModel) -> int:
    """What text begins after when there is no prompt and the tokenizer puts nothing in front.

    The beginning token, else the end token, which stands between texts (ROME begins its prefixes with GPT-2's
    <|endoftext|>, which is both).
    """
    candidates = (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id, *model.stop_tokens, 0)
    return next(token for token in candidates if isinstance(token, int))
