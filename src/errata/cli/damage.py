"""`errata damage`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.cli.common import load_adapter, load_model, load_texts, this_command
from errata.cli.output import emit, plain
from errata.errors import ConfigError
from errata.progress import progress_bar

__all__ = ["damage"]


def _domains(texts: Sequence[str]) -> dict[str, list[str]]:
    """`NAME=FILE`, or FILE, whose name is then the domain's; errata's own prose where nothing is given."""
    if not texts:
        return {"prose": load_texts(None)}
    found: dict[str, list[str]] = {}
    for text in texts:
        name, sign, path = text.partition("=")
        place = Path(path if sign else name)
        domain = name if sign else place.stem
        if domain in found:
            raise ConfigError(f"--text names the domain {domain!r} twice; write --text NAME=FILE")
        found[domain] = load_texts(place)
    return found


def _tasks(names: str, model_id: str, data: Path | None) -> list[str]:
    """The tasks that are named, with those that "atlas" and "local" stand for."""
    from errata.atlas.shipped import ATLAS_NAMES
    from errata.evaluation.harness import ATLAS_TASKS
    from errata.evaluation.local_tasks import tasks_in

    if names == "none":
        return []
    if not names and model_id not in ATLAS_NAMES:
        raise ConfigError("give tasks of the harness for this model: --tasks arc_easy,piqa, or --tasks none")
    asked = [name.strip() for name in (names or "atlas").split(",") if name.strip()]
    several = {"atlas": ATLAS_TASKS}
    if "local" in asked:
        if data is None:
            raise ConfigError("--tasks local runs the tasks whose files are in a folder: give it with --data FOLDER")
        several["local"] = tasks_in(data)
    return list(dict.fromkeys(task for name in asked for task in several.get(name, (name,))))


def damage(
    adapter_path: Path,
    model_name: str,
    tasks: str,
    include: Path | None,
    data: Path | None,
    limit: int | None,
    shots: int | None,
    texts: Sequence[str],
    batch_size: int,
    report: Path | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    from errata.evaluation import run_provenance
    from errata.evaluation.damage import measure_damage
    from errata.evaluation.damage_page import write_damage_page

    if report is not None and report.suffix != ".html":
        raise ConfigError(f"--report {report} must end with .html")
    domains = _domains(texts)
    model = load_model(model_name, device, dtype)
    names = _tasks(tasks, model.model_id, data)
    adapter = load_adapter(adapter_path, model)
    assert adapter is not None
    with progress_bar() as progress:
        found = measure_damage(
            adapter,
            names,
            domains,
            include=include,
            data=data,
            limit=limit,
            shots=shots,
            batch_size=batch_size,
            progress=progress,
        )
    record = {
        "model": model.model_id,
        "adapter": str(adapter_path),
        "method": adapter.editor,
        "limit": limit,
        "shots": shots,
        **found.to_record(),
        "provenance": run_provenance(model, adapter.editor_config),
    }
    if report is not None:
        record["report"] = str(write_damage_page(report, record, this_command()))
    emit(record, as_json, lambda: _words(record))


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _words(record: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{record['edits']} edits of {record['method']}: the same items without the adapter and with it"
    table = Table(title=title)
    for column in ("task", "items", "before", "after", "change", "interval", "p"):
        is_name = column == "task"
        table.add_column(column, justify="left" if is_name else "right", min_width=18 if is_name else None)
    for task in record["tasks"]:
        table.add_row(
            *plain(
                f"{task['task']} ({task['metric']})",
                str(task["items"]),
                _share(task["before"]),
                _share(task["after"]),
                f"{task['change']:+.3f}",
                f"{task['low']:+.2f} – {task['high']:+.2f}",
                f"{task['p']:.3f}",
            )
        )
    if record["tasks"]:
        Console().print(table)
    for domain, both in record["perplexity"].items():
        print(f"perplexity of {domain}: {_share(both['before'])} before, {_share(both['after'])} after")
    for layer in record["layers"]:
        moved = f"{layer['module']}: change of {layer['relative_norm']:.4f} of the weight's norm"
        alike = layer["similarity"]
        beside = "beside the weight" if alike is None else f"cosine with the unedited weight {alike:.6f}"
        print(f"{moved}, {beside}; {layer['entries']} edits")
    for domain, share in record["fires"].items():
        print(f"acts on {share:.3f} of the texts of {domain}")
    if "report" in record:
        print(f"report: {record['report']}")
