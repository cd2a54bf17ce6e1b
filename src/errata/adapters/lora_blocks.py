"""MELO's memory: a small low-rank change of one linear layer per edit, at work in sequences that are routed to it.

Knows layers and their sequences. Knows nothing of how an entry is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from errata.adapters.base import random_rotation
from errata.adapters.codebook import EntryMemory
from errata.adapters.memories import Selection
from errata.model.sequences import ForwardPass

__all__ = ["LoraBlocks"]


class LoraBlocks(EntryMemory):
    """One block of rank r per edit.

        y_t = W_0 x_t + B_n A_n x_t      at every position of the sequence, prompt and answer

    An edit's content is A_n [r, D] and B_n [d, r], flat and one behind the other.

    Args:
        outputs: d, inputs: D, widths of the layer; rank: r.
    """

    kind: ClassVar[str] = "lora"

    def __init__(self, outputs: int, inputs: int, rank: int) -> None:
        super().__init__(rank * (inputs + outputs))
        self.outputs, self.inputs, self.rank = outputs, inputs, rank

    def factors(self, contents: Tensor) -> tuple[Tensor, Tensor]:
        """Contents [n, width] as A [n, r, D] and B [n, d, r]."""
        border = self.rank * self.inputs
        down, up = contents[:, :border], contents[:, border:]
        return down.reshape(-1, self.rank, self.inputs), up.reshape(-1, self.outputs, self.rank)

    def change(self, contents: Tensor, inputs: Tensor) -> Tensor:
        """What contents [n, width] add to the outputs of inputs [n, columns, D]."""
        down, up = self.factors(contents.to(inputs))
        return inputs @ down.mT @ up.mT

    def read(self, inputs: Tensor, outputs: Tensor, selection: Selection, forward_pass: ForwardPass) -> Tensor:
        hit, contents = selection
        if not bool(hit.any()):
            return outputs
        rows = hit.nonzero().squeeze(1).to(inputs.device)
        change = self.change(contents.to(inputs.device)[rows], inputs[rows])
        return outputs.index_add(0, rows, change.to(outputs.dtype))

    def append(self, content: Tensor, replaced: Tensor) -> None:
        self.contents.append(content)

    def norm(self) -> float:
        down, up = self.factors(self.contents.table)
        return float(((up.mT @ up) * (down @ down.mT)).sum().clamp(min=0).sqrt())

    def with_random_content(self, generator: torch.Generator) -> LoraBlocks:
        noise = LoraBlocks(self.outputs, self.inputs, self.rank)
        down, up = self.factors(self.contents.table)
        turned = random_rotation(self.outputs, generator) @ up
        noise.contents.load(torch.cat([down.flatten(1), turned.flatten(1)], dim=1))
        return noise

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"blocks": self.contents.table}, {"outputs": self.outputs, "inputs": self.inputs, "rank": self.rank}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        memory = cls(settings["outputs"], settings["inputs"], settings["rank"])
        memory.contents.load(tensors["blocks"])
        return memory
