"""A few edits, and what every run of a comparison said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.edit import Edit
from errata.evaluation.page import Cell, Grid
from errata.evaluation.rows import RowFile

__all__ = ["examples_of"]

_LONGEST = 60  # characters of an answer


def examples_of(edits: Sequence[Edit], answers: Mapping[str, Path], count: int = 3) -> list[Grid]:
    """A few of the edits, spread over all, each a table with a row per run.

    Args:
        answers: per run its `answers-N.jsonl` of these edits in this order; a run without the file is left out.

    Raises:
        ArtifactError: a file is damaged.
    """
    said = {name: RowFile(path, {"id", "said"}).read() for name, path in answers.items() if path.is_file()}
    places = range(0, len(edits), max(1, len(edits) // count))[:count]
    return [_example(edits[at], {name: lines[at] for name, lines in said.items()}) for at in places if said]


def _shortened(said: str) -> str:
    """A model that has lost its way writes on and on, often without a space."""
    said = said.strip()
    return said if len(said) <= _LONGEST else said[:_LONGEST].rstrip() + " …"


def _example(edit: Edit, lines: Mapping[str, Mapping[str, Any]]) -> Grid:
    asked = [("reliability", edit.prompt, "the edited prompt")]
    asked += [("generalization", text, "another wording") for text in edit.rephrases[:1]]
    asked += [("locality", probe.prompt, "must not change") for probe in edit.locality[:1]]
    rows: list[list[str | Cell]] = []
    for name, line in lines.items():
        told = [(_shortened(line["said"][prompt]), line[what][0][0] == 1) for what, prompt, _ in asked]
        rows.append([name, *(Cell(text, mark="ok" if right else "no") for text, right in told)])
    columns = ("", *(f"{prompt} ({role})" for _, prompt, role in asked))
    return Grid(columns, rows, title=f"{edit.prompt} … {edit.ground_truth or '?'} → {edit.target}")
