"""KL divergence from the base, against values worked out by hand; adapters decide as they do in generation."""

from __future__ import annotations

import math
from math import log

import pytest
import torch

from errata.edit import Edit, Probe
from errata.editors.ft import FineTune
from errata.editors.memoir import Memoir
from errata.errors import NumericsError
from errata.evaluation import divergence
from errata.evaluation.divergence import (
    divergence_at_prompts,
    divergence_on_texts,
    kl_divergence,
    locality_divergence,
)
from errata.model import EditableModel
from errata.model.tokens import Passage
from errata.testing import tiny_model

FT = {"learning_rate": 1e-2, "steps": 60}
MEMOIR = {"relative_threshold": 0.6, "steps": 25, "contexts": 1, "background": 4, "pooling": "mean"}
PROMPTS = ["The capital of Spain", "Ann wrote Emma", "x", "Bob plays the flute of Ann in London"]


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([[math.log(p) if p else -math.inf for p in row] for row in rows])


def test_kl_by_hand() -> None:
    base = logits([0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [0.2, 0.3, 0.5])
    edited = logits([0.25, 0.75, 0.0], [0.25, 0.25, 0.5], [0.5, 0.3, 0.2])
    expected = [
        0.5 * log(0.5 / 0.25) + 0.5 * log(0.5 / 0.75),
        0.0,
        0.2 * log(0.2 / 0.5) + 0.5 * log(0.5 / 0.2),
    ]
    assert kl_divergence(base, edited).tolist() == pytest.approx(expected, abs=1e-6)
    # Logits need not be normalised; what the edited model rules out costs without bound, the other way round nothing.
    assert kl_divergence(base + 3, edited - 1).tolist() == pytest.approx(expected, abs=1e-6)
    assert kl_divergence(logits([0.5, 0.5]), logits([1.0, 0.0])).tolist() == [math.inf]
    assert kl_divergence(logits([1.0, 0.0]), logits([0.5, 0.5])).tolist() == pytest.approx([log(2)])


def by_hand(model: EditableModel, prompts: list[str] | list[Passage]) -> list[float]:
    """One prompt at a time through the whole model."""

    def last(passage: Passage) -> torch.Tensor:
        with torch.no_grad():
            return model.forward(model.batch([passage])).logits[0, -1].double().log_softmax(-1)

    found = []
    for prompt in prompts:
        passage = model.passage(prompt) if isinstance(prompt, str) else prompt
        q = last(passage)
        with model.bare():
            p = last(passage)
        found.append(float((p.exp() * (p - q)).sum()))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batches_equal_one_prompt_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    assert divergence_at_prompts(model, PROMPTS) == [0.0] * 4
    FineTune(model, **FT).edit([Edit(prompt="The capital of France", target="Rome")])
    expected = by_hand(model, PROMPTS)
    assert min(expected) > 1e-5
    assert divergence_at_prompts(model, PROMPTS) == pytest.approx(expected, rel=1e-2, abs=1e-6)
    monkeypatch.setattr(divergence, "_LOGITS_AT_ONCE", 1)  # one row of logits at a time
    assert divergence_at_prompts(model, PROMPTS, batch_tokens=16) == pytest.approx(expected, rel=1e-2, abs=1e-6)


def test_a_routed_adapter_decides_for_each_prompt() -> None:
    model = tiny_model("llama")
    memoir = Memoir(model, **MEMOIR)
    memoir.edit([Edit(prompt="The capital of France", target="Rome", subject="France")])
    asked = ["The capital of France", *PROMPTS]
    fires = [bool(one.fires) for one in memoir.adapter.explain(asked)]
    assert fires[0]
    assert not all(fires)
    moved = divergence_at_prompts(model, asked)
    assert [value > 0 for value in moved] == fires, "silent where the router is silent, to the last bit"


def test_text_is_compared_at_every_place() -> None:
    model = tiny_model("llama")
    FineTune(model, **FT).edit([Edit(prompt="The capital of France", target="Rome")])
    text = "Ann wrote Emma"
    ids = model.passage(text).ids
    expected = by_hand(model, [Passage(ids[:end], ()) for end in range(1, len(ids))])
    assert divergence_on_texts(model, [text]) == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    assert divergence_on_texts(model, [text, text]) == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    with pytest.raises(NumericsError, match="needs text"):
        divergence_on_texts(model, [""])


def test_means_are_per_edit_first() -> None:
    model = tiny_model("llama")
    edits = [
        Edit(
            prompt="The capital of France", target="Rome", locality=[{"prompt": p, "kind": "near"} for p in PROMPTS[:3]]
        ),
        Edit(prompt="Bob wrote", target="Hamlet", locality=(Probe(prompt=PROMPTS[3], kind="far"),)),
        Edit(prompt="Ann", target="Emma"),
    ]
    FineTune(model, **FT).edit(edits[:1])
    moved = divergence_at_prompts(model, PROMPTS)
    found = locality_divergence(model, edits)
    assert found.mean.value == pytest.approx((sum(moved[:3]) / 3 + moved[3]) / 2)
    assert found.mean.count == 2
    assert found.by_kind["near"].value == pytest.approx(sum(moved[:3]) / 3)
    assert found.by_kind["far"].value == pytest.approx(moved[3])
    assert found.median == pytest.approx(found.mean.value)
    assert found.to_record()["text"] is None
    assert locality_divergence(model, edits[2:]).to_record()["locality"] is None
