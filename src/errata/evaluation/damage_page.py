"""The page of what an adapter damaged: capabilities, language modelling, and where weights have moved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.evaluation.figures import COLOURS, styled_figure
from errata.evaluation.page import Grid, Page, Picture, Section, flattened, grid, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_damage_page"]


def _change_figure(record: Mapping[str, Any]) -> Figure:
    """Change of every task with its interval, and how far each layer has moved."""
    tasks, layers = record["tasks"][::-1], record["layers"]
    panels = [bool(tasks), bool(layers)]
    figure, axes = styled_figure(5.5 * sum(panels), 1.4 + 0.32 * max(len(tasks), len(layers)), 1, max(1, sum(panels)))
    if tasks:
        axis = axes[0]
        for height, task in enumerate(tasks):
            axis.plot([task["low"], task["high"]], [height, height], color=COLOURS[0], alpha=0.6)
            axis.plot(task["change"], height, "o", color=COLOURS[0])
        axis.axvline(0, color="#9a9a9a", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(tasks)), [task["task"] for task in tasks], fontsize=8)
        axis.set(xlabel="change, after less before", title="capabilities")
    if layers:
        axis = axes[-1]
        axis.barh(range(len(layers)), [layer["relative_norm"] for layer in layers], color=COLOURS[1])
        axis.set_yticks(range(len(layers)), [layer["module"] for layer in layers], fontsize=8)
        axis.set(xlabel="norm of the change over the weight's norm", title="layers")
    return figure


def write_damage_page(path: Path, record: Mapping[str, Any], command: str) -> Path:
    """Write the page of a record as `errata damage --json` prints it."""
    pictures = []
    if record["tasks"] or record["layers"]:
        caption = "Left of the line is lost, right of it won; lines: 95 % intervals over items."
        pictures.append(Picture(_change_figure(record), caption))
    tasks = [
        {**task, "change_interval": (task["low"], task["high"]), "adjusted_p": task["p"]} for task in record["tasks"]
    ]
    perplexity = [{"domain": domain, **both} for domain, both in record["perplexity"].items()]
    fires = [{"domain": domain, "share_of_texts_it_acts_on": share} for domain, share in record["fires"].items()]
    layers = ("module", "relative_norm", "similarity", "entries")
    columns = ("task", "metric", "items", "before", "after", "change", "adjusted_p", "version")
    sections = [Section("", pictures)]
    if tasks:
        told = "The same items without the adapter and with it; p is adjusted for as many tasks (Holm)."
        sections.append(Section("Capabilities", [grid(columns, tasks)], told))
    if perplexity:
        sections.append(Section("Perplexity of held-out text", [grid(("domain", "before", "after"), perplexity)]))
    if record["layers"]:
        told = "Similarity: cosine with the unedited weight; none where the change stands beside the weight."
        sections.append(Section("Layers", [grid(layers, record["layers"])], told))
    if fires:
        sections.append(Section("Where the memory acts", [grid(("domain", "share_of_texts_it_acts_on"), fires)]))
    asked = {"limit": record["limit"], "shots": record["shots"]}
    sections.append(Section("Protocol", [Grid(("setting", "value"), flattened({**asked, **record["provenance"]}))]))
    title = f"What {record['edits']} edits of {record['method']} damaged"
    lead = f"Model: {record['model']}. Adapter: {Path(record['adapter']).name}."
    return write_page(path, Page(title, lead, sections, command))
