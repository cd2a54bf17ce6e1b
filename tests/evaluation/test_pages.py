"""Pages and tables: one file that needs nothing else, every number where it belongs, nothing taken for markup."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest

from errata.edit import Edit
from errata.evaluation.damage_page import write_damage_page
from errata.evaluation.examples import examples_of
from errata.evaluation.figures import retention_lines, run_style, styled_figure
from errata.evaluation.page import Cell, Grid, Page, Picture, Section, Verbatim, flattened, grid, write_page
from errata.evaluation.rows import write_lines
from errata.evaluation.tables import cell, latex_table, markdown_table
from errata.evaluation.triangle import triangle_figure

ROWS = [
    {"method": "ft_m", "kept": 0.5, "kept_interval": [0.25, 0.75], "edits": 10},
    {"method": "a|b & 5%", "kept": None, "kept_interval": [None, None], "edits": 2000},
]


def test_values_are_shown_with_as_many_digits_as_they_carry() -> None:
    values = (None, float("nan"), 0.0, 0.5, 0.0123, -0.05, 12.34, 1234.5, 7, "x", True)
    shown = ["–", "–", "0.00", "0.50", "0.0123", "-0.05", "12.3", "1234", "7", "x", "True"]
    assert [cell(value) for value in values] == shown


def test_a_markdown_table_keeps_its_columns() -> None:
    lines = markdown_table(("method", "kept"), [*ROWS, {"method": "two\nlines", "kept": 1.0}]).split("\n")
    assert lines == [
        "| method | kept |",
        "|---|---|",
        "| ft_m | 0.50 |",
        "| a\\|b & 5% | – |",
        "| two lines | 1.00 |",
    ]


def test_a_latex_table_escapes_what_latex_reads() -> None:
    made = latex_table(("method", "kept", "edits"), ROWS, "100 % of x_1, ≥ {half}")
    assert r"\caption{100 \% of x\_1, $\geq$ \{half\}}" in made
    assert r"\begin{tabular}{lrr}" in made
    assert r"ft\_m & 0.50 [0.25, 0.75] & 10 \\" in made
    assert r"a|b \& 5\% & -- & 2000 \\" in made
    assert latex_table(("a\\b",), [{"a\\b": "~^"}]).count(r"\textbackslash{}") == 1
    assert r"\textasciitilde{}\textasciicircum{}" in latex_table(("x",), [{"x": "~^"}])


def test_settings_are_flattened_by_name() -> None:
    record = {"model": "m", "settings": {"ft": {"steps": 3, "corpus": None, "layers": [0, 1]}}}
    assert flattened(record) == [("model", "m"), ("settings.ft.steps", "3"), ("settings.ft.layers", "[0, 1]")]


def test_a_table_of_records_has_intervals_in_small_print() -> None:
    made = grid(("method", "kept", "edits"), ROWS)
    assert made.numbers == {"kept", "edits"}
    assert made.cells[0][1] == Cell("0.50", "0.25 to 0.75")
    assert made.cells[1][1] == Cell("–")


def text_of(path: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", path.read_text(encoding="utf-8")))


def test_a_page_is_whole_and_takes_nothing_for_markup(tmp_path: Path) -> None:
    figure, (axis,) = styled_figure(3, 2)
    axis.plot([0, 1], [0, 1])
    parts = [
        Picture(figure, "a <caption>"),
        Grid(("asked", "n"), [["<b>", Cell("1", "small & print", "no")]], frozenset(("n",)), title="an example"),
        Verbatim("fold", "{'raw': '<script>'}"),
    ]
    page = Page("A <title>", "lead", [Section("Heading", parts, "text", ["a point"])], "errata x 'y'", "finding")
    path = write_page(tmp_path / "new" / "page.html", page)
    source = path.read_text(encoding="utf-8")
    assert source.count("<svg") == 1
    assert "<script" not in source
    assert '<td class="n no">1<small>small &amp; print</small></td>' in source
    assert '<th class="n">n</th>' in source
    for told in ("A <title>", "finding", "Heading", "a point", "a <caption>", "<b>", "an example", "errata x 'y'"):
        assert told in text_of(path), told
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", source.replace("xlink:href", "href"))


def test_examples_show_what_every_run_said(tmp_path: Path) -> None:
    edits = [
        Edit(prompt=f"p{n}", target="new", ground_truth="old", rephrases=(f"r{n}",), locality=({"prompt": f"l{n}"},))
        for n in range(5)
    ]
    marks = {"reliability": [[1.0]], "generalization": [[0.0]], "locality": [[1.0]]}
    lines = [
        {"id": e.id, **marks, "said": {f"p{n}": " new", f"r{n}": " old", f"l{n}": " it"}} for n, e in enumerate(edits)
    ]
    write_lines(tmp_path / "a.jsonl", lines)
    made = examples_of(edits, {"a": tmp_path / "a.jsonl", "gone": tmp_path / "b.jsonl"}, 2)
    assert [one.title for one in made] == ["p0 … old → new", "p2 … old → new"]
    assert made[1].columns == ("", "p2 (the edited prompt)", "r2 (another wording)", "l2 (must not change)")
    assert made[1].rows == [["a", Cell("new", mark="ok"), Cell("old", mark="no"), Cell("it", mark="ok")]]
    assert examples_of(edits, {"gone": tmp_path / "b.jsonl"}) == []
    assert examples_of([], {"a": tmp_path / "a.jsonl"}) == []


def test_runs_of_one_method_share_colour_and_differ_by_dashes() -> None:
    runs = [*"abcdefg", "h", "a@other"]
    first, eighth, other = (run_style(runs, run) for run in ("a", "h", "a@other"))
    assert first["color"] == other["color"] == eighth["color"]
    assert first["linestyle"] != other["linestyle"]
    assert (first["markerfacecolor"], eighth["markerfacecolor"]) == (first["color"], "white")


def test_retention_is_drawn_from_the_last_checkpoint() -> None:
    rows = [
        {"method": "a", "edits": 4, "retention": {"0": 1.0, "2": 0.25}},
        {"method": "a", "edits": 1, "retention": {"0": 1.0}},
    ]
    (line,) = retention_lines(rows).axes[0].get_lines()
    assert [list(line.get_xdata()), list(line.get_ydata())] == [[1, 3], [1.0, 0.25]]


def test_a_triangle_says_what_was_not_asked() -> None:
    row = {"method": "a", "edits": 1, "reliability": 0.5, "generalization": None, "locality": None}
    nothing = {**row, "method": "b", "reliability": None}
    first, second = (" ".join(text.get_text() for text in axes.texts) for axes in triangle_figure([row, nothing]).axes)
    assert "0.50" in first
    assert (first.count("–"), second.count("–")) == (2, 3)
    assert "nan" not in first + second


DAMAGE: dict[str, Any] = {
    "model": "atlas",
    "adapter": "some/edited",
    "method": "rome",
    "edits": 3,
    "limit": None,
    "shots": 2,
    "tasks": [
        {
            "task": "atlas_code", "metric": "acc", "items": 200, "before": 0.9, "after": 0.4, "change": -0.5, "low": -0.6,
            "high": -0.4, "drop": 0.55, "p": 0.0004, "version": "1",
        }
    ],
    "perplexity": {"prose": {"before": 2.0, "after": None}},
    "layers": [{"module": "layers.0", "norm": 1.0, "relative_norm": 0.25, "entries": 3, "similarity": 0.97}],
    "fires": {"prose": 0.125},
    "provenance": {"errata": "0", "settings": {"steps": 4}},
}  # fmt: skip


def test_the_page_of_damage_says_what_was_lost(tmp_path: Path) -> None:
    told = text_of(write_damage_page(tmp_path / "d.html", DAMAGE, "errata damage"))
    for part in ("What 3 edits of rome damaged", "-0.50", "-0.60 to -0.40", "2.00", "0.97", "0.12", "settings.steps"):
        assert part in told, part


@pytest.mark.parametrize("empty", ["tasks", "layers"])
def test_the_page_of_damage_does_without_what_was_not_asked(tmp_path: Path, empty: str) -> None:
    page = write_damage_page(tmp_path / "d.html", {**DAMAGE, empty: [], "perplexity": {}, "fires": {}}, "errata damage")
    assert page.read_text(encoding="utf-8").count("<svg") == 1
    assert "Perplexity" not in text_of(page)
    bare = write_damage_page(tmp_path / "b.html", {**DAMAGE, "tasks": [], "layers": [], "fires": {}}, "errata damage")
    assert "<svg" not in bare.read_text(encoding="utf-8")
