"""KnowEdit's ConvSent (Mitchell et al. 2022, SERAC): what a chat partner thinks of a topic.

`ent` is the topic, `pos` and `neg` are replies about it of either sentiment. The file names no prompt and no direction:
the prompt is made here ("What do you think of ...?"), the target is the first positive reply, the ground truth the
first negative one. All replies stay in `extra`.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import edit_of, required, texts
from errata.edit import Edit, FieldProblem

__all__ = ["KEYS", "NAME", "read", "recognises"]

NAME = "KnowEdit ConvSent"
KEYS = "ent, pos, neg"


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return {"ent", "pos", "neg"} <= record.keys()


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    topic = required(record, "ent", str)
    required(record, "pos", list)
    required(record, "neg", list)
    positive, negative = ([text for text in texts(record, field) if text.strip()] for field in ("pos", "neg"))
    if not positive:
        raise FieldProblem("pos", "has no reply", "give at least one positive reply")
    return edit_of(
        record,
        {"ent"},
        prompt=f"What do you think of {topic}?",
        target=positive[0],
        subject=topic,
        ground_truth=negative[0].strip() if negative else None,
        source=f"{NAME}; prompt from a template",
    )
