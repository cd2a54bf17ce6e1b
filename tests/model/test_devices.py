"""Layers on several devices: what is computed with each other is brought together first.

No such machine is needed: fake tensors on two devices know shapes and places, and refuse to be mixed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from errata.model import EditableModel
from errata.model.tail import Tail
from errata.testing import byte_tokenizer, tiny_hf_model

FIRST, SECOND = torch.device("meta:0"), torch.device("meta:1")


class CheckedIndexing(TorchDispatchMode):
    """Fake tensors let an index be anywhere; a GPU does not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            places = {index.device for index in args[1] if index is not None} | {args[0].device}
            assert len(places) == 1, f"a tensor is indexed from another device: {places}"
        return func(*args, **(kwargs or {}))


def moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    return {k: moved(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def place(module: nn.Module, device: torch.device, takes_inputs: bool) -> None:
    """As accelerate places a part of a model: its weights there, and whatever it is given brought there."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    tensors[name] = nn.Parameter(empty, requires_grad=False) if tensors is part._parameters else empty
    if takes_inputs:
        module.register_forward_pre_hook(
            lambda module, args, kwargs: (moved(args, device), moved(kwargs, device)), with_kwargs=True
        )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_a_tail_over_two_devices(family: str, layer: int, full: bool, additive: bool) -> None:
    model = EditableModel(tiny_hf_model(family), byte_tokenizer())
    anatomy = model.anatomy
    with FakeTensorMode(), CheckedIndexing():
        place(model.model, FIRST, takes_inputs=False)
        for number, path in enumerate(anatomy.blocks):
            place(model.module(path), FIRST if number < 2 else SECOND, takes_inputs=True)
        assert anatomy.final_norm is not None
        place(model.module(anatomy.final_norm), SECOND, takes_inputs=False)
        place(model.module(anatomy.head), SECOND, takes_inputs=False)
        model.verdicts = {"final norm": True, f"additive {layer}": additive}  # fake numbers tell nothing
        batch = model.batch([model.passage("The capital of France is", "Rome"), model.passage("Who?", "Bob")])
        tail = Tail(model, layer, full=full)
        rows, columns = (torch.tensor(places, device=FIRST) for places in ([0, 1], [3, 4]))
        width = torch.zeros(32, 96, device=FIRST)
        states = tail.states(tail.record(batch), lambda inputs: inputs.to(FIRST) @ width.T, rows, columns)
        assert (states.device, tuple(states.shape)) == (SECOND, (2, 32))
