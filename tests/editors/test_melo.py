"""MELO-style blocks as an editor: settings, where training begins, company."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from errata.adapters import KeyedAdapter
from errata.adapters.lora_blocks import LoraBlocks
from errata.edit import Edit
from errata.editors.melo import Melo, MeloConfig
from errata.errors import ConfigError
from errata.testing import tiny_model
from errata.testing.conformance import EDITS

SETTINGS: dict[str, Any] = {"layer": 1, "radius": 0.3, "learning_rate": 0.1, "steps": 30}


def melo(**settings: Any) -> tuple[Melo, LoraBlocks]:
    editor = Melo(tiny_model("llama"), **{**SETTINGS, **settings})
    assert isinstance(editor.adapter, KeyedAdapter)
    memory = editor.adapter.memory
    assert isinstance(memory, LoraBlocks)
    return editor, memory


def test_a_rank_is_at_least_one() -> None:
    with pytest.raises(ConfigError, match="rank must be at least 1, not 0"):
        MeloConfig(rank=0)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_block_begins_without_effect_and_has_the_rank_asked_for(rank: int) -> None:
    editor, memory = melo(rank=rank, steps=1, learning_rate=1e-12)
    editor.edit(EDITS[:1])
    down, up = memory.factors(memory.contents.table)
    assert (down.shape[1], up.shape[2]) == (rank, rank)
    assert float(down.norm(dim=2).mean()) == pytest.approx(1.0, rel=0.3)
    assert float(up.abs().max()) < 1e-9
    editor, memory = melo(rank=rank)
    assert editor.edit(EDITS[:1]).applied[0].took
    down, up = memory.factors(memory.contents.table)
    assert int(torch.linalg.matrix_rank((up @ down)[0], rtol=1e-4)) == rank


def test_reverting_gives_what_would_be_there_without_the_edit() -> None:
    edits = [*EDITS, Edit(prompt="Emma plays the", target="Berlin")]
    (whole, _), (without, _) = melo(radius=1e3), melo(radius=1e3)
    whole.edit(edits)
    without.edit([edits[0], *edits[2:]])
    assert whole.adapter.revert(edits[1].id).exactness == "exact"
    (tensors, settings), (others, other_settings) = whole.adapter._state(), without.adapter._state()
    assert settings == other_settings
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
