"""What each editor promises beyond the contract: published settings, the mathematics, the receipt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from errata.adapters import DeltaAdapter
from errata.edit import Edit
from errata.editors import editor_class, editor_names
from errata.editors.base import Editor, EditorConfig, Written
from errata.editors.ft import FineTune, FineTuneConfig, _low_rank
from errata.editors.memoir import Memoir, MemoirConfig
from errata.editors.registry import GROUP
from errata.editors.rome import Rome, RomeConfig
from errata.editors.values import ValueSettings, find_target_value
from errata.errors import BaseMismatchError, ConfigError, EditError, SpanError
from errata.model.anatomy import weight_of
from errata.model.probes import adding
from errata.progress import Progress
from errata.testing import tiny_model

EDIT = Edit(prompt="The capital of France", target="Rome", subject="France")
REVISED = Edit(prompt="The capital  of France", target="Berlin", subject="France")
ANOTHER = Edit(prompt="Bob wrote Hamlet", target="Alice", subject="Hamlet")
FT: dict[str, Any] = {"learning_rate": 1e-2, "steps": 60}
MEMOIR: dict[str, Any] = {"steps": 40, "learning_rate": 3.0, "clip_norm": 1.0, "contexts": 2, "relative_threshold": 0.5}
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
        (MemoirConfig, {"decay": "often"}, "setting decay is 'often'; expected 'none' or 'active' or 'all'"),
        (MemoirConfig, {"pooling": "first"}, "'mean' or 'content_mean' or 'last' or 'auto'"),
        (RomeConfig, {"steps": "abc"}, "setting steps is 'abc'; expected a whole number"),
        (RomeConfig, {"steps": 2.5}, "setting steps is 2.5; expected a whole number"),
        (MemoirConfig, {"marked": True}, "setting marked is True; expected a whole number"),
        (MemoirConfig, {"threshold": "high"}, "setting threshold is 'high'; expected a number or null"),
        (FineTuneConfig, {"layers": 2}, "setting layers is 2; expected a list of which each is a whole number"),
        (FineTuneConfig, {"layers": (0, "1")}, "setting layers"),
        (FineTuneConfig, {"full_forward": 1}, "setting full_forward is 1; expected true or false"),
        (RomeConfig, {"corpus": 3}, "setting corpus is 3; expected text or null"),
        (MemoirConfig, {"threshold": 0.4, "relative_threshold": 0.2}, "not both"),
        (FineTuneConfig, {"learning_rate": 0.0}, "positive learning rate"),
    ],
)
def test_values_that_make_no_sense_are_refused(config: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**settings)


def test_values_that_fit_are_taken_as_they_are_meant() -> None:
    config = FineTuneConfig(layers=[1, 2], learning_rate=1, clamp=None)  # type: ignore[arg-type]
    assert config.layers == (1, 2)
    assert config.learning_rate == 1.0
    assert RomeConfig(corpus="texts.txt").corpus == "texts.txt"


def test_the_registry_offers_the_nearest_name() -> None:
    assert {"ft", "memoir", "rome"} <= set(editor_names())
    with pytest.raises(ConfigError, match=r"unknown method 'memor'. Did you mean 'memoir'"):
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


@pytest.mark.parametrize(("family", "contexts"), [("llama", 0), ("llama", 3), ("gpt2", 3), ("opt", 0)])
def test_rome_makes_the_averaged_key_give_the_wanted_value(family: str, contexts: int) -> None:
    model = tiny_model(family)
    editor = Rome(model, **{**ROME, "contexts": contexts})
    editor.prepare()
    (layer,) = editor._layers
    path = editor._path(layer)
    assert isinstance(editor.adapter, DeltaAdapter)
    texts = editor.adapter.notes["contexts"][:contexts]
    value = find_target_value(
        model, layer, EDIT, texts, ValueSettings(steps=40, weight_decay=1e-3, clamp=40.0, kl_factor=0.0)
    )
    editor.edit([EDIT])
    key = value.keys.mean(0)
    assert len(value.keys) == contexts + 1
    if contexts:
        assert float((value.keys - key).norm(dim=1).min()) > 0.1 * float(key.norm())
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
    (written,) = editor.adapter._changes
    ((layer, statistics),) = editor._statistics.items()
    factor = statistics.cholesky
    value = find_target_value(model, layer, EDIT, (), ValueSettings(steps=1))
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


def test_the_search_for_a_value_minimises_what_it_says() -> None:
    """The loss at the δ that is returned, written out from whole forward passes: likelihood, drift, decay."""
    model, layer, contexts = tiny_model("llama"), 1, ("Ann is. ", "The flute plays")
    settings = ValueSettings(steps=6, learning_rate=0.2, weight_decay=0.3, clamp=40.0, kl_factor=2.0, stop_loss=0.0)
    value = find_target_value(model, layer, EDIT, contexts, settings)
    assert EDIT.subject is not None

    def log_probs(prompt: str, answer: str, delta: torch.Tensor | None) -> torch.Tensor:
        batch = model.batch([model.passage(prompt, answer)])
        place = model.subject_span(prompt, EDIT.subject or "").last
        added = torch.zeros(batch.ids.shape[1], 32)
        if delta is not None:
            added[place] = delta
        with torch.no_grad(), adding(model.model, {model.anatomy.mlp_output[layer]: lambda _: added[None]}, 1):
            return model.forward(batch).logits[0].float().log_softmax(-1)

    likely = []
    for prompt in (EDIT.prompt, *(f"{text} {EDIT.prompt}" for text in contexts)):
        passage = model.passage(prompt, EDIT.target)
        found = log_probs(prompt, EDIT.target, value.delta)
        first = len(passage.prompt) - 1
        likely.append(-torch.stack([found[first + t, token] for t, token in enumerate(passage.answer)]).mean())
    essence = f"{EDIT.subject} is a"
    place = model.subject_span(essence, EDIT.subject).last
    now, before = log_probs(essence, "", value.delta)[place], log_probs(essence, "", None)[place]
    drift = (now.exp() * (now - before)).sum()
    decay = 0.3 * value.delta.norm() / value.initial.norm() ** 2
    assert float(drift) > 1e-3
    assert value.loss == pytest.approx(float(torch.stack(likely).mean() + 2.0 * drift + decay), rel=1e-4)


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


def test_what_rome_prepares_belongs_to_the_base_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever other adapters are attached to it meanwhile."""
    found = []
    for place, beside in (("alone", False), ("beside", True)):
        monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / place))
        model = tiny_model("llama")
        if beside:
            FineTune(model, layers=(0,), learning_rate=1e-1).edit([ANOTHER])
        editor = Rome(model, **{**ROME, "layer": 2})
        editor.prepare()
        found.append(editor)
    assert found[0].adapter.notes == found[1].adapter.notes
    first, second = (editor._statistics[2] for editor in found)
    assert torch.equal(first.second_moment, second.second_moment)


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


# --- going on with an adapter --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "other"),
    [
        ("memoir", {"layer": 1}, {"layer": 2}),
        ("memoir", {"layer": 1}, {"marked": 20}),
        ("memoir", {"layer": 1}, {"threshold": 0.4}),
        ("memoir", {"layer": 1}, {"layers": (2,)}),
        ("memoir", {"layer": 1}, {"acts": "all"}),
        ("memoir", {"layer": 1}, {"mask": "random"}),
        ("memoir", {"layer": 1}, {"relative_threshold": 0.4}),
        ("memoir", {"layer": 1}, {"pooling": "last"}),
        ("memoir", {"layer": 1}, {"seed": 3}),
        ("ft", {"layers": (1,)}, {"layers": (2,)}),
        ("rome", {"layer": 1}, {"variant": "original"}),
    ],
)
def test_what_shapes_an_adapter_is_not_changed_when_it_is_gone_on_with(
    name: str, settings: dict[str, Any], other: dict[str, Any]
) -> None:
    model, cls = tiny_model("llama"), editor_class(name)
    first = cls(model, **settings)
    (setting, value), record = next(iter(other.items())), dict(first.adapter.editor_config)
    there = getattr(first.config, setting)
    words = re.escape(f"made with {setting}={there!r} and cannot be gone on with under {setting}={value!r}")
    with pytest.raises(ConfigError, match=words):
        cls(model, adapter=first.adapter, **other)
    with pytest.raises(ConfigError, match=words):
        cls(model, cls.Config.for_model(model, **{**settings, **other}), adapter=first.adapter)
    assert first.adapter.editor_config == record


def test_how_later_edits_are_trained_may_change() -> None:
    model = tiny_model("llama")
    first = FineTune(model, layers=(1,), **FT)
    second = FineTune(model, adapter=first.adapter, steps=3, learning_rate=0.5, batch_size=4)
    assert second.config.layers == (1,)  # what is not given is the adapter's, not the default
    assert (second.config.steps, second.config.learning_rate, second.config.batch_size) == (3, 0.5, 4)
    assert second.adapter.editor_config == second.config.to_record()
    assert "later given: batch_size, learning_rate, steps" in second.config.source
    with pytest.raises(ConfigError, match="Did you mean 'steps'"):
        FineTune(model, adapter=first.adapter, step=3)
    assert FineTune(model, first.config, adapter=first.adapter).config == first.config


@dataclass(frozen=True, kw_only=True)
class OwnConfig(EditorConfig):
    """Settings of a method that says nothing of which of them may change."""

    strength: float = 1.0
    steps: int = 3


def test_a_setting_shapes_the_adapter_unless_its_method_says_otherwise() -> None:
    record = OwnConfig().to_record()
    assert OwnConfig.going_on(record, None, {"steps": 5}).steps == 5
    with pytest.raises(ConfigError, match=r"made with strength=1.0 .* under strength=2.0"):
        OwnConfig.going_on(record, None, {"strength": 2})


def test_an_adapter_is_gone_on_with_where_it_is_attached() -> None:
    editor = FineTune(tiny_model("llama"))
    with pytest.raises(ConfigError, match="attached to another model"):
        FineTune(tiny_model("llama"), adapter=editor.adapter)
    editor.adapter.detach()
    with pytest.raises(BaseMismatchError):
        FineTune(tiny_model("llama", seed=1), adapter=editor.adapter)


def test_edits_are_not_trained_while_the_adapter_is_off() -> None:
    editor = FineTune(tiny_model("llama"), **FT)
    editor.adapter.detach()
    with pytest.raises(ConfigError, match=r"is detached; call adapter.attach\(model\)"):
        editor.edit([EDIT])
    editor.adapter.attach(tiny_model("llama"))
    with pytest.raises(ConfigError, match="is attached to another model"):
        editor.edit([EDIT])
    assert not editor.adapter.edits()


# --- batches, refusals, conflicts ------------------------------------------------------------------------------------


def held(editor: Editor[Any]) -> list[str]:
    return [edit.id for edit in editor.adapter.edits()]


def edit_of(name: str, target: str, prompt: str = EDIT.prompt) -> Edit:
    return Edit(id=name, prompt=prompt, target=target, subject="France")


def refusing(monkeypatch: pytest.MonkeyPatch, editor: Editor[Any], refused: str) -> list[list[str]]:
    """Let one edit be refused by its method; returns the ids of every batch that is written."""
    write, batches = editor._write, []

    def stubborn(edits: Sequence[Edit], progress: Progress) -> Written:
        batches.append([edit.id for edit in edits])
        if refused in batches[-1]:
            raise EditError("not this one")
        return write(edits, progress)

    monkeypatch.setattr(editor, "_write", stubborn)
    return batches


def test_only_the_edit_that_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = Rome(tiny_model("llama"), batch_size=3, **ROME)
    third = Edit(prompt="The flute of Ann", target="piano", subject="Ann")
    batches = refusing(monkeypatch, editor, ANOTHER.id)
    outcome = editor.edit([EDIT, ANOTHER, third])
    assert batches == [[EDIT.id], [ANOTHER.id], [third.id]]
    assert [edit.edit_id for edit in outcome.applied] == held(editor) == [EDIT.id, third.id]
    assert [(edit.edit_id, edit.reason) for edit in outcome.refused] == [(ANOTHER.id, "not this one")]
    editor.adapter.revert(EDIT.id)


@pytest.mark.parametrize("name", ["ft", "memoir"])
def test_a_joint_batch_is_refused_as_a_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = editor_class(name)(tiny_model("llama"), batch_size=3, **{"ft": FT, "memoir": MEMOIR}[name])
    refusing(monkeypatch, editor, ANOTHER.id)
    outcome = editor.edit([EDIT, ANOTHER, REVISED])
    assert [edit.edit_id for edit in outcome.refused] == [EDIT.id, ANOTHER.id, REVISED.id]
    assert not outcome.superseded
    assert not outcome.applied
    assert not held(editor)


def test_of_a_joint_batch_only_the_latest_of_a_prompt_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = FineTune(tiny_model("llama"), batch_size=4, **FT)
    batches = refusing(monkeypatch, editor, "nobody")
    outcome = editor.edit([EDIT, ANOTHER, REVISED, ANOTHER])
    assert batches == [[REVISED.id, ANOTHER.id]]
    assert outcome.superseded == [(EDIT.id, REVISED.id)]
    assert [edit.edit_id for edit in outcome.applied] == held(editor) == [REVISED.id, ANOTHER.id]


def test_an_edit_that_was_refused_is_superseded_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = FineTune(tiny_model("llama"), **FT)
    first, second, third = edit_of("1", "Rome"), edit_of("2", "Berlin"), edit_of("3", "London")
    refusing(monkeypatch, editor, "2")
    outcome = editor.edit([first, second, third])
    assert outcome.superseded == [("1", "3")]
    assert held(editor) == ["3"]


@pytest.mark.parametrize("name", ["ft", "memoir"])
def test_the_same_edit_under_another_id_takes_the_place_of_the_first(name: str) -> None:
    editor = editor_class(name)(tiny_model("llama"), **{"ft": {**FT, "stop_loss": 0.0}, "memoir": MEMOIR}[name])
    first, second = edit_of("1", "Rome"), edit_of("2", "Rome")
    outcome = editor.edit([first, second])
    assert outcome.superseded == [("1", "2")]
    assert held(editor) == ["2"]
    result = editor.adapter.revert("2")
    assert not held(editor)
    assert result.exactness == "exact" or "recorded" in result.reason
    with torch.no_grad():
        model = editor.model
        batch = model.batch([model.passage(EDIT.prompt)])
        attached = model.forward(batch).logits
        editor.adapter.detach()
        assert torch.equal(attached, model.forward(batch).logits)


@pytest.mark.parametrize("name", ["ft", "memoir", "rome"])
def test_an_edit_given_again_with_another_target_keeps_its_place(name: str) -> None:
    """The same id, so there is nothing to strike off; a router must not lose the mask to its own successor."""
    editor = editor_class(name)(tiny_model("llama"), **{"ft": FT, "memoir": MEMOIR, "rome": ROME}[name])
    outcome = editor.edit([edit_of("1", "Rome"), edit_of("1", "Berlin")])
    assert outcome.superseded == [("1", "1")]
    assert [(edit.id, edit.target) for edit in editor.adapter.edits()] == [("1", "Berlin")]
    if name == "memoir":
        assert editor.adapter.explain([EDIT.prompt])[0].edit_id == "1"
    editor.adapter.revert("1")


def test_an_id_names_one_prompt() -> None:
    editor = FineTune(tiny_model("llama"), **FT)
    editor.edit([edit_of("1", "Rome")])
    outcome = editor.edit(
        [edit_of("1", "Rome", prompt="Bob saw France"), edit_of("2", "Rome", prompt="Ann saw France")]
    )
    assert [edit.edit_id for edit in outcome.refused] == ["1"]
    assert "belongs to an edit of another prompt" in outcome.refused[0].reason
    assert held(editor) == ["1", "2"]


@pytest.mark.parametrize("name", ["ft", "memoir", "rome"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_layers_are_not_edited(name: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama")
    cls = editor_class(name)
    assert cls.unsuitable(model) is None
    layer = model.module(model.anatomy.mlp_output[2])
    layer.weight = torch.nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
    assert "quantised" in (cls.unsuitable(model) or "")
    with pytest.raises(ConfigError, match=r"layers\.2\..* is quantised"):
        cls(model)


def test_orientation_of_transposed_layers_is_seen_through() -> None:
    model = tiny_model("gpt2")
    path = model.anatomy.mlp_output[1]
    assert tuple(model.module(path).weight.shape) == (96, 32)
    assert tuple(weight_of(model.module(path)).shape) == (32, 96)
