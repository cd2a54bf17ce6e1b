"""EREN (Chen et al. 2024): edits as statements, with questions in and out of their scope. Three files.

`edit_scope` is a list of `[question, answer]`, `edit_scope_true_ans` what was true before, `edit_statement` what the
model shall know.

* CounterFact-Hard: several wordings of one question; `unrelated` asks about neighbours and other facts of the subject.
  Where it has as many true answers as questions, they are paired; elsewhere the questions stand without an answer.
* FEVER: claims answered "yes" or "no". Wordings of the edited claim are rephrases; claims that it makes false are
  portability probes, "no_question".
* HotpotQA: two statements and a question that needs both. Each statement becomes an edit, its prompt up to the first
  form of "to be" (up to the third word where there is none); the question stands in the portability of the last one
  ("multi_hop"), because only then is all of it written. These are true: the edits teach facts.

Statements (of the first two files) and true answers stay in `extra`.
"""

from __future__ import annotations

import re
from typing import Any

from errata.datasets.fields import edit_of, named, probe, required, texts
from errata.edit import Edit, FieldProblem

__all__ = ["KEYS", "NAME", "TRUTH", "read", "recognises"]

NAME = "EREN"
KEYS = "edit_statement, edit_scope"
TRUTH = "either"

_NEIGHBOURS = {"neighbor_subj": "same_relation", "same_subj": "same_subject"}
_CUT = re.compile(r"(.*?\S\s+(?:is|was|are|were))\s+(\S.*)", flags=re.DOTALL)
_THREE_WORDS = re.compile(r"((?:\S+\s+){2}\S+)\s+(\S.*)", flags=re.DOTALL)


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return "edit_scope" in record and ("edit_statement" in record or "edit_scope_true_ans" in record)


def read(record: dict[str, Any]) -> Edit | list[Edit]:
    """A record as an edit, or as one per statement. Raises FieldProblem when a field does not fit."""
    scope = []
    for number, pair in enumerate(required(record, "edit_scope", list)):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise FieldProblem(f"edit_scope.{number}", f"found {pair!r}"[:80], "write [question, answer]")
        scope.append((pair[0], pair[1]))
    if not scope:
        raise FieldProblem("edit_scope", "has no question", "give at least one [question, answer]")
    truths = texts(record, "edit_scope_true_ans")
    if isinstance(record.get("edit_statement"), list):
        return _statements(record, scope)
    question, answer = scope[0]
    source, form = ("FEVER", "fever") if answer in ("yes", "no") else ("CounterFact-Hard", "cfh")
    portability = [probe(asked, other, f"{other}_question") for asked, other in scope if other != answer]
    return edit_of(
        record,
        {"id", "subject_name", "edit_scope", "unrelated"},
        id=named(form, record, "id"),
        prompt=question,
        target=answer,
        subject=record.get("subject_name"),
        ground_truth=truths[0] if truths and truths[0] != answer else None,
        rephrases=[asked for asked, other in scope[1:] if other == answer],
        locality=_unrelated(record),
        portability=portability,
        source=f"{NAME} {source}",
    )


def _unrelated(record: dict[str, Any]) -> list[dict[str, Any]]:
    if "unrelated" not in record:
        return []
    asked = required(record, "unrelated", dict)
    truths = record.get("unrelated_true_ans") or {}
    found = []
    for name in map(str, asked):
        questions = texts(asked, name, "unrelated.")
        answers: list[Any] = list(texts(truths, name, "unrelated_true_ans."))
        if len(answers) != len(questions):
            answers = [None] * len(questions)
        kind = _NEIGHBOURS.get(name, name)
        found += [probe(question, answer, kind) for question, answer in zip(questions, answers, strict=True)]
    return found


def _statements(record: dict[str, Any], scope: list[tuple[str, str]]) -> list[Edit]:
    statements = texts(record, "edit_statement")
    edits = []
    for number, statement in enumerate(statements):
        found = _CUT.fullmatch(statement.strip()) or _THREE_WORDS.fullmatch(statement.strip())
        if found is None:
            raise FieldProblem(f"edit_statement.{number}", f"is too short ({statement!r})", "write a whole sentence")
        last = number == len(statements) - 1
        asked = [probe(question, answer, "multi_hop") for question, answer in scope]
        edits.append(
            edit_of(
                record,
                {"id", "edit_scope", "edit_statement"},
                id=f"{named('hotpot', record, 'id')}-{number + 1}" if record.get("id") else "",
                prompt=found[1],
                target=found[2],
                portability=asked if last else [],
                source=f"{NAME} HotpotQA",
            )
        )
    if not edits:
        raise FieldProblem("edit_statement", "is empty", "give at least one statement")
    return edits
