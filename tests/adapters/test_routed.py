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
from errata.adapters.memories import Selection
from errata.edit import Edit
from errata.errors import ArtifactError, ConfigError
from errata.model import EditableModel
from errata.model.sequences import ForwardPass, RouteStore
from errata.routing import Route, Router, TopHashRouter
from errata.testing import tiny_model

PATH = "model.layers.1.mlp.down_proj"
WIDTH, OUTPUTS, MARKED = 96, 32, 12


def filled(edits: int) -> tuple[TopHashRouter, ColumnMemory]:
    generator = torch.Generator().manual_seed(0)
    router = TopHashRouter.seeded(WIDTH, MARKED, generator)
    router.threshold = 0.9
    memory = ColumnMemory.empty(OUTPUTS, WIDTH)
    for number in range(edits):
        mask = router.hash(torch.randn(1, WIDTH, generator=generator))[0]
        values = (number + 1.0) * torch.randn(OUTPUTS, MARKED, generator=generator)
        memory.write(mask.nonzero().squeeze(1), values)
        router.append(mask, f"e{number}")
    return router, memory


def forward_pass(rows: int) -> ForwardPass:
    real = torch.ones(rows, 5, dtype=torch.bool)
    return ForwardPass(real, real, 0, RouteStore(rows))


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


def test_the_copy_that_is_read_is_made_once_per_change() -> None:
    _, memory = filled(2)
    for like in (torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)):
        first = memory._transposed(like)
        assert memory._transposed(like) is first
        assert torch.equal(first, memory.weight.T.to(like.dtype))
        for move in (
            lambda: memory.write(torch.arange(2), torch.full((OUTPUTS, 2), 5.0)),
            lambda: memory.fade(torch.arange(WIDTH) > 3, 0.5),
            memory.clear,
        ):
            move()
            assert torch.equal(memory._transposed(like), memory.weight.T.to(like.dtype))


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
    assert (config["state"]["router"]["kind"], config["state"]["memory"]["kind"]) == ("tophash", "columns")
    config["state"][part]["kind"] = kind
    file.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=rf"{part} of the unknown kind '{kind}'.*install the package"):
        AutoAdapter.from_pretrained(tmp_path)


def test_reverting_says_what_stays_and_the_last_one_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = AutoAdapter.from_pretrained(saved(tmp_path, model), model=model)
    assert isinstance(adapter, RoutedAdapter)
    result = adapter.revert("e0")
    assert (result.exactness, adapter.router.owners) == ("approximate", ["e1"])
    assert "stays in columns" in result.reason
    assert adapter.revert("e1").exactness == "exact"
    assert adapter.memory.norm() == 0.0


# --- other kinds: scores that are distances, and a memory that replaces one token's output ---------------------------


class NearestKey(Router):
    """The last prompt token's input, against keys with a radius each."""

    kind: ClassVar[str] = "nearest"

    def __init__(self, keys: Tensor, radii: Tensor, owners: Sequence[str]) -> None:
        self.keys, self.radii, self.owners = keys, radii, list(owners)

    def gather(self, inputs: Tensor, prompt: Tensor, before: Any = None) -> Tensor:
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
