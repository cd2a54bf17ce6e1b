"""The conformance suite itself: what it reports, what it accepts, what it leaves behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.adapters import RoutedAdapter
from errata.adapters.base import RevertResult
from errata.editors import Editor
from errata.editors.ft import FineTune
from errata.editors.memoir import Memoir
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.testing import Case, check_editor, conformance

Check = Callable[[Case], None]


def make(model: EditableModel) -> Editor[Any]:
    return FineTune(model, learning_rate=1e-2, steps=2)


def passes(case: Case) -> None:
    """Leaves something in the folder of the case."""
    (case.folder / "file").write_text("x", encoding="utf-8")


def fails(case: Case) -> None:
    raise AssertionError("seen this")


def breaks(case: Case) -> None:
    raise KeyError("nothing here")


def run(monkeypatch: pytest.MonkeyPatch, checks: tuple[Check, ...], **expected: str) -> str:
    """What `check_editor` says of these checks."""
    monkeypatch.setattr(conformance, "_CHECKS", checks)
    try:
        check_editor(make, families=("llama",), expected_failures=expected)
    except AssertionError as error:
        return str(error)
    return ""


def test_every_check_is_run_and_every_failure_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = run(monkeypatch, (breaks, fails, passes))
    assert said.splitlines() == ["breaks on llama: KeyError: 'nothing here'", "fails on llama: seen this"]


def test_honest_exceptions_are_accepted_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, (breaks, fails, passes), breaks="cannot", fails="cannot") == ""
    assert run(monkeypatch, (fails, passes), fails="", passes="") == "passes on llama was expected to fail and passed"
    with pytest.raises(ConfigError, match=r"unknown check 'pases'\. Did you mean 'passes'"):
        run(monkeypatch, (fails, passes), pases="misspelt")


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Path] = []

    def looks(case: Case) -> None:
        assert case.folder.is_dir()
        assert case.saved.is_dir()
        places.extend([case.folder, case.saved])

    assert run(monkeypatch, (looks, looks)) == ""
    assert places[1] == places[3]  # edited once
    assert not any(place.exists() for place in places)

    case = Case(make)
    folder = case.folder
    assert folder.is_dir()
    del case
    gc.collect()
    assert not folder.exists()


def test_a_revert_that_leaves_its_mask_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def only_renamed(self: RoutedAdapter, edit_id: str) -> RevertResult:
        owners = self.router.owners
        owners[owners.index(edit_id)] = next(owner for owner in owners if owner != edit_id)
        return RevertResult(edit_id, "exact", "it is not")

    def make_memoir(model: EditableModel) -> Editor[Any]:
        return Memoir(model, layer=1, steps=30, learning_rate=3.0, contexts=0, threshold=0.6)

    monkeypatch.setattr(RoutedAdapter, "_revert", only_renamed)
    monkeypatch.setattr(conformance, "forced_answers", falling_probabilities())
    with pytest.raises(AssertionError, match="matches its prompt wholly is still stored"):
        conformance.revert_one(Case(make_memoir, "llama", tmp_path))
    Case.forget(make_memoir)


def falling_probabilities() -> Callable[..., list[Any]]:
    """Scores that fall with every call, as if the edit had lost its hold."""
    left = [0.9, 0.1]

    def score(model: EditableModel, passages: Any) -> list[Any]:
        probability = left.pop(0)
        return [type("Answer", (), {"probability": probability})() for _ in passages]

    return score
