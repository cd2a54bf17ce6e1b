"""What a sequence of edits does to everything else, and why ("Navigating the Dual Facets", 2402.11122).

The paper edits 7B models and asks eight benchmarks of six kinds; here atlas is edited and asked its own six
capabilities of these kinds, which no edit is about. Three analyses stand beside the loss, as in the paper: how far
weights have moved, language modelling by domain, and learning from examples in the prompt. Batches and depth are its
mitigations that one model can show; instruction tuning takes atlas's tuned variant.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from errata.adapters import Adapter
from errata.atlas.capabilities import CAPABILITIES, Item, recital
from errata.atlas.examine import examine_item
from errata.datasets.builtin import held_out_texts
from errata.edit import Edit
from errata.errors import ConfigError
from errata.evaluation.damage import firing_share
from errata.evaluation.figures import COLOURS, styled_figure
from errata.evaluation.metrics import answers_exactly, bootstrap_mean, finite_or_none
from errata.evaluation.significance import spearman
from errata.model import EditableModel
from errata.studies.figures import label_ends, number, ticks, titled
from errata.studies.workbench import Arm, StudyResult, Workbench, cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["dual_facets"]

_METHODS = ("mend", "rome", "memit", "alphaedit", "grace", "wise", "memoir")
_CHECKPOINTS = (1, 5, 10, 20, 50, 100)
_SHOTS = (1, 4)  # beside none
_TAUGHT = ("professional", "multilingual", "code")  # of which examples are put in front of questions
_ITEMS = 200  # of each capability; as many recitals
_FEW = 60  # of each capability, where examples stand in front
_LONGEST = 48  # tokens of a worked-out answer
_MARKERS = "osD^vP*"


def dual_facets(bench: Workbench) -> StudyResult:
    """Edit one after the other, examine the model at every checkpoint, then try what the paper says mitigates."""
    names = bench.methods(_METHODS)
    edits = bench.edits(bench.count(max(_CHECKPOINTS), quick=2))
    total = len(edits)
    checkpoints = sorted({min(point, total) for point in _CHECKPOINTS} | {total})
    arms = [bench.arm(name) for name in names]
    for arm in arms:
        bench.config(arm)  # a setting that does not exist is found before anything is asked
    base = _state(bench, arms[0], edits[:1], "unedited", None)
    if "1" not in "".join(base["right"].values()):
        raise ConfigError(
            "this model has none of atlas's capabilities, so it has none to lose; errata damage asks others"
        )
    rows = [{"method": "unedited", "edits": 0, **_summary(base, base)}]
    for arm in arms:
        rows += [
            {**row, **_summary(base, _after(bench, arm, edits, checkpoints, row["edits"]))}
            for row in bench.run([arm], edits, checkpoints)
        ]
    rows += _mitigations(bench, names, edits, base)
    claims = _claims(rows, names, total)
    bench.notes += claims
    bench.notes += [
        "change: accuracy with edits less accuracy without, over the same items of all six capabilities; intervals are "
        "bootstrapped over items",
        "shots_N: questions behind N examples; shots_N_shuffled: the examples carry each other's answers; recital: a "
        "list from the prompt said again",
        "divergence: one less the cosine of the most changed weight with itself unedited; fires: share of unrelated "
        "prompts on which a routed memory acts",
        "every capability, all domains of text and numbers of examples: result.json",
        "model size is not among the mitigations: only one size of atlas comes with errata",
    ]
    return bench.result(
        found=claims[0],
        columns=(
            "method",
            "edits",
            "change",
            "reliability",
            "generalization",
            "divergence",
            "fires",
            "perplexity_prose",
        ),
        rows=rows,
        figure=_figure(rows, names, claims[0]),
    )


# --- one state of the model -----------------------------------------------------------------------------------------


def _ask(model: EditableModel, prompts: Sequence[str], items: Sequence[Item]) -> str:
    """Per item whether the answer is right, as ones and zeros."""
    said = model.generate(list(prompts), max_new_tokens=_LONGEST)
    lines = [text.strip().partition("\n")[0] for text in said]
    return "".join(str(int(examine_item(line, item))) for line, item in zip(lines, items, strict=True))


def _with_examples(items: Sequence[Item], drawn: Sequence[Sequence[Item]], shuffled: bool) -> list[str]:
    """Every question behind its examples; shuffled, each example has the answer of the one before it."""
    prompts = []
    for item, examples in zip(items, drawn, strict=True):
        answers = [example.answer for example in examples]
        if shuffled:
            answers = [answers[-1], *answers[:-1]]
        gaps = ["" if example.prompt.endswith("\n") else " " for example in examples]
        told = "".join(f"{e.prompt}{gap}{a}\n" for e, gap, a in zip(examples, gaps, answers, strict=True))
        prompts.append(told + item.prompt)
    return prompts


def _examined(bench: Workbench, adapter: Adapter | None) -> dict[str, Any]:
    """Everything that is asked of one state of the model."""
    model, progress = bench.model, bench.progress
    domains = {
        "prose": held_out_texts(120),
        **{
            name: [f"{item.prompt} {item.answer}" for item in CAPABILITIES[name].test[:_ITEMS]]
            for name in ("multilingual", "reading")
        },
    }
    ways = [(count, shuffled) for count in _SHOTS for shuffled in (False, True) if count > 1 or not shuffled]
    progress.start("capabilities", len(CAPABILITIES) + len(_TAUGHT) * len(ways))
    right = {}
    for name, task in CAPABILITIES.items():
        right[name] = _ask(model, [item.prompt for item in task.test[:_ITEMS]], task.test[:_ITEMS])
        progress.advance(note=name)
    shots: dict[str, str] = {"shots_0": "".join(right[name][:_FEW] for name in _TAUGHT)}
    for count, shuffled in ways:
        found = ""
        for name in _TAUGHT:
            items = CAPABILITIES[name].test[:_FEW]
            rng = random.Random(f"examples {name} {count}")
            drawn = [[CAPABILITIES[name].draw(rng) for _ in range(count)] for _ in items]
            found += _ask(model, _with_examples(items, drawn, shuffled), items)
            progress.advance(note=f"{count} examples")
        shots[f"shots_{count}{'_shuffled' * shuffled}"] = found
    rng = random.Random("recitals")
    sayings = [recital(rng) for _ in range(_ITEMS)]
    said = model.generate([one.prompt for one in sayings], max_new_tokens=_LONGEST)
    recited = "".join(str(int(answers_exactly(text, one.answer))) for text, one in zip(said, sayings, strict=True))
    changes = [] if adapter is None else adapter.layer_changes(model)
    similar = [change.similarity for change in changes if change.similarity is not None]
    unrelated = [item.prompt for task in CAPABILITIES.values() for item in task.test[:30]]
    return {
        "right": right,
        "shots": shots,
        "recited": recited,
        "perplexity": {domain: finite_or_none(model.perplexity(texts)) for domain, texts in domains.items()},
        "divergence": 1 - min(similar) if similar else None,
        "fires": None if adapter is None or adapter.changes_weights else firing_share(adapter, unrelated),
        "layers": [dict(vars(change)) for change in changes],
    }


def _state(bench: Workbench, arm: Arm, edits: Sequence[Edit], part: str, adapter: Adapter | None) -> dict[str, Any]:
    sizes = [_ITEMS, _FEW, *_SHOTS]
    return bench.row(arm, edits, ["dual facets", part, sizes], functools.partial(_examined, bench, adapter))


def _after(bench: Workbench, arm: Arm, edits: Sequence[Edit], checkpoints: Sequence[int], count: int) -> dict[str, Any]:
    """What is found after so many edits, from a finished row or from the adapter that was kept there."""
    points = [point for point in checkpoints if point <= count]
    with bench.edited(arm, edits, points) as adapter:
        return _state(bench, arm, edits[:count], "edited", adapter)


def _share(bits: str) -> float:
    return bits.count("1") / len(bits)


def _summary(base: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    before, after = "".join(base["right"].values()), "".join(now["right"].values())
    change = bootstrap_mean([int(b) - int(a) for a, b in zip(before, after, strict=True)])
    return {
        "change": change.value,
        "change_interval": [change.low, change.high],
        **{name: _share(bits) for name, bits in now["right"].items()},
        **{name: _share(bits) for name, bits in now["shots"].items()},
        "recital": _share(now["recited"]),
        **{f"perplexity_{domain}": value for domain, value in now["perplexity"].items()},
        "divergence": now["divergence"],
        "fires": now["fires"],
        "layers": now["layers"],
    }


# --- what the paper says mitigates ----------------------------------------------------------------------------------


def _mitigations(
    bench: Workbench, names: Sequence[str], edits: Sequence[Edit], base: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The first edits alone, by located editors in other batches and other layers, and on the tuned variant."""
    rows, total = [], len(edits)

    def add(
        label: str, method: str, settings: Mapping[str, Any], where: Workbench, unedited: Mapping[str, Any]
    ) -> None:
        arm = Arm({"method": label}, method, {**bench.options.settings.get(method, {}), **settings})
        (row,) = where.run([arm], edits, [total])
        rows.append({**row, **_summary(unedited, _after(where, arm, edits, [total], total))})

    if "memit" in names:
        for size in sorted({min(10, total), total} - {1}):
            add(f"memit, batches of {size}", "memit", {"batch_size": size}, bench, base)
    if "rome" in names:
        blocks = len(bench.model.anatomy.mlp_output)
        for layer in sorted({0, blocks // 2, blocks - 1}):
            add(f"rome, layer {layer}", "rome", {"layer": layer}, bench, base)
    if bench.model.model_id == "atlas" and "memit" in names:
        tuned = Workbench(bench.study, EditableModel.load("atlas-instruct"), bench.options, bench.progress)
        arm = Arm({"method": "memit, instruction-tuned"}, "memit", {})
        unedited = _state(tuned, arm, edits[:1], "unedited", None)
        add("memit, instruction-tuned", "memit", {}, tuned, unedited)
    return rows


def _told(row: Mapping[str, Any]) -> str:
    low, high = row["change_interval"]
    return f"{row['change']:+.2f} ({low:+.2f} to {high:+.2f})"


def _claims(rows: Sequence[Mapping[str, Any]], names: Sequence[str], total: int) -> list[str]:
    """The paper's claims as far as they were measured, each with what was found."""
    last = {row["method"]: row for row in rows if row["edits"] == total}
    lost = [f"{name} {_told(last[name])}" for name in names]
    claims = [f"After {total} edits, accuracy on six capabilities changed by: {', '.join(lost)}."]
    for name in names:
        own = [row for row in rows if row["method"] == name]
        fell = next((row["edits"] for row in own if row["change_interval"][1] < -0.05), None)
        if fell is not None:
            claims.append(f"{name}: the whole interval of its change lies below -0.05 at {fell} edits")
    if "grace" in names:
        row = last["grace"]
        claims.append(
            f"grace: capabilities {_told(row)}, reliability {cell(row['reliability'])}, generalization "
            f"{cell(row['generalization'])}"
        )
    for label, row in last.items():
        if label not in names and label != "unedited":
            claims.append(f"{label}: capabilities {_told(row)}, reliability {cell(row['reliability'])}")
    moved = [row for row in rows if row["divergence"] is not None]
    if len(moved) > 2:
        rho = spearman([row["divergence"] for row in moved], [row["change"] for row in moved])
        claims.append(
            f"divergence of weights and change of accuracy over {len(moved)} edited models: rank correlation "
            f"{cell(rho)}"
        )
    return claims


# --- the figure -----------------------------------------------------------------------------------------------------


def _figure(rows: Sequence[Mapping[str, Any]], names: Sequence[str], title: str) -> Any:
    """Six capabilities, then divergence against loss, perplexity of prose, and examples in the prompt."""
    figure, axes = styled_figure(14, 10.5, 3, 3)
    base = rows[0]
    panels = [(name, name.replace("_", " "), axis) for name, axis in zip(CAPABILITIES, axes[:6], strict=True)]
    panels += [("perplexity_prose", "perplexity of prose", axes[7]), ("shots_4", "answers behind 4 examples", axes[8])]
    for column, label, axis in panels:
        _over_edits(axis, rows, names, column, label)
        axis.axhline(number(base[column]), color="#9a9a9a", linestyle="--", linewidth=1)
    axes[7].set_yscale("log")
    cloud = axes[6]
    for place, name in enumerate(names):
        own = [row for row in rows if row["method"] == name and row["divergence"] is not None]
        if own:
            cloud.plot(
                [row["divergence"] for row in own],
                [row["change"] for row in own],
                _MARKERS[place % 7],
                color=COLOURS[place % len(COLOURS)],
                label=name,
            )
    cloud.set(xlabel="divergence of the most changed weight", ylabel="change of accuracy")
    cloud.set_xscale("log")
    if cloud.get_legend_handles_labels()[0]:
        cloud.legend(fontsize=8, frameon=False)
    return titled(figure, title)


def _over_edits(axis: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str], column: str, label: str) -> None:
    ends = []
    for place, name in enumerate(names):
        own = [row for row in rows if row["method"] == name]
        values = [number(row[column]) for row in own]
        colour = COLOURS[place % len(COLOURS)]
        axis.plot([row["edits"] for row in own], values, marker=_MARKERS[place % 7], color=colour, markersize=4)
        ends.append((own[-1]["edits"], values[-1], name, colour))
    axis.set(xlabel="sequential edits", title=label, xscale="log")
    if not column.startswith("perplexity"):
        axis.set_ylim(-0.03, 1.05)
    ticks(axis, sorted({row["edits"] for row in rows if row["edits"]}))
    label_ends(axis, ends)
