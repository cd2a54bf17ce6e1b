"""Routers and memories: what a memory of columns reads, its random control, kinds on disk, and room for other kinds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor

from errata.adapters import AutoAdapter, BaseIdentity, ColumnMemory, Memory, RoutedAdapter, RoutedLayer
from errata.adapters.memories import Acts, Selection, Written
from errata.edit import Edit
from errata.errors import ArtifactError, ConfigError
from errata.model import EditableModel
from errata.model.probes import adding
from errata.model.sequences import ForwardPass, RouteStore
from errata.routing import Route, Router, TopHashRouter
from errata.testing import tiny_model

PATH = "model.layers.1.mlp.down_proj"
WIDTH, OUTPUTS, MARKED = 96, 32, 12


def entry(mask: Tensor, seed: int, rank: int = 2, keys: int = 3) -> Written:
    """What an edit may have written into the columns of a mask."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return ((seed + 1.0) * torch.randn(*shape, generator=generator)).bfloat16()

    return Written(mask.nonzero().squeeze(1), noise(keys, MARKED), noise(OUTPUTS, rank), noise(rank, MARKED))


def filled(edits: int, acts: Acts = "all") -> tuple[TopHashRouter, ColumnMemory]:
    generator = torch.Generator().manual_seed(0)
    router = TopHashRouter.seeded(WIDTH, MARKED, generator)
    router.threshold = 0.9
    memory = ColumnMemory.empty(OUTPUTS, WIDTH, acts)
    for number in range(edits):
        features = torch.randn(1, WIDTH, generator=generator)
        mask = router.hash(features)[0]
        memory.append(entry(mask, number, rank=number + 1, keys=number + 2))
        router.append(mask, f"e{number}", router.sharpest(features)[0])
    return router, memory


def forward_pass(rows: int, prompts: list[int] | None = None) -> ForwardPass:
    """Rows of five tokens, of which the first so many are prompt."""
    real = torch.ones(rows, 5, dtype=torch.bool)
    prompt = torch.arange(5) < torch.tensor(prompts or [5] * rows).unsqueeze(1)
    return ForwardPass(real, prompt, 0, RouteStore(rows))


def routed_to(entries: list[int]) -> Route:
    entry, score = torch.tensor(entries), torch.ones(len(entries))
    return Route(entry=entry, nearest=entry, score=score, threshold=score, second=entry, second_score=score)


def test_reading_gives_the_marked_columns_however_many_rows_read() -> None:
    router, memory = filled(3)
    generator = torch.Generator().manual_seed(1)
    # Few rows gather their columns, many take the whole product; both are the definition, whoever else is there.
    for entries in ([1], [2, -1], [0, 1, 2, -1, 0, 1], [-1, -1]):
        inputs = torch.randn(len(entries), 5, WIDTH, generator=generator)
        outputs = torch.randn(len(entries), 5, OUTPUTS, generator=generator)
        selection = memory.select(routed_to(entries), router, inputs.device)
        read = memory.read(inputs, outputs, selection, forward_pass(len(entries)))
        for row, entry in enumerate(entries):
            if entry < 0:
                assert torch.equal(read[row], outputs[row])
                continue
            marks = router.masks(torch.tensor([entry]))[0].float()
            assert torch.allclose(read[row], outputs[row] + (inputs[row] * marks) @ memory.weight.T, atol=1e-4)


def test_a_memory_of_answers_leaves_what_stands_before_them_bit_for_bit() -> None:
    router, everywhere = filled(3)
    memory = ColumnMemory.from_state(everywhere.state()[0], {"acts": "answer"})
    generator = torch.Generator().manual_seed(1)
    prompts = [1, 4, 5, 2, 3]
    for entries in ([1], [0, 1, 2, -1, 0]):
        passing = forward_pass(len(entries), prompts[: len(entries)])
        inputs = torch.randn(len(entries), 5, WIDTH, generator=generator)
        outputs = torch.randn(len(entries), 5, OUTPUTS, generator=generator)
        selection = memory.select(routed_to(entries), router, inputs.device)
        read, whole = (m.read(inputs, outputs, selection, passing) for m in (memory, everywhere))
        for row, (number, length) in enumerate(zip(entries, prompts, strict=False)):
            assert torch.equal(read[row, : length - 1], outputs[row, : length - 1])
            assert torch.equal(read[row, length - 1 :], whole[row, length - 1 :])
            assert torch.equal(read[row, length - 1 :], outputs[row, length - 1 :]) is (number < 0)


def test_an_entry_that_stands_elsewhere_reads_nothing_here() -> None:
    router, memory = filled(2)
    features = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(5))
    router.append(router.hash(features)[0], "elsewhere", router.sharpest(features)[0])
    memory.append(None)
    outputs = torch.randn(2, 5, OUTPUTS)
    selection = memory.select(routed_to([2, 1]), router, outputs.device)
    read = memory.read(torch.randn(2, 5, WIDTH), outputs, selection, forward_pass(2))
    assert torch.equal(read[0], outputs[0])
    assert not torch.equal(read[1], outputs[1])
    assert memory.count(3) == 2
    # Of entries beyond the list nothing is known, and they are read like others.
    assert memory.count(5) == 4


def test_the_copy_that_is_read_is_made_once_per_change() -> None:
    router, memory = filled(2)
    for like in (torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)):
        first = memory._transposed(like)
        assert memory._transposed(like) is first
        assert torch.equal(first, memory.weight.T.to(like.dtype))
        for move in (
            lambda: memory.append(entry(router.masks(torch.tensor([0]))[0], 7)),
            lambda: memory.forget([len(memory.written) - 1]),
            lambda: memory.fade((torch.arange(WIDTH) > 3) * 0.5),
            memory.clear,
        ):
            move()
            assert torch.equal(memory._transposed(like), memory.weight.T.to(like.dtype))


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("entries", [[0], [1], [2], [3], [0, 2], [3, 1, 0]])
def test_forgetting_subtracts_what_was_written_and_nothing_else(entries: list[int], counted: bool) -> None:
    router, memory = filled(4)
    masks = router.masks(torch.arange(4))
    if counted:
        assert bool(memory.moment.any())  # from now on it is kept up to date
    written = list(memory.written)
    memory.append(None)
    left = [number for number in range(4) if number not in entries]
    reason = memory.forget(entries)
    assert [one for one in memory.written if one is not None] == [written[number] for number in left]
    assert memory.written[-1] is None
    weight, moment = torch.zeros(OUTPUTS, WIDTH), torch.zeros(WIDTH, WIDTH)
    for number in left:
        one = written[number]
        assert one is not None
        change = one.change()
        assert change is not None
        weight[:, masks[number]] += change
        spread = torch.zeros(len(one.keys), WIDTH)
        spread[:, masks[number]] = one.keys.float()
        moment += spread.T @ spread
    assert torch.allclose(memory.weight, weight, atol=1e-4)
    assert torch.allclose(memory.moment, moment, atol=1e-3)
    assert reason is not None
    assert "subtracted from the memory, to rounding" in reason
    assert ("later edits were trained beside it" in reason) is (max(entries) < 3)


def test_forgetting_an_entry_that_stands_elsewhere_leaves_all_as_it_was() -> None:
    router, memory = filled(1)
    memory.append(None)
    memory.append(entry(router.masks(torch.tensor([0]))[0], 3))
    weight, moment, (first, _, last) = memory.weight.clone(), memory.moment.clone(), memory.written
    assert memory.forget([1]) is None
    assert memory.written == [first, last]
    assert torch.equal(memory.weight, weight)
    assert torch.equal(memory.moment, moment)


def test_what_has_faded_is_not_subtracted() -> None:
    router, memory = filled(2)
    kept = torch.linspace(0.5, 1.0, WIDTH)
    before = memory.weight.clone()
    moment = memory.moment.clone()
    memory.fade(kept)
    assert torch.equal(memory.weight, before * kept)
    assert torch.equal(memory.moment, moment)  # its keys are spared as before
    memory.append(entry(router.masks(torch.tensor([0]))[0], 5))
    weight = memory.weight.clone()
    for number in (0, 0):
        assert "stays in columns that other edits may share" in (memory.forget([number]) or "")
    assert torch.equal(memory.weight, weight)
    assert "subtracted" in (memory.forget([0]) or "")
    assert "stays in columns" in (memory.forget([0]) or "")  # nothing is known of it


def test_a_change_may_be_other_than_what_is_known_of_it() -> None:
    router, memory = filled(1)
    known = entry(router.masks(torch.tensor([0]))[0], 5)
    before, change = memory.weight.clone(), torch.randn(OUTPUTS, MARKED)
    memory.append(Written(known.columns, known.keys, None, None), change)
    before[:, known.columns] += change
    assert torch.equal(memory.weight, before)


def test_a_memory_comes_back_from_its_state() -> None:
    router, memory = filled(3, "answer")
    memory.fade(torch.full((WIDTH,), 0.9))
    memory.append(None)
    memory.append(entry(router.masks(torch.tensor([1]))[0], 6, rank=4, keys=1))
    memory.append(entry(router.masks(torch.tensor([2]))[0], 8, rank=1))
    memory.append(None)
    tensors, settings = memory.state()
    again = ColumnMemory.from_state({name: tensor.clone() for name, tensor in tensors.items()}, settings)
    assert again.acts == "answer"
    assert torch.equal(again.weight, memory.weight)
    assert torch.equal(again.moment, memory.moment)
    assert len(again.written) == len(memory.written) == 7
    for one, other in zip(again.written, memory.written, strict=True):
        if one is None or other is None:
            assert one is other
            continue
        assert torch.equal(one.columns, other.columns)
        assert torch.equal(one.keys, other.keys)
        for mine, its in ((one.outputs, other.outputs), (one.inputs, other.inputs)):
            assert mine is its is None or (mine is not None and its is not None and torch.equal(mine, its))
    assert [again.forget([5]), again.forget([4])] == [memory.forget([5]), memory.forget([4])]
    assert torch.equal(again.weight, memory.weight)
    empty = ColumnMemory.from_state(*ColumnMemory.empty(OUTPUTS, WIDTH).state())
    assert (empty.written, empty.norm()) == ([], 0.0)


def test_reading_happens_on_the_layers_device() -> None:
    router, memory = filled(2)
    for rows in (1, 6):
        inputs, outputs = torch.zeros(rows, 5, WIDTH, device="meta"), torch.zeros(rows, 5, OUTPUTS, device="meta")
        hit, columns = memory.select(routed_to([0] * rows), router, inputs.device)
        assert (hit.device.type, columns.device.type) == ("cpu", "meta")
        assert memory.read(inputs, outputs, (hit, columns), forward_pass(rows)).shape == outputs.shape


def test_random_content_keeps_every_columns_norm_and_every_effects_size() -> None:
    router, memory = filled(3)
    noise = memory.with_random_content(torch.Generator().manual_seed(0))
    norms = memory.weight.norm(dim=0)
    assert bool((norms == 0).any())
    assert len(norms.unique()) > 3
    assert torch.allclose(noise.weight.norm(dim=0), norms, rtol=1e-4)
    assert not bool(noise.weight[:, norms == 0].any())
    inputs, nothing = torch.randn(3, 5, WIDTH), torch.zeros(3, 5, OUTPUTS)
    selection = memory.select(routed_to([0, 1, 2]), router, inputs.device)
    real, random = (m.read(inputs, nothing, selection, forward_pass(3)) for m in (memory, noise))
    assert torch.allclose(real.norm(dim=-1), random.norm(dim=-1), rtol=1e-4)
    assert torch.cosine_similarity(real, random, dim=-1).mean().abs() < 0.3
    memory.append(None)
    elsewhere = memory.with_random_content(torch.Generator().manual_seed(0))
    assert (elsewhere.acts, elsewhere.count(4)) == (memory.acts, 3)


def saved(folder: Path, model: EditableModel) -> Path:
    router, memory = filled(2)
    adapter = RoutedAdapter(BaseIdentity.of(model), "test", {}, path=PATH, layer=RoutedLayer(router, memory))
    for name in router.owners:
        adapter.remember(Edit(id=name, prompt=name, target="t"))
    adapter.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("part", "kind"), [("router", "distance"), ("memory", "codebook")])
def test_a_kind_that_is_not_known_is_not_taken_for_another(tmp_path: Path, part: str, kind: str) -> None:
    file = saved(tmp_path, tiny_model("llama")) / "adapter_config.json"
    config = json.loads(file.read_text())
    assert (config["state"]["router"]["kind"], config["state"]["memories"][0]["kind"]) == ("tophash", "columns")
    (config["state"]["router"] if part == "router" else config["state"]["memories"][0])["kind"] = kind
    file.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=rf"{part} of the unknown kind '{kind}'.*install the package"):
        AutoAdapter.from_pretrained(tmp_path)


def test_reverting_says_what_stays_and_the_last_one_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = AutoAdapter.from_pretrained(saved(tmp_path, model), model=model)
    assert isinstance(adapter, RoutedAdapter)
    result = adapter.revert("e0")
    assert (result.exactness, adapter.router.owners) == ("approximate", ["e1"])
    assert "subtracted from the memory" in result.reason
    assert adapter.revert("e1").exactness == "exact"
    assert adapter.memory.norm() == 0.0


# --- several layers ---------------------------------------------------------------------------------------------------

PROMPTS = ["The capital of France", "Bob wrote Hamlet", "Ann plays the", "Zed was"]
LATER = "model.layers.2.mlp.down_proj"


def layered(model: EditableModel, acts: Acts = "answer") -> RoutedAdapter:
    """Three edits: in the first layer, in the second, in both. The fourth prompt is nobody's."""
    router = TopHashRouter.seeded(WIDTH, MARKED, torch.Generator().manual_seed(0))
    router.threshold = 0.95
    memories = [ColumnMemory.empty(OUTPUTS, WIDTH, acts) for _ in range(2)]
    layer = RoutedLayer(router, memories[0], memories[1:])
    adapter = RoutedAdapter(BaseIdentity.of(model), "test", {}, path=PATH, layer=layer, further_paths=(LATER,))
    for number, (prompt, places) in enumerate(zip(PROMPTS, ((0,), (1,), (0, 1)), strict=False)):
        ((_, gathered),) = adapter.gathered([prompt], model)
        mask = router.masks_of(gathered)[0]
        for place, memory in enumerate(memories):
            memory.append(entry(mask, number) if place in places else None)
        router.append(mask, f"e{number}", router.sharpest(router.features(gathered))[0])
        adapter.remember(Edit(id=f"e{number}", prompt=prompt, target="t"))
    return adapter


def logits(model: EditableModel, prompts: Sequence[str] = PROMPTS) -> Tensor:
    return model.forward(model.batch([model.passage(prompt, "Rome Bob") for prompt in prompts])).logits.detach()


@pytest.mark.parametrize("acts", ["answer", "all"])
def test_an_entry_is_read_in_the_layers_where_it_stands(acts: Acts) -> None:
    model = tiny_model("llama")
    base, adapter = [logits(model, [prompt]) for prompt in PROMPTS], layered(model, acts)
    memories, masks = adapter.layer.memories, adapter.router.masks(torch.arange(3))  # type: ignore[attr-defined]
    adapter.attach(model)
    together = logits(model)
    for number, (prompt, places) in enumerate(zip(PROMPTS, ((0,), (1,), (0, 1), ()), strict=True)):
        alone = logits(model, [prompt])
        with adapter.detached():
            batch = model.batch([model.passage(prompt, "Rome Bob")])
            acting = batch.positions >= batch.prompt_lengths.unsqueeze(1) - 1 if acts == "answer" else batch.mask.bool()

            def change(place: int, number: int = number, acting: Tensor = acting) -> Any:
                weight = memories[place].weight * masks[number]
                return lambda inputs: (inputs @ weight.T) * acting.unsqueeze(2)

            changes = {(PATH, LATER)[place]: change(place) for place in places}
            with adding(model.model, changes, 1):
                expected = logits(model, [prompt])
        assert torch.allclose(alone, expected, atol=1e-4)
        assert torch.allclose(together[number, -alone.shape[1] :], alone[0], atol=1e-4)
        assert torch.equal(alone, base[number]) is (not places)
    adapter.detach()
    assert all(torch.equal(logits(model, [prompt]), was) for prompt, was in zip(PROMPTS, base, strict=True))


@pytest.mark.parametrize("use_cache", [True, False])
def test_what_was_decided_in_the_first_layer_lasts_for_the_others(use_cache: bool) -> None:
    model = tiny_model("llama")
    adapter = layered(model)
    adapter.attach(model)
    router, passes = adapter.router, []
    decide = router.decide
    router.decide = lambda gathered: (passes.append(len(gathered.last)), decide(gathered))[1]  # type: ignore[method-assign, func-returns-value]
    batch = model.batch([model.passage(prompt) for prompt in PROMPTS])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": use_cache}
    together = model.model.generate(input_ids=batch.ids, attention_mask=batch.mask, **settings)[:, -4:]
    assert passes == [4] * (1 if use_cache else 4)
    for row, prompt in enumerate(PROMPTS):
        ids = model.batch([model.passage(prompt)]).ids
        assert torch.equal(model.model.generate(input_ids=ids, **settings)[0, -4:], together[row])
        scored = model.forward(model.batch([model.passage(prompt)])).logits[0, -1]
        assert int(scored.argmax()) == int(together[row, 0])


def test_several_layers_come_back_from_disk(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = layered(model)
    adapter.save_pretrained(tmp_path)
    adapter.attach(model)
    edited = logits(model)
    assert [(c.module, c.entries) for c in adapter.layer_changes(model)] == [(PATH, 2), (LATER, 2)]
    adapter.detach()
    loaded = AutoAdapter.from_pretrained(tmp_path, model=model)
    assert isinstance(loaded, RoutedAdapter)
    assert (loaded.path, loaded.further_paths) == (PATH, (LATER,))
    assert torch.equal(logits(model), edited)
    assert loaded.layer_changes(model) == adapter.layer_changes(model)


def test_reverting_in_several_layers_takes_out_what_stands_in_each() -> None:
    model = tiny_model("llama")
    base, adapter = logits(model), layered(model)
    adapter.attach(model)
    first, later = (memory.weight.clone() for memory in adapter.layer.memories)  # type: ignore[attr-defined]
    result = adapter.revert("e1")
    assert (result.exactness, "subtracted" in result.reason) == ("approximate", True)
    mine, its = (memory.weight for memory in adapter.layer.memories)  # type: ignore[attr-defined]
    assert torch.equal(mine, first)
    assert not torch.equal(its, later)
    assert [len(memory.written) for memory in adapter.layer.memories] == [2, 2]  # type: ignore[attr-defined]
    now = logits(model)
    assert [bool(torch.equal(row, was)) for row, was in zip(now, base, strict=True)] == [False, True, False, True]
    for name in ("e0", "e2"):
        result = adapter.revert(name)
    assert result.exactness == "exact"
    assert [memory.norm() for memory in adapter.layer.memories] == [0.0, 0.0]
    assert torch.equal(logits(model), base)


def test_random_content_stands_in_the_same_layers() -> None:
    model = tiny_model("llama")
    adapter = layered(model)
    noise = adapter.with_random_content(torch.Generator().manual_seed(0))
    assert isinstance(noise, RoutedAdapter)
    for real, random in zip(adapter.layer.memories, noise.layer.memories, strict=True):
        assert isinstance(real, ColumnMemory)
        assert isinstance(random, ColumnMemory)
        assert torch.allclose(real.weight.norm(dim=0), random.weight.norm(dim=0), rtol=1e-4)
        assert not torch.allclose(real.weight, random.weight, atol=1e-2)
        assert [one is None for one in real.written] == [one is None for one in random.written]
    base = logits(model)
    noise.attach(model)
    now = logits(model)
    assert [bool(torch.equal(row, was)) for row, was in zip(now, base, strict=True)] == [False, False, False, True]
    noise.detach()
    assert torch.equal(logits(model), base)


# --- other kinds: scores that are distances, and a memory that replaces one token's output ---------------------------


class NearestKey(Router):
    """The last prompt token's input, against keys with a radius each."""

    kind: ClassVar[str] = "nearest"

    def __init__(self, keys: Tensor, radii: Tensor, owners: Sequence[str]) -> None:
        self.keys, self.radii, self.owners = keys, radii, list(owners)

    def gather(self, inputs: Tensor, prompt: Tensor, before: Any = None, ids: Tensor | None = None) -> Tensor:
        columns = torch.arange(prompt.shape[1])
        last = torch.where(prompt, columns, -1).amax(dim=1)
        here = inputs[torch.arange(len(inputs)), last].float()
        return here if before is None else torch.where((last >= 0).unsqueeze(1), here, before)

    def decide(self, gathered: Tensor) -> Route:
        distance, nearest = torch.cdist(gathered, self.keys).min(dim=1)
        limit, nobody = self.radii[nearest], torch.full_like(nearest, -1)
        return Route(
            entry=torch.where(distance <= limit, nearest, nobody),
            nearest=nearest,
            score=-distance,
            threshold=-limit,
            second=nobody,
            second_score=torch.zeros(len(gathered)),
        )

    def remove(self, owner: str) -> list[int]:
        number = self.owners.index(owner)
        kept = [n for n in range(len(self.owners)) if n != number]
        self.keys, self.radii, self.owners = self.keys[kept], self.radii[kept], [self.owners[n] for n in kept]
        return [number]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"keys": self.keys, "radii": self.radii}, {"owners": self.owners}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        return cls(tensors["keys"], tensors["radii"], settings["owners"])


class Replacing(Memory):
    """A value per entry in place of the layer's output at the last prompt token."""

    kind: ClassVar[str] = "values"

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def select(self, route: Route, router: Router, device: torch.device) -> Selection:
        return route.entry >= 0, self.values[route.entry]

    def read(self, inputs: Tensor, outputs: Tensor, selection: Selection, forward_pass: ForwardPass) -> Tensor:
        hit, values = selection
        columns = torch.arange(inputs.shape[1])
        last = torch.where(forward_pass.prompt, columns, -1).amax(dim=1, keepdim=True)
        there = (columns == last) & hit.unsqueeze(1)
        return torch.where(there.unsqueeze(2), values.unsqueeze(1), outputs)

    def forget(self, entries: Sequence[int]) -> str | None:
        self.values = self.values[[n for n in range(len(self.values)) if n not in entries]]
        return None

    def clear(self) -> None:
        self.values = self.values[:0]

    def norm(self) -> float:
        return float(self.values.norm())

    def with_random_content(self, generator: torch.Generator) -> Replacing:
        return self

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"values": self.values}, {}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        return cls(tensors["values"])


class CodebookAdapter(RoutedAdapter):
    """The two of them."""

    adapter_type: ClassVar[str] = "codebook"
    routers: ClassVar[Mapping[str, type[Router]]] = {NearestKey.kind: NearestKey}
    memories: ClassVar[Mapping[str, type[Memory]]] = {Replacing.kind: Replacing}


def test_another_packages_router_and_memory_do_what_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    prompts = ["The capital of France", "Bob wrote Hamlet", "Zed was"]
    probe = NearestKey(torch.zeros(1, WIDTH), torch.zeros(1), ["none"])
    layer = RoutedLayer(probe, Replacing(torch.zeros(1, OUTPUTS)))
    adapter = CodebookAdapter(BaseIdentity.of(model), "codebook", {}, path=PATH, layer=layer)
    keys = torch.cat([gathered for _, gathered in adapter.gathered(prompts[:1], model)])
    keys = torch.cat([keys, *(gathered for _, gathered in adapter.gathered(prompts[1:2], model))])
    values = 30 * torch.randn(2, OUTPUTS, generator=torch.Generator().manual_seed(0))
    layer.router, layer.memory = NearestKey(keys, torch.tensor([0.01, 0.02]), ["a", "b"]), Replacing(values)
    for name, prompt in zip("ab", prompts, strict=False):
        adapter.remember(Edit(id=name, prompt=prompt, target="t"))
    adapter.save_pretrained(tmp_path)

    with pytest.raises(ArtifactError, match="unknown adapter type 'codebook'"):
        AutoAdapter.from_pretrained(tmp_path)
    entry = SimpleNamespace(name="codebook", value=f"{__name__}:CodebookAdapter")
    monkeypatch.setattr("errata.adapters.registry.entry_points", lambda group: [entry] * (group == "errata.adapters"))
    loaded = AutoAdapter.from_pretrained(tmp_path)
    assert isinstance(loaded, CodebookAdapter)
    batch = model.batch([model.passage(prompt) for prompt in prompts])
    base = model.forward(batch).logits[:, -1]
    loaded.attach(model)
    edited = model.forward(batch).logits[:, -1]
    assert [bool(torch.equal(e, b)) for e, b in zip(edited, base, strict=True)] == [False, False, True]
    explained = loaded.explain(prompts)
    assert [e.fires for e in explained] == [True, True, False]
    assert [e.edit_id for e in explained[:2]] == ["a", "b"]
    assert [round(e.threshold, 3) for e in explained[:2]] == [-0.01, -0.02]
    assert loaded.revert("a").exactness == "exact"
    reverted = model.forward(batch).logits[:, -1]
    assert torch.equal(reverted[0], base[0])
    assert torch.equal(reverted[1], edited[1])


def test_a_memory_of_columns_refuses_a_router_that_marks_none() -> None:
    memory = ColumnMemory.empty(OUTPUTS, WIDTH)
    router = NearestKey(torch.zeros(1, WIDTH), torch.zeros(1), ["a"])
    with pytest.raises(ConfigError, match="needs a router that marks columns, not NearestKey"):
        memory.select(routed_to([0]), router, torch.device("cpu"))
