"""Is a memory that reads edits an editor? MemoryLLM (2402.04624) beside methods that write weights or route prompts.

Every edit is read as the statement that its prompt and target make. It is asked about alone, each time from an empty
pool, and after a short sequence. What the statement does in front of the prompt, where the model may read it word for
word, stands beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.adapters.pool import window_of
from errata.edit import Edit
from errata.editors import editor_class, method_of
from errata.evaluation import Examination, Result, run_singles
from errata.evaluation.tables import cell
from errata.model.generation import Written
from errata.progress import NO_PROGRESS, Progress
from errata.studies.figures import dots
from errata.studies.memory_pools import METHOD, Pools
from errata.studies.result import Published, StudyResult
from errata.studies.wise import whole_shards
from errata.studies.workbench import PROPERTIES, Arm, Workbench, properties

__all__ = ["edits"]

_METHODS = (METHOD, "memoir", "wise", "rome", "ft")
_IN_SEQUENCE = 20
_IN_PROMPT, _UNEDITED = "in the prompt", "unedited"
_NAMES = {
    "reliability": "edits that are answered",
    "generalization": "other wordings that are answered",
    "locality": "other prompts left as they were",
    "portability": "what follows is answered",
}
_SOURCE = "MemoryLLM (2402.04624), Llama-2-7B: efficacy, generalization and specificity as the paper scores them"
_PUBLISHED = {
    "memoryllm, ZsRE": (0.998, 0.967, 0.571),
    "memoryllm, CounterFact": (0.985, 0.822, 0.570),
}


@dataclass
class _BehindText(Examination):
    """Asks every prompt behind a text, and compares with what was said without it.

    Attributes:
        in_front: the text; empty while the unedited model is asked.
    """

    in_front: str = ""

    def _behind(self, prompt: str) -> str:
        return f"{self.in_front} {prompt}" if self.in_front else prompt

    def _generate(self, prompts: Sequence[str], progress: Progress = NO_PROGRESS) -> dict[str, Written]:
        written = super()._generate([self._behind(prompt) for prompt in prompts], progress)
        return {prompt: written[self._behind(prompt)] for prompt in prompts}

    def _forced(
        self, pairs: Sequence[tuple[str, str]], written: Mapping[str, Written]
    ) -> dict[tuple[str, str], tuple[int, ...]]:
        behind = {pair: (self._behind(pair[0]), pair[1]) for pair in pairs}
        found = super()._forced(list(behind.values()), {self._behind(prompt): one for prompt, one in written.items()})
        return {pair: found[own] for pair, own in behind.items()}


def edits(bench: Workbench) -> StudyResult:
    """Edits made alone and in a sequence, by a memory and by other methods, and said in the prompt."""
    names = bench.methods(_METHODS)
    asked = bench.edits(bench.count(50, quick=3))
    sequence = asked[: 2 if bench.options.quick else _IN_SEQUENCE]
    arms = {name: _arm(bench, name) for name in names}
    for arm in arms.values():
        bench.config(arm)
    alone, together = "alone", f"{len(sequence)} in sequence"
    rows: list[dict[str, Any]] = []
    for name, arm in arms.items():
        first, later = _shards(bench, arm, 1), _shards(bench, arm, len(sequence))
        bench.enter(first)
        single = bench.row(first, asked, "alone", functools.partial(_alone, bench, first, asked))
        last = bench.row(later, sequence, "in sequence", functools.partial(_in_sequence, bench, later, sequence))
        rows += [{"method": name, "edits_made": alone, **single}, {"method": name, "edits_made": together, **last}]
    first_arm = next(iter(arms.values()))
    row = bench.row(first_arm, asked, "said alone", functools.partial(_said_alone, bench, asked))
    rows.append({"method": _IN_PROMPT, "edits_made": alone, **row})
    row = bench.row(first_arm, sequence, "said together", functools.partial(_said_together, bench, sequence))
    rows.append({"method": _IN_PROMPT, "edits_made": together, **row})
    row = bench.row(first_arm, asked, _UNEDITED, functools.partial(_unedited, bench, asked))
    rows.append({"method": _UNEDITED, "edits_made": "none", **row})
    return _result(bench, rows, len(asked), together)


def _result(bench: Workbench, rows: Sequence[dict[str, Any]], count: int, together: str) -> StudyResult:
    for row in rows:
        row["run"] = _UNEDITED if row["method"] == _UNEDITED else f"{row['method']}, {row['edits_made']}"
        if row["refused"]:
            bench.notes.append(f"{row['run']}: {row['refused']} edits were refused; they are asked about all the same")

    def told(when: str) -> str:
        own = [row for row in rows if row["edits_made"] == when]
        return ", ".join(
            f"{row['method']} {cell(row['reliability'])}/{cell(row['generalization'])}/{cell(row['locality'])}"
            for row in own
        )

    sentence = (
        f"Reliability/generalization/locality of {count} edits made alone: {told('alone')}; of {together}: "
        f"{told(together)}."
    )
    bench.notes += [
        "alone: each edit is made from an empty memory and taken back; in sequence: one after the other, all asked in "
        "the end",
        f"{_IN_PROMPT}: nothing is edited; the statements that memoryllm reads stand in front of every prompt, in "
        "sequence all of them, or the newest that fit in the model's positions",
    ]
    asked = [name for name in _NAMES if any(row[name] is not None for row in rows)]
    return bench.result(
        found=sentence,
        columns=("method", "edits_made", *PROPERTIES, "near_locality", "portability",
                 *(f"{name}_forced" for name in (*PROPERTIES, "portability")), "edits"),
        rows=rows,
        figure=dots(rows, "run", sentence, panels=asked, names=_NAMES),
        published=[
            Published(what, dict(zip(PROPERTIES, values, strict=True)), _SOURCE)
            for what, values in _PUBLISHED.items()
            if METHOD in {row["method"] for row in rows}
        ],
    )  # fmt: skip


def _arm(bench: Workbench, name: str) -> Arm:
    """A memory's arm is told from others by its network too: the folder that holds it may hold another one later."""
    arm = bench.arm(name)
    if method_of(name) != METHOD:
        return arm
    return Arm({**arm.label, "network": Pools(bench, arm, "", 0).network.digest()[:8]}, arm.method, arm.settings)


def _shards(bench: Workbench, arm: Arm, count: int) -> Arm:
    """WISE merges what is full, so its shards are made for as many edits as there are."""
    if arm.method != "wise":
        return arm
    return Arm(arm.label, arm.method, {**whole_shards(bench, count), **arm.settings})


def _record(result: Result, refused: int) -> dict[str, Any]:
    record = result.to_record()
    follows = record["portability"]
    return {
        **properties(record),
        "portability": follows["generated"],
        "portability_interval": follows["generated_interval"],
        "portability_forced": follows["teacher_forced"],
        "refused": refused,
    }


def _alone(bench: Workbench, arm: Arm, asked: Sequence[Edit]) -> dict[str, Any]:
    bench.progress.start(f"{arm.label['method']}: getting ready")
    editor = editor_class(arm.method)(bench.model, bench.config(arm))
    try:
        made = run_singles(editor, Examination(bench.model, asked), bench.progress)
    finally:
        editor.adapter.detach()
    return _record(made.result, made.refused)


def _in_sequence(bench: Workbench, arm: Arm, asked: Sequence[Edit]) -> dict[str, Any]:
    (run,) = bench.run([arm], asked, [len(asked)])
    with bench.edited(arm, asked, [len(asked)]) as adapter:
        return _record(bench.examination(asked, adapter).ask(progress=bench.progress), run["refused"])


def _unedited(bench: Workbench, asked: Sequence[Edit]) -> dict[str, Any]:
    return _record(Examination(bench.model, asked).ask_unedited(bench.progress), 0)


# --- in the prompt ----------------------------------------------------------------------------------------------------


def _statement(edit: Edit) -> str:
    """An edit as memoryllm reads it, with a full stop, since something follows."""
    return f"{edit.prompt} {edit.target}."


def _said_alone(bench: Workbench, asked: Sequence[Edit]) -> dict[str, Any]:
    """Each edit's statement in front of what is asked about it."""
    examination = _BehindText(bench.model, asked)
    examination.ask_base(progress=bench.progress)
    bench.progress.start(f"{_IN_PROMPT}: single edits", len(asked))
    found = []
    for edit in asked:
        examination.in_front = _statement(edit)
        found += examination.ask([edit]).asked
        bench.progress.advance()
    return _record(Result(found), 0)


def _said_together(bench: Workbench, asked: Sequence[Edit]) -> dict[str, Any]:
    """All statements in front of every prompt, or the newest ones that fit."""
    examination = _BehindText(bench.model, asked)
    examination.ask_base(progress=bench.progress)
    probes = [probe for edit in asked for probe in (*edit.locality, *edit.portability)]
    texts = [(edit.prompt, edit.target) for edit in asked] + [(one.prompt, one.answer or "") for one in probes]
    texts += [(text, edit.target) for edit in asked for text in edit.rephrases]
    window, model = window_of(bench.model), bench.model
    longest = max(texts, key=lambda pair: len(model.passage(*pair).ids))
    statements = [_statement(edit) for edit in asked]
    while window is not None and statements:
        prompt = f"{' '.join(statements)} {longest[0]}"
        if len(model.passage(prompt, longest[1]).ids) + examination.max_new_tokens <= window:
            break
        del statements[0]
    examination.in_front = " ".join(statements)
    return {**_record(examination.ask(asked, bench.progress), 0), "statements": len(statements)}
