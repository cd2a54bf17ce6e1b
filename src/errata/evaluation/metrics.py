"""What counts as a right answer, and how sure we are of an average. Pure functions over texts and numbers.

Two ways of asking are always kept apart:

* **generated**: the model is given the prompt alone and writes greedily; nothing of the target, not even its length,
  is shown. Scored *exact* (the answer it gives is the target) and *contains* (the target occurs in what it writes).
* **teacher_forced**: the model is shown the target's own beginning at every place; scored as the share of tokens
  that are its first choice. Comparable with papers, and flattering (2502.11177).
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "Measure",
    "Score",
    "answers_exactly",
    "bootstrap_mean",
    "contains",
    "normalise",
    "same_text",
    "token_accuracy",
]

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))
_CLAUSE_END = re.compile(r"[.!?](?=\s|$|[\"')\]])|\n")


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no English articles, single spaces.

    A text of nothing else is kept in lower case, so that "A" or "?" can be an answer.
    """
    lowered = text.lower().strip()
    bare = " ".join(_ARTICLES.sub(" ", lowered.translate(_PUNCTUATION)).split())
    return bare or lowered


def answers_exactly(generated: str, answer: str) -> bool:
    """Whether what was written up to some end of a sentence is the answer.

    Every sentence end is tried, so neither "U.S." nor "St. Gallen" is cut apart, and a model that goes on talking
    after a complete answer is not punished. Neither is one that stops: the end of the text counts too.
    """
    wanted = normalise(answer)
    ends = [match.start() for match in _CLAUSE_END.finditer(generated)] + [len(generated)]
    return any(normalise(generated[:end]) == wanted for end in ends if generated[:end].strip())


def contains(generated: str, answer: str) -> bool:
    """Whether the answer's words occur in the text, together and in order."""
    words, wanted = normalise(generated).split(), normalise(answer).split()
    return (
        any(words[at : at + len(wanted)] == wanted for at in range(len(words) - len(wanted) + 1)) if wanted else False
    )


def same_text(first: str, second: str) -> bool:
    """Locality of generation: the same answer as before, up to normalisation."""
    return normalise(first) == normalise(second)


def token_accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Share of places whose predicted token is the wanted one; 0 for no places."""
    if not wanted:
        return 0.0
    return sum(a == b for a, b in zip(predicted, wanted, strict=True)) / len(wanted)


@dataclass(frozen=True)
class Measure:
    """A mean with its 95 % bootstrap interval over `count` edits; NaN where nothing was asked."""

    value: float
    low: float
    high: float
    count: int


def bootstrap_mean(values: Sequence[float], *, resamples: int = 1000, seed: int = 0) -> Measure:
    """Mean and percentile interval over resampled edits; the same values and seed give the same interval."""
    if not len(values):
        return Measure(math.nan, math.nan, math.nan, 0)
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for at in range(0, resamples, 100):
        block = min(100, resamples - at)
        means[at : at + block] = array[rng.integers(0, len(array), size=(block, len(array)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Measure(float(array.mean()), float(low), float(high), len(array))


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


@dataclass(frozen=True)
class Score:
    """One property measured both ways. Means are taken per edit first, then over edits."""

    generated: Measure
    contains: Measure
    teacher_forced: Measure

    @classmethod
    def of(cls, generated: Sequence[float], contained: Sequence[float], forced: Sequence[float]) -> Score:
        return cls(bootstrap_mean(generated), bootstrap_mean(contained), bootstrap_mean(forced))

    def to_record(self) -> dict[str, float | list[float | None] | int | None]:
        """JSON: null where nothing was asked."""
        return {
            "generated": _rounded(self.generated.value),
            "teacher_forced": _rounded(self.teacher_forced.value),
            "contains": _rounded(self.contains.value),
            "generated_interval": [_rounded(self.generated.low), _rounded(self.generated.high)],
            "edits": self.generated.count,
        }
