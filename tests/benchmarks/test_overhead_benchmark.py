"""The overhead benchmark: what shall hit hits, what shall miss misses, and both are compared with the bare model."""

from __future__ import annotations

import json

import pytest

from errata.benchmarks import overhead


def test_a_small_run_hits_misses_and_has_its_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "_ROUNDS", 2)
    monkeypatch.setattr(overhead, "_PROMPT", 16)
    monkeypatch.setattr(overhead, "_ANSWER", 2)
    found = overhead.run(sizes=(0, 300))
    json.dumps(found)
    rows = {(row["entries"], row["traffic"]): row for row in found["rows"]}
    assert {key: row["fired"] for key, row in rows.items()} == {(0, "miss"): 0.0, (300, "hit"): 1.0, (300, "miss"): 0.0}
    for name, ratio in (("decode_vs_base", "decode_1m_vs_base"), ("prefill_vs_base", "prefill_1m_vs_base")):
        assert found["ratios"][ratio] == min(rows[300, traffic][name] for traffic in ("hit", "miss"))
