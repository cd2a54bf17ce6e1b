"""The memory benchmark: it measures what it says, and its ratios are those of its rows."""

from __future__ import annotations

import json

import pytest
import torch

from errata.benchmarks import memory
from errata.testing import tiny_model


def test_a_small_run_has_its_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_ROUNDS": 1, "_NEW": 4, "_TEXT": 12, "_PROMPT": 6, "_WRITTEN": 2}.items():
        monkeypatch.setattr(memory, name, value)
    found = memory.run(sizes=(8, 40), pools=3)
    json.dumps(found)
    rows = {(row["part"], row.get("slots")): row for row in found["rows"]}
    assert set(rows) == {("update", 8), ("update", 40), ("read", 8), ("read", 40), ("pools", None)}
    largest = rows["update", 40]
    assert found["ratios"]["update_vs_forward"] == largest["update"] / largest["forward"]
    assert found["ratios"]["read_8_vs_none"] == rows["read", 8]["with"] / rows["read", 8]["without"]
    assert found["ratios"]["together_vs_one_by_one"] == (
        rows["pools", None]["one_by_one"] / rows["pools", None]["together"]
    )


def test_the_pools_that_are_read_are_full() -> None:
    model = tiny_model("llama")
    adapter = memory._pool(model, 200, torch.Generator().manual_seed(0))
    assert adapter.pool.counts.tolist() == [200] * model.layer_count
    assert adapter.explain(["Ann"], model)[0].edit_id == "a text"
