"""Greedy generation in batches, and seeded sampling with a generator of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from errata.model.scoring import length_batches

if TYPE_CHECKING:
    from errata.model.editable import EditableModel

__all__ = ["greedy", "sample", "stop_tokens"]


def stop_tokens(model: EditableModel) -> tuple[int, ...]:
    """Ids at which an answer ends: the model's end tokens, and every token that contains a line break."""
    tokenizer = model.tokenizer
    configured = getattr(model.model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    ends = set(configured if isinstance(configured, list) else [configured])
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    ends |= {i for i, piece in enumerate(pieces) if "\n" in piece}
    return tuple(sorted(i for i in ends if i is not None))


@torch.no_grad()
def greedy(
    model: EditableModel, prompts: Sequence[str], *, max_new_tokens: int = 20, batch_tokens: int = 8192
) -> list[str]:
    """Greedy continuations of prompts, in their order; see `EditableModel.generate`."""
    passages = [model.passage(prompt) for prompt in prompts]
    stops = model.stop_tokens
    texts = [""] * len(prompts)
    for indices in length_batches([len(p.ids) + max_new_tokens for p in passages], batch_tokens):
        batch = model.batch([passages[i] for i in indices], side="left")
        output = model.model.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=list(stops),
            pad_token_id=model.tokenizer.pad_token_id,
        )
        for index, row in zip(indices, output[:, batch.ids.shape[1] :].tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in stops), len(row))
            texts[index] = model.tokenizer.decode(row[:end], skip_special_tokens=True)
    return texts


@torch.no_grad()
def sample(model: EditableModel, prompt: str, *, tokens: int, top_k: int, generator: torch.Generator) -> str:
    """A sampled continuation of exactly `tokens` tokens, drawn with the generator that is passed.

    The end token and line breaks are never drawn: the text is to be put in front of another.
    """
    forbidden = torch.tensor(model.stop_tokens, device=model.device)
    ids = list(model.passage(prompt).ids)
    if not ids:  # no beginning token and nothing to begin with: text starts where the last one ended
        ids = [model.stop_tokens[0]]
    first = len(ids)
    cache = None
    step = torch.tensor([ids], device=model.device)
    for _ in range(tokens):
        mask = torch.ones(1, len(ids), dtype=torch.long, device=model.device)
        output = model.model(input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[0, -1].float()
        logits[forbidden] = float("-inf")
        values, candidates = logits.topk(min(top_k, logits.numel()))
        drawn = torch.multinomial(values.softmax(-1).cpu(), 1, generator=generator)
        ids.append(int(candidates[int(drawn)]))
        step = torch.tensor([[ids[-1]]], device=model.device)
    return str(model.tokenizer.decode(ids[first:], skip_special_tokens=True))
