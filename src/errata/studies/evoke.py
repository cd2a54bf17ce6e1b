"""EVOKE's question (2410.07819): does an edit overfit, so that its target is said where it is not the answer?

Every edit is made alone. Asked are prompts whose right answer is something else: what follows from the edit, other
facts of the subject, the same relation of other subjects, and these behind the edit's own sentence (distracting).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from errata.edit import Edit
from errata.editors import editor_class
from errata.errors import ConfigError
from errata.evaluation.rankings import rank_answers
from errata.evaluation.tables import cell
from errata.progress import NO_PROGRESS
from errata.studies.figures import dots
from errata.studies.result import StudyResult
from errata.studies.workbench import Arm, Workbench, measured

__all__ = ["evoke"]

_METHODS = ("ft", "rome", "memit", "grace", "memoir")
_SCORES = ("correct", "direct", "overfitting", "modified")


def evoke(bench: Workbench) -> StudyResult:
    """Make every edit alone, and see which answer is likelier where the target is not the right one."""
    names = bench.methods(_METHODS)
    edits = _asked(bench, _edits(bench, bench.count(50, quick=2)))
    rows = []
    for number, name in enumerate(names):
        arm = bench.arm(name)
        bench.enter(arm)
        if not number:
            unedited = bench.row(arm, edits, "overfitting, unedited", functools.partial(_unedited, bench, edits))
            rows += [{"method": "unedited", **row} for row in unedited["kinds"]]
        made = bench.row(arm, edits, "overfitting", functools.partial(_edited, bench, arm, edits))
        if made["refused"]:
            bench.notes.append(f"{name} refused {made['refused']} of the edits; nothing was asked about them")
        rows += [{"method": name, **row} for row in made["kinds"]]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    if not kinds:
        raise ConfigError(
            "no prompt of these edits has an answer that is not the target; EVOKE asks such prompts: give locality or "
            "portability probes with answers"
        )
    before = {row["kind"]: row for row in rows if row["method"] == "unedited"}
    after = [row for row in rows if row["method"] != "unedited" and row["overfitting"] is not None]
    if not after:
        raise ConfigError("every edit was refused by every method; nothing can be compared")
    worst = max(after, key=lambda row: before[row["kind"]]["overfitting"] - row["overfitting"])
    told = {name: [row["overfitting"] for row in after if row["method"] == name] for name in names}
    means = ", ".join(f"{name} {sum(own) / len(own):.2f}" for name, own in told.items() if own)
    found = (
        "After one edit the right answer is likelier than the target in so many prompts where it does not belong "
        f"(mean over kinds): {means}. Worst is {worst['method']} at {worst['kind'].replace('_', ' ')}: "
        f"{cell(worst['overfitting'])}, from {cell(before[worst['kind']]['overfitting'])} before the edit."
    )
    bench.notes += [
        "correct, direct: mean probability per token (geometric) of the right answer and of the target (CAP, DP)",
        "overfitting: share with the right answer likelier than the target (EOS); modified: than the old answer (AMS)",
        "a ranking: a model that says neither answer still prefers one",
    ]
    return bench.result(
        found=found,
        columns=("method", "kind", *_SCORES, "edits"),
        rows=rows,
        figure=dots(
            _by_method(rows, ["unedited", *names], kinds),
            "method",
            found,
            panels=kinds,
            names=dict.fromkeys(kinds, "right answer likelier"),
        ),
    )


def _edits(bench: Workbench, count: int) -> list[Edit]:
    """The file's edits; of atlas's, those of which another fact follows or of whose subject another one is known.

    What asks for the target in another language is left out: its answer is another word than the target, yet the target
    is not wrong there.
    """
    if bench.options.data is not None:
        return bench.edits(count)
    drawn = bench.edits(4 * count)
    telling = [
        edit for edit in drawn if {"two_hop", "same_subject"} & {p.kind for p in (*edit.locality, *edit.portability)}
    ]
    bench.notes.append(
        f"of the first {len(drawn)} edits, those with another fact of their subject, or one that follows"
    )
    return [
        edit.model_copy(update={"portability": tuple(p for p in edit.portability if p.kind != "second_language")})
        for edit in telling[:count]
    ]


def _asked(bench: Workbench, edits: Sequence[Edit]) -> list[Edit]:
    """Edits with their first neighbour once more, behind the edit's own sentence, where the file asks no such thing."""
    if any(probe.kind == "distracting" for edit in edits for probe in edit.locality):
        return list(edits)
    found = []
    for edit in edits:
        near = next((probe for probe in edit.locality if probe.kind == "same_relation" and probe.answer), None)
        if near is not None:
            behind = {"prompt": f"{edit.prompt} {edit.target}. {near.prompt}", "kind": "distracting"}
            edit = edit.model_copy(update={"locality": (*edit.locality, near.model_copy(update=behind))})
        found.append(edit)
    bench.notes.append("distracting: a neighbour's prompt behind the edit's prompt and target, made by this study")
    return found


def _scores(bench: Workbench, edit: Edit) -> dict[str, dict[str, float]]:
    found = rank_answers(bench.model, [edit], progress=NO_PROGRESS).overfitting
    return {kind: {name: getattr(scores, name) for name in _SCORES} for kind, scores in found.items()}


def _rows(per_edit: Sequence[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """A row per kind: a mean per edit first, then over edits."""
    rows = []
    for kind in sorted({kind for own in per_edit for kind in own}):
        own = [scores[kind] for scores in per_edit if kind in scores]
        asked = {name: [one[name] for one in own if not math.isnan(one[name])] for name in _SCORES}
        values: dict[str, Any] = {"kind": kind, "edits": len(own)}
        for name in _SCORES:
            values |= measured(name, asked[name])
        rows.append(values)
    return rows


def _unedited(bench: Workbench, edits: Sequence[Edit]) -> dict[str, Any]:
    bench.progress.start("unedited: ranking answers", len(edits))
    per_edit = []
    for edit in edits:
        per_edit.append(_scores(bench, edit))
        bench.progress.advance()
    return {"kinds": _rows(per_edit)}


def _edited(bench: Workbench, arm: Arm, edits: Sequence[Edit]) -> dict[str, Any]:
    bench.progress.start(f"{arm.label['method']}: getting ready")
    editor = editor_class(arm.method)(bench.model, bench.config(arm))
    per_edit = []
    try:
        editor.prepare(bench.progress)
        empty = editor.adapter.snapshot()
        bench.progress.start(f"{arm.label['method']}: single edits", len(edits))
        for edit in edits:
            if editor.edit([edit]).applied:
                per_edit.append(_scores(bench, edit))
            empty()
            bench.progress.advance()
    finally:
        editor.adapter.detach()
    return {"kinds": _rows(per_edit), "refused": len(edits) - len(per_edit)}


def _by_method(rows: Sequence[dict[str, Any]], methods: Sequence[str], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """One row per method with a column per kind of prompt: the share with the right answer likelier."""
    found = []
    for method in methods:
        own = {row["kind"]: row for row in rows if row["method"] == method}
        row: dict[str, Any] = {"method": method}
        for kind in kinds:
            row[kind] = own[kind]["overfitting"] if kind in own else None
            row[f"{kind}_interval"] = own[kind].get("overfitting_interval") if kind in own else None
        found.append(row)
    return found
