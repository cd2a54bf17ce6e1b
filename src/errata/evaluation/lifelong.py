"""What a long sequence of edits did, from successes at checkpoints: forgetting, retention, drift, collapse. Pure.

Formulas: `acc_t(i)` is the success of edit i after t edits. Immediate success I = mean acc_i(i), final retention
R = mean acc_M(i), forgetting F = mean over i of (max over t of acc_t(i), less acc_M(i)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = ["capability_drop", "collapse_point", "forgetting", "locality_drift", "retention_by_age"]


def forgetting(history: Sequence[Sequence[float | None]]) -> float:
    """F, from successes [checkpoints][edits]; None where an edit was not yet made.

    Raises:
        ValueError: an edit was not asked at the last checkpoint, or there is none.
    """
    if not history or not history[-1] or any(now is None for now in history[-1]):
        raise ValueError("every edit is asked at the last checkpoint")
    lost = 0.0
    for index, now in enumerate(history[-1]):
        best = max(value for row in history if index < len(row) and (value := row[index]) is not None)
        lost += best - (now or 0.0)
    return lost / len(history[-1])


def retention_by_age(success: Sequence[float]) -> dict[int, float]:
    """Success of edits grouped by age, the newest first: ages 0, 1, 2-3, 4-7, ... keyed by the youngest of a group."""
    newest_first = list(reversed(success))
    groups: dict[int, float] = {}
    start = 0
    while start < len(newest_first):
        stop = max(start + 1, 2 * start)
        group = newest_first[start:stop]
        groups[start] = sum(group) / len(group)
        start = stop
    return groups


def locality_drift(points: Sequence[tuple[int, float]]) -> float:
    """Locality lost per hundred edits: slope of the least-squares line through (edits, locality), sign turned.

    0 for fewer than two different numbers of edits.
    """
    if len({edits for edits, _ in points}) < 2:
        return 0.0
    middle = sum(edits for edits, _ in points) / len(points)
    level = sum(share for _, share in points) / len(points)
    square = sum((edits - middle) ** 2 for edits, _ in points)
    return -100 * sum((edits - middle) * (share - level) for edits, share in points) / square


def capability_drop(before: float, now: float) -> float:
    """Share of a capability that is lost, (before − now) / before; negative where it grew.

    Raises:
        ValueError: there was nothing to lose.
    """
    if before <= 0:
        raise ValueError(f"a capability of {before} cannot drop")
    return (before - now) / before


def collapse_point(
    perplexity: Mapping[int, float], drops: Mapping[int, Sequence[float]] | None = None, *, base: float
) -> int | None:
    """The first number of edits with a perplexity above ten times the base's, or a mean capability drop above one half.

    Args:
        perplexity: by number of edits; what is not finite counts as collapsed, except NaN, which was not asked.
        drops: drops of every capability, by number of edits.
        base: the unedited model's perplexity.
    """
    fallen = {edits for edits, value in perplexity.items() if not math.isnan(value) and not value <= 10 * base}
    fallen |= {edits for edits, own in (drops or {}).items() if own and sum(own) / len(own) > 0.5}
    return min(fallen, default=None)
