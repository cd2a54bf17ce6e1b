"""How studies draw: the finding as title, lines and points labelled where they are, intervals where they are known.

Colours are those of `evaluation.figures`, which colour-blind readers can tell apart; markers differ as well.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from errata.evaluation.figures import COLOURS, label_ends, number, styled_figure
from errata.evaluation.tables import cell
from errata.evaluation.triangle import triangle_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["INK", "dots", "gaps", "lines", "property_lines", "titled", "triangles"]

INK = "#333333"
_COLOURS = {"reliability": COLOURS[0], "generalization": COLOURS[2], "locality": COLOURS[1]}
_MARKERS = {"reliability": "o", "generalization": "s", "locality": "D"}
_AXES = {
    "reliability": "edits that are answered",
    "generalization": "other wordings that are answered",
    "locality": "other prompts left as they were",
    "average": "mean of the three",
}

Row = Mapping[str, Any]


def titled(figure: Figure, title: str) -> Figure:
    """Put the finding above everything, in as many lines as it needs."""
    width = int(8.8 * figure.get_figwidth())  # characters
    figure.suptitle("\n".join(textwrap.wrap(title, width)), fontsize=11, x=0.01, ha="left", weight="bold")
    return figure


def lines(axes: Axes, rows: Sequence[Row], x: str, y: str, colour: str, marker: str) -> tuple[float, float]:
    """One line over x with its interval as a band; returns its right end."""
    rows = sorted(rows, key=lambda row: row[x])
    places, values = [row[x] for row in rows], [number(row[y]) for row in rows]
    axes.plot(places, values, marker=marker, markersize=5, color=colour, linewidth=1.8)
    bands = [[number(edge) for edge in row.get(f"{y}_interval") or (None, None)] for row in rows]
    axes.fill_between(places, [b[0] for b in bands], [b[1] for b in bands], color=colour, alpha=0.13, linewidth=0)
    return places[-1], values[-1]


def property_lines(rows: Sequence[Row], x: str, label: str, title: str, *, log: bool = False) -> tuple[Figure, Axes]:
    """Reliability, generalization and locality over one setting, in one panel."""
    figure, (axes,) = styled_figure(7.5, 4.2)
    axes.set(xlabel=label, ylabel="share of edits, generated", ylim=(-0.03, 1.05), xscale="log" if log else "linear")
    asked = [name for name in _COLOURS if any(row[name] is not None for row in rows)]
    ends = [(*lines(axes, rows, x, name, _COLOURS[name], _MARKERS[name]), name, _COLOURS[name]) for name in asked]
    label_ends(axes, ends)
    return titled(figure, title), axes


def dots(
    rows: Sequence[Row],
    label: str,
    title: str,
    *,
    panels: Sequence[str] = ("reliability", "generalization", "locality"),
    published: Mapping[str, Mapping[str, float]] | None = None,
    names: Mapping[str, str] | None = None,
    log: frozenset[str] = frozenset(),
) -> Figure:
    """One panel per measure, one line per row: a point with its interval and its value; hollow is the paper's.

    Args:
        label: the column that names the rows; the first row stands on top.
        published: per row's name, the paper's values by measure.
        names: what a measure is called below its panel, if not as the properties are; log: measures drawn so.
    """
    figure, axes = styled_figure(2.1 + 2.6 * len(panels), 1.5 + 0.36 * len(rows), 1, len(panels))
    labels = [str(row[label]) for row in rows]
    heights = list(range(len(rows)))[::-1]
    shown = False
    for column, (one, measure) in enumerate(zip(axes, panels, strict=True)):
        colour = _COLOURS.get(measure, COLOURS[0])
        scaled = measure in log
        for height, name, row in zip(heights, labels, rows, strict=True):
            value = number(row[measure])
            low, high = row.get(f"{measure}_interval") or (None, None)
            if low is not None and high is not None:
                one.plot([low, high], [height, height], color=colour, linewidth=1.4, alpha=0.6)
            if math.isfinite(value):
                one.plot(value, height, _MARKERS.get(measure, "o"), color=colour, markersize=6)
                one.annotate(
                    cell(value), (value, height), xytext=(0, 6), textcoords="offset points", fontsize=8, ha="center"
                )
            theirs = (published or {}).get(name, {}).get(measure)
            if theirs is not None:
                shown = True
                one.plot(theirs, height, "d", markerfacecolor="white", markeredgecolor=INK, markersize=7, zorder=1)
        one.set_yticks(heights, labels if column == 0 else [""] * len(labels), fontsize=9)
        one.set_ylim(-0.6, len(rows) - 0.3)
        one.set_title(measure.replace("_", " "), fontsize=10, color=colour, weight="bold")
        one.set_xlabel((names or _AXES).get(measure, ""), fontsize=8.5)
        one.grid(axis="y", alpha=0.0)
        if scaled:
            one.set_xscale("log")
            one.margins(x=0.15)
        else:
            one.set_xlim(-0.06, 1.1)
    if shown:
        axes[-1].annotate(
            "hollow: the paper's, on another model", (1, 0), xytext=(0, -42), xycoords="axes fraction",
            textcoords="offset points", ha="right", fontsize=8, color=INK,
        )  # fmt: skip
    return titled(figure, title)


def gaps(rows: Sequence[Row], title: str) -> Figure:
    """Per method, from what it answers by itself (filled) to its score under teacher forcing (hollow)."""
    panels = [name for name in ("reliability", "generalization") if any(row[name] is not None for row in rows)]
    rows = sorted(rows, key=lambda row: (number(row["reliability_gap"]), row["method"]))
    figure, axes = styled_figure(1.6 + 3.6 * len(panels), 1.9 + 0.34 * len(rows), 1, len(panels))
    for column, (one, name) in enumerate(zip(axes, panels, strict=True)):
        colour = _COLOURS[name]
        for height, row in enumerate(rows):
            own, forced = number(row[name]), number(row[f"{name}_forced"])
            one.plot([own, forced], [height, height], color=colour, linewidth=2, alpha=0.45)
            one.plot(own, height, "o", color=colour, markersize=6.5)
            one.plot(forced, height, "o", markerfacecolor="white", markeredgecolor=colour, markersize=6.5)
            if math.isfinite(own):
                one.annotate(f"{own:.2f}, {forced:.2f}", (1.06, height), fontsize=8, va="center", annotation_clip=False)
        one.set_yticks(range(len(rows)), [row["method"] if column == 0 else "" for row in rows], fontsize=9)
        one.set(xlim=(-0.03, 1.05), ylim=(-0.6, len(rows) - 0.4))
        one.set_title(name, fontsize=10, color=colour, weight="bold", loc="left")
        one.set_xlabel(f"share of {'edits' if name == 'reliability' else 'other wordings'}", fontsize=8.5)
        one.grid(axis="y", alpha=0.0)
    figure.supxlabel(
        "filled: answered without help; hollow: tokens right when shown the target's beginning", fontsize=8.5
    )
    return titled(figure, title)


def triangles(rows: Sequence[Row], title: str) -> Figure:
    """Triangles over methods and numbers of edits, below their finding."""
    return titled(triangle_figure(rows), title)
