"""What weight editors do with one edit at a time, before any two of them meet.

Paper's numbers are teacher-forced or rankings of two answers, on other models and edits.
"""

from __future__ import annotations

import functools
from typing import Any

from errata.editors import editor_class
from errata.evaluation import Examination, run_singles
from errata.studies.figures import dots
from errata.studies.result import StudyResult
from errata.studies.workbench import PROPERTIES, Arm, Workbench, properties

__all__ = ["singles"]

_METHODS = ("ft", "rome", "memit", "emmet", "alphaedit", "lora", "ultraedit", "simie")


def singles(bench: Workbench) -> StudyResult:
    """Every method on the same edits, each edit made alone, asked about, and taken back."""
    # MEND edits what a network was trained for, and one comes with errata for atlas.
    names = bench.methods((*_METHODS, "mend") if bench.model.model_id == "atlas" else _METHODS)
    edits = bench.edits(bench.count(100, quick=2))
    examination = Examination(bench.model, edits)
    rows = []
    for name in names:
        arm = bench.arm(name)
        bench.enter(arm)
        row = bench.row(arm, edits, "single", functools.partial(_single, bench, arm, examination))
        rows.append({**arm.label, **row})
    told = [
        f"{name} {min(values):.2f} to {max(values):.2f}"
        for name in PROPERTIES
        if (values := [row[name] for row in rows if row[name] is not None])
    ]
    found = f"{len(edits)} edits, each made alone, by {len(rows)} methods: {', '.join(told)}."
    return bench.result(
        found=found,
        columns=(
            "method",
            *PROPERTIES,
            "near_locality",
            "portability",
            "reliability_forced",
            "generalization_forced",
            "refused",
            "seconds_per_edit",
        ),
        rows=rows,
        figure=dots(rows, "method", found),
    )


def _single(bench: Workbench, arm: Arm, examination: Examination) -> dict[str, Any]:
    bench.progress.start(f"{arm.label['method']}: getting ready")
    editor = editor_class(arm.method)(bench.model, bench.config(arm))
    try:
        made = run_singles(editor, examination, bench.progress)
    finally:
        editor.adapter.detach()
    record = made.result.to_record()
    return {
        **properties(record),
        "portability": record["portability"]["generated"],
        "refused": made.refused,
        "seconds_per_edit": made.seconds / max(1, made.applied),
    }
