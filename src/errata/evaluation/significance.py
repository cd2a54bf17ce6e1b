"""Whether one method is really better than another: tests on pairs, many comparisons at once.

Methods are compared on the same edits, so every test here is paired: what one edit does under both of them. Pure
functions over numbers.
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
    "cohen_kappa",
    "compare_methods",
    "holm",
    "mcnemar",
    "sign_flip_test",
    "spearman",
    "spearman_interval",
]


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
