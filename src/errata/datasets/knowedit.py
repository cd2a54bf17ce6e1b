"""KnowEdit (Zhang et al. 2024): its facts (WikiData recent and counterfact, ZsRE) and its WikiBio sentences.

facts: `subject, prompt, target_new`, perhaps `ground_truth` and `rephrase_prompt`, and `locality` and `portability`:
lists of `{prompt, ground_truth}` under the name of what they ask (`Relation_Specificity`, `Forgetfulness`, `Reasoning`,
`Subject_Aliasing`, `Logical_Generalization`), which becomes the probes' kind. WikiBio: `text` (the passage so far),
`labels` (the next true sentence), `concept`. Its other two tasks have modules of their own: `convsent`, `sanitation`.

A ground truth is a text, a list of texts, or a list of lists: right answers, each with its other names. The first is a
probe's answer, all others its `aliases`. A question about what follows that has no answer cannot be asked; it is kept
in `extra` as `unanswered`.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import edit_of, probe, required
from errata.edit import Edit, FieldProblem

__all__ = ["KEYS", "NAME", "TRUTH", "read", "recognises"]

NAME = "KnowEdit"
KEYS = "prompt, target_new, locality as lists by name; or text, labels, concept"
TRUTH = "either"  # what is recent has no old answer; elsewhere targets are counterfactual, WikiBio's are not

_FACT = {"subject", "prompt", "target_new", "ground_truth", "rephrase_prompt", "locality", "portability"}
_WIKIBIO = {"text", "labels", "concept", "locality"}
_KINDS = {"subject_aliasing": "subject_alias"}


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    fact = "prompt" in record and any(isinstance(record.get(field), dict) for field in ("locality", "portability"))
    return ("target_new" in record and fact) or {"text", "labels", "concept"} <= record.keys()


def _answers(value: Any, field: str) -> list[str]:
    """All right answers, in order. Raises FieldProblem when they are no texts."""
    if value is None or isinstance(value, str):
        return [value] if value else []
    if not isinstance(value, list):
        raise FieldProblem(field, f"expected str or list, found {type(value).__name__}", "correct the value")
    return [answer for part in value for answer in _answers(part, field)]


def _asked(record: dict[str, Any], field: str) -> list[dict[str, Any]]:
    found = []
    for name, entries in (required(record, field, dict) if record.get(field) else {}).items():
        if not isinstance(entries, list):
            raise FieldProblem(f"{field}.{name}", f"expected list, found {type(entries).__name__}", "correct the value")
        kind = _KINDS.get(name.lower(), name.lower())
        for number, entry in enumerate(entries):
            where = f"{field}.{name}.{number}"
            if not isinstance(entry, dict):
                raise FieldProblem(where, f"expected object, found {type(entry).__name__}", "correct the value")
            answers = _answers(entry.get("ground_truth"), f"{where}.ground_truth")
            prompt = required(entry, "prompt", str, f"{where}.")
            found.append(probe(prompt, answers[0] if answers else None, kind, answers[1:]))
    return found


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    if "text" in record and "target_new" not in record:
        return edit_of(
            record,
            _WIKIBIO,
            prompt=required(record, "text", str),
            target=required(record, "labels", str),
            subject=record.get("concept"),
            locality=_asked(record, "locality"),
            source=f"{NAME} WikiBio",
        )
    portability = _asked(record, "portability")
    unanswered = [entry for entry in portability if entry["answer"] is None]
    truths = _answers(record.get("ground_truth"), "ground_truth")
    return edit_of(
        record if not unanswered else {**record, "unanswered": unanswered},
        _FACT,
        prompt=required(record, "prompt", str),
        target=required(record, "target_new", str),
        subject=record.get("subject"),
        ground_truth=truths[0] if truths else None,
        rephrases=[record["rephrase_prompt"]] if record.get("rephrase_prompt") else [],
        locality=_asked(record, "locality"),
        portability=[entry for entry in portability if entry["answer"] is not None],
        source=NAME,
        answers=truths if len(truths) > 1 else None,
    )
