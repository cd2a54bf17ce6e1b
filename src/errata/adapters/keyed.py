"""Edits that are found by the distance of their keys, each with a content of its own: GRACE and its kin.

What one edit holds is its own: a key, the rules' verdict on it, and a content. Only two things are shared. Balls follow
from all edits in their order, and are formed anew without a reverted one. And an edit that joins another's ball begins
its training where that one's content stands; a revert that would have given it another beginning is not exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from errata.adapters.base import RevertResult
from errata.adapters.codebook import Codebook, EntryMemory
from errata.adapters.lora_blocks import LoraBlocks
from errata.adapters.memories import Memory
from errata.adapters.routed import RoutedAdapter
from errata.routing import DistanceRouter, Router
from errata.routing.distance import Label

__all__ = ["KeyedAdapter"]


class KeyedAdapter(RoutedAdapter):
    """A `DistanceRouter` with a memory of one content per edit."""

    adapter_type: ClassVar[str] = "keyed"
    routers: ClassVar[Mapping[str, type[Router]]] = {DistanceRouter.kind: DistanceRouter}
    memories: ClassVar[Mapping[str, type[Memory]]] = {Codebook.kind: Codebook, LoraBlocks.kind: LoraBlocks}

    @property
    def router(self) -> DistanceRouter:
        router = self.layer.router
        assert isinstance(router, DistanceRouter)
        return router

    @property
    def memory(self) -> EntryMemory:
        memory = self.layer.memory
        assert isinstance(memory, EntryMemory)
        return memory

    def store(self, edit_id: str, key: Tensor, label: Label, content: Tensor, replaced: Tensor) -> str | None:
        """Enter an edit, in place of what is stored under its id.

        Args:
            key: [D], the layer's input at the end of its prompt; label: what it shares with edits of the same answer.
            content: [width of the memory's rows], what it was trained to.
            replaced: [outputs], see `EntryMemory.append`.

        Returns:
            The edit that it displaces, see `DistanceRouter.append`.
        """
        if edit_id in self.router.owners:
            self._forget(edit_id)
        displaced = self.router.append(edit_id, key, label)
        self.memory.append(content, replaced)
        self.memory_version += 1
        return displaced

    def _beginnings(self) -> dict[str, Tensor | None]:
        """Per edit, the content that its training began with if it joined another's ball."""
        table = self.memory.contents.table
        return {
            owner: None if origin < 0 else table[origin].clone()
            for owner, origin in zip(self.router.owners, self.router.origins, strict=True)
        }

    def _revert(self, edit_id: str) -> RevertResult:
        before = self._beginnings()
        self._forget(edit_id)
        if not len(self.router):
            self.memory.clear()
            return RevertResult(edit_id, "exact", "it was the only edit; the memory is empty again")
        after = self._beginnings()
        moved = [owner for owner, now in after.items() if not _equal(before[owner], now)]
        removed = "its key and its content are removed, and the radii are what they are without it"
        if not moved:
            return RevertResult(edit_id, "exact", removed)
        named = ", ".join(moved[:3]) + (f" and {len(moved) - 3} more" if len(moved) > 3 else "")
        reason = f"{removed}; but {named} shared a ball with it and keeps what was trained on from there"
        return RevertResult(edit_id, "approximate", reason)


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)
