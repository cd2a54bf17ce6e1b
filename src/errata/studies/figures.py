"""How studies draw: the finding as title, lines and points labelled where they are, intervals where they are known.

Colours are those of `evaluation.figures`, which colour-blind readers can tell apart; markers differ as well.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from errata.evaluation.figures import COLOURS, styled_figure
from errata.studies.workbench import cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["INK", "dots", "gaps", "label_ends", "lines", "property_lines", "ticks", "titled", "triangles"]

INK = "#333333"
_GREY = "#9a9a9a"
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


def number(value: float | None) -> float:
    """What JSON holds, for an axis: None leaves a gap."""
    return math.nan if value is None else float(value)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 0.055) -> None:
    """Name lines at their right ends (x, y, name, colour), pushed apart vertically where they would overlap.

    Args:
        gap: least distance between two names, as a share of the axis.
    """
    low, high = axes.get_ylim()
    room = gap * (high - low)
    known = sorted((end for end in ends if math.isfinite(end[1])), key=lambda end: end[1])
    places: list[float] = []
    for _, y, _, _ in known:
        places.append(max(y, places[-1] + room) if places else y)
    over = max(0.0, places[-1] - high) if places else 0.0  # the topmost may stand at the edge, not above it
    for at in reversed(range(len(places))):
        limit = high if at == len(places) - 1 else places[at + 1] - room
        places[at] = min(places[at], limit) if over else places[at]
    for (x, _, name, colour), y in zip(known, places, strict=True):
        axes.annotate(
            name, (x, y), xytext=(7, 0), textcoords="offset points", color=colour, fontsize=9, va="center",
            annotation_clip=False,
        )  # fmt: skip


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


def ticks(axes: Axes, values: Sequence[float], names: Sequence[str] | None = None) -> None:
    """Ticks at the measured places alone, also on a scale of logarithms."""
    axes.set_xticks(values, names or [f"{value:g}" for value in values], fontsize=8)
    axes.minorticks_off()


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


_CORNERS = {"reliability": 90.0, "generalization": 330.0, "locality": 210.0}  # degrees


def _corner(name: str, share: float) -> tuple[float, float]:
    angle = math.radians(_CORNERS[name])
    return share * math.cos(angle), share * math.sin(angle)


def _triangle(axes: Axes, share: float, **style: Any) -> None:
    places = [_corner(name, share) for name in (*_CORNERS, "reliability")]
    axes.plot([x for x, _ in places], [y for _, y in places], **style)


def triangles(rows: Sequence[Row], title: str) -> Figure:
    """One triangle per method (row) and number of edits (column): how far each property reaches towards its corner.

    The outer triangle is everything kept; a method that gives one property up for the others loses that corner.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    counts = sorted({row["edits"] for row in rows})
    figure, axes = styled_figure(0.9 + 2.0 * len(counts), 1.2 + 1.75 * len(methods), len(methods), len(counts))
    cells = {(row["method"], row["edits"]): row for row in rows}
    for place, one in enumerate(axes):
        method, count = methods[place // len(counts)], counts[place % len(counts)]
        colour = COLOURS[(place // len(counts)) % len(COLOURS)]
        one.set(xlim=(-1.2, 1.2), ylim=(-0.85, 1.3), aspect="equal", xticks=[], yticks=[])
        one.spines[:].set_visible(False)
        one.grid(alpha=0.0)
        _triangle(one, 0.5, color="#d8d8d8", linewidth=0.7)
        _triangle(one, 1.0, color=_GREY, linewidth=0.9)
        if place < len(counts):
            one.set_title(f"after {count:,} edit{'s' * (count > 1)}", fontsize=10, pad=14)
        if place % len(counts) == 0:
            one.set_ylabel(method, fontsize=12, color=colour, weight="bold", rotation=0, ha="right", va="center")
        row = cells.get((method, count))
        if row is None:
            continue
        values = {name: number(row[name]) for name in _CORNERS}
        outline = [_corner(name, value) for name, value in values.items() if math.isfinite(value)]
        one.fill([x for x, _ in outline], [y for _, y in outline], color=colour, alpha=0.35, linewidth=0)
        one.plot(*zip(*outline, outline[0], strict=True), color=colour, linewidth=1.8)
        for name, value in values.items():
            x, y = _corner(name, 1.0)
            above = name == "reliability"
            word = f"{name}\n" if place == 0 else ""
            one.annotate(
                f"{word}{value:.2f}" if above else f"{value:.2f}\n{word}".rstrip(), (x, y),
                xytext=(0, 3 if above else -3), textcoords="offset points", ha="center", fontsize=8.5,
                va="bottom" if above else "top", color=INK,
            )  # fmt: skip
    figure.supxlabel("share of generated answers; grey outlines: all of them, and half", fontsize=8.5, color=INK)
    return titled(figure, title)
