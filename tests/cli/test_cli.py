"""The commands: exactly one JSON object on standard output, clear errors, work that can be gone on with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata.cli.app import app, main
from errata.testing import byte_tokenizer, tiny_hf_model

EDITS = [
    {"id": "a", "prompt": "The capital of France", "target": "Rome", "subject": "France", "rephrases": ["France has"]},
    {"id": "b", "prompt": "Bob wrote Hamlet", "target": "Alice", "subject": "Hamlet", "locality": ["Ann wrote Emma"]},
    {"id": "c", "prompt": "The flute of Ann", "target": "piano", "subject": "Ann"},
]
FT = ["--method", "ft", "--set", "learning_rate=0.01", "--set", "steps=60"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama checkpoint that is not atlas, in a folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_hf_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def edits(tmp_path: Path) -> str:
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(edit) + "\n" for edit in EDITS), encoding="utf-8")
    return str(path)


def run(*arguments: str, fails: bool = False) -> Any:
    """Run a command in-process; its standard output must be exactly one JSON object."""
    result = CliRunner().invoke(app, [*arguments, "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == (1 if fails else 0), result.output
    assert result.stdout.count("\n") == 1, result.stdout
    return json.loads(result.stdout)


def words(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_edit_then_evaluate_a_checkpoint_from_a_path(model: str, edits: str, tmp_path: Path) -> None:
    adapter = str(tmp_path / "adapter")
    made = run("edit", "--model", model, "--edits", edits, "--out", adapter, *FT)
    assert made["method"] == "ft"
    assert (made["edits_applied"], made["edits_refused"]) == (3, 0)
    assert {"seconds_per_edit", "prepare_seconds", "adapter"} <= made.keys()
    measured = run("evaluate", "--model", model, "--adapter", adapter, "--edits", edits, "--max-new-tokens", "4")
    for name in ("reliability", "generalization", "locality", "portability"):
        assert {"generated", "teacher_forced"} <= measured[name].keys()
    assert measured["edits"] == 3
    assert measured["reliability"]["teacher_forced"] > measured["unedited"]["reliability"]["teacher_forced"]
    assert measured["perplexity"].keys() == {"before", "after"}
    assert measured["portability"]["generated"] is None
    assert [control["name"] for control in measured["controls"]] == ["random content (ft)", "no-op (ft)"]
    assert all({"reliability", "locality", "perplexity"} <= control.keys() for control in measured["controls"])
    assert measured["provenance"]["settings"]["learning_rate"] == 0.01
    arguments = ["evaluate", "--model", model, "--adapter", adapter, "--edits", edits, "--max-new-tokens", "4"]
    shown = words(*arguments)
    assert "random content (ft): locality" in shown
    assert "with no-op (ft):" in shown
    assert "no-op" not in words(*arguments, "--no-controls")
    unedited = run("evaluate", "--model", model, "--edits", edits, "--max-new-tokens", "4")
    assert unedited["locality"]["generated"] == 1.0
    assert unedited["controls"] == []
    assert unedited["provenance"]["settings"] is None


def test_a_collapsed_model_still_gives_its_json(model: str, edits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.model import EditableModel

    monkeypatch.setattr(EditableModel, "perplexity", lambda *_: float("inf"))
    measured = run("evaluate", "--model", model, "--edits", edits, "--max-new-tokens", "4")
    assert measured["perplexity"] == {"before": None, "after": None}


def test_prompts_and_answers_are_shown_as_they_are(model: str, tmp_path: Path) -> None:
    """What looks like rich's markup, or its emoji names, is text."""
    odd = "[INST] hi :smile: [/INST]"
    edit = {"id": "[/x]", "prompt": odd, "target": "[bold]", "locality": [{"prompt": "a [/b]", "kind": "[/kind]"}]}
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps(edit) + "\n", encoding="utf-8")
    adapter = str(tmp_path / "adapter")
    run("edit", "--model", model, "--edits", str(path), "--out", adapter, "--method", "ft", "--set", "steps=2")
    for arguments in (
        ["generate", "--model", model, "--adapter", adapter, "--max-new-tokens", "2", odd],
        ["explain", "--model", model, "--adapter", adapter, odd],
    ):
        assert odd in words(*arguments)
    measured = words(
        "evaluate",
        "--model",
        model,
        "--adapter",
        adapter,
        "--edits",
        str(path),
        "--max-new-tokens",
        "2",
        "--no-controls",
    )
    assert "[/kind]" in measured


def test_edit_goes_on_with_what_is_missing(model: str, edits: str, tmp_path: Path) -> None:
    adapter = str(tmp_path / "adapter")
    first = run("edit", "--model", model, "--edits", edits, "--limit", "2", "--out", adapter, *FT)
    assert (first["edits_applied"], first["edits_held"]) == (2, 2)
    second = run("edit", "--model", model, "--edits", edits, "--out", adapter, "--method", "ft")
    assert (second["edits_applied"], second["edits_held"]) == (1, 3)
    third = run("edit", "--model", model, "--edits", edits, "--out", adapter, *FT)
    assert (third["edits_applied"], third["edits_held"]) == (0, 3)
    error = run(
        "edit", "--model", model, "--edits", edits, "--out", adapter, "--method", "ft", "--set", "steps=3", fails=True
    )
    assert "other settings (steps: there 60, here 3)" in error["error"]["message"]
    # A default, given by name, is no other setting.
    again = run("edit", "--model", model, "--edits", edits, "--out", adapter, "--method", "ft", "--seed", "0")
    assert again["edits_applied"] == 0
    assert again["provenance"]["settings"]["steps"] == 60
    error = run("edit", "--model", model, "--edits", edits, "--out", adapter, "--method", "rome", fails=True)
    assert "holds an adapter of 'ft', which 'rome' cannot go on with" in error["error"]["message"]


def test_what_the_guard_refuses_is_not_written_unless_forced(
    model: str, edits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.editors.guard import Guard

    arguments = ["edit", "--model", model, "--edits", edits, "--out", str(tmp_path / "adapter"), *FT]
    monkeypatch.setattr(Guard, "_of_perplexity", lambda *_: ("collapse", "as this test has it"))
    refused = run(*arguments)
    assert (refused["edits_applied"], refused["edits_refused"], refused["edits_held"]) == (0, 3, 0)
    assert refused["guard"]["verdict"] == "collapse"
    assert refused["guard"]["reasons"] == ["as this test has it"]
    assert (refused["guard"]["collapse"], refused["guard"]["taken_back"]) == (3, 3)
    forced = run(*arguments, "--force")
    assert (forced["edits_applied"], forced["edits_refused"], forced["edits_held"]) == (3, 0, 3)
    assert (forced["guard"]["collapse"], forced["guard"]["taken_back"]) == (3, 0)
    assert forced["provenance"]["settings"]["guard"] == "refuse"
    out = str(tmp_path / "other")
    shown = words("edit", "--model", model, "--edits", edits, "--out", out, *FT)
    assert "guard: of 3 batches 3 collapse, 3 taken back; as this test has it" in shown
    routed = ["--method", "grace", "--set", "steps=2", "--set", "radius=0.3", "--set", "layer=1"]
    assert run("edit", "--model", model, "--edits", edits, "--out", str(tmp_path / "routed"), *routed)["guard"] is None


def test_an_adapter_is_exported_or_it_is_said_why_not(model: str, edits: str, tmp_path: Path) -> None:
    adapter, out = str(tmp_path / "adapter"), str(tmp_path / "out")
    run("edit", "--model", model, "--edits", edits, "--out", adapter, *FT)
    made = run("export", "--adapter", adapter, "--format", "lora", "--rank", "4", "--out", out)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == {*made["files"]}
    assert (made["format"], made["edits"], made["modules"][0]["rank"]) == ("lora", 3, 4)
    assert 0 < made["modules"][0]["relative_error"] < 1
    error = run("export", "--adapter", adapter, "--format", "lora", "--out", out, fails=True)
    assert "is not an empty folder, and nothing is overwritten" in error["error"]["message"]
    shown = words("export", "--adapter", adapter, "--format", "merged", "--out", str(tmp_path / "merged"))
    assert "exported as merged" in shown
    assert "relative error" in shown
    loaded = run("generate", "--model", str(tmp_path / "merged"), "--max-new-tokens", "1", EDITS[0]["prompt"])
    assert loaded["generations"][0]["before"] == "Rome"
    routed = ["--method", "grace", "--set", "steps=2", "--set", "radius=0.3", "--set", "layer=1"]
    run("edit", "--model", model, "--edits", edits, "--out", str(tmp_path / "grace"), *routed)
    arguments = ["--adapter", str(tmp_path / "grace"), "--model", "nowhere", "--format", "merged"]
    error = run("export", *arguments, "--out", str(tmp_path / "none"), fails=True)
    assert "an adapter of 'grace' is no change of weights" in error["error"]["message"]


def test_repeating_an_edit_does_not_bring_superseded_ones_back(model: str, tmp_path: Path) -> None:
    targets = {"x": "Rome", "y": "Berlin", "z": "Oslo"}
    records = [{"id": name, "prompt": "The capital of  France", "target": target} for name, target in targets.items()]
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [EDITS[1], *records]), encoding="utf-8")
    adapter = str(tmp_path / "adapter")
    arguments = ["edit", "--model", model, "--edits", str(path), "--out", adapter, *FT]
    first = run(*arguments)
    assert (first["edits_applied"], first["edits_held"]) == (4, 2)
    second = run(*arguments)
    assert (second["edits_applied"], second["edits_held"]) == (0, 2)
    assert second["memory_version"] == first["memory_version"]
    # An earlier part of the file, alone, is another file: its last word counts.
    earlier = run(*arguments, "--limit", "2")
    assert earlier["edits_applied"] == 1
    # An edit given again with another target is another edit.
    path.write_text(json.dumps({**EDITS[1], "target": "Carol"}) + "\n", encoding="utf-8")
    changed = run(*arguments)
    assert (changed["edits_applied"], changed["edits_held"]) == (1, 2)


def test_generate_shows_before_and_after(model: str, edits: str, tmp_path: Path) -> None:
    adapter = str(tmp_path / "adapter")
    run("edit", "--model", model, "--edits", edits, "--out", adapter, *FT)
    found = run(
        "generate", "--model", model, "--adapter", adapter, "--max-new-tokens", "1", "The capital of France", "x"
    )
    assert [row["prompt"] for row in found["generations"]] == ["The capital of France", "x"]
    assert found["generations"][0]["after"] == "Rome" != found["generations"][0]["before"]
    assert "Rome" in words(
        "generate", "--model", model, "--adapter", adapter, "--max-new-tokens", "1", "The capital of France"
    )


def test_revert_says_how_exact_it_is(model: str, edits: str, tmp_path: Path) -> None:
    adapter = str(tmp_path / "adapter")
    run("edit", "--model", model, "--edits", edits, "--out", adapter, *FT)
    exact = str(tmp_path / "exact")
    shutil.copytree(adapter, exact)
    found = run("revert", "--adapter", adapter, "a")
    assert [(one["edit_id"], one["exactness"]) for one in found["reverted"]] == [("a", "approximate")]
    found = run("revert", "--adapter", exact, "--model", model, "--exact", "a")
    assert [(one["edit_id"], one["exactness"]) for one in found["reverted"]] == [("a", "exact")]
    assert found["edits_held"] == len(Path(exact, "edits.jsonl").read_text().splitlines())
    assert "holds no edit 'a'" in run("revert", "--adapter", exact, "a", fails=True)["error"]["message"]


def test_explain_names_the_edit_and_its_score(model: str, edits: str, tmp_path: Path) -> None:
    adapter = str(tmp_path / "adapter")
    settings = ["--method", "memoir", "--set", "steps=20", "--set", "contexts=1", "--set", "relative_threshold=0.6"]
    run("edit", "--model", model, "--edits", edits, "--out", adapter, *settings)
    found = run("explain", "--model", model, "--adapter", adapter, "The capital of France", "x yz")
    first, second = found["explanations"]
    assert (first["edit_id"], first["fires"], first["edit_target"]) == ("a", True, "Rome")
    assert first["score"] > 0.95
    assert not second["fires"]
    assert "Rome" in words("explain", "--model", model, "--adapter", adapter, "The capital of France")


def test_texts_are_injected_into_a_pool_that_is_gone_on_with(model: str, edits: str, tmp_path: Path) -> None:
    text, out = tmp_path / "notes.txt", tmp_path / "pool"
    text.write_text("Bob wrote Hamlet.\nAnn plays the flute in Rome.\n", encoding="utf-8")
    settings = ["--set", "network=untrained", "--set", "slots=8", "--set", "new=2", "--set", "chunk_tokens=6"]
    arguments = ["inject", "--text", str(text), "--model", model, "--out", str(out)]
    made = run(*arguments, *settings)
    assert (made["texts"], made["slots"], made["new"]) == (2, 8, 2)
    assert made["updates"] == made["updates_in_all"] == made["memory_version"]
    assert 2 < made["updates"] < made["tokens"]
    assert run(*arguments)["updates_in_all"] == 2 * made["updates"]
    said = words(*arguments)
    assert f"{3 * made['updates']} updates in all" in said
    assert "each update replaces 2 of 8 slots per layer" in said
    run("edit", "--edits", edits, "--model", model, "--out", str(out), "--method", "memoryllm")
    found = run("explain", "--adapter", str(out), "Bob wrote Hamlet")["explanations"][0]
    assert found["by_age"][0][0] == 0
    assert found["mean_age"] > 0
    assert "updates ago, on average" in words("explain", "--adapter", str(out), "Bob wrote Hamlet")
    assert run("revert", "--adapter", str(out), "c")["reverted"][0]["exactness"] == "approximate"
    refused = run("revert", "--adapter", str(out), "a", "--exact", fails=True)
    assert "6 texts were injected" in refused["error"]["message"]
    changed = run(*arguments, "--set", "new=3", fails=True)
    assert "other settings (new: there 2, here 3)" in changed["error"]["message"]


def test_compare_prints_rows_and_resumes(model: str, edits: str, tmp_path: Path) -> None:
    out = str(tmp_path / "compare")
    arguments = ["compare", "--model", model, "--methods", "ft", "--edits", edits, "--checkpoints", "1,3", "--out", out]
    arguments += ["--set", "ft.learning_rate=0.01", "--set", "ft.steps=40", "--max-new-tokens", "3", "--no-controls"]
    found = run(*arguments)
    rows = found["rows"]
    assert found["provenance"]["settings"]["ft"]["steps"] == 40
    assert [(row["method"], row["edits"]) for row in rows] == [("unedited", 1), ("unedited", 3), ("ft", 1), ("ft", 3)]
    wanted = {"method", "edits", "reliability", "generalization", "locality", "perplexity", "seconds_per_edit"}
    assert all(wanted <= row.keys() for row in rows)
    assert run(*arguments)["rows"] == rows
    assert found["horizons"].keys() == {"ft"}
    assert "until reliability falls under 0.8: ft" in words(*arguments)
    assert "comparison.png" in words(*arguments)
    assert run(*arguments, "--checkpoints", "1,3,9")["notes"] == ["there are 3 edits: asked at 3 instead of 9"]


def test_methods_and_doctor_describe(model: str) -> None:
    listed = run("methods")["methods"]
    assert {"ft", "memoir", "rome"} <= {row["name"] for row in listed}
    assert all(row["settings"] and row["paper"] for row in listed)
    found = run("doctor", model)
    assert found["anatomy"]["mlp_output"] == "model.layers.0.mlp.down_proj"
    assert all(method["can"] for method in found["methods"].values())
    assert "down_proj" in words("doctor", model)


def test_doctor_traces_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.atlas.edits import world_edits
    from errata.model import trace

    monkeypatch.setattr(trace, "TracePlan", partial(trace.TracePlan, samples=1))
    figure, data = tmp_path / "trace.png", tmp_path / "facts.jsonl"
    found = run("doctor", "atlas", "--trace", "--facts", "2", "--figure", str(figure))["trace"]
    assert (found["asked"], found["known"], found["layer"]) == (2, 2, 0)
    assert figure.stat().st_size > 10_000
    fact = world_edits(2)[1]
    data.write_text(json.dumps({**fact.to_record(), "ground_truth": fact.ground_truth}), encoding="utf-8")
    shown = words("doctor", "atlas", "--trace", "--data", str(data))
    assert "1 facts (of 1 asked)" in shown
    assert "MLPs look subjects up in layer" in shown
    assert run("doctor", "atlas")["trace"] is None
    assert "add --trace" in run("doctor", "atlas", "--figure", str(figure), fails=True)["error"]["message"]


def test_doctor_explains_a_model_it_cannot_take(tmp_path: Path) -> None:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    error = run("doctor", str(tmp_path), fails=True)["error"]
    assert error["type"] == "AnatomyError"
    assert "mlp.experts" in error["message"]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["edit", "--edits", "nothing.jsonl"], "FormatError", "does not exist"),
        (["edit", "--edits", "{edits}", "--method", "memor"], "ConfigError", "Did you mean 'memoir'"),
        (
            ["edit", "--edits", "{edits}", "--model", "{model}", "--method", "ft", "--set", "step=3"],
            "ConfigError",
            "'steps'",
        ),
        (["edit", "--edits", "{edits}", "--set", "steps"], "ConfigError", "--set name=value"),
        (["edit", "--edits", "{edits}", "--model", "no/such/model"], "ArtifactError", "cannot load 'no/such/model'"),
        (
            ["evaluate", "--edits", "{edits}", "--model", "{model}", "--adapter", "nowhere"],
            "ArtifactError",
            "holds no adapter",
        ),
        (
            ["evaluate", "--edits", "{edits}", "--model", "{model}", "--text", "nowhere"],
            "ConfigError",
            "cannot be read",
        ),
        (["compare", "--methods", "ft,rom"], "ConfigError", "Did you mean 'rome'"),
        (["compare", "--checkpoints", "1,many"], "ConfigError", "whole numbers"),
        (["compare", "--checkpoints", "0,10"], "ConfigError", "from 1 up"),
        (["compare", "--checkpoints", ""], "ConfigError", "from 1 up"),
        (["compare", "--model", "{model}"], "ConfigError", "only atlas brings its own"),
        (["compare", "--model", "atlas_x"], "ConfigError", "only atlas brings its own"),
        (["compare", "--methods", ""], "ConfigError", "there are alphaedit, emmet"),
        (["compare", "--methods", "", "--set", "x.y=1"], "ConfigError", "there are alphaedit, emmet"),
        (["compare", "--out", "{edits}"], "ConfigError", "is a file"),
        (["edit", "--edits", "{edits}", "--model", "no/such/model", "--out", "{edits}"], "ConfigError", "is a file"),
        (["edit", "--edits", "{edits}", "--model", "no/such/model", "--out", "{edits}/x"], "ConfigError", "is a file"),
        (["demo", "--out", "{edits}"], "ConfigError", "is a file"),
        (["atlas", "train", "--out", "{edits}"], "ConfigError", "is a file"),
        (["atlas", "train", "--minutes", "0", "--out", "{out}"], "ConfigError", "more than 0"),
        (["atlas", "train", "--steps", "0", "--out", "{out}"], "ConfigError", "at least 1"),
        (["atlas", "train", "--instruct", "--steps", "0", "--out", "{out}"], "ConfigError", "at least 1"),
        (
            [
                "edit",
                "--edits",
                "{edits}",
                "--model",
                "{model}",
                "--method",
                "ft",
                "--set",
                "steps=abc",
                "--out",
                "{out}",
            ],
            "ConfigError",
            "setting steps is 'abc'; expected a whole number",
        ),
        (["doctor", "{model}", "--device", "foo"], "ConfigError", "unknown device 'foo'"),
        (["doctor", "{model}", "--dtype", "float23"], "ConfigError", "Did you mean 'float32'"),
        (["bench", "tial"], "ConfigError", "Did you mean 'tail'"),
        (["demo", "--edits", "0"], "ConfigError", "at least 1"),
        (["demo", "--edits", "100000"], "ConfigError", "ask for 1 to 20000"),
        (["atlas", "train", "--size", "huge"], "ConfigError", "small, base, large"),
        (["atlas", "train", "--steps", "3", "--minutes", "1"], "ConfigError", "not both"),
        (["atlas", "info", "--checkpoint", "nowhere"], "ArtifactError", "holds no finished atlas"),
        (["explain", "--adapter", "nowhere", "x"], "ArtifactError", "holds no adapter"),
    ],
)
def test_bad_input_gets_one_clear_error(
    model: str, edits: str, tmp_path: Path, arguments: list[str], kind: str, message: str
) -> None:
    out = str(tmp_path / "out")
    error = run(*(a.format(model=model, edits=edits, out=out) for a in arguments), fails=True)["error"]
    assert error["type"] == kind
    assert message in error["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "--edits", "{edits}", "--limit", "0"], "'--limit'"),
        (["edit", "--edits", "{edits}", "--batch-size", "0"], "'--batch-size'"),
        (["edit"], "'--edits'"),
        (["evaluate", "--nonsense"], "No such option: --nonsense"),
        (["nonsense"], "No such command 'nonsense'"),
        ([], "No such option: --json"),
    ],
)
def test_a_command_line_that_is_not_understood_gets_its_object_too(
    edits: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = [a.format(edits=edits) for a in arguments]
    with pytest.raises(SystemExit, match="2"):
        main([*given, "--json"])
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    error = json.loads(shown.out)["error"]
    assert error["type"] == "UsageError"
    assert message in error["message"]
    assert "--help" in shown.err
    if given:
        with pytest.raises(SystemExit, match="2"):
            main([*given, "--", "--json"])
        assert capsys.readouterr().out == ""


def test_commands_leave_with_their_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    with pytest.raises(SystemExit) as left:
        main(["methods", "--json"])
    assert not left.value.code
    with pytest.raises(SystemExit, match="1"):
        main(["bench", "tial", "--json"])
    capsys.readouterr()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("errata.cli.measuring.compare", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["compare", "--json"])
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["type"] == "Interrupted"
    assert "finished rows are kept" in shown.err


def test_a_folder_that_cannot_be_written_is_named(model: str, edits: str, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    (out / "adapter_model.safetensors").mkdir(parents=True)
    error = run("edit", "--model", model, "--edits", edits, "--out", str(out), *FT, fails=True)["error"]
    assert error["type"] == "ArtifactError"
    assert str(out) in error["message"]
    folder = tmp_path / "compare"
    (folder / "comparison.json").mkdir(parents=True)
    error = run("compare", "--model", model, "--edits", edits, "--methods", "ft", "--out", str(folder), fails=True)
    assert error["error"]["type"] == "ArtifactError"
    assert str(folder) in error["error"]["message"]


def test_compare_takes_no_more_of_atlas_than_its_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from errata.errors import ConfigError

    def asked_for(count: int, seed: int) -> None:
        raise ConfigError(f"{count} asked for")

    monkeypatch.setattr("errata.atlas.edits.world_edits", asked_for)
    arguments = ["compare", "--checkpoints", "1,100", "--out", str(tmp_path)]
    assert run(*arguments, "--limit", "7", fails=True)["error"]["message"] == "7 asked for"
    assert run(*arguments, fails=True)["error"]["message"] == "100 asked for"


def test_bad_lines_are_reported_counted_and_skipped(model: str, tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps(EDITS[0]) + '\n{"prompt": "x"}\nnot json\n', encoding="utf-8")
    arguments = ["edit", "--model", model, "--edits", str(path), "--out", str(tmp_path / "out"), *FT]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    made = json.loads(result.stdout)
    assert (made["edits_applied"], made["records_left_out"]) == (1, 2)
    assert "edits.jsonl:2: field 'target': is missing" in result.stderr
    strict = run(*arguments, "--strict", fails=True)["error"]
    assert "edits.jsonl:2" in strict["message"]


def test_an_edit_that_cannot_be_written_is_refused_and_the_rest_goes_on(model: str, tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    nameless = {"prompt": "It was", "target": "Rome"}
    path.write_text("".join(json.dumps(e) + "\n" for e in (nameless, EDITS[0])), encoding="utf-8")
    settings = ["--method", "rome", "--set", "tokens_per_width=4", "--set", "contexts=0", "--set", "steps=30"]
    made = run("edit", "--model", model, "--edits", str(path), "--out", str(tmp_path / "out"), *settings)
    assert (made["edits_applied"], made["edits_refused"]) == (1, 1)


def test_help_answers_at_once_and_loads_nothing_heavy() -> None:
    code = "import sys, errata.cli.app; print(*sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert loaded == ""
    began = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-m", "errata", "--help"], capture_output=True, text=True, check=True
    ).stdout
    # Far above the half second it takes at most, so that a busy machine does not fail the test.
    assert time.monotonic() - began < 10
    for command in (
        "demo",
        "edit",
        "evaluate",
        "compare",
        "generate",
        "explain",
        "revert",
        "methods",
        "bench",
        "doctor",
        "atlas",
    ):
        assert command in shown


def test_the_demo_runs_from_one_line(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    arguments = [
        "demo",
        "--edits",
        "4",
        "--out",
        str(out),
        "--set",
        "steps=15",
        "--set",
        "contexts=2",
        "--set",
        "relative_threshold=0.5",
    ]
    found = run(*arguments)
    wanted = {
        "method",
        "edits",
        "seconds_per_edit",
        "reliability",
        "generalization",
        "locality",
        "perplexity",
        "report",
    }
    assert wanted <= found.keys()
    assert (found["method"], found["edits"]) == ("memoir", 4)
    for name in ("reliability", "generalization", "locality"):
        assert {"generated", "teacher_forced"} <= found[name].keys()
    assert found["perplexity"].keys() == {"before", "after"}
    assert Path(found["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [control["name"] for control in found["controls"]] == ["random content (memoir)", "no-op (memoir)"]
    assert found["prepare_seconds"] > 0, "the background mean and the threshold are computed before the first edit"
    assert found["provenance"]["settings"]["steps"] == 15
    shown = words("generate", "--adapter", found["adapter"], "The capital of France is")
    assert "Paris" in shown


def test_the_live_table_counts_every_edit_of_a_batch() -> None:
    from rich.console import Console

    from errata.cli.demo import _LiveTable
    from errata.edit import Edit
    from errata.editors import AppliedEdit, EditOutcome, RefusedEdit

    class Asked:
        def base_answer(self, prompt: str) -> str:
            return "[/red] it was"

    edits = [Edit(id=str(n), prompt=f"[/INST] {n}", target=f"[{n}]") for n in range(5)]
    table = _LiveTable(edits, Asked())  # type: ignore[arg-type]
    written = [AppliedEdit(str(n), took, 0.0, 1.0) for n, took in enumerate([True, False, True])]
    table.show(3, EditOutcome(applied=written))
    table.show(5, last := EditOutcome(applied=[AppliedEdit("3", True, 0.0, 1.0)], refused=[RefusedEdit("4", "why")]))
    assert table.took == 3
    console = Console(width=200)
    with console.capture() as caught:
        console.print(table.table(5, last))
    shown = caught.get()
    for text in ("5 of 5 edits, 3 took", "[/INST] 0", "[/red] it was", "[0] took", "[1] not yet", "[4] refused"):
        assert text in shown


def test_atlas_info_prints_what_was_recorded() -> None:
    found = run("atlas", "info", "--recorded")
    assert found["taught"] >= 0.98
    assert found["untaught"] >= 0.90
    assert len(found["capabilities"]) == 6
    assert found["prose_perplexity"] > 1
    assert "professional" in words("atlas", "info", "--recorded")


def test_the_tail_benchmark_has_its_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errata.benchmarks.tail._EDITS", 1)
    monkeypatch.setattr("errata.benchmarks.tail._STEPS", 2)
    found = run("bench", "tail")
    assert found["name"] == "tail"
    assert found["ratios"].keys() == {"tail_vs_full", "tail_vs_full_24"}
    # Changes are kept in bfloat16, in which a last place is a few thousandths of an entry.
    assert all(row["largest_difference_of_logits"] < 2e-3 for row in found["rows"])
