"""Merge rules against sums done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from errata.adapters.merging import MergeRule, agreeing_mean, keep_largest, keep_random, merge, slerp, weighted_mean
from errata.errors import ConfigError

FIRST = torch.tensor([[4.0, -3.0, 0.5, 0.0, 1.0]])
SECOND = torch.tensor([[2.0, 1.0, -2.0, 0.0, 0.0]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def merged(rule: MergeRule, *changes: Tensor, weights: list[float] | None = None, density: float = 1.0) -> Tensor:
    return merge(rule, changes, weights or [1.0] * len(changes), density=density, generator=generator())


@pytest.mark.parametrize(
    ("rule", "density", "expected"),
    [
        # Half of each sum.
        ("linear", 1.0, [3.0, -1.0, -0.75, 0.0, 0.5]),
        # Signs of the sums are + - - + +; the second has no say where it is zero or disagrees.
        ("sign", 1.0, [3.0, -3.0, -2.0, 0.0, 1.0]),
        # 0.4 of five entries keeps two: 4, -3 and 2, -2.
        ("magnitude", 0.4, [3.0, -1.5, -1.0, 0.0, 0.0]),
        ("ties", 0.4, [3.0, -3.0, -2.0, 0.0, 0.0]),
        ("ties", 1.0, [3.0, -3.0, -2.0, 0.0, 1.0]),
        # All entries are kept and none enlarged.
        ("dare", 1.0, [3.0, -1.0, -0.75, 0.0, 0.5]),
        ("dare_ties", 1.0, [3.0, -3.0, -2.0, 0.0, 1.0]),
    ],
)
def test_rules_on_two_changes(rule: MergeRule, density: float, expected: list[float]) -> None:
    assert torch.allclose(merged(rule, FIRST, SECOND, density=density), torch.tensor([expected]))


def test_only_the_proportions_of_weights_matter() -> None:
    for rule in ("linear", "ties", "sign", "magnitude", "slerp"):
        one = merged(rule, FIRST, SECOND, weights=[0.6, 0.4])
        assert torch.allclose(one, merged(rule, FIRST, SECOND, weights=[6.0, 4.0]), atol=1e-6)
    assert torch.allclose(weighted_mean([FIRST, SECOND], [3.0, 1.0])[0, :2], torch.tensor([3.5, -2.0]))
    # 0.25 × 4 − 0.75 × 3 is negative: the heavier one elects the sign.
    heavy = agreeing_mean([torch.tensor([4.0]), torch.tensor([-3.0])], [1.0, 3.0])
    assert heavy.tolist() == [-3.0]


def test_a_sum_of_zero_counts_as_positive() -> None:
    assert agreeing_mean([torch.tensor([2.0]), torch.tensor([-2.0])], [1.0, 1.0]).tolist() == [2.0]


def test_a_single_change_is_returned_as_it_is() -> None:
    for rule in ("ties", "dare", "slerp"):
        assert merged(rule, FIRST, density=0.1) is FIRST


def test_what_fits_the_density_is_not_trimmed() -> None:
    assert keep_largest(SECOND, 0.6) is SECOND
    assert keep_largest(FIRST, 0.2).tolist() == [[4.0, 0.0, 0.0, 0.0, 0.0]]


def test_random_entries_keep_the_mean_and_follow_the_generator() -> None:
    ones = torch.ones(200, 200)
    kept = keep_random(ones, 0.25, generator())
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(kept, keep_random(ones, 0.25, generator()))
    assert not torch.equal(kept, keep_random(ones, 0.25, generator(1)))


def test_the_great_circle() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    root = math.sqrt(0.5)
    assert torch.allclose(slerp(x, y, 0.5), torch.tensor([root, root]))
    assert torch.allclose(slerp(x, y, 1 / 3), torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    assert torch.allclose(merged("slerp", x, y, weights=[2.0, 1.0]), slerp(x, y, 1 / 3))
    # A right angle and lengths that are kept: 3 and 1 at half the way.
    assert torch.allclose(slerp(3 * x, y, 0.5), torch.tensor([3 * root, root]))
    assert torch.allclose(slerp(x, 2 * x, 0.25), 1.25 * x)  # parallel: a straight line
    assert torch.allclose(slerp(x, 0 * x, 0.5), 0.5 * x)  # no direction: a straight line too
    third = merged("slerp", x, y, x)
    assert torch.allclose(third, slerp(slerp(x, y, 0.5), x, 1 / 3))


@pytest.mark.parametrize(
    ("changes", "weights", "density", "message"),
    [
        ([], [], 0.5, "0 changes with 0 weights"),
        ([FIRST], [1.0, 1.0], 0.5, "1 changes with 2 weights"),
        ([FIRST, SECOND], [1.0, 1.0], 0.0, "density must be above 0"),
        ([FIRST, SECOND], [1.0, 1.0], 1.5, "density must be above 0"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    changes: list[Tensor], weights: list[float], density: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        merge("ties", changes, weights, density=density, generator=generator())
