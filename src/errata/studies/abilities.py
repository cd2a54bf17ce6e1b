"""What sequential edits leave of general abilities ("Should We Really Edit Language Models?", 2410.18785).

The paper asks large benchmarks of 7B models; here the six capabilities that atlas was taught are asked (the six kinds
of 2402.11122), which no edit is about.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from errata.atlas.examine import examine_capabilities
from errata.edit import Edit
from errata.errors import ConfigError
from errata.evaluation.figures import label_ends, number, run_style, styled_figure, ticks
from errata.evaluation.lifelong import capability_drop
from errata.evaluation.metrics import held_until
from errata.evaluation.tables import cell
from errata.studies.figures import titled
from errata.studies.result import Published, StudyResult
from errata.studies.workbench import Arm, Workbench

__all__ = ["abilities"]

_METHODS = ("ft", "rome", "memit", "grace", "memoir")
_CHECKPOINTS = (20, 50, 100)
_HELD = 0.9  # of the unedited accuracy, mean over capabilities
_SOURCE = "Should We Really Edit Language Models? (2410.18785), CounterFact, one edit after the other"
_TASKS = ("MMLU", "GSM8K", "BBH", "CommonsenseQA")
_PUBLISHED = {
    "Llama-2-7B-chat, unedited": (0.4516, 0.2032, 0.3997, 0.6134),
    "Llama-2-7B-chat, ROME, 20 edits": (0.4416, 0.1471, 0.3828, 0.5602),
    "Llama-2-7B-chat, ROME, 50 edits": (0.2700, 0.0409, 0.2838, 0.2048),
    "Llama-2-7B-chat, ROME, 100 edits": (0.0007, 0.0152, 0.0, 0.0),
    "Llama-2-7B-chat, MEMIT, 100 edits": (0.4485, 0.1850, 0.3959, 0.6044),
    "Mistral-7B-Instruct, unedited": (0.5350, 0.3450, 0.4668, 0.6601),
    "Mistral-7B-Instruct, MEMIT, 100 edits": (0.0, 0.0, 0.0, 0.0),
    "Mistral-7B-Instruct, PMET, 50 edits": (0.0, 0.0, 0.0, 0.0),
}


def abilities(bench: Workbench) -> StudyResult:
    """Edit one after the other, and examine the model at every checkpoint."""
    names = bench.methods(_METHODS)
    count = bench.count(max(_CHECKPOINTS), quick=2)
    edits = bench.edits(count)
    checkpoints = sorted({min(point, len(edits)) for point in _CHECKPOINTS} | {len(edits)})
    arms = [bench.arm(name) for name in names]
    for arm in arms:
        bench.config(arm)  # a setting that does not exist is found before anything is asked
    base = bench.row(arms[0], edits[:1], "abilities, unedited", functools.partial(_examined, bench))
    if not any(base.values()):
        raise ConfigError(
            "this model has none of atlas's capabilities, so it has none to lose; errata damage asks others"
        )
    rows: list[dict[str, Any]] = [{"method": "unedited", "edits": 0, **_summary(base, base)}]
    for arm in arms:
        for row in bench.run([arm], edits, checkpoints):
            made = edits[: row["edits"]]
            points = checkpoints[: checkpoints.index(row["edits"]) + 1]
            now = bench.row(arm, made, "abilities", functools.partial(_after, bench, arm, edits, points))
            rows.append({**row, **_summary(base, now)})
    survived = {arm.label["method"]: _survived(rows, arm.label["method"]) for arm in arms}
    told = ", ".join(f"{name} {edits:.0f}{'' if fell else ' or more'}" for name, (edits, fell) in survived.items())
    last = [row for row in rows if row["edits"] == len(edits)]
    worst = min(last, key=lambda row: row["kept"])
    found = (
        f"Nine tenths of the six capabilities survive so many edits: {told}. After {len(edits)}, {worst['method']} "
        f"keeps {cell(worst['kept'])} of them and answers {cell(worst['reliability'])} of its edits."
    )
    bench.notes += [
        "mean_accuracy: generated exact match, mean over capabilities; kept: of what the unedited model scored; "
        "mean_drop: mean over capabilities of (before − now) / before",
        "survive: on a line between checkpoints, as far as kept stays at 0.9 or above",
    ]
    return bench.result(
        found=found,
        columns=("method", "edits", "mean_accuracy", "kept", "mean_drop", *base, "reliability", "locality"),
        rows=rows,
        numbers={f"survived_{name}": edits for name, (edits, _) in survived.items()},
        figure=_figure(rows, names, found),
        published=[
            Published(what, dict(zip(_TASKS, values, strict=True)), _SOURCE) for what, values in _PUBLISHED.items()
        ],
    )


def _examined(bench: Workbench) -> dict[str, Any]:
    scores = examine_capabilities(bench.model, progress=bench.progress)
    return {name: one["accuracy"] for name, one in scores.items()}


def _after(bench: Workbench, arm: Arm, edits: Sequence[Edit], points: Sequence[int]) -> dict[str, Any]:
    with bench.edited(arm, edits, points):
        return _examined(bench)


def _summary(base: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    mean = sum(now.values()) / len(now)
    drops = [capability_drop(base[name], now[name]) for name in now if base[name] > 0]
    kept = sum(now.values()) / sum(base.values())
    return {**now, "mean_accuracy": mean, "kept": kept, "mean_drop": sum(drops) / len(drops)}


def _survived(rows: Sequence[dict[str, Any]], method: str) -> tuple[float, bool]:
    """Up to how many edits the capabilities stay near what they were; with none of them they are whole."""
    return held_until([(0, 1.0), *((row["edits"], row["kept"]) for row in rows if row["method"] == method)], _HELD)


def _figure(rows: Sequence[dict[str, Any]], methods: Sequence[str], title: str) -> Any:
    figure, axes = styled_figure(11.5, 4.2, 1, 2)
    panels = (("kept", "capabilities kept, of the unedited model's"), ("reliability", "edits answered, generated"))
    for axis, (name, label) in zip(axes, panels, strict=True):
        axis.set(xlabel="sequential edits", ylabel=label, ylim=(-0.03, 1.08), xscale="log")
        ends = []
        for method in methods:
            own = [row for row in rows if row["method"] == method]
            values = [number(row[name]) for row in own]
            style = run_style(methods, method)
            axis.plot([row["edits"] for row in own], values, linewidth=1.8, markersize=5, **style)
            ends.append((own[-1]["edits"], values[-1], method, style["color"]))
        ticks(axis, sorted({row["edits"] for row in rows if row["edits"]}))
        label_ends(axis, ends)
    axes[0].axhline(_HELD, color="#9a9a9a", linestyle="--", linewidth=1)
    return titled(figure, title)
