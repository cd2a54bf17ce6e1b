"""MQuAKE (Zhong et al. 2023), and AKEW's part of it: multi-hop questions after one or several edits.

A case has one to four rewrites (`requested_rewrite`, a list), three multi-hop `questions` with `new_answer`, and the
single hops of the new chain (`new_single_hops`). Each rewrite becomes an edit, whose question is a rephrase. What the
case asks stands at its last edit, because only then is all of it written: the multi-hop questions in the portability
("multi_hop", the wordings of one question, in one group), and the hops that no rewrite of the case touches in the
locality ("single_hop", their answers stay). A run that is asked between two edits of a case thus never asks a
question that cannot be answered yet.

Every edit has the case's number (`case_id`) and its own rewrite in `extra`; the rest of the case, such as the two
chains, is kept at its last edit. The cases are independent: two of them may rewrite one fact differently, which is
reported as a contradiction.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import edit_of, filled, probe, required, texts
from errata.edit import Edit, FieldProblem, Probe

__all__ = ["KEYS", "NAME", "TRUTH", "chain", "read", "recognises"]

NAME = "MQuAKE"
KEYS = "requested_rewrite as a list, questions, new_answer"
TRUTH = "ground_truth"

_USED = {"requested_rewrite", "questions", "new_answer", "new_answer_alias"}


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return isinstance(record.get("requested_rewrite"), list) or {"questions", "new_single_hops"} <= record.keys()


def _object(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldProblem(field, f"expected object, found {type(value).__name__}", "correct the value")
    return value


def read(record: dict[str, Any]) -> list[Edit]:
    """A case as its edits. Raises FieldProblem when a field does not fit."""
    rewrites = required(record, "requested_rewrite", list)
    if not rewrites:
        raise FieldProblem("requested_rewrite", "is empty", "give at least one rewrite")
    case = record.get("case_id")
    answer, aliases = required(record, "new_answer", str), texts(record, "new_answer_alias")
    multi_hop = [
        probe(question, answer, "multi_hop", aliases, group="multi_hop") for question in texts(record, "questions")
    ]
    edits = []
    touched = set()
    for number, value in enumerate(rewrites):
        where = f"requested_rewrite.{number}."
        rewrite = _object(value, where[:-1])
        subject = required(rewrite, "subject", str, where)
        prompt = filled(required(rewrite, "prompt", str, where), subject, f"{where}prompt")
        new, true = (
            required(required(rewrite, name, dict, where), "str", str, f"{where}{name}.")
            for name in ("target_new", "target_true")
        )
        question = rewrite.get("question")
        touched |= {prompt, question}
        last = number == len(rewrites) - 1
        edits.append(
            edit_of(
                record if last else {},
                _USED | {"case_id"},
                id="" if case is None else f"mquake-{case}-{number + 1}",
                prompt=prompt,
                target=new,
                subject=subject,
                ground_truth=true,
                rephrases=[question] if question else [],
                locality=_single_hops(record, touched) if last else [],
                portability=multi_hop if last else [],
                source=NAME,
                case_id=case,
                requested_rewrite=rewrite,
            )
        )
    return edits


def chain(edit: Edit) -> list[Probe]:
    """All single hops of a case's new chain, edited or not, at its last edit; empty at every other edit.

    Empty too where the file gave none, or one without question or answer.
    """
    hops = edit.extra.get("new_single_hops")
    try:
        found = [_object(hop, "new_single_hops") for hop in hops] if isinstance(hops, list) else []
        return [
            Probe.model_validate(
                probe(required(hop, "question", str), required(hop, "answer", str), "hop", texts(hop, "answer_alias"))
            )
            for hop in found
        ]
    except (FieldProblem, ValueError):  # what no rewrite touches was checked when it was read; this is of edited hops
        return []


def _single_hops(record: dict[str, Any], touched: set[Any]) -> list[dict[str, Any]]:
    """The hops of the new chain that no rewrite says anything about."""
    found = []
    hops = required(record, "new_single_hops", list) if "new_single_hops" in record else []
    for number, value in enumerate(hops):
        where = f"new_single_hops.{number}"
        hop = _object(value, where)
        if touched & {hop.get("question"), hop.get("cloze")}:
            continue
        question, answer = (required(hop, field, str, f"{where}.") for field in ("question", "answer"))
        more = {"cloze": hop["cloze"]} if "cloze" in hop else {}
        found.append(probe(question, answer, "single_hop", texts(hop, "answer_alias", f"{where}."), **more))
    return found
