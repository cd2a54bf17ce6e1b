"""WISE's promises beyond the contract: settings, masks, margins, shards, replay, ways to revert, the reference's ways."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.adapters import AutoAdapter
from errata.adapters.sides import WiseAdapter, base_layer
from errata.edit import Edit
from errata.editors.wise import Wise, WiseConfig, _mean_violation
from errata.errors import ConfigError, EditError, NumericsError
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.testing import tiny_model

QUICK: dict[str, Any] = {
    "layer": 1,
    "steps": 12,
    "learning_rate": 0.2,
    "contexts": 1,
    "mode": "merge",
    "shards_per_memory": 2,
}
EDITS = (
    Edit(id="france", prompt="The capital of France", target="Rome"),
    Edit(id="hamlet", prompt="Bob wrote Hamlet", target="Alice"),
    Edit(id="ann", prompt="The flute of Ann", target="piano"),
    Edit(id="zed", prompt="Zed was born in", target="Berlin"),
)


def wise(edits: int, model: EditableModel | None = None, **settings: Any) -> tuple[Wise, WiseAdapter]:
    editor = Wise(model or tiny_model("llama"), **{**QUICK, **settings})
    outcome = editor.edit(EDITS[:edits])
    assert not outcome.refused
    assert isinstance(editor.adapter, WiseAdapter)
    return editor, editor.adapter


def deltas(adapter: WiseAdapter) -> list[Tensor]:
    return [memory.delta for memory in adapter.layer.answering]


# --- settings --------------------------------------------------------------------------------------------------------


def shaped(architecture: str, blocks: int, hidden: int, width: int) -> Any:
    """Just enough of a model for its configuration to be looked up."""
    anatomy = SimpleNamespace(hidden_size=hidden, key_width=(width,) * blocks)
    return SimpleNamespace(architecture=architecture, layer_count=blocks, anatomy=anatomy)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("llama", 32, 4096, 11008), (27, 1.0, 70, 5.0, 20.0, 10.0, 0.88)),
        (("llama", 32, 4096, 14336), (29, 0.9, 30, 2.0, 20.0, 10.0, 0.5)),
        (("mistral", 32, 4096, 14336), (27, 1.0, 70, 5.0, 20.0, 10.0, 0.88)),
        (("gptj", 28, 4096, 16384), (21, 1.0, 70, 15.0, 40.0, 20.0, 0.88)),
        (("qwen2", 28, 3584, 18944), (23, 1.0, 70, 5.0, 20.0, 10.0, 0.88)),
    ],
)
def test_published_settings(shape: tuple[str, int, int, int], expected: tuple[float, ...]) -> None:
    config = WiseConfig.for_model(shaped(*shape))
    assert (
        config.layer,
        config.learning_rate,
        config.steps,
        config.margin_low,
        config.margin_high,
        config.margin_gap,
        config.activation_ratio,
    ) == expected
    assert (config.mask_density, config.shard_edits, config.shards_per_memory, config.irrelevant) == (0.2, 500, 2, 1)
    assert (config.merging, config.trim_density, config.norm_clamp, config.weight_decay) == ("ties", 0.53, 1.0, 1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_density": 0.0}, "mask_density must be above 0"),
        ({"shard_edits": 0}, "at least 1 each"),
        ({"contexts": 11}, "must be at most 10 and 200"),
        ({"irrelevant": 201}, "must be at most 10 and 200"),
        ({"compat": "reference"}, "chooses by activation"),
        ({"replay": True}, "replay needs mode='retrieve'"),
        ({"merging": "mean"}, "expected 'ties' or 'sign'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WiseConfig(**settings)


def test_margins_come_from_the_model_in_the_published_proportions() -> None:
    model = tiny_model("llama")
    editor, adapter = wise(0, model)
    editor.prepare()
    margins = adapter.notes["margins"]
    assert margins["margin_high"] == pytest.approx(4 * margins["margin_low"])
    assert margins["margin_high"] == pytest.approx(2 * margins["margin_gap"])
    adapter.detach()
    # A layer whose outputs are twice as large, scored without the nonlinearity, has margins twice as large.
    highs = []
    for scale in (1.0, 2.0):
        model = tiny_model("llama")
        weight_of(model.module(model.anatomy.mlp_output[1])).mul_(scale)
        editor, adapter = wise(0, model, score="linear", margin_low=0.5)
        editor.prepare()
        assert adapter.notes["margins"]["margin_low"] == 0.5
        highs.append(adapter.notes["margins"]["margin_high"])
    assert highs[1] == pytest.approx(2 * highs[0], rel=1e-4)


def test_only_violations_are_averaged() -> None:
    assert float(_mean_violation(torch.tensor([-1.0, 2.0, 4.0, -3.0]))) == 3.0
    assert float(_mean_violation(torch.tensor([-1.0, 0.0]))) == 0.0


def test_prefixes_and_margins_are_made_once_per_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    editor, adapter = wise(1)
    assert len(adapter.notes["contexts"]) == 10
    adapter.save_pretrained(tmp_path)
    adapter.detach()

    def never(*_: Any) -> tuple[str, ...]:
        raise AssertionError("prefixes are made again")

    monkeypatch.setattr("errata.editors.wise.wise_contexts", never)
    again = Wise(editor.model, adapter=AutoAdapter.from_pretrained(tmp_path))
    again.prepare()
    assert isinstance(again.adapter, WiseAdapter)
    assert again.adapter.notes == adapter.notes


# --- training --------------------------------------------------------------------------------------------------------


def test_a_shard_changes_only_the_entries_of_its_mask() -> None:
    editor, adapter = wise(3, shard_edits=2, shards_per_memory=3)
    first, second = (shard for _, shard in adapter.layer.shards())
    masks = [editor.mask(shard) for shard in (first, second)]
    assert not torch.equal(*masks)
    for shard, mask in zip((first, second), masks, strict=True):
        assert float(mask.float().mean()) == pytest.approx(0.2, abs=0.02)
        assert not bool(shard.delta[~mask].any())
        assert float((shard.delta[mask] != 0).float().mean()) > 0.9


def test_no_entry_leaves_the_clamp() -> None:
    _, adapter = wise(1, norm_clamp=1e-3, learning_rate=1.0)
    assert float(deltas(adapter)[0].abs().max()) == pytest.approx(1e-3)


def test_one_step_is_one_step_of_gradient_descent() -> None:
    """Against the definition, by whole forward passes and a change of the weight itself."""
    model = tiny_model("llama")
    editor, adapter = wise(0, model, steps=1, learning_rate=0.5, weight_decay=0.0, contexts=0, mask_density=1.0)
    editor.edit(EDITS[:1])
    adapter.detach()
    weight = weight_of(model.module(adapter.path))
    before = weight.clone()
    batch = model.batch([model.passage(EDITS[0].prompt, EDITS[0].target)])
    rows, columns, labels = batch.answer_places()

    def loss(change: Tensor) -> float:
        with torch.no_grad():
            weight.copy_(before + change)
            logits = model.forward(batch).logits[rows, columns]
            weight.copy_(before)
        return float(torch.nn.functional.cross_entropy(logits, labels))

    # At the first step nothing is moved yet, so that only the likelihood has a gradient; it points along the change.
    (change,) = deltas(adapter)
    small = 1e-3 * change / change.norm()
    slope = (loss(small) - loss(-small)) / 2e-3
    assert slope == pytest.approx(-float(change.norm()) / 0.5, rel=0.02)


def test_margins_push_scores_apart() -> None:
    def scores(**settings: Any) -> tuple[float, float]:
        model = tiny_model("llama")
        editor, adapter = wise(1, model, steps=60, learning_rate=0.1, margin_scale=0.5, irrelevant=40, **settings)
        assert editor._pool is not None
        delta = deltas(adapter)[0]
        unrelated = editor._pool.scores(delta, adapter.layer.activation)
        return adapter.layer.answering[0].threshold, float(unrelated.mean())

    with_margins, without = scores(), scores(margin_loss=False)
    assert with_margins[0] / with_margins[1] > 1.3 * without[0] / without[1]


def test_epsilon_is_the_smallest_score_of_the_edits_as_they_are_scored_later() -> None:
    for settings in ({"shard_edits": 9}, {"shard_edits": 2, "shards_per_memory": 2}):
        _, adapter = wise(4, **settings)
        scores = [explained.score for explained in adapter.explain([edit.prompt for edit in EDITS])]
        assert len(adapter.layer.answering) == 1
        assert min(scores) == pytest.approx(1.0, rel=1e-3)
        assert max(scores) > 1.01


def test_a_training_that_diverges_is_refused_and_leaves_no_trace() -> None:
    editor, adapter = wise(1)
    before, version = deltas(adapter)[0].clone(), adapter.memory_version
    object.__setattr__(editor.config, "learning_rate", math.inf)
    outcome = editor.edit(EDITS[1:2])
    assert "not finite" in outcome.refused[0].reason
    assert torch.equal(deltas(adapter)[0], before)
    assert (adapter.memory_version, [e.id for e in adapter.edits()]) == (version, ["france"])


# --- shards and memories ---------------------------------------------------------------------------------------------


def test_modes_differ_in_how_many_memories_answer() -> None:
    _, retrieved = wise(4, shard_edits=1, mode="retrieve")
    assert [memory.owners for memory in retrieved.layer.answering] == [["france", "hamlet"], ["ann", "zed"]]
    _, merged = wise(4, shard_edits=1, mode="merge")
    assert [memory.owners for memory in merged.layer.answering] == [["france", "hamlet", "ann", "zed"]]
    _, few = wise(2, shard_edits=3, mode="merge")
    assert few.layer.current is not None
    assert not few.layer.memories


def test_an_edit_given_again_after_its_shard_was_closed_is_held_once() -> None:
    editor, adapter = wise(2, shard_edits=1, mode="retrieve", shards_per_memory=1, steps=40)
    editor.edit([Edit(id="france", prompt=EDITS[0].prompt, target="Berlin")])
    assert [memory.owners for memory in adapter.layer.answering] == [["hamlet"], ["france"]]
    assert adapter.explain([EDITS[0].prompt])[0].edit_id == "france"
    adapter.revert("france")
    adapter.revert("hamlet")
    assert not adapter.layer.answering


def test_replay_lets_a_new_edit_move_stored_ones_less() -> None:
    def moved(replay: bool) -> float:
        settings = {"steps": 60, "learning_rate": 0.1, "margin_scale": 0.5, "contexts": 0}
        editor, adapter = wise(4, shard_edits=2, mode="retrieve", shards_per_memory=1, replay=replay, **settings)
        newest = adapter.layer.answering[-1].delta
        tokens = editor._tokens([edit.prompt for edit in EDITS[:2]])
        return float(tokens.scores(newest, adapter.layer.activation).mean())

    assert moved(True) < 0.9 * moved(False)


def test_the_references_ways_change_what_is_written() -> None:
    model = tiny_model("llama")
    base = weight_of(base_layer(model, model.anatomy.mlp_output[1])).clone()
    editor, adapter = wise(2, model, compat="reference", choice="activation", weight_decay=1e-3, steps=5)
    (shard,) = (shard for _, shard in adapter.layer.shards())
    outside = ~editor.mask(shard)
    # Outside of its mask nothing but decay: ten steps that shrink base weight and change together.
    left = (1 - 0.2 * 1e-3) ** 10
    assert torch.allclose((base + shard.delta)[outside], left * base[outside], atol=1e-6)
    fixed, adapter = wise(1, weight_decay=1e-3, steps=5)
    assert not bool(deltas(adapter)[0][~fixed.mask(adapter.layer.shards()[0][1])].any())


# --- taking edits out ------------------------------------------------------------------------------------------------


def test_training_a_shard_again_is_as_if_the_edit_had_never_been_made() -> None:
    editor, adapter = wise(3)
    result = editor.revert("hamlet")
    assert (result.exactness, "2 other edits of its shard were trained again" in result.reason) == ("exact", True)
    without = Wise(tiny_model("llama"), **QUICK)
    without.edit([EDITS[0], EDITS[2]])
    assert isinstance(without.adapter, WiseAdapter)
    assert torch.equal(deltas(adapter)[0], deltas(without.adapter)[0])
    mine, other = adapter.layer.answering[0], without.adapter.layer.answering[0]
    assert (mine.owners, mine.threshold) == (other.owners, other.threshold)
    assert torch.equal(mine.keys, other.keys)
    assert [e.id for e in adapter.edits()] == ["france", "ann"]


def test_other_ways_to_revert_are_at_hand() -> None:
    editor, adapter = wise(4, shard_edits=2, mode="retrieve", shards_per_memory=1)
    assert "tombstone" in editor.revert("zed", how="tombstone").reason
    assert "1 other edits with it: hamlet" in editor.revert("france", how="drop_shard").reason
    assert editor.revert("ann").exactness == "exact"
    assert not adapter.edits()
    with pytest.raises(EditError, match="holds no edit 'ann'"):
        editor.revert("ann")


def test_with_replay_training_again_is_not_called_exact() -> None:
    editor, _ = wise(4, shard_edits=2, mode="retrieve", shards_per_memory=1, replay=True)
    result = editor.revert("france")
    assert (result.exactness, "replay" in result.reason) == ("approximate", True)


def test_an_edit_stays_where_its_shard_cannot_be_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    editor, adapter = wise(3)
    before = deltas(adapter)[0]

    def fails(*_: Any) -> Any:
        raise NumericsError("it is zero")

    monkeypatch.setattr(editor, "_learn", fails)
    with pytest.raises(EditError, match=r"'hamlet' stays: 'france' cannot be trained again without it \(it is zero\)"):
        editor.revert("hamlet")
    assert deltas(adapter)[0] is before
    assert adapter.holds("hamlet")
