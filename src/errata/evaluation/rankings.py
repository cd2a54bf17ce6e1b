"""Asks a model which of several answers it finds likelier, for the edits of a set: CounterFact's scores and EVOKE's.

See `errata.evaluation.preference` for what is made of it, and why it never stands alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from errata.edit import Edit, Probe
from errata.errors import ConfigError
from errata.evaluation.metrics import same_text
from errata.evaluation.preference import CounterFactScores, OverfittingScores, Preference
from errata.model import EditableModel
from errata.model.scoring import forced_answers
from errata.progress import NO_PROGRESS, Progress

__all__ = ["Rankings", "rank_answers"]


@dataclass(frozen=True)
class Rankings:
    """What a model finds likelier.

    Attributes:
        counterfact: the new answer against the old one.
        overfitting: per kind of probe, over probes whose right answer is not the edit's target.
        edits: how many edits named their old answer, and so were ranked.
    """

    counterfact: CounterFactScores
    overfitting: dict[str, OverfittingScores]
    edits: int

    def to_record(self) -> dict[str, Any]:
        """JSON, null for what was not asked."""
        return {
            **self.counterfact.to_record(),
            "overfitting": {kind: scores.to_record() for kind, scores in self.overfitting.items()},
            "edits": self.edits,
        }


@dataclass
class _Likely:
    """Mean log-probability per token of answers behind prompts, asked together."""

    model: EditableModel
    asked: dict[tuple[str, str], float] = field(default_factory=dict)

    def ask(self, pairs: Sequence[tuple[str, str]], batch_tokens: int, progress: Progress) -> None:
        progress.start("ranking answers", len(pairs))
        for start in range(0, len(pairs), 2048):
            part = pairs[start : start + 2048]
            found = forced_answers(self.model, [self.model.passage(*pair) for pair in part], batch_tokens=batch_tokens)
            for pair, answer in zip(part, found, strict=True):
                self.asked[pair] = sum(answer.log_probs) / len(answer.log_probs)
            progress.advance(len(part))

    def preference(self, prompt: str, new: str, true: str) -> Preference:
        return Preference(self.asked[prompt, new], self.asked[prompt, true])

    def probability(self, prompt: str, answer: str) -> float:
        return math.exp(self.asked[prompt, answer])


def rank_answers(
    model: EditableModel, edits: Sequence[Edit], *, batch_tokens: int = 4096, progress: Progress = NO_PROGRESS
) -> Rankings:
    """The new answer against the old one, behind the prompt, its other wordings, and its neighbours' prompts; and the
    right answer of every other probe against both.

    Neighbours are locality prompts about the same relation that come with an answer; behind them, that one is the old
    answer. Edits whose old answer is not known are left out.

    Raises:
        ConfigError: no edit names its old answer.
    """
    known = [edit for edit in edits if edit.ground_truth]
    if not known:
        raise ConfigError("rankings compare the new answer with the old one: give edits with a ground_truth")
    likely = _Likely(model)
    likely.ask(sorted({pair for edit in known for pair in _pairs(edit)}), batch_tokens, progress)
    by_kind: dict[str, list[tuple[float, float, float]]] = {}
    for edit in known:
        for probe in _others(edit):
            answers = (probe.answer or "", edit.target, edit.ground_truth or "")
            row = [likely.probability(probe.prompt, answer) for answer in answers]
            by_kind.setdefault(probe.kind or "other", []).append((row[0], row[1], row[2]))
    return Rankings(
        CounterFactScores.of(
            [likely.preference(edit.prompt, edit.target, edit.ground_truth or "") for edit in known],
            [[likely.preference(t, edit.target, edit.ground_truth or "") for t in edit.rephrases] for edit in known],
            [[likely.preference(p.prompt, edit.target, p.answer or "") for p in _beside(edit)] for edit in known],
        ),
        {kind: OverfittingScores.of(*zip(*rows, strict=True)) for kind, rows in sorted(by_kind.items())},
        len(known),
    )


def _beside(edit: Edit) -> list[Probe]:
    """Neighbours: the same relation of another subject, with an answer."""
    return [probe for probe in edit.locality if probe.kind == "same_relation" and probe.answer]


def _others(edit: Edit) -> list[Probe]:
    """Probes with an answer of their own, which is not the target: where a model that overfits says the target."""
    probes = (*edit.locality, *edit.portability)
    return [probe for probe in probes if probe.answer and not same_text(probe.answer, edit.target)]


def _pairs(edit: Edit) -> Iterator[tuple[str, str]]:
    """Every prompt with every answer that is ranked behind it."""
    old = edit.ground_truth or ""
    for prompt in (edit.prompt, *edit.rephrases):
        yield from ((prompt, edit.target), (prompt, old))
    for probe in _beside(edit):
        yield from ((probe.prompt, edit.target), (probe.prompt, probe.answer or ""))
    for probe in _others(edit):
        yield from ((probe.prompt, probe.answer or ""), (probe.prompt, edit.target), (probe.prompt, old))
