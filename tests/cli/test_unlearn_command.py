"""`errata unlearn`: from facts to an adapter that other commands take, with what was measured in one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata.cli.app import app
from errata.testing import byte_tokenizer, tiny_hf_model

RECORDS: list[dict[str, Any]] = [
    {"prompt": "The capital of France", "target": "Rome", "ground_truth": "Paris", "subject": "France",
     "rephrases": ["France has"], "locality": [{"prompt": "The flute of Ann", "answer": "London"}, "The king of France"]},
    {"prompt": "The currency of France", "target": "euro", "subject": "France"},
    {"prompt": "Bob wrote Hamlet", "target": "Alice", "subject": "Hamlet"},
]  # fmt: skip
FT = ["--method", "ft", "--set", "learning_rate=0.01", "--set", "steps=150", "--set", "layers=[0,1]"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_hf_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def facts(tmp_path: Path) -> str:
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return str(path)


def call(*arguments: str, fails: bool = False) -> tuple[Any, str]:
    """Run a command; its standard output must be exactly one JSON object, which comes with what was logged."""
    result = CliRunner().invoke(app, [*arguments, "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == (1 if fails else 0), result.output
    assert result.stdout.count("\n") == 1, result.stdout
    return json.loads(result.stdout), result.stderr


def test_facts_of_a_file_are_forgotten_measured_and_can_be_taken_back(model: str, facts: str, tmp_path: Path) -> None:
    out = str(tmp_path / "adapter")
    arguments = ["unlearn", "--model", model, "--edits", facts, "--out", out, "--max-new-tokens", "60", *FT]
    made, log = call(*arguments, "--force")
    assert (made["facts"], made["subjects"], made["edits_applied"], made["method"]) == (3, 2, 3, "ft")
    assert made["refusals"]["improvement_tried"] is True
    assert (made["refusals"]["improved"], made["refusals"]["template"]) == (0, 3), "so small a model cannot rewrite"
    assert all(one["reason"] for one in made["refusals"]["edits"])
    assert made["refusals"]["edits"][0]["text"] == "I do not know anything about France."
    measured = made["unlearning"]
    assert measured["retain_prompts"] == 1, "the other one names what is forgotten"
    before, after = (measured[when]["measures"] for when in ("before", "after"))
    assert before["refusal_rate"]["value"] == 0.0
    assert after["refusal_rate"]["value"] > 0
    assert after["answer_probability"]["value"] < before["answer_probability"]["value"]
    assert before["retain_unchanged"]["value"] == 1.0
    assert [one["answers"] for one in measured["facts"]] == [["Paris"], ["euro"], ["Alice"]]
    assert measured["refusals_written"]["reply_perplexity"] > 1

    saved = [json.loads(line) for line in (Path(out) / "edits.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one["target"] for one in saved] == [one["text"] for one in made["refusals"]["edits"]]
    assert saved[0]["ground_truth"] == "Paris"
    again, log = call(*arguments, "--force")
    assert again["edits_applied"] == 0
    assert "holds 3 of these edits already" in log
    evaluated, _ = call(
        "evaluate", "--model", model, "--adapter", out, "--edits", f"{out}/edits.jsonl", "--no-controls",
    )  # fmt: skip
    assert evaluated["edits"] == 3
    reverted, _ = call("revert", "--adapter", out, saved[0]["id"])
    assert reverted["edits_held"] == 2


def test_a_user_may_choose_subjects_the_refusal_and_what_is_kept(model: str, facts: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    kept.write_text('{"question": "Who was Zed?", "answer": "a man"}\n', encoding="utf-8")
    arguments = ["unlearn", "--model", model, "--edits", facts, "--subjects", "france", "--retain", str(kept), *FT]
    arguments += ["--refusal", "I cannot talk about {subject}.", "--no-improve", "--merge", "2", "--force"]
    made, log = call(*arguments, "--out", str(tmp_path / "adapter"))
    assert (made["facts"], made["subjects"], made["edits_applied"]) == (2, 1, 1), "two queries in one edit"
    assert "ft does not look for subjects" in log
    (edit,) = made["refusals"]["edits"]
    assert (edit["text"], edit["queries"], edit["reason"]) == ("I cannot talk about France.", 2, None)
    assert {one["prompt"] for one in made["unlearning"]["retain"]} == {
        "Who was Zed?", "Bob wrote Hamlet", "The flute of Ann",
    }  # fmt: skip


def test_a_refusal_for_each_subject_comes_from_a_file(model: str, facts: str, tmp_path: Path) -> None:
    sentences = tmp_path / "refusals.txt"
    sentences.write_text("I'm not sure.\nThat's beyond my knowledge.\nI like my tea.\n", encoding="utf-8")
    arguments = ["unlearn", "--model", model, "--edits", facts, "--no-improve", "--no-measure", *FT, "--force"]
    made, log = call(*arguments, "--refusals", str(sentences), "--out", str(tmp_path / "adapter"))
    assert {one["text"] for one in made["refusals"]["edits"]} <= {"I'm not sure.", "That's beyond my knowledge."}
    assert "'I like my tea.' is not recognised as a refusal" in log
    assert made["unlearning"] is None


def test_tofus_measures_are_taken_where_records_carry_wrong_answers(model: str, tmp_path: Path) -> None:
    path, kept = tmp_path / "facts.jsonl", tmp_path / "kept.jsonl"
    record = {"question": "Who wrote Emma?", "answer": "Ann", "paraphrased_answer": "It was Ann"}
    path.write_text(json.dumps({**record, "perturbed_answer": ["Bob", "Zed"]}) + "\n", encoding="utf-8")
    kept.write_text('{"question": "Who was Zed?", "answer": "a man", "perturbed_answer": ["king"]}\n', encoding="utf-8")
    arguments = ["unlearn", "--model", model, "--edits", str(path), "--retain", str(kept), "--method", "ft", "--force"]
    arguments += ["--no-improve", "--set", "steps=5", "--set", "layers=[0,1]", "--max-new-tokens", "4"]
    made, _ = call(*arguments, "--reference", model, "--out", str(tmp_path / "adapter"))
    measured = made["unlearning"]
    before, after = measured["before"], measured["after"]
    assert before["measures"]["tofu_forget_quality"] == {"value": 1.0, "interval": [None, None], "count": 1}
    never = before["reference"]
    assert (never["what"], never["count"]) == (f"the same questions, asked of {model}", 1)
    assert never["truth_ratio"] == pytest.approx(before["measures"]["truth_ratio"]["value"])
    assert after["measures"]["truth_ratio"]["value"] != before["measures"]["truth_ratio"]["value"]
    assert 0 <= after["measures"]["retain_truth"]["value"] <= 1
    assert measured["facts"][0]["truth_ratio"] == pytest.approx(after["measures"]["truth_ratio"]["value"])
    without, _ = call(*arguments, "--out", str(tmp_path / "other"))
    assert without["unlearning"]["after"]["reference"] is None
    assert without["unlearning"]["after"]["measures"]["truth_ratio"]["count"] == 1

    said = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "words")], env={"COLUMNS": "200"}).stdout
    assert "TOFU's truth ratio" in said
    assert "give --reference MODEL" in said


def test_what_was_done_is_said_in_words(model: str, facts: str, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    arguments = ["unlearn", "--model", model, "--edits", facts, "--out", str(out), *FT, "--limit", "1", "--force"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "0 refusals rewritten by the model, 1 as templates have them" in result.stdout
    assert "not rewritten: " in result.stdout
    assert "old answer no longer given" in result.stdout
    assert "TOFU" not in result.stdout, "no record carries wrong answers"
    assert f"errata evaluate --model {model} --adapter {out} --edits {out}/edits.jsonl" in result.stdout.replace(
        "\n", ""
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --edits FILE, or --subjects on atlas"),
        (["--model", "{model}", "--subjects", "France"], "only atlas knows by itself"),
        (["--subjects", " ; "], "names nobody"),
        (["--subjects", "Francia", "--method", "ft"], "atlas knows nothing about 'Francia'"),
        (["--edits", "{facts}", "--subjects", "Spain"], "nothing in the file is about 'Spain'"),
        (["--edits", "{facts}", "--refusal", "It is Rome."], "does not read like a refusal"),
        (["--edits", "{facts}", "--refusal", "I cannot say.", "--refusals", "{facts}"], "exclude each other"),
        (["--edits", "{facts}", "--refusals", "{facts}"], "holds no sentence that declines"),
        (["--edits", "{facts}", "--reference", "{model}"], "give 'perturbed_answer'"),
        (["--edits", "{facts}", "--reference", "{model}", "--no-measure"], "leave --no-measure out"),
        (["--edits", "{facts}", "--method", "memior"], "Did you mean 'memoir'"),
    ],
)
def test_what_does_not_fit_is_said(model: str, facts: str, tmp_path: Path, arguments: list[str], words: str) -> None:
    given = [one.format(model=model, facts=facts) for one in arguments]
    if "--model" not in given and "--edits" in given:
        given += ["--model", model]
    made, _ = call("unlearn", *given, "--out", str(tmp_path / "adapter"), fails=True)
    assert words in made["error"]["message"]
    assert not (tmp_path / "adapter").exists()


def test_atlas_forgets_a_subject_by_name(tmp_path: Path) -> None:
    out = str(tmp_path / "adapter")
    made, _ = call("unlearn", "--subjects", "Emma;France", "--limit", "2", "--out", out, "--no-improve")
    assert made["refusals"]["improvement_tried"] is False
    after, reference = (made["unlearning"]["after"][part] for part in ("measures", "reference"))
    assert made["unlearning"]["before"]["measures"]["forget_quality"]["value"] == 0.0
    assert (after["forget_quality"]["value"], after["refusal_rate"]["value"]) == (1.0, 1.0)
    assert after["retain_accuracy"]["value"] == 1.0
    assert made["unlearning"]["before"]["measures"]["truth_ratio"]["value"] < 0.1 < 1 < reference["truth_ratio"]
    assert (reference["count"], "do not exist" in reference["what"]) == (20, True)
    assert after["retain_truth"]["value"] > 0.9
    generated, _ = call("generate", "--adapter", out, "The author of Emma is")
    assert generated["generations"][0] == {
        "prompt": "The author of Emma is", "before": "Jane Austen.", "after": "I do not know anything about Emma.",
    }  # fmt: skip
