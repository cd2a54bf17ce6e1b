"""What is learned from in front of a text: the same attention as an adapter's, and what it looks at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from errata.errors import ModelError
from errata.model import EditableModel
from errata.model.prefix_reading import _attend, reading
from errata.model.prefixed_attention import Prefix, PrefixedAttention
from errata.model.probes import probing
from errata.testing import tiny_model

PROMPTS = [("Where was Ann born?", "Rome."), ("The capital of France", "Paris."), ("Zed", "plays the flute.")]
PLACES = 5
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi3", "olmo2")


def prefixes_of(model: EditableModel, rows: int, layer: int) -> Prefix:
    attention = PrefixedAttention(model, layer)
    generator = torch.Generator().manual_seed(layer)
    states = torch.randn(rows, PLACES, model.anatomy.hidden_size, generator=generator)
    keys, values = attention.keys_and_values(states, torch.arange(-PLACES, 0.0).expand(rows, -1))
    visible = torch.ones(rows, PLACES, dtype=torch.bool)
    visible[0, 2] = False
    return Prefix(keys, values, visible)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_reads_what_an_adapter_reads(family: str, shared: bool) -> None:
    model = tiny_model(family)
    batch = model.batch([model.passage(*pair) for pair in PROMPTS], side="right")
    attentions = [PrefixedAttention(model, layer) for layer in range(model.layer_count)]
    prefixes = [prefixes_of(model, 1 if shared else len(PROMPTS), layer) for layer in range(model.layer_count)]
    looked: list[Tensor] = []

    def behind(layer: int) -> Any:
        def probe(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            return args, attentions[layer].behind(prefixes[layer], states, kwargs)

        return probe

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        looked.append(output[1][..., :PLACES])

    model.model.config._attn_implementation = "eager"
    paths = [one.path for one in attentions]
    before = {path: behind(layer) for layer, path in enumerate(paths)}
    with torch.no_grad(), probing(model.model, before=before, after=dict.fromkeys(paths, look)):
        expected = model.trunk_states(batch)
    with torch.no_grad(), reading(model, attentions, prefixes) as shares:
        found = model.trunk_states(batch)
    assert model.model.config._attn_implementation == "eager", "as it was"
    real = batch.mask.bool()
    assert torch.allclose(found[real], expected[real], atol=1e-5)
    for (share,), its in zip(shares, looked, strict=True):
        assert torch.allclose(share.transpose(1, 2)[real], its.transpose(1, 2)[real], atol=1e-6)


def test_gradients_reach_keys_values_and_what_was_looked_at() -> None:
    model = tiny_model("llama")
    batch = model.batch([model.passage(*pair) for pair in PROMPTS], side="right")
    attentions = [PrefixedAttention(model, layer) for layer in range(model.layer_count)]
    prefixes = [prefixes_of(model, 1, layer) for layer in range(model.layer_count)]
    for one in prefixes:
        one.keys, one.values = (own.clone().requires_grad_() for own in (one.keys, one.values))
    with reading(model, attentions, prefixes) as shares:
        states = model.trunk_states(batch)
    states.sum().backward(retain_graph=True)
    assert all(bool(one.keys.grad.any()) and bool(one.values.grad.any()) for one in prefixes)
    (share,) = shares[0]
    (grad,) = torch.autograd.grad(share[..., 0].sum(), [prefixes[0].keys])
    assert bool(grad[:, :, 0].any())
    assert not bool(share[..., 2].any()), "what a row does not see gets nothing"


def test_an_attention_that_would_not_read_is_told() -> None:
    model = tiny_model("llama")
    attentions = [PrefixedAttention(model, layer) for layer in range(model.layer_count)]
    prefixes = [prefixes_of(model, 1, layer) for layer in range(model.layer_count)]
    with pytest.raises(ModelError, match="nothing can be learned in front of it"), reading(model, attentions, prefixes):
        pass
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ModelError, match="asks its attention for sinks, which is not known here"):
        _attend(attentions[0].attention, query, query, query, None, sinks=query)
