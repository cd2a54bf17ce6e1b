"""Texts that are put in front of prompts: the base model's own, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from errata.edit import Edit
from errata.editors import contexts
from errata.editors.contexts import memit_contexts, rome_contexts, wise_contexts
from errata.editors.ft import FineTune
from errata.testing.models import tiny_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))


def _never(*_: object, **__: object) -> str:
    raise AssertionError("written again")


@pytest.mark.parametrize("write", [memit_contexts, rome_contexts, wise_contexts])
def test_written_once_per_model_and_seed(write: contexts.Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = write(tiny_model("llama"), 0)
    assert len(set(texts)) > 1
    assert write(tiny_model("llama"), 1) != texts
    assert write(tiny_model("llama", seed=1), 0) != texts
    monkeypatch.setattr(contexts, "sample", _never)
    assert write(tiny_model("llama"), 0) == texts
    with pytest.raises(AssertionError, match="written again"):
        write(tiny_model("llama"), 2)


def test_kinds_are_kept_apart() -> None:
    model = tiny_model("llama")
    assert len({memit_contexts(model, 0), rome_contexts(model, 0), wise_contexts(model, 0)}) == 3


def test_they_are_the_base_models_whatever_is_attached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = memit_contexts(tiny_model("llama"), 0)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "another"))
    model = tiny_model("llama")
    FineTune(model, learning_rate=5e-2, steps=20).edit([Edit(prompt="The capital of", target=" Rome")])
    assert memit_contexts(model, 0) == bare


def test_a_folder_that_cannot_be_written_to_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "file"))
    assert memit_contexts(tiny_model("llama"), 0)
