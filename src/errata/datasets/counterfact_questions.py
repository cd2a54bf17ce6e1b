"""CounterFact's prompts with a question beside each: `question` (the cloze), `answer`, `subject`, `qna_question`.

Published with "Model Editing at Scale leads to Gradual and Catastrophic Forgetting" (Gupta et al. 2024). The answer is
CounterFact's new target; the question is a rephrase. `case_index` counts cases, it is not CounterFact's `case_id`.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import edit_of, required
from errata.edit import Edit

__all__ = ["KEYS", "NAME", "TRUTH", "read", "recognises"]

NAME = "CounterFact as questions"
KEYS = "question, answer, qna_question"
TRUTH = "ground_truth"  # none of its records has one


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return "qna_question" in record


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    return edit_of(
        record,
        {"question", "answer", "subject", "qna_question"},
        prompt=required(record, "question", str),
        target=required(record, "answer", str),
        subject=record.get("subject"),
        rephrases=[required(record, "qna_question", str)],
        source=NAME,
    )
