"""Dated answers of one query: the file of IKE's time experiments (Zheng et al. 2023), made from TempLAMA.

A record is a list: `[{"query": "Tom Brady plays for _X_.", "answer": [{"name": ...}], "date": "2019", ...}, ...]`, in
the order of the dates. The edit brings a model up to date: its prompt is the query up to the gap, its target the last
answer, its ground truth the one before. All dated answers are kept in `extra` as `dated`.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import required
from errata.edit import Edit, FieldProblem

__all__ = ["KEYS", "NAME", "SHAPE", "read", "recognises"]

NAME = "dated answers"
KEYS = "lists of query, answer, date"
SHAPE = list

_GAP = "_X_"


def recognises(record: list[Any]) -> bool:
    """Whether a record has this form."""
    return bool(record) and all(isinstance(entry, dict) and {"query", "date"} <= entry.keys() for entry in record)


def _answer(entry: Any, number: int) -> str:
    if not isinstance(entry, dict):
        raise FieldProblem(str(number), f"expected an object, found {type(entry).__name__}", "correct the value")
    answers = required(entry, "answer", list, f"{number}.")
    if not answers or not isinstance(answers[0], dict):
        raise FieldProblem(f"{number}.answer", "has no answer", 'write [{"name": ...}]')
    return required(answers[0], "name", str, f"{number}.answer.0.")


def read(record: list[Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    answers = [_answer(entry, number) for number, entry in enumerate(record)]
    if not answers:
        raise FieldProblem(None, "has no dated answers", "give at least one")
    last = len(record) - 1
    queries = {required(entry, "query", str, f"{number}.") for number, entry in enumerate(record)}
    query = record[last]["query"]
    before, gap, behind = query.partition(_GAP)
    if len(queries) > 1 or not gap or behind.strip(" .") or not before.strip():
        raise FieldProblem(f"{last}.query", f"found {query!r}", f"write one query for all dates that ends with {_GAP}")
    return Edit.from_record(
        {
            "id": str(record[last].get("id") or ""),
            "prompt": before.strip(),
            "target": answers[-1],
            "ground_truth": answers[-2] if last else None,
            "source": NAME,
            "dated": record,
        }
    )
