"""The experiments of WISE (2405.14768): the impossible triangle, masks and shards, merge rules, the margin loss.

Paper's numbers are teacher-forced, on ZsRE, with LLaMA-2-7B unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from errata.errors import ConfigError
from errata.evaluation.figures import COLOURS, label_ends, styled_figure, ticks
from errata.studies.figures import dots, lines, titled, triangles
from errata.studies.result import Published, StudyResult
from errata.studies.workbench import PROPERTIES, Arm, Workbench

__all__ = ["margins", "masks", "merging", "triangle", "whole_shards"]

_MEMOIR = "MEMOIR (NeurIPS 2025), Llama-3-8B, as cited by third parties"
# Reliability, generalization, locality on ZsRE.
_TRIANGLE: dict[str, tuple[str, dict[int, tuple[float, float, float]]]] = {
    "wise": (
        "WISE (2405.14768), LLaMA-2-7B",
        {1: (0.98, 0.92, 1.0), 10: (0.94, 0.88, 1.0), 100: (0.90, 0.81, 1.0), 1000: (0.77, 0.72, 1.0)},
    ),
    "memoir": (_MEMOIR, {1000: (0.94, 0.85, 1.0)}),
    "grace": (
        "WISE (2405.14768), LLaMA-2-7B",
        {1: (0.99, 0.36, 1.0), 10: (0.96, 0.16, 1.0), 100: (0.96, 0.15, 1.0), 1000: (0.93, 0.08, 1.0)},
    ),
    "ft": (
        "WISE (2405.14768), LLaMA-2-7B; FT-L",
        {1: (0.57, 0.52, 0.96), 10: (0.48, 0.48, 0.76), 100: (0.30, 0.27, 0.23), 1000: (0.19, 0.16, 0.03)},
    ),
    "rome": (
        "WISE (2405.14768), LLaMA-2-7B",
        {1: (0.85, 0.80, 0.99), 10: (0.64, 0.62, 0.75), 100: (0.23, 0.22, 0.04), 1000: (0.01, 0.01, 0.0)},
    ),
}
_COLUMNS = (*PROPERTIES, "near_locality", "average", "reliability_forced", "generalization_forced", "locality_forced")


def _properties(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(PROPERTIES, values, strict=True))


def _weakest(row: Mapping[str, Any]) -> tuple[float, str]:
    return min((row[name], name) for name in PROPERTIES if row[name] is not None)


def whole_shards(bench: Workbench, count: int) -> dict[str, Any]:
    """WISE's shards for a run of so many edits: its own, or as many as are merged, filled by these edits.

    As in the paper's tables for few edits; otherwise nothing would be merged before they end.
    """
    config = bench.config(Arm({}, "wise", bench.given("wise"))).to_record()
    return {"shard_edits": max(1, min(config["shard_edits"], count // config["shards_per_memory"]))}


def triangle(bench: Workbench) -> StudyResult:
    """Reliability, generalization and locality of several methods after more and more edits."""
    methods = bench.methods(("wise", "memoir", "grace", "ft", "rome"))
    most = bench.count(300, quick=4)
    edits = bench.edits(most)
    counts = [count for count in (1, 10, 100, 300, 1000, 3000) if count < len(edits)] + [len(edits)]
    arms = {method: bench.arm(method) for method in methods}
    rows: list[dict[str, Any]] = []
    for method, arm in arms.items():
        if method != "wise":
            rows += bench.run([arm], edits, counts)
            continue
        for count in counts:  # shards are merged when they are full, so a small number of edits is a run of its own
            settings = bench.given(method, whole_shards(bench, count))
            rows += bench.run([Arm(arm.label, method, settings)], edits[:count], [count])
    if "wise" in methods:
        bench.notes.append(
            "wise: where edits are too few to fill its shards, they are divided into as many that are merged"
        )
    last = sorted((row for row in rows if row["edits"] == counts[-1]), key=lambda row: -_weakest(row)[0])
    told = [f"{row['method']} {_weakest(row)[0]:.2f} ({_weakest(row)[1]})" for row in last]
    plural = "s" * (counts[-1] > 1)
    return bench.result(
        found=f"After {counts[-1]:,} edit{plural}, the weakest corner of each method: {', '.join(told)}.",
        columns=("method", "edits", *_COLUMNS, "seconds_per_edit"),
        rows=rows,
        figure=triangles(
            rows,
            f"The impossible triangle: after {counts[-1]:,} edit{plural} {last[0]['method']} keeps most of all three "
            f"corners (its weakest is {_weakest(last[0])[1]}, {_weakest(last[0])[0]:.2f})",
        ),
        published=[
            Published(f"{method}, {count:,} edit{'s' * (count > 1)}", _properties(values), _TRIANGLE[method][0])
            for method in methods
            if method in _TRIANGLE
            for count, values in _TRIANGLE[method][1].items()
        ],
    )


def masks(bench: Workbench) -> StudyResult:
    """How dense the masks are (ρ), and how many shards (k) the edits are divided into before they are merged."""
    densities, shards = ((0.2, 0.5), (2, 3)) if bench.options.quick else ((0.1, 0.2, 0.5), (2, 3, 5))
    whole = math.lcm(*shards)
    count = bench.count(60, quick=6) // whole * whole
    if not count:
        raise ConfigError(f"--edits: give at least {whole}, so that every shard gets as many edits as any other")
    edits = bench.edits(count)
    values = {
        f"{density} {number}": {"mask_density": density, "shard_edits": count // number, "shards_per_memory": number}
        for density in densities
        for number in shards
    }
    rows = [
        {**row, "density": float(row["setting"].split()[0]), "shards": int(row["setting"].split()[1])}
        for row in bench.run(bench.arms("wise", "setting", values), edits, [len(edits)])
    ]
    for row in rows:
        row["in_all_shards"] = row["density"] ** row["shards"]
    best = max(rows, key=lambda row: row["average"])
    found = (
        f"Of {len(rows)} settings at {count} edits, density {best['density']} with {best['shards']} shards is best "
        f"(average {best['average']:.2f}); an entry is then in all shards with probability {best['in_all_shards']:.2g}."
    )
    figure, axes = styled_figure(9.6, 3.7, 1, 3)
    for one, name in zip(axes, PROPERTIES, strict=True):
        one.set(ylim=(-0.03, 1.05), xlabel="mask density ρ", title=name)
        ends = []
        for place, number in enumerate(shards):
            own = [row for row in rows if row["shards"] == number]
            end = lines(one, own, "density", name, COLOURS[place], "osD"[place])
            ends.append((*end, f"{number} shards", COLOURS[place]))
        ticks(one, densities)
        label_ends(one, ends, 0.08)
    axes[0].set_ylabel("share of edits, generated")
    return bench.result(
        found=found,
        columns=("density", "shards", "in_all_shards", *_COLUMNS),
        rows=rows,
        figure=titled(figure, found),
        published=[
            Published(
                "overlapping masks, ρ 0.2, 5 shards", {"reliability": 0.73, "generalization": 0.68}, "WISE (2405.14768)"
            ),
            Published(
                "disjoint masks, ρ 0.2, 5 shards", {"reliability": 0.64, "generalization": 0.61}, "WISE (2405.14768)"
            ),
            Published("best settings", {"in all shards": 0.03}, "WISE (2405.14768): ρ to the power of k"),
        ],
    )


_MERGED = {"ties": 0.87, "sign": 0.84, "dare": 0.74, "linear": 0.72, "slerp": 0.72, "dare_ties": 0.71}


def merging(bench: Workbench) -> StudyResult:
    """The rules by which two shards become one memory."""
    count = bench.count(100, quick=4)
    if count < 2:
        raise ConfigError("--edits: give at least 2, so that there are two shards to merge")
    edits = bench.edits(count // 2 * 2)
    half = {"shard_edits": len(edits) // 2, "shards_per_memory": 2}
    rules = ("ties", "sign", "linear", "slerp", "dare", "dare_ties", "magnitude")[: 2 if bench.options.quick else None]
    arms = bench.arms("wise", "merging", {rule: {"merging": rule} for rule in rules}, half)
    rows = sorted(bench.run(arms, edits, [len(edits)]), key=lambda row: -row["average"])
    best, worst = rows[0], rows[-1]
    found = (
        f"After {len(edits)} edits in two shards, {best['merging']} keeps most (average {best['average']:.2f}), "
        f"{worst['merging']} least ({worst['average']:.2f})."
    )
    published = {rule: {"average": value} for rule, value in _MERGED.items()}
    return bench.result(
        found=found,
        columns=("merging", *_COLUMNS),
        rows=rows,
        figure=dots(rows, "merging", found, panels=("average", *PROPERTIES), published=published),
        published=[
            Published(rule, values, "WISE (2405.14768), 100 edits, 2 shards") for rule, values in published.items()
        ],
    )


def margins(bench: Workbench) -> StudyResult:
    """The router with and without the loss that pushes edited and irrelevant prompts apart."""
    edits = bench.edits(bench.count(100, quick=4))
    counts = [count for count in (10, 100) if count < len(edits)] + [len(edits)]
    rows: list[dict[str, Any]] = []
    for count in counts:
        values = {"with": {"margin_loss": True}, "without": {"margin_loss": False}}
        arms = bench.arms("wise", "margin_loss", values, whole_shards(bench, count))
        rows += bench.run(arms, edits[:count], [count])
    rows = [{**row, "run": f"{row['margin_loss']} margin loss, {row['edits']} edits"} for row in rows]
    kept, without = rows[-2], rows[-1]
    found = (
        f"At {counts[-1]} edits locality is {kept['locality']:.2f} with the margin loss and {without['locality']:.2f} "
        f"without; reliability {kept['reliability']:.2f} and {without['reliability']:.2f}."
    )
    return bench.result(
        found=found,
        columns=("margin_loss", "edits", *_COLUMNS),
        rows=rows,
        figure=dots(rows, "run", found),
        published=[
            Published("with margin loss, 1,000 edits", _properties((0.77, 0.72, 1.0)), "WISE (2405.14768), LLaMA-2-7B"),
            Published(
                "without margin loss, 1,000 edits",
                _properties((0.84, 0.79, 0.72)),
                "WISE (2405.14768), router ablation",
            ),
        ],
    )
