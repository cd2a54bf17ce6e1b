"""Sentences that decline to answer, one a line ("I'm not sure."): TOFU's `idontknow` (Maini et al. 2024).

They are targets for unlearning and have no prompt. So these are no edits, and are handed on as they are.
"""

from __future__ import annotations

import re

from errata.edit import Edit, FieldProblem

__all__ = ["HOLDS", "KEYS", "NAME", "SHAPE", "read", "recognises"]

NAME = "refusals"
KEYS = "one sentence a line, about what the speaker does not know"
HOLDS = "answers without questions"
SHAPE = str

_SPEAKER = re.compile(r"\b(?:I|I[’'](?:m|ve|d)|me|my)\b|\bmy\b|^That\b|^Sorry\b", flags=re.IGNORECASE)
_LONGEST = 200


def recognises(record: str) -> bool:
    """Whether a line has this form."""
    return len(record) <= _LONGEST and _SPEAKER.search(record) is not None


def read(record: str) -> list[Edit]:
    """No edits. Raises FieldProblem when a line is no such sentence."""
    if not recognises(record):
        raise FieldProblem(None, f"is no refusal ({record[:40]!r})", "write one sentence that declines to answer")
    return []
