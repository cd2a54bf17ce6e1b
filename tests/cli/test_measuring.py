"""What `evaluate` and `compare` measure when asked for more than the four properties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata.cli.app import app
from errata.testing import byte_tokenizer, tiny_hf_model

EDITS = [
    {
        "id": "a",
        "prompt": "The capital of France",
        "target": "Rome",
        "subject": "France",
        "locality": [{"prompt": "The capital of Spain", "kind": "same_relation"}],
        "portability": [
            {"prompt": f"{text} France", "answer": "Rome", "kind": "multi_hop", "group": "q"} for text in ("In", "Of")
        ],
    },
    {"id": "b", "prompt": "Bob wrote Hamlet", "target": "Alice", "subject": "Hamlet", "locality": ["Ann wrote Emma"]},
    {"id": "c", "prompt": "The flute of Ann", "target": "piano", "subject": "Ann"},
]
FT = ["--method", "ft", "--set", "learning_rate=0.01", "--set", "steps=60"]


def run(*arguments: str, fails: bool = False) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == (1 if fails else 0), result.output
    return json.loads(result.stdout)


def words(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, edits and an adapter that holds them."""
    folder = tmp_path_factory.mktemp("place")
    tiny_hf_model("llama").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in EDITS), encoding="utf-8")
    run(
        "edit",
        "--model",
        str(folder / "model"),
        "--edits",
        str(folder / "edits.jsonl"),
        "--out",
        str(folder / "a"),
        *FT,
    )
    return folder


def evaluated(place: Path) -> list[str]:
    options = {"--model": "model", "--adapter": "a", "--edits": "edits.jsonl"}
    given = [part for name, value in options.items() for part in (name, str(place / value))]
    return ["evaluate", *given, "--max-new-tokens", "4", "--no-controls"]


def test_evaluate_measures_divergence_and_free_text_when_asked(place: Path) -> None:
    plain = run(*evaluated(place))
    assert (plain["kl"], plain["free_text"]) == (None, None)
    assert plain["reliability"]["wilson_interval"] is not None
    assert 0 <= plain["reliability"]["f1"] <= 1
    assert plain["portability_by_kind"]["multi_hop"]["edits"] == plain["portability_any_of"]["multi_hop"]["edits"] == 1
    references = place / "references.jsonl"
    references.write_text('{"object": "Alice", "text": "Alice wrote to Bob"}\n', encoding="utf-8")
    asked = [*evaluated(place), "--kl", "--fluency", "--references", str(references)]
    more = run(*asked)
    assert more["kl"]["locality"] > 0
    assert more["kl"]["locality_by_kind"].keys() == {"same_relation"}
    assert more["kl"]["text"] > 0
    free = more["free_text"]
    assert free.keys() == {"before", "after"}
    assert free["before"] != free["after"]
    assert (free["after"]["fluency"]["edits"], free["after"]["consistency"]["edits"]) == (3, 1)
    assert {name: more[name] for name in ("reliability", "locality")} == {
        name: plain[name] for name in ("reliability", "locality")
    }
    shown = words(*asked)
    for part in (
        "portability: multi_hop, any wording",
        "KL(base ‖ edited)",
        "100 tokens written freely, after: fluency",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--references", "x"], "give --fluency too"),
        (["--fluency", "--references", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_options_that_need_others_say_so(place: Path, more: list[str], message: str) -> None:
    error = run(*evaluated(place), *more, fails=True)["error"]
    assert message in error["message"]


def test_divergence_needs_an_adapter(place: Path) -> None:
    edits, model = str(place / "edits.jsonl"), str(place / "model")
    error = run("evaluate", "--edits", edits, "--model", model, "--kl", fails=True)["error"]
    assert "give --adapter" in error["message"]


def test_compare_reports_drift_collapse_and_the_test_it_used(place: Path, tmp_path: Path) -> None:
    arguments = ["compare", "--model", str(place / "model"), "--edits", str(place / "edits.jsonl"), "--no-controls"]
    arguments += ["--methods", "ft,ft@still", "--checkpoints", "1,3", "--out", str(tmp_path), "--max-new-tokens", "3"]
    arguments += ["--set", "ft.learning_rate=0.01", "--set", "ft@still.steps=1"]
    found = run(*arguments)
    assert found["locality_drift"].keys() == {"ft", "ft@still"}
    assert found["collapse_point"].keys() == {"ft", "ft@still"}
    assert {pair["test"] for pairs in found["differences"].values() for pair in pairs} == {"mcnemar"}
    assert "locality lost per hundred edits: ft" in words(*arguments)


def compared(place: Path, out: Path, *more: str) -> list[str]:
    given = ["compare", "--model", str(place / "model"), "--edits", str(place / "edits.jsonl"), "--no-controls"]
    given += ["--methods", "ft", "--checkpoints", "1,3", "--out", str(out), "--set", "ft.learning_rate=0.01"]
    return [*given, *(() if "--max-new-tokens" in more else ("--max-new-tokens", "3")), *more]


def test_compare_runs_several_orders(place: Path, tmp_path: Path) -> None:
    found = run(*compared(place, tmp_path / "orders", "--order-seeds", "0,4"))
    assert {row["made"]["order_seed"] for row in found["rows"]} == {0, 4}
    assert [(row["method"], row["edits"]) for row in found["means"]] == [
        ("unedited", 1),
        ("unedited", 3),
        ("ft", 1),
        ("ft", 3),
    ]
    assert found["orders"].keys() == {"0", "4"}
    assert found["orders"]["4"]["horizons"].keys() == {"ft"}
    assert Path(found["figure"]).stat().st_size > 10_000
    shown = words(*compared(place, tmp_path / "orders", "--order-seeds", "0,4"))
    assert "means over 2 orders" in shown
    assert " ± " in shown
    error = run(*compared(place, tmp_path / "orders", "--order-seeds", "0,x"), fails=True)["error"]
    assert "whole numbers from 0 up" in error["message"]


def test_table_joins_folders_and_refuses_what_was_made_otherwise(place: Path, tmp_path: Path) -> None:
    one, other, third = (tmp_path / name for name in ("one", "other", "third"))
    run(*compared(place, one))
    run(*compared(place, other, "--set", "ft.steps=1"))
    run(*compared(place, third, "--max-new-tokens", "4"))
    figure = tmp_path / "table.png"
    found = run("table", str(one), str(other), "--figure", str(figure))
    assert {row["method"] for row in found["rows"]} == {"unedited", "ft (one)", "ft (other)"}
    assert figure.stat().st_size > 10_000
    error = run("table", str(one), str(third), fails=True)["error"]
    assert error["type"] == "ConfigError"
    assert "max_new_tokens is 3" in error["message"]
    assert "not alike: max new tokens: 3 in" in words("table", str(one), str(third), "--allow-mixed")


def test_evaluate_has_a_judge_read_the_answers(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.evaluation.judge import Judge, Reply

    keys: list[str | None] = []

    def reply(self: Judge, question: Any) -> Reply:
        keys.append(self._key)
        return Reply("CORRECT", True, None) if question.prompt.startswith("The") else Reply("hm", None, "no verdict")

    monkeypatch.setattr(Judge, "_reply", reply)
    monkeypatch.setenv("ERRATA_JUDGE_KEY", "secret")
    log = tmp_path / "judge.jsonl"
    asked = [*evaluated(place), "--judge", "http://localhost:1/v1", "--judge-model", "grader", "--judge-log", str(log)]
    found = run(*asked)["judge"]
    assert (found["reliability"]["correct"], found["reliability"]["edits"]) == (1.0, 2)
    assert found["failures"] == {"no verdict": 3}
    assert set(keys) == {"secret"}
    assert "secret" not in log.read_text("utf-8")
    shown = words(*asked)
    assert "called correct by the judge grader: reliability 1.000" in shown
    assert "no verdict: 3 × no verdict; the same command asks these again" in shown
    assert "--judge-model NAME" in run(*asked[:-4], fails=True)["error"]["message"]


def test_compare_writes_a_page_and_table_writes_files(place: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    found = run(*compared(place, one))
    page = Path(found["page"]).read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    for told in ("edits until reliability falls under 0.8: ft", "A few edits, and what was said after 3", "ft.steps"):
        assert told in page, told
    for name, part in (("t.tex", r"\toprule"), ("t.md", "| method | edits |")):
        assert run("table", str(one), "--out", str(tmp_path / name))["table"] == str(tmp_path / name)
        assert part in (tmp_path / name).read_text(encoding="utf-8")
    error = run("table", str(one), "--out", str(tmp_path / "t.csv"), fails=True)["error"]
    assert "must end with .md or .tex" in error["message"]


def test_damage_writes_a_page_when_asked(place: Path, tmp_path: Path) -> None:
    given = ["damage", "--model", str(place / "model"), "--adapter", str(place / "a"), "--tasks", "none"]
    found = run(*given, "--report", str(tmp_path / "d.html"))
    assert found["report"] == str(tmp_path / "d.html")
    assert "What 3 edits of ft damaged" in (tmp_path / "d.html").read_text(encoding="utf-8")
    error = run(*given, "--report", str(tmp_path / "d.pdf"), fails=True)["error"]
    assert "must end with .html" in error["message"]
