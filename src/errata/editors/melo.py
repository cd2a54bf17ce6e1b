"""MELO: GRACE's balls with a small LoRA block per edit in place of a value (AAAI 2024, arXiv 2312.11795).

A value acts at one position; a block acts on the whole sequence, prompt and answer, and gives each position a change of
its own. Keys, balls, training and revert are those of GRACE; see docs/methods/melo.md for what is not MELO's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from errata.adapters.codebook import EntryMemory
from errata.adapters.lora_blocks import LoraBlocks
from errata.editors.keyed import KeyedConfig, KeyedEditor
from errata.errors import ConfigError
from errata.model.tail import Recording

__all__ = ["Melo", "MeloConfig"]


@dataclass(frozen=True, kw_only=True)
class MeloConfig(KeyedConfig):
    """Settings of MELO-style blocks; see `KeyedConfig` for layer, training and radius.

    Attributes:
        rank: r, of every edit's block.
    """

    learning_rate: float = 0.005
    rank: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1, not {self.rank}")


class Melo(KeyedEditor[MeloConfig]):
    """Stores the end of each prompt as a key, and a low-rank change of the layer for the sequences that match it."""

    name = "melo"
    summary = "a small LoRA block per edit, at work in sequences whose prompt is near its key"
    paper = "MELO, AAAI 2024 (2312.11795), with GRACE's rules"
    Config: ClassVar[type[MeloConfig]] = MeloConfig

    def _new_memory(self, outputs: int, width: int) -> EntryMemory:
        return LoraBlocks(outputs, width, self.config.rank)

    def _start(self, recording: Recording, replaced: Tensor, generator: torch.Generator) -> Tensor:
        """A of Gaussian noise with rows of length one or so, B zero: nothing changes at first."""
        width = recording.inputs[self._layer].shape[-1]
        down = torch.randn(self.config.rank * width, generator=generator) * width**-0.5
        return torch.cat([down, torch.zeros(self.config.rank * len(replaced))])

    def _change(self, recording: Recording, content: Tensor) -> Callable[[Tensor], Tensor]:
        memory = self._keyed.memory
        assert isinstance(memory, LoraBlocks)
        return lambda inputs: memory.change(content.unsqueeze(0), inputs)
