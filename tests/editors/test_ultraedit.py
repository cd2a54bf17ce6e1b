"""UltraEdit: its statistics and its solve against what they stand for, and that both go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from errata.adapters import AutoAdapter, DeltaAdapter
from errata.edit import Edit
from errata.editors.ultraedit import RunningStatistics, UltraEdit, UltraEditConfig, ridge_factors
from errata.errors import ConfigError
from errata.testing import tiny_model

EDITS = (
    Edit(prompt="The capital of France", target="Rome and Paris", subject="France"),
    Edit(prompt="Bob wrote Hamlet", target="Alice", subject="Hamlet"),
    Edit(prompt="The flute of Ann", target="piano", subject="Ann"),
)
TINY: dict[str, Any] = {"layers": (1, 2), "learning_rate": 1e-3, "warm_up": 10, "guard": "off"}


def rows(count: int, features: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-6, 3, features, dtype=torch.float64)
    return 3.0 + scales * torch.randn(count, features, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("sizes", [(20,), (1,) * 20, (1, 7, 12), (12, 7, 1), (19, 1)])
def test_statistics_equal_two_passes_over_any_split(sizes: tuple[int, ...]) -> None:
    whole = rows(20)
    statistics = RunningStatistics.empty(whole.shape[1])
    for part in whole.split(sizes):  # type: ignore[no-untyped-call]
        statistics = statistics.merged(part)
    assert statistics.count == 20
    torch.testing.assert_close(statistics.mean, whole.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(statistics.squares / 19, whole.var(0), rtol=1e-9, atol=1e-24)
    expected = (whole - whole.mean(0)) / whole.std(0)
    torch.testing.assert_close(statistics.normalised(whole), expected, rtol=1e-7, atol=1e-7)


def test_one_row_alone_has_no_deviation_and_poisons_nothing() -> None:
    one = RunningStatistics.empty(7).merged(rows(1))
    assert torch.equal(one.normalised(rows(1)), torch.zeros(1, 7, dtype=torch.float64))
    constant = RunningStatistics.empty(2).merged(torch.ones(5, 2))
    assert torch.equal(constant.normalised(torch.ones(5, 2)), torch.zeros(5, 2, dtype=torch.float64))
    assert float(one.merged(rows(9, seed=1)).normalised(rows(9, seed=1)).abs().max()) <= 10**0.5


@pytest.mark.parametrize(("count", "inputs"), [(5, 40), (40, 5), (1, 8)])
def test_the_small_system_solves_the_large_one(count: int, inputs: int) -> None:
    keys, wanted, ridge = rows(count, inputs), rows(count, 6, seed=1), 0.7
    left, right, condition = ridge_factors(keys, wanted, ridge)
    system = keys.T @ keys + ridge * torch.eye(inputs, dtype=torch.float64)
    large = torch.linalg.solve(system, keys.T @ wanted).T
    torch.testing.assert_close(left @ right.T, large, rtol=1e-7, atol=1e-9 * float(large.abs().max()))
    assert condition == pytest.approx(float(torch.linalg.cond(keys @ keys.T + ridge * torch.eye(count))), rel=1e-3)


def test_what_is_written_is_the_published_rule() -> None:
    """One batch, written out from a plain backward pass over the whole model."""
    model = tiny_model("llama")
    editor = UltraEdit(model, **{**TINY, "layers": (2,), "warm_up": 0})
    batch = model.batch([model.passage(edit.prompt, edit.target) for edit in EDITS], side="right")
    places = batch.answer_places()
    layer = model.module(model.anatomy.mlp_output[2])
    seen: dict[str, torch.Tensor] = {}

    def remember(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen["inputs"], seen["outputs"] = args[0], output.detach().requires_grad_(True)
        return seen["outputs"]

    handle = layer.register_forward_hook(remember)
    logits = model.forward(batch).logits[places[0], places[1]]
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits, places[2], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, seen["outputs"])
    h, g = (each[places[0], places[1]].double() for each in (seen["inputs"], gradient))
    scored_h, scored_g = ((each - each.mean(0)) / each.std(0) for each in (h, g))
    v = -1e-3 * scored_h.square().sum(1, keepdim=True) * scored_g
    expected = torch.linalg.solve(h.T @ h + torch.eye(96, dtype=torch.float64), h.T @ v).T
    editor.edit(EDITS)
    (contribution,) = editor.adapter.contributions().values()
    change = contribution.weight_change()
    assert change is not None
    torch.testing.assert_close(change.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_statistics_are_saved_and_go_on(tmp_path: Path) -> None:
    whole = UltraEdit(tiny_model("llama"), batch_size=1, **TINY)
    whole.edit(EDITS)
    model = tiny_model("llama")
    first = UltraEdit(model, batch_size=1, **TINY)
    first.edit(EDITS[:1])
    first.adapter.save_pretrained(tmp_path)
    first.adapter.detach()
    loaded = AutoAdapter.from_pretrained(tmp_path)
    assert isinstance(loaded, DeltaAdapter)
    assert isinstance(first.adapter, DeltaAdapter)
    assert loaded.kept.keys() == first.adapter.kept.keys() == {"count.96", "mean.96", "squares.96"}
    second = UltraEdit(model, adapter=loaded)
    second.edit(EDITS[1:])
    assert isinstance(whole.adapter, DeltaAdapter)
    assert all(torch.equal(loaded.kept[name], tensor) for name, tensor in whole.adapter.kept.items())
    unread = UltraEdit(tiny_model("llama"), **TINY)
    unread.prepare()
    assert isinstance(unread.adapter, DeltaAdapter)
    tokens = sum(len(model.passage(edit.prompt, edit.target).answer) for edit in EDITS)
    # Two layers share the statistics of their shape.
    assert int(loaded.kept["count.96"]) == int(unread.adapter.kept["count.96"]) + 2 * tokens


def test_a_refused_batch_leaves_the_statistics_as_they_were() -> None:
    editor = UltraEdit(tiny_model("llama"), **{**TINY, "layers": (1,), "warm_up": 0})
    outcome = editor.edit(EDITS[1:2])  # a single token, the first of all
    assert "changed nothing" in outcome.refused[0].reason
    assert isinstance(editor.adapter, DeltaAdapter)
    assert not editor.adapter.kept


def test_done_over_it_comes_to_rest_at_the_target() -> None:
    model = tiny_model("llama")
    once, often = ({**TINY, "layers": (1,), "learning_rate": 1e-2, "batch_size": 1, "steps": n} for n in (1, 60))
    reached = [UltraEdit(tiny_model("llama"), **once), UltraEdit(model, **often)]
    outcomes = [editor.edit(EDITS[1:]) for editor in reached]
    assert not any(edit.took for edit in outcomes[0].applied)
    assert all(edit.took for edit in outcomes[1].applied)
    norm = outcomes[1].changes[0].norm
    reached[1].edit(EDITS[2:])
    assert reached[1].adapter.layer_changes(model)[0].norm < 1.2 * norm


@pytest.mark.parametrize("settings", [{"layers": ()}, {"steps": 0}, {"learning_rate": 0.0}, {"ridge": 0.0}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least one layer"):
        UltraEditConfig(**settings)
