"""Which stored slots a sequence is to read: M+'s retriever, two small networks per layer (2502.00592, section 3.2).

    score of a stored slot m for a sequence = mean over its prompt's tokens of σ(f_q(h)ᵀ f_k(m))

h and m are what the block's attention reads: of a token its state past the norm in front of the attention, of a slot,
which is kept as it would enter the block, what the same norm makes of it. So both have the scale that this layer's
queries and keys are made of, whatever the residual stream has grown to, and of a text nothing has to be computed that a
pass does not compute anyway. (The published code reads the same.)

Knows states and scores. Knows nothing of where slots are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Retriever", "retriever_width"]

_LEAST_WIDTH = 16
_AT_ONCE = 2**24  # pairs of a token and a slot that are scored together


def retriever_width(hidden: int) -> int:
    """w, of the vectors that are compared, for a model's width d: d / 20, at least 16."""
    return max(_LEAST_WIDTH, hidden // 20)


class Retriever(nn.Module):
    """f_q and f_k of every layer: perceptrons of two layers, d → w → w, computed in float32.

    Args:
        tensors: by name, weights [L, d, w] and [L, w, w] and biases [L, 1, w] of both: see `to_train`.
    """

    _NAMES = tuple(f"{of}_{part}" for of in ("query", "key") for part in ("in", "in_bias", "out", "out_bias"))

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in self._NAMES:
            self.register_parameter(name, nn.Parameter(tensors[name]))

    @classmethod
    def to_train(cls, layers: int, hidden: int, generator: torch.Generator) -> Self:
        """One that finds nothing yet."""
        width = retriever_width(hidden)
        tensors: dict[str, Tensor] = {}
        for of in ("query", "key"):
            for part, inputs in (("in", hidden), ("out", width)):
                weight = torch.randn(layers, inputs, width, generator=generator) * inputs**-0.5
                tensors |= {f"{of}_{part}": weight, f"{of}_{part}_bias": torch.zeros(layers, 1, width)}
        return cls(tensors)

    @property
    def width(self) -> int:
        """w."""
        return int(self.get_parameter("key_out").shape[-1])

    def queries(self, layer: int, states: Tensor) -> Tensor:
        """f_q of what a layer's attention reads of tokens: [n, w] from [n, d]."""
        return self._perceptron("query", layer, states)

    def keys(self, layer: int, states: Tensor) -> Tensor:
        """f_k of what a layer's attention reads of slots: [n, w] from [n, d]."""
        return self._perceptron("key", layer, states)

    def _perceptron(self, of: str, layer: int, states: Tensor) -> Tensor:
        first, bias, second, last = (
            self.get_parameter(f"{of}_{part}")[layer].to(states.device) for part in ("in", "in_bias", "out", "out_bias")
        )
        with torch.autocast(states.device.type, enabled=False):
            found: Tensor = F.silu(states.float() @ first + bias) @ second + last
        return found

    def scores(self, layer: int, states: Tensor, prompt: Tensor, keys: Tensor) -> Tensor:
        """The score of each slot for each row, [rows, n], from 0 to 1; 0 for rows without a prompt.

        Args:
            states: [rows, columns, d], what the layer's attention reads; prompt: [rows, columns] bool, what counts.
            keys: [n, w], of the slots.
        """
        queries, row = self.queries(layer, states[prompt]), prompt.nonzero()[:, 0]
        found = []
        with torch.autocast(states.device.type, enabled=False):
            for part in torch.split(keys, max(1, _AT_ONCE // max(1, len(queries)))):
                each = (queries @ part.T).sigmoid()
                found.append(each.new_zeros(len(states), len(part)).index_add(0, row, each))
        return torch.cat(found, dim=1) / prompt.sum(dim=1, keepdim=True).clamp(min=1)

    def state(self) -> dict[str, Tensor]:
        """As tensors, to be given to the constructor."""
        return {name: self.get_parameter(name).detach() for name in self._NAMES}
