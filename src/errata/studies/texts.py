"""Edits of whole sentences and passages: WISE's hallucination and Temporal sets, scored by how likely texts become.

What is likely is measured teacher-forced; only locality has a generated score beside it. Both sets are for models that
know the world at large. atlas does not, so on atlas they show what an editor does with long targets, and nothing
about what the papers' models knew before.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from errata.adapters import Adapter
from errata.edit import Edit, Probe
from errata.errors import ConfigError
from errata.evaluation import Examination, finite_or_none
from errata.evaluation.metrics import bootstrap_mean
from errata.evaluation.tables import cell
from errata.model import EditableModel
from errata.model.scoring import ForcedAnswer, forced_answers
from errata.studies.figures import dots
from errata.studies.result import Published, StudyResult
from errata.studies.wise import whole_shards
from errata.studies.workbench import Arm, Workbench, share

__all__ = ["hallucination", "temporal"]

_METHODS = ("wise", "grace", "memoir", "ft")
_CLIP = 100.0  # of a single edit's perplexity, as a maintainer of WISE's code proposes
_LIKELY = 0.8  # probability from which a token counts, and, as a geometric mean over tokens, a text

Ask = Callable[[Sequence[Edit], Adapter | None], dict[str, Any]]


def _cut(text: str, words: int) -> str:
    """The first words of a text; all of it for 0."""
    return " ".join(text.split()[:words]) if words else text


def _shortened(edit: Edit, words: int) -> Edit:
    """The edit with every answer, and every prompt that is not cut as data, kept to so many words."""

    def probe(one: Probe) -> Probe:
        return one.model_copy(update={"answer": None if one.answer is None else _cut(one.answer, words)})

    changed = {
        "target": _cut(edit.target, words),
        "locality": tuple(map(probe, edit.locality)),
        "portability": tuple(map(probe, edit.portability)),
    }
    return edit.model_copy(update=changed)


def _texts(bench: Workbench, form: str) -> list[Edit]:
    """The user's edits, their answers cut as asked for, without those too long for the model."""
    words = bench.options.words
    edits = [_shortened(edit, words) for edit in bench.file_edits(form, bench.count(10, quick=2))]
    if words:
        bench.notes.append(f"texts behind prompts are cut to {words} words (--words 0 takes them whole)")
    limit = getattr(bench.model.model.config, "max_position_embeddings", None) or math.inf
    fitting = [edit for edit in edits if _longest(bench.model, edit) <= limit]
    if not fitting:
        raise ConfigError(f"every text is longer than the model's {limit} tokens; cut them: --words 40")
    if len(fitting) < len(edits):
        bench.notes.append(f"{len(edits) - len(fitting)} edits are longer than the model's {limit} tokens: left out")
    return fitting


def _longest(model: EditableModel, edit: Edit) -> int:
    """Tokens of the longest prompt with its answer, after the longest text a method puts before prompts (20 tokens)."""
    pairs = [
        (edit.prompt, edit.target),
        *((one.prompt, one.answer or "") for one in (*edit.locality, *edit.portability)),
    ]
    return max(len(model.passage(prompt, answer).ids) for prompt, answer in pairs) + 20


def _forced(model: EditableModel, pairs: Sequence[tuple[str, str]]) -> list[ForcedAnswer]:
    return forced_answers(model, [model.passage(prompt, answer) for prompt, answer in pairs], batch_tokens=4096)


def _runs(bench: Workbench, edits: Sequence[Edit], ask: Ask) -> list[dict[str, Any]]:
    """The unedited model and every method after each of its checkpoints, asked by the study's own questions."""
    methods = bench.methods(_METHODS)
    counts = [count for count in (10, 75, 100) if count < len(edits)] + [len(edits)]
    # Every text that MEMOIR and WISE train behind is one more long row; two keep that affordable.
    own: dict[str, Mapping[str, Any]] = {"memoir": {"contexts": 2}, "wise": {"contexts": 2}}
    first = Arm({"method": "unedited"}, methods[0], bench.given(methods[0], own.get(methods[0])))
    rows = [
        {
            "method": "unedited",
            "edits": len(edits),
            **bench.row(first, edits, "unedited", functools.partial(ask, edits, None)),
        }
    ]
    for method in methods:
        for count in counts:
            settings: Mapping[str, Any] = own.get(method, {})
            if method == "wise":
                settings = {**settings, **whole_shards(bench, count)}
            arm = bench.arm(method, settings)
            with bench.edited(arm, edits[:count], [count]) as adapter:
                asked = edits[:count]
                row = bench.row(arm, asked, "texts", functools.partial(ask, asked, adapter))
            rows.append({"method": method, "edits": count, **row})
    bench.notes.append(
        "memoir and wise train behind two texts of the model's own; --set memoir.contexts=10 gives them more"
    )
    return [{**row, "run": row["method"] if len(counts) == 1 else f"{row['method']}, {row['edits']}"} for row in rows]


def _locality(bench: Workbench, edits: Sequence[Edit], adapter: Adapter | None) -> dict[str, Any]:
    """Agreement with the unedited model on the locality prompts; 1 by definition without an adapter."""
    if adapter is None:
        return {"locality": 1.0, "locality_forced": 1.0}
    asked: Examination = bench.examination(edits, adapter)
    record = asked.ask(edits, bench.progress).locality.to_record()
    return {
        "locality": record["generated"],
        "locality_interval": record["generated_interval"],
        "locality_forced": record["teacher_forced"],
    }


def _nll(answer: ForcedAnswer) -> float:
    """Mean negative log-likelihood of an answer's tokens, in nats."""
    return -sum(answer.log_probs) / len(answer.log_probs)


def hallucination(bench: Workbench) -> StudyResult:
    """Perplexity of the true sentence behind the passage, before and after, and what it does to other texts."""
    edits = _texts(bench, "WikiBio hallucinations")

    def ask(asked: Sequence[Edit], adapter: Adapter | None) -> dict[str, Any]:
        losses = [_nll(answer) for answer in _forced(bench.model, [(edit.prompt, edit.target) for edit in asked])]
        each = [math.exp(min(loss, 700.0)) for loss in losses]
        return {
            "perplexity": finite_or_none(statistics.fmean(each)),
            "perplexity_median": statistics.median(each),
            "perplexity_clipped": statistics.fmean(min(value, _CLIP) for value in each),
            **_locality(bench, asked, adapter),
        }

    rows = _runs(bench, edits, ask)
    before, after = rows[0], [row for row in rows[1:] if row["edits"] == len(edits)]
    told = [f"{row['method']} {cell(row['perplexity_median'])} (locality {row['locality']:.2f})" for row in after]
    found = (
        f"The median perplexity of {len(edits)} true sentences falls from {cell(before['perplexity_median'])} to: "
        f"{', '.join(told)}."
    )
    bench.notes.append(
        "perplexity: exp of an edit's mean negative log-likelihood, averaged over edits as in WISE; one bad edit can "
        f"carry that mean, so the median stands beside it, and the mean with each edit clipped at {_CLIP:.0f}"
    )
    published = [
        ("LLaMA-2-7B unedited", 27.4, None),
        ("WISE, 1 edit", 1.91, 1.0),
        ("WISE, 10 edits", 1.04, 1.0),
        ("WISE, 100 edits", 1.14, 1.0),
        ("WISE, 600 edits", 3.12, 0.99),
        ("GRACE, 10 edits", 8.67, 1.0),
        ("GRACE, 600 edits", 9.34, 1.0),
    ]
    panels = ("perplexity", "perplexity_median", "locality")
    names = {
        "perplexity": "mean over edits",
        "perplexity_median": "median over edits",
        "locality": "other prompts left as they were",
    }
    return bench.result(
        found=found,
        columns=("method", "edits", *panels[:2], "perplexity_clipped", "locality", "locality_forced"),
        rows=rows,
        figure=dots(rows, "run", found, panels=panels, names=names, log=frozenset(panels[:2])),
        published=[
            Published(
                what,
                {"perplexity": value, **({} if local is None else {"locality_forced": local})},
                "WISE (2405.14768), LLaMA-2-7B",
            )
            for what, value, local in published
        ],
    )


def temporal(bench: Workbench) -> StudyResult:
    """Whether the edited text is likely, and whether another passage about the same entity has become so."""
    edits = _texts(bench, "Temporal")

    def likely(pairs: Sequence[tuple[str, str]]) -> tuple[list[float], list[float]]:
        """Per text: whether its mean loss is below −ln 0.8, and the share of its tokens above 0.8."""
        answers = _forced(bench.model, pairs)
        whole = [float(_nll(answer) < -math.log(_LIKELY)) for answer in answers]
        tokens = [share([float(p > math.log(_LIKELY)) for p in answer.log_probs]) or 0.0 for answer in answers]
        return whole, tokens

    def ask(asked: Sequence[Edit], adapter: Adapter | None) -> dict[str, Any]:
        others = [(edit.portability[0].prompt, edit.portability[0].answer or "") for edit in asked]
        parts = {"reliability": [(edit.prompt, edit.target) for edit in asked], "out_of_distribution": others}
        row: dict[str, Any] = {}
        for name, pairs in parts.items():
            whole, tokens = likely(pairs)
            for key, values in ((name, whole), (f"{name}_tokens", tokens)):
                mean = bootstrap_mean(values)
                row |= {key: mean.value, f"{key}_interval": [mean.low, mean.high]}
        return {**row, **_locality(bench, asked, adapter)}

    rows = _runs(bench, edits, ask)
    before, after = rows[0], [row for row in rows[1:] if row["edits"] == len(edits)]
    told = [
        f"{row['method']} {row['reliability_tokens']:.2f} / {row['out_of_distribution_tokens']:.2f}" for row in after
    ]
    found = (
        f"Share of tokens with a probability above {_LIKELY}, of the edited text / of another about the same entity: "
        f"{before['reliability_tokens']:.2f} / {before['out_of_distribution_tokens']:.2f} unedited; {', '.join(told)}."
    )
    bench.notes += [
        f"reliability and out of distribution: texts whose mean loss is below −ln {_LIKELY}, as the paper defines it",
        f"…tokens: share of tokens with a probability above {_LIKELY}; the published code scores such a share, but of "
        "the prompt's own tokens",
    ]
    panels = ("reliability", "out_of_distribution", "reliability_tokens", "out_of_distribution_tokens", "locality")
    names = {
        "reliability": "edited texts that are likely",
        "out_of_distribution": "other texts that are likely",
        "reliability_tokens": "likely tokens, edited text",
        "out_of_distribution_tokens": "likely tokens, other text",
        "locality": "other prompts left as they were",
    }
    source = "WISE (2405.14768), GPT-J"
    values = {
        "unedited": (0.56, 0.21, None),
        "WISE, 10 edits": (0.99, 0.36, 0.98),
        "WISE, 75 edits": (0.96, 0.37, 1.0),
        "GRACE, 10 and 75 edits": (0.97, 0.28, 1.0),
    }
    keys = ("reliability", "out_of_distribution", "locality_forced")
    return bench.result(
        found=found,
        columns=("method", "edits", *panels, "locality_forced"),
        rows=rows,
        figure=dots(rows, "run", found, panels=panels, names=names),
        published=[
            Published(what, {key: value for key, value in zip(keys, row, strict=True) if value is not None}, source)
            for what, row in values.items()
        ],
    )
