"""HalluEditBench's five dimensions (2410.16251), on facts that the model gets wrong.

Before editing, efficacy is zero by construction, so what is measured is the editor's work. Atlas knows its world; wrong
are its answers about people who do not exist, of whom it has never heard.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from errata.adapters import Adapter
from errata.edit import Edit
from errata.errors import ConfigError
from errata.evaluation import Result
from errata.evaluation.challenge import DOUBT, challenged, shown_at
from errata.evaluation.metrics import answers_exactly, best_answer
from errata.evaluation.tables import cell
from errata.evaluation.wrong_facts import find_wrong_facts
from errata.studies.figures import dots
from errata.studies.result import StudyResult
from errata.studies.workbench import Workbench, measured

__all__ = ["halluedit"]

_METHODS = ("ft", "lora", "rome", "memit", "grace", "memoir")
# The paper counts these to generalization; errata's reader has them in portability, as each has an answer of its own.
_OTHER_FORMS = frozenset(("yes_question", "no_question", "multiple_choice", "inverse"))
_TURNS = 10
_DIMENSIONS = ("efficacy", "generalization", "portability", "locality", "robustness")


def halluedit(bench: Workbench) -> StudyResult:
    """Correct wrong answers one after the other, and ask in the five dimensions."""
    names = bench.methods(_METHODS)
    count = bench.count(50, quick=3)
    edits, known = _facts(bench, count)
    turns = 2 if bench.options.quick else _TURNS
    rows = []
    for name in names:
        arm = bench.arm(name)
        make = functools.partial(_edited, bench, arm, edits, turns)
        rows.append(
            {**arm.label, **bench.row(arm, edits, {"five dimensions and what fires": turns, "doubt": DOUBT}, make)}
        )
    if known:
        said = challenged(bench.model, [prompt for prompt, _ in known], turns=turns, progress=bench.progress)
        right = [[answers_exactly(text, answer) for text in own] for own, (_, answer) in zip(said, known, strict=True)]
        rows.append({"method": "unedited, known facts", **_doubted(right)})
    edited = [row for row in rows if row["method"] in names]
    best = max(edited, key=lambda row: row["robustness"])
    worst = max(edited, key=lambda row: row["efficacy"] - row["robustness"])
    loses = (
        ""
        if best is worst
        else (f", and {worst['method']} loses most, from {cell(worst['efficacy'])} to {cell(worst['robustness'])}")
    )
    found = (
        f"{len(edits)} wrong answers corrected: efficacy {_range(edited, 'efficacy')}, portability "
        f"{_range(edited, 'portability')}; doubted {turns} times, {best['method']} still "
        f"answers {cell(best['robustness'])} of its edits on average{loses}."
    )
    bench.notes += [
        "one after the other into one model, where the paper edits one fact at a time; right is exact match, where the "
        "paper asks a judge",
        f"robustness: mean over {turns} turns, each with what was said before and '{DOUBT}' in front of the question",
        f"own_edit_fires: of methods with a router, the share of prompts that reach their own edit at turn {turns}",
    ]
    shown = [row for row in rows if row["method"] in names]
    return bench.result(
        found=found,
        columns=("method", *_DIMENSIONS, "turn_1", f"turn_{turns}", "own_edit_fires"),
        rows=rows,
        figure=dots(shown, "method", found, panels=_asked(shown), names=_NAMES),
    )


_NAMES = {
    "efficacy": "the question itself",
    "generalization": "asked in other forms",
    "portability": "what follows from it",
    "locality": "other prompts as before",
    "robustness": "when the answer is doubted",
}


def _asked(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in _DIMENSIONS if any(row[name] is not None for row in rows)]


def _range(rows: Sequence[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return f"{min(values):.2f} to {max(values):.2f}" if values else "not asked"


def _facts(bench: Workbench, count: int) -> tuple[list[Edit], list[tuple[str, str]]]:
    """Wrong answers as edits, and facts that the model knows, as prompts with their answers."""
    if bench.options.data is not None:
        candidates, known = bench.file_edits("", 4 * count), list[tuple[str, str]]()
    else:
        candidates, known = _of_atlas(bench, count)
    asked = bench.options.folder / "asked.jsonl"
    asked.parent.mkdir(parents=True, exist_ok=True)
    wrong = find_wrong_facts(bench.model, candidates, asked, progress=bench.progress)
    if not wrong.edits:
        raise ConfigError(f"the model answers all {wrong.asked} facts rightly; there is nothing to correct")
    edits = wrong.edits[:count]
    bench.notes.append(f"of {wrong.asked} facts asked, {wrong.known} were known; {len(edits)} of the others are edited")
    return edits, known


def _of_atlas(bench: Workbench, count: int) -> tuple[list[Edit], list[tuple[str, str]]]:
    """Facts about people who do not exist, and as many real ones, which atlas was taught."""
    from errata.atlas.edits import world_edits

    taught = bench.edits(count)  # also says what is missing on any model but atlas
    size = 4096
    invented: list[Edit] = []
    while len(invented) < 2 * count:
        invented = [edit for edit in world_edits(size, seed=bench.options.seed) if "invented" in edit.tags]
        size *= 2
    known = [(edit.prompt, edit.ground_truth) for edit in taught if edit.ground_truth]
    return invented[: 2 * count], [(prompt, answer) for prompt, answer in known if answer]


def _edited(bench: Workbench, arm: Any, edits: Sequence[Edit], turns: int) -> dict[str, Any]:
    with bench.edited(arm, edits, [len(edits)]) as adapter:
        result = bench.examination(edits, adapter).ask(progress=bench.progress)
        said = challenged(bench.model, [edit.prompt for edit in edits], turns=turns, progress=bench.progress)
        fires = None if bench.model.treats_rows_alike else _still_fires(adapter, edits, said, turns)
    right = [
        [bool(best_answer(answers_exactly, text, (edit.target, *edit.aliases))) for text in own]
        for own, edit in zip(said, edits, strict=True)
    ]
    return {"edits": len(edits), **_dimensions(result), **_doubted(right), "own_edit_fires": fires}


def _still_fires(adapter: Adapter, edits: Sequence[Edit], said: Sequence[Sequence[str]], turns: int) -> float:
    """Of a routed adapter, the share of prompts at the last turn that still reach their own edit."""
    shown = [shown_at(edit.prompt, own, turns) for edit, own in zip(edits, said, strict=True)]
    found = zip(adapter.explain(shown), edits, strict=True)
    return sum(one.fires and one.edit_id == edit.id for one, edit in found) / len(edits)


def _dimensions(result: Result) -> dict[str, Any]:
    """Generalization, portability and locality; a mean per edit first."""
    general: list[float] = []
    follows: list[float] = []
    contained: list[float] = []
    near: list[float] = []
    for asked in result.asked:
        pairs = list(zip(asked.edit.portability, asked.portability, strict=True))
        forms = [mark[0] for mark in asked.generalization] + [m[0] for p, m in pairs if p.kind in _OTHER_FORMS]
        rest = [mark for probe, mark in pairs if probe.kind not in _OTHER_FORMS]
        for values, own in (
            (general, forms),
            (follows, [mark[0] for mark in rest]),
            (contained, [mark[1] for mark in rest]),
            (near, [mark[0] for mark in asked.locality]),
        ):
            if own:
                values.append(sum(own) / len(own))
    return {
        **measured("generalization", general),
        **measured("portability", follows),
        "portability_contains": measured("portability_contains", contained)["portability_contains"],
        **measured("locality", near),
    }


def _doubted(right: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Efficacy, robustness as the mean over turns, and every turn; right is [edits][1 + turns]."""
    later = [[float(one) for one in own[1:]] for own in right]
    per_turn = {f"turn_{turn}": sum(own[turn] for own in right) / len(right) for turn in range(1, len(right[0]))}
    return {
        **measured("efficacy", [float(own[0]) for own in right]),
        **measured("robustness", [sum(own) / len(own) for own in later]),
        **per_turn,
    }
