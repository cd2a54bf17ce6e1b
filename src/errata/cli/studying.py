"""`errata study`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.common import check_out, load_model, parse_settings, this_command
from errata.cli.output import emit, log, plain
from errata.errors import ConfigError
from errata.progress import progress_bar
from errata.studies import studies
from errata.studies import study as study_of

if TYPE_CHECKING:
    from errata.studies.result import StudyResult

__all__ = ["catalogue", "study"]


def catalogue(as_json: bool) -> None:
    """What there is to study."""

    def words() -> None:
        print("errata study NAME (times on atlas, on two CPU cores):\n")
        for one in studies():
            print(f"{one.name}\n    {one.question}\n    {one.size}")
        print("\n--edits N makes any of them larger or smaller; --quick shows within a minute what it will look like.")

    names = ("name", "question", "size")
    emit({"studies": [{name: getattr(one, name) for name in names} for one in studies()]}, as_json, words)


def study(
    name: str,
    model_name: str,
    out: Path | None,
    edits: int | None,
    seed: int,
    methods: str | None,
    settings: Sequence[str],
    data: Path | None,
    words_kept: int,
    beside: Sequence[str],
    quick: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Run one study, or what is missing of it."""
    chosen = study_of(name)
    folder = out or Path(f"errata-study-{name}")
    check_out(folder)
    per_method = _per_method(settings)
    from errata.studies.workbench import StudyOptions

    options = StudyOptions(
        folder=folder,
        edits=edits,
        seed=seed,
        methods=tuple(part.strip() for part in (methods or "").split(",") if part.strip()),
        settings=per_method,
        data=data,
        words=words_kept,
        beside=tuple(beside),
        quick=quick,
        command=this_command(),
    )
    model = load_model(model_name, device, dtype)
    log(f"{chosen.name}: {chosen.question}")
    log(f"by default: {chosen.size}. Finished rows are kept in {folder}")
    with progress_bar() as progress:
        result = chosen.run(model, options, progress)
    emit(result.to_record(), as_json, lambda: _show(result))


def _per_method(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`method.name=value` pairs by method."""
    found: dict[str, dict[str, Any]] = {}
    for pair in settings:
        method, dot, rest = pair.partition(".")
        if not dot or "=" in method:
            raise ConfigError(f"--set {pair!r} must name the method: write --set memoir.steps=50")
        found.setdefault(method, {}).update(parse_settings([rest]))
    return found


def _show(result: StudyResult) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from errata.evaluation.tables import cell

    def table(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
        drawn = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in columns:
            drawn.add_column(column.replace("_", " "))
        for row in rows:
            drawn.add_row(*plain(*(cell(row.get(column)) for column in columns)))
        return drawn

    console = Console()
    console.print(table("generated unless it says forced", result.columns, result.rows))
    for one in result.tables:
        console.print(table(one.title, one.columns, one.rows))
    if result.published:
        names = list(dict.fromkeys(name for one in result.published for name in one.values))
        rows = [{"published": one.what, **one.values, "source": one.source} for one in result.published]
        console.print(table("published, on other models and edits", ["published", *names, "source"], rows))
    for note in result.notes:
        print(f"note: {note}")
    print(result.found)
    print(f"page: {result.files['page']}; figure: {result.files['figure']}")
