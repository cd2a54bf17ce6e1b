"""What each editor promises beyond the contract: published settings, the mathematics, the receipt."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from errata.adapters import ColumnMemory, DeltaAdapter, RoutedAdapter
from errata.edit import Edit
from errata.editors import editor_class, editor_names
from errata.editors.ft import FineTune, FineTuneConfig, _low_rank
from errata.editors.memoir import Memoir, MemoirConfig, calibrate_threshold
from errata.editors.registry import GROUP
from errata.editors.rome import Rome, RomeConfig
from errata.editors.values import ValueSettings, find_target_value
from errata.errors import ConfigError, SpanError
from errata.model.anatomy import weight_of
from errata.routing import TopHashRouter
from errata.testing import tiny_model

EDIT = Edit(prompt="The capital of France", target="Rome", subject="France")
MEMOIR: dict[str, Any] = {"steps": 40, "learning_rate": 3.0, "contexts": 2}
ROME: dict[str, Any] = {"tokens_per_width": 4.0, "steps": 40, "clamp": 40.0, "contexts": 0, "kl_factor": 0.0}


def shaped(architecture: str, blocks: int, hidden: int, width: int) -> Any:
    """Just enough of a model for its configuration to be looked up."""
    anatomy = SimpleNamespace(hidden_size=hidden, key_width=(width,) * blocks)
    return SimpleNamespace(architecture=architecture, layer_count=blocks, anatomy=anatomy)


def test_published_settings_are_used_where_there_are_any() -> None:
    llama3 = shaped("llama", 32, 4096, 14336)
    memoir = MemoirConfig.for_model(llama3)
    assert (memoir.layer, memoir.marked, memoir.learning_rate, memoir.steps, memoir.clip_norm) == (
        27,
        4096,
        1.0,
        30,
        1.0,
    )
    assert "llama3-8b.yaml" in memoir.source
    gptj = RomeConfig.for_model(shaped("gptj", 28, 4096, 16384))
    assert (gptj.layer, gptj.steps, gptj.weight_decay, gptj.clamp, gptj.kl_factor) == (5, 20, 0.5, 4.0, 0.0625)
    xl = RomeConfig.for_model(shaped("gpt2", 48, 1600, 6400))
    assert (xl.layer, xl.source) == (17, "kmeng01/rome, hparams")
    assert FineTuneConfig.for_model(llama3).layers == (21,)


def test_other_sizes_get_derived_settings_that_say_so() -> None:
    unknown = shaped("llama", 16, 2048, 8192)
    memoir = MemoirConfig.for_model(unknown)
    assert memoir.layer == round(27 / 31 * 15)
    assert memoir.marked / 8192 == pytest.approx(4096 / 14336, abs=1e-3)
    assert "scaled" in memoir.source
    given = MemoirConfig.for_model(unknown, steps=5)
    assert given.steps == 5
    assert "given: steps" in given.source


@pytest.mark.parametrize("config", [FineTuneConfig, RomeConfig, MemoirConfig])
def test_configurations_reject_what_they_do_not_know(config: Any) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'steps'"):
        config.for_model(shaped("llama", 16, 2048, 8192), step=5)
    with pytest.raises(ConfigError, match="not known"):
        config.from_record({"colour": "red"})
    with pytest.raises(ConfigError, match="at least 1"):
        config(batch_size=0)
    with pytest.raises(AttributeError):
        config().steps = 3
    assert config.from_record(config().to_record()) == config()


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (RomeConfig, {"variant": "romantic"}, "r-rome"),
        (RomeConfig, {"contexts": 21}, "between 0 and 20"),
        (MemoirConfig, {"decay": "often"}, "active, reference or none"),
        (MemoirConfig, {"threshold": 0.4, "relative_threshold": 0.2}, "not both"),
        (FineTuneConfig, {"learning_rate": 0.0}, "positive learning rate"),
    ],
)
def test_values_that_make_no_sense_are_refused(config: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**settings)


def test_the_registry_offers_the_nearest_name() -> None:
    assert {"ft", "memoir", "rome"} <= set(editor_names())
    with pytest.raises(ConfigError, match=r"unknown method 'memor'. Did you mean 'memoir'\?"):
        editor_class("memor")


def test_other_packages_can_add_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    def entries(group: str) -> list[SimpleNamespace]:
        assert group == GROUP
        return [SimpleNamespace(name="mine", value="errata.editors.ft:FineTune")]

    monkeypatch.setattr("errata.editors.registry.entry_points", entries)
    assert editor_class("mine") is FineTune
    monkeypatch.setattr(
        "errata.editors.registry.entry_points", lambda group: [SimpleNamespace(name="ft", value="other:FineTune")]
    )
    with pytest.raises(ConfigError, match="two editors are called 'ft'"):
        list(editor_names())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_rome_makes_the_averaged_key_give_the_wanted_value(family: str) -> None:
    model = tiny_model(family)
    editor = Rome(model, **ROME)
    editor.prepare()
    layer, path = editor._layer, editor._path
    value = find_target_value(
        model, layer, EDIT, (), ValueSettings(steps=40, weight_decay=1e-3, clamp=40.0, kl_factor=0.0)
    )
    editor.edit([EDIT])
    key = value.keys.mean(0)
    assert isinstance(editor.adapter, DeltaAdapter)
    change = editor.adapter.contributions()[path].weight_change()
    assert change is not None
    wanted = value.initial + value.delta
    moved = value.outputs.mean(0) + change @ key
    assert torch.allclose(moved, wanted, rtol=1e-3, atol=1e-3)


def test_rome_is_the_smallest_change_in_the_metric_of_the_statistics() -> None:
    """Among all W' with W'k = v, r-ROME minimises ||(W'-W) C^(1/2)||: any other rank-one solution is larger."""
    model = tiny_model("llama")
    editor = Rome(model, **ROME)
    editor.edit([EDIT])
    assert isinstance(editor.adapter, DeltaAdapter)
    assert editor._statistics is not None
    (written,) = editor.adapter._changes
    factor = editor._statistics.cholesky
    value = find_target_value(model, editor._layer, EDIT, (), ValueSettings(steps=1))
    key = value.keys.mean(0).double()
    change = written.left.double() @ written.right.double().T
    size = (change @ factor).norm()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        other = torch.randn(96, 1, generator=generator, dtype=torch.float64)
        rival = (change @ key)[:, None] @ other.T / (other.T @ key)
        assert torch.allclose(rival @ key, change @ key)
        assert (rival @ factor).norm() > size


def test_the_original_variant_divides_by_the_bare_key() -> None:
    original = Rome(tiny_model("llama"), variant="original", **{**ROME, "contexts": 3})
    robust = Rome(tiny_model("llama"), **{**ROME, "contexts": 3})
    changes = []
    for editor in (original, robust):
        editor.edit([EDIT])
        assert isinstance(editor.adapter, DeltaAdapter)
        changes.append(editor.adapter._changes[0])
    assert torch.allclose(changes[0].right, changes[1].right, atol=1e-5)
    assert not torch.allclose(changes[0].left, changes[1].left, rtol=1e-2)


def test_a_target_value_needs_a_subject() -> None:
    with pytest.raises(SpanError, match="add the field 'subject'"):
        find_target_value(tiny_model("llama"), 1, Edit(prompt="p", target="t"), (), ValueSettings())


def test_the_search_for_a_value_stays_inside_its_ball() -> None:
    value = find_target_value(tiny_model("llama"), 1, EDIT, (), ValueSettings(steps=30, clamp=0.5))
    assert float(value.delta.norm()) <= 0.5 * float(value.initial.norm()) * 1.001
    assert value.steps == 29


def test_low_rank_factors_are_the_best_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 50, generator=generator)
    left, right = _low_rank(matrix, 5, generator)
    best = float(torch.linalg.svdvals(matrix)[5:].square().sum())
    assert float((matrix - left @ right.T).square().sum()) == pytest.approx(best, rel=0.05)
    exact = torch.randn(30, 3, generator=generator) @ torch.randn(3, 50, generator=generator)
    left, right = _low_rank(exact, 5, generator)
    assert torch.allclose(left @ right.T, exact, atol=1e-4)


def test_ft_respects_its_clamp_and_stops_when_it_is_done() -> None:
    editor = FineTune(tiny_model("llama"), learning_rate=1e-2, steps=60, clamp=1e-3)
    editor.edit([EDIT])
    assert isinstance(editor.adapter, DeltaAdapter)
    change = next(iter(editor.adapter.contributions().values())).weight_change()
    assert change is not None
    assert float(change.abs().max()) <= 1e-3 * 1.001
    # The final norm bounds a random model's logits: its loss cannot fall below about 0.7.
    quick = FineTune(tiny_model("llama"), learning_rate=5e-2, steps=500, stop_loss=1.0)
    assert (quick.edit([EDIT]).applied[0].steps or 0) < 500


def test_ft_in_a_batch_writes_every_edit() -> None:
    edits = [
        EDIT,
        Edit(prompt="Who wrote Hamlet?", target="Bob", subject="Hamlet"),
        Edit(prompt="Ann is", target="Berlin"),
    ]
    editor = FineTune(tiny_model("llama"), learning_rate=1e-2, steps=100, batch_size=3)
    outcome = editor.edit(edits)
    assert [e.took for e in outcome.applied] == [True] * 3
    assert len({e.steps for e in outcome.applied}) == 1


def memoir_adapter(**settings: Any) -> tuple[Memoir, RoutedAdapter, ColumnMemory]:
    editor = Memoir(tiny_model("llama"), **{**MEMOIR, **settings})
    editor.edit([EDIT])
    assert isinstance(editor.adapter, RoutedAdapter)
    assert isinstance(editor.adapter.memory, ColumnMemory)
    return editor, editor.adapter, editor.adapter.memory


def test_memoir_writes_into_its_own_columns_only() -> None:
    _, adapter, memory = memoir_adapter()
    mask = adapter.router.masks(torch.tensor([0]))[0]
    assert int(mask.sum()) == adapter.router.marked == round(4096 / 14336 * 96)
    assert not bool(memory.weight[:, ~mask].any())
    assert bool(memory.weight[:, mask].any())


@pytest.mark.parametrize(("decay", "fades"), [("active", False), ("none", False), ("reference", True)])
def test_only_the_references_decay_fades_older_edits(decay: str, fades: bool) -> None:
    editor, adapter, memory = memoir_adapter(decay=decay, weight_decay=1e-3)
    first = adapter.router.masks(torch.tensor([0]))[0]
    before = memory.weight.clone()
    editor.edit([Edit(prompt="Ann plays the", target="flute")])
    untouched = first & ~adapter.router.masks(torch.tensor([1]))[0]
    assert bool(untouched.any())
    same = torch.equal(memory.weight[:, untouched], before[:, untouched])
    assert same is not fades


def test_an_unrelated_prompt_is_bit_identical_beside_an_edited_one() -> None:
    editor, adapter, _ = memoir_adapter()
    model = editor.model
    prompts = [EDIT.prompt, "x yz"]
    batch = model.batch([model.passage(p) for p in prompts])
    edited = model.forward(batch).logits
    assert [e.fires for e in adapter.explain(prompts)] == [True, False]
    with adapter.detached():
        base = model.forward(batch).logits
    assert torch.equal(edited[1], base[1])
    assert not torch.equal(edited[0], base[0])


def test_a_fixed_threshold_is_kept_and_recorded() -> None:
    _, adapter, _ = memoir_adapter(threshold=0.4)
    assert adapter.router.threshold == 0.4
    assert adapter.notes["calibration"] == {"kind": "fixed threshold", "pooling": "mean", "threshold": 0.4}
    _, relative, _ = memoir_adapter(relative_threshold=0.5)
    chance = relative.router.marked / 96
    assert relative.router.threshold == pytest.approx(chance + 0.5 * (1 - chance))


def test_calibration_lets_no_more_neighbours_fire_than_allowed() -> None:
    generator = torch.Generator().manual_seed(0)
    router = TopHashRouter.seeded(200, 50, generator)
    stored = torch.randn(40, 200, generator=generator)
    near = stored[:20] + 0.3 * torch.randn(20, 200, generator=generator)
    neighbours = stored[torch.arange(60) % 40] + 1.5 * torch.randn(60, 200, generator=generator)
    hashes = [router.hash(x) for x in (stored, near, neighbours)]
    for allowed in (0.0, 0.05, 0.2):
        threshold, record = calibrate_threshold(router, hashes[0], hashes[1], torch.arange(20), hashes[2], allowed)
        assert record["neighbours_fired"] <= allowed + 1e-6
        assert record["paraphrases_reached"] > 0.9
        assert math.isclose(record["relative_threshold"], (threshold - 0.25) / 0.75, rel_tol=1e-6)


def test_the_receipt_reads_like_one() -> None:
    editor = FineTune(tiny_model("llama"), learning_rate=1e-2, steps=60)
    outcome = editor.edit([EDIT])
    words = outcome.summary()
    assert "1 edits written, 1 of them took" in words
    assert "model.layers." in words
    assert outcome.seconds_per_edit > 0


def test_an_adapter_of_another_method_is_not_gone_on_with() -> None:
    editor = FineTune(tiny_model("llama"))
    with pytest.raises(ConfigError, match="was written by 'ft'"):
        Memoir(tiny_model("llama"), adapter=editor.adapter, steps=1)
    with pytest.raises(ConfigError, match="not both"):
        FineTune(tiny_model("llama"), FineTuneConfig(), steps=3)


def test_orientation_of_transposed_layers_is_seen_through() -> None:
    model = tiny_model("gpt2")
    path = model.anatomy.mlp_output[1]
    assert tuple(model.module(path).weight.shape) == (96, 32)
    assert tuple(weight_of(model.module(path)).shape) == (32, 96)
