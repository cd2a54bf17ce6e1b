"""QAEdit (Yang et al. 2025, "The Mirage of Model Editing"): real questions of NQ, TriviaQA and SimpleQA.

`prompt, target, subject, rephrase` and `locality`, a list of `{loc, loc_ans}`. Targets are true answers. Which set a
question is from (`source`) becomes the edit's tag, and part of its id: each set counts its own questions.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import edit_of, named, probe, required
from errata.edit import Edit, FieldProblem

__all__ = ["KEYS", "NAME", "read", "recognises"]

NAME = "QAEdit"
KEYS = "prompt, target, rephrase, locality with loc, loc_ans"

_USED = {"id", "source", "prompt", "target", "subject", "rephrase", "locality"}


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form. It differs from errata's own by the entries of its locality."""
    locality = record.get("locality")
    asks = isinstance(locality, list) and bool(locality) and isinstance(locality[0], dict) and "loc" in locality[0]
    return "prompt" in record and asks


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    locality = []
    for number, entry in enumerate(required(record, "locality", list)):
        if not isinstance(entry, dict):
            raise FieldProblem(f"locality.{number}", f"expected object, found {type(entry).__name__}", "correct it")
        locality.append(probe(required(entry, "loc", str, f"locality.{number}."), entry.get("loc_ans"), "unrelated"))
    origin = str(record.get("source") or "")
    return edit_of(
        record,
        _USED,
        id=named(f"qaedit-{origin}" if origin else "qaedit", record, "id"),
        prompt=required(record, "prompt", str),
        target=required(record, "target", str),
        subject=record.get("subject"),
        rephrases=[record["rephrase"]] if record.get("rephrase") else [],
        locality=locality,
        source=NAME,
        tags=(origin,) if origin else (),
    )
