"""Tables of records as text: how a value is shown, Markdown, LaTeX. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["cell", "latex_table", "markdown_table"]

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}
_TO_ESCAPE = re.compile("|".join(re.escape(sign) for sign in _LATEX))


def cell(value: Any) -> str:
    """A value as tables show it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        size = abs(value)
        return f"{value:.0f}" if size >= 1000 else f"{value:.3g}" if size >= 10 or 0 < size < 0.1 else f"{value:.2f}"
    return str(value)


def markdown_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A pipe table, without a line break at its end."""
    head = "| " + " | ".join(column.replace("_", " ") for column in columns) + " |"
    lines = [head, "|" + "---|" * len(columns)]
    for row in rows:
        cells = (cell(row.get(column)).replace("|", "\\|").replace("\n", " ") for column in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def latex_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], caption: str = "") -> str:
    r"""A `table` with rules of booktabs (`\usepackage{booktabs}`); numbers to the right, intervals in brackets."""

    def escaped(text: str) -> str:
        return _TO_ESCAPE.sub(lambda found: _LATEX[found.group()], text)

    def shown(row: Mapping[str, Any], column: str) -> str:
        low, high = row.get(f"{column}_interval") or (None, None)
        interval = "" if low is None or high is None else f" [{cell(low)}, {cell(high)}]"
        return escaped(cell(row.get(column)) + interval)

    numeric = [any(isinstance(row.get(column), int | float) for row in rows) for column in columns]
    lines = [
        r"\begin{table}",
        r"\centering",
        *([rf"\caption{{{escaped(caption)}}}"] if caption else []),
        rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric)}}}",
        r"\toprule",
        " & ".join(escaped(column.replace("_", " ")) for column in columns) + r" \\",
        r"\midrule",
        *(" & ".join(shown(row, column) for column in columns) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"
