"""A router and a memory beside one linear layer: nothing happens until a prompt matches a stored edit.

The route is decided once, while the prompt is read, per sequence and from prompt tokens only; it is stored with the
sequence's KV cache and kept until that is gone. Results therefore do not depend on the batch, on padding, on whether
a cache is used, on beams, or on who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.adapters.base import Adapter, BaseIdentity, Explanation, LayerChange, RevertResult
from errata.adapters.memories import ColumnMemory, Memory
from errata.errors import ArtifactError
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.model.edited_linear import Contribution
from errata.model.probes import capturing_inputs
from errata.model.scoring import length_batches
from errata.model.sequences import ForwardPass
from errata.routing import Router, TopHashRouter

__all__ = ["RoutedAdapter", "RoutedLayer"]


class RoutedLayer(Contribution):
    """Router and memory of one layer, as they act in a forward pass."""

    def __init__(self, router: Router, memory: Memory) -> None:
        self.router, self.memory = router, memory

    def change_output(self, inputs: Tensor, outputs: Tensor, forward_pass: ForwardPass) -> Tensor:
        store = forward_pass.store
        if not store.frozen:
            gathered = self.router.gather(inputs, forward_pass.prompt, store.gathered.get(self))
            store.gathered[self] = gathered
            store.decided[self] = self.memory.select(self.router.decide(gathered), self.router, inputs.device)
        selection = store.decided.get(self)
        if selection is None:  # attached after these prompts were read: they go on as they began
            return outputs
        expanded = tuple(store.expanded(part, inputs.shape[0]) for part in selection)
        return self.memory.read(inputs, outputs, expanded, forward_pass)


class RoutedAdapter(Adapter):
    """Edits beside one linear layer of the base model.

    Attributes:
        path: the layer; router, memory: who fires, and what is then read.
        notes: what the editor keeps for going on later (prefixes, calibration), as JSON.
        routers, memories: the kinds that can be loaded, by name. Another package's kinds stand in a subclass with its
            own `adapter_type`, named in the entry points of `errata.adapters.registry.GROUP`.
    """

    adapter_type: ClassVar[str] = "routed"
    routers: ClassVar[Mapping[str, type[Router]]] = {TopHashRouter.kind: TopHashRouter}
    memories: ClassVar[Mapping[str, type[Memory]]] = {ColumnMemory.kind: ColumnMemory}

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
    def router(self) -> Router:
        return self.layer.router

    @property
    def memory(self) -> Memory:
        return self.layer.memory

    def contributions(self) -> Mapping[str, Contribution]:
        return {self.path: self.layer}

    def _revert(self, edit_id: str) -> RevertResult:
        left_behind = self.memory.forget(self.router.remove(edit_id))
        if not len(self.router):
            self.memory.clear()
            return RevertResult(edit_id, "exact", "it was the only edit; the memory is empty again")
        if left_behind is None:
            return RevertResult(edit_id, "exact", "its entry is removed, and nothing of it is left in the memory")
        reason = f"its entry is removed, so no prompt is routed to it any more; {left_behind}"
        return RevertResult(edit_id, "approximate", reason)

    def _supersede(self, old_id: str, new_id: str) -> None:
        if old_id in self.router.owners:  # unless the new edit has taken over the very same entry
            self.memory.forget(self.router.remove(old_id))

    @torch.no_grad()
    def gathered(self, prompts: Sequence[str], model: EditableModel) -> Iterator[tuple[list[int], Any]]:
        """What the router gathers from prompts as it would while they are read: their numbers and that, per batch."""
        passages = [model.passage(prompt) for prompt in prompts]
        for indices in length_batches([len(p.ids) for p in passages], 8192):
            batch = model.batch([passages[i] for i in indices], side="right")
            with capturing_inputs(model.model, [self.path], len(indices)) as inputs:
                model.trunk_states(batch)
            yield indices, self.router.gather(inputs[self.path], batch.mask.bool())

    def explain(self, prompts: Sequence[str], model: EditableModel | None = None) -> list[Explanation]:
        def owner(number: Tensor) -> str | None:
            return self.router.owners[int(number)] if int(number) >= 0 else None

        found: dict[int, Explanation] = {}
        for indices, gathered in self.gathered(prompts, model or self.model):
            route = self.router.decide(gathered)
            for row, index in enumerate(indices):
                second = owner(route.second[row])
                found[index] = Explanation(
                    prompts[index],
                    owner(route.nearest[row]),
                    float(route.score[row]),
                    float(route.threshold[row]),
                    bool(route.entry[row] >= 0),
                    second,
                    None if second is None else float(route.second_score[row]),
                )
        return [found[index] for index in range(len(prompts))]

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
        state = {
            "path": self.path,
            "router": {"kind": self.router.kind, **router},
            "memory": {"kind": self.memory.kind, **memory},
            "notes": self.notes,
        }
        return tensors, state

    def _load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        def known(what: str, kind: str, kinds: Mapping[str, Any]) -> Any:
            if kind not in kinds:
                raise ArtifactError(
                    f"this adapter has a {what} of the unknown kind {kind!r} (known: {', '.join(sorted(kinds))}); "
                    "upgrade errata, or install the package that brings it"
                )
            return kinds[kind]

        self.path = state["path"]
        self.notes = dict(state["notes"])
        router: type[Router] = known("router", state["router"]["kind"], self.routers)
        memory: type[Memory] = known("memory", state["memory"]["kind"], self.memories)
        self._layer = RoutedLayer(
            router.from_state(part("router."), state["router"]), memory.from_state(part("memory."), state["memory"])
        )
