"""One self-contained HTML page about a run: scores, figures, examples, baselines, and every setting that matters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errata.edit import Edit
from errata.evaluation.controls import Control
from errata.evaluation.figures import retention_figure, scores_figure
from errata.evaluation.metrics import answers_exactly, finite_or_none, same_text
from errata.evaluation.page import Card, Cell, Grid, Page, Picture, Section, Verbatim, write_page
from errata.evaluation.protocol import AskedEdit, Result

__all__ = ["RunReport", "write_report"]

_MEANINGS = {
    "reliability": "the edited prompt itself is answered with the new target",
    "generalization": "so are other wordings of it, none of which the model was ever shown for this fact",
    "locality": "prompts the edit must not touch are answered as before",
    "portability": "what follows from the edit: the same in French, the country of a new birthplace",
}
_KINDS = {
    "same_relation": "locality: same relation, other subject",
    "same_subject": "locality: same subject, other relation",
    "capability": "locality: a capability task",
    "unrelated": "locality: unrelated facts",
}


_WAYS = (
    "All edits are asked after the last one was made. Generated: the model writes greedily from the prompt alone. "
    "Teacher-forced: it is shown the beginning of the answer at every place, as most papers do. Intervals are 95 % "
    "bootstrap intervals over edits."
)


@dataclass
class RunReport:
    """Everything the page shows.

    Attributes:
        rows: the checkpoints' records, in order; result: what was said at the last one.
        before: the unedited model, asked the same.
        perplexity_before, perplexity_after: of held-out text; None and NaN are shown as a dash.
        protocol: settings to print, as pairs.
    """

    title: str
    lead: str
    command: str
    rows: Sequence[Mapping[str, Any]]
    result: Result
    before: Result
    perplexity_before: float | None
    perplexity_after: float | None
    controls: Sequence[Control]
    protocol: Sequence[tuple[str, str]]
    examples: int = 4
    extra: dict[str, Any] = field(default_factory=dict)


def _share(value: Any) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{float(value):.3f}" if math.isfinite(value) else "∞"


_MEASURES = ("reliability", "generalization", "locality")


def _score_row(name: str, record: Mapping[str, Any], meaning: str) -> list[str | Cell]:
    low, high = record["generated_interval"]
    return [
        name,
        _share(record["generated"]),
        "–" if low is None else f"{low:.2f} – {high:.2f}",
        _share(record["contains"]),
        _share(record["teacher_forced"]),
        str(record["edits"]),
        meaning,
    ]


def _examples(report: RunReport) -> list[Grid]:
    """Spread over the run; one that failed is among them if there is any."""
    asked = list(report.result.asked)
    failed = [a for a in asked if not a.reliability[0][0] or any(not g[0] for g in a.generalization)]
    step = max(1, len(asked) // max(1, report.examples))
    chosen = asked[::step][: report.examples]
    if failed and not any(a in failed for a in chosen):
        chosen[-1] = failed[0]
    before = {prompt: text for a in report.before.asked for prompt, text in a.said.items()}
    return [_example(a, before) for a in chosen]


def _example(asked: AskedEdit, before: Mapping[str, str]) -> Grid:
    edit: Edit = asked.edit

    def row(prompt: str, role: str, answer: str | None) -> list[str | Cell]:
        now = asked.said[prompt].strip()
        if answer is None:
            ok = same_text(before[prompt], now)
            verdict = "unchanged" if ok else "changed"
        else:
            ok = answers_exactly(now, answer)
            verdict = "new answer" if ok else "missed"
        return [Cell(prompt, role), before[prompt].strip(), now, Cell(verdict, mark="ok" if ok else "no")]

    rows = [row(edit.prompt, "the edited prompt", edit.target)]
    rows += [row(text, "another wording", edit.target) for text in edit.rephrases]
    rows += [
        row(p.prompt, f"must not change ({(p.kind or 'locality').replace('_', ' ')})", None) for p in edit.locality
    ]
    rows += [
        row(p.prompt, f"follows from the edit ({(p.kind or 'portability').replace('_', ' ')})", p.answer)
        for p in edit.portability
    ]
    title = f"{edit.prompt} … {edit.ground_truth or '?'} → {edit.target}"
    return Grid(("asked", "before", "after", ""), rows, title=title)


def _scores(record: Mapping[str, Any], names: Sequence[str]) -> Grid:
    rows = [_score_row(name, record[name], _MEANINGS[name]) for name in names]
    kinds = record["locality_by_kind"]
    rows += [_score_row(_KINDS.get(kind, kind), kinds[kind], "part of locality") for kind in kinds]
    numbers = ("generated", "interval", "contains", "teacher-forced", "edits")
    return Grid(("", *numbers, "what it means"), rows, frozenset(numbers))


def _baselines(report: RunReport, record: Mapping[str, Any], before: Mapping[str, Any]) -> Grid:
    def row(name: str, scores: Mapping[str, Any], perplexity: float | None, meaning: str) -> list[str | Cell]:
        return [name, *(_share(scores[n]["generated"]) for n in _MEASURES), _share(perplexity), meaning]

    base = "the base model: how often it says the targets by itself"
    rows = [row("unedited", before, report.perplexity_before, base)]
    rows.append(row("edited", record, report.perplexity_after, "this run"))
    for control in report.controls:
        meaning = "what was written, turned into random directions of the same norm"
        if control.name.startswith("no-op"):
            meaning = "the same method writes back the old answers (its targets here); any loss is damage"
        rows.append(row(control.name, control.to_record(), control.perplexity, meaning))
    numbers = (*_MEASURES, "perplexity")
    return Grid(("", *numbers, "what it means"), rows, frozenset(numbers))


def _cards(report: RunReport, record: Mapping[str, Any], names: Sequence[str]) -> list[Card]:
    last = report.rows[-1]
    note = f"generated, after all {last['edits']} edits"
    cards = [Card(name, _share(record[name]["generated"]), note) for name in names[:3]]
    first, now = finite_or_none(report.perplexity_before), finite_or_none(report.perplexity_after)
    change = "–" if first is None or now is None else f"{now / first - 1:+.2%}"
    told = f"{_share(report.perplexity_before)} before, {_share(report.perplexity_after)} after"
    return [
        *cards,
        Card("perplexity", change, told),
        Card("seconds per edit", f"{last['seconds_per_edit']:.2f}", "writing, without preparation"),
    ]


def write_report(path: Path, report: RunReport) -> Path:
    """Write the page; it opens offline, and nothing in it is loaded from elsewhere."""
    record, before = report.result.to_record(), report.before.to_record()
    names = [n for n in _MEANINGS if record[n]["generated"] is not None]
    raw = [
        {"id": a.edit.id, "target": a.edit.target, "said": a.said, "reliability": a.reliability, "locality": a.locality}
        for a in report.result.asked
    ]
    sections = [
        Section(
            "",
            [
                Picture(
                    scores_figure(record, before),
                    "Before and after. Locality before is 1 by definition: it is agreement with the unedited model.",
                ),
                Picture(
                    retention_figure(report.rows),
                    "Is what held right after an edit still true at the end? Where the lines part, it is forgotten.",
                ),
            ],
        ),
        Section("Scores", [_scores(record, names)], _WAYS),
        Section("Baselines", [_baselines(report, record, before)]),
        Section("A few facts, before and after", _examples(report)),
        Section(
            "Protocol",
            [
                Grid(("setting", "value"), report.protocol),
                Verbatim("Everything that was said, as JSON", json.dumps(raw, ensure_ascii=False, indent=1)),
            ],
        ),
    ]
    cards = _cards(report, record, names)
    return write_page(path, Page(report.title, report.lead, sections, report.command, cards=cards))
