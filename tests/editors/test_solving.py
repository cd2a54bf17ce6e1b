"""The solve behind ROME, EMMET, MEMIT and AlphaEdit, against what the papers write down, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from errata.editors.solving import Metric, PastKeys, Solution, solve
from errata.errors import ArtifactError, NumericsError
from errata.model.statistics import KeyStatistics

OUTPUTS, WIDTH, EDITS = 7, 40, 5
SPREAD = torch.logspace(-3, 1, WIDTH, dtype=torch.float64)  # of the eigenvalues of C


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(tokens: int = 100 * WIDTH, file: Path | None = None) -> KeyStatistics:
    turn = torch.linalg.qr(noise(WIDTH, WIDTH, seed=9)).Q
    moment = turn @ torch.diag(SPREAD) @ turn.T
    made = KeyStatistics.of(0, (moment + moment.T) / 2, torch.zeros(WIDTH, dtype=torch.float64), tokens, 0.0)
    return made if file is None else KeyStatistics(**{**vars(made), "file": file})


def change(solution: Solution) -> Tensor:
    return solution.left @ solution.right.T


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    return noise(OUTPUTS, EDITS, seed=1), noise(WIDTH, EDITS, seed=2)


@pytest.mark.parametrize("weight", [1e-2, 1.0, 1e4])
def test_small_systems_give_what_the_large_one_gives(problem: tuple[Tensor, Tensor], weight: float) -> None:
    """MEMIT as it is written: R Kᵀ (λ C + K Kᵀ)⁻¹."""
    residual, keys = problem
    found = statistics()
    large = weight * found.second_moment + keys @ keys.T
    expected = torch.linalg.solve(large, keys @ residual.T).T
    assert close(change(solve(residual, keys, found.solve, weight)), expected)


def test_emmet_meets_every_value_and_no_smaller_change_does(problem: tuple[Tensor, Tensor]) -> None:
    residual, keys = problem
    found = statistics()
    solution = change(solve(residual, keys, found.solve))
    assert close(solution @ keys, residual)
    # Anything else that meets them differs by what all keys are blind to, and is larger in the metric.
    blind = noise(OUTPUTS, WIDTH, seed=3)
    blind = blind - blind @ keys @ torch.linalg.pinv(keys)
    sizes = [((solution + 0.1 * share * blind) @ found.cholesky).norm() for share in (0, 1, -1)]
    assert sizes[0] < min(sizes[1:])


def test_memit_becomes_emmet_and_nothing(problem: tuple[Tensor, Tensor]) -> None:
    residual, keys = problem
    metric = statistics().solve
    exact = change(solve(residual, keys, metric))
    errors = [float((change(solve(residual, keys, metric, weight)) - exact).norm()) for weight in (1e-1, 1e-3, 1e-5)]
    assert errors[0] > 50 * errors[1] > 2500 * errors[2]
    assert close(change(solve(residual, keys, metric, 1e-9)), exact, 1e-8)
    assert float(change(solve(residual, keys, metric, 1e12)).norm()) < 1e-8 * float(exact.norm())


def test_rome_is_the_solve_for_one_key(problem: tuple[Tensor, Tensor]) -> None:
    """Equation 2 of 2202.05262: Λ (C⁻¹ k)ᵀ with Λ = (v − W k) / ((C⁻¹ k)ᵀ k)."""
    residual, keys = problem[0][:, :1], problem[1][:, :1]
    found = statistics()
    direction = torch.linalg.solve(found.second_moment, keys)
    expected = residual @ direction.T / (direction.T @ keys)
    assert close(change(solve(residual, keys, found.solve)), expected)


@pytest.mark.parametrize("threshold", [0.01, 0.3])  # the space, and what is left of it, is the smaller part
def test_alphaedit_is_what_its_large_system_gives(problem: tuple[Tensor, Tensor], threshold: float) -> None:
    residual, keys = problem
    space = statistics().null_space(threshold, relative=False)
    vectors = torch.linalg.eigh(statistics().second_moment)[1][:, : space.rank]
    assert 0 < space.rank < WIDTH
    projection, past = vectors @ vectors.T, noise(WIDTH, 3, seed=4)
    large = projection @ (past @ past.T + keys @ keys.T) + 10.0 * torch.eye(WIDTH, dtype=torch.float64)
    expected = torch.linalg.solve(large, projection @ keys @ residual.T).T
    earlier = PastKeys(space.project, 10.0)
    earlier.follow([past])
    assert close(change(solve(residual, keys, space.project, 10.0, earlier)), expected)


def test_alphaedit_leaves_preserved_keys_where_they_are(problem: tuple[Tensor, Tensor]) -> None:
    residual, keys = problem
    space = statistics().null_space(0.01, relative=False)
    kept = torch.linalg.eigh(statistics().second_moment)[1][:, space.rank :]
    found = change(solve(residual, keys, space.project, 1e-3))
    assert float((found @ kept).abs().max()) < 1e-12 * float(found.norm())
    # A key that lies wholly outside of the space cannot be written at all.
    with pytest.raises(NumericsError, match="vanish in the metric"):
        solve(residual[:, :2], kept[:, :2], space.project, 1e-3)


def spaces() -> list[tuple[Metric, float]]:
    return [(statistics().solve, 3.0), (statistics().null_space(0.01, relative=False).project, 0.7)]


@pytest.mark.parametrize("which", [0, 1])
def test_one_after_the_other_with_past_keys_is_one_joint_solve(which: int) -> None:
    """At fixed keys, for a given target per key: recursive least squares."""
    metric, weight = spaces()[which]
    weights, targets, keys = noise(OUTPUTS, WIDTH, seed=5), noise(OUTPUTS, 12, seed=6), noise(WIDTH, 12, seed=7)
    joint = change(solve(targets - weights @ keys, keys, metric, weight))
    total, past = torch.zeros_like(joint), PastKeys(metric, weight)
    batches: Sequence[range] = (range(1), range(1, 6), range(6, 12))
    for count, batch in enumerate(batches):
        past.follow([keys[:, list(earlier)] for earlier in batches[:count]])
        own = keys[:, list(batch)]
        missing = targets[:, list(batch)] - (weights + total) @ own
        total = total + change(solve(missing, own, metric, weight, past))
    assert close(total, joint)


def test_past_keys_follow_what_is_stored() -> None:
    """Grown, shortened or exchanged: the same as from the beginning."""
    metric, stored = statistics().solve, [noise(WIDTH, 2, seed=seed) for seed in range(4)]
    followed, keys = PastKeys(metric, 2.0), noise(WIDTH, 3, seed=8)
    for held in (stored[:1], stored[:3], stored, stored[:2], stored[1:], [], stored[2:]):
        followed.follow(held)
        afresh = PastKeys(metric, 2.0)
        afresh.follow(held)
        found = followed.spared(keys, metric(keys))
        assert close(found, afresh.spared(keys, metric(keys)))
        if not held:
            assert close(found, metric(keys))
            continue
        earlier = torch.cat(held, dim=1)
        moment = statistics().second_moment + earlier @ earlier.T / 2.0
        assert close(found, torch.linalg.solve(moment, keys))


def test_a_key_that_is_written_again_is_not_held_against_itself(problem: tuple[Tensor, Tensor]) -> None:
    residual, keys = problem
    metric, past = statistics().solve, PastKeys(statistics().solve, 1e-6)
    past.follow([keys[:, :1], noise(WIDTH, 1, seed=8)])
    again = change(solve(residual[:, :1], keys[:, :1], metric, 1.0, past))
    alone = PastKeys(metric, 1e-6)
    alone.follow([noise(WIDTH, 1, seed=8)])
    assert close(again, change(solve(residual[:, :1], keys[:, :1], metric, 1.0, alone)))


def test_each_edit_has_its_own_column(problem: tuple[Tensor, Tensor]) -> None:
    """Without one edit's column the others hold as they did, and its own key gives what it gave before."""
    residual, keys = problem
    solution = solve(residual, keys, statistics().solve)
    without = change(solution) - solution.left[:, 2:3] @ solution.right[:, 2:3].T
    expected = residual.clone()
    expected[:, 2] = 0.0
    assert float((without @ keys - expected).abs().max()) < 1e-9
    assert torch.allclose(solution.right.norm(dim=0), torch.ones(EDITS, dtype=torch.float64))


def test_keys_that_coincide_get_the_mean_of_their_values(problem: tuple[Tensor, Tensor]) -> None:
    residual, keys = problem
    keys = torch.cat([keys, keys[:, :1] * (1 + 1e-7) + 1e-9], dim=1)
    residual = torch.cat([residual, -residual[:, 1:2]], dim=1)
    solution = solve(residual, keys, statistics().solve)
    assert solution.rank == EDITS
    assert solution.condition < 1e6
    got = change(solution) @ keys
    assert torch.allclose(got[:, 0], (residual[:, 0] + residual[:, -1]) / 2, atol=1e-4)
    assert torch.allclose(got[:, 1:EDITS], residual[:, 1:EDITS], atol=1e-4)


def test_what_is_not_finite_is_refused(problem: tuple[Tensor, Tensor]) -> None:
    residual, keys = problem
    for bad in ((residual * math.inf, keys), (residual, keys * math.nan)):
        with pytest.raises(NumericsError, match="not finite"):
            solve(*bad, statistics().solve)


# --- the null space ----------------------------------------------------------------------------------------------------


def test_the_null_space_is_where_keys_are_small() -> None:
    found = statistics()
    absolute = found.null_space(0.01, relative=False)
    assert absolute.rank == int((SPREAD < 0.01).sum())
    relative = found.null_space(0.02, relative=True)
    shares = SPREAD.cumsum(0) / SPREAD.sum()
    assert relative.rank == int((shares <= 0.02).sum())
    assert relative.share == pytest.approx(float(shares[relative.rank - 1]))
    projection = relative.project(torch.eye(WIDTH, dtype=torch.float64))
    assert close(projection @ projection, projection)
    assert float(projection.trace()) == pytest.approx(relative.rank)
    assert float((projection @ found.second_moment).trace() / SPREAD.sum()) == pytest.approx(relative.share)


def test_a_null_space_of_what_was_not_read_is_refused() -> None:
    with pytest.raises(NumericsError, match=r"399 keys of width 40 are too few .* raise tokens_per_width"):
        statistics(tokens=10 * WIDTH - 1).null_space(0.02, relative=True)
    assert statistics(tokens=10 * WIDTH).null_space(0.02, relative=True).rank


@pytest.mark.parametrize(("threshold", "words"), [(1e-9, "no direction"), (1e9, "every direction")])
def test_a_threshold_that_tells_nothing_apart_is_refused(threshold: float, words: str) -> None:
    with pytest.raises(NumericsError, match=rf"{words} .* the eigenvalues go from 0.001 to 10"):
        statistics().null_space(threshold, relative=False)


def test_eigenvectors_are_kept_beside_the_statistics(tmp_path: Path) -> None:
    found = statistics(file=tmp_path / "moments.safetensors")
    values, vectors = found.spectrum()
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    again = found.spectrum()
    assert torch.equal(again[0], values)
    assert torch.equal(again[1], vectors)
    assert kept.stat().st_mtime_ns == written
    kept.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="delete the file to make them again"):
        found.spectrum()
