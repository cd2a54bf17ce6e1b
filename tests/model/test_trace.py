"""Causal tracing: everything put back is the clean run, nothing put back is the corrupted one."""

from __future__ import annotations

import json

import pytest
import torch

from errata.edit import Edit
from errata.editors.ft import FineTune
from errata.errors import ConfigError, EditError
from errata.model import EditableModel
from errata.model.scoring import forced_answers
from errata.model.trace import KINDS, PLACES, CausalTrace, Restoration, TracePlan, causal_trace, restored
from errata.testing import tiny_model

PROMPTS = (("The capital of France is", "France"), ("Bob plays the", "Bob"), ("Who wrote Hamlet in Rome?", "Hamlet"))
PLAN = TracePlan(samples=2)


def knowing() -> tuple[EditableModel, list[Edit]]:
    """A model that says nothing but a few words, and what it says to some prompts as facts that it knows."""
    model = tiny_model("llama")
    words = [model.passage("x", word).answer[0] for word in ("Rome", "Paris", "London", "Bob", "Alice", "flute")]
    head = model.module(model.anatomy.head)
    chosen = torch.zeros_like(head.weight)
    chosen[words] = 10 * head.weight[words]
    head.weight = torch.nn.Parameter(chosen, requires_grad=False)
    facts = []
    for prompt, subject in PROMPTS:
        said = int(model.forward(model.batch([model.passage(prompt)])).logits[0, -1].argmax())
        answer = model.tokenizer.decode([said]).strip()
        facts.append(Edit(prompt=prompt, target="Rome", subject=subject, ground_truth=answer))
    return model, facts


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3", "gptj"])
def test_all_put_back_is_clean_and_nothing_is_corrupted(family: str) -> None:
    model = tiny_model(family)
    passage = model.passage("The capital of France is", "Rome Paris")
    span = model.subject_span("The capital of France is", "France")
    noise = torch.randn(2, span.last + 1 - span.first, 32, generator=torch.Generator().manual_seed(0))
    columns, top = range(len(passage.ids)), model.layer_count - 1
    whole_layer = tuple(("hidden", 1, column) for column in columns)
    behind_it = tuple(("hidden", top, column) for column in columns if column >= len(passage.prompt) - 1)
    before = tuple((kind, layer, 0) for kind in KINDS for layer in range(top + 1))  # what noise never reaches
    branches = tuple((kind, layer, span.last) for kind in ("mlp", "attention") for layer in range(top + 1))
    states = ((), whole_layer, behind_it, before, branches)
    runs = [Restoration(sample, own) for sample in range(2) for own in states]
    clean, found = restored(model, passage, span.first, noise, runs)
    assert float(clean) == pytest.approx(forced_answers(model, [passage])[0].probability, rel=1e-4)
    ids = torch.tensor([passage.ids])
    for sample in range(2):
        nothing, layer, answers, useless, partly = found[sample * len(states) : (sample + 1) * len(states)].tolist()
        with torch.no_grad():
            embedded = model.model.get_input_embeddings()(ids).clone()
            embedded[0, span.first : span.last + 1] += noise[sample]
            logits = model.model(inputs_embeds=embedded).logits
        scores = logits[0].log_softmax(-1)
        begin = len(passage.prompt) - 1
        expected = sum(float(scores[begin + t, token]) for t, token in enumerate(passage.answer))
        assert nothing == pytest.approx(float(torch.tensor(expected).exp()), rel=1e-4)
        assert useless == pytest.approx(nothing, rel=1e-4)
        assert layer == pytest.approx(float(clean), rel=1e-4)
        assert answers == pytest.approx(float(clean), rel=1e-4)
        assert abs(nothing - float(clean)) > 1e-2 * float(clean)
        assert abs(partly - nothing) > 1e-3 * nothing
    divided = restored(model, passage, span.first, noise, runs, batch_tokens=3 * len(passage.ids))
    assert torch.allclose(divided[1], found, rtol=1e-4)


def test_facts_that_are_known_are_traced() -> None:
    model, facts = knowing()
    unknown = Edit(prompt="Ann plays the", target="Rome", subject="Ann", ground_truth="Zed Berlin")
    unanswered = Edit(prompt="Ann plays the", target="Rome", subject="Ann")
    found = causal_trace(model, [*facts, unknown, unanswered], PLAN)
    assert (found.asked, found.known) == (4, 3)
    assert found.clean == pytest.approx(
        sum(
            a.probability for a in forced_answers(model, [model.passage(f.prompt, f.ground_truth or "") for f in facts])
        )
        / 3,
        rel=1e-4,
    )
    # One token answers: all of it comes back with the top state of the prompt's last token.
    assert found.effects[PLACES[1]]["hidden"][-1] == pytest.approx(found.clean - found.corrupted, rel=1e-3)
    assert found.effects[PLACES[0]]["hidden"][-1] == pytest.approx(0.0, abs=1e-7)
    assert all(len(layers) == model.layer_count for kinds in found.effects.values() for layers in kinds.values())
    json.dumps(found.to_record())
    assert causal_trace(model, facts, PLAN).effects == found.effects


def test_it_is_the_base_model_that_is_traced() -> None:
    model, facts = knowing()
    before = causal_trace(model, facts, PLAN)
    FineTune(model, steps=3).edit(facts[:1])
    assert causal_trace(model, facts, PLAN) == before


def test_layers_around_the_largest_effect_are_suggested() -> None:
    effects = {PLACES[0]: {"mlp": (0.1, 0.3, 0.19, 0.4, 0.5, 0.24, 0.4)}}
    found = CausalTrace(1, 1, 1.0, 0.0, 1.0, 1, effects, effects)
    assert (found.layer, found.layers) == (4, (3, 4))


def test_windows_end_where_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, facts = knowing()
    seen: list[Restoration] = []

    def look(model: object, passage: object, first: int, noise: torch.Tensor, runs: list[Restoration], **_: object):  # type: ignore[no-untyped-def]
        seen.extend(runs)
        return torch.tensor(1.0), torch.zeros(len(runs))

    monkeypatch.setattr("errata.model.trace.restored", look)
    causal_trace(model, facts[:1], TracePlan(samples=1, window=0.5))
    mlps = [tuple(layer for _, layer, _ in run.states) for run in seen if run.states and run.states[0][0] == "mlp"]
    assert mlps[:4] == [(0,), (0, 1), (1, 2), (2, 3)]
    hidden = [len(run.states) for run in seen if run.states and run.states[0][0] == "hidden"]
    assert set(hidden) == {1}


def test_what_cannot_be_traced_is_said() -> None:
    with pytest.raises(ConfigError, match="reads prompts with an encoder"):
        causal_trace(tiny_model("t5"), [])
    unknown = Edit(prompt="Ann plays the", target="Rome", subject="Ann", ground_truth="Zed Berlin")
    with pytest.raises(EditError, match="none of the 1 facts"):
        causal_trace(tiny_model("llama"), [unknown])
