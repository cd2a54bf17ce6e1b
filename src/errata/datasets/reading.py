"""Reading files of records: JSONL, JSON lists, gzipped or not; damaged ones as far as they go.

Knows files. What a record means is the readers' business.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.errors import FormatError

__all__ = ["Record", "iterate_records"]

_SPACE = re.compile(r"[\s,]*")
# The line breaks that JSON never has inside a string. `str.splitlines` would also break at U+2028, U+0085 and others,
# which may stand in a string as they are.
_LINE_BREAK = re.compile(r"\r\n?|\n")


@dataclass(frozen=True)
class Record:
    """One decoded record and the line on which it begins (1-based)."""

    line: int
    value: Any


def _text_of(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise FormatError(str(path), line, None, "is not UTF-8 text", "save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = "does not exist" if not path.exists() else f"cannot be read ({error})"
        raise FormatError(
            str(path), None, None, reason, "give the path of a .jsonl or .json file, .gz allowed"
        ) from error


def iterate_records(path: Path) -> Iterator[Record | FormatError]:
    """All records of a file in order; a place that cannot be decoded comes out as the error that describes it.

    A JSON list is decoded record by record, so that a file which breaks off still gives what stands before the break.

    Raises:
        FormatError: the file as a whole cannot be read, or is empty.
    """
    text = _text_of(path)
    stripped = text.lstrip()
    if not stripped:
        raise FormatError(str(path), None, None, "is empty", "give one JSON object a line, or a JSON list of objects")
    if stripped[0] == "[":
        yield from _from_list(path, text)
        return
    if stripped[0] == "{":
        whole = _single_object(stripped)
        if whole is not None and "\n" in stripped.strip():
            yield _checked(path, 1, whole, stripped)
            return
    for number, line in enumerate(_LINE_BREAK.split(text), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # besides broken JSON: endless digits, endless nesting
            yield FormatError(
                str(path), number, None, f"is not JSON ({_reason(error)})", "write one JSON object a line"
            )
        else:
            yield _checked(path, number, value, line)


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else "a number has too many digits"


def _checked(path: Path, line: int, value: Any, source: str) -> Record | FormatError:
    """The record, unless it holds half of a surrogate pair: no tokenizer takes that and no file can hold it."""
    if "\\ud" in source.lower():  # only an escape can bring one into text that was read as UTF-8
        for key, part in value.items() if isinstance(value, dict) else ((None, value),):
            try:
                json.dumps([key, part], ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:
                found = "half of a surrogate pair (\\ud800 to \\udfff alone)"
                return FormatError(str(path), line, key, found, "write the whole character")
    return Record(line, value)


def _single_object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _from_list(path: Path, text: str) -> Iterator[Record | FormatError]:
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    line, counted = 1, 0
    while True:
        match = _SPACE.match(text, at)
        at = match.end() if match else at
        line, counted = line + text.count("\n", counted, at), at
        if at >= len(text):
            yield FormatError(
                str(path), line, None, "the list is not closed: the file breaks off", "copy the file again, whole"
            )
            return
        if text[at] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = text.count("\n", 0, error.pos) + 1 if isinstance(error, json.JSONDecodeError) else line
            yield FormatError(
                str(path),
                where,
                None,
                f"is not JSON ({_reason(error)}); nothing behind it can be read",
                "correct this place or copy the file again",
            )
            return
        yield _checked(path, line, value, text[at:end])
        at = end
