"""The study of the long-term store: both ways ask the same pools, and what the retriever finds is counted by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.adapters import PoolAdapter
from errata.adapters.pool import Pool
from errata.adapters.pool_network import PoolNetwork
from errata.adapters.retriever import Retriever
from errata.atlas.documents import document
from errata.editors.training import save_trained
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.progress import NO_PROGRESS
from errata.studies import memory_pools, study
from errata.studies.memory_pools import Pools, memory_arm
from errata.studies.memory_store import retrieval
from errata.studies.result import StudyResult
from errata.studies.workbench import StudyOptions, Workbench
from errata.testing import tiny_model


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def network(model: EditableModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One that was not trained, with a retriever."""
    folder = tmp_path_factory.mktemp("network")
    tensors = PoolNetwork.untrained(model, 3).state()
    retriever = Retriever.to_train(model.layer_count, model.anatomy.hidden_size, torch.Generator().manual_seed(0))
    tensors |= {f"retriever {name}": own for name, own in retriever.state().items()}
    record = {"slots": 9, "new": 3, "spacing": 1.0, "retrieved": 4}
    save_trained(folder, "memoryllm", model, tensors, record)
    return str(folder)


@pytest.fixture
def run(model: EditableModel, network: str, tmp_path: Path) -> Callable[..., StudyResult]:
    def run(**options: Any) -> StudyResult:
        given = {
            "settings": {"memoryllm": {"network": network}},
            "quick": True,
            "folder": tmp_path / "study",
            **options,
        }
        return study("memoryllm-long").run(model, StudyOptions(**given), NO_PROGRESS)

    return run


@pytest.fixture
def some_answers_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model answers nothing. Here what it says decides, in a way that tells two texts apart."""
    monkeypatch.setattr(memory_pools, "answers_exactly", lambda said, answer: sum(map(ord, said + answer)) % 3 == 0)


def pools_of(model: EditableModel, network: str, folder: Path, count: int, **settings: Any) -> Pools:
    options = StudyOptions(folder=folder, settings={"memoryllm": {"network": network, **settings}}, quick=True)
    bench = Workbench(study("memoryllm-long"), model, options, NO_PROGRESS)
    return Pools(bench, memory_arm(bench, long_term=40), "test", count)


def written(pool: PoolAdapter, prompts: Sequence[str]) -> list[str]:
    """Out of one of several pools, on whichever copy of the model it is attached to."""
    assert pool.model is not None
    return pool.model.generate(prompts, adapters=pool.name, max_new_tokens=12)


def test_the_same_pools_are_read_with_their_stores_and_without(
    model: EditableModel, network: str, tmp_path: Path
) -> None:
    pools = pools_of(model, network, tmp_path, 2)
    plain = pools.without_store()
    texts = ["The capital of France is Rome.", "Zed plays the flute.", "Bob wrote Hamlet.", "Ann was born in Paris."]
    for number in range(8):
        pools.read([texts[number % 4], texts[(number + 1) % 4]])
    expected = pools_of(model, network, tmp_path, 2, long_term=0)
    for number in range(8):
        expected.read([texts[number % 4], texts[(number + 1) % 4]])
    prompts = ["Who was Ann?", "Bob wrote"]
    said = []
    for own in (pools, plain, expected):
        with own.attached():
            said.append([written(one, prompts) for one in own.adapters])
    assert said[1] == said[2] != said[0], "without its store a memory is MemoryLLM"
    assert plain.adapters[0].pool is pools.adapters[0].pool
    assert not model.adapters


def test_what_is_found_of_a_text_is_counted(model: EditableModel, network: str, tmp_path: Path) -> None:
    pools = pools_of(model, network, tmp_path, 2)
    texts = [document(number, part="test") for number in range(12)]
    asked = [texts[0].questions, texts[1].questions]
    pools.read([texts[10].text, texts[11].text], chunks=1)
    updates = pools.read([texts[0].text, texts[1].text], chunks=1)
    assert retrieval(pools, updates, asked) == [(None, None)] * 2, "nothing of it is stored"
    for number in range(2, 10):
        pools.read([texts[number].text, texts[number - 1].text], chunks=1)
    found = retrieval(pools, updates, asked)
    for adapter, own, questions, (recall, chance) in zip(pools.adapters, updates, asked, found, strict=True):
        store = adapter.pool.store
        assert store is not None
        there = [int((store.born[layer] == own[0]).sum()) for layer in range(model.layer_count)]
        hits = 0
        for question in questions:
            (layers,) = adapter.retrieve([question.prompt], model)
            hits += sum(int((born == own[0]).sum()) for born in layers)
            assert all(len(born) == 4 for born in layers)
        assert recall == pytest.approx(hits / len(questions) / sum(there))
        shares = [4 / int((store.born[layer] > 0).sum()) for layer in range(model.layer_count)]
        mean = sum(many * share for many, share in zip(there, shares, strict=True)) / sum(there)
        assert chance == pytest.approx(mean)


def test_both_ways_are_asked_before_and_after_other_texts(
    run: Callable[..., StudyResult], some_answers_are_right: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    update = Pool.update

    def noted(self: Pool, tokens: Tensor, text: str) -> None:
        update(self, tokens, text)
        seen.append(text)

    monkeypatch.setattr(Pool, "update", noted)
    found = run(edits=10)
    assert [row["after"] for row in found.rows] == [0, 3]
    assert [row["horizons"] for row in found.rows] == [0, 1]
    first, later = found.rows
    assert (first["recall"], first["slots_left"], first["slots_stored"]) == (None, 1.0, 0.0)
    assert later["slots_left"] + later["slots_stored"] == pytest.approx(1.0), "nothing is lost where there is room"
    assert 0 < later["chance"] <= 1
    for row in found.rows:
        assert row["gain"] == pytest.approx(row["long_term"] - row["memoryllm"])
        assert {"memoryllm_interval", "long_term_interval", "gain_interval"} <= row.keys()
    assert any(row["gain"] != 0 for row in found.rows), "what is retrieved changes answers"
    assert len(found.tables[0].rows) == 3
    assert "M = 72 stored, R = 4 retrieved" in found.notes[0]
    assert len(seen) >= 10 * (3 + 1 + 3)
    count = len(seen)
    assert run(edits=10).rows == found.rows
    assert len(seen) == count, "nothing is made twice"


def test_a_retriever_and_a_store_are_needed(run: Callable[..., StudyResult], network: str) -> None:
    with pytest.raises(ConfigError, match="--set retriever_of="):
        run(settings={"memoryllm": {"network": "untrained"}})
    with pytest.raises(ConfigError, match=r"leave memoryllm\.long_term out"):
        run(settings={"memoryllm": {"network": network, "long_term": 0}})


def test_the_long_run_keeps_its_stores_too(model: EditableModel, network: str, tmp_path: Path) -> None:
    """A run of the integrity study that was interrupted goes on with what is stored."""
    from errata.studies.memory_long import _State

    pools, others = (pools_of(model, network, tmp_path, 2) for _ in range(2))
    for number in range(6):
        pools.read([document(number, part="test").text] * 2, chunks=1)
    _State(tmp_path, pools).save()
    _State(tmp_path, others).load()
    for mine, its in zip(pools.adapters, others.adapters, strict=True):
        assert (
            mine.retrieve(["Who was Ann?"], model)[0][1].tolist()
            == its.retrieve(["Who was Ann?"], model)[0][1].tolist()
        )
        assert torch.equal(mine.pool.accounting().stored, its.pool.accounting().stored)
