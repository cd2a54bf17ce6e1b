"""KnowEdit's Sanitation (Ishibashi & Shimodaira 2023): TriviaQA answers to be forgotten, and others to be kept.

The file is an object of lists of `{question, ground_truth, target_new}`: what shall be forgotten (`success` in the test
file, `K_F` in the training file; `target_new` is "I don't know.") and what shall stay (`locality`, `K_R`; without
`target_new`, or with the true answer). The list's name becomes the edit's tag. An edit of what shall stay has the true
answer as its target: it is a fact, not a correction.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import edit_of, required
from errata.datasets.reading import SECTION
from errata.edit import Edit

__all__ = ["KEYS", "NAME", "TRUTH", "read", "recognises"]

NAME = "KnowEdit Sanitation"
KEYS = "lists of question, ground_truth by name"
TRUTH = "either"

_USED = {"question", "ground_truth", "target_new", "subject", SECTION}


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return {SECTION, "question", "ground_truth"} <= record.keys()


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    truth = required(record, "ground_truth", str)
    target = required(record, "target_new", str) if "target_new" in record else truth
    return edit_of(
        record,
        _USED,
        prompt=required(record, "question", str),
        target=target,
        subject=record.get("subject"),
        ground_truth=truth if truth != target else None,
        source=NAME,
        tags=(required(record, SECTION, str),),
    )
