"""Triplets of Wikidata (`subjectLabel, relation, objectLabel`), from which HalluEditBench asked its questions. CSV.

They are facts, not corrections: the target is the true object. There is no wording, so the prompt is made here: "The
{relation} of {subject} is". It is clumsy for relations that are verbs ("The founded by of ... is"), and each edit's
`source` says where it comes from.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import edit_of, required
from errata.edit import Edit

__all__ = ["KEYS", "NAME", "read", "recognises"]

NAME = "triplets"
KEYS = "columns subjectLabel, relation, objectLabel"


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return {"subjectLabel", "relation", "objectLabel"} <= record.keys()


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    subject, relation = required(record, "subjectLabel", str), required(record, "relation", str)
    return edit_of(
        record,
        {"subjectLabel", "objectLabel"},
        prompt=f"The {relation} of {subject} is",
        target=required(record, "objectLabel", str),
        subject=subject,
        source=f"{NAME}; prompt from a template",
    )
