"""A router and a memory beside a linear layer: nothing happens until a prompt matches a stored edit.

There may be more memories, beside later layers; what is read there was decided by the one router, at the first.

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
from errata.model.scoring import READ_TOKENS, length_batches
from errata.model.sequences import ForwardPass
from errata.routing import Router, TopHashRouter

__all__ = ["ReadingLayer", "RoutedAdapter", "RoutedLayer"]


class RoutedLayer(Contribution):
    """Router and memory of one layer, as they act in a forward pass.

    Attributes:
        further: memories beside later layers that this router decides for, see `ReadingLayer`.
    """

    def __init__(self, router: Router, memory: Memory, further: Sequence[Memory] = ()) -> None:
        self.router, self.memory, self.further = router, memory, tuple(further)

    @property
    def memories(self) -> tuple[Memory, ...]:
        return (self.memory, *self.further)

    def change_output(self, inputs: Tensor, outputs: Tensor, forward_pass: ForwardPass) -> Tensor:
        store = forward_pass.store
        if not store.frozen:
            gathered = self.router.gather(inputs, forward_pass.prompt, store.gathered.get(self), forward_pass.ids)
            route = self.router.decide(gathered)
            store.gathered[self] = gathered
            store.decided[self] = tuple(one.select(route, self.router, inputs.device) for one in self.memories)
        return self.read(0, inputs, outputs, forward_pass)

    def read(self, number: int, inputs: Tensor, outputs: Tensor, forward_pass: ForwardPass) -> Tensor:
        """New outputs of the layer beside which memory `number` stands."""
        store = forward_pass.store
        selections = store.decided.get(self)
        if selections is None:  # attached after these prompts were read: they go on as they began
            return outputs
        expanded = tuple(store.expanded(part, inputs.shape[0]) for part in selections[number])
        return self.memories[number].read(inputs, outputs, expanded, forward_pass)


class ReadingLayer(Contribution):
    """A further memory of a `RoutedLayer`, beside a later layer."""

    def __init__(self, first: RoutedLayer, number: int) -> None:
        self.first, self.number = first, number

    def change_output(self, inputs: Tensor, outputs: Tensor, forward_pass: ForwardPass) -> Tensor:
        return self.first.read(self.number, inputs, outputs, forward_pass)


class RoutedAdapter(Adapter):
    """Edits beside a linear layer of the base model, or beside several.

    Attributes:
        path: the layer; router, memory: who fires, and what is then read.
        further_paths: later layers, beside which `layer.further` stand, in that order.
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
        further_paths: Sequence[str] = (),
    ) -> None:
        super().__init__(base, editor, editor_config)
        self.path, self.further_paths = path, tuple(further_paths)
        self._set_layer(layer)
        self.notes: dict[str, Any] = {}

    def _set_layer(self, layer: RoutedLayer | None) -> None:
        self._layer = layer
        self._contributions: dict[str, Contribution] = {}
        if layer is not None:
            self._contributions = {self.path: layer}
            for number, path in enumerate(self.further_paths, start=1):
                self._contributions[path] = ReadingLayer(layer, number)

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
        return self._contributions

    def _forget(self, edit_id: str) -> str | None:
        """Take out an edit's entries; what stays of them in a memory, in words."""
        entries = self.router.remove(edit_id)
        left_behind = [reason for one in self.layer.memories if (reason := one.forget(entries))]
        return left_behind[0] if left_behind else None

    def _revert(self, edit_id: str) -> RevertResult:
        left_behind = self._forget(edit_id)
        if not len(self.router):
            for one in self.layer.memories:
                one.clear()
            return RevertResult(edit_id, "exact", "it was the only edit; the memory is empty again")
        if left_behind is None:
            return RevertResult(edit_id, "exact", "its entry is removed, and nothing of it is left in the memory")
        reason = f"its entry is removed, so no prompt is routed to it any more; {left_behind}"
        return RevertResult(edit_id, "approximate", reason)

    def _supersede(self, old_id: str, new_id: str) -> None:
        if old_id in self.router.owners:  # unless the new edit has taken over the very same entry
            self._forget(old_id)

    @torch.no_grad()
    def gathered(self, prompts: Sequence[str], model: EditableModel) -> Iterator[tuple[list[int], Any]]:
        """What the router gathers from prompts as it would while they are read: their numbers and that, per batch."""
        passages = [model.passage(prompt) for prompt in prompts]
        for indices in length_batches([len(p.ids) for p in passages], READ_TOKENS):
            batch = model.batch([passages[i] for i in indices], side="right")
            with (
                capturing_inputs(model.model, [self.path], len(indices)) as inputs,
                model.sequences.narrowed(indices, len(prompts)),
            ):
                model.trunk_states(batch)
            yield indices, self.router.gather(inputs[self.path], batch.mask.bool(), ids=batch.ids)

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
        changes = []
        for path, one in zip((self.path, *self.further_paths), self.layer.memories, strict=True):
            base, norm = float(weight_of(model.module(path)).float().norm()), one.norm()
            changes.append(LayerChange(path, norm, norm / base if base else 0.0, one.count(len(self.router))))
        return changes

    def with_random_content(self, generator: torch.Generator) -> RoutedAdapter:
        memory, *further = (one.with_random_content(generator) for one in self.layer.memories)
        layer = RoutedLayer(self.router, memory, further)
        return type(self)(
            self.base,
            self.editor,
            self.editor_config,
            path=self.path,
            layer=layer,
            further_paths=self.further_paths,
        )

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        router_tensors, router = self.router.state()
        tensors = {f"router.{name}": tensor for name, tensor in router_tensors.items()}
        memories = []
        for number, one in enumerate(self.layer.memories):
            memory_tensors, memory = one.state()
            tensors |= {f"memory.{number}.{name}": tensor for name, tensor in memory_tensors.items()}
            memories.append({"kind": one.kind, **memory})
        state = {
            "path": self.path,
            "further_paths": self.further_paths,
            "router": {"kind": self.router.kind, **router},
            "memories": memories,
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

        if "memories" not in state:
            raise ArtifactError(
                "this adapter was saved by an errata that knew one layer only; build it anew from its edits.jsonl: "
                "errata edit --edits edits.jsonl --method METHOD --out NEW"
            )
        self.path, self.further_paths = state["path"], tuple(state["further_paths"])
        self.notes = dict(state["notes"])
        made = []
        for number, one in enumerate(state["memories"]):
            memory: type[Memory] = known("memory", one["kind"], self.memories)
            made.append(memory.from_state(part(f"memory.{number}."), one))
        router: type[Router] = known("router", state["router"]["kind"], self.routers)
        found = router.from_state(part("router."), state["router"])
        self._set_layer(RoutedLayer(found, made[0], made[1:]))
