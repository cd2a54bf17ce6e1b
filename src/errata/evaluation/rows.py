"""Files of finished results that outlive a kill: rows appended one by one, records that are replaced whole.

Knows JSON. Knows nothing of what a row means.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from errata.errors import ArtifactError

__all__ = ["RowFile", "digest", "write_json", "write_lines"]


class RowFile:
    """Rows in a JSONL file, one appended as each is finished.

    Args:
        keys: what every row has.
    """

    def __init__(self, path: Path, keys: set[str]) -> None:
        self.path, self.keys = path, keys

    def read(self) -> list[dict[str, Any]]:
        """All rows, none if there is no file yet. One that a kill left half written is cut off, to be made again.

        Raises:
            ArtifactError: a line is damaged; names file and line.
        """
        if not self.path.exists():
            return []
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            with open(self.path, "r+b") as file:
                file.truncate(whole)
        rows = []
        for number, line in enumerate(raw[:whole].split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict) or not self.keys <= row.keys():
                    raise ValueError("it is not a row")
            except ValueError as error:
                raise ArtifactError(
                    f"{self.path}:{number} is damaged ({error}); delete this line and run again"
                ) from error
            rows.append(row)
        return rows

    def append(self, row: dict[str, Any]) -> dict[str, Any]:
        with open(self.path, "a", encoding="utf-8", newline="\n") as out:
            out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        return row


def digest(text: str) -> str:
    """32 hexadecimal digits."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """JSONL, all or nothing."""
    draft = path.with_name(path.name + ".new")
    with open(draft, "w", encoding="utf-8", newline="\n") as out:
        out.writelines(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    os.replace(draft, path)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """All or nothing: a draft takes the file's place."""
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)
