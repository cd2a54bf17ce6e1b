"""Benchmark files as edits. The form of a file is recognised by its content, never by its name.

One module per benchmark, each with

* `NAME`, and `KEYS`: by what it is recognised, in words;
* `recognises(record)`: whether a record has this form;
* `read(record)`: the record as an edit, or as a list of edits;
* `TRUTH`, unless a target is the true answer: "ground_truth" where targets are counterfactual, "either" where the
  ground truth is the true answer in records that have one;
* `SHAPE`, unless records are objects: `list` or `str`;
* `HOLDS`, where records are no edits but something beside them, in words; `read` then only checks them.

The form that most of a file's first records have reads it all.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from errata.datasets import (
    convsent,
    counterfact,
    counterfact_questions,
    dated,
    eren,
    halluedit,
    knowedit,
    known,
    mquake,
    plain,
    qaedit,
    refusals,
    sadr,
    sanitation,
    temporal,
    tofu,
    triplets,
    unke,
    wikibio,
    zsre,
    zsre_wordings,
)
from errata.datasets.reading import Record, iterate_records
from errata.edit import Edit, FieldProblem
from errata.errors import FormatError

__all__ = ["Conflict", "EditFile", "Form", "known_forms", "read_edits", "read_file", "write_edits"]

# Asked in this order: records of earlier ones would pass for later ones. errata's own form comes before all whose keys
# an edit may carry along in `extra`.
_READERS: tuple[ModuleType, ...] = (
    qaedit, plain,
    temporal, wikibio, knowedit, mquake, sadr, zsre, counterfact, counterfact_questions, known,
    zsre_wordings, eren, convsent, sanitation, halluedit, triplets, unke, tofu, dated, refusals,
)  # fmt: skip
_FIRST = 25  # records that are looked at to recognise a file's form


@dataclass(frozen=True)
class Form:
    """A form of file that is known: its name, by what it is recognised, and what it holds."""

    name: str
    keys: str
    holds: str


@dataclass(frozen=True)
class Conflict:
    """One prompt with several targets. Prompts that differ only in white space and case count as one.

    Attributes:
        prompt: as it stands in the first record.
        targets: the different targets, in the file's order.
        lines: where each of them stands first.
    """

    prompt: str
    targets: tuple[str, ...]
    lines: tuple[int, ...]

    def to_record(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "targets": list(self.targets), "lines": list(self.lines)}


@dataclass
class EditFile:
    """What a file gave.

    Attributes:
        format: name of the form that was recognised.
        edits: in the file's order. A record may give several.
        problems: one error per record or edit that was left out, and per place that could not be decoded.
        records: how many records could be decoded, read or left out.
        repeats: how many of the problems are edits that repeat an earlier one in everything.
        conflicts: prompts that stand there with several targets. All of them are among the edits.
        truth: where the true answer stands: "target", "ground_truth", or "either" (see `facts`).
        others: the records of a form that holds something beside edits, as they are.
        holds: what those are, in words; None for a file of edits.
    """

    format: str
    edits: list[Edit]
    problems: list[FormatError] = field(default_factory=list)
    records: int = 0
    repeats: int = 0
    conflicts: list[Conflict] = field(default_factory=list)
    truth: str = "target"
    others: list[Any] = field(default_factory=list)
    holds: str | None = None

    def facts(self) -> list[Edit]:
        """The edits whose true answer is known, with that answer as the target.

        Where targets are counterfactual the true answer is the ground truth; portability probes, which follow from the
        counterfactual target, are then dropped.
        """
        if self.truth == "target":
            return list(self.edits)
        found = []
        for edit in self.edits:
            if edit.ground_truth is not None:
                changed = {"target": edit.ground_truth.strip(), "ground_truth": None, "portability": ()}
                found.append(edit.model_copy(update=changed))
            elif self.truth == "either":
                found.append(edit)
        return found


def known_forms() -> list[Form]:
    """All forms that are recognised."""
    return [Form(reader.NAME, reader.KEYS, getattr(reader, "HOLDS", "edits")) for reader in _READERS]


def _recognised(value: Any) -> ModuleType | None:
    for reader in _READERS:
        if isinstance(value, getattr(reader, "SHAPE", dict)) and reader.recognises(value):
            return reader
    return None


def _reader_of(first: Iterable[Record | FormatError]) -> ModuleType | None:
    """The form that most of these records have, so that a damaged one does not decide; the earliest of several."""
    values = [record.value for record in first if isinstance(record, Record)]
    votes = Counter(reader for value in values if (reader := _recognised(value)) is not None)
    if votes:
        reader, count = votes.most_common(1)[0]
        # Any text has a sentence that could be a refusal; a file of refusals has little else.
        return None if reader is refusals and 2 * count < len(values) else reader
    return plain if any(isinstance(value, dict) and plain.likely(value) for value in values) else None


def _error(path: Path, record: Record, field: str | None, problem: str, remedy: str) -> FormatError:
    """Names the record too where several begin on one line."""
    which = "" if record.on_line == 1 else f"record {record.on_line} of this line: "
    return FormatError(str(path), record.line, field, which + problem, remedy)


def _unknown(path: Path, record: Record) -> FormatError:
    value = record.value
    if not isinstance(value, (dict, str)):
        found = f"expected an object, found {type(value).__name__}"
        return _error(path, record, None, found, "write one JSON object per edit")
    keys = sorted(value) if isinstance(value, dict) else "text"
    known = "; ".join(f"{reader.NAME} ({reader.KEYS})" for reader in _READERS)
    return _error(path, record, None, f"no known form of edit (found {keys})", f"known forms: {known}")


def _edits_of(path: Path, record: Record, reader: ModuleType) -> list[Edit]:
    """Raises FormatError when the record is of another form or a field does not fit."""
    shape = getattr(reader, "SHAPE", dict)
    if not isinstance(record.value, shape):
        wanted = {dict: "an object", list: "a list", str: "a line of text"}[shape]
        found_kind = f"expected {wanted}, found {type(record.value).__name__}"
        remedy = "write one JSON object per edit" if shape is dict else f"write {wanted}, as in the rest of the file"
        raise _error(path, record, None, found_kind, remedy)
    try:
        found: Edit | list[Edit] = reader.read(record.value)
    except FieldProblem as problem:
        raise _error(path, record, problem.field, problem.problem, problem.remedy) from problem
    return [found] if isinstance(found, Edit) else found


class _Repeat(Exception):
    """Carries the error about an edit that repeats an earlier one."""


class _Seen:
    """What a file's edits so far are called, and what they answer to which prompt."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_name: dict[str, tuple[Record, Edit]] = {}
        self.by_prompt: dict[str, tuple[str, dict[str, tuple[str, int]]]] = {}

    def named_once(self, record: Record, edit: Edit) -> Edit:
        """The edit under an id that no earlier one of the file has; see `read_edits`. Raises FormatError, _Repeat."""
        name, number = edit.id, 1
        while name in self.by_name:
            first, earlier = self.by_name[name]
            if earlier == edit.model_copy(update={"id": name}):
                problem, remedy = f"repeats the record of {first.place}", "the first one is used; remove this one"
                raise _Repeat(_error(self.path, record, None, problem, remedy))
            if not edit.has_derived_id:
                problem = f"{name!r} names another edit, that of {first.place}"
                raise _error(self.path, record, "id", problem, "give each edit its own id")
            number += 1
            name = f"{edit.id}-{number}"
        named = edit if name == edit.id else edit.model_copy(update={"id": name})
        self.by_name[name] = (record, named)
        return named

    def note(self, line: int, edit: Edit) -> None:
        _, targets = self.by_prompt.setdefault(_same(edit.prompt), (edit.prompt, {}))
        targets.setdefault(_same(edit.target), (edit.target, line))

    def conflicts(self) -> list[Conflict]:
        found = [(prompt, list(targets.values())) for prompt, targets in self.by_prompt.values() if len(targets) > 1]
        return [
            Conflict(prompt, tuple(target for target, _ in pairs), tuple(line for _, line in pairs))
            for prompt, pairs in found
        ]


def _same(text: str) -> str:
    return " ".join(text.split()).casefold()


def read_file(path: str | Path, *, limit: int | None = None, strict: bool = False) -> EditFile:
    """Read a file of a known form, also one that holds something beside edits; see `read_edits`.

    Raises:
        FormatError: the file cannot be read or its form is unknown; with `strict`, also for a single record.
    """
    path = Path(path)
    records = iterate_records(path)
    first = list(itertools.islice(records, _FIRST))
    reader = _reader_of(first)
    if reader is None:
        first += records  # all of the first may be damaged
        reader = _reader_of(first)
    if reader is None:
        for record in first:
            raise record if isinstance(record, FormatError) else _unknown(path, record)
        raise FormatError(str(path), None, None, "holds no edits", "give at least one")
    seen = _Seen(path)
    result = EditFile(reader.NAME, [], truth=getattr(reader, "TRUTH", "target"), holds=getattr(reader, "HOLDS", None))
    for record in itertools.chain(first, records):
        if limit is not None and len(result.edits) + len(result.others) >= limit:
            break
        try:
            if isinstance(record, FormatError):
                raise record
            result.records += 1
            edits = _edits_of(path, record, reader)
        except FormatError as error:
            if strict:
                raise
            result.problems.append(error)
            continue
        if result.holds is not None:
            result.others.append(record.value)
        for edit in edits:
            if limit is not None and len(result.edits) >= limit:
                break
            # A contradiction is one even where the second record is left out because of its id.
            seen.note(record.line, edit)
            try:
                result.edits.append(seen.named_once(record, edit))
            except (FormatError, _Repeat) as error:
                problem = error if isinstance(error, FormatError) else error.args[0]
                if strict:
                    raise problem from None
                result.repeats += isinstance(error, _Repeat)
                result.problems.append(problem)
    if not result.edits and not result.others and result.problems:
        raise result.problems[0]
    result.conflicts = seen.conflicts()
    return result


def read_edits(path: str | Path, *, limit: int | None = None, strict: bool = False) -> EditFile:
    """Read a file of edits, `.gz` too: errata JSONL and the benchmark files of `known_forms`.

    Every edit of a file has an id of its own. A record that repeats an earlier one in everything is left out, and so is
    one whose given id belongs to an earlier edit; both are reported. Records without an id that agree in prompt, target
    and subject but not in the rest (other rephrases, say) are different edits: the second gets "-2" behind its id.
    Records that contradict each other (one prompt, several targets) are all kept, and reported as conflicts.

    Args:
        limit: stop after this many edits.
        strict: raise at the first record that does not fit, instead of leaving it out and reporting it.

    Raises:
        FormatError: the file cannot be read, its form is unknown, or it holds no edits; with `strict`, also for a
            single record.
    """
    found = read_file(path, limit=limit, strict=strict)
    if found.holds is not None:
        raise FormatError(
            str(path),
            None,
            None,
            f"holds {found.holds} ({found.format}), no edits",
            "give a file whose records have a prompt and a target",
        )
    return found


def write_edits(path: str | Path, edits: Iterable[Edit]) -> int:
    """Write edits as JSONL, all or nothing; returns how many."""
    path = Path(path)
    lines: Sequence[str] = [edit.to_json() for edit in edits]
    draft = path.with_name(path.name + ".new")
    draft.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    draft.replace(path)
    return len(lines)
