"""What a study gives, and the files it becomes: one page, a figure, tables in Markdown and LaTeX, JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.evaluation.figures import save_figure
from errata.evaluation.page import Grid, Page, Picture, Section, Verbatim, flattened, grid, write_page
from errata.evaluation.rows import write_json
from errata.evaluation.tables import latex_table, markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Published", "StudyResult", "SubTable"]

_FILES = {
    "page": "report.html",
    "figure": "figure.png",
    "table": "table.md",
    "latex": "table.tex",
    "result": "result.json",
    "rows": "rows.jsonl",
}
_ON_THE_PAGE = ("figure", "more_figures", "examples")  # and nowhere else
_EXAMPLES = "Green is as it should be: the new answer, and where nothing was to change, the old one."


@dataclass(frozen=True)
class Published:
    """One row of a paper's table, to be printed beside ours: other models, other edits, teacher-forced."""

    what: str
    values: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class SubTable:
    """A table beside the main one."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a study gives.

    Attributes:
        found: the answer to its question, in one sentence computed from the rows.
        columns: of the table; a row may hold more.
        examples: a few edits, and what was said; tables: others than the main one; more_figures: by caption, shown on
            the page below the main one.
        numbers: single numbers that the sentence rests on.
        published: what papers report of the same question.
        notes: what has to be known to read the table.
        provenance: how the rows were made; command: what makes them again.
        files: what was written, by what it is.
    """

    name: str
    question: str
    found: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    figure: Figure
    tables: Sequence[SubTable] = ()
    examples: Sequence[Grid] = ()
    more_figures: Mapping[str, Figure] = field(default_factory=dict)
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    published: Sequence[Published] = ()
    notes: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """Everything but the page's figures and examples, as JSON."""
        record = {name: value for name, value in vars(self).items() if name not in _ON_THE_PAGE}
        return {
            **record,
            "tables": [vars(one) for one in self.tables],
            "published": [vars(one) for one in self.published],
        }

    def save(self, folder: Path) -> StudyResult:
        """Write the page, the figure, the tables and `result.json`; the result, with these files named in it."""
        folder.mkdir(parents=True, exist_ok=True)
        saved = replace(self, files={what: str(folder / name) for what, name in _FILES.items()})
        save_figure(saved.figure, folder / _FILES["figure"])
        (folder / _FILES["table"]).write_text(_markdown(saved), encoding="utf-8")
        latex = [latex_table(one.columns, one.rows, one.title or saved.question) for one in _tables(saved)]
        (folder / _FILES["latex"]).write_text("\n".join(latex), encoding="utf-8")
        write_page(folder / _FILES["page"], _page(saved))
        write_json(folder / _FILES["result"], saved.to_record())
        return saved


def _tables(result: StudyResult) -> list[SubTable]:
    """The main table, and those beside it."""
    tables = [SubTable("", result.columns, result.rows), *result.tables]
    if result.published:
        names = list(dict.fromkeys(name for one in result.published for name in one.values))
        rows = [{"published": one.what, **one.values, "source": one.source} for one in result.published]
        tables.append(SubTable("Published, on other models and edits", ["published", *names, "source"], rows))
    return tables


def _markdown(result: StudyResult) -> str:
    parts = [f"# {result.name}", "", result.question, "", f"**{result.found}**", ""]
    for one in _tables(result):
        parts += [f"{one.title}:", ""] if one.title else []
        parts += [markdown_table(one.columns, one.rows), ""]
    parts += [f"- {note}" for note in result.notes]
    return "\n".join(parts).rstrip("\n") + "\n"


def _page(result: StudyResult) -> Page:
    made = dict(result.provenance)
    settings = made.pop("settings", {})
    figures = [Picture(result.figure, "")]  # its title is the finding
    figures += [Picture(figure, caption) for caption, figure in result.more_figures.items()]
    main, *others = _tables(result)
    sections = [
        Section("", [figures[0]]),
        *(Section(one.title, [grid(one.columns, one.rows)]) for one in others),
        *([Section("More of what was seen", figures[1:])] if figures[1:] else []),
        Section(
            "Measured",
            [
                grid(main.columns, main.rows),
                Verbatim("Every column of every row, as JSON", json.dumps(result.rows, ensure_ascii=False, indent=1)),
            ],
            "Generated unless it says forced; small print: 95 % intervals.",
            result.notes,
        ),
        *(
            [Section("A few edits, and what was said in the end", result.examples, _EXAMPLES)]
            if result.examples
            else []
        ),
        Section("Protocol", [Grid(("setting", "value"), flattened(made))]),
        Section("Settings of the methods", [Grid(("setting", "value"), flattened(settings))]),
    ]
    return Page(result.name, result.question, sections, result.command, result.found)
