"""GRACE's memory: one vector per edit, which takes the place of the layer's output.

Knows layers and their sequences. Knows nothing of how an entry is found.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from errata.adapters.base import random_rotation
from errata.adapters.memories import Memory, Selection
from errata.model.sequences import ForwardPass
from errata.routing import Route, Router
from errata.routing.keys import Rows

__all__ = ["Codebook", "EntryMemory", "Replace", "replaced_places"]

Replace = Literal["last", "all", "prompt"]


def replaced_places(forward_pass: ForwardPass, replace: Replace) -> Tensor:
    """[rows, columns], True where a value stands in the place of the layer's output.

    "last" is the last token of the prompt, "prompt" every token of it before that one (as published), "all" every token
    of the sequence, those that are generated too.
    """
    if replace == "all":
        return forward_pass.real
    ends = forward_pass.prompt_ends
    return ends if replace == "last" else forward_pass.prompt & ~ends


class EntryMemory(Memory):
    """A memory of one row of numbers per edit, which no other edit touches.

    Attributes:
        contents: [entries, width], what each edit was trained to.
    """

    def __init__(self, width: int) -> None:
        self.contents = Rows(width)

    def select(self, route: Route, router: Router, device: torch.device) -> Selection:
        """Which rows have an entry [rows], kept on the CPU where asking costs nothing; its content [rows, width]."""
        hit = route.entry >= 0
        chosen = torch.zeros(len(hit), self.contents.width)
        chosen[hit] = self.contents.table[route.entry[hit]]
        return hit, chosen.to(device)

    @abc.abstractmethod
    def append(self, content: Tensor, replaced: Tensor) -> None:
        """Add an edit's content [width]; `replaced` [outputs] is the layer's output at the end of its prompt."""

    def forget(self, entries: Sequence[int]) -> str | None:
        for number in sorted(entries, reverse=True):
            self.contents.remove(number)
        return None

    def clear(self) -> None:
        self.contents = Rows(self.contents.width)


class Codebook(EntryMemory):
    """GRACE's values.

        y_p = v_n    instead of W_0 x_p, at the places p that `replace` names

    Args:
        outputs: d, width of the layer's output and of a value.
        replace: where, see `replaced_places`.

    Attributes:
        replaced: [entries, d], the output that stood at the end of each edit's own prompt; what an edit changes, and
            its random control, are measured from there.
    """

    kind: ClassVar[str] = "codebook"

    def __init__(self, outputs: int, replace: Replace = "last") -> None:
        super().__init__(outputs)
        self.replace = replace
        self.replaced = Rows(outputs)

    def read(self, inputs: Tensor, outputs: Tensor, selection: Selection, forward_pass: ForwardPass) -> Tensor:
        hit, values = selection
        if not bool(hit.any()):
            return outputs
        places = replaced_places(forward_pass, self.replace) & hit.to(forward_pass.real.device).unsqueeze(1)
        return torch.where(places.to(outputs.device).unsqueeze(2), values.to(outputs).unsqueeze(1), outputs)

    def append(self, content: Tensor, replaced: Tensor) -> None:
        self.contents.append(content)
        self.replaced.append(replaced)

    def forget(self, entries: Sequence[int]) -> str | None:
        for number in sorted(entries, reverse=True):
            self.replaced.remove(number)
        return super().forget(entries)

    def clear(self) -> None:
        super().clear()
        self.replaced = Rows(self.replaced.width)

    def norm(self) -> float:
        """Of all values minus the outputs that they replace at their own prompts."""
        return float((self.contents.table - self.replaced.table).norm())

    def with_random_content(self, generator: torch.Generator) -> Codebook:
        """Each edit's own prompt is moved as far as before, in a random direction."""
        noise, base = Codebook(self.contents.width, self.replace), self.replaced.table
        rotation = random_rotation(self.contents.width, generator)
        noise.replaced.load(base)
        noise.contents.load(base + (self.contents.table - base) @ rotation.T)
        return noise

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"values": self.contents.table, "replaced": self.replaced.table}
        return tensors, {"outputs": self.contents.width, "replace": self.replace}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        memory = cls(settings["outputs"], settings["replace"])
        memory.contents.load(tensors["values"])
        memory.replaced.load(tensors["replaced"])
        return memory
