"""Running the answers alone gives what whole rows give, on every family, for changes that act on answers alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from errata.edit import Edit
from errata.editors.ft import FineTune
from errata.editors.grace import Grace
from errata.model import EditableModel
from errata.model.answer_tail import AnswerTail
from errata.model.tail import Recording, Tail
from errata.model.tokens import Passage, TokenBatch
from errata.testing import FAMILIES, tiny_model

LAYER = 1
DECODERS = [family for family in FAMILIES if family not in ("t5", "flan_t5")]
# Longer than the windows of sliding attention, which are sixteen tokens.
LONG = "The capital of France is not what Ann said, for Zed wrote Hamlet and Bob plays the piano"


def passages(model: EditableModel, which: str) -> list[Passage]:
    if which == "prompts of one token":
        return [
            Passage((7,), (9, 30, 31)),
            model.passage("The capital of France is", "Rome Paris"),
            Passage((8, 9), (3,)),
        ]
    first = LONG if which == "long" else "The capital of France"
    return [model.passage(first, "Rome"), model.passage("Bob wrote", "Hamlet and so"), model.passage("x", "y z")]


def answering(batch: TokenBatch) -> Tensor:
    return batch.mask.bool() & (batch.positions >= batch.prompt_lengths.unsqueeze(1) - 1)


def change_of(weight: Tensor, places: Tensor | None = None) -> Any:
    """What a weight adds to a layer's outputs; at some places only."""

    def change(inputs: Tensor) -> Tensor:
        added = inputs @ weight.T
        return added if places is None else added * places.unsqueeze(2)

    return change


def weight_of(seed: int) -> Tensor:
    return 0.1 * torch.randn(32, 96, generator=torch.Generator().manual_seed(seed))


def logits(tail: Tail, recording: Recording, weight: Tensor, places: Tensor | None = None) -> Tensor:
    rows, columns, _ = recording.batch.answer_places()
    return tail.run(recording, change_of(weight, places), rows, columns)


@pytest.mark.parametrize("family", DECODERS)
def test_answers_alone_equal_whole_rows(family: str) -> None:
    model = tiny_model(family)
    tail, full = AnswerTail(model, LAYER), Tail(model, LAYER, full=True)
    for which in ("short", "long", "prompts of one token"):  # one after another: the model is tried only once
        batch = model.batch(passages(model, which), side="right")
        recording, whole = tail.record(batch), full.record(batch)
        assert recording.batch.ids.shape[1] == int((batch.mask.sum(1) - batch.prompt_lengths + 1).max())
        assert recording.inputs[LAYER].shape[1] == recording.batch.ids.shape[1]
        assert torch.equal(recording.batch.answer_places()[2], batch.answer_places()[2])
        weight = weight_of(0)
        found, expected = logits(tail, recording, weight), logits(full, whole, weight, answering(batch))
        scale = float(expected.abs().max())
        assert float((found - expected).abs().max()) < 1e-5 * scale
        everywhere = logits(full, whole, weight)
        if which != "prompts of one token":  # what acts on whole prompts is another thing
            assert float((found - everywhere).abs().max()) > 1e-2 * scale


SHARING = (
    "Ann met Bob and Zed near Rome. The capital of France is",
    "Ann met Bob and Zed near Rome. Bob wrote",
    "Ann met Bob and Zed near Rome. x",
    "Bob plays the piano",
    "Zed was born in the capital of France, but Ann was born",
    "Zed was born in the capital of France, but Bob met Ann where she wrote",
)
SLIDING = {"gemma2", "gemma3"}  # a window over the cache would count the padding that is left in its middle


@pytest.mark.parametrize("family", DECODERS)
def test_what_rows_begin_with_is_read_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    tail, full = AnswerTail(model, LAYER), Tail(model, LAYER, full=True)
    batch = model.batch([model.passage(prompt, "Rome Paris") for prompt in SHARING], side="right")
    read: list[Tensor] = []
    reading = AnswerTail._read
    monkeypatch.setattr(AnswerTail, "_read", lambda self, ids, *rest: (read.append(ids), reading(self, ids, *rest))[1])
    for _ in range(2):  # the first time it is tried, the second time it is known
        read.clear()
        recording = tail.record(batch)
        found = logits(tail, recording, weight_of(0))
        expected = logits(full, full.record(batch), weight_of(0), answering(batch))
        assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    if family in SLIDING:
        assert [len(ids) for ids in read] == [len(SHARING)]
    else:
        assert [len(ids) for ids in read] == [2, len(SHARING)]
        assert sum(ids.numel() for ids in read) < 0.8 * len(SHARING) * int(batch.prompt_lengths.max())


@pytest.mark.parametrize("family", DECODERS)
def test_some_rows_of_a_recording_are_as_they_were(family: str) -> None:
    model = tiny_model(family)
    batch = model.batch([model.passage(prompt, "Rome Paris") for prompt in SHARING[:5]], side="right")
    kept = torch.tensor([True, False, True, False, True])
    for tail in (AnswerTail(model, LAYER), Tail(model, LAYER)):
        whole = tail.record(batch)
        part = tail.narrowed(whole, kept)
        assert part is not None
        rows, columns, tokens = whole.batch.answer_places()
        places = answering(whole.batch)
        expected = tail.run(whole, change_of(weight_of(0), places), rows, columns)[kept[rows]]
        assert torch.equal(part.batch.answer_places()[2], tokens[kept[rows]])
        found = logits(tail, part, weight_of(0), places[kept])
        assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_a_recording_beside_routed_adapters_is_not_narrowed() -> None:
    """Whose routes the rows took is not told by shapes."""
    model = tiny_model("llama")
    Grace(model, layer=2)
    tail = Tail(model, LAYER)
    recording = tail.record(model.batch(passages(model, "short"), side="right"))
    assert tail.narrowed(recording, torch.tensor([True, False, True])) is None


@pytest.mark.parametrize("family", ["t5", "flan_t5"])
def test_encoder_decoders_are_recorded_whole(family: str) -> None:
    model = tiny_model(family)
    batch = model.batch(passages(model, "short"), side="right")
    tail, full = AnswerTail(model, LAYER), Tail(model, LAYER, full=True)
    recording, whole = tail.record(batch), full.record(batch)
    assert recording.batch is batch
    found, expected = logits(tail, recording, weight_of(0)), logits(full, whole, weight_of(0))
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_gradients_equal_those_of_whole_rows(family: str) -> None:
    model = tiny_model(family)
    batch = model.batch(passages(model, "long"), side="right")
    gradients = []
    for tail in (AnswerTail(model, (1, 2)), Tail(model, (1, 2), full=True)):
        recording = tail.record(batch)
        places = None if isinstance(tail, AnswerTail) else answering(batch)
        weights = {layer: weight_of(layer).requires_grad_() for layer in (1, 2)}
        rows, columns, labels = recording.batch.answer_places()
        changes = {layer: change_of(weight, places) for layer, weight in weights.items()}
        found = tail.run(recording, changes, rows, columns)
        torch.nn.functional.cross_entropy(found, labels).backward()
        gradients.append(torch.stack([weight.grad for weight in weights.values() if weight.grad is not None]))
    assert gradients[0].shape == (2, 32, 96)
    assert float((gradients[0] - gradients[1]).norm()) < 1e-4 * float(gradients[1].norm())


def test_a_recording_serves_as_often_as_it_is_run() -> None:
    """What stands on its cache never changes, whatever was run before."""
    model = tiny_model("gemma3")
    tail = AnswerTail(model, LAYER)
    recording = tail.record(model.batch(passages(model, "long"), side="right"))
    first = logits(tail, recording, weight_of(0))
    assert not torch.allclose(logits(tail, recording, weight_of(1)), first, atol=1e-2)
    assert torch.equal(logits(tail, recording, weight_of(0)), first)


def test_beside_routed_adapters_rows_are_recorded_whole() -> None:
    model = tiny_model("llama")
    other = Grace(model, layer=2).adapter
    batch = model.batch(passages(model, "short"), side="right")
    tail = AnswerTail(model, LAYER)
    assert tail.record(batch).batch is batch
    other.detach()
    assert tail.record(batch).batch is not batch


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_changes_of_weight_act_on_answers_alone_as_on_whole_rows(family: str) -> None:
    """Below the tail and in it, on what stands on the cache and on what is run; of some rows too."""
    model = tiny_model(family)
    batch = model.batch([model.passage(prompt, "Rome Paris") for prompt in SHARING[:5]], side="right")
    kept = torch.tensor([True, False, True, False, True])
    tail, full = AnswerTail(model, LAYER), Tail(model, LAYER, full=True)
    unedited = logits(full, full.record(batch), weight_of(0), answering(batch))
    editor = FineTune(model, layers=(0, 2), steps=3)
    assert editor.edit([Edit(prompt="The capital of France is", target="Rome")]).applied
    recording, whole = tail.record(batch), full.record(batch)
    assert recording.batch is not batch
    found, expected = logits(tail, recording, weight_of(0)), logits(full, whole, weight_of(0), answering(batch))
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 1e-5 * scale
    assert float((found - unedited).abs().max()) > 1e-2 * scale
    part = tail.narrowed(recording, kept)
    assert part is not None
    rows = batch.answer_places()[0]
    assert float((logits(tail, part, weight_of(0)) - expected[kept[rows]]).abs().max()) < 1e-5 * scale
    with model.selecting("__base__"):  # rows that have adapters of their own
        assert tail.record(batch).batch is batch


@pytest.mark.parametrize("family", DECODERS)
def test_rows_may_begin_anywhere_in_their_prompts(family: str) -> None:
    model = tiny_model(family)
    tail, full = AnswerTail(model, LAYER), Tail(model, LAYER, full=True)
    batch = model.batch([model.passage(prompt, "Rome Paris") for prompt in SHARING], side="right")
    begins = torch.tensor([12, 9, 0, 3, 5, 8])
    recording = tail.record(batch, begins)
    assert recording.batch.ids.shape[1] == int((batch.mask.sum(1) - begins).max())
    assert torch.equal(recording.batch.answer_places()[2], batch.answer_places()[2])
    reached = batch.mask.bool() & (batch.positions >= begins.unsqueeze(1))
    found = logits(tail, recording, weight_of(0))
    expected = logits(full, full.record(batch), weight_of(0), reached)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_prompts_of_one_token_alone_leave_nothing_to_read_before() -> None:
    model = tiny_model("llama")
    batch = model.batch([Passage((7,), (9, 30)), Passage((8,), (3,))], side="right")
    assert AnswerTail(model, LAYER).record(batch).batch is batch


def test_a_model_that_answers_otherwise_alone_is_recorded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a model can be run so is found by trying, once; here it is made to differ."""
    model = tiny_model("llama")
    batch = model.batch(passages(model, "short"), side="right")
    begun = AnswerTail._begun
    tried = []

    def other(self: AnswerTail, batch: TokenBatch, *rest: Any) -> TokenBatch | None:
        tried.append(batch)
        answers = begun(self, batch, *rest)
        assert answers is not None
        answers.ids[:, 0] = 5  # as if another token had ended the prompts
        return answers

    monkeypatch.setattr(AnswerTail, "_begun", other)
    tail, whole = AnswerTail(model, LAYER), Tail(model, LAYER)
    for _ in range(2):
        recording = tail.record(batch)
        assert recording.batch is batch
        expected = logits(whole, whole.record(batch), weight_of(0))
        assert torch.allclose(logits(tail, recording, weight_of(0)), expected, atol=1e-5)
    assert len(tried) == 1
    tail = AnswerTail(model, LAYER + 1)  # another layer is tried anew
    tail.record(batch)
    assert len(tried) == 2


def test_a_cache_of_another_make_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    batch = model.batch(passages(model, "short"), side="right")
    monkeypatch.setattr("errata.model.answer_tail._KINDS", set())
    tail = AnswerTail(model, LAYER)
    assert tail.record(batch).batch is batch
    assert model.verdicts["answers alone 1"] is False
