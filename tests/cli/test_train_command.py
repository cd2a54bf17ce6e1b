"""`errata train`: one JSON object, a folder that can be gone on with, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata.cli.app import app
from errata.testing import byte_tokenizer, tiny_hf_model

NAMES = ("Ann", "Bob", "Zed", "Emma", "Alice", "Spain")
QUICK = [
    f"--set={pair}" for pair in ("rank=2", "steps=2", "validate_every=1", "statistics=2", "layers=[-1]", "batch_size=2")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_hf_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def edits(tmp_path: Path) -> str:
    path = tmp_path / "edits.jsonl"
    records = [
        {"prompt": f"The flute of {name}", "target": "Rome", "subject": name, "locality": ["Who wrote Hamlet?"]}
        for name in NAMES
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def run(*arguments: str, fails: bool = False) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == (1 if fails else 0), result.output
    assert result.stdout.count("\n") == 1, result.stdout
    return json.loads(result.stdout)


def test_what_is_trained_edits(model: str, edits: str, tmp_path: Path) -> None:
    out = str(tmp_path / "trained")
    arguments = ["train", "mend", "--model", model, "--edits", edits, "--out", out, *QUICK]
    record = run(*arguments)
    assert (record["method"], record["steps"], record["finished"]) == ("mend", 2, True)
    assert record["data"] == {"source": edits, "training": 5, "validation": 1}
    assert {"loss", "edited", "kept"} <= record["validation"].keys()
    made = run(
        "edit", "--model", model, "--edits", edits, "--method", "mend", "--set", f"network={out}",
        "--set", "guard=warn", "--out", str(tmp_path / "adapter"),
    )  # fmt: skip
    assert made["edits_applied"] == len(NAMES)
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0
    assert "2 steps in" in said.stdout
    assert f"--set network={out}" in said.stdout
    assert "another plan" in run(*arguments, "--seed", "3", fails=True)["error"]["message"]


def test_time_that_is_over_is_said(model: str, edits: str, tmp_path: Path) -> None:
    arguments = ["train", "mend", "--model", model, "--edits", edits, "--out", str(tmp_path / "trained"), *QUICK]
    said = CliRunner().invoke(app, [*arguments, "--minutes", "0.00001"])
    assert "the same command, with more --minutes, goes on" in said.stdout
    assert run(*arguments)["finished"]


def test_a_retriever_is_trained_on_top_of_a_network_and_then_found(model: str, edits: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text(
        "\n\n".join(f"{name} was born in {city}, in a house." for name in NAMES for city in ("Rome", "York"))
    )
    first, second, out = (str(tmp_path / name) for name in ("first", "second", "adapter"))
    settings = ("batch_size=4", "warm=1", "others=0", "steps=2", "validation=4", "validate_every=1", "half=false")
    quick = ["--texts", str(texts), *(f"--set={pair}" for pair in settings)]
    run("train", "memoryllm", "--model", model, "--out", first, "--set=slots=4", "--set=new=2", "--set=rank=2", *quick)
    arguments = ["train", "memoryllm", "--model", model, "--out", second, f"--set=retriever_of={first}", *quick]
    record = run(*arguments)
    assert {"loss", "recall", "chance"} <= record["validation"].keys()
    assert (record["slots"], record["new"], record["retrieved"], record["finished"]) == (4, 2, 1, True)
    own = ["--set", f"network={second}", "--set", "long_term=20"]
    run("edit", "--model", model, "--edits", edits, "--method", "memoryllm", *own, "--out", out)
    (found,) = run("explain", "--adapter", out, "The flute of Ann")["explanations"]
    assert 0 < found["retrieved"] < found["memory"]
    said = CliRunner().invoke(app, ["explain", "--adapter", out, "The flute of Ann"]).stdout
    assert "comes from the long-term store, written" in said
    refused = run("edit", "--model", model, "--edits", edits, "--method", "memoryllm", "--set", f"network={first}",
                  "--set", "long_term=20", "--out", str(tmp_path / "no"), fails=True)  # fmt: skip
    assert f"--set retriever_of={first}" in refused["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ft"], "ft needs no training; methods that do: memoryllm, mend"),
        (["mendd"], "Did you mean 'mend'"),
        (["mend", "--limit", "5"], "--limit belongs to --edits"),
        (["mend", "--set", "ranks=3"], "Did you mean 'rank'"),
    ],
)
def test_what_cannot_be_trained_is_said(arguments: list[str], message: str, model: str, tmp_path: Path) -> None:
    found = run("train", *arguments, "--model", model, "--out", str(tmp_path / "out"), fails=True)
    assert message in found["error"]["message"]
    assert not (tmp_path / "out").exists()
