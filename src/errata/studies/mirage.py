"""How far scores of teacher forcing stand above what a model answers by itself (2502.11177).

Three ways of scoring the same edited model on the same prompts, from the kindest to the one that users meet: the share
of target tokens that come first when the model is shown the target's own beginning; the target's words somewhere in
what it writes; the target as its answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from errata.adapters.sentences import encoder_for
from errata.editors import editor_names, method_of
from errata.editors.training import find_trained
from errata.errors import ConfigError
from errata.studies.figures import gaps
from errata.studies.result import Published, StudyResult
from errata.studies.wise import whole_shards
from errata.studies.workbench import Workbench

__all__ = ["mirage"]

_ASKED = ("reliability", "generalization")
_SOURCE = "The Mirage of Model Editing (2502.11177), Llama-2-7B-chat, single edits: synthetic, WILD"
# Reliability on ZsRE, scored the synthetic way and as written by the model.
_PUBLISHED = {
    "ft": (1.0, 0.562),
    "mend": (0.967, 0.288),
    "rome": (0.964, 0.741),
    "memit": (0.950, 0.685),
    "grace": (0.986, 0.033),
    "wise": (0.999, 0.139),
}


def mirage(bench: Workbench) -> StudyResult:
    """Every method after the same sequential edits, scored in the three ways."""
    names = bench.methods(_usual(bench))
    edits = bench.edits(bench.count(50, quick=2))
    arms = [bench.arm(name, whole_shards(bench, len(edits)) if method_of(name) == "wise" else None) for name in names]
    rows = [_with_gaps(row) for row in bench.run(arms, edits, [len(edits)])]
    for row in rows:
        if row["refused"]:
            bench.notes.append(f"{row['method']} refused {row['refused']} of the edits")
    wide = max(rows, key=lambda row: row["reliability_gap"])
    asked = [row for row in rows if row["generalization_gap"] is not None]
    means = [sum(row["reliability_gap"] for row in rows) / len(rows)]
    means += [sum(row["generalization_gap"] for row in asked) / len(asked)] if asked else []
    told = " and ".join(
        f"{mean:+.2f} of {name}" for mean, name in zip(means, ("reliability", "generalization"), strict=False)
    )
    found = (
        f"After {len(edits)} edits, teacher forcing adds {told} to what {len(rows)} methods answer by themselves, on "
        f"average; most to the reliability of {wide['method']}: {wide['reliability_forced']:.2f} for "
        f"{wide['reliability']:.2f}."
    )
    return bench.result(
        found=found,
        columns=(
            "method",
            *(
                f"{name}{way}"
                for name in ("reliability", "generalization")
                for way in ("_forced", "_contains", "", "_gap")
            ),
            "locality",
            "locality_forced",
        ),
        rows=rows,
        figure=gaps(rows, found),
        published=[
            Published(f"{method}, reliability on ZsRE", {"forced": forced, "generated": own}, _SOURCE)
            for method, (forced, own) in _PUBLISHED.items()
            if any(row["method"] == method for row in rows)
        ],
    )


def _usual(bench: Workbench) -> list[str]:
    """Every method that can be run here; what cannot is said in the notes."""
    names = list(editor_names())
    if bench.options.methods:
        return names
    if "network" not in bench.given("memoryllm"):
        try:
            find_trained("memoryllm", bench.model, None)
        except ConfigError as error:
            bench.notes.append(f"memoryllm left out: {error}")
            names.remove("memoryllm")
    if bench.model.model_id != "atlas":
        bench.notes.append("mend left out: it needs a network that was trained for the model (errata train mend)")
        names.remove("mend")
    try:
        encoder_for(str(bench.config(bench.arm("serac")).to_record()["encoder"]), bench.model)
    except ConfigError as error:
        bench.notes.append(f"serac left out: {error}")
        names.remove("serac")
    return names


def _with_gaps(row: Mapping[str, Any]) -> dict[str, Any]:
    def gap(name: str) -> float | None:
        own, forced = row[name], row[f"{name}_forced"]
        return None if own is None or forced is None else forced - own

    return {**row, **{f"{name}_gap": gap(name) for name in _ASKED}}
