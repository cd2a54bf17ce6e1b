"""MELO's memory: blocks against their definition, rows that read none, random control, saving."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from errata.adapters.lora_blocks import LoraBlocks
from errata.model.sequences import ForwardPass, RouteStore
from errata.routing import DistanceRouter, Route

WIDTH, OUTPUTS, RANK = 96, 32, 2


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks(entries: int) -> tuple[LoraBlocks, Tensor, Tensor]:
    """A memory, and its A [n, r, D] and B [n, d, r]."""
    memory = LoraBlocks(OUTPUTS, WIDTH, RANK)
    down, up = noise(entries, RANK, WIDTH), noise(entries, OUTPUTS, RANK, seed=1)
    for a, b in zip(down, up, strict=True):
        memory.append(torch.cat([a.flatten(), b.flatten()]), torch.zeros(OUTPUTS))
    return memory, down, up


def read(memory: LoraBlocks, entries: list[int], inputs: Tensor, outputs: Tensor) -> Tensor:
    entry, score = torch.tensor(entries), torch.ones(len(entries))
    route = Route(entry=entry, nearest=entry, score=score, threshold=score, second=entry, second_score=score)
    real = torch.ones(inputs.shape[:2], dtype=torch.bool)
    selection = memory.select(route, DistanceRouter(WIDTH, 1.0), inputs.device)
    return memory.read(inputs, outputs, selection, ForwardPass(real, real, 0, RouteStore(len(entries))))


@pytest.mark.parametrize("entries", [[1], [2, -1, 0], [-1, -1]])
def test_each_row_reads_its_own_block_and_the_others_none(entries: list[int]) -> None:
    memory, down, up = blocks(3)
    inputs, outputs = noise(len(entries), 5, WIDTH, seed=2), noise(len(entries), 5, OUTPUTS, seed=3)
    changed = read(memory, entries, inputs, outputs)
    for row, entry in enumerate(entries):
        if entry < 0:
            assert torch.equal(changed[row], outputs[row])
        else:
            wanted = outputs[row] + inputs[row] @ (up[entry] @ down[entry]).T
            assert torch.allclose(changed[row], wanted, atol=1e-3)


def test_norm_random_control_and_saving() -> None:
    memory, down, up = blocks(3)
    assert memory.norm() == pytest.approx(float((up @ down).norm()), rel=1e-4)
    random = memory.with_random_content(torch.Generator().manual_seed(0))
    assert random.norm() == pytest.approx(memory.norm(), rel=1e-4)
    inputs, nothing = noise(1, 5, WIDTH, seed=2), torch.zeros(1, 5, OUTPUTS)
    real, turned = (read(m, [1], inputs, nothing) for m in (memory, random))
    assert torch.allclose(real.norm(dim=-1), turned.norm(dim=-1), rtol=1e-3)
    assert float(torch.cosine_similarity(real, turned, dim=-1).abs().max()) < 0.9
    loaded = LoraBlocks.from_state(*memory.state())
    assert torch.equal(read(loaded, [2], inputs, nothing), read(memory, [2], inputs, nothing))
    assert memory.forget([0, 2]) is None
    assert torch.equal(read(memory, [0], inputs, nothing), real)
