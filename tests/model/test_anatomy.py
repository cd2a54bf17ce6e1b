"""Roles of modules, found by structure on every tiny family."""

from __future__ import annotations

import pytest
import transformers

from errata.errors import AnatomyError
from errata.model import AnatomyDeclaration, find_anatomy
from errata.model.anatomy import weight_of
from errata.testing import FAMILIES, tiny_hf_model

EXPECTED = {
    "llama": ("model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj", "model.norm"),
    "mistral": ("model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj", "model.norm"),
    "qwen2": ("model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj", "model.norm"),
    "qwen3": ("model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj", "model.norm"),
    "gemma2": ("model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj", "model.norm"),
    "gemma3": ("model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj", "model.norm"),
    "phi3": ("model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj", "model.norm"),
    "gpt2": ("transformer.h.{}.mlp.c_proj", "transformer.h.{}.attn.c_proj", "transformer.ln_f"),
    "gptj": ("transformer.h.{}.mlp.fc_out", "transformer.h.{}.attn.out_proj", "transformer.ln_f"),
    "gpt_neox": (
        "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "gpt_neox.layers.{}.attention.dense",
        "gpt_neox.final_layer_norm",
    ),
    "opt": (
        "model.decoder.layers.{}.fc2",
        "model.decoder.layers.{}.self_attn.out_proj",
        "model.decoder.final_layer_norm",
    ),
    "falcon": ("transformer.h.{}.mlp.dense_4h_to_h", "transformer.h.{}.self_attention.dense", "transformer.ln_f"),
    "olmo2": ("model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj", "model.norm"),
    "t5": (
        "encoder.block.{}.layer.1.DenseReluDense.wo",
        "encoder.block.{}.layer.0.SelfAttention.o",
        "encoder.final_layer_norm",
    ),
    "llava": (
        "model.language_model.layers.{}.mlp.down_proj",
        "model.language_model.layers.{}.self_attn.o_proj",
        "model.language_model.norm",
    ),
}
EXPECTED["flan_t5"] = EXPECTED["t5"]


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_are_found(family: str) -> None:
    model = tiny_hf_model(family)
    anatomy = find_anatomy(model)
    mlp, attention, norm = EXPECTED[family]
    assert anatomy.mlp_output == tuple(mlp.format(i) for i in range(4))
    assert anatomy.attention_output == tuple(attention.format(i) for i in range(4))
    assert (anatomy.final_norm, anatomy.head) == (norm, "lm_head")
    assert (anatomy.hidden_size, anatomy.key_width) == (32, (96,) * 4)
    assert tuple(weight_of(model.get_submodule(anatomy.mlp_output[0])).shape) == (32, 96)


def test_an_inner_width_equal_to_the_hidden_size_is_ambiguous_and_can_be_declared() -> None:
    model = tiny_hf_model("llama", intermediate_size=32)
    with pytest.raises(AnatomyError, match=r"found 3: mlp\.gate_proj, mlp\.up_proj, mlp\.down_proj"):
        find_anatomy(model)
    anatomy = find_anatomy(model, AnatomyDeclaration(mlp_output="mlp.down_proj"))
    assert anatomy.mlp_output[0] == "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("MixtralConfig", {"num_local_experts": 4}),
        ("Qwen2MoeConfig", {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
    ],
)
def test_fused_experts_are_refused_with_the_candidates(config: str, changes: dict[str, int]) -> None:
    settings = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    built = getattr(transformers, config)(**settings, **heads, **changes)
    model = transformers.AutoModelForCausalLM.from_config(built)
    with pytest.raises(AnatomyError) as caught:
        find_anatomy(model)
    for words in ("mixture-of-experts", "mlp.experts", "self_attn.o_proj", "AnatomyDeclaration"):
        assert words in str(caught.value)


def test_a_model_without_mlps_lists_what_was_seen() -> None:
    config = transformers.MambaConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(AnatomyError, match=r"(?s)found none.*mixer.out_proj: Linear"):
        find_anatomy(model)


@pytest.mark.parametrize("field", ["blocks", "final_norm", "head"])
def test_a_declared_path_must_exist(field: str) -> None:
    with pytest.raises(AnatomyError, match="does not exist"):
        find_anatomy(tiny_hf_model("llama"), AnatomyDeclaration(**{field: "model.nothing"}))


def test_a_declared_projection_must_be_linear() -> None:
    with pytest.raises(AnatomyError, match="is no linear layer"):
        find_anatomy(tiny_hf_model("llama"), AnatomyDeclaration(mlp_output="mlp.act_fn"))


def test_layers_count_from_either_end() -> None:
    anatomy = find_anatomy(tiny_hf_model("llama"))
    assert [anatomy.layer(i) for i in (0, 3, -1, -4)] == [0, 3, 3, 0]
    with pytest.raises(AnatomyError, match="4 blocks, 0 to 3"):
        anatomy.layer(4)
