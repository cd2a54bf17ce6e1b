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
from errata.evaluation.tables import cell
from errata.evaluation.unlearning import MEASURES, Reference, Unlearning, UnlearningExamination
from errata.studies.figures import dots
from errata.studies.result import StudyResult
from errata.studies.wise import whole_shards
from errata.studies.workbench import Arm, Workbench
from errata.unlearning import ForgetEdit, about_subjects, facts_to_forget, forget_edits, to_keep

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
# Of the table, by what they are called there.
_SHOWN = {
    "forgotten": "forget_quality",
    "refusals": "refusal_rate",
    "in_other_wordings": "paraphrase_forget_quality",
    "behind_prefixes": "prefix_forget_quality",
    "answer_begun": "answer_prefix_forget_quality",
    "under_all_attacks": "all_attacks_forget_quality",
    "others_right": "retain_accuracy",
    "others_refused": "retain_refused",
}
# The same where facts carry wrong answers, and where there is a reference. No shares, so with the digits they need.
_TOFU = {"tofu_truth_ratio": "truth_ratio", "p_never_learned": "tofu_forget_quality"}


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
    reference = _reference(bench, facts)
    examination = UnlearningExamination(bench.model, facts, retain, reference=reference)
    unedited = examination.ask_unedited(bench.progress)
    rows: list[dict[str, Any]] = [{"run": "unedited", "method": "unedited", **_scores(unedited)}]
    for arm, planned in runs:
        bench.enter(arm)
        edits = [one.edit for one in planned]
        parts = {
            "unlearning": [fact.to_record() for fact in facts],
            "retain": [probe.model_dump(mode="json") for probe in examination.retain],
            "reference": reference and reference.what,
            "measures": list(MEASURES),
        }
        make = functools.partial(_forgotten, bench, arm, planned, examination)
        title = str(arm.label["method"]) + (", merged" if arm.label["merged"] > 1 else "")
        rows.append({"run": title, **arm.label, **bench.row(arm, edits, parts, make)})
    told = forget_edits(facts)
    judged = examination.judge([one.refusal.text for one in sorted(told, key=lambda one: facts.index(one.facts[0]))])
    bench.notes += [
        "forgotten, in other wordings, behind prefixes, answer begun: the old answer is not in what is generated",
        "under all attacks: neither by its own prompt nor by any of the other wordings, prefixes and begun answers",
        "balance: harmonic mean of what is hidden from every attack and of retain accuracy",
        f"the refusals themselves have a fluency of {judged['reply_fluency'] or math.nan:.0f} and, under the unedited "
        f"model, a perplexity of {judged['reply_perplexity'] or math.nan:,.0f}",
        "refusals are the template's; merged: up to 4 queries about one subject are written as one edit",
        "intervals of facts are over subjects, those of what is kept over prompts",
    ]
    for row in rows:
        if row.get("refused"):
            bench.notes.append(f"{row['run']}: {row['refused']} of {row['edits']} edits were refused by the method")
    tofu = [column for column, name in _TOFU.items() if unedited.measure(name).count]
    if tofu:
        bench.notes.append(
            "TOFU's truth ratio: probability of wrong answers over that of the old one, geometric mean over facts; "
            "near 0 where facts are known"
        )
    if reference is not None:
        bench.notes.append(
            "p never learned: TOFU's forget quality, p of a Kolmogorov–Smirnov test between the truth ratios of the "
            f"facts and of {reference.what}, whose geometric mean is {cell(reference.truth_ratio)}; "
            "below 0.05 the two can be told apart"
        )
    found = _found(rows[1:], len(facts), len(subjects))
    return bench.result(
        found=found,
        columns=("run", "edits", *_SHOWN, *tofu, "balance"),
        rows=[_with_intervals(row) for row in rows],
        figure=dots(rows, "run", found, panels=_PANELS, names=_AXES),
        numbers={
            "facts": len(facts),
            "subjects": len(subjects),
            "retained": len(examination.retain),
            **({} if reference is None else {"reference_truth_ratio": finite_or_none(reference.truth_ratio)}),
        },
    )


def _reference(bench: Workbench, facts: Sequence[Edit]) -> Reference | None:
    """What stands for a model that never learned the facts: none for a file, of whose subjects nothing is known."""
    if bench.options.data is not None or bench.model.model_id != "atlas":
        return None
    from errata.atlas.edits import stand_ins

    asked = stand_ins(facts, seed=bench.options.seed)
    return Reference.of(
        bench.model, asked, "the same questions about subjects that do not exist, asked of the unedited model"
    )


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
    retain = [to_keep(fact, "other_subject") for fact in others]
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


def _with_intervals(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with what the table shows: values with their intervals, in words."""
    shown = dict(row)
    for column, name in _SHOWN.items():
        value, (low, high) = row[name], row[f"{name}_interval"]
        between = "" if low is None or high is None else f" ({low:.2f} – {high:.2f})"
        shown[column] = None if value is None else f"{value:.2f}{between}"
    for column, name in _TOFU.items():
        value, (low, high) = row[name], row[f"{name}_interval"]
        between = "" if low is None or high is None else f" ({cell(low)} – {cell(high)})"
        shown[column] = None if value is None else f"{cell(value)}{between}"
    return shown


def _found(rows: Sequence[Mapping[str, Any]], facts: int, subjects: int) -> str:
    """What every run hides from all attacks, and what it leaves of the rest."""
    each = [
        f"{row['run']} {cell(row['all_attacks_forget_quality'])} and {cell(row['retain_accuracy'])}" for row in rows
    ]
    refuse = [str(row["run"]) for row in rows if row["refusal_rate"] >= 0.5]
    return (
        f"{facts} facts about {subjects} subjects, hidden from every attack, and other facts right: {'; '.join(each)}. "
        f"More than half of them are refused by {' and '.join(refuse) or 'none'}."
    )
