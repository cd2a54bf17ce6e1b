"""`errata data`: files of edits, what is in them, and the facts of them that a model gets wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.common import check_out, load_edits, load_model
from errata.cli.output import emit, log, plain
from errata.errors import ConfigError, FormatError
from errata.progress import progress_bar

if TYPE_CHECKING:
    from errata.datasets import EditFile
    from errata.edit import Edit, Probe

__all__ = ["convert", "list_files", "list_forms", "show", "wrong_facts"]

_COLUMNS = ("records", "edits", "problems", "repeats", "conflicts")
_SHOWN = 10  # problems and contradictions that are written out for people; --json has all


def list_forms(as_json: bool) -> None:
    from errata.datasets import known_forms

    forms = [{"name": form.name, "recognised_by": form.keys, "holds": form.holds} for form in known_forms()]

    def words() -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for column in ("form", "recognised by", "holds"):
            table.add_column(column, overflow="fold")
        for form in forms:
            table.add_row(*plain(form["name"], form["recognised_by"], form["holds"]))
        Console().print(table)

    emit({"forms": forms}, as_json, words)


def _counts(found: EditFile) -> dict[str, Any]:
    return {
        "format": found.format,
        "holds": found.holds or "edits",
        "records": found.records,
        "edits": len(found.edits),
        "problems": len(found.problems),
        "repeats": found.repeats,
        "conflicts": len(found.conflicts),
    }


def _files(paths: Sequence[Path]) -> dict[Path, str]:
    """The files named and those of the folders named, each once, with their names from there on."""
    found: dict[Path, str] = {}
    for path in paths:
        if not path.is_dir():
            found.setdefault(path, str(path))
            continue
        for inside in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
            found.setdefault(inside, str(inside.relative_to(path)))
    return found


def list_files(paths: Sequence[Path], as_json: bool) -> None:
    from errata.datasets import read_file

    rows: list[dict[str, Any]] = []
    unread: dict[str, str] = {}
    files = _files(paths)
    with progress_bar() as progress:
        progress.start("reading", len(files))
        for path, name in files.items():
            try:
                rows.append({"file": str(path), **_counts(read_file(path)), "error": None})
            except FormatError as error:
                none = dict.fromkeys(("format", "holds", *_COLUMNS))
                rows.append({"file": str(path), **none, "error": str(error)})
                unread[name] = error.problem
            progress.advance(note=path.name)

    def words() -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table()
        table.add_column("file", overflow="fold")
        table.add_column("form", overflow="fold")
        for column in _COLUMNS:
            table.add_column(column, justify="right", overflow="fold")
        for row, name in zip(rows, files.values(), strict=True):
            if row["error"] is None:
                table.add_row(*plain(name, row["format"], *(f"{row[column]:,}" for column in _COLUMNS)))
        if table.row_count:
            Console().print(table)
        for name, problem in unread.items():
            print(f"{name}: {problem}")

    emit({"files": rows}, as_json, words)


def _kinds(edits: Sequence[Edit], name: str) -> dict[str, int]:
    """How many probes of each kind there are."""
    counted = Counter(probe.kind or "no kind" for edit in edits for probe in getattr(edit, name))
    return dict(sorted(counted.items()))


def _short(text: str, most: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 3] + "..."


def _show_edit(edit: Edit) -> None:
    print(f"\n{edit.id}: {_short(edit.prompt)} -> {_short(edit.target)}")
    for name, text in (("subject", edit.subject), ("ground truth", edit.ground_truth)):
        if text:
            print(f"  {name}: {_short(text)}")
    for text in edit.rephrases:
        print(f"  rephrase: {_short(text)}")
    seen: set[tuple[str, str | None]] = set()
    for name, probes in (("locality", edit.locality), ("portability", edit.portability)):
        for probe in probes:
            if (name, probe.kind) not in seen:  # one of each kind says what they are like
                seen.add((name, probe.kind))
                print(f"  {name}, {_in_words(probe)}")


def _in_words(probe: Probe) -> str:
    answer = "" if probe.answer is None else f" -> {_short(probe.answer, 60)}"
    return f"{probe.kind or 'no kind'}: {_short(probe.prompt)}{answer}"


def _some(lines: Sequence[str]) -> None:
    for line in lines[:_SHOWN]:
        print(f"  {line}")
    if len(lines) > _SHOWN:
        print(f"  and {len(lines) - _SHOWN:,} more; --json lists all")


def show(path: Path, limit: int, strict: bool, as_json: bool) -> None:
    from errata.datasets import read_file

    found = read_file(path, strict=strict)
    edits = found.edits
    first: list[Any] = [edit.to_record() for edit in edits[:limit]] or found.others[:limit]
    having = {
        "subject": sum(edit.subject is not None for edit in edits),
        "ground_truth": sum(edit.ground_truth is not None for edit in edits),
        "rephrases": sum(bool(edit.rephrases) for edit in edits),
    }
    probes = {name: _kinds(edits, name) for name in ("locality", "portability")}
    record = {
        "file": str(path),
        **_counts(found),
        "true_answer": found.truth,
        "edits_with": having,
        "probes": probes,
        "problems": [str(problem) for problem in found.problems],
        "conflicts": [conflict.to_record() for conflict in found.conflicts],
        "first": first,
    }

    def words() -> None:
        print(f"{path}: {found.format}, {found.records:,} records")
        if found.holds is not None:
            print(f"holds {found.holds}, no edits")
        else:
            print(f"{len(edits):,} edits; with " + ", ".join(f"{name}: {count:,}" for name, count in having.items()))
        for name, kinds in probes.items():
            if kinds:
                print(f"{name}: " + ", ".join(f"{kind} {count:,}" for kind, count in kinds.items()))
        print(f"left out: {len(found.problems):,}, of which {found.repeats:,} repeat an earlier record")
        _some([str(problem) for problem in found.problems])
        print(f"contradictions (one prompt, several targets; all are kept): {len(found.conflicts):,}")
        _some([
            f"{_short(conflict.prompt)} -> "
            + ", ".join(
                f"{_short(target, 40)} (line {line})"
                for target, line in zip(conflict.targets, conflict.lines, strict=True)
            )
            for conflict in found.conflicts
        ])  # fmt: skip
        for edit in edits[:limit]:
            _show_edit(edit)
        for other in found.others[:limit]:
            print(f"\n{_short(str(other))}")

    emit(record, as_json, words)


def _check_file(out: Path, *others: Path) -> None:
    """Raises ConfigError when a result cannot or must not be written there, before long work."""
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; give the name of a file")
    if any(other.exists() and out.exists() and os.path.samefile(out, other) for other in others):
        raise ConfigError(f"{out} is the file that is read; give another name")
    check_out(out.parent)


def convert(path: Path, out: Path, strict: bool, as_json: bool) -> None:
    from errata.datasets import write_edits

    _check_file(out, path)
    found = load_edits(path, None, strict)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_edits(out, found.edits)
    record = {"file": str(path), "out": str(out), **_counts(found)}

    def words() -> None:
        print(f"{len(found.edits):,} edits of {found.records:,} records ({found.format}), written to {out}")

    emit(record, as_json, words)


def wrong_facts(
    model_name: str,
    facts_path: Path,
    out: Path,
    limit: int | None,
    max_new_tokens: int,
    strict: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    _check_file(out, facts_path)
    found = load_edits(facts_path, None, strict)
    every = found.facts()
    if not every:
        raise ConfigError(f"{facts_path} ({found.format}) has counterfactual targets and no true answers")
    if found.truth == "ground_truth":
        log(f"targets of {found.format} are counterfactual: the ground truths are asked for")
        if len(every) < len(found.edits):
            log(f"{len(found.edits) - len(every):,} edits have no ground truth and are left out")
    elif found.truth == "either":
        log(f"some targets of {found.format} are counterfactual: where there is a ground truth, it is asked for")
    facts = every[:limit]
    model = load_model(model_name, device, dtype)
    from errata.datasets import write_edits
    from errata.evaluation.wrong_facts import find_wrong_facts

    asked = out.with_name(out.name + ".asked")
    out.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar() as progress:
        result = find_wrong_facts(model, facts, asked, max_new_tokens=max_new_tokens, progress=progress)
    write_edits(out, result.edits)
    record = {
        "model": model.model_id,
        "fingerprint": model.fingerprint,
        "facts": str(facts_path),
        "format": found.format,
        "asked": result.asked,
        "known": result.known,
        "wrong": len(result.edits),
        "mentioned": result.mentioned,
        "out": str(out),
        "answers": str(asked),
    }

    def words() -> None:
        print(f"{model.model_id} knows {result.known:,} of {result.asked:,} facts")
        print(f"{len(result.edits):,} edits written to {out}; in {result.mentioned:,} the model mentions the answer")
        if result.edits:
            print(f"what it says instead is their ground truth; next: errata edit --model {model_name} --edits {out}")

    emit(record, as_json, words)
