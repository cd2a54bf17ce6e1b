"""MEMOIR's router: a prompt's mask is a hash of its own activation pattern; the nearest stored mask decides.

    pool   a = mean over the prompt's tokens of x_t, minus the background mean          (NeurIPS 2025, section 3)
    hash   T(a) = indices of the k largest |a_j|;  mask = { π(j) : j in T(a) }, π a fixed random permutation
    match  R_i = |mask ∩ mask_i| / k;  the best i answers if R_i ≥ τ

π is drawn once and belongs to what is saved: with another permutation every stored mask would name other columns.
Two masks overlap by k/D through chance alone, so τ is best given relative to that (`relative_threshold`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from errata.errors import ConfigError, EditError
from errata.routing.base import Route, Router
from errata.routing.masks import MaskStore

__all__ = ["POOLINGS", "Gathered", "Pooling", "TopHashRouter", "relative_threshold"]

Pooling = Literal["mean", "content_mean", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "content_mean", "last")


def relative_threshold(relative: float, marked: int, width: int) -> float:
    """τ = c + t(1 − c) with chance overlap c = k/D: t = 0 is chance, t = 1 the very same mask."""
    chance = marked / width
    return chance + relative * (1.0 - chance)


@dataclass(frozen=True)
class Gathered:
    """A prompt as far as it has been read: sum and number of its pooled tokens, and its last token.

    sums, last: [rows, D] float32; counts: [rows]; seen: [rows], prompt tokens so far, pooled or not.
    """

    sums: Tensor
    counts: Tensor
    last: Tensor
    seen: Tensor


@dataclass
class TopHashRouter(Router):
    """Decides by mask overlap which stored edit a prompt belongs to.

    Attributes:
        width: D, features of the edited layer's input; marked: k of them form a mask.
        threshold: τ, the least overlap that fires.
        permutation: [D], where each feature's columns lie.
        background: [D], the mean pooled feature of ordinary prompts.
        pooling: "mean" over all prompt tokens (the paper), "content_mean" without each prompt's first token,
            which is an attention sink and the same for all, or "last" token.
    """

    kind: ClassVar[str] = "tophash"

    width: int
    marked: int
    threshold: float
    permutation: Tensor
    background: Tensor
    pooling: Pooling = "mean"
    store: MaskStore = field(init=False)
    owners: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ConfigError(f"unknown pooling {self.pooling!r}; choose mean, content_mean or last")
        self.store = MaskStore(self.width, self.marked)

    @classmethod
    def seeded(cls, width: int, marked: int, generator: torch.Generator, pooling: Pooling = "mean") -> TopHashRouter:
        """A router with a permutation drawn from the generator; background zero and threshold 1 until prepared."""
        return cls(width, marked, 1.0, torch.randperm(width, generator=generator), torch.zeros(width), pooling)

    # --- a prompt's features --------------------------------------------------------------------------------------

    def gather(self, inputs: Tensor, prompt: Tensor, before: Gathered | None = None) -> Gathered:
        """Add this pass's prompt tokens, inputs [rows, columns, D] where prompt [rows, columns], to what was read."""
        rows, width = inputs.shape[0], inputs.shape[2]
        prompt = prompt.to(inputs.device)  # the layer may stand on another device than the token ids
        if before is None:
            zeros = torch.zeros(rows, width, device=inputs.device)
            none = torch.zeros(rows, dtype=torch.long, device=inputs.device)
            before = Gathered(zeros, none, zeros, none)
        pooled = prompt
        if self.pooling == "content_mean":
            pooled = prompt & (prompt.long().cumsum(dim=1) + before.seen.unsqueeze(1) > 1)
        sums = before.sums + torch.einsum("rcd,rc->rd", inputs.float(), pooled.float())
        found = prompt.any(dim=1)
        final = prompt.shape[1] - 1 - prompt.flip(1).long().argmax(dim=1)
        at_end = inputs[torch.arange(rows, device=inputs.device), final].float()
        last = torch.where(found.unsqueeze(1), at_end, before.last)
        return Gathered(sums, before.counts + pooled.sum(1), last, before.seen + prompt.sum(1))

    def features(self, gathered: Gathered) -> Tensor:
        """The centred pooled features a, [rows, D]."""
        if self.pooling == "last":
            return gathered.last - self.background.to(gathered.last)
        return gathered.sums / gathered.counts.clamp(min=1).unsqueeze(1) - self.background.to(gathered.sums)

    def hash(self, features: Tensor) -> Tensor:
        """TopHash: [rows, D] features to [rows, D] masks with k marks each."""
        top = features.abs().topk(self.marked, dim=1).indices.cpu()
        masks = torch.zeros(features.shape[0], self.width, dtype=torch.bool)
        return masks.scatter_(1, self.permutation[top], True)

    # --- deciding -------------------------------------------------------------------------------------------------

    def decide(self, gathered: Gathered) -> Route:
        """The stored mask that each prompt overlaps most, if it is close enough."""
        return self.match(self.features(gathered))

    def match(self, features: Tensor) -> Route:
        """The same from features [rows, D]."""
        rows = features.shape[0]
        threshold = torch.full((rows,), self.threshold, dtype=torch.float64)
        nobody, zero = torch.full((rows,), -1, dtype=torch.long), torch.zeros(rows)
        if not len(self.store):
            return Route(
                entry=nobody, nearest=nobody, score=zero, threshold=threshold, second=nobody, second_score=zero
            )
        scores, numbers = self.store.nearest(self.hash(features), count=2)
        best, nearest = scores[:, 0], numbers[:, 0]
        alone = scores.shape[1] == 1
        return Route(
            entry=torch.where(best >= self.threshold, nearest, nobody),
            nearest=nearest,
            score=best,
            threshold=threshold,
            second=nobody if alone else numbers[:, 1],
            second_score=zero if alone else scores[:, 1],
        )

    # --- entries --------------------------------------------------------------------------------------------------

    def append(self, mask: Tensor, owner: str) -> str | None:
        """Store a mask for an edit. A mask that is stored already changes owner instead.

        Returns:
            The edit that owned this very mask until now, which then has none and cannot be reached or reverted any
            more; the caller strikes it off its list (`Adapter.supersede`). None if the mask displaces no other edit.
        """
        if len(self.store):
            shares, numbers = self.store.nearest(mask[None])
            number = int(numbers[0, 0])
            if float(shares[0, 0]) == 1.0 and bool((self.store.masks(numbers[0]) == mask).all()):
                displaced, self.owners[number] = self.owners[number], owner
                return None if displaced == owner else displaced
        self.store.append(mask)
        self.owners.append(owner)
        return None

    def remove(self, owner: str) -> list[int]:
        numbers = [number for number, name in enumerate(self.owners) if name == owner]
        if not numbers:
            raise EditError(f"no mask is stored for edit {owner!r}")
        for number in reversed(numbers):
            self.store.remove(number)
            del self.owners[number]
        return numbers

    def masks(self, entries: Tensor) -> Tensor:
        """[rows, D] bool; all False where the entry is -1."""
        masks = torch.zeros(len(entries), self.width, dtype=torch.bool)
        hit = entries >= 0
        if bool(hit.any()):
            masks[hit] = self.store.masks(entries[hit])
        return masks

    # --- saving ---------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"masks": self.store.packed, "permutation": self.permutation, "background": self.background}
        settings = {
            "width": self.width,
            "marked": self.marked,
            "threshold": self.threshold,
            "pooling": self.pooling,
            "owners": self.owners,
        }
        return tensors, settings

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        router = cls(
            settings["width"],
            settings["marked"],
            settings["threshold"],
            tensors["permutation"],
            tensors["background"],
            settings["pooling"],
        )
        router.store.load(tensors["masks"])
        router.owners = list(settings["owners"])
        return router

    def __repr__(self) -> str:
        return f"TopHashRouter({len(self)} masks, {self.marked} of {self.width}, threshold {self.threshold:.3f})"
