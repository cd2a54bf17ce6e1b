"""The Edit record: JSON in and out, unknown keys, conflicts, messages."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.datasets import read_edits, write_edits
from errata.edit import Edit, FieldProblem

# What `str.splitlines` takes for line ends is drawn often: JSON may hold it as it is.
_CHARACTERS = st.characters(exclude_categories=("Cs",)) | st.sampled_from("\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r\n")
TEXT = st.text(_CHARACTERS, min_size=1, max_size=30).filter(lambda t: bool(t.strip()))


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    probe = st.one_of(
        TEXT, st.fixed_dictionaries({"prompt": TEXT}, optional={"answer": TEXT, "kind": TEXT, "weight": st.integers()})
    )
    answered = st.fixed_dictionaries({"prompt": TEXT, "answer": TEXT})
    record = {
        "prompt": draw(TEXT),
        "target": draw(TEXT),
        "subject": draw(st.none() | TEXT),
        "ground_truth": draw(st.none() | TEXT),
        "rephrases": draw(st.lists(TEXT, max_size=3)),
        "locality": draw(st.lists(probe, max_size=3)),
        "portability": draw(st.lists(answered, max_size=2)),
        "tags": draw(st.lists(TEXT, max_size=2)),
    }
    return record | {
        f"x-{name}": value for name, value in draw(st.dictionaries(TEXT, st.integers(), max_size=2)).items()
    }


@settings(deadline=None, max_examples=100)
@given(st.lists(records(), min_size=1, max_size=3, unique_by=lambda r: (r["prompt"], r["target"].strip())))
def test_a_file_of_edits_comes_back_as_the_same_edits(given_records: list[dict[str, Any]]) -> None:
    edits = [Edit.from_record(record) for record in given_records]
    assert all("\n" not in edit.to_json() for edit in edits)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edits.jsonl"
        write_edits(path, edits)
        again = read_edits(path, strict=True).edits
    assert again == edits
    for record, edit in zip(given_records, again, strict=True):
        assert {k: v for k, v in record.items() if k.startswith("x-")} == edit.extra


def test_a_locality_entry_may_be_a_bare_prompt() -> None:
    edit = Edit.from_record(
        {"prompt": "p", "target": "t", "locality": ["q", {"prompt": "r", "answer": "s", "weight": 2}]}
    )
    assert [(p.prompt, p.answer) for p in edit.locality] == [("q", None), ("r", "s")]
    assert edit.to_record()["locality"][1]["weight"] == 2


def test_the_id_follows_from_the_content_and_a_given_one_is_kept() -> None:
    first, second = Edit(prompt="p", target="t"), Edit(prompt="p", target=" t ")
    assert first.id == second.id != Edit(prompt="p", target="u").id
    given = Edit.from_record({"id": 7, "prompt": "p", "target": "t"})
    assert given.id == "7"
    assert (first.has_derived_id, given.has_derived_id) == (True, False)
    assert Edit.from_record({"prompt": "p", "target": " t", "subject": " "}).has_derived_id


@pytest.mark.parametrize(
    ("record", "field", "words"),
    [
        ({"prompt": "p"}, "target", "is missing"),
        ({"prompt": " ", "target": "t"}, "prompt", "is empty"),
        ({"prompt": "p", "target": ""}, "target", "is empty"),
        ({"prompt": "p", "target": 5}, "target", "found 5"),
        ({"prompt": "p", "target": "t", "portability": ["q"]}, "portability", "no answer"),
        ({"prompt": "p", "target": "t", "locality": [{"answer": "a"}]}, "locality.0.prompt", "is missing"),
        (["p", "t"], None, "expected an object"),
    ],
)
def test_what_does_not_fit_is_named_with_a_remedy(record: Any, field: str | None, words: str) -> None:
    with pytest.raises(FieldProblem) as caught:
        Edit.from_record(record)
    assert caught.value.field == field
    assert words in str(caught.value)
    assert caught.value.remedy
