"""Adapters beyond the contract suite: sums in any order, formats, supersession, controls."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import errata.adapters.base
from errata.adapters import AutoAdapter, BaseIdentity, DeltaAdapter, WeightChange
from errata.edit import Edit
from errata.editors import editor
from errata.errors import ArtifactError, BaseMismatchError, ConfigError, EditError, NumericsError
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.model.probes import capturing_inputs
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


def test_random_content_moves_outputs_as_far_in_another_direction() -> None:
    model = tiny_model("llama")
    adapter = adapter_with(model, 3)
    residue = torch.randn(32, 96, generator=torch.Generator().manual_seed(9))
    adapter.add([change("dense", 7)], {PATH["llama"]: residue})
    noise = adapter.with_random_content(torch.Generator().manual_seed(0))
    (mine,), (other,) = adapter.layer_changes(model), noise.layer_changes(model)
    assert mine.norm == pytest.approx(other.norm, rel=1e-4)
    assert mine.entries == other.entries
    a, b = (x.contributions()[PATH["llama"]].weight_change() for x in (adapter, noise))
    assert a is not None
    assert b is not None
    inputs = torch.randn(50, 96, generator=torch.Generator().manual_seed(1))
    assert torch.allclose((inputs @ a.T).norm(dim=1), (inputs @ b.T).norm(dim=1), rtol=1e-4)
    assert torch.cosine_similarity(inputs @ a.T, inputs @ b.T).mean().abs() < 0.2
    for one, turned in zip(adapter._changes, noise._changes, strict=True):
        assert torch.equal(one.right, turned.right)
        assert float(one.left.norm()) == pytest.approx(float(turned.left.norm()), rel=1e-4)
    assert not adapter_with(model, 0).with_random_content(torch.Generator().manual_seed(0)).edits()


def test_a_layer_that_the_adapter_does_not_cover_is_refused_before_anything_is_written() -> None:
    adapter = adapter_with(tiny_model("llama"), 1)
    before, version = adapter._state()[0].keys(), adapter.memory_version
    elsewhere = "model.layers.2.mlp.down_proj"
    for changes, residues in (
        ([change("a", 1), change("a", 2, elsewhere)], {}),
        ([change("a", 1)], {elsewhere: torch.ones(32, 96)}),
    ):
        with pytest.raises(ConfigError, match=rf"covers {PATH['llama']}, not {elsewhere}"):
            adapter.add(changes, residues)
    assert adapter._state()[0].keys() == before
    assert adapter.memory_version == version
    adapter.revert("e0")


def test_an_adapter_that_cannot_attach_everywhere_is_attached_nowhere() -> None:
    model = tiny_model("llama")
    adapter = DeltaAdapter(BaseIdentity.of(model), shapes={PATH["llama"]: (32, 96), "model.layers.9.mlp": (32, 96)})
    base = model.module(PATH["llama"])
    with pytest.raises(AttributeError):
        adapter.attach(model)
    assert not adapter.is_attached
    assert model.module(PATH["llama"]) is base
    assert "generate" not in vars(model.model)  # nobody follows its passes any more


TAUGHT: dict[str, dict[str, Any]] = {
    "ft": {"learning_rate": 1e-2, "steps": 20},
    "rome": {"use_statistics": False, "contexts": 0, "steps": 20},
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["ft", "rome"])
def test_a_weight_change_scores_its_own_prompt_highest(method: str, family: str) -> None:
    layer = {"layers": (0,)} if method == "ft" else {"layer": 0}
    made = editor(method, tiny_model(family), **TAUGHT[method], **layer)
    mine = Edit(prompt="The capital of France", target="Rome", subject="France")
    made.edit([mine])
    own, *others = made.adapter.explain([mine.prompt, "Zed was born in", "Who is Bob?", "The flute of Ann"])
    assert own.score == pytest.approx(1.0, rel=1e-3)
    assert own.fires
    # The last one begins with the same word: what it has in common with the edit says nothing.
    assert all(other.score < 0.95 for other in others)


def test_the_first_token_of_a_prompt_counts_only_where_it_is_alone() -> None:
    model, path = tiny_model("gpt2"), PATH["gpt2"]
    with capturing_inputs(model.model, [path], 1) as inputs:
        model.trunk_states(model.batch([model.passage("Abc")]))
    keys = inputs[path][0]
    adapter = DeltaAdapter.for_layers(model, [path], "test", {})
    adapter.add([WeightChange(path, ("sink",), torch.ones(32, 1), keys[:1].T, 1.0)])
    adapter.remember(Edit(id="sink", prompt="p", target="t"))
    effects = (keys @ keys[0]).abs() * 32**0.5
    assert float(effects.argmax()) == 0
    lone, longer = (adapter.explain([prompt], model)[0].score for prompt in ("", "Abc"))
    assert lone == pytest.approx(float(effects[0]), rel=1e-4)
    assert longer == pytest.approx(float(effects[1:].max()), rel=1e-4)


def test_strength_is_measured_on_the_layers_device() -> None:
    inputs, counted = torch.zeros(2, 3, 96, device="meta"), torch.ones(2, 3, dtype=torch.bool)
    assert change("a", 0).strength(inputs, counted).shape == (2,)


def saved(folder: Path) -> Path:
    adapter_with(tiny_model("llama"), 2).save_pretrained(folder)
    return folder


def rewrite(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


class Killed(BaseException):
    """The process ended here."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Whatever writes does so `step` times; the next time it is cut off halfway and nothing is written any more."""
    left = itertools.count(step, -1)

    def until_then(write: Any, halfway: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            now = next(left)
            if now == 0:
                halfway(*args)
            if now <= 0:
                raise Killed
            return write(*args, **kwargs)

        return counted

    def half(path: Any) -> None:
        Path(path).write_bytes(b"half")

    with pytest.MonkeyPatch.context() as patch:
        base = errata.adapters.base
        patch.setattr(base, "save_file", until_then(base.save_file, lambda tensors, path: half(path)))
        patch.setattr(base, "write_edits", until_then(base.write_edits, lambda path, edits: half(path)))
        patch.setattr(Path, "write_text", until_then(Path.write_text, lambda path, text: half(path)))
        patch.setattr(os, "replace", until_then(os.replace, lambda *_: None))
        yield


def test_a_save_that_is_killed_leaves_the_old_adapter_or_the_new(tmp_path: Path) -> None:
    model = tiny_model("llama")
    versions = [adapter_with(model, count) for count in (2, 3, 4)]

    def held(folder: Path) -> int:
        loaded = AutoAdapter.from_pretrained(folder)
        number = len(loaded.edits())
        mine, saved_one = (x.contributions()[PATH["llama"]].weight_change() for x in (versions[number - 2], loaded))
        assert mine is not None
        assert saved_one is not None
        assert torch.equal(mine, saved_one)
        assert loaded.edits() == versions[number - 2].edits()
        return number

    versions[0].save_pretrained(tmp_path / "before")
    plain = {"adapter_config.json", "adapter_model.safetensors", "edits.jsonl"}
    outcomes = []
    for step in itertools.count():
        killed = tmp_path / f"killed-{step}"
        shutil.copytree(tmp_path / "before", killed)
        try:
            with killed_at(step):
                versions[1].save_pretrained(killed)
        except Killed:
            outcomes.append(held(killed))
        else:
            assert {path.name for path in killed.iterdir()} == plain
            break
        for again in range(step + 4):  # and the next save, over what the first one left, killed too
            twice = tmp_path / f"killed-{step}-{again}"
            shutil.copytree(killed, twice)
            with suppress(Killed), killed_at(again):
                versions[2].save_pretrained(twice)
            assert held(twice) in (outcomes[-1], 4)
        versions[2].save_pretrained(killed)
        assert held(killed) == 4
        assert {path.name for path in killed.iterdir()} == plain
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {2, 3}


def test_newer_and_unknown_formats_are_refused_with_advice(tmp_path: Path) -> None:
    rewrite(saved(tmp_path / "a"), format_version=99)
    with pytest.raises(ArtifactError, match=r"format 99.*upgrade errata"):
        AutoAdapter.from_pretrained(tmp_path / "a")
    rewrite(saved(tmp_path / "b"), adapter_type="cellar")
    with pytest.raises(ArtifactError, match="unknown adapter type 'cellar'"):
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


def test_types_of_adapter_from_other_packages_are_found_by_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(saved(tmp_path), adapter_type="mine")
    entry = SimpleNamespace(name="mine", value=f"{__name__}:Mine")
    monkeypatch.setattr("errata.adapters.registry.entry_points", lambda group: [entry] * (group == "errata.adapters"))
    assert type(AutoAdapter.from_pretrained(tmp_path)) is Mine
    entry.name = "delta"
    with pytest.raises(ConfigError, match="two types of adapter are called 'delta'"):
        AutoAdapter.from_pretrained(tmp_path)


class Mine(DeltaAdapter):
    adapter_type = "mine"


def test_similarity_is_the_cosine_with_the_unedited_weight() -> None:
    model = tiny_model("llama")
    path = model.anatomy.mlp_output[1]
    tuned = editor("ft", model, layers=(1,), learning_rate=1e-2, steps=20)
    (untouched,) = tuned.adapter.layer_changes(model)
    assert (untouched.norm, untouched.similarity) == (0.0, pytest.approx(1.0))
    tuned.edit([Edit(prompt="Ann plays the", target="flute")])
    (change,) = tuned.adapter.layer_changes(model)
    total = tuned.adapter.contributions()[path].weight_change()
    assert total is not None
    with tuned.adapter.detached():
        base = weight_of(model.module(path)).detach().clone().flatten()
    assert change.similarity == pytest.approx(float(torch.cosine_similarity(base, base + total.flatten(), dim=0)))
    assert change.similarity is not None
    assert change.similarity < 1.0
