"""Whether one method is really better than another, and whether one gets worse as it goes on. Pure functions.

Methods are compared on the same edits, so tests between them are paired: what one edit does under both of them; many
comparisons are made at once. A long run is compared with itself, as it would be if its parts had come in another order.
Samples that nothing pairs are compared as distributions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from errata.evaluation.metrics import Measure, bootstrap_mean

__all__ = [
    "Difference",
    "Trend",
    "cohen_kappa",
    "compare_methods",
    "holm",
    "kolmogorov_smirnov",
    "mcnemar",
    "sign_flip_test",
    "spearman",
    "spearman_interval",
    "trend",
]

_Z_BOTH, _Z_POWER = 1.96, 0.84  # of a two-sided test at 5 %, and of finding what is there in 80 %
_EXACT = 250_000  # product of two sample sizes up to which all orders are counted


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """p of McNemar's exact test: could as many edits have been won by either method alone if both were alike?

    Edits on which both agree say nothing. Two-sided; 1 where they agree on all.
    """
    pairs = list(zip(first, second, strict=True))
    ours, theirs = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    apart = ours + theirs
    if not apart:
        return 1.0
    tail = sum(math.comb(apart, k) for k in range(min(ours, theirs) + 1)) / 2**apart
    return float(min(1.0, 2 * tail))


def kolmogorov_smirnov(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Distance of two samples and p of the two-sample Kolmogorov–Smirnov test: could both be of one distribution?

    The distance is the largest difference of the two shares of values that are no larger than some value: 0 where both
    samples are alike, 1 where all of one lie below all of the other. p is the share of orders of all values in which
    the distance is as large (exact but for ties, with which it is too high rather than too low); for samples whose
    sizes have a product above 250,000 it is Kolmogorov's limit.

    Raises:
        ValueError: a sample is empty or holds NaN.
    """
    one, other = (np.sort(np.asarray(values, dtype=np.float64)) for values in (first, second))
    n, m = len(one), len(other)
    if not n or not m or np.isnan(one).any() or np.isnan(other).any():
        raise ValueError(f"samples of {n} and {m} values cannot be compared; give numbers, one at least of each")
    both = np.concatenate([one, other])
    below = np.searchsorted(one, both, side="right") * m - np.searchsorted(other, both, side="right") * n
    apart = int(np.abs(below).max())  # the distance times n m, a whole number
    distance = apart / (n * m)
    if n * m > _EXACT:
        scaled = distance * math.sqrt(n * m / (n + m))
        if scaled < 0.2:  # where the series is slow, and 1 to twelve digits
            return distance, 1.0
        terms = ((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
        return distance, min(1.0, max(0.0, 2 * sum(terms)))
    # An order is a path from (0, 0) to (n, m). Counted are those that never come as far from the diagonal.
    paths = [int(j * n < apart) for j in range(m + 1)]
    for j in range(1, m + 1):
        paths[j] *= paths[j - 1]
    for i in range(1, n + 1):
        paths[0] = paths[0] if i * m < apart else 0
        for j in range(1, m + 1):
            paths[j] = paths[j] + paths[j - 1] if abs(i * m - j * n) < apart else 0
    orders = math.comb(n + m, n)
    return distance, (orders - paths[m]) / orders


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Agreement of two raters beyond chance (Cohen 1960), (p_o − p_e) / (1 − p_e): 1 is always, 0 as by chance.

    NaN where nothing was rated, and where chance alone agrees always, since both say the same one thing throughout.
    """
    pairs = list(zip(first, second, strict=True))
    if not pairs:
        return math.nan
    observed = sum(a == b for a, b in pairs) / len(pairs)
    ours, theirs = (sum(pair[rater] for pair in pairs) / len(pairs) for rater in range(2))
    chance = ours * theirs + (1 - ours) * (1 - theirs)
    return math.nan if chance == 1 else (observed - chance) / (1 - chance)


def sign_flip_test(differences: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> float:
    """p of a paired permutation test: how often would differences of random sign have a mean as far from 0?

    All sign patterns are counted where there are at most 2¹² of them; else `resamples` random ones and it.
    """
    values = np.asarray([d for d in differences if d], dtype=np.float64)
    if not len(values):
        return 1.0
    observed = abs(values.sum()) - 1e-12 * np.abs(values).sum()  # equal sums in another order differ in the last digit
    if len(values) <= 12:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(values))))
        return float((np.abs(signs @ values) >= observed).mean())
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, resamples, 500):
        block = min(500, resamples - start)
        signs = rng.integers(0, 2, size=(block, len(values))) * 2.0 - 1.0
        hits += int((np.abs(signs @ values) >= observed).sum())
    return (hits + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p adjusted for as many comparisons (Holm 1979), in the given order: no larger share of false findings overall."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    worst = 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


@dataclass(frozen=True)
class Difference:
    """Two methods on the same edits.

    Attributes:
        difference: mean of the first less mean of the second; low, high: its 95 % bootstrap interval over edits.
        p: of the paired test; adjusted_p: for all comparisons that were made together.
        test: McNemar's exact one where every edit is right or wrong under both methods, else the permutation test.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    adjusted_p: float
    test: Literal["mcnemar", "permutation"]

    def to_record(self) -> dict[str, float | str]:
        return dict(vars(self))


def compare_methods(
    scores: Mapping[str, Sequence[float]], *, against: str | None = None, seed: int = 0
) -> list[Difference]:
    """Every two methods, on values per edit in the same order; p adjusted over all pairs that are compared.

    Args:
        against: compare this method alone with each of the others.

    Raises:
        ValueError: the methods were not asked the same number of edits.
    """
    pairs = list(itertools.combinations(scores, 2))
    if against is not None:
        pairs = [(against, other) for other in scores if other != against]
    measures, tests = [], []
    for first, second in pairs:
        ours, theirs = scores[first], scores[second]
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        measures.append(bootstrap_mean(differences, seed=seed))
        tests.append(_paired_test(ours, theirs, differences, seed))
    adjusted = holm([p for p, _ in tests])
    return [
        Difference(first, second, measure.value, measure.low, measure.high, p, corrected, test)
        for (first, second), measure, (p, test), corrected in zip(pairs, measures, tests, adjusted, strict=True)
    ]


def _paired_test(
    first: Sequence[float], second: Sequence[float], differences: Sequence[float], seed: int
) -> tuple[float, Literal["mcnemar", "permutation"]]:
    if {*first, *second} <= {0.0, 1.0}:
        return mcnemar([bool(a) for a in first], [bool(b) for b in second]), "mcnemar"
    return sign_flip_test(differences, seed=seed), "permutation"


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation, equal values sharing their mean rank; None where one of the two does not vary."""

    def ranks(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
        _, which, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        return (ends - (counts - 1) / 2.0)[which]

    one, other = ranks(first), ranks(second)
    if not len(one) or one.std() == 0 or other.std() == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def spearman_interval(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> Measure | None:
    """Rank correlation with a percentile interval over resampled clusters, None where one of the two does not vary.

    Args:
        clusters: what each pair belongs to; pairs of one cluster (the checkpoints of one run) come or stay together.

    Raises:
        ValueError: not as many pairs as clusters.
    """
    own: dict[str, list[tuple[float, float]]] = {}
    for one, other, cluster in zip(first, second, clusters, strict=True):
        own.setdefault(cluster, []).append((one, other))
    value = spearman(first, second)
    if value is None:
        return None
    groups, rng, found = list(own.values()), np.random.default_rng(seed), []
    for _ in range(resamples):
        drawn = [pair for which in rng.integers(0, len(groups), size=len(groups)) for pair in groups[which]]
        again = spearman([one for one, _ in drawn], [other for _, other in drawn])
        if again is not None:
            found.append(again)
    low, high = np.percentile(found, [2.5, 97.5]) if found and len(groups) > 1 else (math.nan, math.nan)
    return Measure(value, float(low), float(high), len(first))


@dataclass(frozen=True)
class Trend:
    """How a value changes from the beginning of a run to its end, on the line of least squares.

    Attributes:
        change: along that line, from the first place to the last; low, high: its 95 % interval.
        p: could it be as far from 0 if nothing changed (two-sided); p_decline: could it be as low.
        detectable: a change that four of five such runs would have shown to be none of chance.
    """

    change: float
    low: float
    high: float
    p: float
    p_decline: float
    detectable: float


def trend(
    places: Sequence[float], values: Sequence[float], *, blocks: int = 100, resamples: int = 10_000, seed: int = 0
) -> Trend:
    """Whether values rise or fall along a run.

    Values that follow each other may be alike for a while, so they are taken in blocks: p is the share of random orders
    of the blocks whose line is as steep, the interval is over resampled blocks.

    Args:
        places: ascending; values: at each place, in the same order.
        blocks: of consecutive values, as even as can be; no more than there are values.

    Raises:
        ValueError: not as many places as values, or fewer than three, or all at one place.
    """
    if len(places) != len(values) or len(values) < 3 or places[0] == places[-1]:
        raise ValueError(
            f"{len(values)} values at {len(places)} places are no run; give three at least, not at one place"
        )
    cuts = np.array_split(np.arange(len(values)), min(blocks, len(values)))
    x, y = (np.array([np.asarray(of, dtype=np.float64)[cut].mean() for cut in cuts]) for of in (places, values))
    span = float(places[-1]) - float(places[0])

    def changes(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Per row of blocks [rows, blocks], the change of the line; NaN where all blocks are the same one."""
        apart = x - x.mean(axis=1, keepdims=True)
        spread = (apart * apart).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(span * (apart * y).sum(axis=1) / np.where(spread, spread, np.nan))

    change = float(changes(x[None], y[None])[0])
    rng = np.random.default_rng(seed)
    shuffled, drawn = [], []
    for start in range(0, resamples, 1000):
        rows = (min(1000, resamples - start), len(x))
        orders = rng.permuted(np.tile(np.arange(len(x)), (rows[0], 1)), axis=1)
        shuffled.append(changes(np.tile(x, (rows[0], 1)), y[orders]))
        picks = rng.integers(0, len(x), size=rows)
        drawn.append(changes(x[picks], y[picks]))
    by_chance, again = np.concatenate(shuffled), np.concatenate(drawn)
    again = again[np.isfinite(again)]
    slack = 1e-9 * float(np.abs(y).max() or 1)  # equal lines in another order differ in the last digit
    low, high = np.percentile(again, [2.5, 97.5])
    return Trend(
        change=change,
        low=float(low),
        high=float(high),
        p=(int((np.abs(by_chance) >= abs(change) - slack).sum()) + 1) / (resamples + 1),
        p_decline=(int((by_chance <= change + slack).sum()) + 1) / (resamples + 1),
        detectable=float((_Z_BOTH + _Z_POWER) * again.std()),
    )
