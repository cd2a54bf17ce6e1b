"""`errata evaluate`, `compare`, `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from errata.cli.common import load_adapter, load_edits, load_model, load_texts, parse_numbers, parse_settings
from errata.cli.output import emit, log
from errata.errors import ConfigError
from errata.progress import progress_bar

__all__ = ["bench", "compare", "evaluate"]

_NAMES = ("reliability", "generalization", "locality", "portability")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def evaluate(
    model_name: str,
    adapter_path: Path | None,
    edits_path: Path,
    limit: int | None,
    text: Path | None,
    max_new_tokens: int,
    strict: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    from errata.evaluation import Examination

    found = load_edits(edits_path, limit, strict)
    texts = load_texts(text)
    model = load_model(model_name, device, dtype)
    examination = Examination(model, found.edits, max_new_tokens)
    with progress_bar() as progress:
        examination.ask_base(progress=progress)
        unedited = examination.ask(progress=progress)
        before = model.perplexity(texts)
        adapter = load_adapter(adapter_path, model)
        result = unedited if adapter is None else examination.ask(progress=progress)
        after = before if adapter is None else model.perplexity(texts)
    record: dict[str, Any] = {
        "model": model.model_id,
        "adapter": None if adapter is None else str(adapter_path),
        "format": found.format,
        "max_new_tokens": max_new_tokens,
        **result.to_record(),
        "perplexity": {"before": before, "after": after},
        "unedited": {name: unedited.score(name).to_record() for name in _NAMES},
        "records_left_out": len(found.problems),
    }

    def words() -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{len(found.edits)} edits ({found.format}), protocol {result.protocol}")
        for column in ("", "unedited", "generated", "interval", "contains", "teacher-forced", "edits asked"):
            table.add_column(column, justify="left" if not column else "right")
        for name in _NAMES:
            score, base = record[name], record["unedited"][name]
            low, high = score["generated_interval"]
            interval = "–" if low is None else f"{low:.2f}–{high:.2f}"
            cells = (_share(base["generated"]), _share(score["generated"]), interval, _share(score["contains"]))
            table.add_row(name, *cells, _share(score["teacher_forced"]), str(score["edits"]))
        for kind, score in record["locality_by_kind"].items():
            table.add_row(
                f"  locality: {kind}", "", _share(score["generated"]), "", "", _share(score["teacher_forced"]), ""
            )
        Console().print(table)
        print(f"perplexity of held-out text: {before:.3f} before, {after:.3f} after")

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
    controls: bool,
    max_new_tokens: int,
    strict: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    names = [name.strip() for name in methods.split(",") if name.strip()]
    counts = parse_numbers(checkpoints, "--checkpoints")
    per_method: dict[str, dict[str, Any]] = {name: {} for name in names}
    for pair in settings:
        method, dot, rest = pair.partition(".")
        if not dot or method not in per_method:
            raise ConfigError(f"--set {pair!r} must name one of the methods: write --set {names[0]}.steps=50")
        per_method[method] |= parse_settings([rest])
    from errata.editors import editor_class
    from errata.evaluation import Comparison

    for name in names:
        editor_class(name)
    if edits_path is None:
        if not model_name.startswith("atlas"):
            raise ConfigError("give the edits to compare on: --edits FILE (only atlas brings its own)")
        from errata.atlas.edits import world_edits

        edits = world_edits(max(counts, default=0), seed=seed)
    else:
        edits = load_edits(edits_path, limit, strict).edits
    model = load_model(model_name, device, dtype)
    comparison = Comparison(
        model,
        names,
        edits,
        counts,
        out,
        texts=load_texts(text),
        settings=per_method,
        controls=controls,
        max_new_tokens=max_new_tokens,
    )
    rows = []
    with progress_bar() as progress:
        for row in comparison.run(progress):
            rows.append(row)
            shares = "  ".join(f"{name} {_share(row[name]['generated'])}" for name in _NAMES[:3])
            log(f"{row['method']}, {row['edits']} edits: {shares}  perplexity {row['perplexity'] or float('nan'):.3f}")
    chosen = comparison.chosen(rows)
    figure = out / "comparison.png"

    def words() -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title="all edits asked after the last one; generated (teacher-forced)")
        for column in ("method", "edits", *_NAMES[:3], "perplexity", "s/edit"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in chosen:
            cells = [f"{_share(row[n]['generated'])} ({_share(row[n]['teacher_forced'])})" for n in _NAMES[:3]]
            perplexity = "–" if row["perplexity"] is None else f"{row['perplexity']:.3f}"
            table.add_row(row["method"], str(row["edits"]), *cells, perplexity, f"{row['seconds_per_edit']:.3f}")
        Console().print(table)
        print(f"figure: {figure}")

    emit({"model": model.model_id, "rows": chosen, "figure": str(figure), "folder": str(out)}, as_json, words)


def bench(name: str, as_json: bool) -> None:
    from errata.benchmarks import benchmark
    from errata.cli.common import quiet

    run = benchmark(name)
    quiet()
    with progress_bar() as progress:
        result = {"name": name, **run(progress)}

    def words() -> None:
        for ratio, value in result["ratios"].items():
            print(f"{ratio}: {value:.2f}")
        for row in result["rows"]:
            print("  " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))

    emit(result, as_json, words)
