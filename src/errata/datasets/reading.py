"""Reading files of records: JSONL, JSON lists, JSON objects of lists, CSV, lines of text; gzipped or not.

Knows files, and takes damaged ones as far as they go: whatever can be decoded before and behind a damaged place comes
out, and the place itself as the error that names its line. What a record means is the readers' business.
"""

from __future__ import annotations

import csv
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.errors import FormatError

__all__ = ["SECTION", "Record", "iterate_records", "text_of"]

# Under this key a record of an object of lists ({"success": [...], "locality": [...]}) carries the name of its list.
SECTION = "section"

_SPACE = re.compile(r"[\s,]*")
# The line breaks that JSON never has inside a string. `str.splitlines` would also break at U+2028, U+0085 and others,
# which may stand in a string as they are.
_LINE_BREAK = re.compile(r"\r\n?|\n")
_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n|\Z)")
# Bytes that are not UTF-8, as Python carries them through text.
_NO_UTF8 = re.compile("[\udc80-\udcff]")
_STRING = r'"(?:[^"\\]|\\.)*"'
_SECTION_OPENS = re.compile(rf"\s*({_STRING})\s*:\s*\[")
_NEXT_SECTION = re.compile(rf"\]\s*,\s*({_STRING})\s*:\s*\[")
_SECTIONED = re.compile(rf"\{{\s*{_STRING}\s*:\s*\[\s*\{{")
_RECORD_OPENS = re.compile(rf"(?:\[\s*)?\{{\s*{_STRING}")
_HEADER = re.compile(r"[A-Za-z_][\w.\-]*(?:,[A-Za-z_][\w.\-]*)+")


class _KeyTwice(ValueError):
    """A key stands twice in an object: two records run into each other, or one of the values would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _KeyTwice(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return found


@dataclass(frozen=True)
class Record:
    """One decoded record and the line on which it begins (1-based). Of a file of plain text, one line.

    Attributes:
        on_line: which one it is of those that begin on this line; JSON lists often stand on a single one.
    """

    line: int
    value: Any
    on_line: int = 1

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        return f"line {self.line}" if self.on_line == 1 else f"line {self.line}, record {self.on_line}"


def _unzipped(path: Path, raw: bytes) -> tuple[bytes, FormatError | None]:
    """As much as can be unpacked, and what is wrong with the rest."""
    parts: list[bytes] = []
    reason = None
    while raw.strip(b"\0") and reason is None:  # zeros may fill up the last block
        stream = zlib.decompressobj(wbits=31)
        try:
            for at in range(0, len(raw), 1 << 14):  # in pieces, so that what stands before a damaged one is kept
                parts.append(stream.decompress(raw[at : at + (1 << 14)]))
                if stream.eof:
                    raw = stream.unused_data + raw[at + (1 << 14) :]
                    break
            else:
                reason = "the compressed file breaks off"
        except zlib.error as error:
            reason = str(error)
    unpacked = b"".join(parts)
    if reason is None:
        return unpacked, None
    if not unpacked:
        raise FormatError(str(path), None, None, f"cannot be read ({reason})", "copy the file again")
    line = unpacked.count(b"\n") + 1
    problem = f"cannot be unpacked behind this line ({reason})"
    return unpacked, FormatError(str(path), line, None, problem, "copy the file again, whole")


def text_of(path: Path) -> tuple[str, FormatError | None]:
    """The text, with bytes that are none carried through, and what is wrong with the file's end."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = "does not exist" if not path.exists() else f"cannot be read ({error})"
        raise FormatError(
            str(path), None, None, reason, "give the path of a .jsonl, .json or .csv file, .gz allowed"
        ) from error
    damage = None
    if raw[:2] == b"\x1f\x8b":
        raw, damage = _unzipped(path, raw)
    return raw.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff"), damage


def iterate_records(path: Path) -> Iterator[Record | FormatError]:
    """All records of a file in order; a place that cannot be decoded comes out as the error that describes it.

    A JSON list is decoded record by record. Behind a damaged one reading goes on where the next begins like those
    before: on a line of its own with the same indentation, or with the same first key. An object of lists gives the
    lists' records one after the other, each with its list's name (`SECTION`); a CSV file an object per row.

    Raises:
        FormatError: the file as a whole cannot be read, or is empty.
    """
    text, damage = text_of(path)
    if not text.strip():
        raise FormatError(str(path), None, None, "is empty", "give one JSON object a line, or a JSON list of objects")
    yield from _records(path, text)
    if damage is not None:
        yield damage


def _records(path: Path, text: str) -> Iterator[Record | FormatError]:
    stripped = text.lstrip()
    if stripped[0] == "[":
        yield from _from_list(path, text, text.index("[") + 1)
        return
    if stripped[0] == "{":
        whole = _single_object(stripped)
        if _is_sectioned(whole, stripped):
            opens = _SECTION_OPENS.match(text, text.index("{") + 1)
            if opens:
                yield from _from_list(path, text, opens.end(), section=json.loads(opens[1]))
                return
        if whole is not None and "\n" in stripped.strip():
            yield _checked(path, 1, whole, stripped)
            return
    elif _HEADER.fullmatch(header := _LINE_BREAK.split(text, maxsplit=1)[0].strip()):
        names = header.split(",")
        if len(set(names)) == len(names):
            yield from _from_csv(path, text, names)
            return
    elif not re.search(r"^\s*[\[{\"]", text, flags=re.MULTILINE):
        for number, line in enumerate(_LINE_BREAK.split(text), start=1):
            if line.strip():
                yield _checked(path, number, line.strip(), line)
        return
    yield from _from_lines(path, text)


def _from_lines(path: Path, text: str) -> Iterator[Record | FormatError]:
    for number, line in enumerate(_LINE_BREAK.split(text), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:  # besides broken JSON: endless digits, endless nesting
            yield FormatError(
                str(path), number, None, f"is not JSON ({_reason(error)})", "write one JSON object a line"
            )
        else:
            yield _checked(path, number, value, line)


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, _KeyTwice):
        return str(error)
    return "nested too deep" if isinstance(error, RecursionError) else "a number has too many digits"


def _checked(path: Path, line: int, value: Any, source: str, on_line: int = 1) -> Record | FormatError:
    """The record, unless it holds bytes that are no text, or half of a surrogate pair: no tokenizer takes that and no
    file can hold it.
    """
    wrong = _NO_UTF8.search(source)
    if wrong:
        line += len(_LINE_BREAK.findall(source, 0, wrong.start()))
        return FormatError(str(path), line, None, "is not UTF-8 text", "save the file as UTF-8")
    if "\\ud" in source.lower():  # only an escape can bring one into text that was read as UTF-8
        for key, part in value.items() if isinstance(value, dict) else ((None, value),):
            try:
                json.dumps([key, part], ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:
                found = "half of a surrogate pair (\\ud800 to \\udfff alone)"
                return FormatError(str(path), line, key, found, "write the whole character")
    return Record(line, value, on_line)


def _single_object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_sectioned(whole: Any, stripped: str) -> bool:
    """Whether an object of lists of objects begins here; if it is damaged, by how it begins."""
    if isinstance(whole, dict):
        lists = whole.values()
        return bool(whole) and all(isinstance(part, list) and part and isinstance(part[0], dict) for part in lists)
    if not _SECTIONED.match(stripped):
        return False
    return _single_object(_LINE_BREAK.split(stripped, maxsplit=1)[0]) is None


class _Places:
    """Where a list's records stand: counts lines, and finds the next record behind a damaged one."""

    def __init__(self, text: str) -> None:
        self.text, self.line, self.counted = text, 1, 0
        self.opening: str | None = None

    def line_of(self, at: int) -> int:
        """The line of a place; places are asked for in order."""
        self.line, self.counted = self.line + self.text.count("\n", self.counted, at), max(at, self.counted)
        return self.line

    def opening_at(self, at: int) -> str | None:
        """How the record here begins: its first key, with the indentation if it stands on a line of its own."""
        found = _RECORD_OPENS.match(self.text, at)
        if found is None:
            return None
        begin = at
        while begin and self.text[begin - 1] in " \t":
            begin -= 1
        own_line = begin and self.text[begin - 1] == "\n"
        return ("\n" + self.text[begin:at] if own_line else "") + found[0]

    def next_record(self, at: int) -> int | None:
        """Where the next record that begins like those before stands."""
        opening = self.opening or self.opening_at(at)
        found = -1 if opening is None else self.text.find(opening, at)
        while opening is not None and found != -1:
            begin = found + len(opening) - len(opening.lstrip())
            if begin > at:
                return begin
            found = self.text.find(opening, found + 1)
        return None


def _from_list(path: Path, text: str, at: int, section: str | None = None) -> Iterator[Record | FormatError]:
    """The records of a list that begins here; with `section`, of all the lists of the object it belongs to."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    places = _Places(text)
    sectioned = section is not None
    last_line, on_line = 0, 0
    while True:
        match = _SPACE.match(text, at)
        at = match.end() if match else at
        line = places.line_of(at)
        if at >= len(text):
            yield FormatError(
                str(path), line, None, "the list is not closed: the file breaks off", "copy the file again, whole"
            )
            return
        value: Any = None
        # The damaged count too: the next one keeps its number.
        last_line, on_line = line, on_line + 1 if line == last_line else 1
        try:
            if text[at] == "]":
                if re.compile(r"\]\s*\}\s*\Z" if sectioned else r"\]\s*\Z").match(text, at):
                    return
                if sectioned and (following := _NEXT_SECTION.match(text, at)):
                    section, at, on_line = json.loads(following[1]), following.end(), on_line - 1
                    continue
                raise json.JSONDecodeError("the list is closed before its end", text, at)
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = text.count("\n", 0, error.pos) + 1 if isinstance(error, json.JSONDecodeError) else line
            following = _NEXT_SECTION.search(text, at) if sectioned else None
            behind = places.next_record(at)
            if following and (behind is None or following.start() < behind):
                section, behind = json.loads(following[1]), following.end()
            left = "nothing behind it can be read" if behind is None else "reading goes on with the next record"
            yield FormatError(
                str(path),
                where,
                None,
                f"is not JSON ({_reason(error)}); {left}",
                "correct this place or copy the file again",
            )
            if behind is None:
                return
            at = behind
            continue
        places.opening = places.opening_at(at) or places.opening
        source = text[at:end]
        if sectioned and isinstance(value, dict):
            value = {SECTION: section, **value}
        yield _checked(path, line, value, source, on_line)
        at = end


def _from_csv(path: Path, text: str, names: list[str]) -> Iterator[Record | FormatError]:
    """An object per row. A row that does not fit is reported; reading goes on with the line behind its first."""
    lines = [found[0] for found in _LINE.finditer(text) if found[0]]
    at = 1
    while at < len(lines):
        if not lines[at].strip():
            at += 1
            continue
        rows = csv.reader((lines[number] for number in range(at, len(lines))), strict=True)
        while True:  # one reader as long as rows fit: it is begun anew only behind a damaged one
            begin = at + rows.line_num
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield FormatError(str(path), begin + 1, None, f"is not CSV ({error})", "close the quotes of this row")
                at = begin + 1
                break
            if row is None:
                return
            if not row:
                continue
            if len(row) != len(names):
                problem = f"has {len(row)} fields, the header {len(names)}"
                yield FormatError(str(path), begin + 1, None, problem, "correct the commas and quotes of this row")
                at = begin + 1
                break
            source = "".join(lines[begin : at + rows.line_num])
            yield _checked(path, begin + 1, dict(zip(names, row, strict=True)), source)
