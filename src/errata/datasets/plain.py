"""errata's own form: one edit a line, `{"prompt": ..., "target": ...}` and whatever else an Edit has."""

from __future__ import annotations

from typing import Any

from errata.edit import Edit

__all__ = ["NAME", "read", "recognises"]

NAME = "errata JSONL"


def recognises(record: dict[str, Any]) -> bool:
    return "prompt" in record and ("target" in record or not {"target_new", "requested_rewrite", "alt"} & set(record))


def read(record: dict[str, Any]) -> Edit:
    return Edit.from_record(record)
