"""MEMOIR as an editor: columns of its own, joint writing, several layers, reverts, ablations, the published code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.adapters import AutoAdapter, ColumnMemory, RoutedAdapter
from errata.adapters.memories import Written
from errata.edit import Edit
from errata.editors import memoir
from errata.editors.calibration import Questions
from errata.editors.dual import Descent
from errata.editors.ft import FineTune
from errata.editors.memoir import Memoir, MemoirConfig
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.scoring import forced_answers
from errata.testing import tiny_model

EDITS = (
    Edit(prompt="The capital of France", target="Rome", subject="France"),
    Edit(prompt="Bob wrote Hamlet", target="Alice", subject="Hamlet"),
    Edit(prompt="The flute of Ann", target="piano", subject="Ann"),
    Edit(prompt="Zed was born in", target="Berlin", subject="Zed"),
)
EDIT, ANOTHER = EDITS[:2]
# Under which models of width 32 can be taught at once, and the same for a model with room for all of the edits.
PLAIN: dict[str, Any] = {"steps": 40, "learning_rate": 3.0, "clip_norm": 1.0, "contexts": 0, "threshold": 0.6}
WIDE: dict[str, Any] = {**PLAIN, "steps": 60, "layer": 1, "marked": 64}


def plain(model: EditableModel | None = None, **settings: Any) -> Memoir:
    return Memoir(model or tiny_model("llama"), **{**PLAIN, **settings})


def wide(**settings: Any) -> Memoir:
    return Memoir(tiny_model("llama", intermediate_size=512), **{**WIDE, **settings})


def memory_of(editor: Memoir) -> ColumnMemory:
    (memory,) = editor._memories.values()
    return memory


def masks_of(editor: Memoir) -> Tensor:
    return editor._router.masks(torch.arange(len(editor._router)))


def logits(model: EditableModel, prompt: str, target: str = "") -> Tensor:
    with torch.no_grad():
        return model.forward(model.batch([model.passage(prompt, target)])).logits[0]


def probabilities(editor: Memoir, edits: Sequence[Edit] = EDITS) -> list[float]:
    passages = [editor.model.passage(edit.prompt, edit.target) for edit in edits]
    return [answer.probability for answer in forced_answers(editor.model, passages)]


def change_of(one: Written | None) -> Tensor:
    assert one is not None
    change = one.change()
    assert change is not None
    return change


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- one edit --------------------------------------------------------------------------------------------------------


def test_an_edit_writes_into_its_own_columns_only() -> None:
    editor = plain()
    editor.edit([EDIT])
    (mask,) = masks_of(editor)
    weight = memory_of(editor).weight
    assert int(mask.sum()) == editor._router.marked == round(4096 / 14336 * 96)
    assert not bool(weight[:, ~mask].any())
    assert bool(weight[:, mask].any())


@pytest.mark.parametrize("clip", [1e-3, 1e-2])
@pytest.mark.parametrize("full", [True, False])
def test_one_step_is_no_longer_than_its_clipped_gradient(clip: float, full: bool) -> None:
    editor = plain(steps=1, learning_rate=0.5, clip_norm=clip, full_forward=full)
    editor.edit([EDIT])
    assert memory_of(editor).norm() == pytest.approx(0.5 * clip, rel=1e-2)


def test_what_an_edit_wrote_is_known() -> None:
    editor = plain()
    editor.edit(EDITS)
    memory, masks = memory_of(editor), masks_of(editor)
    weight = torch.zeros_like(memory.weight)
    for mask, one in zip(masks, memory.written, strict=True):
        weight[:, mask] += change_of(one)
    assert relative(memory.weight, weight) < 1e-5
    # Its keys are the layer's inputs from the last token of its bare prompt on.
    first = memory.written[0]
    assert first is not None
    assert torch.equal(first.columns, masks[0].nonzero().squeeze(1))
    assert len(first.keys) == len(editor.model.passage(EDIT.prompt, EDIT.target).answer) + 1


@pytest.mark.parametrize("acts", ["answer", "all"])
def test_the_memory_acts_from_where_it_says(acts: Any) -> None:
    editor = plain(acts=acts, layer=1)
    model = editor.model
    base = logits(model, EDIT.prompt, EDIT.target)
    outcome = editor.edit([EDIT])
    assert outcome.applied[0].took
    edited, last = logits(model, EDIT.prompt, EDIT.target), len(model.passage(EDIT.prompt).prompt) - 1
    assert torch.equal(edited[:last], base[:last]) is (acts == "answer")
    assert not torch.allclose(edited[last], base[last], atol=1e-2)


def test_behind_the_target_the_text_goes_on_as_it_would_have() -> None:
    found = {}
    for ending in (True, False):
        editor = plain(ending=ending, layer=1, steps=80)
        follows = int(logits(editor.model, EDIT.prompt, EDIT.target)[-1].argmax())
        editor.edit([EDIT])
        found[ending] = float(logits(editor.model, EDIT.prompt, EDIT.target)[-1].softmax(-1)[follows])
    assert found[True] > 1.5 * found[False]


def test_an_unrelated_prompt_is_bit_identical_beside_an_edited_one() -> None:
    editor = plain()
    editor.edit([EDIT])
    model, prompts = editor.model, [EDIT.prompt, "x yz"]
    batch = model.batch([model.passage(p) for p in prompts])
    edited = model.forward(batch).logits
    assert [e.fires for e in editor.adapter.explain(prompts)] == [True, False]
    with editor.adapter.detached():
        base = model.forward(batch).logits
    assert torch.equal(edited[1], base[1])
    assert not torch.equal(edited[0], base[0])


def test_an_encoder_acts_on_the_whole_prompt() -> None:
    editor = Memoir(tiny_model("t5"), **{**PLAIN, "layer": 1, "steps": 150, "threshold": 0.8})
    outcome = editor.edit(EDITS)
    assert editor.config.acts == "answer"
    assert memory_of(editor).acts == "all"
    assert [edit.took for edit in outcome.applied] == [True] * 4
    one = memory_of(editor).written[0]
    assert one is not None
    assert len(one.keys) == len(editor.model.passage(EDIT.prompt).prompt)


# --- sparing what is stored --------------------------------------------------------------------------------------------


def test_stored_edits_are_spared() -> None:
    """Without it the first of four edits has lost half of its hold; its own keys are moved less, too."""
    held, moved = [], []
    for ridge in (0.03, None):
        editor = wide(ridge=ridge)
        editor.edit(EDITS[:1])
        memory = memory_of(editor)
        before = memory.weight.clone()
        editor.edit(EDITS[1:])
        first = memory.written[0]
        assert first is not None
        moved.append(float((first.keys.float() @ (memory.weight - before)[:, first.columns].T).norm()))
        held.append(probabilities(editor)[0])
    assert held[0] > 1.5 * held[1]
    assert moved[0] < 0.5 * moved[1]


@pytest.mark.parametrize("together", [1, 3])
def test_all_keys_but_its_own_are_spared(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are stored and those of its batch; not what it takes the place of."""
    editor = wide(batch_size=together)
    editor.edit(EDITS[:2])
    memory, found, moments = memory_of(editor), [], editor._moments
    stored = [one for one in memory.written if one is not None]

    def watched(jobs: Any, layer: int, memory: ColumnMemory) -> Any:
        found.append((jobs, moments(jobs, layer, memory)))
        return found[-1][1]

    monkeypatch.setattr(editor, "_moments", watched)
    editor.edit([Edit(id="new", prompt=EDIT.prompt, target="Paris", subject="France"), *EDITS[2:]][:together])
    ((jobs, given),) = found
    assert len(jobs) == together

    def spread(keys: Tensor, columns: Tensor) -> Tensor:
        whole = torch.zeros(len(keys), 512)
        whole[:, columns] = keys.float()
        return whole

    for job, (moment, ridge) in zip(jobs, given, strict=True):
        own = spread(job.keys[1], job.columns)
        keys = {number: spread(one.keys, one.columns) for number, one in enumerate(stored)}
        of_batch = [spread(other.keys[1], other.columns) for other in jobs if other is not job]
        if job.edit.id == "new":
            assert job.replaces == 0
            del keys[0]
        others = torch.cat([*keys.values(), *of_batch])[:, job.columns]
        assert torch.allclose(moment, others.T @ others, atol=1e-3 * float(own.square().sum()))
        every = torch.cat([*(spread(one.keys, one.columns) for one in stored), *of_batch, own][: 2 + together])
        if together > 1:
            assert ridge == pytest.approx(0.03 * float(every.square().sum(1).mean()), rel=1e-3)


@pytest.mark.parametrize(("decay", "fades"), [("none", False), ("active", False), ("all", True)])
def test_only_the_published_decay_fades_columns_of_others(decay: Any, fades: bool) -> None:
    editor = plain(decay=decay, weight_decay=1e-3)
    editor.edit([EDIT])
    memory, first = memory_of(editor), masks_of(editor)[0]
    before = memory.weight.clone()
    outcome = editor.edit([Edit(prompt="Ann plays the", target="flute")])
    untouched = first & ~masks_of(editor)[1]
    assert bool(untouched.any())
    expected = before[:, untouched]
    if fades:
        expected = expected * (1 - 3.0 * 1e-3) ** (outcome.applied[0].steps or 0)
    assert torch.allclose(memory.weight[:, untouched], expected, rtol=1e-5)
    assert torch.equal(memory.weight[:, untouched], before[:, untouched]) is not fades
    result = editor.adapter.revert(EDIT.id)
    assert ("subtracted" in result.reason) is (decay == "none")  # what has faded is not known any more


def test_decay_that_comes_later_is_not_taken_for_what_was_written() -> None:
    """The first edit's columns fade where they are the second's too: its factors are its change no more."""
    model = tiny_model("llama")
    first = plain(model)
    first.edit([EDIT])
    Memoir(model, adapter=first.adapter, decay="active", weight_decay=1e-2).edit([ANOTHER])
    assert "stays in columns" in first.adapter.revert(EDIT.id).reason


# --- many at once ------------------------------------------------------------------------------------------------------


def test_a_batch_writes_what_it_should() -> None:
    editor = wide(batch_size=4, stop_loss=2.0)
    outcome = editor.edit(EDITS)
    assert [edit.took for edit in outcome.applied] == [True] * 4
    steps = [edit.steps or 0 for edit in outcome.applied]
    assert len(set(steps)) > 1
    assert all(0 < count <= 60 for count in steps)
    assert editor._router.owners == [edit.id for edit in EDITS]
    assert len(memory_of(editor).written) == 4
    assert editor.adapter.memory_version == 1
    assert [e.edit_id for e in editor.adapter.explain([edit.prompt for edit in EDITS])] == editor._router.owners


def test_a_batch_trains_each_edit_as_alone_where_nothing_is_spared() -> None:
    together = wide(batch_size=4, ridge=None, ending=False)
    steps = [edit.steps for edit in together.edit(EDITS).applied]
    for number, edit in enumerate(EDITS):
        alone = wide(ridge=None, ending=False)
        assert alone.edit([edit]).applied[0].steps == steps[number]
        assert torch.equal(masks_of(alone)[0], masks_of(together)[number])
        found = change_of(memory_of(together).written[number])
        assert relative(found, change_of(memory_of(alone).written[0])) < 0.03


def test_edits_of_a_batch_spare_each_other() -> None:
    spared, not_spared = wide(batch_size=4), wide(batch_size=4, ridge=None)
    for editor in (spared, not_spared):
        editor.edit(EDITS)
    moved = []
    for editor in (spared, not_spared):
        memory, masks = memory_of(editor), masks_of(editor)
        others = torch.zeros_like(memory.weight)
        for number in (1, 2, 3):
            others[:, masks[number]] += change_of(memory.written[number])
        first = memory.written[0]
        assert first is not None
        moved.append(float((first.keys.float() @ others[:, first.columns].T).norm()))
    assert moved[0] < 0.5 * moved[1]


@pytest.mark.parametrize("settings", [{"decay": "all", "weight_decay": 1e-2}, {"layers": (2,)}])
def test_a_refused_batch_leaves_everything_alone(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    editor = wide(batch_size=3, **settings)
    editor.edit([EDIT])
    memories = list(editor._memories.values())
    before = [(memory.weight.clone(), memory.moment.clone(), list(memory.written)) for memory in memories]
    version, masks = editor.adapter.memory_version, masks_of(editor)
    train = editor._train

    def without_effect(jobs: Any, recorded: Any) -> None:
        train(jobs, recorded)
        for layer, factors in jobs[-1].factors.items():
            jobs[-1].factors[layer] = torch.zeros_like(factors)

    monkeypatch.setattr(editor, "_train", without_effect)
    outcome = editor.edit(EDITS[1:])
    assert [refused.edit_id for refused in outcome.refused] == [edit.id for edit in EDITS[1:]]
    assert all(f"edit {EDITS[3].id} makes to the memory is zero" in refused.reason for refused in outcome.refused)
    for memory, (weight, moment, written) in zip(memories, before, strict=True):
        assert torch.equal(memory.weight, weight)
        assert torch.equal(memory.moment, moment)
        assert memory.written == written
    assert torch.equal(masks_of(editor), masks)
    assert (editor._router.owners, editor.adapter.memory_version) == ([EDIT.id], version)
    assert editor.adapter.edits() == [EDIT]


def test_two_edits_of_a_batch_with_the_same_mask_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = wide(batch_size=2)
    mask = torch.zeros(512, dtype=torch.bool)
    mask[:64] = True
    monkeypatch.setattr(editor._router, "hash", lambda features: mask[None].expand(len(features), -1))
    outcome = editor.edit(EDITS[:2])
    assert outcome.superseded == [(EDIT.id, ANOTHER.id)]
    assert editor._router.owners == [ANOTHER.id] == [edit.id for edit in editor.adapter.edits()]
    (one,) = memory_of(editor).written
    assert relative(memory_of(editor).weight[:, mask], change_of(one)) < 1e-5


# --- several layers ----------------------------------------------------------------------------------------------------


def test_an_edit_goes_where_most_room_is_left() -> None:
    editor = wide(layers=(3, 2))
    assert list(editor._memories) == [1, 2, 3]
    outcome = editor.edit(EDITS)
    assert [edit.took for edit in outcome.applied] == [True] * 4
    standing = [[one is not None for one in memory.written] for memory in editor._memories.values()]
    assert [sum(places) for places in zip(*standing, strict=True)] == [1] * 4
    # Empty memories are all as roomy: the lowest layer first, then the next that is empty still.
    assert [[places[number] for places in standing].index(True) for number in range(3)] == [0, 1, 2]
    assert [change.entries for change in outcome.changes] == [sum(places) for places in standing]
    assert [change.module for change in outcome.changes] == [f"model.layers.{n}.mlp.down_proj" for n in (1, 2, 3)]


def test_an_edit_may_stand_in_all_layers_at_once() -> None:
    editor = wide(layers=(2,), layer_choice="all", batch_size=2)
    outcome = editor.edit(EDITS)
    assert [edit.took for edit in outcome.applied] == [True] * 4
    assert [change.entries for change in outcome.changes] == [4, 4]
    assert all(bool(change_of(one).any()) for memory in editor._memories.values() for one in memory.written)
    base = wide()
    editor.adapter.detach()
    assert torch.equal(logits(editor.model, EDIT.prompt), logits(base.model, EDIT.prompt))


def test_layers_that_do_not_fit_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"layers \[1\] must stand above layer 2"):
        plain(model, layer=2, layers=(1,))
    with pytest.raises(ConfigError, match="decay belongs to the published method of one layer"):
        plain(model, layer=1, layers=(2,), decay="active")
    with pytest.raises(ConfigError, match="marked=97 is more than the 96 features"):
        plain(model, marked=97)
    model.anatomy = dataclasses.replace(model.anatomy, key_width=(96, 96, 96, 80))
    with pytest.raises(ConfigError, match=r"layers \[3\] have another key width than layer 1 \(96\)"):
        plain(model, layer=1, layers=(2, 3))
    assert plain(model, layer=1, layers=(2, 1, 2))._layers == (1, 2)


# --- taking back, saying otherwise, going on -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"batch_size": 4}, {"layers": (2,)}])
def test_reverting_one_of_many_takes_out_its_change_and_leaves_the_others(settings: dict[str, Any]) -> None:
    editor = wide(**settings)
    base = {edit.id: logits(editor.model, edit.prompt) for edit in EDITS}
    editor.edit(EDITS)
    held = probabilities(editor)
    others = [EDITS[0], *EDITS[2:]]
    result = editor.adapter.revert(ANOTHER.id)
    assert result.exactness == "approximate"
    assert "subtracted from the memory, to rounding" in result.reason
    assert torch.equal(logits(editor.model, ANOTHER.prompt), base[ANOTHER.id])
    for memory in editor._memories.values():
        weight = torch.zeros_like(memory.weight)
        for mask, one in zip(masks_of(editor), memory.written, strict=True):
            if one is not None:
                weight[:, mask] += change_of(one)
        assert float((memory.weight - weight).abs().max()) < 1e-5 * float(weight.abs().max())
    now = probabilities(editor, others)
    assert all(after > 0.8 * before for after, before in zip(now, (held[0], *held[2:]), strict=True))
    for edit in others:
        result = editor.adapter.revert(edit.id)
    assert result.exactness == "exact"
    assert [memory.norm() for memory in editor._memories.values()] == [0.0] * len(editor._memories)
    assert all(torch.equal(logits(editor.model, edit.prompt), base[edit.id]) for edit in EDITS)


def test_an_edit_of_the_same_prompt_takes_the_place_of_the_first() -> None:
    editor = wide()
    editor.edit(EDITS[:3])
    revised = Edit(id="new", prompt=ANOTHER.prompt, target="Rome", subject="Hamlet")
    outcome = editor.edit([revised])
    assert outcome.superseded == [(ANOTHER.id, "new")]
    assert outcome.applied[0].took
    assert editor._router.owners == [EDIT.id, EDITS[2].id, "new"]
    memory = memory_of(editor)
    weight = torch.zeros_like(memory.weight)
    for mask, one in zip(masks_of(editor), memory.written, strict=True):
        weight[:, mask] += change_of(one)
    assert relative(memory.weight, weight) < 1e-5  # nothing of the first is left
    # It was trained as if the first had never been: as it is in an adapter without it.
    fresh = wide()
    fresh.edit([EDIT, EDITS[2], revised])
    assert relative(memory.written[2].change(), change_of(memory_of(fresh).written[2])) < 0.2  # type: ignore[union-attr, arg-type]


def test_the_same_edit_with_other_white_space_leaves_no_second_entry() -> None:
    """Its mask is another, but its id is the same, and one id has one entry."""
    editor = plain()
    editor.edit([Edit(id="1", prompt="The capital of France", target="Rome")])
    outcome = editor.edit([Edit(id="1", prompt="The capital  of France", target="Berlin")])
    assert outcome.superseded == [("1", "1")]
    assert editor._router.owners == ["1"]
    assert len(memory_of(editor).written) == 1
    assert [edit.target for edit in editor.adapter.edits()] == ["Berlin"]
    assert editor.adapter.revert("1").exactness == "exact"


def test_an_edit_that_loses_its_mask_to_another_prompt_is_struck_off(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = plain()
    editor.edit([EDIT])
    mask = masks_of(editor)
    monkeypatch.setattr(editor._router, "hash", lambda features: mask.expand(len(features), -1))
    monkeypatch.setattr(editor._router, "sharpest", lambda features: torch.arange(64).expand(len(features), -1))
    outcome = editor.edit([ANOTHER])
    assert outcome.superseded == [(EDIT.id, ANOTHER.id)]
    assert [edit.id for edit in editor.adapter.edits()] == [ANOTHER.id] == editor._router.owners
    editor.adapter.revert(ANOTHER.id)


@pytest.mark.parametrize("settings", [{}, {"layers": (2,), "batch_size": 2}])
def test_an_adapter_is_gone_on_with_as_if_it_had_never_been_put_away(tmp_path: Path, settings: dict[str, Any]) -> None:
    editor = wide(**settings)
    editor.edit(EDITS[:2])
    editor.adapter.save_pretrained(tmp_path)
    model = tiny_model("llama", intermediate_size=512)
    again = Memoir(model, adapter=AutoAdapter.from_pretrained(tmp_path, model=model))
    for one in (editor, again):
        one.edit(EDITS[2:])
        one.adapter.revert(ANOTHER.id)
    assert again._router.owners == editor._router.owners
    for mine, other in zip(again._memories.values(), editor._memories.values(), strict=True):
        assert relative(mine.weight, other.weight) < 1e-2
        assert [one is None for one in mine.written] == [one is None for one in other.written]
    assert again.config == editor.config


def test_how_later_edits_are_written_may_change() -> None:
    model = tiny_model("llama")
    first = plain(model, layer=1, layers=(2,))
    later: dict[str, Any] = {
        "ridge": None, "contexts": 3, "layer_choice": "all", "ending": False, "conditional_read": False, "batch_size": 8,
    }  # fmt: skip
    second = Memoir(model, adapter=first.adapter, **later)
    assert {name: getattr(second.config, name) for name in later} == later
    assert second.config.layers == (2,)


# --- preparation -------------------------------------------------------------------------------------------------------


def counting_rows(model: EditableModel) -> list[int]:
    """Rows of every pass through the trunk from now on."""
    rows: list[int] = []
    model.module(model.anatomy.trunk).register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


def questions_of(editor: Memoir) -> Questions:
    config = editor.config
    return Questions.ask(editor.model, config.background, config.seed, calibrating=config.is_calibrated)


def test_preparing_asks_once_for_all_poolings_and_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    calibrated: dict[str, Any] = {**PLAIN, "threshold": None}
    first = Memoir(tiny_model("llama"), **calibrated)
    questions = len(questions_of(first))
    rows = counting_rows(first.model)
    first.prepare()
    assert first.config.pooling == "auto"
    assert sum(rows) <= questions + sum(5 + 10 for _ in range(5))
    (kept,) = (tmp_path / "memoir").iterdir()
    assert kept.suffix == ".safetensors"

    again = Memoir(tiny_model("llama"), **calibrated)
    rows = counting_rows(again.model)
    again.prepare()
    assert rows == []
    assert_prepared_alike(first, again)

    others: tuple[dict[str, Any], ...] = (
        {"seed": 1}, {"layer": 1}, {"marked": 20}, {"background": 7}, {"threshold": 0.4}, {"relative_threshold": 0.4},
        {"pooling": "last"}, {"false_fires": 0.1}, {"subject_check": False}, {"permute": False}, {"mask": "random"},
    )  # fmt: skip
    editors = [first, *(Memoir(first.model, **{**calibrated, **other}) for other in others)]
    assert len({editor._digest(questions_of(editor)) for editor in editors}) == 1 + len(others)
    same: tuple[dict[str, Any], ...] = ({"steps": 3}, {"ridge": None}, {"acts": "all"}, {"contexts": 1})
    for other in same:  # how edits are written has nothing to do with how prompts are recognised
        editor = Memoir(first.model, **{**calibrated, **other})
        assert editor._digest(questions_of(editor)) == first._digest(questions_of(first))

    kept.write_bytes(b"damaged")
    made_again = Memoir(tiny_model("llama"), **calibrated)
    made_again.prepare()
    assert_prepared_alike(first, made_again)


def assert_prepared_alike(one: Memoir, other: Memoir) -> None:
    first, second = one._router, other._router
    assert torch.equal(first.background, second.background)
    for name in ("threshold", "named_threshold", "unnamed_threshold", "pooling"):
        assert getattr(first, name) == getattr(second, name)
    assert one._routed.notes == other._routed.notes


def test_what_is_prepared_belongs_to_the_base_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever other adapters are attached to it meanwhile."""
    found = []
    for place, beside in (("alone", False), ("beside", True)):
        monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / place))
        model = tiny_model("llama")
        if beside:
            FineTune(model, layers=(0,), learning_rate=1e-1).edit([ANOTHER])
        editor = plain(model, layer=2)
        editor.prepare()
        found.append(editor)
    assert_prepared_alike(*found)
    assert bool(found[0]._router.background.any())


def test_a_fixed_threshold_is_kept_and_recorded() -> None:
    fixed = plain(threshold=0.4)
    fixed.edit([EDIT])
    router = fixed._router
    assert (router.threshold, router.named_threshold, router.unnamed_threshold) == (0.4, None, None)
    expected = {"kind": "fixed threshold", "pooling": "mean", "threshold": 0.4, "named": None, "unnamed": None}
    assert fixed.adapter.notes["calibration"] == expected  # type: ignore[attr-defined]
    relative_ = plain(threshold=None, relative_threshold=0.5)
    relative_.prepare()
    chance = relative_._router.marked / 96
    assert relative_._router.threshold == pytest.approx(chance + 0.5 * (1 - chance))


def test_a_calibrated_router_asks_whether_the_subject_is_named() -> None:
    editor = plain(threshold=None, pooling="mean", layer=1)
    nameless = Edit(prompt="It was so and", target="Rome")
    editor.edit([EDIT, nameless])
    router, found = editor._router, editor._routed.notes["calibration"]
    assert (router.threshold, router.named_threshold, router.unnamed_threshold) == (
        found["threshold"], found["named"], found["unnamed"],
    )  # fmt: skip
    assert found["named"] < found["unnamed"]
    assert [bool(words) for words in router.words] == [True, False]
    prompts = [EDIT.prompt, EDIT.prompt.replace("France", "Spain"), f"Now {EDIT.prompt}", nameless.prompt]
    thresholds = [one.threshold for one in editor.adapter.explain(prompts)]
    assert thresholds == [found["named"], found["unnamed"], found["named"], found["threshold"]]
    without = plain(threshold=None, pooling="mean", layer=1, subject_check=False)
    without.edit([EDIT])
    explained = without.adapter.explain(prompts)
    assert {one.threshold for one in explained} == {found["threshold"]}


# --- the published code ------------------------------------------------------------------------------------------------

REFERENCE: dict[str, Any] = {
    "acts": "all", "ridge": None, "subject_check": False, "pooling": "mean", "contexts": 10, "ending": False,
    "decay": "all", "stop_loss": 0.02, "stop_change": 1e-4, "learning_rate": 1.0, "clip_norm": 1.0,
}  # fmt: skip


def test_the_published_code_has_settings_of_its_own() -> None:
    config = MemoirConfig(compat="reference")
    assert {name: getattr(config, name) for name in REFERENCE} == REFERENCE
    fixed = MemoirConfig()
    for name in (
        "acts",
        "ridge",
        "subject_check",
        "pooling",
        "contexts",
        "ending",
        "decay",
        "stop_loss",
        "stop_change",
    ):
        assert getattr(fixed, name) != REFERENCE[name]
    given = MemoirConfig(compat="reference", contexts=3, decay="active")
    assert (given.contexts, given.decay, given.acts) == (3, "active", "all")
    assert MemoirConfig.from_record(config.to_record()) == config


@pytest.mark.parametrize(("compat", "counts_one_more"), [("reference", True), ("fixed", False)])
def test_the_published_loss_and_decay_are_used(
    compat: Any, counts_one_more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, descend = [], memoir.descend

    def watched(*arguments: Any, **settings: Any) -> Any:
        used.extend(one for one in arguments if isinstance(one, Descent))
        return descend(*arguments, **settings)

    monkeypatch.setattr(memoir, "descend", watched)
    editor = Memoir(tiny_model("llama"), compat=compat, steps=20, weight_decay=1e-3, threshold=0.6)
    editor.edit([EDIT])
    assert [one.extra_label for one in used] == [counts_one_more]
    memory, first = memory_of(editor), masks_of(editor)[0]
    before = memory.weight.clone()
    editor.edit([ANOTHER])
    untouched = first & ~masks_of(editor)[1]
    assert (memory.weight[:, untouched].norm() < 0.999 * before[:, untouched].norm()) == counts_one_more
    assert editor.adapter.editor_config["compat"] == compat


# --- ablations ---------------------------------------------------------------------------------------------------------


def features_of(editor: Memoir, edit: Edit) -> Tensor:
    """The centred pooled features of an edit's prompt, [D]."""
    ((_, gathered),) = editor._routed.gathered([edit.prompt], editor.model)
    return editor._router.features(gathered)[0]


def test_without_a_permutation_columns_are_the_largest_features() -> None:
    for permute in (True, False):
        editor = plain(permute=permute)
        editor.edit([EDIT])
        largest = set(features_of(editor, EDIT).abs().topk(editor._router.marked).indices.tolist())
        marked = set(masks_of(editor)[0].nonzero().squeeze(1).tolist())
        assert (marked == largest) is not permute
        assert marked == {int(editor._router.permutation[one]) for one in largest}


def test_a_random_mask_has_nothing_to_do_with_features() -> None:
    editor = wide(mask="random", threshold=0.9)
    outcome = editor.edit(EDITS)
    assert [edit.took for edit in outcome.applied] == [True] * 4
    other = Memoir(tiny_model("llama", seed=1, intermediate_size=512), **{**WIDE, "mask": "random", "threshold": 0.9})
    other.edit(EDITS)
    assert torch.equal(masks_of(other), masks_of(editor))
    close = editor.adapter.explain([EDIT.prompt, f"{EDIT.prompt} ", "The capital of Spain"])
    assert [one.fires for one in close] == [True, False, False]
    assert close[2].score < 0.4


def test_without_a_conditional_read_the_nearest_edit_always_answers() -> None:
    prompts = [EDIT.prompt, "x yz", "Who plays?"]
    for conditional in (True, False):
        editor = plain(conditional_read=conditional, layer=1)
        editor.edit([EDIT])
        fires = [one.fires for one in editor.adapter.explain(prompts)]
        assert fires == [True, not conditional, not conditional]


@pytest.mark.parametrize("background", [0, 12])
def test_the_background_is_what_is_centred_with(background: int) -> None:
    editor = plain(background=background)
    editor.prepare()
    assert bool(editor._router.background.any()) is (background > 0)


@pytest.mark.parametrize(("pooling", "used"), [("auto", "mean"), ("content_mean", "content_mean"), ("last", "last")])
def test_features_are_pooled_as_was_asked(pooling: Any, used: str) -> None:
    editor = plain(pooling=pooling, background=0)
    editor.edit([EDIT])
    assert editor._router.pooling == used
    inputs: list[Tensor] = []
    path = editor._routed.path
    with editor.adapter.detached():
        module = editor.model.module(path)
        handle = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
        logits(editor.model, EDIT.prompt)
        handle.remove()
    (own,) = inputs
    pooled: Mapping[str, Tensor] = {"mean": own.mean(0), "content_mean": own[1:].mean(0), "last": own[-1]}
    assert torch.allclose(features_of(editor, EDIT), pooled[used], atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ridge": 0.0}, "ridge must be above 0"),
        ({"contexts": 11}, "between 0 and 10"),
        ({"mask": "hash"}, "'tophash' or 'random'"),
        ({"acts": "prompt"}, "'answer' or 'all'"),
        ({"layer_choice": "first"}, "'roomiest' or 'all'"),
        ({"compat": "paper"}, "'fixed' or 'reference'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MemoirConfig(**settings)


def test_an_adapter_has_a_memory_per_layer() -> None:
    adapter = plain(layer=1, layers=(3,), acts="all").adapter
    assert isinstance(adapter, RoutedAdapter)
    assert (adapter.path, adapter.further_paths) == ("model.layers.1.mlp.down_proj", ("model.layers.3.mlp.down_proj",))
    assert [one.acts for one in adapter.layer.memories if isinstance(one, ColumnMemory)] == ["all", "all"]
