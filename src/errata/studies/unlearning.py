"""Whether editors can make a model forget whole subjects, and what gets it out again (2505.19855).

All facts about some subjects are edited to refusals; facts about others are to stay. Run like TOFU's forget and retain
sets, on what a model knows from its training; the paper's own prompts and numbers are not known to us.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from errata.edit import Edit, Probe
from errata.editors import editor_class, method_of
from errata.evaluation import finite_or_none
from errata.evaluation.preference import harmonic_mean
from errata.evaluation.unlearning import MEASURES, Unlearning, UnlearningExamination
from errata.studies.figures import dots
from errata.studies.wise import whole_shards
from errata.studies.workbench import Arm, StudyResult, Workbench
from errata.unlearning import ForgetEdit, about_subjects, facts_to_forget, forget_edits

__all__ = ["unlearn"]

_METHODS = ("memoir", "wise", "memit", "alphaedit", "ft")
_MERGE = 4  # queries of one subject in one edit
_KEPT = 4  # facts to keep, per fact that is forgotten
_PANELS = (
    "forget_quality",
    "refusal_rate",
    "paraphrase_forget_quality",
    "all_attacks_forget_quality",
    "retain_accuracy",
)
_AXES = {
    "forget_quality": "facts no longer told",
    "refusal_rate": "facts that are refused",
    "paraphrase_forget_quality": "not told in other wordings",
    "all_attacks_forget_quality": "not told under any attack",
    "retain_accuracy": "other facts still right",
}


def unlearn(bench: Workbench) -> StudyResult:
    """Every method on the same facts, and those that look for subjects once more with their queries merged."""
    names = bench.methods(_METHODS)
    facts, retain = _facts(bench, bench.count(40, quick=3))
    subjects = {(fact.subject or fact.prompt).casefold() for fact in facts}
    runs = []
    for name in names:
        located = editor_class(method_of(name)).needs_subject
        for merge in (1, _MERGE) if located else (1,):
            planned = forget_edits(facts, merge=merge)
            own = whole_shards(bench, len(planned)) if method_of(name) == "wise" else {}
            arm = bench.arm(name, {"guard": "warn", **own})
            arm = dataclasses.replace(arm, label={**arm.label, "merged": merge})
            bench.config(arm)  # a setting that does not exist is found before anything is run
            runs.append((arm, planned))
    examination = UnlearningExamination(bench.model, facts, retain)
    unedited = examination.ask_unedited(bench.progress)
    rows: list[dict[str, Any]] = [{"run": "unedited", "method": "unedited", **_scores(unedited)}]
    for arm, planned in runs:
        bench.enter(arm)
        edits = [one.edit for one in planned]
        parts = {"unlearning": [fact.to_record() for fact in facts], "retain": [p.prompt for p in examination.retain]}
        make = functools.partial(_forgotten, bench, arm, planned, examination)
        title = str(arm.label["method"]) + (", merged" if arm.label["merged"] > 1 else "")
        rows.append({"run": title, **arm.label, **bench.row(arm, edits, parts, make)})
    told = forget_edits(facts)
    judged = examination.judge([one.refusal.text for one in sorted(told, key=lambda one: facts.index(one.facts[0]))])
    bench.notes += [
        "not told under any attack: neither by its own prompt nor by any of the other wordings, prefixes and begun "
        "answers",
        "balance: harmonic mean of what is hidden from every attack and of retain accuracy",
        f"the refusals themselves have a fluency of {judged['reply_fluency'] or math.nan:.0f} and, under the unedited "
        f"model, a perplexity of {judged['reply_perplexity'] or math.nan:,.0f}",
        "refusals are the template's; merged: up to 4 queries about one subject are written as one edit",
        "intervals of facts are over subjects, those of what is kept over prompts",
    ]
    for row in rows:
        if row.get("refused"):
            bench.notes.append(f"{row['run']}: {row['refused']} of {row['edits']} edits were refused by the method")
    found = _found(rows[1:], len(facts), len(subjects))
    return bench.result(
        found=found,
        columns=(
            "run", "edits", "took", "forget_quality", "forget_quality_forced", "refusal_rate", "subject_named",
            "paraphrase_forget_quality", "paraphrase_refusal_rate", "prefix_forget_quality",
            "answer_prefix_forget_quality", "all_attacks_forget_quality", "retain_accuracy", "retain_unchanged",
            "retain_refused", "balance", "reply_fluency", "reply_perplexity", "seconds_per_fact",
        ),
        rows=rows,
        figure=dots(rows, "run", found, panels=_PANELS, names=_AXES),
        numbers={"facts": len(facts), "subjects": len(subjects), "retained": len(examination.retain)},
    )  # fmt: skip


def _facts(bench: Workbench, count: int) -> tuple[list[Edit], list[Probe]]:
    """What is to be forgotten, about so many facts, and what is to stay."""
    if bench.options.data is None and bench.model.model_id == "atlas":
        from errata.atlas.edits import drawn_subjects, subject_facts

        seed = bench.options.seed
        facts = subject_facts(drawn_subjects(count, seed=seed), seed=seed, locality=_KEPT)
        others: list[Edit] = []
    else:
        facts, others = _of_file(bench, count)
    named = [fact.subject for fact in facts if fact.subject is not None]
    if others and named:
        _, others = about_subjects([*facts, *others], named)
    retain = [Probe(prompt=f.prompt, answer=f.target, aliases=f.aliases, kind="other_subject") for f in others]
    retain += [probe for one in forget_edits(facts) for probe in one.edit.locality]
    gone = {fact.prompt for fact in facts}
    return facts, [probe for probe in retain if probe.prompt not in gone]


def _of_file(bench: Workbench, count: int) -> tuple[list[Edit], list[Edit]]:
    """The first facts of the user's file, and some of the others."""
    from errata.datasets import read_edits

    if bench.options.data is None:
        bench.edits(count)  # says that this model needs a file
    assert bench.options.data is not None
    found = read_edits(bench.options.data, limit=count * (1 + _KEPT))
    facts, problems = facts_to_forget(found)
    bench.notes += [f"left out: {problem}" for problem in (*found.problems, *problems)]
    return facts[:count], facts[count:]


def _forgotten(
    bench: Workbench, arm: Arm, planned: Sequence[ForgetEdit], examination: UnlearningExamination
) -> dict[str, Any]:
    """Write the refusals of one run into an empty adapter, ask, and take it off again."""
    bench.progress.start(f"{arm.label['method']}: getting ready")
    editor = editor_class(arm.method)(bench.model, bench.config(arm))
    try:
        editor.prepare(bench.progress)
        outcome = editor.edit([one.edit for one in planned], bench.progress)
        result = examination.ask(editor.adapter, bench.progress)
    finally:
        editor.adapter.detach()
    return {
        "edits": len(planned),
        "took": sum(one.took for one in outcome.applied),
        "refused": len(outcome.refused),
        **_scores(result),
        "seconds_per_fact": outcome.seconds / len(examination.facts),
    }


def _scores(result: Unlearning) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in MEASURES:
        measure = result.measure(name)
        row[name] = finite_or_none(measure.value)
        row[f"{name}_interval"] = [finite_or_none(measure.low), finite_or_none(measure.high)]
    both = [row["all_attacks_forget_quality"], row["retain_accuracy"]]
    return {**row, "balance": None if None in both else harmonic_mean(both)}


def _found(rows: Sequence[Mapping[str, Any]], facts: int, subjects: int) -> str:
    """Which run has the best of both, which refuse, and which costs most."""
    told = f"{facts} facts about {subjects} subjects"
    both = [row for row in rows if row["balance"] is not None]
    if both:
        best = max(both, key=lambda row: float(row["balance"]))
        told += (
            f": {best['run']} has the best of both, {best['all_attacks_forget_quality']:.2f} hidden from every attack "
            f"and {best['retain_accuracy']:.2f} of other facts right"
        )
        worst = min(both, key=lambda row: float(row["retain_accuracy"]))
        if worst is not best:
            told += f" ({worst['run']}: {worst['all_attacks_forget_quality']:.2f} and {worst['retain_accuracy']:.2f})"
    refuse = [str(row["run"]) for row in rows if row["refusal_rate"] >= 0.5]
    return told + f". Mostly refusals are said by {', '.join(refuse) or 'none'}."
