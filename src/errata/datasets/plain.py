"""errata's own form: one edit a line, `{"prompt": ..., "target": ...}` and whatever else an Edit has."""

from __future__ import annotations

from typing import Any

from errata.edit import Edit

__all__ = ["KEYS", "NAME", "read", "recognises"]

NAME = "errata JSONL"
KEYS = "prompt, target"


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return "prompt" in record and ("target" in record or not {"target_new", "requested_rewrite", "alt"} & set(record))


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    return Edit.from_record(record)
