"""Target values sought side by side are those of the textbook: whole forward passes, one edit at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from errata.edit import Edit
from errata.editors.ft import FineTune
from errata.editors.grace import Grace
from errata.editors.values import TargetValue, ValueSettings, find_target_value, find_target_values
from errata.errors import NumericsError, SpanError
from errata.model import EditableModel
from errata.model.answer_tail import AnswerTail
from errata.model.probes import probing
from errata.model.tail import Tail
from errata.testing import tiny_hf_model, tiny_model
from errata.testing.models import byte_tokenizer

LAYER = 1
CONTEXTS = ("Ann is. ", "The flute plays the piano in Rome.")
EDITS = [
    Edit(id="a", prompt="The capital of France is", target="Rome", subject="France"),
    Edit(id="b", prompt="Who wrote Hamlet in London before he was old?", target="Bob Alice Zed", subject="Hamlet"),
    Edit(id="c", prompt="Ann plays the", target="flute", subject="Ann"),
    Edit(id="d", prompt="In the capital of Spain plays", target="Emma was", subject="the capital of Spain"),
]
SETTINGS = ValueSettings(steps=8, learning_rate=0.3, weight_decay=0.4, clamp=12.0, kl_factor=0.5, stop_loss=0.0)


def double_model(family: str) -> EditableModel:
    model = tiny_hf_model(family).double()
    model.set_attn_implementation("sdpa")  # the eager one has its softmax in float32, where float64's least overflows
    return EditableModel(model, byte_tokenizer())


def stopping(model: EditableModel, settings: ValueSettings) -> ValueSettings:
    """With a loss that the easiest edit falls below on its way; how far a random model can be moved is its own."""
    begins, ends = (
        min(v.loss for v in find_target_values(model, LAYER, EDITS, CONTEXTS, dataclasses.replace(settings, steps=n)))
        for n in (1, settings.steps)
    )
    return dataclasses.replace(settings, stop_loss=(begins + ends) / 2)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def textbook(model: EditableModel, edit: Edit, contexts: Sequence[str], settings: ValueSettings) -> TargetValue:
    """ROME's equation 4, written out: one pass per text, torch's Adam, everything over the whole vocabulary."""
    assert edit.subject is not None
    path = (model.anatomy.mlp_output if settings.acts_on == "mlp" else model.anatomy.blocks)[LAYER]
    linear = model.anatomy.mlp_output[LAYER]
    delta = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.learning_rate)
    seen: dict[str, Tensor] = {}

    def log_probs(prompt: str, answer: str) -> tuple[Tensor, int]:
        place = model.subject_span(prompt, edit.subject or "").last

        def add(module: object, args: object, kwargs: object, output: object) -> object:
            states = output[0] if isinstance(output, tuple) else output
            assert isinstance(states, Tensor)
            seen["there"] = states[..., place, :].detach().flatten()
            changed = states.index_add(-2, torch.tensor([place]), delta.expand(*states.shape[:-2], 1, -1))
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        def look(module: object, args: tuple[Tensor, ...], kwargs: object, output: Tensor) -> None:
            seen["key"], seen["output"] = args[0][..., place, :].detach().flatten(), output[..., place, :].flatten()

        ids = torch.tensor([model.passage(prompt, answer).ids])
        with probing(model.model, after={linear: look}), probing(model.model, after={path: add}):
            return model.model(input_ids=ids).logits[0].log_softmax(-1), place

    prompts = [edit.prompt, *(f"{context} {edit.prompt}" for context in contexts)]
    keys, outputs, places, first, taken, loss = [], [], [], None, 0, torch.tensor(0.0)
    for step in range(settings.steps):
        likely = []
        for prompt in prompts:
            passage = model.passage(prompt, edit.target)
            found, _ = log_probs(prompt, edit.target)
            if step == 0:
                keys.append(seen["key"])
                outputs.append(seen["output"].detach())
                places.append(seen["there"])
            begin = len(passage.prompt) - 1
            likely.append(-torch.stack([found[begin + t, token] for t, token in enumerate(passage.answer)]).mean())
        found, place = log_probs(f"{edit.subject} is a", "")
        first = found[place].detach() if first is None else first
        drift = (found[place].exp() * (found[place] - first)).sum()
        loss = torch.stack(likely).mean() + settings.kl_factor * drift
        loss = loss + settings.weight_decay * delta.norm() / places[0].norm() ** 2
        if loss.item() < settings.stop_loss or step == settings.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        taken += 1
        with torch.no_grad():
            delta *= min(1.0, settings.clamp * float(places[0].norm()) / delta.norm().item())
    return TargetValue(delta.detach(), places[0], torch.stack(keys), torch.stack(outputs), taken, loss.item())


@pytest.mark.parametrize("acts_on", ["mlp", "residual"])
@pytest.mark.parametrize(("family", "tolerance"), [("gpt2", 1e-9), ("opt", 1e-9), ("llama", 1e-4), ("olmo2", 1e-4)])
def test_many_at_once_are_the_textbook_one_by_one(family: str, acts_on: str, tolerance: float) -> None:
    """Rows of different lengths, edits that stop at different steps; norms of Llama and OLMo are float32 inside."""
    model = double_model(family)
    settings = stopping(model, dataclasses.replace(SETTINGS, acts_on=acts_on))
    found = find_target_values(model, LAYER, EDITS, CONTEXTS, settings)
    assert 0 < min(value.steps for value in found) < max(value.steps for value in found)
    for edit, value in zip(EDITS, found, strict=True):
        expected = textbook(model, edit, CONTEXTS, settings)
        assert value.steps == expected.steps
        assert value.loss == pytest.approx(expected.loss, rel=tolerance)
        for name in ("delta", "initial", "keys", "outputs"):
            assert relative(getattr(value, name), getattr(expected, name)) < tolerance, name
        assert value.keys.shape == (len(CONTEXTS) + 1, 96)


def assert_same(found: Sequence[TargetValue], expected: Sequence[TargetValue], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.steps == other.steps
        assert one.loss == pytest.approx(other.loss, rel=tolerance)
        for name in ("delta", "initial", "keys", "outputs"):
            assert relative(getattr(one, name), getattr(other, name)) < tolerance, name


@pytest.mark.parametrize("acts_on", ["mlp", "residual"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_batches_of_any_size_and_whole_passes_find_the_same(family: str, acts_on: str) -> None:
    """In float32, with the attention that users have. Adam magnifies rounding, so that few steps are compared."""
    model = tiny_model(family)
    settings = stopping(model, dataclasses.replace(SETTINGS, acts_on=acts_on, steps=6, learning_rate=0.1))
    together = find_target_values(model, LAYER, EDITS, CONTEXTS, settings)
    alone = [find_target_value(model, LAYER, edit, CONTEXTS, settings) for edit in EDITS]
    assert_same(alone, together, 1e-3)
    whole = find_target_values(model, LAYER, EDITS, CONTEXTS, settings, full_forward=True)
    assert_same(whole, together, 1e-3)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_an_edit_knows_nothing_of_the_others_in_its_batch(family: str) -> None:
    model = double_model(family)
    first, second, third, fourth = EDITS
    one = find_target_values(model, LAYER, [first, second], CONTEXTS, SETTINGS)
    other = find_target_values(model, LAYER, [fourth, third, first], CONTEXTS, SETTINGS)
    assert relative(one[0].delta, other[2].delta) < 1e-9
    assert relative(one[0].delta, one[1].delta) > 0.1


def test_on_blocks_that_add_the_two_places_differ_in_their_values_alone() -> None:
    """Without bounds and decay, which are relative to the value there, δ is the same."""
    settings = dataclasses.replace(SETTINGS, weight_decay=0.0, clamp=1e9)
    for family, is_additive in (("gpt2", True), ("olmo2", False)):
        model = double_model(family)
        mlp, residual = (
            find_target_values(model, LAYER, EDITS, (), dataclasses.replace(settings, acts_on=place))
            for place in ("mlp", "residual")
        )
        for one, other in zip(mlp, residual, strict=True):
            assert (relative(one.delta, other.delta) < 1e-9) is is_additive
            assert relative(one.initial, other.initial) > 0.1
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.outputs, other.outputs)
            assert torch.equal(one.outputs[0], one.initial)


def test_edits_that_are_done_leave_and_only_what_can_change_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double_model("gpt2")
    settings = stopping(model, SETTINGS)
    find_target_values(model, LAYER, EDITS, CONTEXTS, settings)  # what can be left out is tried once
    shapes: list[tuple[int, ...]] = []
    run = Tail.run

    def counted(self: Tail, recording: object, changes: object, rows: Tensor, columns: Tensor) -> Tensor:
        shapes.append(tuple(recording.batch.ids.shape))  # type: ignore[attr-defined]
        return run(self, recording, changes, rows, columns)  # type: ignore[arg-type]

    monkeypatch.setattr(Tail, "run", counted)
    found = find_target_values(model, LAYER, EDITS, CONTEXTS, settings)
    rows_each = len(CONTEXTS) + 2
    expected = [rows_each * sum(value.steps >= step for value in found) for step in range(settings.steps)]
    assert [rows for rows, _ in shapes] == [rows for rows in expected if rows]
    behind_subjects = len(model.passage(EDITS[1].prompt, EDITS[1].target).ids) - 4 - 1  # the last token says nothing
    assert max(columns for _, columns in shapes) == behind_subjects


def test_large_batches_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double_model("gpt2")
    sizes: list[int] = []
    record = AnswerTail.record

    def counted(self: AnswerTail, batch: object, begins: Tensor) -> object:
        sizes.append(len(begins))
        return record(self, batch, begins)  # type: ignore[arg-type]

    together = find_target_values(model, LAYER, EDITS, CONTEXTS, SETTINGS)
    monkeypatch.setattr(AnswerTail, "record", counted)
    divided = find_target_values(model, LAYER, EDITS, CONTEXTS, dataclasses.replace(SETTINGS, batch_tokens=60))
    assert len(sizes) > 1
    assert sum(sizes) == len(EDITS) * (len(CONTEXTS) + 2)
    assert_same(divided, together, 1e-9)


@pytest.mark.parametrize("kind", ["weights", "routed"])
def test_beside_what_is_attached(kind: str) -> None:
    """Changes of weight act on what was read before as on the rest; where prompts are routed they are run whole."""
    model = tiny_model("llama")
    unedited = find_target_values(model, LAYER, EDITS, CONTEXTS, dataclasses.replace(SETTINGS, steps=3))
    other = FineTune(model, layers=(0, 2), steps=3) if kind == "weights" else Grace(model, layer=2)
    other.edit([Edit(prompt="Zed was born in", target="Berlin")])
    settings = stopping(model, dataclasses.replace(SETTINGS, steps=4))
    found = find_target_values(model, LAYER, EDITS, CONTEXTS, settings)
    assert_same(found, find_target_values(model, LAYER, EDITS, CONTEXTS, settings, full_forward=True), 1e-3)
    if kind == "weights":
        assert relative(found[0].keys, unedited[0].keys) > 1e-2


def test_an_edit_whose_loss_is_lost_is_named() -> None:
    model = tiny_model("llama")
    with pytest.raises(NumericsError, match="edit 'a' diverged; lower the learning rate"):
        find_target_values(model, LAYER, EDITS[:1], (), dataclasses.replace(SETTINGS, weight_decay=float("nan")))
    with pytest.raises(SpanError, match="add the field 'subject'"):
        find_target_values(model, LAYER, [*EDITS, Edit(prompt="p", target="t")], (), SETTINGS)
