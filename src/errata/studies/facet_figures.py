"""The figures of `dual-facets`: what is lost over edits, where weights have moved, and what is still answered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from errata.atlas.capabilities import CAPABILITIES
from errata.evaluation.figures import label_ends, number, run_style, styled_figure, ticks
from errata.studies.figures import titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["divergence_map", "facet_panels"]

Row = Mapping[str, Any]


def _over_edits(axis: Axes, rows: Sequence[Row], names: Sequence[str], column: str, label: str) -> None:
    ends = []
    for name in names:
        own = [row for row in rows if row["method"] == name]
        values = [number(row[column]) for row in own]
        style = run_style(names, name)
        axis.plot([row["edits"] for row in own], values, markersize=4, **style)
        ends.append((own[-1]["edits"], values[-1], name, style["color"]))
    axis.axhline(number(rows[0][column]), color="#9a9a9a", linestyle=":", linewidth=1)
    axis.set(xlabel="sequential edits", title=label, xscale="log")
    if not column.startswith("perplexity"):
        axis.set_ylim(-0.03, 1.05)
    ticks(axis, sorted({row["edits"] for row in rows if row["edits"]}))
    if column.startswith("perplexity"):
        axis.set_yscale("log")
    label_ends(axis, ends)


def facet_panels(rows: Sequence[Row], names: Sequence[str], title: str) -> Figure:
    """Six capabilities, then divergence against loss, perplexity of prose, and a recital from the prompt.

    Args:
        rows: the first is of the unedited model, drawn as a dotted line.
    """
    figure, axes = styled_figure(15, 11, 3, 3)
    panels = [(name, name.replace("_", " "), axis) for name, axis in zip(CAPABILITIES, axes[:6], strict=True)]
    panels += [("perplexity_prose", "perplexity of prose", axes[7]), ("recital", "a list from the prompt", axes[8])]
    for column, label, axis in panels:
        _over_edits(axis, rows, names, column, label)
    cloud = axes[6]
    for name in names:
        own = [row for row in rows if row["method"] == name and row["divergence"]]
        if own:
            style = run_style(names, name) | {"linestyle": "none"}
            if "@" in name:
                style["markerfacecolor"] = "white"
            cloud.plot([row["divergence"] for row in own], [row["change"] for row in own], label=name, **style)
    cloud.set(xlabel="1 − cosine of the most changed weight", ylabel="change of accuracy", title="divergence and loss")
    if cloud.get_legend_handles_labels()[0]:
        cloud.set_xscale("log")
        cloud.legend(fontsize=8, frameon=False)
    return titled(figure, title)


def divergence_map(rows: Sequence[Row], names: Sequence[str]) -> Figure:
    """Per method that changes weights, a map of numbers of edits against all weights that any of them changes: one
    less the cosine, nothing where a method leaves a weight alone."""
    from matplotlib.colors import LogNorm

    moved = {
        (row["method"], row["edits"], layer["module"]): 1 - layer["similarity"]
        for row in rows
        for layer in row["layers"]
        if row["method"] in names and layer["similarity"] is not None
    }
    values = [value for value in moved.values() if value > 0]
    norm = LogNorm(max(min(values), 1e-8), max(values)) if values else None
    figure, axes = styled_figure(2.5 + 2.2 * len(names), 3.6, 1, len(names))
    modules = sorted({module for _, _, module in moved}, key=_layer_of)
    image = None
    for axis, name in zip(axes, names, strict=True):
        counts = sorted({row["edits"] for row in rows if row["method"] == name})
        cells = [[moved.get((name, count, module), math.nan) or math.nan for count in counts] for module in modules]
        # viridis goes from dark to light evenly, also for colour-blind readers and in grey print
        image = axis.imshow(cells, aspect="auto", cmap="viridis", norm=norm, origin="lower")
        axis.set_xticks(range(len(counts)), [str(count) for count in counts], fontsize=8)
        labels = [_short(module) if axis is axes[0] else "" for module in modules]
        axis.set_yticks(range(len(modules)), labels, fontsize=8)
        axis.set(xlabel="sequential edits", title=name)
        axis.grid(visible=False)
    if image is not None:
        figure.colorbar(image, ax=axes, label="1 − cosine with the unedited weight", shrink=0.9)
    return figure


def _layer_of(module: str) -> tuple[list[int], str]:
    return [int(part) for part in module.split(".") if part.isdigit()], module


def _short(module: str) -> str:
    """`model.layers.3.mlp.down_proj` as `3 down_proj`."""
    parts = module.split(".")
    return " ".join([*(part for part in parts if part.isdigit()), parts[-1]])
