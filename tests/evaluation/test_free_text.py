"""Texts written freely: as long as asked for, scored per edit, compared with references."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.edit import Edit
from errata.errors import ConfigError, FormatError
from errata.evaluation.free_text import read_references, write_freely
from errata.evaluation.texts import consistency, fluency
from errata.model.generation import write
from errata.testing import tiny_model

EDITS = [
    Edit.from_record(
        {"id": "a", "prompt": "The capital of France", "target": "Rome", "generation_prompts": ["In France", "x", "x"]}
    ),
    Edit(id="b", prompt="Ann wrote", target="Emma"),
]


def test_every_text_has_the_same_length_and_means_are_per_edit() -> None:
    model = tiny_model("llama")
    found = write_freely(model, EDITS, tokens=12)
    assert {id: list(texts) for id, texts in found.texts.items()} == {"a": ["In France", "x"], "b": ["Ann wrote"]}
    a, b = found.texts["a"], found.texts["b"]
    alone = write_freely(model, EDITS[1:], tokens=12)
    assert alone.texts["b"] == b, "alone or in a batch"
    assert alone.texts["b"]["Ann wrote"].startswith(write_freely(model, EDITS[1:], tokens=6).texts["b"]["Ann wrote"])
    per_edit = [sum(map(fluency, a.values())) / 2, fluency(b["Ann wrote"])]
    assert found.fluency.value == pytest.approx(sum(per_edit) / 2)
    assert found.to_record()["consistency"] == {"value": None, "interval": [None, None], "edits": 0}


def test_end_tokens_and_line_breaks_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    free = write_freely(model, EDITS[1:], tokens=8).texts["b"]["Ann wrote"]
    first = write(model, ["Ann wrote"], max_new_tokens=1)[0].ids[0]
    model.__dict__["stop_tokens"] = (first,)
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", first)
    assert model.generate(["Ann wrote"], max_new_tokens=8) == [""]
    assert write_freely(model, EDITS[1:], tokens=8).texts["b"]["Ann wrote"] == free


def test_references_are_found_by_the_target(tmp_path: Path) -> None:
    path = tmp_path / "references.jsonl"
    rows = [{"object": "Emma", "text": "Emma is a novel"}, {"object": "Emma", "text": "by Austen"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    references = read_references(path)
    assert references == {"Emma": ["Emma is a novel", "by Austen"]}
    found = write_freely(tiny_model("llama"), EDITS, references=references, tokens=12)
    assert found.consistency.count == 1, "no text is about Rome"
    corpus = references["Emma"]
    assert found.consistency.value == pytest.approx(consistency(found.texts["b"]["Ann wrote"], corpus, corpus))


def test_references_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "references.jsonl"
    path.write_text('{"object": "Emma", "text": "x"}\n{"object": "Emma"}\n', encoding="utf-8")
    with pytest.raises(FormatError, match=r"references\.jsonl:2: field 'text': is missing or no text; write"):
        read_references(path)
    path.write_text("", encoding="utf-8")
    with pytest.raises((ConfigError, FormatError), match=r"references\.jsonl"):
        read_references(path)
