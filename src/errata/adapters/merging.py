"""Merging several changes of one weight into one: the rules that WISE compares (NeurIPS 2024, table on merging).

A rule is what is done to each change before (nothing, only its largest entries kept, or a random share kept and
enlarged) and how entries are then combined (a weighted mean of all, or of those that agree on a sign). Spherical
interpolation stands apart.

    linear      all entries,            mean of all
    sign        all entries,            mean of those that agree
    magnitude   largest entries,        mean of all
    ties        largest entries,        mean of those that agree      (TIES, NeurIPS 2023)
    dare        random entries, scaled, mean of all                   (DARE, ICML 2024)
    dare_ties   random entries, scaled, mean of those that agree
    slerp       along the great circle between the two

Pure functions of tensors. Knows nothing of models or edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from errata.errors import ConfigError

__all__ = ["MergeRule", "agreeing_mean", "keep_largest", "keep_random", "merge", "slerp", "weighted_mean"]

MergeRule = Literal["ties", "sign", "linear", "slerp", "dare", "dare_ties", "magnitude"]


def keep_largest(change: Tensor, density: float) -> Tensor:
    """The share `density` of all entries that is largest in size; the others become zero."""
    kept = int(density * change.numel())
    if int(change.count_nonzero()) <= kept:
        return change
    flat = change.flatten()
    places = flat.abs().topk(kept).indices
    return torch.zeros_like(flat).scatter_(0, places, flat[places]).view_as(change)


def keep_random(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry with probability `density`, divided by it, so that the mean stays; the others become zero (DARE)."""
    kept = torch.rand(change.shape, generator=generator) < density
    return torch.where(kept.to(change.device), change / density, 0.0)


def weighted_mean(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of all changes, zeros included."""
    total = sum(weights)
    return torch.stack([weight / total * change for change, weight in zip(changes, weights, strict=True)]).sum(0)


def agreeing_mean(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Per entry the mean of the changes whose sign is that of the weighted sum; one that is zero has no say.

    A sum of exactly zero counts as positive.
    """
    summed, weight_there = torch.zeros_like(changes[0]), torch.zeros_like(changes[0])
    elected = torch.where(weighted_mean(changes, weights) >= 0, 1.0, -1.0)
    for change, weight in zip(changes, weights, strict=True):
        agrees = change.sign() == elected
        summed += weight * change * agrees
        weight_there += weight * agrees
    return torch.where(weight_there > 0, summed / weight_there.clamp(min=torch.finfo(summed.dtype).tiny), 0.0)


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """The point at `share` of the way from the first to the second on the great circle; straight if they are parallel.

    The changes are taken as vectors of all their entries, and their lengths are kept in the sum.
    """
    lengths = first.norm() * second.norm()
    cosine = float((first * second).sum() / lengths) if float(lengths) else 1.0
    if abs(cosine) > 0.9995:
        return (1 - share) * first + share * second
    angle = torch.tensor(cosine, dtype=torch.float64).acos()
    parts = ((1 - share) * angle).sin() / angle.sin(), (share * angle).sin() / angle.sin()
    return float(parts[0]) * first + float(parts[1]) * second


def merge(
    rule: MergeRule,
    changes: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    generator: torch.Generator,
) -> Tensor:
    """One change from several of the same shape; a single one is returned as it is.

    Args:
        weights: one per change, only their proportions matter.
        density: share of entries that is kept, by rules that keep a share.
        generator: of the choice, by rules that choose at random.

    Raises:
        ConfigError: nothing to merge, or a density that keeps nothing or more than everything.
    """
    if not changes or len(changes) != len(weights):
        raise ConfigError(f"{len(changes)} changes with {len(weights)} weights cannot be merged; give one weight each")
    if not 0 < density <= 1:
        raise ConfigError(f"density must be above 0 and at most 1, not {density}")
    if len(changes) == 1:
        return changes[0]
    if rule == "slerp":
        merged, weight = changes[0], weights[0]
        for change, its_weight in zip(changes[1:], weights[1:], strict=True):
            weight += its_weight
            merged = slerp(merged, change, its_weight / weight)
        return merged
    if rule in ("ties", "magnitude"):
        changes = [keep_largest(change, density) for change in changes]
    elif rule in ("dare", "dare_ties"):
        changes = [keep_random(change, density, generator) for change in changes]
    combine = agreeing_mean if rule in ("ties", "sign", "dare_ties") else weighted_mean
    return combine(changes, weights)
