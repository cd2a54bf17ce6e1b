"""errata's own form: one edit a line, `{"prompt": ..., "target": ...}` and whatever else an Edit has."""

from __future__ import annotations

from typing import Any

from errata.edit import Edit

__all__ = ["KEYS", "NAME", "likely", "read", "recognises"]

NAME = "errata JSONL"
KEYS = "prompt, target"


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form. One without a target may be a damaged one, or another form's; see `likely`."""
    return "prompt" in record and "target" in record


def likely(record: dict[str, Any]) -> bool:
    """Whether a record that no form recognises is best reported as a damaged one of this form."""
    return "prompt" in record or "target" in record


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    return Edit.from_record(record)
