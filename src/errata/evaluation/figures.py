"""Figures that read without the code: one style, colours that colour-blind readers can tell apart, SVG or PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "comparison_figure",
    "label_ends",
    "number",
    "retention_figure",
    "retention_lines",
    "run_style",
    "save_figure",
    "scores_figure",
    "styled_figure",
    "svg",
    "ticks",
    "trace_figure",
]

# Okabe and Ito's palette.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))  # the last: dashes with two dots between


def styled_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of so many inches in the common style, and its axes row by row."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Names at the ends of lines keep away from the next panel.
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.06))
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for one in axes:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def number(value: float | None) -> float:
    """What JSON holds, for an axis: None leaves a gap."""
    return math.nan if value is None else float(value)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 0.055) -> None:
    """Name lines at their right ends (x, y, name, colour), pushed apart vertically where they would overlap.

    Args:
        axes: with the limits that they will have.
        gap: least distance between two names, as a share of the axis.
    """
    known = [end for end in ends if math.isfinite(end[1])]
    if not known:
        return
    axes.get_xlim(), axes.get_ylim()  # limits that follow from what is drawn are set when they are asked for
    heights = axes.transAxes.inverted().transform(axes.transData.transform([end[:2] for end in known]))[:, 1]
    order = sorted(range(len(known)), key=lambda at: float(heights[at]))
    places: list[float] = []  # as shares of the axis, so that a scale of logarithms is no other case
    for at in order:
        places.append(max(float(heights[at]), places[-1] + gap) if places else float(heights[at]))
    if places and places[-1] > 1:  # the topmost may stand at the edge, not above it
        for at in reversed(range(len(places))):
            places[at] = min(places[at], 1.0 if at == len(places) - 1 else places[at + 1] - gap)
    back = axes.transData.inverted().transform(axes.transAxes.transform([(1.0, place) for place in places]))[:, 1]
    for at, y in zip(order, back, strict=True):
        x, _, name, colour = known[at]
        axes.annotate(
            name, (x, float(y)), xytext=(7, 0), textcoords="offset points", color=colour, fontsize=9, va="center",
            annotation_clip=False,
        )  # fmt: skip


def ticks(axes: Axes, values: Sequence[float], names: Sequence[str] | None = None) -> None:
    """Ticks at the measured places alone, also on a scale of logarithms."""
    axes.set_xticks(values, names or [f"{value:g}" for value in values], fontsize=8)
    axes.minorticks_off()


def run_style(runs: Sequence[str], run: str) -> dict[str, Any]:
    """How a run among others is drawn: runs of one method (METHOD@LABEL) share colour and marker, and differ by their
    dashes; from the eighth method on markers are hollow."""
    methods = list(dict.fromkeys(one.partition("@")[0] for one in runs))
    method = run.partition("@")[0]
    place = methods.index(method)
    among = [one for one in runs if one.partition("@")[0] == method].index(run)
    colour = COLOURS[place % len(COLOURS)]
    return {
        "color": colour,
        "marker": _MARKERS[place % len(_MARKERS)],
        "markerfacecolor": colour if place < len(_MARKERS) else "white",
        "linestyle": _DASHES[among % len(_DASHES)],
    }


def svg(figure: Figure) -> str:
    """The figure as an SVG element, to be put into a page."""
    import matplotlib

    out = io.StringIO()
    # A fixed salt keeps element ids, and so the file, the same from run to run.
    with matplotlib.rc_context({"svg.hashsalt": "errata", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format its name ends with."""
    figure.savefig(path, dpi=130)


def scores_figure(after: Mapping[str, Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Reliability, generalization and locality before and after, generated and teacher-forced, with intervals."""
    names = [
        name
        for name in ("reliability", "generalization", "locality", "portability")
        if after[name]["generated"] is not None
    ]
    figure, (axes,) = styled_figure(7.5, 3.6)
    width = 0.26
    bars = (
        ("unedited, generated", before, "generated", "#999999"),
        ("edited, generated", after, "generated", COLOURS[0]),
        ("edited, teacher-forced", after, "teacher_forced", COLOURS[5]),
    )
    for number, (label, scores, way, colour) in enumerate(bars):
        places = [at + (number - 1) * width for at in range(len(names))]
        values = [scores[name][way] or 0.0 for name in names]
        drawn = axes.bar(places, values, width, label=label, color=colour)
        axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=2)
        if way == "generated":
            low = [v - (scores[n]["generated_interval"][0] or 0.0) for n, v in zip(names, values, strict=True)]
            high = [(scores[n]["generated_interval"][1] or 0.0) - v for n, v in zip(names, values, strict=True)]
            axes.errorbar(places, values, yerr=[low, high], fmt="none", ecolor="#333333", capsize=2, linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylim=(0, 1.15), ylabel="share of edits")
    axes.legend(fontsize=8, ncols=3, loc="upper center", frameon=False)
    return figure


def retention_figure(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Left: success over the run, right after each edit and after all of them. Right: success by age at the end."""
    figure, (over, age) = styled_figure(7.5, 3.2, 1, 2)
    counts = [row["edits"] for row in rows]
    at_once = [number(row["immediate"]["reliability"]["generated"]) for row in rows]
    finally_ = [number(row["reliability"]["generated"]) for row in rows]
    over.plot(counts, at_once, "s--", color=COLOURS[5], label="right after the edit")
    over.plot(counts, finally_, "o-", color=COLOURS[0], label="after all edits")
    over.set(xlabel="edits made", ylabel="reliability (generated)", ylim=(-0.03, 1.05), title=title)
    over.legend(fontsize=8, loc="lower left")
    retention = {int(a): share for a, share in rows[-1]["retention"].items()}
    ages = sorted(retention)
    edges = [*ages[1:], counts[-1]]
    labels = [str(a) if b - a == 1 else f"{a}–{b - 1}" for a, b in zip(ages, edges, strict=True)]
    age.bar(range(len(ages)), [retention[a] for a in ages], color=COLOURS[0])
    age.set_xticks(range(len(ages)), labels, fontsize=8)
    age.set(xlabel="edits made since", ylabel="still answered", ylim=(0, 1.05), title="retention by age")
    return figure


def retention_lines(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Per run, the share of its edits still answered at its last checkpoint, by how many were made after them."""
    figure, (axis,) = styled_figure(8, 4)
    runs = list(dict.fromkeys(row["method"] for row in rows))
    last = {row["method"]: row for row in sorted(rows, key=lambda row: row["edits"])}
    ends = []
    for run in runs:
        ages = sorted((int(age) + 1, share) for age, share in last[run]["retention"].items())
        style = run_style(runs, run)
        axis.plot([age for age, _ in ages], [share for _, share in ages], markersize=5, **style)
        ends.append((*ages[-1], run, style["color"]))
    axis.set(xlabel="edits made since, and the edit itself", ylabel="still answered", xscale="log", ylim=(-0.03, 1.05))
    ticks(axis, sorted({int(age) + 1 for row in last.values() for age in row["retention"]}))
    label_ends(axis, ends)
    return figure


def comparison_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Each method over the number of sequential edits: three properties, and perplexity of held-out text.

    Runs of one method (METHOD@LABEL) share colour and marker and differ by their dashes. Intervals are drawn for up to
    six runs; more of them would hide each other.
    """
    from matplotlib.ticker import LogFormatter

    runs = list(dict.fromkeys(row["method"] for row in rows if not row["baseline"]))
    unedited = [row for row in rows if row["method"] == "unedited"]
    is_crowded = len(runs) > 6
    figure, axes = styled_figure(9.0, 7.4 if is_crowded else 6.4, 2, 2)
    titles = ("reliability", "generalization", "locality", "perplexity")
    subtitles = ("the edited prompt", "wordings never shown", "other prompts unchanged", "held-out text")
    for axis, name, subtitle in zip(axes, titles, subtitles, strict=True):

        def value(row: Mapping[str, Any], name: str = name) -> float:
            return number(row["perplexity"] if name == "perplexity" else row[name]["generated"])

        for run in runs:
            own = [row for row in rows if row["method"] == run]
            counts = [row["edits"] for row in own]
            style = run_style(runs, run)
            axis.plot(
                counts,
                [value(r) for r in own],
                label=run,
                markersize=4 if is_crowded else 6,
                linewidth=1.1 if is_crowded else 1.5,
                **style,
            )
            if name != "perplexity" and not is_crowded:
                low = [r[name]["generated_interval"][0] for r in own]
                high = [r[name]["generated_interval"][1] for r in own]
                if None not in low and None not in high:
                    axis.fill_between(counts, low, high, color=style["color"], alpha=0.12, linewidth=0)
        if unedited:
            axis.plot(
                [r["edits"] for r in unedited], [value(r) for r in unedited], ":", color="#666666", label="unedited"
            )
        axis.set(xscale="log", xlabel="sequential edits", title=f"{name}\n{subtitle}")
        axis.title.set_fontsize(10)
        counts = sorted({row["edits"] for row in rows})
        axis.set_xticks(counts, [str(c) for c in counts])
        axis.minorticks_off()
        if name == "perplexity":
            known = [value(row) for row in rows if math.isfinite(value(row))]
            if known and max(known) > 1.2 * min(known):  # a scale of logarithms needs something to scale
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(LogFormatter())
                axis.yaxis.set_minor_formatter(LogFormatter())  # which labels the places between few decades only
        else:
            axis.set_ylim(-0.03, 1.05)
    if is_crowded:
        handles, labels = axes[0].get_legend_handles_labels()
        columns = max(1, min(6, 130 // (max(map(len, labels)) + 11)))  # as many as fit side by side, in characters
        figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=columns, handlelength=3.0)
    else:
        axes[0].legend(fontsize=9, loc="lower left")
    return figure


def trace_figure(trace: Mapping[str, Any]) -> Figure:
    """Average indirect effects by layer, at each place of a causal trace (the record of a `CausalTrace`)."""
    from matplotlib.ticker import MaxNLocator

    places = list(trace["effects"])
    figure, axes = styled_figure(4.2 * len(places), 3.2, 1, len(places))
    for axis, place in zip(axes, places, strict=True):
        for number, (kind, values) in enumerate(trace["effects"][place].items()):
            errors = trace["errors"][place][kind]
            colour, layers = COLOURS[number], range(len(values))
            axis.plot(layers, values, marker=_MARKERS[number], color=colour, label=kind)
            low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
            axis.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(xlabel="layer", ylabel="indirect effect", title=f"at the {place}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(fontsize=8)
    return figure
