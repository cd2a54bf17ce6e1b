"""`errata evaluate`, `compare`, `table`, `bench`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.atlas.shipped import ATLAS_NAMES
from errata.cli.common import (
    check_out,
    load_adapter,
    load_edits,
    load_model,
    load_texts,
    parse_numbers,
    parse_settings,
    this_command,
)
from errata.cli.output import emit, log, plain
from errata.errors import ConfigError
from errata.progress import Progress, progress_bar

if TYPE_CHECKING:
    from errata.adapters import Adapter
    from errata.evaluation import Comparison, Examination
    from errata.evaluation.orders import OrderedComparisons

__all__ = ["bench", "compare", "evaluate", "table"]

_RANKED = ("efficacy", "paraphrase", "neighbourhood", "score")
_JUDGE_KEY = "ERRATA_JUDGE_KEY"
_NAMES = ("reliability", "generalization", "locality", "portability")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _controls(
    adapter: Adapter, examination: Examination, texts: Sequence[str], progress: Progress
) -> list[dict[str, Any]]:
    """Random content in the adapter's place, and no-op edits by a fresh editor of its method and settings."""
    from errata.editors import editor_class
    from errata.evaluation.controls import no_op_control, random_control

    found = [random_control(adapter, examination, texts, progress=progress)]
    try:
        cls = editor_class(adapter.editor)
    except ConfigError as error:
        log(f"no-op edits are left out: {error}")
    else:
        model = adapter.model
        with adapter.detached():
            editor = cls(model, cls.Config.from_record(adapter.editor_config))
            found.append(no_op_control(editor, examination, texts, progress))
    return [control.to_record() for control in found]


def _say_judged(judged: dict[str, Any]) -> None:
    shares = ", ".join(f"{name} {_number(judged[name]['correct'])}" for name in _NAMES if name in judged)
    print(f"called correct by the judge {judged['model']}: {shares}")
    beyond = f"Cohen's kappa {_number(judged['kappa'])}"
    print(
        f"  {judged['judged']} of {judged['asked']} answers judged; agrees with exact match on "
        f"{_number(judged['agreement'])} ({beyond}); right to the judge alone {judged['judge_only']}, to exact match "
        f"alone {judged['exact_only']}; replies in {judged['log']}"
    )
    if judged["failures"]:
        told = ", ".join(f"{count} × {name}" for name, count in judged["failures"].items())
        print(f"  no verdict: {told}; the same command asks these again")


def evaluate(
    model_name: str,
    adapter_path: Path | None,
    edits_path: Path,
    limit: int | None,
    text: Path | None,
    controls: bool,
    rankings: bool,
    kl: bool,
    fluency: bool,
    references: Path | None,
    judge_url: str | None,
    judge_model: str | None,
    judge_log: Path,
    max_new_tokens: int,
    strict: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    from errata.evaluation import Examination, run_provenance
    from errata.evaluation.divergence import locality_divergence
    from errata.evaluation.free_text import read_references, write_freely
    from errata.evaluation.judge import Judge, judge_answers
    from errata.evaluation.metrics import finite_or_none
    from errata.evaluation.rankings import rank_answers

    found = load_edits(edits_path, limit, strict)
    texts = load_texts(text)
    if kl and adapter_path is None:
        raise ConfigError("--kl compares an edited model with its base; give --adapter")
    if references is not None and not fluency:
        raise ConfigError("--references are compared with what is written freely; give --fluency too")
    about = {} if references is None else read_references(references)
    if (judge_url is None) != (judge_model is None):
        raise ConfigError("a judge needs both its server and its name: --judge http://HOST:PORT/v1 --judge-model NAME")
    judge = None
    if judge_url is not None and judge_model is not None:
        judge = Judge(judge_url, judge_model, judge_log, key=os.environ.get(_JUDGE_KEY))
    model = load_model(model_name, device, dtype)
    examination = Examination(model, found.edits, max_new_tokens)
    control_records: list[dict[str, Any]] = []
    ranked: dict[str, dict[str, Any]] = {}
    moved: dict[str, Any] | None = None
    free: dict[str, dict[str, Any]] = {}
    judged: dict[str, Any] | None = None
    with progress_bar() as progress:
        if rankings:  # first, so that edits which cannot be ranked are found before anything is asked
            ranked["before"] = rank_answers(model, found.edits, progress=progress).to_record()
        if fluency:
            free["before"] = write_freely(model, found.edits, references=about, progress=progress).to_record()
        unedited = examination.ask_unedited(progress)
        before = model.perplexity(texts)
        adapter = load_adapter(adapter_path, model)
        result = unedited if adapter is None else examination.ask(progress=progress)
        after = before if adapter is None else model.perplexity(texts)
        if rankings and adapter is not None:
            ranked["after"] = rank_answers(model, found.edits, progress=progress).to_record()
        if fluency and adapter is not None:
            free["after"] = write_freely(model, found.edits, references=about, progress=progress).to_record()
        if kl:
            moved = locality_divergence(model, found.edits, texts, progress=progress).to_record()
        if judge is not None:
            found_right = judge_answers(judge, result.asked, progress).to_record()
            judged = {"url": judge.url, "model": judge.model, "log": str(judge_log), **found_right}
        if adapter is not None and controls:
            log("baselines: random content of the same norm, and edits that say nothing new; --no-controls skips them")
            control_records = _controls(adapter, examination, texts, progress)
    record: dict[str, Any] = {
        "model": model.model_id,
        "adapter": None if adapter is None else str(adapter_path),
        "format": found.format,
        "max_new_tokens": max_new_tokens,
        **result.to_record(),
        "perplexity": {"before": finite_or_none(before), "after": finite_or_none(after)},
        "unedited": {name: unedited.score(name).to_record() for name in _NAMES},
        "controls": control_records,
        "rankings": ranked or None,
        "kl": moved,
        "free_text": free or None,
        "judge": judged,
        "records_left_out": len(found.problems),
        "provenance": run_provenance(model, None if adapter is None else adapter.editor_config),
    }

    def words() -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{len(found.edits)} edits ({found.format}), protocol {result.protocol}")
        for column in ("", "unedited", "generated", "interval", "contains", "F1", "teacher-forced", "edits asked"):
            table.add_column(column, justify="left" if not column else "right")

        def row(label: str, score: dict[str, Any], unedited: str = "") -> None:
            low, high = score["generated_interval"]
            interval = "–" if low is None else f"{low:.2f}–{high:.2f}"
            ways = [_number(score[way]) for way in ("generated", "contains", "f1", "teacher_forced")]
            table.add_row(Text(label), unedited, ways[0], interval, *ways[1:], str(score["edits"]))

        for name in _NAMES:
            row(name, record[name], _number(record["unedited"][name]["generated"]))
        for name in ("locality", "portability"):
            for kind, score in record[f"{name}_by_kind"].items():
                row(f"  {name}: {kind}", score)
        for kind, score in record["portability_any_of"].items():
            row(f"  portability: {kind}, any wording", score)
        for name, what in (("hop_wise", "every hop of a case"), ("instance_wise", "every edit of a case")):
            if name in record["cases"]:
                row(f"  {what}", record["cases"][name])
        for control in control_records:
            table.add_section()
            for name in _NAMES:
                if control[name]["generated"] is not None:
                    row(f"{control['name']}: {name}", control[name])
        Console().print(table)
        print(f"perplexity of held-out text: {before:.3f} before, {after:.3f} after")
        if moved is not None:
            print(
                f"KL(base ‖ edited) in nats: {_small(moved['locality'])} at locality prompts (median over edits "
                f"{_small(moved['locality_median'])}), {_small(moved['text'])} per token of held-out text"
            )
            for kind, value in moved["locality_by_kind"].items():
                print(f"  {kind}: {_small(value)}")
        if judged is not None:
            _say_judged(judged)
        for when, own in free.items():
            like = own["consistency"]
            told = f", consistency {_number(like['value'])} over {like['edits']} edits" if like["edits"] else ""
            print(f"{own['tokens']} tokens written freely, {when}: fluency {_number(own['fluency']['value'])}{told}")
        for when, scores in ranked.items():
            told = ", ".join(f"{name} {_number(scores[name])}" for name in _RANKED)
            print(f"new answer likelier than the old, {when}: {told}")
            for kind, own in scores["overfitting"].items():
                print(
                    f"  {kind}: right answer {_number(own['correct'])} likely, target {_number(own['direct'])}; right "
                    f"answer likelier than the target in {_number(own['overfitting'])}"
                )
        for control in control_records:
            print(f"  with {control['name']}: {_number(control['perplexity'])}")

    emit(record, as_json, words)


def compare(
    model_name: str,
    methods: str,
    edits_path: Path | None,
    checkpoints: str,
    limit: int | None,
    out: Path,
    text: Path | None,
    settings: list[str],
    seed: int,
    order_seeds: str | None,
    controls: bool,
    stop_below: float,
    max_new_tokens: int,
    strict: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    from errata.editors import editor_names, method_of
    from errata.evaluation import Comparison
    from errata.evaluation.orders import OrderedComparisons

    names = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    if not names:
        raise ConfigError(f"--methods {methods!r} names no method; there are {', '.join(editor_names())}")
    counts = parse_numbers(checkpoints, "--checkpoints")
    orders = None if order_seeds is None else parse_numbers(order_seeds, "--order-seeds", least=0)
    per_method: dict[str, dict[str, Any]] = {name: {} for name in names}
    for pair in settings:
        method, dot, rest = pair.partition(".")
        if not dot or method not in per_method:
            raise ConfigError(f"--set {pair!r} must name one of the methods: write --set {names[0]}.steps=50")
        per_method[method] |= parse_settings([rest])
    for name in names:
        method_of(name)
    check_out(out)
    if edits_path is None:
        if model_name not in ATLAS_NAMES:
            raise ConfigError("give the edits to compare on: --edits FILE (only atlas brings its own)")
        from errata.atlas.edits import world_edits

        edits = world_edits(min(max(counts), limit or max(counts)), seed=seed)
    else:
        edits = load_edits(edits_path, limit, strict).edits
    model = load_model(model_name, device, dtype)
    more: dict[str, Any] = {
        "texts": load_texts(text),
        "settings": per_method,
        "controls": controls,
        "max_new_tokens": max_new_tokens,
        "stop_below": stop_below,
    }
    if orders is None:
        comparison = Comparison(model, names, edits, counts, out, **more)
        for note in comparison.notes:
            log(note)
        _compared(comparison, _run_rows(comparison), as_json)
    else:
        ordered = OrderedComparisons(model, names, edits, counts, out, orders, **more)
        for note in ordered.first.notes:
            log(note)
        _ordered(ordered, _run_rows(ordered), as_json)


def _run_rows(comparison: Comparison | OrderedComparisons) -> list[dict[str, Any]]:
    """Make every row, or what is missing of them, telling of each."""
    rows = []
    with progress_bar() as progress:
        for row in comparison.run(progress):
            rows.append(row)
            shares = "  ".join(f"{name} {_number(row[name]['generated'])}" for name in _NAMES[:3])
            order = row["made"]["order_seed"]
            told = row["method"] if order is None else f"{row['method']}, order {order}"
            log(f"{told}, {row['edits']} edits: {shares}  perplexity {_number(row['perplexity'])}")
    return rows


def _show_rows(rows: Sequence[dict[str, Any]], title: str) -> None:
    """A table of rows of comparisons; with the spread over orders where rows have one."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("method", "edits", *_NAMES[:3], "perplexity", "s/edit"):
        table.add_column(column, justify="left" if column == "method" else "right")

    def share(score: dict[str, Any]) -> str:
        spread = score.get("spread")
        own, forced = _number(score["generated"]), f"({_number(score['teacher_forced'])})"
        return f"{own} {forced}" if spread is None else f"{score['generated']:.2f} ± {spread:.2f}\n{forced}"

    for row in rows:
        ends = (_number(row["perplexity"]), _number(row["seconds_per_edit"]))
        table.add_row(*plain(row["method"], str(row["edits"]), *(share(row[name]) for name in _NAMES[:3]), *ends))
    Console().print(table)


def _tell_differences(differences: dict[str, list[dict[str, Any]]]) -> list[str]:
    told = []
    for name, pairs in differences.items():
        alike = [pair["second"] for pair in pairs if pair["adjusted_p"] >= 0.05]
        beaten = [pair["second"] for pair in pairs if pair["adjusted_p"] < 0.05]
        words = [f"better than {', '.join(beaten)}"] if beaten else []
        words += [f"not told apart from {', '.join(alike)}"] if alike else []
        told.append(f"{name} at {pairs[0]['edits']} edits: {pairs[0]['first']} is highest; {'; '.join(words)}")
    return told


def _tell_horizons(horizons: dict[str, dict[str, Any]], where: str = "") -> str:
    from errata.evaluation import HORIZON

    told = [f"{name} {found['edits']:.0f}{'' if found['fell'] else ' or more'}" for name, found in horizons.items()]
    return f"edits until reliability falls under {HORIZON}{where}: {', '.join(told)}"


def _compared(comparison: Comparison, rows: list[dict[str, Any]], as_json: bool) -> None:
    from errata.evaluation.comparison_page import write_comparison_page

    for name, count in comparison.stopped.items():
        below = f"reliability is below {comparison.stop_below:g} (--stop-below 0 goes on)"
        log(f"{name} stopped at {count} edits: {below}")
    chosen = comparison.chosen(rows)
    horizons, differences = comparison.horizons(chosen), comparison.differences(chosen)
    drifts, collapses = comparison.drifts(chosen), comparison.collapses(chosen)
    calls = comparison.guard_calls(chosen)
    figure = comparison.folder / "comparison.png"
    told = [_tell_horizons(horizons)]
    if drifts:
        told.append(f"locality lost per hundred edits: {', '.join(f'{name} {d:.3f}' for name, d in drifts.items())}")
    for name, at in collapses.items():
        if at is not None:
            told.append(f"{name} has collapsed at {at} edits: perplexity above ten times the unedited model's")
    for name, call in calls.items():
        times = "" if call["perplexity"] is None else f", perplexity × {call['perplexity']:.2f} there"
        told.append(f"{name}: the guard calls a collapse at {call['edits']} edits{times}")
    told += _tell_differences(differences)
    page = write_comparison_page(comparison, chosen, told, this_command())

    def words() -> None:
        _show_rows(chosen, "all edits asked after the last one; generated (teacher-forced)")
        print("\n".join(told))
        print(f"page: {page}; figure: {figure}")

    record = {
        "model": comparison.model.model_id,
        "rows": chosen,
        "horizons": horizons,
        "differences": differences,
        "locality_drift": drifts,
        "collapse_point": collapses,
        "guard_calls": calls,
        "stopped": comparison.stopped,
        "figure": str(figure),
        "page": str(page),
        "folder": str(comparison.folder),
        "notes": list(comparison.notes),
        "provenance": comparison.provenance,
    }
    emit(record, as_json, words)


def _ordered(ordered: OrderedComparisons, rows: list[dict[str, Any]], as_json: bool) -> None:
    chosen, means, differences = ordered.chosen(rows), ordered.means(rows), ordered.differences()
    figure = ordered.folder / "comparison.png"
    per_order: dict[str, dict[str, Any]] = {}
    for seed, comparison in ordered.comparisons.items():
        own = [row for row in chosen if row["made"]["order_seed"] == seed]
        per_order[str(seed)] = {
            "horizons": comparison.horizons(own),
            "locality_drift": comparison.drifts(own),
            "collapse_point": comparison.collapses(own),
            "stopped": comparison.stopped,
        }

    def words() -> None:
        count = len(ordered.comparisons)
        title = f"means over {count} orders of the same edits ± standard deviation; generated (teacher-forced)"
        _show_rows(means, title)
        for seed, found in per_order.items():
            print(_tell_horizons(found["horizons"], f" in order {seed}"))
            for name, edits in found["collapse_point"].items():
                if edits is not None:
                    print(f"{name} has collapsed at {edits} edits in order {seed}")
        print("\n".join(_tell_differences(differences)))
        print(f"figure: {figure} (bands: range over the orders)")

    record = {
        "model": ordered.first.model.model_id,
        "rows": chosen,
        "means": means,
        "orders": per_order,
        "differences": differences,
        "figure": str(figure),
        "folder": str(ordered.folder),
        "notes": list(ordered.first.notes),
        "provenance": ordered.first.provenance,
    }
    emit(record, as_json, words)


def table(folders: Sequence[Path], allow_mixed: bool, out: Path | None, figure: Path | None, as_json: bool) -> None:
    from errata.evaluation.comparison_page import COLUMNS, flat_rows
    from errata.evaluation.figures import comparison_figure, save_figure
    from errata.evaluation.joining import join_comparisons
    from errata.evaluation.tables import latex_table, markdown_table

    if out is not None and out.suffix not in (".md", ".tex"):
        raise ConfigError(f"--out {out} must end with .md or .tex, for a table in Markdown or in LaTeX")
    joined = join_comparisons(folders, allow_mixed=allow_mixed)
    if figure is not None:
        save_figure(comparison_figure(joined.rows), figure)
    if out is not None:
        rows = flat_rows(joined.rows)
        text = latex_table(COLUMNS, rows) if out.suffix == ".tex" else markdown_table(COLUMNS, rows) + "\n"
        out.write_text(text, encoding="utf-8")

    def words() -> None:
        _show_rows(joined.rows, "generated (teacher-forced)")
        for kind, found in (("differs", joined.differs), ("seeds", joined.seeds)):
            for key, values in found.items():
                told = ", ".join(f"{value} in {name}" for name, value in values.items())
                print(f"{'not alike: ' if kind == 'differs' else ''}{key.replace('_', ' ')}: {told}")
        if out is not None:
            print(f"table: {out}")
        if figure is not None:
            print(f"figure: {figure}")

    record = {
        "rows": joined.rows,
        "differs": joined.differs,
        "seeds": joined.seeds,
        "table": None if out is None else str(out),
        "figure": None if figure is None else str(figure),
    }
    emit(record, as_json, words)


def bench(name: str, figure: Path | None, as_json: bool) -> None:
    from errata.benchmarks import benchmark
    from errata.cli.common import quiet
    from errata.evaluation.figures import save_figure

    run = benchmark(name)
    quiet()
    with progress_bar() as progress:
        result = {"name": name, **run(progress)}
    drawn = result.pop("figure", None)
    if figure is not None:
        if drawn is None:
            log(f"the benchmark {name} draws no figure; {figure} is not written")
        else:
            save_figure(drawn, figure)

    def words() -> None:
        for ratio, value in result["ratios"].items():
            print(f"{ratio}: {value:.2f}")
        for row in result["rows"]:
            print("  " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))

    emit(result, as_json, words)
