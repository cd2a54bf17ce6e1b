"""Long, free answers: UnKEBench (Deng et al. 2025) and EditEverything (Jiang et al. 2025, AnyEdit).

UnKEBench: `question, answer`, a rephrase (`para_question`), and questions about parts of the answer with short answers
(`sub_question, sub_answer`), which become portability probes, "sub_question". EditEverything: `question, answer` and
the `category`, which becomes a tag; its answers are right, so these are facts rather than corrections.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import edit_of, named, probe, required, same_length, texts
from errata.edit import Edit

__all__ = ["KEYS", "NAME", "read", "recognises"]

NAME = "UnKE"
KEYS = "question, answer, para_question; or question, answer, category"

_USED = {"id", "question", "para_question", "answer", "sub_question", "sub_answer", "category"}


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return "question" in record and ("para_question" in record or "category" in record)


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    questions, answers = texts(record, "sub_question"), texts(record, "sub_answer")
    same_length(questions, answers, ("sub_question", "sub_answer"))
    everything = "category" in record
    return edit_of(
        record,
        _USED,
        id=named("editevery" if everything else "unke", record, "id"),
        prompt=required(record, "question", str),
        target=required(record, "answer", str),
        rephrases=[record["para_question"]] if record.get("para_question") else [],
        portability=[
            probe(question, answer, "sub_question") for question, answer in zip(questions, answers, strict=True)
        ],
        source="EditEverything" if everything else NAME,
        tags=(str(record["category"]),) if record.get("category") else (),
    )
