"""ROME, EMMET, MEMIT and AlphaEdit at work on a model: keys, values, layers, earlier edits, batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.adapters import AutoAdapter, DeltaAdapter
from errata.edit import Edit
from errata.editors.alphaedit import AlphaEdit, AlphaEditConfig
from errata.editors.located import Located
from errata.editors.memit import Emmet, EmmetConfig, Memit, MemitConfig
from errata.editors.rome import Rome
from errata.editors.values import TargetValue
from errata.errors import ConfigError, EditError, NumericsError
from errata.model import EditableModel
from errata.testing import tiny_model

EDITS = [
    Edit(prompt="The capital of France", target="Rome", subject="France"),
    Edit(prompt="Bob wrote Hamlet", target="Alice", subject="Hamlet"),
    Edit(prompt="The flute of Ann", target="piano", subject="Ann"),
]
SEARCH: dict[str, Any] = {"steps": 10, "learning_rate": 0.3, "clamp": 20.0, "weight_decay": 0.0, "kl_factor": 0.0}
SETTINGS: dict[str, Any] = {**SEARCH, "layers": (1,), "contexts": 0, "tokens_per_width": 12.0, "guard": "off"}
ALPHA: dict[str, Any] = {**SETTINGS, "relative": True, "threshold": 0.3, "ridge": 1e-6}


def changes(editor: Located[Any]) -> dict[str, Tensor]:
    found = {path: each.weight_change() for path, each in editor.adapter.contributions().items()}
    return {path: change for path, change in found.items() if change is not None}


def recording(monkeypatch: pytest.MonkeyPatch, editor: Located[Any]) -> list[TargetValue]:
    """The values that the editor will find, as it finds them."""
    values: list[TargetValue] = []
    find = editor._values

    def record(edits: Any) -> list[TargetValue]:
        values.extend(find(edits))
        return values[-len(edits) :]

    monkeypatch.setattr(editor, "_values", record)
    return values


def leaving(model: EditableModel, edit: Edit, layer: int) -> Tensor:
    """The residual stream behind a block at the subject's last token, [hidden]."""
    batch = model.batch([model.passage(edit.prompt)], side="right")
    with torch.no_grad():
        states = model.forward(batch, output_hidden_states=True).hidden_states[layer + 1]
    return states[0, model.subject_span(edit.prompt, edit.subject or "").last]


def shaped(architecture: str, blocks: int, hidden: int, width: int) -> Any:
    anatomy = SimpleNamespace(hidden_size=hidden, key_width=(width,) * blocks)
    return SimpleNamespace(architecture=architecture, layer_count=blocks, anatomy=anatomy)


# --- settings --------------------------------------------------------------------------------------------------------


def test_published_settings_tell_llama_2_from_llama_3() -> None:
    second, third = (MemitConfig.for_model(shaped("llama", 32, 4096, width)) for width in (11008, 14336))
    assert (second.layers, second.clamp, second.weight_decay, second.learning_rate) == ((4, 5, 6, 7, 8), 4.0, 1e-3, 0.5)
    assert (third.layers, third.clamp, third.weight_decay, third.learning_rate) == ((4, 5, 6, 7, 8), 0.75, 0.5, 0.1)
    assert MemitConfig.for_model(shaped("gpt2", 48, 1600, 6400)).preservation == 20000.0
    assert EmmetConfig.for_model(shaped("gptj", 28, 4096, 16384)).layers == (5,)
    alpha = AlphaEditConfig.for_model(shaped("llama", 32, 4096, 14336))
    assert (alpha.threshold, alpha.ridge, alpha.relative, alpha.protect_past) == (2e-2, 10.0, False, "cache")
    assert AlphaEditConfig.for_model(shaped("llama", 16, 2048, 8192)).relative


def test_layers_and_contexts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="layers is empty"):
        MemitConfig(layers=())
    with pytest.raises(ConfigError, match="between 0 and 5, not 6"):
        EmmetConfig(contexts=6)


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])  # plain; transposed weights; normed behind the MLP
def test_emmet_gives_every_edit_of_a_batch_its_value(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = Emmet(tiny_model(family), batch_size=3, **SETTINGS)
    editor.prepare()
    values = recording(monkeypatch, editor)
    outcome = editor.edit(EDITS)
    assert len(outcome.applied) == len(values) == 3
    (change,) = changes(editor).values()
    for value in values:
        assert torch.allclose(change @ value.keys[0], value.delta, rtol=1e-3, atol=1e-4)


def test_rome_with_the_bare_prompt_alone_is_emmet_with_one_edit() -> None:
    rome = Rome(tiny_model("llama"), layer=1, **{k: v for k, v in SETTINGS.items() if k != "layers"})
    emmet = Emmet(tiny_model("llama"), **SETTINGS)
    # EMMET seeks its value in the residual stream; where that only differs in the bounds of δ, both find the same.
    for editor in (rome, emmet):
        editor.edit(EDITS[:1])
    (first,), (second,) = changes(rome).values(), changes(emmet).values()
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-5)


def test_a_key_is_half_the_bare_prompts() -> None:
    editor = Memit(tiny_model("llama"), **{**SETTINGS, "contexts": 5})
    assert editor._weights(6).tolist() == [0.5] + [0.1] * 5
    assert editor._weights(1).tolist() == [1.0]
    editor.edit(EDITS[:1])
    begin = ("The", "Therefore", "Because", "I", "You")
    assert all(text.startswith(word) for text, word in zip(editor._contexts, begin, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("make", [Emmet, Memit, AlphaEdit], ids=lambda make: make.name)
def test_several_layers_reach_together_what_is_wanted(
    make: type[Located[Any]], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The residual stream behind the last layer becomes z, and every layer has its part in it."""
    settings = {**(ALPHA if make is AlphaEdit else SETTINGS), "layers": (2, 0, 1), "batch_size": 2}
    if make is Memit:
        settings["preservation"] = 1e-6
    model = tiny_model(family)
    editor = make(model, **settings)
    editor.prepare()
    values = recording(monkeypatch, editor)
    editor.edit(EDITS[:2])
    assert len(changes(editor)) == 3
    assert all(float(change.norm()) > 0 for change in changes(editor).values())
    for edit, value in zip(EDITS, values, strict=False):
        assert torch.allclose(leaving(model, edit, 2), value.initial + value.delta, rtol=1e-2, atol=1e-2)


def test_rome_can_be_spread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    settings = {name: value for name, value in SETTINGS.items() if name != "layers"}
    editor = Rome(model, layer=2, spread=(1,), **settings)
    editor.prepare()
    values = recording(monkeypatch, editor)
    editor.edit(EDITS[:1])
    assert len(changes(editor)) == 2
    assert torch.allclose(leaving(model, EDITS[0], 2), values[0].initial + values[0].delta, rtol=1e-2, atol=1e-2)


def test_a_change_is_not_spread_where_blocks_do_not_add() -> None:
    with pytest.raises(ConfigError, match=r"cannot be spread over layers 0, 1; give one of them"):
        Memit(tiny_model("gemma2"), **{**SETTINGS, "layers": (0, 1)}).edit(EDITS[:1])


def test_alphaedit_says_how_much_room_it_has_and_stays_there() -> None:
    editor = AlphaEdit(tiny_model("llama"), batch_size=3, **ALPHA)
    editor.edit(EDITS)
    assert isinstance(editor.adapter, DeltaAdapter)
    ((layer, space),) = editor._spaces.items()
    assert editor.adapter.notes["null_spaces"] == {str(layer): {"rank": space.rank, "share": space.share}}
    assert 0 < space.rank < 96
    (change,) = changes(editor).values()
    kept = torch.eye(96, dtype=torch.float64) - space.project(torch.eye(96, dtype=torch.float64))
    assert float((change.double() @ kept).norm()) < 1e-5 * float(change.norm())


def test_alphaedit_wants_enough_text(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Ann plays the flute and Bob wrote Hamlet in London.\n" * 12)
    with pytest.raises(NumericsError, match=r"are too few .* or give a larger corpus"):
        AlphaEdit(tiny_model("llama"), corpus=str(corpus), **ALPHA).edit(EDITS[:1])


# --- earlier edits ----------------------------------------------------------------------------------------------------


def moved(make: Callable[[EditableModel], Located[Any]]) -> float:
    """How far the second and third edit push what the first one wrote at its key, relative to what it wrote."""
    editor = make(tiny_model("llama"))
    editor.edit(EDITS[:1])
    assert isinstance(editor.adapter, DeltaAdapter)
    (first,) = editor.adapter._changes
    # The direction it was written in is C⁻¹ k, with the C that is factored.
    factor = editor._statistics[1].cholesky
    key = (factor @ (factor.T @ first.right.double())).float()
    before = next(iter(changes(editor).values())) @ key
    editor.edit(EDITS[1:])
    return float((next(iter(changes(editor).values())) @ key - before).norm() / before.norm())


def test_past_keys_are_spared() -> None:
    bare = moved(lambda model: Emmet(model, **SETTINGS))
    spared = moved(lambda model: Emmet(model, protect_past="cache", preservation=1e-6, **SETTINGS))
    assert spared < 1e-3 * bare


@pytest.mark.parametrize("make", [Emmet, Memit, AlphaEdit], ids=lambda make: make.name)
def test_the_cache_goes_with_the_adapter(make: type[Located[Any]], tmp_path: Path) -> None:
    """Saved, loaded and gone on with; and without the edit that was taken out."""
    settings = {**(ALPHA if make is AlphaEdit else SETTINGS), "protect_past": "cache"}
    model = tiny_model("llama")
    whole = make(model, **settings)
    whole.edit(EDITS)
    in_one_go = changes(whole)
    whole.adapter.detach()
    first = make(model, **settings)
    first.edit(EDITS[:2])
    first.adapter.save_pretrained(tmp_path)
    first.adapter.detach()
    second = make(model, adapter=AutoAdapter.from_pretrained(tmp_path))
    second.edit(EDITS[2:])
    for path, change in changes(second).items():
        assert torch.equal(change, in_one_go[path])
    assert isinstance(second.adapter, DeltaAdapter)
    path = second._path(1)
    assert [keys.shape for keys in second.adapter.stored_keys(path)] == [(96, 1)] * 3
    second.adapter.revert(EDITS[0].id)
    assert len(second.adapter.stored_keys(path)) == 2


def test_without_a_cache_no_keys_are_kept() -> None:
    editor = Memit(tiny_model("llama"), **SETTINGS)
    editor.edit(EDITS[:1])
    assert isinstance(editor.adapter, DeltaAdapter)
    assert not editor.adapter.stored_keys(editor._path(1))


# --- taking back ------------------------------------------------------------------------------------------------------


def test_one_edit_of_a_batch_can_be_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others keep their values; its own key gives what it gave before. That is not as if it had never been there."""
    editor = Emmet(tiny_model("llama"), batch_size=3, **SETTINGS)
    editor.prepare()
    values = recording(monkeypatch, editor)
    editor.edit(EDITS)
    result = editor.adapter.revert(EDITS[1].id)
    assert result.exactness == "approximate"
    assert "2 changes of its own batch" in result.reason
    (change,) = changes(editor).values()
    for number, value in enumerate(values):
        expected = torch.zeros(32) if number == 1 else value.delta
        assert torch.allclose(change @ value.keys[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layers", [(1,), (0, 1)])
def test_what_is_subtracted_whole_is_said_to_be(layers: tuple[int, ...]) -> None:
    editor = Memit(tiny_model("llama"), **{**SETTINGS, "layers": layers})
    editor.edit(EDITS)
    assert editor.adapter.revert(EDITS[2].id).exactness == "exact"
    assert "later changes were computed with it in place" in editor.adapter.revert(EDITS[0].id).reason


@pytest.mark.parametrize("cache", ["none", "cache"])
def test_an_exact_revert_is_as_if_the_edit_had_never_been(cache: str) -> None:
    model = tiny_model("llama")
    editor = Memit(model, **{**SETTINGS, "protect_past": cache})
    editor.edit(EDITS)
    version = editor.adapter.memory_version
    (result,) = editor.revert_exactly([EDITS[0].id])
    assert (result.exactness, editor.adapter.edits()) == ("exact", EDITS[1:])
    assert editor.adapter.memory_version > version
    assert list(model.adapters) == ["memit"]
    never = Memit(tiny_model("llama"), **{**SETTINGS, "protect_past": cache})
    never.edit(EDITS[1:])
    for path, change in changes(editor).items():
        assert torch.equal(change, changes(never)[path])


def test_an_exact_revert_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = Memit(tiny_model("llama"), **SETTINGS)
    editor.edit(EDITS)
    before, adapter = changes(editor), editor.adapter
    with pytest.raises(EditError, match="holds no edit 'nobody'"):
        editor.revert_exactly([EDITS[0].id, "nobody"])

    def stubborn(edits: Any, progress: Any) -> Any:
        raise NumericsError("not this one")

    monkeypatch.setattr(editor, "_write", stubborn)
    with pytest.raises(EditError, match="cannot be written without these: not this one"):
        editor.revert_exactly([EDITS[0].id])
    assert editor.adapter is adapter
    assert adapter.is_attached
    assert editor.adapter.edits() == EDITS
    assert all(torch.equal(change, before[path]) for path, change in changes(editor).items())


# --- norms ------------------------------------------------------------------------------------------------------------


def test_anchored_values_have_the_norm_they_have_on_the_unedited_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errata.editors.located._PROBES", 2)
    editor = Emmet(tiny_model("llama"), anchor_norms=True, **SETTINGS)
    editor.prepare()
    assert isinstance(editor.adapter, DeltaAdapter)
    norm = editor.adapter.notes["value_norm"]
    values = recording(monkeypatch, editor)
    editor.edit(EDITS[:1])
    (change,) = changes(editor).values()
    put_out = values[0].outputs[0] + change @ values[0].keys[0]
    assert float(put_out.norm()) == pytest.approx(norm, rel=1e-3)
    direction = values[0].outputs[0] + values[0].delta
    assert float(torch.cosine_similarity(put_out, direction, dim=0)) == pytest.approx(1.0, abs=1e-4)
    assert norm != pytest.approx(float(direction.norm()), rel=1e-3)
