"""Which of two answers a model finds likelier: CounterFact's scores and EVOKE's. Pure functions over log-probabilities.

Log-probabilities are means per token, as in the published code, so answers of different length can be compared. A
ranking is weaker than an answer: a model that says neither still prefers one. So these stand beside generated answers,
never in their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from errata.evaluation.metrics import finite_or_none

__all__ = ["CounterFactScores", "OverfittingScores", "Preference", "harmonic_mean"]


@dataclass(frozen=True)
class Preference:
    """How likely the new and the old object are behind one prompt.

    Attributes:
        new, true: mean log-probability per token, in nats, of the edit's target and of the old answer.
    """

    new: float
    true: float

    @property
    def of_new(self) -> float:
        """1 where the new object is strictly likelier."""
        return float(self.new > self.true)

    @property
    def of_true(self) -> float:
        return float(self.true > self.new)

    @property
    def magnitude(self) -> float:
        """Difference of probabilities, new less true."""
        return math.exp(self.new) - math.exp(self.true)


def harmonic_mean(values: Sequence[float]) -> float:
    """0 where one of them is."""
    return len(values) / sum(1 / value for value in values) if values and min(values) > 0 else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class CounterFactScores:
    """ROME's scores over edits (2202.05262, section 3.3), each a mean per edit first.

    Attributes:
        efficacy, paraphrase: share of prompts, of other wordings, behind which the new object is likelier (ES, PS).
        neighbourhood: share of neighbours' prompts behind which the old object still is (NS).
        efficacy_magnitude, paraphrase_magnitude, neighbourhood_magnitude: mean difference of the probabilities, in the
            direction that is wanted (EM, PM, NM).
    """

    efficacy: float
    paraphrase: float
    neighbourhood: float
    efficacy_magnitude: float
    paraphrase_magnitude: float
    neighbourhood_magnitude: float

    @property
    def score(self) -> float:
        """Harmonic mean of the three shares (S); NaN where one of them was not asked."""
        shares = (self.efficacy, self.paraphrase, self.neighbourhood)
        return math.nan if any(map(math.isnan, shares)) else harmonic_mean(shares)

    def to_record(self) -> dict[str, float | None]:
        """JSON, null for what was not asked."""
        return {name: finite_or_none(value) for name, value in (*vars(self).items(), ("score", self.score))}

    @classmethod
    def of(
        cls,
        prompts: Sequence[Preference],
        paraphrases: Sequence[Sequence[Preference]],
        neighbours: Sequence[Sequence[Preference]],
    ) -> CounterFactScores:
        """One entry per edit; an edit that was not asked something counts in the rest alone."""
        other = [own for own in paraphrases if own]
        beside = [own for own in neighbours if own]
        return cls(
            _mean([p.of_new for p in prompts]),
            _mean([_mean([p.of_new for p in own]) for own in other]),
            _mean([_mean([p.of_true for p in own]) for own in beside]),
            _mean([p.magnitude for p in prompts]),
            _mean([_mean([p.magnitude for p in own]) for own in other]),
            _mean([_mean([-p.magnitude for p in own]) for own in beside]),
        )


@dataclass(frozen=True)
class OverfittingScores:
    """EVOKE's scores (2410.07819) over prompts whose right answer is not the edit's target.

    Attributes:
        correct: mean probability of the right answer (CAP).
        direct: mean probability of the edit's target, said where it does not belong (DP).
        overfitting: share of prompts with the right answer likelier than the target (EOS): 1 is no overfitting.
        modified: share with the right answer likelier than the object from before the edit (AMS); NaN if not asked.
    """

    correct: float
    direct: float
    overfitting: float
    modified: float

    def to_record(self) -> dict[str, float | None]:
        """JSON, null for what was not asked."""
        return {name: finite_or_none(value) for name, value in vars(self).items()}

    @classmethod
    def of(
        cls, correct: Sequence[float], target: Sequence[float], original: Sequence[float] | None = None
    ) -> OverfittingScores:
        """Probabilities per prompt: of the right answer, of the edit's target, of the old object.

        Raises:
            ValueError: they are not of the same prompts.
        """
        beats = [float(a > b) for a, b in zip(correct, target, strict=True)]
        changed = [] if original is None else [float(a > b) for a, b in zip(correct, original, strict=True)]
        return cls(_mean(correct), _mean(target), _mean(beats), _mean(changed))
