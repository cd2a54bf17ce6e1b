"""The commands: exactly one JSON object on standard output, clear errors, work that can be gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata.cli.app import app
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
    result = CliRunner().invoke(app, list(arguments))
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
    unedited = run("evaluate", "--model", model, "--edits", edits, "--max-new-tokens", "4")
    assert unedited["locality"]["generated"] == 1.0


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
    assert "other settings" in error["error"]["message"]


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


def test_compare_prints_rows_and_resumes(model: str, edits: str, tmp_path: Path) -> None:
    out = str(tmp_path / "compare")
    arguments = ["compare", "--model", model, "--methods", "ft", "--edits", edits, "--checkpoints", "1,3", "--out", out]
    arguments += ["--set", "ft.learning_rate=0.01", "--set", "ft.steps=40", "--max-new-tokens", "3", "--no-controls"]
    rows = run(*arguments)["rows"]
    assert [(row["method"], row["edits"]) for row in rows] == [("unedited", 1), ("unedited", 3), ("ft", 1), ("ft", 3)]
    wanted = {"method", "edits", "reliability", "generalization", "locality", "perplexity", "seconds_per_edit"}
    assert all(wanted <= row.keys() for row in rows)
    assert run(*arguments)["rows"] == rows
    assert "comparison.png" in words(*arguments)


def test_methods_and_doctor_describe(model: str) -> None:
    listed = run("methods")["methods"]
    assert {"ft", "memoir", "rome"} <= {row["name"] for row in listed}
    assert all(row["settings"] and row["paper"] for row in listed)
    found = run("doctor", model)
    assert found["anatomy"]["mlp_output"] == "model.layers.0.mlp.down_proj"
    assert all(method["can"] for method in found["methods"].values())
    assert "down_proj" in words("doctor", model)


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
        (["compare", "--model", "{model}"], "ConfigError", "only atlas brings its own"),
        (["bench", "tial"], "ConfigError", "Did you mean 'tail'"),
        (["demo", "--edits", "0"], "ConfigError", "at least 1"),
        (["demo", "--edits", "100000"], "ConfigError", "cannot be edited"),
        (["atlas", "train", "--size", "huge"], "ConfigError", "small, base, large"),
        (["atlas", "train", "--steps", "3", "--minutes", "1"], "ConfigError", "not both"),
        (["atlas", "info", "--checkpoint", "nowhere"], "ArtifactError", "holds no finished atlas"),
        (["explain", "--adapter", "nowhere", "x"], "ArtifactError", "holds no adapter"),
    ],
)
def test_bad_input_gets_one_clear_error(model: str, edits: str, arguments: list[str], kind: str, message: str) -> None:
    error = run(*(a.format(model=model, edits=edits) for a in arguments), fails=True)["error"]
    assert error["type"] == kind
    assert message in error["message"]


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
    shown = words("generate", "--adapter", found["adapter"], "The capital of France is")
    assert "Paris" in shown


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
    assert all(row["largest_difference_of_logits"] < 1e-4 for row in found["rows"])
