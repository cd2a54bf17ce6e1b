"""What counts as a right answer, and how sure we are of an average. Pure functions over texts and numbers.

Two ways of asking are always kept apart:

* **generated**: the model is given the prompt alone and writes greedily; nothing of the target, not even its length,
  is shown. Scored *exact* (the answer it gives is the target), *contains* (the target occurs in what it writes) and
  *F1* (how many of its words are the target's, and of the target's words are there).
* **teacher_forced**: the model is shown the target's own beginning at every place; scored as the share of tokens
  that are its first choice. Comparable with papers, and flattering (2502.11177).
"""

from __future__ import annotations

import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "Measure",
    "Score",
    "answers_exactly",
    "best_answer",
    "bootstrap_clusters",
    "bootstrap_mean",
    "contains",
    "finite_or_none",
    "held_until",
    "normalise",
    "same_text",
    "token_accuracy",
    "token_f1",
    "wilson_interval",
]

_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_OPERATORS = frozenset("+-*/<>=%")
_Z = 1.959963984540054  # of 95 %, both sides
_CLAUSE_END = re.compile(r"[.!?](?=\s|$|[\"')\]])|\n")
# One or two letters before a full stop: an initial ("J. K. Rowling") or an abbreviation ("St. Gallen").
_SHORT_WORD = re.compile(r"(?:^|[\W_])([^\W\d_]{1,2})$")


def normalise(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016): lower case, punctuation deleted, no articles, single spaces.

    Three things are kept that SQuAD's script would lose, because they are the answer or part of it: an article's
    letters where no other word follows ("Vitamin A") or a full stop does ("A. A. Milne"); an operator that stands alone
    between words ("a + b"); and a text of nothing but punctuation, as it is.
    """
    kept: list[str] = []
    before_word = False  # from the end: whether a word that is no article follows
    for word in reversed(text.lower().split()):
        bare = word if word in _OPERATORS else word.translate(_PUNCTUATION)
        if bare in _ARTICLES and not word.endswith("."):
            if before_word:
                continue
        elif bare:
            before_word = bare not in _OPERATORS
        if bare:
            kept.append(bare)
    while kept and kept[-1] in _OPERATORS:  # the dash of a list stands between nothing
        kept.pop()
    return " ".join(reversed(kept)) or text.lower().strip()


def _ends(generated: str, answer: str) -> Iterator[int]:
    """Places where what was written may end: sentence ends, line breaks, and the end of the text.

    A full stop behind one or two letters may belong to an initial or an abbreviation. It ends nothing unless the answer
    ends with a full stop too, or the word is "no".
    """
    for match in _CLAUSE_END.finditer(generated):
        short = _SHORT_WORD.search(generated, 0, match.start()) if match.group() == "." else None
        if short is None or short.group(1).lower() == "no" or answer.rstrip().endswith("."):
            yield match.start()
    yield len(generated)


def answers_exactly(generated: str, answer: str) -> bool:
    """Whether what was written up to some end of a sentence is the answer.

    Every sentence end is tried, so a model that goes on talking after a complete answer is not punished. Neither is one
    that stops: the end of the text counts too. Initials and abbreviations end no sentence: "St" is not the answer of a
    model that says "St. Gallen".
    """
    wanted = normalise(answer)
    return any(normalise(generated[:end]) == wanted for end in _ends(generated, answer) if generated[:end].strip())


def contains(generated: str, answer: str) -> bool:
    """Whether the answer's words occur in the text, together and in order."""
    words, wanted = normalise(generated).split(), normalise(answer).split()
    return (
        any(words[at : at + len(wanted)] == wanted for at in range(len(words) - len(wanted) + 1)) if wanted else False
    )


def token_f1(generated: str, answer: str) -> float:
    """SQuAD's F1 over normalised words, each as often as it occurs; 1 for two texts without words, 0 for one."""
    said, wanted = Counter(normalise(generated).split()), Counter(normalise(answer).split())
    if not said or not wanted:
        return float(said == wanted)
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total())


def best_answer(measure: Callable[[str, str], float], generated: str, answers: Sequence[str]) -> float:
    """The highest value of a measure over several right answers (aliases); 0 for no answers."""
    return max((float(measure(generated, answer)) for answer in answers), default=0.0)


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


def bootstrap_clusters(
    values: Sequence[float], clusters: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> Measure:
    """Mean of all values, with an interval over resampled clusters, for values that stand or fall together.

    Each resample draws as many clusters as there are, and takes the mean of all values in them. The interval is NaN
    where all values are of one cluster: nothing is then known of how clusters differ.

    Args:
        clusters: what each value belongs to.

    Raises:
        ValueError: not as many clusters as values.
    """
    own: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        own.setdefault(cluster, []).append(value)
    if not own:
        return Measure(math.nan, math.nan, math.nan, 0)
    mean = float(np.mean(np.asarray(values, dtype=np.float64)))
    if len(own) == 1:
        return Measure(mean, math.nan, math.nan, len(values))
    sums, counts = np.array([sum(one) for one in own.values()]), np.array([len(one) for one in own.values()])
    drawn = np.random.default_rng(seed).integers(0, len(own), size=(resamples, len(own)))
    low, high = np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [2.5, 97.5])
    return Measure(mean, float(low), float(high), len(values))


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): right at the edges too, where 100 of 100 is not "1.0 ± 0".

    Returns:
        (0, 1) where nothing was asked.

    Raises:
        ValueError: more successes than trials, or fewer than none.
    """
    if not 0 <= successes <= count:
        raise ValueError(f"{successes} successes of {count} trials")
    if not count:
        return 0.0, 1.0
    share, square = successes / count, _Z * _Z / count
    middle = share + square / 2
    spread = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, (middle - spread) / (1 + square)), min(1.0, (middle + spread) / (1 + square))


def finite_or_none(value: float | None) -> float | None:
    """The number as JSON can hold it: None for NaN and infinity, such as the perplexity of a collapsed model."""
    return value if value is not None and math.isfinite(value) else None


def _rounded(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


@dataclass(frozen=True)
class Score:
    """One property measured in every way. Means are taken per edit first, then over edits.

    Attributes:
        f1: of the words that were generated.
        wilson: 95 % interval of `generated` as a share of edits, where each of them was right or wrong: always so for
            reliability, else where every edit has one prompt of that property; None for means of several prompts.
    """

    generated: Measure
    contains: Measure
    teacher_forced: Measure
    f1: Measure
    wilson: tuple[float, float] | None

    @classmethod
    def of(
        cls, generated: Sequence[float], contained: Sequence[float], forced: Sequence[float], f1: Sequence[float]
    ) -> Score:
        """From one value per edit in each way."""
        is_share = bool(generated) and set(generated) <= {0.0, 1.0}
        wilson = wilson_interval(sum(generated), len(generated)) if is_share else None
        means = [bootstrap_mean(values) for values in (generated, contained, forced, f1)]
        return cls(means[0], means[1], means[2], means[3], wilson)

    def to_record(self) -> dict[str, float | list[float | None] | int | None]:
        """JSON: null where nothing was asked."""
        return {
            "generated": _rounded(self.generated.value),
            "teacher_forced": _rounded(self.teacher_forced.value),
            "contains": _rounded(self.contains.value),
            "f1": _rounded(self.f1.value),
            "generated_interval": [_rounded(self.generated.low), _rounded(self.generated.high)],
            "wilson_interval": None if self.wilson is None else [_rounded(edge) for edge in self.wilson],
            "edits": self.generated.count,
        }


def held_until(points: Sequence[tuple[int, float]], level: float) -> tuple[float, bool]:
    """Up to how many edits a share stays at a level or above it, and whether it fell below it at all.

    Args:
        points: (edits, share) at each checkpoint, ascending; between two of them the share is taken to be on a line.
    """
    if not points or points[0][1] < level:
        return 0.0, True
    for (count, before), (later, after) in itertools.pairwise(points):
        if after < level:
            return round(count + (before - level) / (before - after) * (later - count)), True
    return points[-1][0], False
