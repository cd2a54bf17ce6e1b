"""What is left of edits that were taken out again, and what taking them out costs the others."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

from errata.adapters import Adapter
from errata.edit import Edit
from errata.errors import ConfigError, EditError
from errata.evaluation import Examination, Result
from errata.evaluation.metrics import answers_exactly, bootstrap_mean
from errata.evaluation.tables import cell
from errata.studies.figures import dots
from errata.studies.result import StudyResult
from errata.studies.wise import whole_shards
from errata.studies.workbench import Workbench, measured, share

__all__ = ["revert"]

_ONE_IN = 10


def revert(bench: Workbench) -> StudyResult:
    """Make edits, take a tenth of them out one by one, and compare with the model before and without them."""
    methods = bench.methods(("memoir", "grace"))
    edits = bench.edits(bench.count(200, quick=6))
    if len(edits) < 2:
        raise ConfigError("--edits: give at least 2, so that one can be taken out and one is left")
    order = random.Random(f"revert {bench.options.seed}").sample(range(len(edits)), len(edits))
    rows = []
    for method in methods:
        own = whole_shards(bench, len(edits)) if method == "wise" else None
        arm = bench.arm(method, own)
        with bench.edited(arm, edits, [len(edits)]) as adapter:
            make = functools.partial(_without_some, bench, adapter, edits, order)
            rows.append({**arm.label, **bench.row(arm, edits, {"reverted": order}, make)})
    told = [
        f"with {row['method']} {cell(row['as_unedited'])} of their prompts are answered as by the unedited model, and "
        f"the others lose {row['points_lost']:.1f} points ({row['points_low']:.1f} to {row['points_high']:.1f})"
        for row in rows
    ]
    found = f"{rows[0]['reverted']} of {rows[0]['edits']} edits taken out one by one: {'; '.join(told)}."
    bench.notes += [
        "as unedited: what is generated is letter for letter what the unedited model generates",
        "another fires: reverted prompts that come so close to another edit that this one answers them from now on",
        "points lost: reliability of the edits that stay, generated, before minus after, in percentage points",
    ]
    panels = ("as_unedited", "wordings_as_unedited", "others_before", "others_after")
    names = {
        "as_unedited": "reverted prompts said as before",
        "wordings_as_unedited": "their other wordings",
        "others_before": "the others' reliability, before",
        "others_after": "and after the reverts",
    }
    return bench.result(
        found=found,
        columns=(
            "method",
            "edits",
            "reverted",
            "exact",
            "approximate",
            "inseparable",
            "as_unedited",
            "wordings_as_unedited",
            "still_target",
            "another_fires",
            "others_before",
            "others_after",
            "points_lost",
            "points_low",
            "points_high",
            "locality_before",
            "locality_after",
        ),
        rows=rows,
        figure=dots(rows, "method", found, panels=panels, names=names),
    )


def _without_some(bench: Workbench, adapter: Adapter, edits: Sequence[Edit], order: Sequence[int]) -> dict[str, Any]:
    """Revert the first tenth, in this order, of what the adapter holds."""
    held = [edits[number] for number in order if adapter.holds(edits[number].id)]
    if len(held) < 2:
        raise ConfigError(f"of {len(edits)} edits the adapter holds {len(held)}; nothing can be reverted beside others")
    gone, others = held[: (count := max(1, len(held) // _ONE_IN))], held[count:]
    examination = Examination(bench.model, held)
    with adapter.detached():
        unedited = examination.ask_unedited(bench.progress)
    before = examination.ask(held, bench.progress)
    outcomes: list[str] = []
    bench.progress.start("reverting", len(gone))
    for edit in gone:
        try:
            outcomes.append(adapter.revert(edit.id).exactness)
        except EditError:  # written in one batch with others; it stays, and counts as not taken out
            outcomes.append("inseparable")
        bench.progress.advance()
    after = examination.ask(held, bench.progress)
    prompts, wordings, still = [], [], []
    for seen, now in zip(unedited.asked[:count], after.asked[:count], strict=True):
        edit = seen.edit
        prompts.append(float(now.said[edit.prompt] == seen.said[edit.prompt]))
        still.append(float(answers_exactly(now.said[edit.prompt], edit.target)))
        same = [float(now.said[text] == seen.said[text]) for text in edit.rephrases]
        wordings += [sum(same) / len(same)] if same else []
    kept = [[one.reliability[0][0] for one in result.asked[count:]] for result in (before, after)]
    lost = bootstrap_mean([100 * (was - now) for was, now in zip(*kept, strict=True)])
    return {
        "edits": len(edits),
        "reverted": len(gone),
        **{name: outcomes.count(name) for name in ("exact", "approximate", "inseparable")},
        **measured("as_unedited", prompts),
        **measured("wordings_as_unedited", wordings),
        "still_target": share(still),
        "another_fires": share([float(one.fires) for one in adapter.explain([edit.prompt for edit in gone])]),
        "others": len(others),
        **measured("others_before", kept[0]),
        **measured("others_after", kept[1]),
        "points_lost": lost.value,
        "points_low": lost.low,
        "points_high": lost.high,
        "locality_before": _locality(before),
        "locality_after": _locality(after),
    }


def _locality(result: Result) -> Any:
    return result.locality.to_record()["generated"]
