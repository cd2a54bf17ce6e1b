"""Benchmark files as edits. The form of a file is recognised by its content, never by its name.

One module per benchmark, each with `NAME`, `KEYS`, `recognises(record)` and `read(record)`; the first that recognises a
file's first readable record reads it all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from errata.datasets import counterfact, plain, temporal, wikibio, zsre
from errata.datasets.reading import Record, iterate_records
from errata.edit import Edit, FieldProblem
from errata.errors import FormatError

__all__ = ["EditFile", "read_edits", "write_edits"]

# Asked in this order: records of the first two would pass for flat CounterFact.
_READERS: tuple[ModuleType, ...] = (temporal, wikibio, zsre, counterfact, plain)


@dataclass
class EditFile:
    """What a file gave.

    Attributes:
        format: name of the form that was recognised.
        edits: in the file's order.
        problems: one error per record that was left out.
    """

    format: str
    edits: list[Edit]
    problems: list[FormatError] = field(default_factory=list)


def _reader_for(path: Path, record: Record) -> ModuleType:
    if isinstance(record.value, dict):
        for reader in _READERS:
            if reader.recognises(record.value):
                return reader
    keys = sorted(record.value) if isinstance(record.value, dict) else type(record.value).__name__
    known = "; ".join(f"{reader.NAME} ({reader.KEYS})" for reader in _READERS)
    raise FormatError(str(path), record.line, None, f"no known form of edit (found {keys})", f"known forms: {known}")


def _named_once(path: Path, line: int, edit: Edit, seen: dict[str, tuple[int, Edit]]) -> Edit:
    """The edit under an id that no earlier one of the file has; see `read_edits`. Raises FormatError."""
    name, number = edit.id, 1
    while name in seen:
        first, earlier = seen[name]
        if earlier == edit.model_copy(update={"id": name}):
            raise FormatError(
                str(path), line, None, f"repeats the record of line {first}", "the first one is used; remove this one"
            )
        if not edit.has_derived_id:
            raise FormatError(
                str(path), line, "id", f"{name!r} names another edit, that of line {first}", "give each edit its own id"
            )
        number += 1
        name = f"{edit.id}-{number}"
    named = edit if name == edit.id else edit.model_copy(update={"id": name})
    seen[name] = (line, named)
    return named


def read_edits(path: str | Path, *, limit: int | None = None, strict: bool = False) -> EditFile:
    """Read a file of edits, `.gz` too: errata JSONL, CounterFact (full or flat), ZsRE (MEND form), and WISE's WikiBio
    hallucinations and Temporal set.

    Every edit of a file has an id of its own. A record that repeats an earlier one in everything is left out, and so is
    one whose given id belongs to an earlier edit; both are reported. Records without an id that agree in prompt, target
    and subject but not in the rest (other rephrases, say) are different edits: the second gets "-2" behind its id.

    Args:
        limit: stop after this many edits.
        strict: raise at the first record that does not fit, instead of leaving it out and reporting it.

    Raises:
        FormatError: the file cannot be read or its form is unknown; with `strict`, also for a single record.
    """
    path = Path(path)
    reader: ModuleType | None = None
    seen: dict[str, tuple[int, Edit]] = {}
    result = EditFile("", [])
    for record in iterate_records(path):
        if limit is not None and len(result.edits) >= limit:
            break
        try:
            if isinstance(record, FormatError):
                raise record
            if not isinstance(record.value, dict):
                kind = type(record.value).__name__
                raise FormatError(
                    str(path), record.line, None, f"expected an object, found {kind}", "write one JSON object per edit"
                )
            if reader is None:
                reader = _reader_for(path, record)
                result.format = reader.NAME
            try:
                edit = reader.read(record.value)
            except FieldProblem as problem:
                raise FormatError(str(path), record.line, problem.field, problem.problem, problem.remedy) from problem
            result.edits.append(_named_once(path, record.line, edit, seen))
        except FormatError as error:
            if strict:
                raise
            result.problems.append(error)
    if not result.edits:
        raise (
            result.problems[0]
            if result.problems
            else FormatError(str(path), None, None, "holds no edits", "give at least one")
        )
    return result


def write_edits(path: str | Path, edits: Iterable[Edit]) -> int:
    """Write edits as JSONL, all or nothing; returns how many."""
    path = Path(path)
    lines: Sequence[str] = [edit.to_json() for edit in edits]
    draft = path.with_name(path.name + ".new")
    draft.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    draft.replace(path)
    return len(lines)
