"""LoRA: peft's layers stand in the model while a batch is trained, and nothing of them stays but the factors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch

from errata.adapters import DeltaAdapter
from errata.edit import Edit
from errata.editors import lora
from errata.editors.lora import Lora, LoraConfig
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.edited_linear import EditedLinear
from errata.testing import tiny_hf_model, tiny_model

EDIT = Edit(prompt="The capital of France", target="Rome", subject="France")
ANOTHER = Edit(prompt="Bob wrote Hamlet", target="Alice", subject="Hamlet")
TINY: dict[str, Any] = {"targets": "attention", "learning_rate": 5e-3, "steps": 20, "guard": "off"}


@pytest.mark.parametrize(
    ("family", "targets", "names"),
    [
        ("llama", "attention", {"self_attn.q_proj", "self_attn.v_proj"}),
        ("gpt2", "attention", {"attn.c_attn"}),
        ("opt", "attention", {"self_attn.q_proj", "self_attn.v_proj"}),
        ("phi3", "attention", {"self_attn.qkv_proj"}),
        ("olmo2", "attention", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),  # peft knows no choice
        ("llama", "mlp", {"mlp.down_proj"}),
        ("gpt2", "mlp", {"mlp.c_proj"}),
    ],
)
def test_which_projections_are_changed(family: str, targets: Any, names: set[str]) -> None:
    model = tiny_model(family)
    editor = Lora(model, layers=(0, -1), **{**TINY, "targets": targets})
    blocks = [model.anatomy.blocks[0], model.anatomy.blocks[3]]
    assert set(editor.adapter.contributions()) == {f"{block}.{name}" for block in blocks for name in names}
    assert editor.edit([EDIT]).applied[0].probability_after > 0.02


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_is_restored_module_by_module(family: str) -> None:
    model = tiny_model(family)
    editor = Lora(model, **TINY)
    parameter = next(model.model.parameters())
    parameter.requires_grad_(True)
    modules = dict(model.model.named_modules())
    trained = {name for name, one in model.model.named_parameters() if one.requires_grad}
    weights = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    editor.edit([EDIT])
    after = dict(model.model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())
    assert {name for name, one in model.model.named_parameters() if one.requires_grad} == trained
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.model.state_dict().items())
    assert not hasattr(model.model, "peft_config")
    editor.adapter.detach()
    assert not any(isinstance(module, EditedLinear) for module in model.model.modules())


def test_the_model_is_restored_when_training_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    editor = Lora(model, **TINY)
    modules = dict(model.model.named_modules())

    def failing(*args: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(lora, "target_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        editor.edit([EDIT])
    assert {name: id(one) for name, one in model.model.named_modules()} == {n: id(one) for n, one in modules.items()}
    assert not editor.adapter.edits()


def test_the_factors_say_what_peft_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits while peft's layers stand in the model are those of the change of weight that is left of them."""
    model = tiny_model("gpt2")
    editor = Lora(model, **TINY)
    batch = model.batch([model.passage(EDIT.prompt)])
    seen: dict[str, torch.Tensor] = {}
    original = lora._lora_layers

    @lora.contextmanager
    def watched(*args: Any) -> Iterator[Any]:
        with original(*args) as layers:
            assert isinstance(model.module(next(iter(layers))), peft.tuners.lora.LoraLayer)
            with torch.no_grad():
                seen["first"] = model.forward(batch).logits
            yield layers
            with torch.no_grad():
                seen["last"] = model.forward(batch).logits

    with torch.no_grad():
        base = model.forward(batch).logits
    monkeypatch.setattr(lora, "_lora_layers", watched)
    editor.edit([EDIT])
    with torch.no_grad():
        edited = model.forward(batch).logits
    assert torch.equal(seen["first"], base)  # B is zero at first
    torch.testing.assert_close(seen["last"], edited, rtol=1e-4, atol=1e-4)
    assert float((edited - base).abs().max()) > 0.1


def test_a_batch_leaves_one_change_per_projection_and_is_subtracted() -> None:
    editor = Lora(tiny_model("llama"), rank=3, alpha=6, layers=(1,), **TINY)
    editor.edit([EDIT])
    editor.edit([ANOTHER])
    assert isinstance(editor.adapter, DeltaAdapter)
    changes = editor.adapter._changes
    assert [(change.edit_ids, change.left.shape[1], change.right.shape[1]) for change in changes] == [
        ((edit.id,), 3, 3) for edit in (EDIT, ANOTHER) for _ in range(2)
    ]
    assert not torch.equal(changes[0].right, changes[2].right)  # each batch begins in directions of its own
    assert editor.adapter.revert(EDIT.id).exactness == "approximate"
    assert editor.adapter.revert(ANOTHER.id).exactness == "exact"


def test_it_stops_when_it_is_done() -> None:
    # The final norm bounds a random model's logits: its loss cannot fall below about 0.7.
    quick = Lora(tiny_model("llama"), **{**TINY, "steps": 200, "stop_loss": 1.0})
    assert 1 < (quick.edit([EDIT]).applied[0].steps or 0) < 100


def test_in_half_precision_the_factors_are_trained_in_full() -> None:
    whole = tiny_hf_model("llama").to(torch.bfloat16)
    model = EditableModel(whole, tiny_model("llama").tokenizer, model_id="half")
    editor = Lora(model, learning_rate=1e-4, steps=5, guard="off")
    editor.edit([EDIT])
    assert isinstance(editor.adapter, DeltaAdapter)
    left = editor.adapter._changes[0].left
    assert not torch.equal(left, left.bfloat16().float())


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"peft, which is not installed: pip install 'errata\[peft\]'"):
        Lora(tiny_model("llama"))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"steps": 0}, {"alpha": 0}, {"learning_rate": 0.0}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least one step"):
        LoraConfig(**settings)
