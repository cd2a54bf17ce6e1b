"""GRACE's radius: how far from its key an edit still answers."""

from __future__ import annotations

from typing import Any

from errata.adapters import KeyedAdapter
from errata.editors.grace import Grace, GraceConfig
from errata.evaluation.figures import ticks
from errata.studies.figures import INK, property_lines
from errata.studies.result import Published, StudyResult
from errata.studies.workbench import PROPERTIES, Workbench

__all__ = ["radius"]

_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def _usual(bench: Workbench) -> float:
    """The radius that GRACE finds for this model, to four digits."""
    editor = Grace(bench.model, GraceConfig.for_model(bench.model, **bench.given("grace")))
    try:
        editor.prepare(bench.progress)
        assert isinstance(editor.adapter, KeyedAdapter)
        return float(f"{editor.adapter.router.radius:.4g}")
    finally:
        editor.adapter.detach()


def radius(bench: Workbench) -> StudyResult:
    """Radii around the one this model gets by default, over more than two orders of magnitude."""
    edits = bench.edits(bench.count(100, quick=4))
    usual = _usual(bench)
    factors = (0.1, 1.0, 10.0) if bench.options.quick else _FACTORS
    radii = {f"{factor:g}": factor * usual for factor in factors}
    arms = bench.arms("grace", "times_default", {name: {"radius": value} for name, value in radii.items()})
    rows: list[dict[str, Any]] = [
        {**row, "radius": radii[row["times_default"]]} for row in bench.run(arms, edits, [len(edits)])
    ]
    widest = max(rows, key=lambda row: row["generalization"] or 0.0)
    best = max(rows, key=lambda row: row["average"])
    found = (
        f"After {len(edits)} edits generalization reaches {widest['generalization'] or 0.0:.2f} at a radius of "
        f"{widest['radius']:.3g}, where locality is {widest['locality']:.2f}; all three together are best at "
        f"{best['radius']:.3g} (average {best['average']:.2f})."
    )
    figure, axes = property_lines(rows, "radius", "initial radius ε, distance of layer inputs", found, log=True)
    ticks(axes, [row["radius"] for row in rows], [f"{row['radius']:.3g}" for row in rows])
    axes.axvline(usual, color=INK, linestyle="--", linewidth=1)
    axes.annotate("default", (usual, -0.02), xytext=(4, 0), textcoords="offset points", fontsize=8.5, color=INK)
    source = "WISE (2405.14768), LLaMA-2-7B, ε = 1"
    return bench.result(
        found=found,
        columns=("radius", "times_default", *PROPERTIES, "near_locality", "average", "reliability_forced",
                 "generalization_forced", "seconds_per_edit"),
        rows=rows,
        numbers={"default_radius": usual},
        figure=figure,
        published=[
            Published("100 edits", dict(zip(PROPERTIES, (0.96, 0.15, 1.0), strict=True)), source),
            Published("1,000 edits", dict(zip(PROPERTIES, (0.93, 0.08, 1.0), strict=True)), source),
        ],
    )  # fmt: skip
