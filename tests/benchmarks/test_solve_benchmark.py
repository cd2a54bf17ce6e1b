"""`errata bench weights`, its part about solves: both sides give the same change."""

from __future__ import annotations

from errata.benchmarks.solve import solves


def test_both_solves_agree() -> None:
    ratios, rows = solves(widths=(64, 300))
    assert list(ratios) == ["solve_64", "solve_300"]
    assert all(row["relative_difference"] < 1e-9 for row in rows)
    assert all(row["seconds"] > 0 and row["textbook_seconds"] > 0 for row in rows)
