"""Cloze wordings of ZsRE's questions: `question, text_completion_prompt` (Gupta et al. 2024). No answers.

A record says how else a question may be asked; what the answer is stands in the file of edits it belongs to. So these
are no edits, and are handed on as they are.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import required
from errata.edit import Edit

__all__ = ["HOLDS", "KEYS", "NAME", "read", "recognises"]

NAME = "ZsRE wordings"
KEYS = "question, text_completion_prompt"
HOLDS = "other wordings of questions"


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return "text_completion_prompt" in record


def read(record: dict[str, Any]) -> list[Edit]:
    """No edits. Raises FieldProblem when a field does not fit."""
    required(record, "question", str)
    required(record, "text_completion_prompt", str)
    return []
