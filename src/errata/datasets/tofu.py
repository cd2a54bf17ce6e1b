"""TOFU (Maini et al. 2024): questions about invented authors, real authors and the world; and any file of plain
questions with answers.

`question, answer`, in some files `perturbed_answer`, wrong ones in the words of the right one, and
`paraphrased_answer`, the right one in other words; both stay in `extra`. These are facts, not corrections: the target
is the true answer. To unlearn them, give them another target, such as a sentence of TOFU's own file of refusals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from errata.datasets.fields import edit_of, required
from errata.edit import Edit, FieldProblem, Probe

__all__ = ["KEYS", "NAME", "TruthQuestion", "read", "recognises", "truth_question"]

NAME = "questions with answers"
KEYS = "question, answer (TOFU)"


@dataclass(frozen=True)
class TruthQuestion:
    """What a truth ratio is asked with: a right answer and wrong ones behind one prompt."""

    prompt: str
    right: str
    wrong: tuple[str, ...]


def truth_question(asked: Edit | Probe) -> TruthQuestion | None:
    """The question of a record that carries wrong answers, whatever its form: `perturbed_answer`, a text or a list.

    The right answer is `paraphrased_answer`, as the published one is told in the words of training; where a record has
    none, it is the target of a fact or the answer of a probe, as in TOFU's own files of real authors and the world.

    Returns:
        None where there is no wrong answer, or no right one.

    Raises:
        FieldProblem: one of the two fields holds something else than text.
    """
    kept = asked.extra if isinstance(asked, Edit) else (asked.model_extra or {})
    known = asked.target if isinstance(asked, Edit) else asked.answer
    wrong = kept.get("perturbed_answer") or []
    wrong = [wrong] if isinstance(wrong, str) else wrong
    if not isinstance(wrong, list | tuple) or not all(isinstance(text, str) and text.strip() for text in wrong):
        raise FieldProblem(
            "perturbed_answer",
            f"expected wrong answers, found {wrong!r}",
            'write them as ["Bob", "Eve"], or leave it out',
        )
    right = kept.get("paraphrased_answer") or known
    if right is not None and not (isinstance(right, str) and right.strip()):
        raise FieldProblem("paraphrased_answer", f"expected a text, found {right!r}", "correct it, or leave it out")
    if not wrong or right is None:
        return None
    return TruthQuestion(asked.prompt, right.strip(), tuple(text.strip() for text in wrong))


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    # Other benchmarks have the same two keys for answers that are numbers or lists.
    return isinstance(record.get("question"), str) and isinstance(record.get("answer"), str)


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    edit = edit_of(
        record,
        {"question", "answer"},
        prompt=required(record, "question", str),
        target=required(record, "answer", str),
        source=NAME,
    )
    truth_question(edit)  # says what does not fit
    return edit
