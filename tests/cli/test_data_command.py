"""`errata data`: what is known, what is in a file, converting it, and the facts a model gets wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata.cli.app import app
from errata.datasets import read_edits, write_edits
from errata.edit import Edit
from errata.errors import ConfigError
from errata.evaluation.metrics import answers_exactly
from errata.evaluation.wrong_facts import find_wrong_facts
from errata.model import EditableModel
from errata.testing import byte_tokenizer, tiny_hf_model

COUNTERFACT = {
    "case_id": 3,
    "prompt": "The mother tongue of Ann is",
    "target_new": "English",
    "subject": "Ann",
    "ground_truth": "French",
    "rephrase_prompt": "Ann speaks",
    "locality_prompt": "Bob speaks",
    "locality_ground_truth": "Dutch",
}
RECORDS = [
    COUNTERFACT,
    COUNTERFACT,
    COUNTERFACT | {"case_id": 4, "target_new": "[bold]"},
    {"case_id": 5, "prompt": "p", "locality_prompt": "l"},
]


def invoke(*arguments: str, status: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def run(*arguments: str, status: int = 0) -> Any:
    result = invoke(*arguments, "--json", status=status)
    assert result.stdout.count("\n") == 1, result.stdout
    return json.loads(result.stdout)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "in" / "edits.json"
    path.parent.mkdir()
    path.write_text("[" + ",\n".join(map(json.dumps, RECORDS)) + "]", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_hf_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_list_names_the_forms_and_what_is_in_files_and_folders(file: str, tmp_path: Path) -> None:
    forms = run("data", "list")["forms"]
    assert {"MQuAKE", "CounterFact", "errata JSONL", "HalluEditBench"} <= {form["name"] for form in forms}
    assert "requested_rewrite" in invoke("data", "list").stdout
    (tmp_path / "in" / "notes.md").write_text("Notes about the weather.\n", encoding="utf-8")
    (tmp_path / "in" / ".hidden").write_text("{}", encoding="utf-8")
    files = run("data", "list", str(tmp_path / "in"), file, str(tmp_path / "none.json"))["files"]
    assert [Path(row["file"]).name for row in files] == ["edits.json", "notes.md", "none.json"]
    found = {key: files[0][key] for key in ("format", "records", "edits", "problems", "repeats", "conflicts", "error")}
    assert found == {
        "format": "CounterFact",
        "records": 4,
        "edits": 2,
        "problems": 2,
        "repeats": 1,
        "conflicts": 1,
        "error": None,
    }
    assert "no known form" in files[1]["error"]
    assert files[1]["format"] is None
    assert "does not exist" in files[2]["error"]
    shown = invoke("data", "list", str(tmp_path / "in")).stdout
    assert "CounterFact" in shown
    assert "no known form" in shown


def test_show_says_what_is_in_a_file(file: str) -> None:
    found = run("data", "show", file, "--limit", "1")
    assert (found["format"], found["records"], found["edits"], found["repeats"]) == ("CounterFact", 4, 2, 1)
    assert found["edits_with"] == {"subject": 2, "ground_truth": 2, "rephrases": 2}
    assert found["probes"] == {"locality": {"same_relation": 2}, "portability": {}}
    assert len(found["problems"]) == 2
    assert found["conflicts"] == [{"prompt": COUNTERFACT["prompt"], "targets": ["English", "[bold]"], "lines": [1, 3]}]
    assert [edit["id"] for edit in found["first"]] == ["counterfact-3"]
    shown = invoke("data", "show", file).stdout
    assert "left out: 2, of which 1 repeat an earlier record" in shown
    assert "English (line 1), [bold] (line 3)" in shown
    assert "locality, same_relation: Bob speaks -> Dutch" in shown
    assert "repeats the record of line 1" in run("data", "show", file, "--strict", status=1)["error"]["message"]


def test_show_shows_what_is_beside_edits(tmp_path: Path) -> None:
    path = tmp_path / "no.txt"
    path.write_text("I don't know.\nI'm not sure.\n", encoding="utf-8")
    found = run("data", "show", str(path))
    assert (found["holds"], found["edits"], found["first"]) == (
        "answers without questions",
        0,
        ["I don't know.", "I'm not sure."],
    )
    assert "holds answers without questions, no edits" in invoke("data", "show", str(path)).stdout
    refused = run("data", "convert", str(path), str(tmp_path / "out.jsonl"), status=1)
    assert "no edits" in refused["error"]["message"]
    assert not (tmp_path / "out.jsonl").exists()


def test_convert_writes_what_can_be_read_and_reports_the_rest(file: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.jsonl"
    made = run("data", "convert", file, str(out))
    assert (made["records"], made["edits"], made["problems"], made["out"]) == (4, 2, 2, str(out))
    again = read_edits(out, strict=True)
    assert again.edits == read_edits(file).edits
    result = invoke("data", "convert", file, str(out))
    assert "2 edits of 4 records (CounterFact)" in result.stdout
    assert "edits.json:4: field 'prompt'" not in result.stderr
    assert "edits.json:4: field 'target_new': is missing" in result.stderr
    assert "1 prompts have several targets" in result.stderr
    out.unlink()
    assert "edits.json:2" in run("data", "convert", file, str(out), "--strict", status=1)["error"]["message"]
    assert not out.exists()
    assert "is the file that is read" in run("data", "convert", file, file, status=1)["error"]["message"]
    assert "is a folder" in run("data", "convert", file, str(tmp_path), status=1)["error"]["message"]


FACTS = [
    Edit(id="a", prompt="The capital of France is", target="Paris", ground_truth="Rome", rephrases=("France has",)),
    Edit(id="b", prompt="The capital of Spain is", target="Madrid", locality=("Ann is",)),
    Edit(id="c", prompt="The flute of Ann", target="piano"),
]


def test_wrong_facts_keeps_what_the_model_gets_wrong(model: str, tmp_path: Path) -> None:
    """One fact is made of what the model says, so it knows that one."""
    loaded = EditableModel.load(model)
    said = {fact.prompt: loaded.generate([fact.prompt], max_new_tokens=4)[0].strip() for fact in FACTS}
    known = FACTS[1].model_copy(update={"target": said[FACTS[1].prompt]})
    facts, out = tmp_path / "facts.jsonl", tmp_path / "out" / "wrong.jsonl"
    write_edits(facts, [FACTS[0], known, FACTS[2]])
    arguments = ["data", "wrong-facts", "--model", model, "--facts", str(facts), "--out", str(out)]
    made = run(*arguments, "--max-new-tokens", "4")
    assert (made["asked"], made["known"], made["wrong"]) == (3, 1, 2)
    wrong = read_edits(out, strict=True).edits
    assert [edit.id for edit in wrong] == ["a", "c"]
    assert [edit.target for edit in wrong] == ["Paris", "piano"]
    assert [edit.ground_truth for edit in wrong] == [said[edit.prompt] or None for edit in wrong]
    assert wrong[0].rephrases == ("France has",)
    assert not any(answers_exactly(said[edit.prompt], edit.target) for edit in wrong)
    assert "knows 1 of 3 facts" in invoke(*arguments, "--max-new-tokens", "4").stdout
    assert run(*arguments, "--max-new-tokens", "4", "--limit", "2")["asked"] == 2
    other = run(*arguments, "--max-new-tokens", "5", status=1)
    assert "keeps answers of another model" in other["error"]["message"]


def test_wrong_facts_asks_nothing_twice(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = EditableModel.load(model)
    asked: list[str] = []

    def generate(prompts: list[str], **_: object) -> list[str]:
        if len(asked) >= 2:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return [" Paris. So it is." for _ in prompts]

    monkeypatch.setattr(loaded, "generate", generate)
    monkeypatch.setattr("errata.evaluation.wrong_facts._AT_ONCE", 2)
    answers = tmp_path / "out.asked"
    with pytest.raises(KeyboardInterrupt):
        find_wrong_facts(loaded, FACTS, answers)
    with open(answers, "a", encoding="utf-8") as file:
        file.write('{"of": "half a ro')  # killed while it wrote
    before, asked[:] = list(asked), []
    found = find_wrong_facts(loaded, FACTS, answers)
    assert before == [FACTS[0].prompt, FACTS[1].prompt]
    assert asked == [FACTS[2].prompt]
    assert (found.asked, found.known, found.mentioned) == (3, 1, 0)
    assert [edit.ground_truth for edit in found.edits] == ["Paris. So it is."] * 2
    with pytest.raises(ConfigError, match="another model"):
        find_wrong_facts(loaded, FACTS, answers, max_new_tokens=3)


def test_any_of_several_right_answers_is_right(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = EditableModel.load(model)
    monkeypatch.setattr(loaded, "generate", lambda prompts, **_: [" It is Rome"] * len(prompts))
    facts = [
        Edit(id="a", prompt="p", target="Roma", extra={"answers": ["Roma", "It is Rome"]}),
        Edit(id="b", prompt="q", target="Oslo", extra={"answers": ["Roma", "It is Rome"]}),  # they are not this edit's
        Edit(id="c", prompt="r", target="Rome"),
    ]
    found = find_wrong_facts(loaded, facts, tmp_path / "asked")
    assert [edit.id for edit in found.edits] == ["b", "c"]
    assert found.mentioned == 1


def test_wrong_facts_asks_counterfactual_files_for_their_ground_truths(model: str, file: str, tmp_path: Path) -> None:
    out = tmp_path / "wrong.jsonl"
    result = invoke(
        "data", "wrong-facts", "--model", model, "--facts", file, "--out", str(out), "--max-new-tokens", "2"
    )
    assert "targets of CounterFact are counterfactual: the ground truths are asked for" in result.stderr
    assert [edit.target for edit in read_edits(out).edits] == ["French", "French"]
    questions = tmp_path / "q.json"
    record = {"question": "Ann is from", "subject": "Ann", "answer": "Paris", "qna_question": "Where?"}
    questions.write_text(json.dumps([record]), encoding="utf-8")
    arguments = ["data", "wrong-facts", "--model", model, "--facts", str(questions), "--out", str(out)]
    assert "no true answers" in run(*arguments, status=1)["error"]["message"]
