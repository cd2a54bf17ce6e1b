"""How much memory a method will take beside the loaded model, before it takes it.

What is large follows from shapes: second moments of keys, side matrices, optimiser states, what a backward pass holds
on to. Estimates are of that, for the longest edit that is given; `errata bench methods` measures them against the peaks
of real processes. What cannot fit is refused before anything is begun.

Knows shapes. Knows nothing of how a method works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.anatomy import output_width, weight_of

__all__ = ["MemoryNeeded", "MemoryPart", "backward_pass", "reading", "weight_entries"]


@dataclass(frozen=True)
class MemoryPart:
    """One thing that takes memory.

    Attributes:
        what: in words; size: bytes.
        remedy: what makes it smaller.
        on_host: it lies in the computer's own memory, whatever the model's device.
    """

    what: str
    size: int
    remedy: str = "take a method that keeps less, or a smaller batch_size"
    on_host: bool = False


@dataclass(frozen=True)
class MemoryNeeded:
    """All parts, for a model on a device."""

    parts: tuple[MemoryPart, ...]
    device: torch.device

    @property
    def total(self) -> int:
        return sum(part.size for part in self.parts)

    def words(self) -> str:
        """The total and its largest parts, on one line."""
        large = sorted((part for part in self.parts if part.size > self.total / 20), key=lambda part: -part.size)
        named = ", ".join(f"{part.what} {_size(part.size)}" for part in large)
        return f"needs about {_size(self.total)} beside the model" + (f": {named}" if named else "")

    def check(self) -> None:
        """Raises ConfigError, naming the largest part and what would help, if this cannot fit in what is free."""
        for on_host in (True, False):
            # On a CPU both are the same memory.
            if self.device.type == "cpu":
                mine = list(self.parts) if on_host else []
            else:
                mine = [part for part in self.parts if part.on_host == on_host]
            total, free = sum(part.size for part in mine), _free(self.device, on_host)
            if free is not None and total > free:
                largest = max(mine, key=lambda part: part.size)
                place = "memory" if on_host else f"memory of {self.device}"
                raise ConfigError(
                    f"this would take about {_size(total)} of {place}, and {_size(free)} are free; of that "
                    f"{_size(largest.size)} are {largest.what}: {largest.remedy} (force, --force tries it all the same)"
                )


def _free(device: torch.device, on_host: bool) -> int | None:
    """Bytes, None where that is not known."""
    if on_host:
        return int(psutil.virtual_memory().available)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return None


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def weight_entries(model: EditableModel, paths: Sequence[str]) -> int:
    """Numbers in the weights of these linear layers."""
    return sum(weight_of(model.module(path)).numel() for path in paths)


def backward_pass(model: EditableModel, rows: int, length: int, blocks: int, remedy: str) -> MemoryPart:
    """What training holds on to through so many blocks.

    Args:
        rows: sequences side by side; length: tokens of each; half of them are taken for labels.
    """
    anatomy = model.anatomy
    config = getattr(model.model.config, "text_config", model.model.config)
    heads = getattr(config, "num_attention_heads", 1)
    # Of a token in a block: what norms, attention and residual sums keep, what the MLP keeps, attention probabilities.
    kept = 10 * anatomy.hidden_size + 4 * max(anatomy.key_width) + 2 * heads * length
    vocabulary = output_width(model.module(anatomy.head)) if anatomy.head is not None else 0
    tokens = rows * length
    logits = 3 * 4 * vocabulary * (tokens // 2)
    return MemoryPart("a backward pass", tokens * blocks * kept * model.dtype.itemsize + logits, remedy)


def reading(model: EditableModel, tokens: int) -> MemoryPart:
    """A forward pass of so many tokens side by side, of which no block's inner states outlive it."""
    anatomy = model.anatomy
    kept = 8 * anatomy.hidden_size + 4 * max(anatomy.key_width)
    return MemoryPart(
        f"reading {tokens:,} tokens at a time", tokens * kept * model.dtype.itemsize, "load the model in bfloat16"
    )
