"""The page of a comparison: its figures, its table, who is really better, examples, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.evaluation.examples import examples_of
from errata.evaluation.figures import comparison_figure, retention_lines
from errata.evaluation.page import Grid, Page, Picture, Section, flattened, grid, write_page
from errata.evaluation.triangle import triangle_figure

if TYPE_CHECKING:
    from errata.evaluation.comparison import Comparison

__all__ = ["COLUMNS", "flat_rows", "write_comparison_page"]

_PROPERTIES = ("reliability", "generalization", "locality")
COLUMNS = (
    "method",
    "edits",
    *(name for one in _PROPERTIES for name in (one, f"{one}_forced")),
    "perplexity",
    "seconds_per_edit",
)
_MOST_TRIANGLES = 8  # runs, beyond which triangles are no longer read


def flat_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of comparisons as tables show them: a property is what was generated, with its interval."""
    return [
        {
            **{name: row[name] for name in ("method", "edits", "perplexity", "seconds_per_edit")},
            **{name: row[name]["generated"] for name in _PROPERTIES},
            **{f"{name}_interval": row[name]["generated_interval"] for name in _PROPERTIES},
            **{f"{name}_forced": row[name]["teacher_forced"] for name in _PROPERTIES},
        }
        for row in rows
    ]


def write_comparison_page(
    comparison: Comparison, rows: Sequence[Mapping[str, Any]], told: Sequence[str], command: str
) -> Path:
    """Write `report.html` into the comparison's folder.

    Args:
        rows: those to show, as `Comparison.chosen` gives them.
        told: sentences that stand above the table, such as horizons and differences.
    """
    runs = [row for row in rows if not row["baseline"]]
    last = {row["method"]: row["edits"] for row in runs}
    pictures = [
        Picture(comparison_figure(rows), "After so many edits, all of them asked again; bands: 95 % intervals."),
        Picture(retention_lines(runs), "Retention by age: edits still answered at a run's last checkpoint."),
    ]
    if len(last) <= _MOST_TRIANGLES:
        pictures.append(Picture(triangle_figure(flat_rows(runs)), "A corner that is cut off is a property given up."))
    made = dict(comparison.provenance)
    settings = made.pop("settings")
    # Examples need the same edits in every run: those of the smallest last checkpoint.
    shared = min(last.values(), default=0)
    answers = {run: comparison.folder / run / f"answers-{shared}.jsonl" for run in last}
    sections = [
        Section("", pictures),
        Section(
            "Measured",
            [grid(COLUMNS, flat_rows(rows))],
            "Generated: the model writes greedily from the prompt alone; forced: it is shown the beginning of the "
            "answer at every place, as most papers do. Small print: 95 % intervals over edits.",
            told,
        ),
        Section(f"A few edits, and what was said after {shared}", examples_of(comparison.edits[:shared], answers)),
        Section("Protocol", [Grid(("setting", "value"), flattened(made))]),
        Section("Settings of the methods", [Grid(("setting", "value"), flattened(settings))]),
    ]
    title = f"{', '.join(last)} on the same edits, one after the other"
    lead = f"Model: {comparison.model.model_id}. Up to {max(last.values(), default=0)} edits, never reset."
    return write_page(comparison.folder / "report.html", Page(title, lead, sections, command))
