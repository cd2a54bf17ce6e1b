"""GRACE: a codebook of keys and values beside one layer (NeurIPS 2023; repository Thartvigsen/GRACE).

An edit stores the layer's input at the end of its prompt as a key, and trains one vector that takes the place of the
layer's output there. A prompt whose own such input lies within the nearest key's radius gets that key's value:

    y_p = v_n   if ‖x_p − k_n‖ ≤ ε_n,  n = argmin ‖x_p − k_i‖,   else   y_p = W_0 x_p

Weights are never touched. The rules by which radii grow and split are `routing.distance`'s. The traps of the reference
code that are avoided are listed in docs/methods/grace.md. Where it differs by default:

* the first radius is calibrated in `prepare()`; the published 1.0 means something else at every scale of activations;
* a value begins at the output that it replaces (`value_start="cold"` begins at uniform noise, as published);
* edits agree when their target tokens do, and a value acts at each row's own last prompt token, while it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.adapters.codebook import Codebook, EntryMemory, Replace, replaced_places
from errata.editors.keyed import KeyedConfig, KeyedEditor
from errata.editors.layers import shape_key
from errata.errors import EditError
from errata.model import EditableModel
from errata.model.tail import Recording
from errata.model.tokens import Passage
from errata.routing.distance import Compat, Label

__all__ = ["Grace", "GraceConfig"]

_EASYEDIT = "EasyEdit's GRACE for {} (radius calibrated instead of 1.0)"


def _published(layer: int, steps: int, name: str) -> dict[str, Any]:
    values = {"layer": layer, "steps": steps, "learning_rate": 1.0, "value_start": "cold", "replace": "last"}
    return {**values, "stop_loss": None, "source": _EASYEDIT.format(name)}


_PUBLISHED: dict[tuple[str, int, int], dict[str, Any]] = {
    ("llama", 32, 4096): _published(27, 50, "LLaMA-2-7B"),
    ("llama", 28, 3072): _published(27, 50, "LLaMA-3.2-3B"),
    ("mistral", 32, 4096): _published(27, 50, "LLaMA-2-7B, as the WISE paper takes it for Mistral"),
    ("gptj", 28, 4096): _published(25, 200, "GPT-J"),
    ("gpt2", 48, 1600): _published(35, 200, "GPT-2 XL"),
    ("qwen2", 28, 3584): _published(18, 50, "Qwen2-7B"),
}


@dataclass(frozen=True, kw_only=True)
class GraceConfig(KeyedConfig):
    """Settings of GRACE; see `KeyedConfig` for layer, training and radius.

    Attributes:
        replace: where a value acts: at the "last" token of the prompt, at "all" tokens of the sequence, those that are
            generated too, or in the "prompt" before its last token.
        value_start: "warm" begins at the output that the value replaces, "cold" at uniform noise in [0, 1).
        compat: "reference" also reproduces what the published code does to the numbers: edits agree when the means of
            their padded label ids are equal, labels are compared in the wrong order, balls grow when they are split,
            every step is taken. Results still do not depend on the batch, on padding or on a cache.
    """

    adjustable: ClassVar[frozenset[str]] = KeyedConfig.adjustable | {"value_start"}

    replace: Replace = "last"
    value_start: Literal["warm", "cold"] = "warm"
    compat: Compat = "fixed"

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        return _PUBLISHED.get(shape_key(model))


class Grace(KeyedEditor[GraceConfig]):
    """Stores the end of each prompt as a key, and a vector that takes the place of the layer's output there."""

    name = "grace"
    summary = "a codebook: prompts near a stored key get its value in place of one layer's output"
    paper = "GRACE, NeurIPS 2023 (Thartvigsen/GRACE)"
    Config = GraceConfig

    @property
    def _rules(self) -> Compat:
        return self.config.compat

    def _new_memory(self, outputs: int, width: int) -> EntryMemory:
        return Codebook(outputs, self.config.replace)

    def _agreement(self, passage: Passage) -> Label:
        if self.config.compat == "fixed":
            return passage.answer
        labels = torch.tensor([-100.0] * len(passage.prompt) + list(passage.answer))
        return (float(labels.mean()),)

    def _start(self, recording: Recording, replaced: Tensor, generator: torch.Generator) -> Tensor:
        if self.config.value_start == "warm":
            return replaced
        return torch.rand(replaced.shape, generator=generator)

    def _change(self, recording: Recording, content: Tensor) -> Callable[[Tensor], Tensor]:
        assert recording.forward_pass is not None, "edits are not trained inside bare()"
        outputs = recording.outputs
        places = replaced_places(recording.forward_pass, self.config.replace).to(outputs.device)
        if not bool(places.any()):
            raise EditError(
                'the prompt is a single token, so there is none before its last one to act at; use replace="last"'
            )

        def change(_: Tensor) -> Tensor:
            return torch.where(places.unsqueeze(2), content - outputs.float(), 0.0).to(outputs.dtype)

        return change
