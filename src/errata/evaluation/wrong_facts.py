"""Edits that are needed: facts that this very model gets wrong.

Benchmarks ask a model to unlearn what it knows, or to learn what it knew already; then an editor's efficacy is partly
the model's. HalluEditBench (Huang et al. 2025) edits what the model answers wrongly: its efficacy before editing is
zero by construction. Here every fact's prompt is asked once, greedily and alone, and an answer is right by the same
rule that scores reliability (`metrics.answers_exactly`).

Answers are kept in a file as they come, so that a run which is killed goes on with the rest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from errata.edit import Edit
from errata.errors import ConfigError
from errata.evaluation.metrics import answers_exactly, contains
from errata.evaluation.provenance import run_provenance
from errata.evaluation.rows import RowFile, digest
from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress

__all__ = ["WrongFacts", "find_wrong_facts"]

_AT_ONCE = 256  # prompts between two notes on disk; `generate` makes its batches of them


@dataclass(frozen=True)
class WrongFacts:
    """What asking gave.

    Attributes:
        asked: how many facts were asked, in this run and earlier ones.
        known: how many of them the model answered rightly.
        mentioned: how many of the others have the answer somewhere in what the model wrote.
        edits: the facts it got wrong, in order; the target is the true answer, the ground truth what the model said.
    """

    asked: int
    known: int
    mentioned: int
    edits: list[Edit]


def find_wrong_facts(
    model: EditableModel,
    facts: Sequence[Edit],
    asked: Path,
    *,
    max_new_tokens: int = 32,
    progress: Progress = NO_PROGRESS,
) -> WrongFacts:
    """Ask a model about facts, and keep those it gets wrong as edits.

    Where a fact has several right answers (`extra["answers"]`, as in ZsRE), any of them is right.

    Args:
        model: the unedited model.
        facts: edits whose target is the true answer.
        asked: the file that keeps the answers; one found there is gone on with.
        max_new_tokens: longest answer, the same for every question.

    Raises:
        ConfigError: the file keeps answers of another model or of other settings.
        ArtifactError: the file is damaged.
    """
    rows = RowFile(asked, {"of", "prompt", "said"})
    of = digest(json.dumps([run_provenance(model), max_new_tokens], sort_keys=True))
    said: dict[str, str] = {}
    for row in rows.read():
        if row["of"] != of:
            raise ConfigError(
                f"{asked} keeps answers of another model, precision, device, version or --max-new-tokens; delete it, "
                "or write to another file"
            )
        said[row["prompt"]] = row["said"]
    prompts = list(dict.fromkeys(fact.prompt for fact in facts))
    waiting = [prompt for prompt in prompts if prompt not in said]
    progress.start("asking for facts", len(prompts), done=len(prompts) - len(waiting))
    for start in range(0, len(waiting), _AT_ONCE):
        part = waiting[start : start + _AT_ONCE]
        for prompt, text in zip(part, model.generate(part, max_new_tokens=max_new_tokens), strict=True):
            said[prompt] = rows.append({"of": of, "prompt": prompt, "said": text})["said"]
        progress.advance(len(part))
    wrong, mentioned = [], 0
    for fact in facts:
        text, answers = said[fact.prompt], _right_answers(fact)
        if not any(answers_exactly(text, answer) for answer in answers):
            mentioned += any(contains(text, answer) for answer in answers)
            wrong.append(fact.model_copy(update={"ground_truth": text.strip() or None}))
    return WrongFacts(len(facts), len(facts) - len(wrong), mentioned, wrong)


def _right_answers(fact: Edit) -> list[str]:
    """The target by all its names, and the others where the record lists several right answers of which it is one."""
    listed = fact.extra.get("answers")
    others = [answer for answer in listed if isinstance(answer, str)] if isinstance(listed, list) else []
    return [fact.target, *fact.aliases, *(others if fact.target in others else ())]
