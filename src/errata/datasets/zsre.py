"""ZsRE (Levy et al. 2017) in the form of MEND, which WISE and MEMOIR also use.

`src` is the question, `alt` the counterfactual target, `rephrase` a paraphrase, `loc`/`loc_ans` an unrelated
question of Natural Questions with its answer (its tag "nq question: " is part of the prompt, as published).
Methods that teach the true answer (`answers`) instead do not follow this protocol.

EasyEdit's files add questions that follow from the edit: `portability` ("one_hop"), `inverse question` ("inverse",
whose answer is the subject) and `alter_subject_question` ("subject_alias": the same of the subject's other name; a
language model wrote them, and some ask for something else). WISE's `loc_prompt` is text its training reads, not a
question, and stays in `extra`.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import edit_of, one_hop, probe, required, texts
from errata.edit import Edit

__all__ = ["KEYS", "NAME", "TRUTH", "read", "recognises"]

NAME = "ZsRE"
KEYS = "src, alt, rephrase"
TRUTH = "ground_truth"

# `answers` stays in `extra` too: only the first is the ground truth.
_USED = {
    "src",
    "alt",
    "subject",
    "rephrase",
    "loc",
    "loc_ans",
    "portability",
    "inverse question",
    "alter_subject_question",
}


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return "src" in record and ("alt" in record or "rephrase" in record)


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    answers = texts(record, "answers")
    target = required(record, "alt", str)
    portability = one_hop(record)
    if record.get("inverse question"):
        portability.append(probe(record["inverse question"], required(record, "subject", str), "inverse"))
    if record.get("alter_subject_question"):
        portability.append(probe(record["alter_subject_question"], target, "subject_alias"))
    return edit_of(
        record,
        _USED,
        prompt=required(record, "src", str),
        target=target,
        subject=record.get("subject"),
        ground_truth=answers[0] if answers else None,
        rephrases=[record["rephrase"]] if record.get("rephrase") else [],
        locality=[probe(record["loc"], record.get("loc_ans"), "unrelated")] if record.get("loc") else [],
        portability=portability,
        source=NAME,
    )
