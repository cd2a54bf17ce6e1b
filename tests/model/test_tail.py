"""The tail equals the full run, on every family, at every layer, in any state of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoConfig, PreTrainedModel

from errata.errors import ModelError, TailError
from errata.model import AnatomyDeclaration, EditableModel
from errata.model.edited_linear import Contribution
from errata.model.probes import adding, probing
from errata.model.sequences import ForwardPass
from errata.model.tail import Tail
from errata.testing import FAMILIES, byte_tokenizer, tiny_hf_model, tiny_model

POST_NORM = {"gemma2", "gemma3", "olmo2"}


def linear_change(seed: int) -> Callable[[Tensor], Tensor]:
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(seed)) * 0.1
    return lambda inputs: inputs @ weight.T


def close(found: Tensor, expected: Tensor) -> bool:
    """Equal to rounding, whatever the size of the logits."""
    return float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tail_equals_full(family: str, side: str) -> None:
    model = tiny_model(family)
    passages = [model.passage("The capital of France is", "Rome"), model.passage("Who?", "Ann B")]
    batch = model.batch(passages, side=side)  # type: ignore[arg-type]
    rows, columns, _ = batch.answer_places()
    base = model.forward(batch).logits[rows, columns]
    for layer in (0, 2, 3):
        tail, full = Tail(model, layer), Tail(model, layer, full=True)
        recording = tail.record(batch)
        unchanged = tail.run(recording, lambda inputs: torch.zeros(*inputs.shape[:2], 32), rows, columns)
        assert close(unchanged, base)
        changed = tail.run(recording, linear_change(layer), rows, columns)
        assert close(changed, full.run(recording, linear_change(layer), rows, columns))
        assert not torch.allclose(changed, base, atol=1e-2)
        assert tail._additive is (family not in POST_NORM)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_of_the_residual_stream_equals_full(family: str) -> None:
    """Whatever the block makes of its MLP's output; with a change of a layer above beside it."""
    model = tiny_model(family)
    batch = model.batch([model.passage("The capital of France is", "Rome"), model.passage("Who?", "Ann B")])
    rows, columns, _ = batch.answer_places()
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) * 0.1
    for layers in ((0,), (1, 3)):
        changes = {layers[0]: lambda states: states @ weight, **{layer: linear_change(layer) for layer in layers[1:]}}
        tail, full = Tail(model, layers, residual=True), Tail(model, layers, residual=True, full=True)
        recording = tail.record(batch)
        found = tail.run(recording, changes, rows, columns)
        assert close(found, full.run(recording, changes, rows, columns))
        assert not torch.allclose(found, tail.run(recording, {}, rows, columns), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_judged_by_its_own_rounding(family: str, dtype: torch.dtype) -> None:
    hf = tiny_hf_model(family).to(dtype)
    model = EditableModel(hf, byte_tokenizer())
    batch = model.batch([model.passage("The capital of France is", "Rome"), model.passage("Who?", "Ann B")])
    rows, columns, _ = batch.answer_places()
    for layer in (0, 3):
        tail, full = Tail(model, layer), Tail(model, layer, full=True)
        recording = tail.record(batch)
        assert tail._additive is (family not in POST_NORM)
        weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(layer)).to(dtype) * 0.1
        found, expected = (t.run(recording, lambda x, w=weight: x @ w.T, rows, columns).float() for t in (tail, full))
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error < 32 * torch.finfo(dtype).eps


def test_what_was_found_out_by_trying_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma2")
    batch = model.batch([model.passage("Who?", "Ann B")])
    Tail(model, 2).record(batch)

    def again(*_: object) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr(Tail, "_is_additive", again)
    monkeypatch.setattr(Tail, "_has_final_norm", again)
    tail = Tail(model, 2)
    tail.record(batch)
    assert tail._additive is False
    with pytest.raises(AssertionError, match="tried again"):
        Tail(model, 1).record(batch)


def test_a_tail_may_be_recorded_and_run_bare() -> None:
    model = tiny_model("llama")
    batch = model.batch([model.passage("Who?", "Ann B")])
    rows, columns, _ = batch.answer_places()
    base = model.forward(batch).logits[rows, columns]
    adapter = Change()
    model.contribute(model.anatomy.mlp_output[1], adapter)
    with model.bare():
        tail = Tail(model, 1)
        found = tail.run(tail.record(batch), {}, rows, columns)
    model.withdraw(model.anatomy.mlp_output[1], adapter)
    assert torch.allclose(found, base, atol=1e-5)


class Change(Contribution):
    def weight_change(self) -> Tensor:
        return torch.ones(32, 96)

    def change_output(self, inputs: Tensor, outputs: Tensor, forward_pass: ForwardPass) -> Tensor:
        return outputs + 1


def olmo() -> PreTrainedModel:
    config = OlmoConfig(
        vocab_size=400, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_final_norm_without_parameters() -> None:
    model = EditableModel(olmo(), byte_tokenizer())
    batch = model.batch([model.passage("Who?", "Ann B")])
    rows, columns, _ = batch.answer_places()
    tail, full = Tail(model, 1), Tail(model, 1, full=True)
    recording = tail.record(batch)
    found = tail.run(recording, linear_change(1), rows, columns)
    assert torch.allclose(found, full.run(recording, linear_change(1), rows, columns), atol=1e-5)


def test_a_final_norm_that_was_not_found_is_asked_for() -> None:
    model = EditableModel(olmo(), byte_tokenizer())
    model.anatomy = dataclasses.replace(model.anatomy, final_norm=None)
    with pytest.raises(TailError, match=r"no final norm was found.*AnatomyDeclaration\(final_norm="):
        Tail(model, 1).record(model.batch([model.passage("Who?", "Bob")]))


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_gradients_equal_those_of_the_full_run(family: str) -> None:
    model = tiny_model(family)
    batch = model.batch([model.passage("Who wrote Hamlet?", "Bob"), model.passage("Ann is", "Rome")])
    rows, columns, labels = batch.answer_places()
    gradients = []
    for full in (False, True):
        weight = torch.zeros(32, 96, requires_grad=True)
        tail = Tail(model, 2, full=full)
        logits = tail.run(tail.record(batch), lambda inputs, w=weight: inputs @ w.T, rows, columns)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        assert weight.grad is not None
        gradients.append(weight.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_several_layers_at_once(family: str) -> None:
    model = tiny_model(family)
    batch = model.batch([model.passage("Who wrote Hamlet?", "Bob")])
    rows, columns, _ = batch.answer_places()
    changes = {1: linear_change(1), 3: linear_change(3)}
    tail, full = Tail(model, (3, 1)), Tail(model, (3, 1), full=True)
    recording = tail.record(batch)
    assert torch.allclose(
        tail.run(recording, changes, rows, columns), full.run(recording, changes, rows, columns), atol=1e-5
    )


def test_a_final_norm_that_is_not_the_last_step_is_noticed() -> None:
    declared = AnatomyDeclaration(final_norm="model.layers.0.input_layernorm")
    hf = tiny_hf_model("llama")
    torch.nn.init.constant_(hf.model.norm.weight, 3.0)
    model = EditableModel(hf, byte_tokenizer(), declaration=declared)
    with pytest.raises(TailError, match="does more than the final norm"):
        Tail(model, 2).record(model.batch([model.passage("Who?", "Bob")]))


def test_a_head_that_does_something_else_is_noticed() -> None:
    hf = tiny_hf_model("llama")
    original = type(hf).forward

    class Shifted(type(hf)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            output = original(self, *args, **kwargs)
            output.logits = output.logits * 2
            return output

    hf.__class__ = Shifted
    with pytest.raises(TailError, match="not its head"):
        _ = EditableModel(hf, byte_tokenizer()).head


def test_probes_are_removed_and_missing_modules_named() -> None:
    model = tiny_model("llama").model
    with pytest.raises(ModelError, match="no such module"), probing(model, before={"model.nothing": print}):
        pass
    with pytest.raises(RuntimeError, match="inside"), adding(model, {"model.layers.0.mlp.down_proj": lambda x: x}, 1):
        raise RuntimeError("inside")
    assert not model.model.layers[0].mlp.down_proj._forward_hooks
