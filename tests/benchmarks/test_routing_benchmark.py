"""The routing benchmark: made-up masks are like the measured ones, and what it reports is what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from errata.atlas.edits import world_edits
from errata.benchmarks import routing
from errata.benchmarks.routing import MARKED, THRESHOLD, WIDTH, SyntheticMasks, measure_overlaps, run
from errata.evaluation.figures import save_figure
from errata.routing import MaskStore


@pytest.fixture(scope="module")
def made() -> SyntheticMasks:
    return SyntheticMasks(np.random.default_rng(0))


def store_of(packed: np.ndarray) -> MaskStore:
    store = MaskStore(WIDTH, MARKED)
    store.load(torch.from_numpy(packed))
    return store


def test_every_mask_marks_k_features_and_the_sharpest_are_the_largest(made: SyntheticMasks) -> None:
    features = made.features(made.prompts(20))
    packed, sharpest = made.hash(features)
    marks = np.unpackbits(packed, axis=1).astype(bool)
    assert (marks.sum(1) == MARKED).all()
    for row, values in enumerate(np.abs(features)):
        assert values[marks[row]].min() >= values[~marks[row]].max()
        others = np.delete(values, sharpest[row])
        assert values[sharpest[row]].min() >= others.max()


def test_of_equal_features_just_enough_are_marked(made: SyntheticMasks) -> None:
    packed, sharpest = made.hash(np.ones((2, WIDTH), dtype=np.float32))
    assert (np.bitwise_count(packed).sum(1) == MARKED).all()
    assert all(len(set(row.tolist())) == sharpest.shape[1] for row in sharpest)


def test_overlaps_are_those_that_were_measured(made: SyntheticMasks) -> None:
    stored = made.prompts(300)
    masks = made.hash(made.features(stored))[0]
    store = store_of(masks)
    unrelated = store.overlaps(store.masks(torch.arange(300)))[stored.relation[:, None] != stored.relation[None]]
    assert abs(float(unrelated.median()) - routing._MEASURED["unrelated"][3]) < 0.02
    for kind in ("paraphrase (atlas)", "paraphrase (CounterFact)"):
        wanted = np.interp(np.linspace(0.01, 0.99, 300), routing._SHARES, routing._MEASURED[kind])
        packed = made.hash(made.paraphrases(stored, wanted))[0]
        own = np.bitwise_count(packed & masks).sum(1) / MARKED
        assert np.abs(np.quantile(own, routing._SHARES) - routing._MEASURED[kind]).max() < 0.03
    negatives = made.hash(made.features(made.hard_negatives(stored)))[0]
    assert float(np.median(np.bitwise_count(negatives & masks).sum(1) / MARKED)) > float(unrelated.max())


@pytest.mark.slow
def test_the_measured_quantiles_are_found_again() -> None:
    found = measure_overlaps(world_edits(200))
    assert np.abs(np.array(found["paraphrase"]) - routing._MEASURED["paraphrase (atlas)"]).max() < 0.06
    for kind in ("unrelated", "same relation"):
        assert np.abs(np.array(found[kind]) - routing._MEASURED[kind]).max() < 0.03


def test_a_small_run_has_its_ratios_rows_and_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counts = dict.fromkeys(routing._QUERIES, 12)
    monkeypatch.setattr(routing, "_QUERIES", counts)
    monkeypatch.setattr(routing, "_LIFECYCLE", 5)
    found = run(sizes=(200, 400))
    save_figure(found.pop("figure"), tmp_path / "routing.png")
    assert (tmp_path / "routing.png").stat().st_size > 10_000
    json.dumps(found)
    assert found["ratios"].keys() == {"routing_1m_vs_dense", "routing_recall_1m", "routing_1m_vs_10k"}
    assert found["ratios"]["routing_recall_1m"] == 1.0
    *rows, lifecycle = found["rows"]
    assert [(row["entries"], row["queries"]) for row in rows] == [(n, kind) for n in (200, 400) for kind in counts]
    for row in rows:
        assert row["fire"] == row["fire_through_index"]
        if row["queries"] == "unrelated":
            assert row["fire"] == 0
        if row["queries"] == "paraphrase (atlas)":
            assert row["fire"] >= 6  # most overlap by more than the threshold
    assert routing._MEASURED["paraphrase (atlas)"][2] > THRESHOLD
    assert lifecycle["entries"] == 400
    assert lifecycle["saved_bytes_per_entry"] == pytest.approx(WIDTH / 8 + 2 * 64, abs=2)
