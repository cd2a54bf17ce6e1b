"""Adapters beyond the contract suite: sums in any order, formats, supersession, controls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from errata.adapters import AutoAdapter, BaseIdentity, DeltaAdapter, WeightChange
from errata.edit import Edit
from errata.errors import ArtifactError, BaseMismatchError, ConfigError, EditError, NumericsError
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.testing import tiny_model

PATH = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}


def change(edit_id: str, seed: int, path: str = PATH["llama"]) -> WeightChange:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(32, 1, generator=generator), torch.randn(96, 1, generator=generator)
    return WeightChange(path, (edit_id,), left, right, 1.0)


def adapter_with(model: EditableModel, count: int, path: str = PATH["llama"]) -> DeltaAdapter:
    adapter = DeltaAdapter.for_layers(model, [path], "test", {})
    for number in range(count):
        adapter.add([change(f"e{number}", number, path)])
        adapter.remember(Edit(id=f"e{number}", prompt=f"p{number}", target="t"))
    return adapter


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_weight_change_acts_as_if_it_were_in_the_weight(family: str) -> None:
    model, edited = tiny_model(family), tiny_model(family)
    adapter = adapter_with(model, 3, PATH[family])
    with torch.no_grad():
        weight = weight_of(edited.module(PATH[family]))
        for number in range(3):
            one = change(f"e{number}", number)
            weight += one.left @ one.right.T
    adapter.attach(model)
    batch = model.batch([model.passage("The capital of France is")])
    assert torch.allclose(model.forward(batch).logits, edited.forward(batch).logits, atol=1e-4)


def test_sums_are_the_same_bits_however_they_came_about(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = adapter_with(model, 150)
    contribution = adapter.contributions()[PATH["llama"]]
    adapter.save_pretrained(tmp_path)
    loaded = AutoAdapter.from_pretrained(tmp_path).contributions()[PATH["llama"]]
    first, second = contribution.weight_change(), loaded.weight_change()
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_reverting_subtracts_and_says_how_exactly() -> None:
    model = tiny_model("llama")
    adapter, without = adapter_with(model, 5), adapter_with(model, 4)
    assert adapter.revert("e4").exactness == "exact"
    a, b = (x.contributions()[PATH["llama"]].weight_change() for x in (adapter, without))
    assert a is not None
    assert b is not None
    assert torch.equal(a, b)
    result = adapter.revert("e0")
    assert result.exactness == "approximate"
    assert "3 later changes" in result.reason


def test_edits_written_together_cannot_be_told_apart() -> None:
    adapter = adapter_with(tiny_model("llama"), 0)
    one = change("a", 0)
    adapter.add([WeightChange(one.path, ("a", "b"), one.left, one.right, 1.0)])
    for name in ("a", "b"):
        adapter.remember(Edit(id=name, prompt=name, target="t"))
    with pytest.raises(EditError, match="batch_size=1"):
        adapter.revert("a")
    assert adapter.holds("a")


def test_a_superseded_edit_does_not_come_back_with_a_revert() -> None:
    model = tiny_model("llama")
    batch = model.batch([model.passage("Ann is")])
    base = model.forward(batch).logits
    adapter = adapter_with(model, 2)
    adapter.supersede("e0", "e1")
    assert [edit.id for edit in adapter.edits()] == ["e1"]
    adapter.attach(model)
    adapter.revert("e1")
    assert torch.equal(model.forward(batch).logits, base)


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "not finite"), (0.0, "changed nothing")])
def test_a_change_that_is_none_or_not_finite_leaves_the_adapter_alone(value: float, words: str) -> None:
    adapter = adapter_with(tiny_model("llama"), 1)
    version = adapter.memory_version
    bad = WeightChange(PATH["llama"], ("x",), torch.full((32, 1), value), torch.full((96, 1), value), 1.0)
    with pytest.raises(NumericsError, match=words):
        adapter.add([bad])
    assert adapter.memory_version == version


def test_attaching_twice_or_asking_a_detached_adapter_is_an_error() -> None:
    model = tiny_model("llama")
    adapter = adapter_with(model, 1)
    with pytest.raises(ConfigError, match="not attached"):
        adapter.explain(["p"])
    adapter.attach(model)
    with pytest.raises(ConfigError, match="attached already"):
        adapter.attach(model)


def test_random_content_has_the_same_norm_and_another_direction() -> None:
    model = tiny_model("llama")
    adapter = adapter_with(model, 3)
    noise = adapter.with_random_content(torch.Generator().manual_seed(0))
    (mine,), (other,) = adapter.layer_changes(model), noise.layer_changes(model)
    assert mine.norm == pytest.approx(other.norm, rel=1e-4)
    a, b = (x.contributions()[PATH["llama"]].weight_change() for x in (adapter, noise))
    assert a is not None
    assert b is not None
    assert abs(float((a * b).sum() / (a.norm() * b.norm()))) < 0.2


def saved(folder: Path) -> Path:
    adapter_with(tiny_model("llama"), 2).save_pretrained(folder)
    return folder


def rewrite(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def test_newer_and_unknown_formats_are_refused_with_advice(tmp_path: Path) -> None:
    rewrite(saved(tmp_path / "a"), format_version=99)
    with pytest.raises(ArtifactError, match=r"format 99.*upgrade errata"):
        AutoAdapter.from_pretrained(tmp_path / "a")
    rewrite(saved(tmp_path / "b"), adapter_type="pool")
    with pytest.raises(ArtifactError, match="unknown adapter type 'pool'"):
        AutoAdapter.from_pretrained(tmp_path / "b")
    with pytest.raises(ArtifactError, match="holds no adapter"):
        AutoAdapter.from_pretrained(tmp_path)


def test_damage_to_the_configuration_or_the_edits_is_noticed(tmp_path: Path) -> None:
    (saved(tmp_path / "a") / "adapter_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        AutoAdapter.from_pretrained(tmp_path / "a")
    edits = saved(tmp_path / "b") / "edits.jsonl"
    edits.write_text(edits.read_text().replace("p0", "p9"))
    with pytest.raises(ArtifactError, match="damaged"):
        AutoAdapter.from_pretrained(tmp_path / "b")


def test_another_base_is_refused_by_its_weights_not_its_name(tmp_path: Path) -> None:
    saved(tmp_path)
    same = tiny_model("llama")
    same.model_id = "renamed"
    AutoAdapter.from_pretrained(tmp_path, model=same).detach()
    with pytest.raises(BaseMismatchError, match="was made for 'tiny-llama-0'"):
        AutoAdapter.from_pretrained(tmp_path, model=tiny_model("llama", seed=3))


def test_the_base_is_named_in_full(tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = json.loads((saved(tmp_path) / "adapter_config.json").read_text())
    assert BaseIdentity(**config["base"]) == BaseIdentity.of(model)
