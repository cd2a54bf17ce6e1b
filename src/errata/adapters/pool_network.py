"""What a model was trained to have so that it can write a memory pool and read it: `PoolNetwork`.

    b_l   the vector in front of the slots of block l; untrained, the beginning token's own state there
    p_l   added to the K newest slots while a text is read on top of them; untrained, zero
    A, B  low-rank changes W + B A of linear layers inside the blocks (LoRA, 2106.09685), in place while a pool is
          written or read; untrained, none
    f_q, f_k   which stored slots a sequence reads (M+, 2502.00592): `adapters.retriever`; there may be none

(MemoryLLM, 2402.04624, section 3.) One network serves any number of pools.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errata.adapters.retriever import Retriever
from errata.model import EditableModel
from errata.model.anatomy import is_linear, weight_of
from errata.model.edited_linear import Contribution
from errata.model.generation import beginning_token
from errata.model.probes import probing

__all__ = ["PoolNetwork"]

_RETRIEVER = "retriever "  # what its tensors begin with

_IN_USE: weakref.WeakValueDictionary[str, PoolNetwork] = weakref.WeakValueDictionary()


class PoolNetwork(nn.Module):
    """Beginning vectors, position vectors and low-rank changes, by the path of the layer that they change.

    Args:
        beginning: [L, d]; positions: [L, K, d].
        factors: by path, left [outputs, rank] and right [inputs, rank]; none for a model that was not trained.
        retriever: for pools with a long-term store; None where none was trained.

    Attributes:
        version: to be raised whenever a number in it is changed.
    """

    def __init__(
        self,
        beginning: Tensor,
        positions: Tensor,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        retriever: Retriever | None = None,
    ) -> None:
        super().__init__()
        self.retriever = retriever
        self.beginning, self.positions = nn.Parameter(beginning), nn.Parameter(positions)
        self.paths = tuple(factors)
        self.left = nn.ParameterList([left for left, _ in factors.values()])
        self.right = nn.ParameterList([right for _, right in factors.values()])
        self.version = 0
        self._is_in_place = False  # see `learning`

    @classmethod
    def untrained(cls, model: EditableModel, new: int) -> PoolNetwork:
        """As the model is: the beginning token's states, nothing added and nothing changed."""
        positions = torch.zeros(model.layer_count, new, model.anatomy.hidden_size)
        return cls.from_state({"beginning": _beginning_states(model), "positions": positions})

    @classmethod
    def to_train(cls, model: EditableModel, new: int, rank: int, generator: torch.Generator) -> PoolNetwork:
        """One that changes nothing yet, with factors for every linear layer inside the blocks."""
        made, factors = cls.untrained(model, new), {}
        for block in model.anatomy.blocks:
            for name, module in model.module(block).named_modules():
                if is_linear(module):
                    outputs, inputs = weight_of(module).shape
                    right = torch.randn(inputs, rank, generator=generator) * inputs**-0.5
                    factors[f"{block}.{name}"] = torch.zeros(outputs, rank), right
        return cls(made.beginning.detach().float().clone(), made.positions.detach().clone(), factors)

    @property
    def new(self) -> int:
        """K."""
        return int(self.positions.shape[1])

    def change(self, path: str) -> Tensor:
        """[outputs, inputs], the change of weight of a layer."""
        number = self.paths.index(path)
        change: Tensor = self.left[number].float() @ self.right[number].float().T
        return change

    def contributions(self, acts: Callable[[], bool]) -> dict[str, PoolChange]:
        """What is to stand at the layers; it acts where `acts` says so."""
        return {path: PoolChange(self, path, acts) for path in self.paths}

    @contextmanager
    def acting(self, model: EditableModel) -> Iterator[None]:
        """A model with these changes, and nothing else that is attached to it, for a while."""
        if self._is_in_place:
            yield
            return
        with ExitStack() as stack:
            layer = model.module(self.paths[0]) if self.paths else None
            if not any(c.shared is self for c in getattr(layer, "contributions", ())):
                for path, change in self.contributions(lambda: False).items():
                    model.contribute(path, change)
                    stack.callback(model.withdraw, path, change)
            stack.enter_context(model.sequences.suspended(keeping=self))
            yield

    @contextmanager
    def learning(self, model: EditableModel, dtype: torch.dtype) -> Iterator[None]:
        """As `acting`, while it is trained: each layer is changed once, differentiably, for all passes inside.

        Args:
            dtype: of the changed weights.
        """

        def changed(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
            return lambda inputs: F.linear(inputs.to(weight.dtype), weight, bias)

        with ExitStack() as stack:
            stack.enter_context(model.bare())
            for path in self.paths:
                module = model.module(path)
                weight = (weight_of(module).float() + self.change(path)).to(dtype)
                # No probe: it would make the layer's own product first. The class's own is found again afterwards.
                module.forward = changed(weight, getattr(module, "bias", None))
                stack.callback(delattr, module, "forward")
            self._is_in_place = True
            stack.callback(setattr, self, "_is_in_place", False)
            yield

    def state(self) -> dict[str, Tensor]:
        """As tensors, to be read by `from_state`."""
        found: dict[str, Tensor] = {"beginning": self.beginning, "positions": self.positions}
        for path, left, right in zip(self.paths, self.left, self.right, strict=True):
            found |= {f"left {path}": left, f"right {path}": right}
        if self.retriever is not None:
            found |= {f"{_RETRIEVER}{name}": tensor for name, tensor in self.retriever.state().items()}
        return {name: tensor.detach() for name, tensor in found.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the numbers that another network's `state` gave, of the same layers and sizes."""
        for name, own in self.state().items():
            own.copy_(tensors[name])
        self.version += 1

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor]) -> PoolNetwork:
        """The same one for the same numbers, as long as it is in use: pools that share a network share its merges.

        Raises:
            KeyError: something is missing.
        """
        digest = _digest(tensors)
        if (known := _IN_USE.get(digest)) is not None:
            return known
        paths = sorted(name.removeprefix("left ") for name in tensors if name.startswith("left "))
        factors = {path: (tensors[f"left {path}"], tensors[f"right {path}"]) for path in paths}
        own = {n.removeprefix(_RETRIEVER): tensor for n, tensor in tensors.items() if n.startswith(_RETRIEVER)}
        retriever = Retriever(own) if own else None
        made = cls(tensors["beginning"], tensors["positions"], factors, retriever).requires_grad_(False)
        _IN_USE[digest] = made
        return made

    def digest(self) -> str:
        """Names its numbers: 32 hexadecimal digits."""
        return _digest(self.state())


class PoolChange(Contribution):
    """A network's change of one layer, as one pool has it."""

    def __init__(self, network: PoolNetwork, path: str, acts: Callable[[], bool]) -> None:
        self.network, self.path, self._acts = network, path, acts

    @property
    def shared(self) -> object:
        return self.network

    @property
    def changes_weight(self) -> bool:
        return self._acts()

    @property
    def version(self) -> int:  # type: ignore[override]
        return self.network.version

    def weight_change(self) -> Tensor | None:
        return self.network.change(self.path)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        numbers = tensors[name].detach().cpu().contiguous().flatten()
        digest.update(f"{name} {numbers.dtype}".encode())
        digest.update(numbers.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _beginning_states(model: EditableModel) -> Tensor:
    """[L, d], the beginning token as it enters each block."""
    entering: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        entering.append(states[0, 0].cpu())

    ids = torch.tensor([[beginning_token(model)]], device=model.device)
    with model.bare(), probing(model.model, before=dict.fromkeys(model.anatomy.blocks, look)):
        model.module(model.anatomy.trunk)(input_ids=ids, use_cache=False)
    return torch.stack(entering)
