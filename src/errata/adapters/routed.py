"""A router and a memory beside one linear layer: nothing happens until a prompt matches a stored edit.

The route is decided once, while the prompt is read, per sequence and from prompt tokens only; it is stored with the
sequence's KV cache and kept until that is gone. Results therefore do not depend on the batch, on padding, on whether
a cache is used, on beams, or on who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.adapters.base import Adapter, BaseIdentity, Explanation, LayerChange, RevertResult
from errata.adapters.memories import ColumnMemory, Memory
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.model.edited_linear import Contribution
from errata.model.probes import capturing_inputs
from errata.model.scoring import length_batches
from errata.model.sequences import ForwardPass
from errata.routing import TopHashRouter

__all__ = ["RoutedAdapter", "RoutedLayer"]


class RoutedLayer(Contribution):
    """Router and memory of one layer, as they act in a forward pass."""

    def __init__(self, router: TopHashRouter, memory: Memory) -> None:
        self.router, self.memory = router, memory

    def change_output(self, inputs: Tensor, outputs: Tensor, forward_pass: ForwardPass) -> Tensor:
        store = forward_pass.store
        if not store.frozen:
            gathered = self.router.gather(inputs, forward_pass.prompt, store.gathered.get(self))
            store.gathered[self] = gathered
            store.decided[self] = self.memory.select(self.router.decide(gathered), self.router)
        selection = store.decided.get(self)
        if selection is None:  # attached after these prompts were read: they go on as they began
            return outputs
        expanded = tuple(store.expanded(part, inputs.shape[0]) for part in selection)
        return self.memory.read(inputs, outputs, expanded)


class RoutedAdapter(Adapter):
    """Edits beside one linear layer of the base model.

    Attributes:
        path: the layer; router, memory: who fires, and what is then read.
        notes: what the editor keeps for going on later (prefixes, calibration), as JSON.
    """

    adapter_type: ClassVar[str] = "routed"

    def __init__(
        self,
        base: BaseIdentity,
        editor: str = "",
        editor_config: Mapping[str, Any] | None = None,
        *,
        path: str = "",
        layer: RoutedLayer | None = None,
    ) -> None:
        super().__init__(base, editor, editor_config)
        self.path = path
        self._layer = layer
        self.notes: dict[str, Any] = {}

    @property
    def layer(self) -> RoutedLayer:
        assert self._layer is not None, "an adapter has its layer before it is used"
        return self._layer

    @property
    def router(self) -> TopHashRouter:
        return self.layer.router

    @property
    def memory(self) -> Memory:
        return self.layer.memory

    def contributions(self) -> Mapping[str, Contribution]:
        return {self.path: self.layer}

    def _revert(self, edit_id: str) -> RevertResult:
        self.router.remove(edit_id)
        if not len(self.router) and isinstance(self.memory, ColumnMemory):
            self.memory.weight.zero_()
            return RevertResult(edit_id, "exact", "it was the only edit; the memory is empty again")
        return RevertResult(
            edit_id,
            "approximate",
            "its mask is removed, so no prompt is routed to it any more; what it wrote stays in columns that other "
            "edits may share",
        )

    def _supersede(self, old_id: str, new_id: str) -> None:
        if old_id in self.router.owners:  # unless the new edit has taken over the very same mask
            self.router.remove(old_id)

    @torch.no_grad()
    def features(self, prompts: Sequence[str], model: EditableModel) -> Tensor:
        """Each prompt's features as the router sees them, over its own tokens: [prompts, D]."""
        passages = [model.passage(prompt) for prompt in prompts]
        features = torch.empty(len(prompts), self.router.width)
        for indices in length_batches([len(p.ids) for p in passages], 8192):
            batch = model.batch([passages[i] for i in indices], side="right")
            with capturing_inputs(model.model, [self.path], len(indices)) as inputs:
                model.trunk_states(batch)
            gathered = self.router.gather(inputs[self.path], batch.mask.bool())
            features[indices] = self.router.features(gathered).cpu()
        return features

    def explain(self, prompts: Sequence[str], model: EditableModel | None = None) -> list[Explanation]:
        def owner(number: Tensor) -> str | None:
            return self.router.owners[int(number)] if int(number) >= 0 else None

        explanations = []
        route = self.router.match(self.features(prompts, model or self.model))
        for row, prompt in enumerate(prompts):
            second = owner(route.second[row])
            explanations.append(
                Explanation(
                    prompt,
                    owner(route.nearest[row]),
                    float(route.score[row]),
                    self.router.threshold,
                    bool(route.entry[row] >= 0),
                    second,
                    None if second is None else float(route.second_score[row]),
                )
            )
        return explanations

    def layer_changes(self, model: EditableModel) -> list[LayerChange]:
        base = float(weight_of(model.module(self.path)).float().norm())
        norm = self.memory.norm()
        return [LayerChange(self.path, norm, norm / base if base else 0.0, len(self.router))]

    def with_random_content(self, generator: torch.Generator) -> RoutedAdapter:
        layer = RoutedLayer(self.router, self.memory.with_random_content(generator))
        return RoutedAdapter(self.base, self.editor, self.editor_config, path=self.path, layer=layer)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        router_tensors, router = self.router.state()
        memory_tensors, memory = self.memory.state()
        tensors = {f"router.{name}": tensor for name, tensor in router_tensors.items()}
        tensors |= {f"memory.{name}": tensor for name, tensor in memory_tensors.items()}
        return tensors, {"path": self.path, "router": router, "memory": memory, "notes": self.notes}

    def _load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.path = state["path"]
        self.notes = dict(state["notes"])
        router = TopHashRouter.from_state(part("router."), state["router"])
        self._layer = RoutedLayer(router, ColumnMemory.from_state(part("memory.")))
