"""lm-evaluation-harness on live models: plain numbers where nothing is edited, the same in any batch where something is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata.cli.app import app
from errata.edit import Edit
from errata.editors import editor
from errata.errors import ConfigError
from errata.evaluation import harness
from errata.evaluation.damage import measure_damage
from errata.evaluation.harness import ATLAS_TASKS, TaskScore, harness_model, run_tasks
from errata.model import EditableModel
from errata.testing import tiny_model

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval")
# The harness and what it imports warn of much that is none of our business.
pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome of Spain", "the flute"], "answer": 0},
    {"question": "Ann plays the", "choices": ["piano", "flute"], "answer": 1},
    {"question": "Who wrote Hamlet? Was it Bob or Ann?", "choices": ["Bob", "Ann of Berlin"], "answer": 1},
    {"question": "Bob", "choices": ["was born in Berlin", "Zed"], "answer": 0},
]


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task of questions with choices, as a user would write it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), encoding="utf-8")
    (tmp_path / "own_choices.yaml").write_text(
        f"""task: own_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "questions.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 2.0
""",
        encoding="utf-8",
    )
    return tmp_path


def plain(model: EditableModel, task: str, include: Path, limit: int | None = None) -> dict[str, float]:
    """What the harness says by itself."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found: Any = simple_evaluate(
        model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=4),
        tasks=[task],
        limit=limit,
        task_manager=TaskManager(include_path=str(include)),
        bootstrap_iters=0,
    )
    return {
        name.partition(",")[0]: value
        for name, value in found["results"][task].items()
        if "," in name and "stderr" not in name
    }


@needs_harness
def test_numbers_of_the_unedited_model_are_those_of_the_plain_harness(own_tasks: Path) -> None:
    model = EditableModel.load("atlas")
    tasks = Path(harness._OWN_TASKS)
    ours = run_tasks(model, ["atlas_code", "own_choices"], include=own_tasks, limit=12)
    assert ours["atlas_code"].metrics == plain(model, "atlas_code", tasks, 12)
    assert ours["own_choices"].metrics == plain(model, "own_choices", own_tasks)
    assert (ours["own_choices"].metric, ours["own_choices"].version) == ("acc", "2.0")
    assert ours["atlas_code"].metrics["exact"] == sum(ours["atlas_code"].items) / 12 > 0.5


@needs_harness
def test_an_edited_model_scores_alike_in_any_batch() -> None:
    model = tiny_model("llama")
    memoir = editor("memoir", model, layer=1, steps=50, learning_rate=5.0, contexts=1, relative_threshold=0.6)
    memoir.edit([Edit(prompt=q["question"], target=q["choices"][-1]) for q in QUESTIONS[:3]])
    asked = [(q["question"], " " + choice) for q in QUESTIONS for choice in q["choices"]]

    def likelihoods(batch_size: int) -> list[tuple[float, bool]]:
        live = harness_model(model, batch_size)
        pairs = [(pair, *live._encode_pair(*pair)) for pair in asked]
        return list(live._loglikelihood_tokens(pairs))

    alone, together = likelihoods(1), likelihoods(8)
    assert [greedy for _, greedy in alone] == [greedy for _, greedy in together]
    assert [value for value, _ in alone] == pytest.approx([value for value, _ in together], abs=1e-4)
    with memoir.adapter.detached():
        base = likelihoods(8)
    # The memory acts on the edited questions, and on nothing else.
    moved = [abs(now - then) > 0.5 for (now, _), (then, _) in zip(together, base, strict=True)]
    assert any(moved)
    assert not any(moved[-2:])
    # Whatever else is in the batch: one pair at a time, as scored by errata itself.
    live = harness_model(model, 8)
    for pair, (value, _) in zip(asked, together, strict=True):
        ((single, _),) = live._loglikelihood_tokens([(pair, *live._encode_pair(*pair))])
        assert single == pytest.approx(value, abs=1e-4)


@needs_harness
def test_a_task_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="no task 'atlas_raeding'; atlas's are atlas_code"):
        run_tasks(tiny_model("llama"), ["atlas_raeding"])
    with pytest.raises(ConfigError, match="decoders only"):
        harness_model(tiny_model("t5"))


def test_without_the_harness_the_next_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'errata"):
        harness_model(tiny_model("llama"))


def test_atlas_has_six_tasks() -> None:
    from errata.atlas.capabilities import CAPABILITIES

    assert {f"atlas_{name}" for name in CAPABILITIES} == set(ATLAS_TASKS)


def test_damage_is_paired_over_items(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    tuned = editor("ft", model, layers=(1,), learning_rate=1e-2, steps=20)
    tuned.edit([Edit(prompt="Ann plays the", target="flute")])
    scores = {False: (1.0, 1.0, 1.0, 0.0), True: (0.0, 1.0, 0.0, 0.0)}  # with the adapter: two of three are lost

    def run(of: EditableModel, tasks: list[str], **_: Any) -> dict[str, TaskScore]:
        items = scores[tuned.adapter.is_attached]
        return {task: TaskScore({"acc": sum(items) / 4}, "acc", items, "1") for task in tasks}

    monkeypatch.setattr("errata.evaluation.damage.run_tasks", run)
    found = measure_damage(tuned.adapter, ["one", "two"], {"prose": ["The capital of Spain", "Ann was born in Berlin"]})
    first = found.tasks[0]
    assert (first.before, first.after, first.change, first.drop) == (0.75, 0.25, -0.5, pytest.approx(2 / 3))
    assert first.p == 2 * 0.5  # two of four sign patterns, two tasks
    assert found.edits == 1
    assert found.fires == {}
    before, after = found.perplexity["prose"]
    assert before != after
    assert found.layers[0]["similarity"] < 1.0
    assert tuned.adapter.is_attached


def test_a_memory_says_how_often_it_acts() -> None:
    model = tiny_model("llama")
    memoir = editor("memoir", model, layer=1, steps=20, contexts=1, relative_threshold=0.6)
    memoir.edit([Edit(prompt="The capital of France is", target="Rome")])
    found = measure_damage(memoir.adapter, [], {"own": ["The capital of France is"], "other": ["Zed", "Who?"]})
    assert found.fires == {"own": 1.0, "other": 0.0}
    assert found.layers[0]["similarity"] is None
    assert found.to_record()["tasks"] == []


@needs_harness
def test_the_command(tmp_path: Path) -> None:
    model = EditableModel.load("atlas")
    tuned = editor("ft", model, steps=3)
    tuned.edit([Edit(prompt="The capital of France is", target="Rome", subject="France")])
    tuned.adapter.save_pretrained(tmp_path / "adapter")
    text = tmp_path / "news.txt"
    text.write_text("The capital of France is Paris.", encoding="utf-8")
    arguments = ["damage", "--adapter", str(tmp_path / "adapter"), "--text", str(text), "--tasks", "atlas_code"]
    found = CliRunner().invoke(app, [*arguments, "--limit", "4", "--json"])
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert [task["task"] for task in record["tasks"]] == ["atlas_code"]
    assert record["tasks"][0]["items"] == 4
    assert record["perplexity"]["news"]["before"] > 0
    words = CliRunner().invoke(app, [*arguments, "--limit", "4"])
    assert "atlas_code" in words.stdout
    assert "cosine with the unedited weight" in words.stdout


def test_bad_options_are_told_apart(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("Some text.", encoding="utf-8")
    found = CliRunner().invoke(app, ["damage", "--adapter", "x", "--text", str(text), "--text", str(text)])
    assert found.exit_code == 1
    assert "names the domain 'a' twice" in " ".join(found.output.split())
    found = CliRunner().invoke(app, ["damage", "--adapter", str(tmp_path / "none"), "--tasks", "none"])
    assert found.exit_code == 1
