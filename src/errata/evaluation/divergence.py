"""How far an edited model's next-token distributions have moved from the unedited one's: KL(base ‖ edited), in nats.

Finer than agreement of answers: it sees a model that still says the same but is less sure of it. It has no upper bound,
so a few prompts can carry the mean away; look at the median too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.edit import Edit
from errata.errors import NumericsError
from errata.evaluation.metrics import Measure, bootstrap_mean, finite_or_none
from errata.model import EditableModel
from errata.model.scoring import length_batches
from errata.model.tokens import Passage
from errata.progress import NO_PROGRESS, Progress

__all__ = ["LocalityDivergence", "divergence_at_prompts", "divergence_on_texts", "kl_divergence", "locality_divergence"]

_LOGITS_AT_ONCE = 1 << 22  # numbers of one [places, vocabulary] block


def kl_divergence(base: Tensor, edited: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q) of distributions given as logits, [n, vocabulary] each; [n], in nats, ≥ 0.

    A token that p gives no probability adds nothing, whatever q gives it.
    """
    p, q = base.float().log_softmax(-1), edited.float().log_softmax(-1)
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1).clamp(min=0.0)


@torch.no_grad()
def _divergences(
    model: EditableModel, passages: Sequence[Passage], *, whole: bool, batch_tokens: int, progress: Progress
) -> Iterator[tuple[int, list[float]]]:
    """Per passage its number and a divergence for each of its places: behind the prompt, or, with `whole`, at every
    place of the text that is followed by a token.

    Both models read one batch after the other, and a block of logits is dropped before the next is made: memory does
    not grow with the number of prompts.
    """
    head = model.head
    for indices in length_batches([len(passage.ids) for passage in passages], batch_tokens):
        batch = model.batch([passages[i] for i in indices], side="right")
        if whole:
            rows, columns, _ = batch.text_places()
        else:
            rows, columns = torch.arange(len(indices), device=batch.ids.device), batch.next_columns()
        with model.sequences.narrowed(indices, len(passages)):
            edited = model.answer_states(batch)
        with model.bare():
            base = model.answer_states(batch)
        found: dict[int, list[float]] = {index: [] for index in indices}
        rows, columns = rows.to(base.device), columns.to(base.device)
        size = max(1, _LOGITS_AT_ONCE // int(model.model.config.get_text_config().vocab_size))
        for start in range(0, len(rows), size):
            place = rows[start : start + size], columns[start : start + size]
            moved = kl_divergence(head(base[place]), head(edited[place])).tolist()
            for row, value in zip(place[0].tolist(), moved, strict=True):
                found[indices[row]].append(value)
        progress.advance(len(indices))
        yield from found.items()


def divergence_at_prompts(
    model: EditableModel, prompts: Sequence[str], *, batch_tokens: int = 4096, progress: Progress = NO_PROGRESS
) -> list[float]:
    """KL(base ‖ as the model is now) of the first token behind each prompt, in nats, in the order of the prompts.

    An attached adapter sees the prompt alone and decides for each as it does when an answer is generated.
    """
    passages = [model.passage(prompt) for prompt in prompts]
    progress.start("comparing next-token distributions", len(passages))
    found = dict(_divergences(model, passages, whole=False, batch_tokens=batch_tokens, progress=progress))
    return [found[index][0] for index in range(len(passages))]


def divergence_on_texts(
    model: EditableModel,
    texts: Sequence[str],
    *,
    max_length: int = 512,
    batch_tokens: int = 4096,
    progress: Progress = NO_PROGRESS,
) -> float:
    """Mean over all places of texts of KL(base ‖ as the model is now), in nats per token.

    Read as for perplexity: every text by itself, a routed adapter takes the whole of it as prompt, and an
    encoder-decoder model reads the first half and is compared on the second.

    Args:
        max_length: tokens of a text that are read.

    Raises:
        NumericsError: there is no place to compare.
    """
    read = [model.passage(text).ids[:max_length] for text in texts]
    shown = [len(ids) // 2 if model.is_encoder_decoder else len(ids) for ids in read]
    passages = [Passage(ids[:n], ids[n:]) for ids, n in zip(read, shown, strict=True) if len(ids) > 1]
    progress.start("comparing distributions on held-out text", len(passages))
    total, count = 0.0, 0
    for _, values in _divergences(model, passages, whole=True, batch_tokens=batch_tokens, progress=progress):
        total, count = total + sum(values), count + len(values)
    if not count:
        raise NumericsError("divergence on text needs text: no place was left to compare")
    return total / count


@dataclass(frozen=True)
class LocalityDivergence:
    """KL(base ‖ edited) at locality prompts, in nats.

    Attributes:
        mean: per edit first, then over edits; median: over edits; by_kind: the mean per kind of locality prompt.
        text: per token of held-out text; None where no text was given.
    """

    mean: Measure
    median: float | None
    by_kind: dict[str, Measure]
    text: float | None

    def to_record(self) -> dict[str, Any]:
        """JSON, null where nothing was asked and where a collapsed model gives no finite number."""
        return {
            "locality": finite_or_none(self.mean.value),
            "locality_interval": [finite_or_none(self.mean.low), finite_or_none(self.mean.high)],
            "locality_median": finite_or_none(self.median),
            "locality_by_kind": {kind: finite_or_none(measure.value) for kind, measure in self.by_kind.items()},
            "text": finite_or_none(self.text),
            "edits": self.mean.count,
        }


def locality_divergence(
    model: EditableModel, edits: Sequence[Edit], texts: Sequence[str] = (), *, progress: Progress = NO_PROGRESS
) -> LocalityDivergence:
    """Compare the model as it is now with its base at the edits' locality prompts, and on held-out text."""
    prompts = sorted({probe.prompt for edit in edits for probe in edit.locality})
    moved = dict(zip(prompts, divergence_at_prompts(model, prompts, progress=progress), strict=True))
    per_edit = [_mean([moved[probe.prompt] for probe in edit.locality]) for edit in edits if edit.locality]
    by_kind: dict[str, list[float]] = {}
    for edit in edits:
        own: dict[str, list[float]] = {}
        for probe in edit.locality:
            if probe.kind:
                own.setdefault(probe.kind, []).append(moved[probe.prompt])
        for kind, values in own.items():
            by_kind.setdefault(kind, []).append(_mean(values))
    return LocalityDivergence(
        bootstrap_mean(per_edit),
        statistics.median(per_edit) if per_edit else None,
        {kind: bootstrap_mean(values) for kind, values in sorted(by_kind.items())},
        divergence_on_texts(model, texts, progress=progress) if texts else None,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
