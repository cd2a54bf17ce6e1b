"""Which signal knows a question again that is asked in other words, and leaves the same question of others alone.

Nothing is trained. Each signal is calibrated as its editor calibrates it, the edits' masks or keys are stored, and the
router is asked what it would do with every prompt around the edits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from errata.adapters import Explanation, KeyedAdapter, RoutedAdapter
from errata.edit import Edit
from errata.editors.grace import Grace, GraceConfig
from errata.editors.memoir import Memoir, MemoirConfig
from errata.errors import ConfigError
from errata.evaluation.figures import COLOURS, label_ends, number, styled_figure
from errata.model.spans import spellings
from errata.routing import TopHashRouter
from errata.studies.figures import titled
from errata.studies.result import StudyResult
from errata.studies.workbench import Arm, Workbench, measured, share

__all__ = ["routing"]

_PAPERS = "mean (the paper's)"
_DISTANCE = "distance (GRACE's)"
_SIGNALS: dict[str, dict[str, Any]] = {
    _PAPERS: {"pooling": "mean", "subject_check": False},
    "last token": {"pooling": "last", "subject_check": False},
    "last token, subject check": {"pooling": "last", "subject_check": True},
    "mean without first token": {"pooling": "content_mean", "subject_check": False},
    "last token, not centred": {"pooling": "last", "background": 0, "subject_check": False},
    "random mask": {"pooling": "mean", "mask": "random", "subject_check": False},
}
_ALLOWED = 0.02  # share of false fires at which signals with one threshold are compared
_AT_RATE = "reached_at_2_percent"
_HARD = "same_relation"
_CHUNK = 2048  # prompts between two words of progress

Home = Mapping[str, str]


def routing(bench: Workbench) -> StudyResult:
    """Every signal's prompts reached and false fires, at its calibrated thresholds and at one rate for all."""
    signals = dict(list(_SIGNALS.items())[: 3 if bench.options.quick else None])
    arms = bench.arms("memoir", "signal", signals)
    config = bench.config(arms[0])
    assert isinstance(config, MemoirConfig)
    # Where MEMOIR recognises prompts, and as often mistaken on what it is calibrated with.
    like = {"layer": config.layer, "false_fires": config.false_fires}
    arms.append(Arm({"signal": _DISTANCE}, "grace", like))
    for arm in arms:
        bench.enter(arm)
    edits = bench.edits(bench.count(700, quick=6))
    if not any(edit.rephrases for edit in edits) or not any(edit.locality for edit in edits):
        raise ConfigError("rephrases and locality prompts tell signals apart; give a file of edits that have both")
    rows = []
    for arm in arms:
        make = functools.partial(_masks if arm.method == "memoir" else _keys, bench, arm, edits)
        rows.append({**arm.label, **bench.row(arm, edits, "routing", make)})
    kinds = [name for name in rows[0] if name.startswith("fired_") and not name.endswith("_interval")]
    hard = f"fired_{_HARD}" if f"fired_{_HARD}" in kinds else "false_fires"
    best, papers = max(rows, key=lambda row: row["rephrases_reached"]), rows[0]
    found = (
        f"{len(edits):,} edits stored: '{best['signal']}' reaches most other wordings, "
        f"{best['rephrases_reached']:.2f} (hard negatives that fire: {number(best[hard]):.2f}); the paper's mean "
        f"reaches {papers['rephrases_reached']:.2f} ({number(papers[hard]):.2f})."
    )
    even = [row for row in rows if row[_AT_RATE] is not None]
    if even:
        first = max(even, key=lambda row: row[_AT_RATE])
        found += f" Of those with one threshold, at 2 % false fires: '{first['signal']}', {first[_AT_RATE]:.2f}."
    bench.notes += [
        "reached: the edit itself is nearest, and fires; elsewhere: another one is, and fires",
        "thresholds are calibrated on errata's own questions, not on these prompts; for distances it is the radius; "
        "not named: what is asked of a prompt that does not name the edit's subject",
        "at 2 percent: with one threshold (for distances, one radius) chosen afterwards, at which 2 % of the locality "
        "prompts fire",
        "WISE's signal is what it has trained, so it is not among these",
    ]
    return bench.result(
        found=found,
        columns=(
            "signal",
            "threshold",
            "not_named",
            "own_reached",
            "rephrases_reached",
            "rephrases_elsewhere",
            "false_fires",
            *kinds,
            _AT_RATE,
        ),
        rows=rows,
        figure=_figure(rows, hard, found),
    )


def _figure(rows: Sequence[Mapping[str, Any]], hard: str, title: str) -> Any:
    """Rephrases reached over hard negatives that fire, a point per signal."""
    figure, (axes,) = styled_figure(8.6, 4.8)
    axes.set(
        xlabel="false fires: the same relation asked of other subjects" if hard != "false_fires" else "false fires",
        ylabel="other wordings that reach their edit",
        ylim=(-0.03, 1.05),
    )
    ends = []
    for place, row in enumerate(rows):
        colour, x, y = COLOURS[place % len(COLOURS)], number(row[hard]), number(row["rephrases_reached"])
        for interval, flat in ((row.get(f"{hard}_interval"), True), (row["rephrases_reached_interval"], False)):
            if interval:
                across, up = (interval, [y, y]) if flat else ([x, x], interval)
                axes.plot(across, up, color=colour, linewidth=1.4, alpha=0.5)
        axes.plot(x, y, "osD^vP*"[place % 7], color=colour, markersize=8)
        ends.append((max(x, (row.get(f"{hard}_interval") or [x, x])[1]), y, row["signal"], colour))
    right = max(0.02, *(x for x, *_ in ends))
    axes.set_xlim(-0.04 * right, 1.5 * right)  # room for the names
    label_ends(axes, ends)
    return titled(figure, title)


# --- storing --------------------------------------------------------------------------------------------------------


def _masks(bench: Workbench, arm: Arm, edits: Sequence[Edit]) -> dict[str, Any]:
    """The row of a signal of MEMOIR: its masks are stored as its editor stores them."""
    model, config = bench.model, bench.config(arm)
    assert isinstance(config, MemoirConfig)
    editor = Memoir(model, config)
    try:
        editor.prepare(bench.progress)
    finally:
        editor.adapter.detach()
    adapter = editor.adapter
    assert isinstance(adapter, RoutedAdapter)
    router = adapter.router
    assert isinstance(router, TopHashRouter)
    masks = torch.empty(len(edits), router.width, dtype=torch.bool)
    sharpest = torch.empty(len(edits), router.index.count, dtype=torch.long)
    for indices, gathered in adapter.gathered([edit.prompt for edit in edits], model):
        masks[indices] = router.masks_of(gathered)
        sharpest[indices] = router.sharpest(router.features(gathered))
    latest = {mask.numpy().tobytes(): place for place, mask in enumerate(masks)}  # it takes the place of the same mask
    for place in sorted(latest.values()):
        edit = edits[place]
        words = spellings(model.tokenizer, edit.prompt, edit.subject) if edit.subject else ()
        router.append(masks[place], edit.id, sharpest[place], words)
    limits: tuple[float, float | None] = (router.threshold, None)
    if router.named_threshold is not None:
        limits = router.named_threshold, router.unnamed_threshold
    home = {edit.id: edit.id for edit in edits}
    return _asked(bench, adapter, home, edits, limits)


def _keys(bench: Workbench, arm: Arm, edits: Sequence[Edit]) -> dict[str, Any]:
    """The row of GRACE's signal: keys, and balls around them that follow from the targets."""
    model, config = bench.model, bench.config(arm)
    assert isinstance(config, GraceConfig)
    editor = Grace(model, config)
    try:
        editor.prepare(bench.progress)
    finally:
        editor.adapter.detach()
    adapter = editor.adapter
    assert isinstance(adapter, KeyedAdapter)
    router = adapter.router
    keys = torch.empty(len(edits), router.width)
    for indices, gathered in adapter.gathered([edit.prompt for edit in edits], model):
        keys[indices] = gathered.cpu()
    for edit, key in zip(edits, keys, strict=True):
        router.append(edit.id, key, model.passage(edit.prompt, edit.target).answer)
    # Who joined a ball is reached through it: it answers the same.
    home = {owner: router.owners[cell] for owner, cell in zip(router.owners, router.cells, strict=True)}
    return _asked(bench, adapter, home, edits, (router.radius, None))


# --- asking ---------------------------------------------------------------------------------------------------------


def _asked(
    bench: Workbench, adapter: RoutedAdapter, home: Home, edits: Sequence[Edit], limits: tuple[float, float | None]
) -> dict[str, Any]:
    """What the router does with every prompt around the edits.

    Args:
        home: per edit, the one whose entry answers for it.
        limits: the threshold, and another one for prompts that do not name the subject, if there is one.
    """
    # In some data sets a locality prompt of one edit is what another one edits; there it should fire.
    edited = {text for edit in edits for text in (edit.prompt, *edit.rephrases)}
    probes = {edit.id: [probe for probe in edit.locality if probe.prompt not in edited] for edit in edits}
    others = {probe.prompt for own in probes.values() for probe in own}
    met = _explained(bench, adapter, sorted(edited | others))

    def reached(edit: Edit, text: str) -> float:
        return float(met[text].fires and met[text].edit_id == home[edit.id])

    def elsewhere(edit: Edit, text: str) -> float:
        return float(met[text].fires and met[text].edit_id != home[edit.id])

    def over_wordings(ask: Callable[[Edit, str], float]) -> list[list[float]]:
        return [[ask(edit, text) for text in edit.rephrases] for edit in edits]

    kinds = dict.fromkeys(probe.kind or "other" for own in probes.values() for probe in own)
    fired = {
        f"fired_{kind}": [
            [float(met[p.prompt].fires) for p in own if (p.kind or "other") == kind] for own in probes.values()
        ]
        for kind in sorted(kinds, key=lambda kind: (kind != _HARD, kind))
    }
    at_rate = None
    if limits[1] is None and others:
        wordings = [(met[text].score, met[text].edit_id == home[edit.id]) for edit in edits for text in edit.rephrases]
        at_rate = _reached_at_rate(wordings, [met[text].score for text in others], _ALLOWED)
    return {
        "entries": len(adapter.router),
        "threshold": limits[0],
        "not_named": limits[1],
        "own_reached": share([reached(edit, edit.prompt) for edit in edits]),
        **_over_edits("rephrases_reached", over_wordings(reached)),
        **_over_edits("rephrases_elsewhere", over_wordings(elsewhere)),
        **_over_edits("false_fires", [[float(met[p.prompt].fires) for p in own] for own in probes.values()]),
        **{name: value for kind, own in fired.items() for name, value in _over_edits(kind, own).items()},
        _AT_RATE: at_rate,
    }


def _explained(bench: Workbench, adapter: RoutedAdapter, prompts: Sequence[str]) -> dict[str, Explanation]:
    """What the router would do with each prompt."""
    found: dict[str, Explanation] = {}
    bench.progress.start("asking the router", len(prompts))
    for start in range(0, len(prompts), _CHUNK):
        part = prompts[start : start + _CHUNK]
        found.update(zip(part, adapter.explain(part, bench.model), strict=True))
        bench.progress.advance(len(part))
    return found


def _reached_at_rate(wordings: Sequence[tuple[float, bool]], others: Sequence[float], rate: float) -> float | None:
    """The share of wordings that reach their edit with the lowest threshold that at most this share of others passes.

    Args:
        wordings: score, and whether the nearest entry is the right one; others: scores of what must not fire.
    """
    ranked = sorted(others, reverse=True)
    beyond = ranked[int(rate * len(ranked))]  # the first that must not pass any more
    return share([float(right and score > beyond) for score, right in wordings])


def _over_edits(name: str, values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A column with its interval: the mean over edits of each one's own mean."""
    return measured(name, [sum(own) / len(own) for own in values if own])
