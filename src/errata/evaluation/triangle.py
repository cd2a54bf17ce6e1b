"""The triangle of reliability, generalization and locality, which no editor keeps whole for long (WISE, 2405.14768)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from errata.evaluation.figures import COLOURS, number, styled_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["triangle_figure"]

_CORNERS = {"reliability": 90.0, "generalization": 330.0, "locality": 210.0}  # degrees


def _corner(name: str, share: float) -> tuple[float, float]:
    angle = math.radians(_CORNERS[name])
    return share * math.cos(angle), share * math.sin(angle)


def _triangle(axes: Axes, share: float, **style: Any) -> None:
    places = [_corner(name, share) for name in (*_CORNERS, "reliability")]
    axes.plot([x for x, _ in places], [y for _, y in places], **style)


def triangle_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
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
        _triangle(one, 1.0, color="#9a9a9a", linewidth=0.9)
        if place < len(counts):
            one.set_title(f"after {count:,} edit{'s' * (count > 1)}", fontsize=10, pad=14)
        if place % len(counts) == 0:
            one.set_ylabel(method, fontsize=12, color=colour, weight="bold", rotation=0, ha="right", va="center")
        row = cells.get((method, count))
        if row is None:
            continue
        values = {name: number(row[name]) for name in _CORNERS}
        outline = [_corner(name, value) for name, value in values.items() if math.isfinite(value)]
        if outline:
            one.fill([x for x, _ in outline], [y for _, y in outline], color=colour, alpha=0.35, linewidth=0)
            one.plot(*zip(*outline, outline[0], strict=True), color=colour, linewidth=1.8)
        for name, value in values.items():
            x, y = _corner(name, 1.0)
            above = name == "reliability"
            word = f"{name}\n" if place == 0 else ""
            told = f"{value:.2f}" if math.isfinite(value) else "–"  # nothing of it was asked
            one.annotate(
                f"{word}{told}" if above else f"{told}\n{word}".rstrip(), (x, y),
                xytext=(0, 3 if above else -3), textcoords="offset points", ha="center", fontsize=8.5,
                va="bottom" if above else "top", color="#333333",
            )  # fmt: skip
    figure.supxlabel("share of generated answers; grey outlines: all of them, and half", fontsize=8.5, color="#333333")
    return figure
