"""The benchmark of scoring finds the same answers both ways."""

from __future__ import annotations

from errata.benchmarks.scoring import run


def test_batches_answer_as_single_prompts_do() -> None:
    found = run(edits=6, single=3)
    (row,) = found["rows"]
    assert row["edits_answered_otherwise"] == 0
    assert row["prompts"] == 18
    assert found["ratios"]["batched_vs_single"] > 0
