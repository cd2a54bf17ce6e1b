"""Teacher-forced scoring: what a model predicts at the places of given answers, in batches.

Only those places meet the vocabulary matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from errata.errors import NumericsError
from errata.model.sequences import AdapterNames
from errata.model.tokens import Passage

if TYPE_CHECKING:
    from errata.model.editable import EditableModel

__all__ = ["READ_TOKENS", "ForcedAnswer", "forced_answers", "length_batches", "perplexity"]

READ_TOKENS = 8192  # padded tokens that are read side by side where nothing is trained


@dataclass(frozen=True)
class ForcedAnswer:
    """What the model says at an answer's places when it is shown the answer's own beginning.

    Attributes:
        predicted: the most likely token at each place; log_probs: of the answer's own tokens, in nats.
    """

    predicted: tuple[int, ...]
    log_probs: tuple[float, ...]

    @property
    def probability(self) -> float:
        """Of the whole answer given the prompt."""
        return math.exp(sum(self.log_probs))


def length_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices grouped into batches of like length, each of at most `tokens` padded tokens (but at least one row)."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batches: list[list[int]] = []
    for index in order:
        if not batches or (len(batches[-1]) + 1) * lengths[index] > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


@torch.no_grad()
def forced_answers(
    model: EditableModel,
    passages: Sequence[Passage],
    *,
    adapters: AdapterNames | None = None,
    batch_tokens: int = 8192,
) -> list[ForcedAnswer]:
    """Score every passage's answer; the router of an attached adapter sees the prompt alone.

    Args:
        adapters: which adapters act on which passage, see `EditableModel.selecting`.
    """
    head = model.head
    results: list[ForcedAnswer] = [ForcedAnswer((), ())] * len(passages)
    for indices in length_batches([len(p.ids) for p in passages], batch_tokens):
        batch = model.batch([passages[i] for i in indices], side="right")
        rows, columns, tokens = batch.answer_places()
        if not len(rows):
            continue
        with model.selecting(adapters), model.sequences.narrowed(indices, len(passages)):
            states = model.answer_states(batch)
        logits = head(states[rows.to(states.device), columns.to(states.device)]).float()
        chosen = logits.argmax(-1).tolist()
        scores = logits.log_softmax(-1).gather(1, tokens.to(logits.device).unsqueeze(1)).squeeze(1).tolist()
        by_row: dict[int, tuple[list[int], list[float]]] = {}
        for row, token, score in zip(rows.tolist(), chosen, scores, strict=True):
            predicted, log_probs = by_row.setdefault(row, ([], []))
            predicted.append(token)
            log_probs.append(score)
        for row, (predicted, log_probs) in by_row.items():
            results[indices[row]] = ForcedAnswer(tuple(predicted), tuple(log_probs))
    return results


@torch.no_grad()
def perplexity(model: EditableModel, texts: Iterable[str], *, max_length: int = 512) -> float:
    """exp of the mean negative log-likelihood per token; every text is read by itself, from its first token on.

    A routed adapter takes the whole text as prompt, as it would when text is only being read. An encoder-decoder model
    is given the first half of each text and scored on the second (prefix language modelling, Raffel et al. 2020).

    Raises:
        NumericsError: there is no token to score.
    """
    head = model.head
    total, count = 0.0, 0
    read = [model.passage(text).ids[:max_length] for text in texts]
    shown = [len(ids) // 2 if model.is_encoder_decoder else len(ids) for ids in read]
    passages = [Passage(ids[:n], ids[n:]) for ids, n in zip(read, shown, strict=True)]
    scored = [index for index, ids in enumerate(read) if len(ids) > 1]
    for places in length_batches([len(read[index]) for index in scored], 4096):
        indices = [scored[place] for place in places]
        batch = model.batch([passages[i] for i in indices], side="right")
        rows, columns, tokens = batch.text_places()
        with model.sequences.narrowed(indices, len(passages)):
            states = model.answer_states(batch)
        logits = head(states[rows.to(states.device), columns.to(states.device)]).float()
        losses = F.cross_entropy(logits, tokens.to(logits.device), reduction="sum")
        total, count = total + float(losses), count + len(tokens)
    if not count:
        raise NumericsError("perplexity needs text: no token was left to score")
    return math.exp(total / count) if total / count < 700 else math.inf
