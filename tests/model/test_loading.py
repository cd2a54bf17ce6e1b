"""Loading a model: what is not there, not whole or not possible is refused with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from errata.errors import ArtifactError, ConfigError
from errata.model import AnatomyDeclaration, EditableModel
from errata.testing import byte_tokenizer, tiny_hf_model


def checkpoint(folder: Path, **changes: Any) -> Path:
    tiny_hf_model("llama", **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_checkpoint_is_loaded(tmp_path: Path, tied: bool) -> None:
    model = EditableModel.load(checkpoint(tmp_path, tie_word_embeddings=tied), device="cpu", dtype="bfloat16")
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    file = checkpoint(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"9 missing weights, model\.layers\.1\.\S+, .* and 6 more\. Download"):
        EditableModel.load(tmp_path)
    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"1 missing weight, lm_head\.weight\."):
        EditableModel.load(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    file = checkpoint(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="cannot load"):
        EditableModel.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"123" * 100])
def test_damaged_weights_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (checkpoint(tmp_path) / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot load"):
        EditableModel.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "foo"}, r"unknown device 'foo'.*Known: .*cpu"),
        ({"device": "cuda:99"}, r"unknown device 'cuda:99'.*Known: .*cpu.*\((this torch|no such GPU)"),
        ({"dtype": "flaot16"}, r"Did you mean 'float16'.*Known: .*bfloat16"),
        ({"dtype": torch.int8}, r"unknown dtype 'int8'"),
        ({"device_map": "auto"}, "takes no device_map"),
        ({"revision": "main", "declaration": AnatomyDeclaration()}, "takes no revision or declaration"),
    ],
)
def test_options_that_are_not_possible_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EditableModel.load("atlas", **options)
