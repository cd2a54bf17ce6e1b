"""TOFU (Maini et al. 2024): questions about invented authors, real authors and the world; and any file of plain
questions with answers.

`question, answer`, in some files `perturbed_answer`, wrong ones, which stay in `extra`. These are facts, not
corrections: the target is the true answer. To unlearn them, give them another target, such as a sentence of TOFU's own
file of refusals.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import edit_of, required
from errata.edit import Edit

__all__ = ["KEYS", "NAME", "read", "recognises"]

NAME = "questions with answers"
KEYS = "question, answer (TOFU)"


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    # Other benchmarks have the same two keys for answers that are numbers or lists.
    return isinstance(record.get("question"), str) and isinstance(record.get("answer"), str)


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    return edit_of(
        record,
        {"question", "answer"},
        prompt=required(record, "question", str),
        target=required(record, "answer", str),
        source=NAME,
    )
