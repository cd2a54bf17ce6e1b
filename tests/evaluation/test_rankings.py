"""Rankings of the new answer against the old one, asked of a model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata.cli.app import app
from errata.datasets import write_edits
from errata.edit import Edit, Probe
from errata.editors.ft import FineTune
from errata.errors import ConfigError
from errata.evaluation.rankings import rank_answers
from errata.model.scoring import forced_answers
from errata.testing import tiny_model

EDITS = [
    Edit(
        prompt="The capital of France is",
        target="Rome",
        ground_truth="Paris",
        rephrases=("France has the capital",),
        locality=(
            Probe(prompt="The capital of Spain is", answer="Paris", kind="same_relation"),
            Probe(prompt="Who wrote", answer="Emma", kind="unrelated"),
        ),
    ),
    Edit(prompt="Ann plays the", target="flute", ground_truth="piano"),
    Edit(prompt="Bob plays the", target="flute"),
]


def test_what_is_ranked_is_the_mean_log_probability_of_a_token() -> None:
    model = tiny_model("llama")
    ranked = rank_answers(model, EDITS)
    scores = ranked.counterfact
    assert ranked.edits == 2

    def likely(prompt: str, answer: str) -> float:
        (found,) = forced_answers(model, [model.passage(prompt, answer)])
        return sum(found.log_probs) / len(found.log_probs)

    won = [likely(e.prompt, e.target) > likely(e.prompt, e.ground_truth or "") for e in EDITS[:2]]
    assert scores.efficacy == sum(won) / 2
    other = EDITS[0].rephrases[0]
    assert scores.paraphrase == float(likely(other, "Rome") > likely(other, "Paris"))
    beside = EDITS[0].locality[0].prompt
    assert scores.neighbourhood == float(likely(beside, "Paris") > likely(beside, "Rome"))
    # Two probes of the first edit have answers that are not its target.
    assert ranked.overfitting.keys() == {"same_relation", "unrelated"}
    other = ranked.overfitting["unrelated"]
    right, target, old = (likely("Who wrote", answer) for answer in ("Emma", "Rome", "Paris"))
    assert (other.correct, other.direct) == pytest.approx((math.exp(right), math.exp(target)), abs=1e-6)
    assert (other.overfitting, other.modified) == (float(right > target), float(right > old))


def test_an_edit_that_takes_wins() -> None:
    model = tiny_model("llama")
    FineTune(model, learning_rate=1e-2, steps=60).edit(EDITS)
    assert rank_answers(model, EDITS).counterfact.efficacy == 1.0


def test_edits_without_an_old_answer_cannot_be_ranked() -> None:
    with pytest.raises(ConfigError, match="give edits with a ground_truth"):
        rank_answers(tiny_model("llama"), EDITS[2:])


def test_the_command_line_ranks_when_asked(tmp_path: Path) -> None:
    write_edits(tmp_path / "edits.jsonl", EDITS[:2])
    model = tiny_model("llama")
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["evaluate", "--edits", str(tmp_path / "edits.jsonl"), "--model", str(tmp_path / "model")]
    found = CliRunner().invoke(app, [*arguments, "--rankings", "--json"])
    assert found.exit_code == 0, found.output
    ranked = json.loads(found.stdout)["rankings"]
    expected = rank_answers(model, EDITS[:2]).to_record()
    assert ranked["before"].pop("overfitting").keys() == expected.pop("overfitting").keys()
    assert ranked["before"] == pytest.approx(expected, abs=1e-5)
    assert "after" not in ranked
    plain = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(plain.stdout)["rankings"] is None
