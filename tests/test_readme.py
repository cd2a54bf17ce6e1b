"""What README and docs say is executed: Python snippets as they stand, shell snippets command by command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_python_quickstart_runs_and_says_what_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    snippet = "\n".join(blocks(README, "python"))  # they build on one another
    exec(compile(snippet, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    promised = [line.split("# ", 1)[1] for line in snippet.splitlines() if line.startswith("print(") and "# " in line]
    assert printed == promised


def test_the_shell_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (snippet,) = (b for b in blocks(README, "sh") if "errata edit" in b)
    lines = snippet.replace("\\\n", " ").splitlines()
    heredoc: list[str] | None = None
    ran = 0
    for line in lines:
        if heredoc is not None:
            if line == "END":
                Path("edits.jsonl").write_text("\n".join(heredoc) + "\n", encoding="utf-8")
                heredoc = None
            else:
                heredoc.append(line)
        elif line.startswith("cat > edits.jsonl"):
            heredoc = []
        elif line.startswith("errata "):
            arguments = shlex.split(line, comments=True)[1:]
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{line}\n{result.output}\n{result.stderr}"
            ran += 1
    assert ran >= 5


def test_every_method_has_a_card_and_a_row() -> None:
    from errata.editors import editor_names

    for name in editor_names():
        assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()
        assert f"docs/methods/{name}.md" in README


def test_every_link_into_the_project_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_example_method_of_the_docs_passes_the_contract() -> None:
    from errata.testing import check_editor

    method, _ = blocks((ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8"), "python")
    names: dict[str, object] = {"__name__": "nudge"}
    exec(compile(method, "add-a-method.md", "exec", dont_inherit=True), names)
    nudge = names["Nudge"]
    check_editor(lambda model: nudge(model, strength=200.0), families=("llama",))  # type: ignore[operator]
