"""The weights benchmark: both ways give the same, and its ratios are of what was measured."""

from __future__ import annotations

import json

import pytest

from errata.benchmarks import solve, weights


def test_a_small_run_compares_equal_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_EDITS", 2)
    monkeypatch.setattr(weights, "_CONTEXTS", 1)
    monkeypatch.setattr(weights, "_TOKENS_PER_WIDTH", 1.0)
    monkeypatch.setattr(weights, "solves", lambda progress: solve.solves(progress, widths=(64,)))
    found = weights.run()
    json.dumps(found)
    values, covariances, solved = found["rows"]
    assert values["relative_difference"] < 1e-3
    assert solved["relative_difference"] < 1e-6
    assert found["ratios"] == {
        "vstar_batched": values["textbook_seconds"] / values["seconds"],
        "covariance_one_pass": covariances["textbook_seconds"] / covariances["seconds"],
        "covariance_same_precision": covariances["same_precision_seconds"] / covariances["seconds"],
        "solve_64": solved["textbook_seconds"] / solved["seconds"],
    }
