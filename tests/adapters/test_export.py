"""Exports, loaded by what they are for: plain transformers, plain peft, plain safetensors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from errata.adapters import DeltaAdapter, WeightChange
from errata.adapters.export import PATCH_FILE, Exported, export_adapter
from errata.edit import Edit
from errata.editors import editor
from errata.errors import BaseMismatchError, ConfigError
from errata.model import EditableModel
from errata.testing import byte_tokenizer, tiny_hf_model, tiny_model

# peft asks transformers by a name that transformers is about to give up.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROMPTS = ("The capital of France", "Bob wrote Hamlet and", "x")
LAYERS = (1, 2)


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> EditableModel:
    """A tiny checkpoint in a folder, loaded from there."""
    tiny_hf_model(family, **changes).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return EditableModel.load(folder, dtype=dtype)


def adapter_of(model: EditableModel, ranks: tuple[int, ...] = (3, 3), residue: float = 0.0) -> DeltaAdapter:
    """Changes of two layers, one edit per unit of rank, that are felt."""
    generator = torch.Generator().manual_seed(0)
    paths = [model.anatomy.mlp_output[layer] for layer in LAYERS]
    adapter = DeltaAdapter.for_layers(model, paths, "test", {})
    for path, rank in zip(paths, ranks, strict=True):
        outputs, inputs = adapter._layers[path].shape
        for number in range(rank):
            left, right = (torch.randn(size, 1, generator=generator) for size in (outputs, inputs))
            dense = {path: residue * torch.randn(outputs, inputs, generator=generator)} if residue else {}
            adapter.add([WeightChange(path, (f"e{number}",), left, 0.1 * right)], dense)
            adapter.remember(Edit(id=f"e{number}", prompt=f"p{number}", target="t"))
    return adapter


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> list[Tensor]:
    """Of any model that transformers' own interface calls, one prompt at a time."""
    return [model(**tokenizer(prompt, return_tensors="pt")).logits.float() for prompt in PROMPTS]


def wanted(model: EditableModel, adapter: DeltaAdapter) -> list[Tensor]:
    """What errata itself answers with the adapter, which is not what the base answers."""
    base = logits(model.model, model.tokenizer)
    adapter.attach(model)
    found = logits(model.model, model.tokenizer)
    adapter.detach()
    assert max(float((a - b).abs().max()) for a, b in zip(base, found, strict=True)) > 0.1
    return found


def furthest(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def exported_lora(exported: Exported, model: EditableModel) -> list[Tensor]:
    """The answers of the base with the exported factors, both loaded from disk by plain transformers and peft."""
    base = AutoModelForCausalLM.from_pretrained(model.model_id, dtype=model.dtype)
    return logits(PeftModel.from_pretrained(base, exported.folder), model.tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_is_a_plain_checkpoint(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "base", dtype)
    adapter = adapter_of(model)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    exported = export_adapter(adapter, model, "merged", tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == dtype
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    # The very weights that errata computes with.
    assert furthest(logits(loaded, tokenizer), wanted(model, adapter)) == 0.0
    lost = [module.relative_error for module in exported.modules]
    assert all(0 < one < (1e-6 if dtype == torch.float32 else 1e-2) for one in lost)


def test_merged_does_not_see_what_is_attached(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "base")
    adapter, other = adapter_of(model), adapter_of(model, (5, 5))
    expected = wanted(model, adapter)
    other.attach(model)
    adapter.attach(model)
    export_adapter(adapter, model, "merged", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert furthest(logits(loaded, model.tokenizer), expected) == 0.0


@pytest.mark.parametrize("ranks", [(3, 3), (2, 5)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_loads_with_plain_peft_and_is_exact(family: str, ranks: tuple[int, int], tmp_path: Path) -> None:
    model = saved(family, tmp_path / "base")
    adapter = adapter_of(model, ranks)
    exported = export_adapter(adapter, model, "lora", tmp_path / "out")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == {*exported.files}
    assert [(module.rank, module.relative_error) for module in exported.modules] == [(rank, 0.0) for rank in ranks]
    assert furthest(exported_lora(exported, model), wanted(model, adapter)) < 1e-4


def test_lora_is_scaled_by_one_also_for_those_who_read_no_patterns(tmp_path: Path) -> None:
    model = saved("gpt2", tmp_path / "base")
    export_adapter(adapter_of(model, (2, 5)), model, "lora", tmp_path / "out")
    config = LoraConfig.from_pretrained(tmp_path / "out")
    assert (config.r, config.lora_alpha, config.fan_in_fan_out) == (5, 5, True)
    assert config.rank_pattern == config.alpha_pattern == {model.anatomy.mlp_output[1]: 2}
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    assert shapes[f"base_model.model.{model.anatomy.mlp_output[1]}.lora_A.weight"] == (2, 96)
    assert shapes[f"base_model.model.{model.anatomy.mlp_output[2]}.lora_B.weight"] == (32, 5)


def test_lora_on_a_base_in_half_precision(tmp_path: Path) -> None:
    """peft adds in float32 what errata rounds into the weight: they agree as far as bfloat16 goes."""
    model = saved("llama", tmp_path / "base", torch.bfloat16)
    adapter = adapter_of(model)
    exported = export_adapter(adapter, model, "lora", tmp_path / "out")
    expected = wanted(model, adapter)
    size = max(float(one.abs().max()) for one in expected)
    assert furthest(exported_lora(exported, model), expected) < 0.03 * size


def test_a_rank_beyond_the_width_is_brought_down_to_it(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "base")
    adapter = adapter_of(model, (40, 3))
    exported = export_adapter(adapter, model, "lora", tmp_path / "out")
    assert [module.rank for module in exported.modules] == [32, 3]
    assert exported.modules[0].relative_error < 1e-12
    assert furthest(exported_lora(exported, model), wanted(model, adapter)) < 1e-4


@pytest.mark.parametrize("residue", [0.0, 0.01])
def test_a_smaller_rank_is_the_nearest_there_is_and_says_how_far_off(residue: float, tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "base")
    adapter = adapter_of(model, (6, 6), residue)
    exported = export_adapter(adapter, model, "lora", tmp_path / "out", rank=4)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for module in exported.modules:
        change = adapter.contributions()[module.module].weight_change()
        assert change is not None
        name = f"base_model.model.{module.module}"
        left, right = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
        values = torch.linalg.svdvals(change.double())
        assert module.rank == 4
        assert float((change - left @ right).norm() / change.norm()) == pytest.approx(module.relative_error, rel=1e-4)
        assert module.relative_error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-4)


def test_a_dense_change_gets_a_rank_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fine-tuning leaves: at its full rank it is all there, at 64, or here less, the rest is stated."""
    model = saved("llama", tmp_path / "base")
    tuned = editor("ft", model, learning_rate=1e-2, steps=20)
    tuned.edit([Edit(prompt="The capital of France", target="Rome")])
    adapter = tuned.adapter
    assert isinstance(adapter, DeltaAdapter)
    adapter.detach()
    exported = export_adapter(adapter, model, "lora", tmp_path / "whole")
    assert [module.rank for module in exported.modules] == [32]
    assert furthest(exported_lora(exported, model), wanted(model, adapter)) < 1e-4
    monkeypatch.setattr("errata.adapters.export._DENSE_RANK", 8)
    (module,) = export_adapter(adapter, model, "lora", tmp_path / "eight").modules
    assert module.rank == 8
    assert module.relative_error > 1e-3


@pytest.mark.parametrize(("ranks", "residue"), [((3, 3), 0.0), ((3, 3), 0.01), ((3, 30), 0.0)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_patch_is_added_to_the_parameters_it_names(
    family: str, ranks: tuple[int, int], residue: float, tmp_path: Path
) -> None:
    model = saved(family, tmp_path / "base")
    adapter = adapter_of(model, ranks, residue)
    exported = export_adapter(adapter, model, "patch", tmp_path / "out")
    in_factors = [module.rank for module in exported.modules]
    assert in_factors == [None if residue or rank > 24 else rank for rank in ranks]
    patched, patch = AutoModelForCausalLM.from_pretrained(model.model_id), load_file(tmp_path / "out" / PATCH_FILE)
    for name in {key.rpartition(".")[0] for key in patch}:
        dense = patch.get(f"{name}.dense")
        change = patch[f"{name}.left"] @ patch[f"{name}.right"] if dense is None else dense
        patched.get_parameter(name).data += change
    assert furthest(logits(patched, model.tokenizer), wanted(model, adapter)) < 1e-4
    with safe_open(tmp_path / "out" / PATCH_FILE, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["base_fingerprint"] == model.fingerprint
    assert metadata["edits"] == str(max(ranks))


@pytest.mark.parametrize("form", ["merged", "lora", "patch"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_read_me_says_how_to_load_what_it_lies_beside(
    family: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(family, tmp_path / "base")
    adapter = adapter_of(model)
    export_adapter(adapter, model, form, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert model.fingerprint in text
    assert f"| {model.anatomy.mlp_output[1]} | {'dense' if form == 'merged' else 3} |" in text
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path / "out")
    exec(compile(snippet, "README.md", "exec"), names)
    assert furthest(logits(names["model"], model.tokenizer), wanted(model, adapter)) < 1e-4


def test_atlas_is_named_as_it_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EditableModel.load("atlas")
    adapter = adapter_of(model)
    export_adapter(adapter, model, "patch", tmp_path / "out")
    (snippet,) = re.findall(
        r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path / "out")
    exec(compile(snippet, "README.md", "exec"), names)
    assert furthest(logits(names["model"], model.tokenizer), wanted(model, adapter)) < 1e-4


def test_an_encoder_is_exported_too(tmp_path: Path) -> None:
    model = tiny_model("t5")
    export_adapter(adapter_of(model), model, "lora", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert PeftModel.from_pretrained(tiny_hf_model("t5"), tmp_path / "out").get_nb_trainable_parameters()[0] == 0


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "base", tie_word_embeddings=True)
    adapter = adapter_of(model)
    export_adapter(adapter, model, "merged", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert furthest(logits(loaded, model.tokenizer), wanted(model, adapter)) == 0.0


def test_an_edited_weight_that_is_tied_cannot_be_merged(tmp_path: Path) -> None:
    hf = tiny_hf_model("llama")
    first, second = (hf.model.layers[layer].mlp.down_proj for layer in LAYERS)
    second.weight = first.weight
    model = EditableModel(hf, byte_tokenizer(), model_id="tied")
    adapter = adapter_of(model)
    with pytest.raises(ConfigError, match=r"is tied to model.layers.2.mlp.down_proj.weight, .* as lora or patch"):
        export_adapter(adapter, model, "merged", tmp_path / "merged")
    export_adapter(adapter, model, "lora", tmp_path / "lora")
    found = logits(PeftModel.from_pretrained(hf, tmp_path / "lora"), model.tokenizer)
    fresh = tiny_hf_model("llama")
    fresh.model.layers[2].mlp.down_proj.weight = fresh.model.layers[1].mlp.down_proj.weight
    again = EditableModel(fresh, byte_tokenizer(), model_id="tied")
    assert furthest(found, wanted(again, adapter)) < 1e-4


@pytest.mark.parametrize(
    ("method", "settings", "why"),
    [
        ("memoir", {"contexts": 0, "threshold": 0.6}, "all columns would act on everything"),
        ("grace", {"radius": 0.3}, "a content of its own"),
        ("melo", {"radius": 0.3}, "a content of its own"),
        ("wise", {"contexts": 0}, "Merging joins side memories with one another, not with the base"),
    ],
)
def test_what_a_router_decides_is_no_weight(method: str, settings: dict[str, Any], why: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = editor(method, model, layer=1, steps=5, **settings).adapter
    for form in ("merged", "lora", "patch"):
        with pytest.raises(ConfigError, match=why) as caught:
            export_adapter(adapter, model, form, tmp_path / form)
        assert f"an adapter of '{method}'" in str(caught.value)
        assert "errata edit --edits ADAPTER/edits.jsonl" in str(caught.value)
        assert not (tmp_path / form).exists()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = adapter_of(model)
    with pytest.raises(ConfigError, match=r"unknown format 'mergd'. Did you mean 'merged'"):
        export_adapter(adapter, model, "mergd", tmp_path / "out")
    with pytest.raises(ConfigError, match="only the format lora takes a rank"):
        export_adapter(adapter, model, "merged", tmp_path / "out", rank=3)
    with pytest.raises(ConfigError, match="at least 1"):
        export_adapter(adapter, model, "lora", tmp_path / "out", rank=0)
    with pytest.raises(BaseMismatchError, match="was made for"):
        export_adapter(adapter, tiny_model("llama", seed=1), "lora", tmp_path / "out")
    with pytest.raises(ConfigError, match="changes no weight yet"):
        export_adapter(adapter_of(model, (0, 0)), model, "lora", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep", encoding="utf-8")
    for place in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(ConfigError, match="is not an empty folder, and nothing is overwritten"):
            export_adapter(adapter, model, "lora", place)
    assert (tmp_path / "full" / "mine.txt").read_text(encoding="utf-8") == "keep"
