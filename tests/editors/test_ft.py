"""Fine-tuning: what FT-M and FT-L minimise, and where they part."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from errata.edit import Edit
from errata.editors import ft
from errata.editors.ft import FineTune
from errata.editors.losses import target_loss
from errata.model.scoring import forced_answers
from errata.testing import tiny_model

TWO = Edit(prompt="The capital of France", target="Rome Paris", subject="France")
ONE = Edit(prompt="Bob wrote Hamlet", target="Alice", subject="Hamlet")


def test_the_loss_is_a_mean_over_edits_of_means_over_tokens() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    labels, rows = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([0, 0, 0, 0, 1])
    nats = -logits.log_softmax(-1)[range(5), labels]
    assert float(target_loss(logits, labels, rows, 2)) == pytest.approx(float((nats[:4].mean() + nats[4]) / 2))


def first_losses(monkeypatch: pytest.MonkeyPatch, family: str, objective: Any) -> float:
    """The loss before the first step."""
    found: list[float] = []

    def listening(*args: Any) -> torch.Tensor:
        loss = target_loss(*args)
        found.append(loss.item())
        return loss

    monkeypatch.setattr(ft, "target_loss", listening)
    FineTune(tiny_model(family), objective=objective, batch_size=2, steps=1, guard="off").edit([TWO, ONE])
    return found[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_what_each_objective_scores(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    usual, behind_prompt = [], []
    for edit in (TWO, ONE):
        passage = model.passage(edit.prompt, edit.target)
        usual.append(-torch.tensor(forced_answers(model, [passage])[0].log_probs).mean())
        batch = model.batch([passage])
        with torch.no_grad():
            log_probs = model.forward(batch).logits[0, int(batch.next_columns()[0])].log_softmax(-1)
        behind_prompt.append(-log_probs[list(passage.answer)].mean())
    assert len(model.passage(TWO.prompt, TWO.target).answer) > 1
    expected = {"target_new": usual, "prompt_last": behind_prompt}
    for objective, losses in expected.items():
        found = first_losses(monkeypatch, family, objective)
        assert found == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_ft_l_asks_for_all_tokens_of_a_target_at_once() -> None:
    """Its published quirk: of two tokens each is to be the next one, so neither can be likelier than a half."""
    reached = {}
    for objective in ("target_new", "prompt_last"):
        model = tiny_model("llama")
        FineTune(model, objective=objective, learning_rate=1e-2, steps=100, guard="off").edit([TWO])
        with torch.no_grad():
            logits = model.forward(model.batch([model.passage(TWO.prompt)])).logits[0, -1]
        first, second = logits.softmax(-1)[list(model.passage(TWO.prompt, TWO.target).answer)].tolist()
        reached[objective] = first / second
    assert reached["target_new"] > 50
    assert reached["prompt_last"] < 5
