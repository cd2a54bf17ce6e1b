"""ZsRE (Levy et al. 2017) in the form of MEND, which WISE and MEMOIR also use.

`src` is the question, `alt` the counterfactual target, `rephrase` a paraphrase, `loc`/`loc_ans` an unrelated
question of Natural Questions with its answer (its tag "nq question: " is part of the prompt, as published).
Methods that teach the true answer (`answers`) instead do not follow this protocol.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import one_hop, required
from errata.edit import Edit

__all__ = ["KEYS", "NAME", "read", "recognises"]

NAME = "ZsRE"
KEYS = "src, alt, rephrase"

_USED = {"src", "alt", "subject", "rephrase", "loc", "loc_ans", "answers", "portability"}


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return "src" in record and ("alt" in record or "rephrase" in record)


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    answers = record.get("answers") or []
    locality = []
    if record.get("loc"):
        locality = [{"prompt": record["loc"], "answer": record.get("loc_ans"), "kind": "unrelated"}]
    return Edit.from_record(
        {
            "prompt": required(record, "src", str),
            "target": required(record, "alt", str),
            "subject": record.get("subject"),
            "ground_truth": answers[0] if answers else None,
            "rephrases": [record["rephrase"]] if record.get("rephrase") else [],
            "locality": locality,
            "portability": one_hop(record),
            "source": NAME,
            "answers": answers,
            **{key: value for key, value in record.items() if key not in _USED},
        }
    )
