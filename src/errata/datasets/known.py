"""ROME's known facts (Meng et al. 2022): what GPT-2 XL completes correctly; used to trace where facts are looked up.

`prompt, subject, attribute`, and `prediction`, what the model wrote. They are facts, not corrections: the target is the
true answer.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import edit_of, named, required
from errata.edit import Edit

__all__ = ["KEYS", "NAME", "read", "recognises"]

NAME = "ROME's known facts"
KEYS = "prompt, subject, attribute"


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return "attribute" in record and "prompt" in record


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    return edit_of(
        record,
        {"known_id", "prompt", "subject", "attribute"},
        id=named("known", record, "known_id"),
        prompt=required(record, "prompt", str),
        target=required(record, "attribute", str),
        subject=record.get("subject"),
        source=NAME,
    )
