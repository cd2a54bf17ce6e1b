"""WISE's Temporal set: entities that became known after a model's training, edited with one text and asked by another.

`prompt` is how a passage about the entity begins, `target_new` its continuation, written by a language model;
`ood_rephrase` is a passage about the same entity as people wrote it. Generalization out of distribution means that
this passage, too, has become likely. It is read as a portability probe of the kind "out_of_distribution": as many of
its own words as the edit's prompt has are the prompt, the rest is the answer. (Half of the passages begin with the
edit's very prompt, which this rule then gives.)

The file's `subject` repeats the prompt; it is kept, as published.
"""

from __future__ import annotations

import re
from typing import Any

from errata.datasets.fields import cut_off, edit_of, required
from errata.edit import Edit, FieldProblem

__all__ = ["KEYS", "NAME", "read", "recognises"]

NAME = "Temporal"
KEYS = "prompt, target_new, ood_rephrase"

_USED = {"prompt", "target_new", "subject", "ood_rephrase", "locality_prompt", "locality_ground_truth"}


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return "ood_rephrase" in record and "target_new" in record


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    prompt = required(record, "prompt", str)
    passage = required(record, "ood_rephrase", str).strip()
    words = len(prompt.split())
    found = re.match(rf"((?:\S+\s+){{{max(0, words - 1)}}}\S+)\s+(.*)", passage, flags=re.DOTALL)
    if found is None:
        raise FieldProblem(
            "ood_rephrase", f"has no more words than the prompt ({words})", "give a passage about the same entity"
        )
    return edit_of(
        record,
        _USED,
        prompt=prompt,
        target=required(record, "target_new", str),
        subject=record.get("subject"),
        locality=cut_off(record),
        portability=[{"prompt": found[1], "answer": found[2], "kind": "out_of_distribution"}],
        source=NAME,
    )
