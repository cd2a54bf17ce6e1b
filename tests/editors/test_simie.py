"""SimIE: the recursion against the joint least squares, and what follows from it: order and removal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.adapters import AutoAdapter, LeastSquaresAdapter, WeightChange
from errata.adapters.least_squares import RidgeInverse, recursion
from errata.edit import Edit
from errata.editors.simie import Simie, SimieConfig
from errata.errors import ConfigError
from errata.model.probes import capturing_inputs
from errata.testing import tiny_model

EDITS = (
    Edit(prompt="The capital of France", target="Rome", subject="France"),
    Edit(prompt="Bob wrote Hamlet", target="Alice", subject="Hamlet"),
    Edit(prompt="The flute of Ann", target="piano", subject="Ann"),
)
FT: dict[str, Any] = {"layers": (1,), "learning_rate": 5e-3, "steps": 30}
SIMIE: dict[str, Any] = {"inner": "ft", "inner_settings": FT, "ridge": 1e-2, "guard": "off"}


def joint(keys: list[torch.Tensor], values: list[torch.Tensor], ridge: float) -> torch.Tensor:
    """The D of least Σ ‖D K − V‖² + λ ‖D‖², all edits in one system of the key width."""
    system = sum(k @ k.T for k in keys) + ridge * torch.eye(len(keys[0]), dtype=torch.float64)
    wanted = sum(v @ k.T for v, k in zip(values, keys, strict=True))
    found: torch.Tensor = torch.linalg.solve(system, wanted, left=False)
    return found


@pytest.mark.parametrize("counts", [(3,), (1, 1, 1), (4, 2, 5), (8, 20, 3, 9)])
def test_the_recursion_equals_the_joint_least_squares(counts: tuple[int, ...]) -> None:
    """Below and above as many keys as inputs (twelve), where the inverse changes its form."""
    generator = torch.Generator().manual_seed(0)
    keys = [torch.randn(12, n, generator=generator, dtype=torch.float64) for n in counts]
    values = [torch.randn(5, n, generator=generator, dtype=torch.float64) for n in counts]
    inverse, total = RidgeInverse.empty(12, 0.3), torch.zeros(5, 12, dtype=torch.float64)
    for taken, (left, right) in enumerate(recursion(keys, values, inverse, total), 1):
        total = total + left @ right.T
        torch.testing.assert_close(total, joint(keys[:taken], values[:taken], 0.3), rtol=1e-9, atol=1e-11)
    for own in keys:
        inverse, _ = inverse.extended(own)
    system = sum(k @ k.T for k in keys) + 0.3 * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(inverse.apply(torch.eye(12, dtype=torch.float64)), torch.linalg.inv(system))
    assert (inverse.dense is None) == (sum(counts) < 12)


def change_of(editor: Simie) -> torch.Tensor:
    (contribution,) = editor.adapter.contributions().values()
    change = contribution.weight_change()
    assert change is not None
    return change.double()


def test_what_is_written_is_the_joint_solution_of_what_the_inner_editor_wants() -> None:
    editor = Simie(tiny_model("llama"), **SIMIE)
    editor.edit(EDITS)
    keys, values = [], []
    for edit in EDITS:
        model = tiny_model("llama")
        path = model.anatomy.mlp_output[1]
        batch = model.batch([model.passage(edit.prompt, edit.target)])
        with torch.no_grad(), capturing_inputs(model.model, [path], 1) as inputs:
            model.trunk_states(batch)
        keys.append(inputs[path][0].T.double())
        alone = Simie(model, **SIMIE)._inner
        alone.adapter.attach(model)
        alone.edit([edit])
        change = alone.adapter.contributions()[path].weight_change()
        assert change is not None
        values.append(change.double() @ keys[-1])
    assert isinstance(editor.adapter, LeastSquaresAdapter)
    (ridge,) = editor.adapter.ridges.values()
    expected = joint(keys, values, ridge)
    torch.testing.assert_close(change_of(editor), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_order_of_edits_makes_no_difference() -> None:
    one, other = Simie(tiny_model("llama"), **SIMIE), Simie(tiny_model("llama"), **SIMIE)
    one.edit(EDITS)
    other.edit(EDITS[::-1])
    size = float(change_of(one).abs().max())
    torch.testing.assert_close(change_of(one), change_of(other), rtol=1e-3, atol=1e-5 * size)


def test_a_reverted_edit_is_as_if_it_had_never_been_made(tmp_path: Path) -> None:
    editor, without = Simie(tiny_model("llama"), **SIMIE), Simie(tiny_model("llama"), **SIMIE)
    editor.edit(EDITS)
    without.edit(EDITS[::2])
    assert editor.adapter.revert(EDITS[1].id).exactness == "exact"
    expected = change_of(without)
    torch.testing.assert_close(change_of(editor), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    editor.adapter.save_pretrained(tmp_path)
    model = editor.model
    editor.adapter.detach()
    again = Simie(model, adapter=AutoAdapter.from_pretrained(tmp_path))
    for one in (again, without):
        one.edit(EDITS[1:2])
    expected = change_of(without)
    torch.testing.assert_close(change_of(again), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["new", EDITS[0].id])
def test_an_edit_of_the_same_prompt_takes_its_place(name: str) -> None:
    """Under an id of its own or under the old one: least squares must not go on asking for both targets."""
    revised = Edit(id=name, prompt=EDITS[0].prompt, target="Berlin", subject="France")
    editor, without = Simie(tiny_model("llama"), **SIMIE), Simie(tiny_model("llama"), **SIMIE)
    editor.edit([EDITS[0], EDITS[1], revised])
    without.edit([EDITS[1], revised])
    expected = change_of(without)
    torch.testing.assert_close(change_of(editor), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_edits_of_one_batch_are_told_apart_but_not_exactly() -> None:
    editor = Simie(tiny_model("llama"), batch_size=3, **SIMIE)
    editor.edit(EDITS)
    result = editor.adapter.revert(EDITS[0].id)
    assert (result.exactness, "2 edits of its own batch" in result.reason) == ("approximate", True)
    assert editor.adapter.revert(EDITS[1].id).exactness == "approximate"
    assert editor.adapter.revert(EDITS[2].id).exactness == "exact"
    assert not change_of(editor).any()


def test_it_is_what_its_inner_editor_is() -> None:
    model = tiny_model("llama")
    rome = Simie(model, inner="rome", guard="off")
    assert (rome.needs_subject, rome.writes_jointly) == (True, False)
    ft = Simie(model, **SIMIE)
    assert (ft.needs_subject, ft.writes_jointly) == (False, True)
    assert ft.config.inner_settings["steps"] == 30
    assert ft.config.inner_settings["stop_loss"] == 1e-2  # what is not given is saved too
    assert SimieConfig.from_record(ft.config.to_record()) == ft.config
    assert ft.edit([Edit(prompt="Ann is", target="Berlin")]).applied[0].probability_after > 0.01


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inner": "simie"}, "not simie itself"),
        ({"ridge": 0.0}, "positive ridge"),
        ({"inner": "memoir"}, "memoir makes none"),
        ({"inner": "romeo"}, "Did you mean 'rome'"),
        ({"inner": "ft", "inner_settings": {"step": 3}}, "Did you mean 'steps'"),
    ],
)
def test_what_cannot_be_joined_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Simie(tiny_model("llama"), **settings)


def test_a_refused_batch_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = Simie(tiny_model("llama"), **SIMIE)
    editor.edit(EDITS[:2])
    before, version = change_of(editor), editor.adapter.memory_version
    revised = EDITS[0].model_copy(update={"target": "Berlin"})
    monkeypatch.setattr(LeastSquaresAdapter, "steps", _nothing_finite)
    outcome = editor.edit([revised])
    assert "not finite" in outcome.refused[0].reason
    assert torch.equal(change_of(editor), before)
    assert editor.adapter.memory_version == version


def _nothing_finite(self: LeastSquaresAdapter, wanted: Any) -> list[WeightChange]:
    return [replace(change, left=change.left * torch.nan) for change in self._changes]
