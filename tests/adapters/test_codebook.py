"""GRACE's memory and adapter: where values stand, what the random control keeps, and what a revert leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from errata.adapters import AutoAdapter, BaseIdentity, Codebook, KeyedAdapter, RoutedLayer
from errata.adapters.codebook import Replace
from errata.edit import Edit
from errata.model import EditableModel
from errata.model.sequences import ForwardPass, RouteStore
from errata.routing import DistanceRouter, Route
from errata.testing import tiny_model

PATH = "model.layers.1.mlp.down_proj"
WIDTH, OUTPUTS = 96, 32
MODES: tuple[Replace, ...] = ("last", "prompt", "all")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codebook(entries: int, replace: Replace = "last") -> Codebook:
    memory = Codebook(OUTPUTS, replace)
    for value, base in zip(5 * noise(entries, OUTPUTS), noise(entries, OUTPUTS, seed=1), strict=True):
        memory.append(value, base)
    return memory


def routed_to(entries: list[int]) -> Route:
    entry, score = torch.tensor(entries), torch.ones(len(entries))
    return Route(entry=entry, nearest=entry, score=score, threshold=score, second=entry, second_score=score)


def marks(rows: list[str]) -> Tensor:
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def read(memory: Codebook, entries: list[int], forward_pass: ForwardPass) -> tuple[Tensor, Tensor]:
    shape = forward_pass.real.shape
    inputs, outputs = noise(*shape, WIDTH), noise(*shape, OUTPUTS, seed=2)
    selection = memory.select(routed_to(entries), DistanceRouter(WIDTH, 1.0), inputs.device)
    return outputs, memory.read(inputs, outputs, selection, forward_pass)


# Padding on either side; the last token of the third row is an answer's.
REAL, PROMPT = marks(["xxxx", ".xxx", "xxxx", "xxx."]), marks(["xxxx", ".xxx", "xxx.", "xx.."])
PREFILL = {
    "last": marks(["...x", "...x", "..x.", ".x.."]),
    "prompt": marks(["xxx.", ".xx.", "xx..", "x..."]),
    "all": REAL,
}


@pytest.mark.parametrize("replace", MODES)
def test_a_value_stands_at_its_places_and_nothing_else_moves(replace: Replace) -> None:
    memory = codebook(3, replace)
    entries = [2, -1, 0, 1]
    outputs, changed = read(memory, entries, ForwardPass(REAL, PROMPT, 0, RouteStore(4)))
    for row, entry in enumerate(entries):
        for column in range(4):
            stands = entry >= 0 and bool(PREFILL[replace][row, column])
            wanted = memory.contents.table[entry] if stands else outputs[row, column]
            assert torch.equal(changed[row, column], wanted), (row, column)


@pytest.mark.parametrize("replace", MODES)
def test_generated_tokens_are_touched_only_where_all_are(replace: Replace) -> None:
    memory, one = codebook(2, replace), marks(["x", "x"])
    outputs, changed = read(memory, [1, -1], ForwardPass(one, ~one, 4, RouteStore(2, frozen=True)))
    assert torch.equal(changed[1], outputs[1])
    assert torch.equal(changed[0, 0], memory.contents.table[1]) == (replace == "all")
    assert torch.equal(changed[0], outputs[0]) == (replace != "all")


@pytest.mark.parametrize("replace", MODES)
def test_a_prompt_that_goes_on_has_no_last_token_yet(replace: Replace) -> None:
    memory, chunk = codebook(1, replace), marks(["xx", "xx"])
    goes_on = torch.tensor([True, False])
    outputs, changed = read(memory, [0, 0], ForwardPass(chunk, chunk, 0, RouteStore(2), goes_on))
    moved = (changed != outputs).any(dim=2).tolist()
    ends = {"last": [False, True], "prompt": [True, False], "all": [True, True]}[replace]
    assert moved == [[replace != "last"] * 2, ends]


def test_nobody_routed_costs_and_changes_nothing() -> None:
    one = marks(["xx"])
    outputs, changed = read(codebook(1), [-1], ForwardPass(one, one, 0, RouteStore(1)))
    assert changed is outputs
    empty = Codebook(OUTPUTS)
    assert read(empty, [-1], ForwardPass(one, one, 0, RouteStore(1)))[1].shape == (1, 2, OUTPUTS)


def test_the_selection_is_where_the_layer_is_and_values_take_its_precision() -> None:
    memory, one = codebook(1), marks(["x"])
    hit, values = memory.select(routed_to([0]), DistanceRouter(WIDTH, 1.0), torch.device("meta"))
    assert (hit.device.type, values.device.type) == ("cpu", "meta")
    half = noise(1, 1, OUTPUTS).bfloat16()
    selection = memory.select(routed_to([0]), DistanceRouter(WIDTH, 1.0), half.device)
    changed = memory.read(half, half, selection, ForwardPass(one, one, 0, RouteStore(1)))
    assert torch.equal(changed[0, 0], memory.contents.table[0].bfloat16())


def test_random_content_moves_each_edits_own_prompt_as_far() -> None:
    memory = codebook(20)
    random = memory.with_random_content(torch.Generator().manual_seed(0))
    assert torch.equal(random.replaced.table, memory.replaced.table)
    real, turned = (m.contents.table - m.replaced.table for m in (memory, random))
    assert torch.allclose(real.norm(dim=1), turned.norm(dim=1), rtol=1e-4)
    assert float(torch.cosine_similarity(real, turned, dim=1).mean().abs()) < 0.3
    assert random.norm() == pytest.approx(memory.norm(), rel=1e-4)


def test_forgetting_leaves_the_others_and_clearing_nothing() -> None:
    memory = codebook(5)
    values, replaced = memory.contents.table.clone(), memory.replaced.table.clone()
    assert memory.forget([1, 3]) is None
    assert torch.equal(memory.contents.table, values[[0, 2, 4]])
    assert torch.equal(memory.replaced.table, replaced[[0, 2, 4]])
    memory.clear()
    assert (len(memory.contents), len(memory.replaced), memory.norm()) == (0, 0, 0.0)


# --- the adapter ------------------------------------------------------------------------------------------------------

PROMPTS = ("The capital of France", "Bob wrote Hamlet", "Zed was born in", "The flute of Ann")


def keyed(model: EditableModel, labels: list[int], values: Tensor, radius: float = 0.5) -> KeyedAdapter:
    """An adapter with an edit per label, each at its prompt's own key."""
    layer = RoutedLayer(DistanceRouter(WIDTH, radius), Codebook(OUTPUTS))
    adapter = KeyedAdapter(BaseIdentity.of(model), "test", {}, path=PATH, layer=layer)
    for number, (prompt, label) in enumerate(zip(PROMPTS, labels, strict=False)):
        ((_, key),) = adapter.gathered([prompt], model)
        adapter.store(f"e{number}", key[0], (label,), values[number], torch.zeros(OUTPUTS))
        adapter.remember(Edit(id=f"e{number}", prompt=prompt, target="t"))
    return adapter


def answers(model: EditableModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.forward(model.batch([model.passage(prompt) for prompt in PROMPTS])).logits
    return logits[:, -1]


def test_it_acts_explains_saves_and_reverts_exactly(tmp_path: Path) -> None:
    model = tiny_model("llama")
    base = answers(model)
    adapter = keyed(model, [1, 2, 3], 30 * noise(4, OUTPUTS))
    adapter.save_pretrained(tmp_path)
    loaded = AutoAdapter.from_pretrained(tmp_path, model=model)
    assert isinstance(loaded, KeyedAdapter)
    edited = answers(model)
    assert [torch.equal(e, b) for e, b in zip(edited, base, strict=True)] == [False, False, False, True]
    explained = loaded.explain(PROMPTS)
    assert [(e.edit_id, e.fires) for e in explained[:3]] == [("e0", True), ("e1", True), ("e2", True)]
    assert all(e.score == pytest.approx(1.0, abs=1e-4) for e in explained[:3])
    assert not explained[3].fires
    for one, other in zip(adapter._state()[0].values(), loaded._state()[0].values(), strict=True):
        assert torch.equal(one, other)

    result = loaded.revert("e1")
    assert (result.exactness, loaded.memory_version) == ("exact", adapter.memory_version + 1)
    reverted = answers(model)
    assert torch.equal(reverted[1], base[1])
    assert torch.equal(reverted[[0, 2, 3]], edited[[0, 2, 3]])
    assert [loaded.revert(name).exactness for name in ("e0", "e2")] == ["exact", "exact"]
    assert torch.equal(answers(model), base)


def test_of_two_that_share_a_ball_the_other_one_stays() -> None:
    model = tiny_model("llama")
    values = 30 * noise(4, OUTPUTS)
    values[1] = values[0]  # it joined, and nothing was left to train
    values[2] = values[0] + 1.0  # it joined, and was trained on
    everything = 1e3  # one ball for all
    base = answers(model)

    adapter = keyed(model, [7, 7, 7], values, everything)
    assert adapter.router.cells == [0, 0, 0]
    result = adapter.revert("e2")  # nobody's training began with its content
    assert result.exactness == "exact"
    fresh = keyed(model, [7, 7], values, everything)
    for name, tensor in adapter._state()[0].items():
        assert torch.equal(tensor, fresh._state()[0][name]), name

    adapter = keyed(model, [7, 7, 7], values, everything)
    result = adapter.revert("e1")  # e2 would have begun with e0's content, which is the same
    assert result.exactness == "exact"

    adapter = keyed(model, [7, 7, 7], values, everything)
    adapter.attach(model)
    result = adapter.revert("e0")
    assert result.exactness == "approximate"
    assert "e1 shared a ball with it" in result.reason
    assert [e.edit_id for e in adapter.explain(PROMPTS[1:3])] == ["e1", "e1"]
    assert not torch.equal(answers(model)[1], base[1])  # the other edits still hold
    assert adapter.revert("e2").exactness == "exact"
    assert "only edit" in adapter.revert("e1").reason
    assert torch.equal(answers(model), base)


def test_an_edit_given_again_takes_its_own_place() -> None:
    model = tiny_model("llama")
    values = 30 * noise(4, OUTPUTS)
    adapter = keyed(model, [1, 2, 3], values)
    key = adapter.router.store.keys[0].clone()
    adapter.store("e0", key, (1,), values[3], torch.zeros(OUTPUTS))
    assert adapter.router.owners == ["e1", "e2", "e0"]
    assert torch.equal(adapter.memory.contents.table, values[1:4])
    assert int(adapter.router.decide(key[None]).entry) == 2
