"""Every metric against answers worked out by hand."""

from __future__ import annotations

import math

import pytest

from errata.edit import Edit, Probe
from errata.evaluation.lifelong import retention_by_age
from errata.evaluation.metrics import (
    Score,
    answers_exactly,
    bootstrap_mean,
    contains,
    finite_or_none,
    held_until,
    normalise,
    same_text,
    token_accuracy,
)
from errata.evaluation.protocol import AskedEdit, Marks, Result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Eiffel Tower!", "eiffel tower"),
        ("U.S.", "us"),
        ("U.S.A.", "usa"),
        ("A", "a"),
        ("?", "?"),
        ("", ""),
        ("Zürich, 東京", "zürich 東京"),
        ("the An", "the an"),
        ("A. A. Milne", "a a milne"),
        ("the A. A. Milne of our day", "a a milne of our day"),
        ("Vitamin A", "vitamin a"),
        ("a piano", "piano"),
        ('(the) "Piano"', "piano"),
        ("12-year-old", "12yearold"),
        ("a + b", "a + b"),
        ("- Rome", "rome"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("generated", "answer", "expected"),
    [
        (" Rome.", "Rome", True),
        (" Rome", "Rome", True),
        (" rome. It is old.", "Rome", True),
        (" Rome Rome.", "Rome", False),
        (" Romeo.", "Rome", False),
        (" New Rome.", "Rome", False),
        (" St. Gallen. A city.", "St. Gallen", True),
        (" U.S. and more", "U.S.", True),
        (" U.S.", "U.S", True),
        (" Paris\nRome", "Paris", True),
        (" the piano!", "piano", True),
        ("", "Rome", False),
        (" ", "Rome", False),
        (" 12. So 34.", "34", False),
        (" Paris, France.", "Paris", False),
        (" Zürich.", "Zürich", True),
        (" Anna", "Ann", False),
        (" A. A. Milne.", "Milne", False),
        (" A. A. Milne. He wrote.", "A. A. Milne", True),
        (" U.S.A.", "U.S.", False),
        (" St. Gallen.", "St", False),
        (" J. K. Rowling.", "J", False),
        (" J. K. Rowling. She wrote.", "J. K. Rowling", True),
        (" Sr.", "Sr", True),
        (" No. It is a fish.", "no", True),
        (" 12. So 34.", "12", True),
        (" Bo\nRome", "Bo", True),
        (" x - y", "x + y", False),
    ],
)
def test_exact_answers(generated: str, answer: str, expected: bool) -> None:
    assert answers_exactly(generated, answer) is expected


@pytest.mark.parametrize(
    ("generated", "answer", "expected"),
    [
        (" He lives in Rome, Italy.", "Rome", True),
        (" He lives in Romeo.", "Rome", False),
        (" York New.", "New York", False),
        (" in New York now", "New York", True),
        ("", "Rome", False),
        (" the", "a", False),
    ],
)
def test_contains(generated: str, answer: str, expected: bool) -> None:
    assert contains(generated, answer) is expected


def test_same_text_forgives_case_and_punctuation_only() -> None:
    assert same_text(" Rome.", "rome")
    assert not same_text(" Rome.", " Rome, Italy.")
    assert same_text("", "")


def test_token_accuracy_counts_places() -> None:
    assert token_accuracy([1, 2, 3, 4], [1, 9, 3, 9]) == 0.5
    assert token_accuracy([], []) == 0.0


def test_bootstrap_intervals() -> None:
    measure = bootstrap_mean([1.0] * 80 + [0.0] * 20)
    assert measure.value == pytest.approx(0.8)
    # A proportion of 0.8 over 100 has a standard error of 0.04.
    assert measure.low == pytest.approx(0.72, abs=0.03)
    assert measure.high == pytest.approx(0.88, abs=0.03)
    assert bootstrap_mean([1.0] * 80 + [0.0] * 20) == measure
    constant = bootstrap_mean([0.5, 0.5, 0.5])
    assert (constant.low, constant.high) == (0.5, 0.5)
    nothing = bootstrap_mean([])
    assert math.isnan(nothing.value)
    assert nothing.count == 0


def test_a_score_of_nothing_is_null_in_json() -> None:
    record = Score.of([], [], [], []).to_record()
    assert record["generated"] is None
    assert record["generated_interval"] == [None, None]
    assert Score.of([1.0, 0.0], [1.0, 1.0], [1.0, 0.5], [1.0, 0.25]).to_record() | {"generated_interval": None} == {
        "generated": 0.5,
        "contains": 1.0,
        "teacher_forced": 0.75,
        "f1": 0.625,
        "generated_interval": None,
        "wilson_interval": [0.094531, 0.905469],
        "edits": 2,
    }


def test_retention_groups_by_age_newest_first() -> None:
    #                 oldest                                   newest
    success = [0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    # ages 8..0; groups: 0, 1, 2-3, 4-7, 8
    assert retention_by_age(success) == {0: 1.0, 1: 1.0, 2: 0.5, 4: 0.5, 8: 0.0}
    assert retention_by_age([1.0]) == {0: 1.0}
    assert retention_by_age([]) == {}


def test_numbers_that_json_cannot_hold_become_null() -> None:
    assert [finite_or_none(value) for value in (1.5, math.nan, math.inf, -math.inf, None)] == [1.5, *[None] * 4]


def test_kinds_of_probes_are_averaged_per_edit_first() -> None:
    """One edit with three probes that changed weighs no more than one with a single probe that did not."""
    right, wrong = (1.0,) * 4, (0.0,) * 4

    def asked(marks: list[Marks]) -> AskedEdit:
        probes = tuple(Probe(prompt=f"q{number}", kind="unrelated") for number in range(len(marks)))
        return AskedEdit(Edit(prompt="p", target="t", locality=probes), [right], [], marks, [], {})

    score = Result([asked([wrong, wrong, wrong]), asked([right])]).by_kind("locality")["unrelated"]
    assert (score.generated.value, score.generated.count) == (0.5, 2)


def test_how_long_a_share_stays_up_is_counted_on_a_line_between_checkpoints() -> None:
    falls = [(100, 1.0), (200, 0.95), (300, 0.85)]
    assert held_until(falls, 0.9) == (250, True)
    assert held_until(falls[:2], 0.9) == (200, False)
    assert held_until([(100, 0.5)], 0.9) == (0.0, True)
    assert held_until([(1, 1.0), (10, 0.5), (20, 1.0)], 0.75) == (round(1 + 9 / 2), True), "it may not come back"
