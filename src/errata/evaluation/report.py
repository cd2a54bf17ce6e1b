"""One self-contained HTML page about a run: scores, figures, examples, baselines, and every setting that matters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errata import __version__
from errata.edit import Edit
from errata.evaluation.controls import Control
from errata.evaluation.figures import retention_figure, scores_figure, svg
from errata.evaluation.metrics import answers_exactly, finite_or_none, same_text
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


def _score_row(name: str, record: Mapping[str, Any], meaning: str) -> dict[str, Any]:
    low, high = record["generated_interval"]
    return {
        "name": name,
        "generated": _share(record["generated"]),
        "interval": "–" if low is None else f"{low:.2f} – {high:.2f}",
        "contains": _share(record["contains"]),
        "teacher_forced": _share(record["teacher_forced"]),
        "edits": record["edits"],
        "meaning": meaning,
    }


def _examples(report: RunReport) -> list[dict[str, Any]]:
    """Spread over the run; one that failed is among them if there is any."""
    asked = list(report.result.asked)
    failed = [a for a in asked if not a.reliability[0][0] or any(not g[0] for g in a.generalization)]
    step = max(1, len(asked) // max(1, report.examples))
    chosen = asked[::step][: report.examples]
    if failed and not any(a in failed for a in chosen):
        chosen[-1] = failed[0]
    before = {prompt: text for a in report.before.asked for prompt, text in a.said.items()}
    return [_example(a, before) for a in chosen]


def _example(asked: AskedEdit, before: Mapping[str, str]) -> dict[str, Any]:
    edit: Edit = asked.edit

    def row(prompt: str, role: str, answer: str | None) -> dict[str, Any]:
        now = asked.said[prompt].strip()
        if answer is None:
            ok = same_text(before[prompt], now)
            verdict = "unchanged" if ok else "changed"
        else:
            ok = answers_exactly(now, answer)
            verdict = "new answer" if ok else "missed"
        return {
            "prompt": prompt,
            "role": role,
            "before": before[prompt].strip(),
            "after": now,
            "ok": ok,
            "verdict": verdict,
        }

    rows = [row(edit.prompt, "the edited prompt", edit.target)]
    rows += [row(text, "another wording", edit.target) for text in edit.rephrases]
    rows += [
        row(p.prompt, f"must not change ({(p.kind or 'locality').replace('_', ' ')})", None) for p in edit.locality
    ]
    rows += [
        row(p.prompt, f"follows from the edit ({(p.kind or 'portability').replace('_', ' ')})", p.answer)
        for p in edit.portability
    ]
    return {"title": f"{edit.prompt} … {edit.ground_truth or '?'} → {edit.target}", "rows": rows}


def write_report(path: Path, report: RunReport) -> Path:
    """Write the page; it opens offline, and nothing in it is loaded from elsewhere."""
    from jinja2 import Environment, PackageLoader

    record = report.result.to_record()
    before = report.before.to_record()
    last = report.rows[-1]
    names = [n for n in _MEANINGS if record[n]["generated"] is not None]
    score_rows = [_score_row(name, record[name], _MEANINGS[name]) for name in names]
    kinds = record["locality_by_kind"]
    score_rows += [_score_row(_KINDS.get(kind, kind), kinds[kind], "part of locality") for kind in kinds]
    control_rows = [
        {
            "name": "unedited",
            **{n: _share(before[n]["generated"]) for n in ("reliability", "generalization", "locality")},
            "perplexity": _share(report.perplexity_before),
            "meaning": "the base model: how often it says the targets by itself",
        },
        {
            "name": "edited",
            **{n: _share(record[n]["generated"]) for n in ("reliability", "generalization", "locality")},
            "perplexity": _share(report.perplexity_after),
            "meaning": "this run",
        },
    ]
    for control in report.controls:
        scores = control.to_record()
        no_op = control.name.startswith("no-op")
        control_rows.append(
            {
                "name": control.name,
                **{n: _share(scores[n]["generated"]) for n in ("reliability", "generalization", "locality")},
                "perplexity": _share(control.perplexity),
                "meaning": "the same method writes back the old answers (its targets here); any loss is damage"
                if no_op
                else "what was written, turned into random directions of the same norm",
            }
        )
    cards = [
        {
            "name": name,
            "value": _share(record[name]["generated"]),
            "note": f"generated, after all {last['edits']} edits",
        }
        for name in names[:3]
    ]
    first, now = finite_or_none(report.perplexity_before), finite_or_none(report.perplexity_after)
    cards.append(
        {
            "name": "perplexity",
            "value": "–" if first is None or now is None else f"{now / first - 1:+.2%}",
            "note": f"{_share(report.perplexity_before)} before, {_share(report.perplexity_after)} after",
        }
    )
    cards.append(
        {"name": "seconds per edit", "value": f"{last['seconds_per_edit']:.2f}", "note": "writing, without preparation"}
    )
    figures = [
        {
            "svg": svg(scores_figure(record, before)),
            "caption": "Before and after. Locality before is 1 by definition: it is agreement with the unedited model.",
        },
        {
            "svg": svg(retention_figure(report.rows)),
            "caption": "Is what held right after an edit still true at the end? Where the lines part, it is forgotten.",
        },
    ]
    raw = [
        {"id": a.edit.id, "target": a.edit.target, "said": a.said, "reliability": a.reliability, "locality": a.locality}
        for a in report.result.asked
    ]
    environment = Environment(loader=PackageLoader("errata.evaluation"), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        title=report.title,
        lead=report.lead,
        cards=cards,
        figures=figures,
        score_rows=score_rows,
        control_rows=control_rows,
        examples=_examples(report),
        protocol=report.protocol,
        raw=json.dumps(raw, ensure_ascii=False, indent=1),
        version=__version__,
        command=report.command,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path
