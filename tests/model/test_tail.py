"""The tail equals the full run, on every family, at every layer, in any state of the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from errata.errors import ModelError, TailError
from errata.model import AnatomyDeclaration, EditableModel
from errata.model.probes import adding, probing
from errata.model.tail import Tail
from errata.testing import FAMILIES, byte_tokenizer, tiny_hf_model, tiny_model

POST_NORM = {"gemma2", "gemma3", "olmo2"}


def linear_change(seed: int) -> Callable[[Tensor], Tensor]:
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(seed)) * 0.1
    return lambda inputs: inputs @ weight.T


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
        assert torch.allclose(unchanged, base, atol=1e-5)
        changed = tail.run(recording, linear_change(layer), rows, columns)
        assert torch.allclose(changed, full.run(recording, linear_change(layer), rows, columns), atol=1e-5)
        assert not torch.allclose(changed, base, atol=1e-2)
        assert tail._additive is (family not in POST_NORM)


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
