"""GRACE as an editor: settings, the three modes, starts, joining, order of reverts, calibration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.adapters import AutoAdapter, Codebook, KeyedAdapter
from errata.edit import Edit
from errata.editors import keyed
from errata.editors.grace import Grace, GraceConfig
from errata.editors.keyed import calibrate_radius
from errata.errors import ConfigError, NumericsError
from errata.model import EditableModel
from errata.model.scoring import forced_answers
from errata.model.tail import Tail
from errata.model.tokens import Passage
from errata.testing import Case, conformance_checks, tiny_model
from errata.testing.conformance import EDITS

SETTINGS: dict[str, Any] = {"layer": 1, "radius": 0.3, "learning_rate": 0.3, "steps": 60}
MORE = (*EDITS, Edit(prompt="Zed was born in", target="Berlin"), Edit(prompt="Emma plays the", target="flute"))


def grace(model: EditableModel | None = None, **settings: Any) -> Grace:
    return Grace(model or tiny_model("llama"), **{**SETTINGS, **settings})


def adapter_of(editor: Grace) -> KeyedAdapter:
    assert isinstance(editor.adapter, KeyedAdapter)
    return editor.adapter


def tensors(editor: Grace) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in editor.adapter._state()[0].items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- settings ---------------------------------------------------------------------------------------------------------


def shaped(architecture: str, layers: int, hidden: int) -> Any:
    return SimpleNamespace(
        architecture=architecture, layer_count=layers, anatomy=SimpleNamespace(hidden_size=hidden, key_width=(1,))
    )


def test_published_settings_and_derived_ones() -> None:
    llama = GraceConfig.for_model(shaped("llama", 32, 4096))
    assert (llama.layer, llama.learning_rate, llama.steps, llama.stop_loss) == (27, 1.0, 50, None)
    assert (llama.replace, llama.value_start, llama.radius) == ("last", "cold", None)
    assert "EasyEdit" in llama.source
    assert GraceConfig.for_model(shaped("gptj", 28, 4096)).steps == 200
    assert GraceConfig.for_model(shaped("qwen2", 28, 3584)).layer == 18
    other = GraceConfig.for_model(shaped("llama", 16, 2048))
    assert (other.layer, other.value_start, other.compat) == (13, "warm", "fixed")
    assert "scaled" in other.source


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"radius": 0.0}, "radius must be a positive number"),
        ({"radius": float("inf")}, "radius must be a positive number"),
        ({"steps": 0}, "at least one step"),
        ({"learning_rate": 0.0}, "positive learning rate"),
        ({"replace": "first"}, "replace is 'first'; expected 'last' or 'all' or 'prompt'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GraceConfig(**settings)


# --- modes ------------------------------------------------------------------------------------------------------------

_NEUTRAL = (
    "edits_take",
    "loaded_equals_fresh",
    "batch_equals_singles",
    "padding_is_neutral",
    "cache_is_neutral",
    "chunks_are_neutral",
    "beams_are_neutral",
    "greedy_equals_teacher_forcing",
    "revert_all",
    "tail_equals_full",
)


def make_all(model: EditableModel) -> Grace:
    return grace(model, replace="all", steps=80)


def make_prompt(model: EditableModel) -> Grace:
    return grace(model, replace="prompt", steps=200)


def make_reference(model: EditableModel) -> Grace:
    return grace(model, compat="reference", value_start="cold")


# "last" in the fixed form meets every check in test_contract.
@pytest.mark.parametrize("check", [c for c in conformance_checks() if c.__name__ in _NEUTRAL], ids=lambda c: c.__name__)
@pytest.mark.parametrize("make", [make_all, make_prompt, make_reference])
def test_the_other_modes_are_neutral_too(make: Any, check: Any, tmp_path: Path) -> None:
    check(Case(make, "llama", tmp_path))


def test_a_single_token_has_nothing_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(model, "passage", lambda prompt, answer="": Passage((5,), (6, 7) if answer else ()))
    (refused,) = grace(model, replace="prompt").edit(EDITS[:1]).refused
    assert "single token" in refused.reason
    assert grace(model).edit(EDITS[:1]).applied


def test_a_warm_value_begins_at_what_it_replaces_and_a_cold_one_at_noise() -> None:
    warm, cold, crowd = (grace(value_start=start, steps=1, learning_rate=1e-6) for start in ("warm", "cold", "cold"))
    warm.edit(EDITS[:1])
    cold.edit(EDITS[:1])
    memory = adapter_of(warm).memory
    assert isinstance(memory, Codebook)
    assert torch.allclose(memory.contents.table, memory.replaced.table, atol=1e-5)
    value = adapter_of(cold).memory.contents.table
    assert 0.0 < float(value.min()) < float(value.max()) < 1.0
    # Drawn from the edit itself: the same in whatever company.
    crowd.edit(tuple(reversed(EDITS)))
    values = adapter_of(crowd).memory.contents.table
    assert torch.equal(values[2], value[0])
    assert not torch.allclose(values[1], value[0], atol=0.1)


def test_training_stops_when_the_target_is_said_or_takes_every_step() -> None:
    (early,) = grace(stop_loss=1.5).edit(EDITS[:1]).applied
    (late,) = grace(stop_loss=None).edit(EDITS[:1]).applied
    assert early.steps is not None
    assert early.steps < 60 == late.steps
    (reference,) = grace(compat="reference", stop_loss=1.5).edit(EDITS[:1]).applied
    assert reference.steps == 60


def test_an_edit_that_holds_already_is_kept_so_that_it_goes_on_holding() -> None:
    model = tiny_model("llama")
    (said,) = forced_answers(model, [model.passage(EDITS[0].prompt, EDITS[0].target)])
    word = model.tokenizer.decode(said.predicted[:1])
    editor = grace(model, stop_loss=20.0)
    (applied,) = editor.edit([Edit(prompt=EDITS[0].prompt, target=word or "x")]).applied
    assert (applied.steps, adapter_of(editor).router.cells) == (0, [0])


# --- company ----------------------------------------------------------------------------------------------------------


def test_reverting_any_edit_gives_what_would_be_there_without_it() -> None:
    distinct = [Edit(prompt=edit.prompt, target=target) for edit, target in zip(MORE, _TARGETS, strict=True)]
    for radius in (0.3, 1e3):  # apart, and every one splitting its neighbour
        for number in range(len(distinct)):
            whole, without = (grace(radius=radius, steps=5) for _ in range(2))
            whole.edit(distinct)
            without.edit([edit for edit in distinct if edit is not distinct[number]])
            assert whole.adapter.revert(distinct[number].id).exactness == "exact"
            assert same(tensors(whole), tensors(without))
            assert whole.adapter._state()[1] == without.adapter._state()[1]


_TARGETS = ("Rome", "Alice", "piano", "Berlin", "flute")


def test_edits_of_one_answer_may_share_a_ball_and_its_value() -> None:
    model = tiny_model("llama")
    editor = grace(model, radius=1e3, stop_loss=1.5)
    twice = [Edit(id=str(n), prompt=edit.prompt, target="Rome") for n, edit in enumerate(EDITS[:2])]
    outcome = editor.edit(twice)
    adapter = adapter_of(editor)
    assert adapter.router.cells == [0, 0]
    first, second = outcome.applied
    assert first.steps is not None
    assert second.steps is not None
    assert second.steps < first.steps  # it begins where the first one ended
    assert [edit.id for edit in adapter.edits()] == ["0", "1"]
    result = adapter.revert("0")
    assert result.exactness == "approximate"
    (held,) = forced_answers(model, [model.passage(twice[1].prompt, "Rome")])
    assert held.probability == pytest.approx(second.probability_after, abs=1e-4)


def test_labels_are_target_tokens_and_in_the_reference_a_mean() -> None:
    model = tiny_model("llama")
    edit = EDITS[0]
    passage = model.passage(edit.prompt, edit.target)
    fixed, reference = grace(model), grace(model, compat="reference")
    fixed.edit([edit])
    fixed.adapter.detach()
    reference.edit([edit])
    assert adapter_of(fixed).router.labels == [passage.answer]
    mean = (sum(passage.answer) - 100 * len(passage.prompt)) / len(passage.ids)
    assert adapter_of(reference).router.labels[0][0] == pytest.approx(mean, rel=1e-6)
    assert adapter_of(reference).router.compat == "reference"
    assert reference.adapter.editor_config["compat"] == "reference"


def test_another_target_for_a_prompt_leaves_no_split_behind() -> None:
    again = Edit(prompt=EDITS[0].prompt, target="Berlin")
    revised, fresh = grace(), grace()
    revised.edit([EDITS[0], EDITS[1], again])
    fresh.edit([EDITS[1], again])
    assert adapter_of(revised).router.store.radii.tolist() == [0.3, 0.3]
    assert same(tensors(revised), tensors(fresh))


def test_a_refused_edit_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = grace()
    editor.edit(EDITS[:2])
    before, version = tensors(editor), editor.adapter.memory_version
    run = Tail.run
    monkeypatch.setattr(Tail, "run", lambda *args: run(*args) * torch.nan)
    outcome = editor.edit([EDITS[2], Edit(id=EDITS[0].id, prompt=EDITS[0].prompt, target="Berlin")])
    assert len(outcome.refused) == 2
    assert all("not finite" in refused.reason for refused in outcome.refused)
    assert same(before, tensors(editor))
    assert editor.adapter.memory_version == version


# --- calibration ------------------------------------------------------------------------------------------------------


def test_the_radius_is_the_largest_that_lets_no_more_neighbours_fire() -> None:
    def points(*places: float) -> Tensor:
        return torch.tensor([[place, 0.0] for place in places])

    stored, neighbours = points(0, 10), points(1, 2, 3, 14)
    paraphrases, owners = points(0.5, 1.5, 9.5, 10.5), torch.tensor([0, 0, 1, 0])
    radius, record = calibrate_radius(stored, paraphrases, owners, neighbours, 0.0)
    assert radius == pytest.approx(1.0)
    assert radius < 1.0
    assert (record["paraphrases_reached"], record["neighbours_fired"]) == (0.5, 0.0)
    radius, record = calibrate_radius(stored, paraphrases, owners, neighbours, 0.25)
    assert (round(radius, 6), record["neighbours_fired"], record["paraphrases_reached"]) == (2.0, 0.25, 0.75)
    assert calibrate_radius(stored, paraphrases, owners, neighbours, 1.0)[0] == pytest.approx(4.0)
    with pytest.raises(NumericsError, match="no radius tells them apart"):
        calibrate_radius(stored, paraphrases, owners, points(0), 0.0)


def test_calibration_belongs_to_the_base_and_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(keyed, "_QUESTIONS", 6)
    model = tiny_model("llama")
    alone = grace(model, radius=None)
    alone.prepare()
    found = adapter_of(alone).router.radius
    assert found > 0.0
    assert alone.adapter._state()[1]["notes"]["calibration"]["radius"] == found
    alone.adapter.detach()
    below = grace(model, layer=0, radius=1e3, replace="all")
    below.edit(EDITS)
    beside = grace(model, radius=None)
    beside.prepare()
    assert adapter_of(beside).router.radius == found
    beside.edit(EDITS[:1])
    beside.adapter.save_pretrained(tmp_path)
    beside.adapter.detach()
    below.adapter.detach()
    monkeypatch.setattr(keyed, "_QUESTIONS", 0)  # asking again would fail
    going_on = Grace(model, adapter=AutoAdapter.from_pretrained(tmp_path))
    going_on.edit(EDITS[1:])
    assert (adapter_of(going_on).router.radius, len(adapter_of(going_on).router)) == (found, 3)
