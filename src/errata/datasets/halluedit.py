"""HalluEditBench (Huang et al. 2025): facts that one model gets wrong, with test questions. CSV, one file per topic.

`question` is the prompt, `object` the true answer and so the target, `output_MODEL` what the model said: the ground
truth in the sense of an Edit, the answer before it. Locality: `locality_question`, about another fact of the subject.
Portability, in the paper's words generalization and portability: `yes_question` and `no_question`, the question with
choices (`multiple_choice_with_letters`, answered by a letter), the question the other way round (`inverse`, answered by
the subject), and questions of two to six hops ("2_hop", ...). How the model's answer was judged and the rest are kept
in `extra`.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import edit_of, probe, required
from errata.edit import Edit

__all__ = ["KEYS", "NAME", "read", "recognises"]

NAME = "HalluEditBench"
KEYS = "columns subject, object, question, output_MODEL, locality_question"

_HOPS = range(2, 7)
_USED = {
    "subject",
    "object",
    "question",
    "paraphrased_question",
    "multiple_choice_with_letters",
    "multiple_choice_labels",
    "yes_question",
    "no_question",
    "locality_question",
    "reversed_relation_question",
    *(f"{part}_{hops}hop" for part in ("question", "answer") for hops in _HOPS),
}


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return {"subject", "object", "question", "locality_question"} <= record.keys()


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    question, answer, subject = (required(record, field, str) for field in ("question", "object", "subject"))
    outputs = [key for key in record if key.startswith("output_")]
    portability = [
        probe(record.get("yes_question"), "Yes", "yes_question"),
        probe(record.get("no_question"), "No", "no_question"),
        probe(record.get("reversed_relation_question"), subject, "inverse"),
    ]
    choices = record.get("multiple_choice_with_letters")
    if choices:
        letter = record.get("multiple_choice_labels")
        portability.append(probe(f"{question} {choices}", letter, "multiple_choice"))
    for hops in _HOPS:
        asked, follows = record.get(f"question_{hops}hop"), record.get(f"answer_{hops}hop")
        portability.append(probe(asked, follows, f"{hops}_hop"))
    other = record.get("locality_question")
    rephrase = record.get("paraphrased_question")
    return edit_of(
        record,
        _USED | set(outputs[:1]),
        prompt=question,
        target=answer,
        subject=subject,
        ground_truth=record[outputs[0]] if outputs else None,
        rephrases=[rephrase] if rephrase else [],
        locality=[probe(other, None, "same_subject")] if other else [],
        portability=[entry for entry in portability if entry["prompt"]],
        source=NAME,
        answered_by=outputs[0].removeprefix("output_") if outputs else None,
    )
