"""One self-contained HTML page: cards, figures, tables, examples, settings. It opens offline and prints well.

Every report of errata is such a page: a run (`report.py`), a comparison (`comparison_page.py`) and a study. Knows
nothing of what is reported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from errata import __version__
from errata.evaluation.figures import svg
from errata.evaluation.tables import cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Card", "Cell", "Grid", "Page", "Picture", "Section", "Verbatim", "flattened", "grid", "write_page"]


@dataclass(frozen=True)
class Cell:
    """A cell that says more than its text: a second line in small print, or whether it is good."""

    text: str
    small: str = ""
    mark: Literal["", "ok", "no"] = ""


@dataclass(frozen=True)
class Grid:
    """A table; columns named in `numbers` stand to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    numbers: frozenset[str] = frozenset()
    title: str = ""

    @property
    def cells(self) -> list[list[Cell]]:
        return [[Cell(one) if isinstance(one, str) else one for one in row] for row in self.rows]


@dataclass(frozen=True)
class Picture:
    """A figure, drawn into the page as SVG; with a title of its own it may do without a caption."""

    figure: Figure
    caption: str

    @property
    def svg(self) -> str:
        return svg(self.figure)


@dataclass(frozen=True)
class Verbatim:
    """Something long that is folded away, such as everything that was said."""

    summary: str
    text: str


@dataclass(frozen=True)
class Card:
    """One number that a reader should see first."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and what stands below."""

    title: str
    parts: Sequence[Grid | Picture | Verbatim]
    text: str = ""
    points: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """Everything a page shows.

    Attributes:
        lead: below the title; finding: one sentence, in bold; command: what makes it again.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    command: str
    finding: str = ""
    cards: Sequence[Card] = ()


def grid(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], title: str = "") -> Grid:
    """A table of records: numbers as tables show them, intervals in small print below (`NAME_interval`)."""
    kept, numbers = list(rows), set()
    made: list[list[str | Cell]] = []
    for row in kept:
        line: list[str | Cell] = []
        for column in columns:
            value = row.get(column)
            low, high = row.get(f"{column}_interval") or (None, None)
            if isinstance(value, int | float):
                numbers.add(column)
            line.append(Cell(cell(value), "" if low is None or high is None else f"{cell(low)} to {cell(high)}"))
        made.append(line)
    names = {column: column.replace("_", " ") for column in columns}
    return Grid([names[c] for c in columns], made, frozenset(names[c] for c in numbers), title)


def flattened(record: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """A record of settings as pairs, inner records by `outer.inner`; None is left out."""
    pairs: list[tuple[str, str]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            pairs += flattened(value, f"{before}{name}.")
        elif value is not None:
            told = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            pairs.append((f"{before}{name}", told))
    return pairs


def write_page(path: Path, page: Page) -> Path:
    """Write the page; nothing in it is loaded from elsewhere."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("errata.evaluation"), autoescape=True, trim_blocks=True)
    kinds = {Grid: "grid", Picture: "picture", Verbatim: "verbatim"}
    sections = [(section, [(kinds[type(part)], part) for part in section.parts]) for section in page.sections]
    text = environment.get_template("page.html.j2").render(page=page, sections=sections, version=__version__)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
