"""MEMOIR's router: a prompt's mask is a hash of its own activation pattern; the nearest stored mask decides.

    pool   a = mean over the prompt's tokens of x_t, minus the background mean          (NeurIPS 2025, section 3)
    hash   T(a) = indices of the k largest |a_j|;  mask = { π(j) : j in T(a) }, π a fixed random permutation
    match  R_i = |mask ∩ mask_i| / k;  the best i answers if R_i ≥ τ

π is drawn once and belongs to what is saved: with another permutation every stored mask would name other columns.
Two masks overlap by k/D through chance alone, so τ is best given relative to that (`relative_threshold`).

Beyond the paper, an entry may know the words for what it is about (an edit's subject). A prompt that has these words
needs less overlap to be taken for it than one that has not: the same question about somebody else overlaps as much as
the same question in other words, but it names somebody else. docs/routing.md has the measurements.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from errata.errors import ConfigError, EditError
from errata.routing.base import Route, Router
from errata.routing.index import EXACT_BELOW, SHARPEST, SharpestIndex
from errata.routing.masks import MaskStore

__all__ = ["POOLINGS", "Gathered", "Pooling", "TopHashRouter", "Words", "relative_threshold"]

Pooling = Literal["mean", "content_mean", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "content_mean", "last")
Words = Sequence[Sequence[int]]  # ways in which a tokenizer may write the same words

_COMPARED = 8  # nearest masks among which a prompt's own words choose
_NO_TOKEN = -1
_OR = "|"


def relative_threshold(relative: float, marked: int, width: int) -> float:
    """τ = c + t(1 − c) with chance overlap c = k/D: t = 0 is chance, t = 1 the very same mask."""
    chance = marked / width
    return chance + relative * (1.0 - chance)


@dataclass(frozen=True)
class Gathered:
    """A prompt as far as it has been read: sum and number of its pooled tokens, its last token, its token ids.

    sums, last: [rows, D] float32; counts: [rows]; seen: [rows], prompt tokens so far, pooled or not; ids: [rows, read],
    -1 where no token of the prompt stands, None if they are not known.
    """

    sums: Tensor
    counts: Tensor
    last: Tensor
    seen: Tensor
    ids: Tensor | None = None


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
        named_threshold, unnamed_threshold: the least overlap that fires an entry that has words, for prompts that have
            them too and for those that have not. None for both: words are not looked at, τ holds for all.
        hashing: "tophash", or "random" for the ablation in which a prompt's mask has nothing to do with its features.
        words: per entry the ways in which they may be written, see `_spelled`, in one text; empty where none are known.
    """

    kind: ClassVar[str] = "tophash"

    width: int
    marked: int
    threshold: float
    permutation: Tensor
    background: Tensor
    pooling: Pooling = "mean"
    named_threshold: float | None = None
    unnamed_threshold: float | None = None
    hashing: Literal["tophash", "random"] = "tophash"
    store: MaskStore = field(init=False)
    index: SharpestIndex = field(init=False)
    owners: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ConfigError(f"unknown pooling {self.pooling!r}; choose mean, content_mean or last")
        self.store = MaskStore(self.width, self.marked)
        self.index = SharpestIndex(self.width, min(SHARPEST, self.width))

    @classmethod
    def seeded(
        cls,
        width: int,
        marked: int,
        generator: torch.Generator,
        pooling: Pooling = "mean",
        *,
        permute: bool = True,
        hashing: Literal["tophash", "random"] = "tophash",
    ) -> TopHashRouter:
        """A router with a permutation drawn from the generator; background zero and threshold 1 until prepared."""
        permutation = torch.randperm(width, generator=generator) if permute else torch.arange(width)
        return cls(width, marked, 1.0, permutation, torch.zeros(width), pooling, hashing=hashing)

    # --- a prompt's features --------------------------------------------------------------------------------------

    def gather(
        self, inputs: Tensor, prompt: Tensor, before: Gathered | None = None, ids: Tensor | None = None
    ) -> Gathered:
        """Add this pass's prompt tokens, inputs [rows, columns, D] where prompt [rows, columns], to what was read."""
        rows, width = inputs.shape[0], inputs.shape[2]
        prompt = prompt.to(inputs.device)  # the layer may stand on another device than the token ids
        if before is None:
            zeros = torch.zeros(rows, width, device=inputs.device)
            none = torch.zeros(rows, dtype=torch.long, device=inputs.device)
            before = Gathered(zeros, none, zeros, none, torch.empty(rows, 0, dtype=torch.long))
        pooled = prompt
        if self.pooling == "content_mean":
            pooled = prompt & (prompt.long().cumsum(dim=1) + before.seen.unsqueeze(1) > 1)
        sums = before.sums
        if self.pooling != "last":
            sums = sums + torch.einsum("rcd,rc->rd", inputs.float(), pooled.float())
        found = prompt.any(dim=1)
        final = prompt.shape[1] - 1 - prompt.flip(1).long().argmax(dim=1)
        at_end = inputs[torch.arange(rows, device=inputs.device), final].float()
        last = torch.where(found.unsqueeze(1), at_end, before.last)
        read = None
        if ids is not None and before.ids is not None:
            here = torch.where(prompt.to(ids.device), ids, _NO_TOKEN)
            read = torch.cat([before.ids.to(ids.device), here], dim=1)
        return Gathered(sums, before.counts + pooled.sum(1), last, before.seen + prompt.sum(1), read)

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

    def masks_of(self, gathered: Gathered) -> Tensor:
        """[rows, D], each prompt's mask: `hash` of its features, or what stands for it in the ablation."""
        if self.hashing == "tophash":
            return self.hash(self.features(gathered))
        if gathered.ids is None:
            raise ConfigError("random masks are drawn from a prompt's token ids, and this pass was given embeddings")
        return torch.stack([self._drawn(_tokens(row)) for row in gathered.ids])

    def _drawn(self, tokens: list[int]) -> Tensor:
        """[D], k marks that follow from the tokens and from nothing else."""
        seed = int.from_bytes(hashlib.blake2b(repr(tokens).encode(), digest_size=7).digest(), "big")
        chosen = torch.randperm(self.width, generator=torch.Generator().manual_seed(seed))[: self.marked]
        return torch.zeros(self.width, dtype=torch.bool).scatter_(0, chosen, True)

    def sharpest(self, features: Tensor) -> Tensor:
        """[rows, D] features to the indices of the largest, [rows, `index.count`]: what the index goes by."""
        return features.abs().topk(self.index.count, dim=1).indices.cpu()

    # --- deciding -------------------------------------------------------------------------------------------------

    def decide(self, gathered: Gathered) -> Route:
        """The stored mask that each prompt overlaps most, if it is close enough for what the prompt says."""
        rows = gathered.last.shape[0]
        nobody = torch.full((rows,), -1, dtype=torch.long)
        if not len(self.store):
            threshold = torch.full((rows,), self.threshold, dtype=torch.float64)
            zero = torch.zeros(rows)
            return Route(
                entry=nobody, nearest=nobody, score=zero, threshold=threshold, second=nobody, second_score=zero
            )
        masks = self.masks_of(gathered)
        looks = self.named_threshold is not None and self.unnamed_threshold is not None and gathered.ids is not None
        among = None
        if len(self.store) > EXACT_BELOW and self.hashing == "tophash":
            among = self.index.candidates(self.sharpest(self.features(gathered)))
        scores, numbers = self.store.nearest(masks, count=_COMPARED if looks else 2, among=among)
        if scores.shape[1] == 1:  # nobody can be second
            scores = torch.cat([scores, torch.zeros(rows, 1)], dim=1)
            numbers = torch.cat([numbers, nobody.unsqueeze(1)], dim=1)
        thresholds = torch.full(scores.shape, self.threshold, dtype=torch.float64)
        if looks:
            assert gathered.ids is not None
            for row, ids in enumerate(gathered.ids):
                least = self._thresholds_for(_tokens(ids), numbers[row].tolist())
                thresholds[row] = torch.tensor(least, dtype=torch.float64)
        order = torch.arange(rows)
        # How far above its own threshold; where words make no difference, that is the order of overlaps.
        first = (scores.double() - thresholds).argmax(dim=1)
        score, nearest, threshold = scores[order, first], numbers[order, first], thresholds[order, first]
        second = (first == 0).long()  # of the others the one with the most overlap
        return Route(
            entry=torch.where((score >= threshold) & (nearest >= 0), nearest, nobody),
            nearest=nearest,
            score=score,
            threshold=threshold,
            second=numbers[order, second],
            second_score=scores[order, second],
        )

    def _thresholds_for(self, tokens: list[int], numbers: Sequence[int]) -> list[float]:
        """What entries, by number, take to answer a prompt of these tokens."""
        text = _spelled(tokens)

        def least(words: str) -> float | None:
            if not words:
                return self.threshold
            is_named = any(way in text for way in words.split(_OR))
            return self.named_threshold if is_named else self.unnamed_threshold

        return [2.0 if number < 0 else float(least(self.words[number]) or 0.0) for number in numbers]

    # --- entries --------------------------------------------------------------------------------------------------

    def find(self, mask: Tensor, sharpest: Tensor) -> int | None:
        """The number of the entry with this very mask [D], None if there is none; `sharpest` as in `append`."""
        if not len(self.store):
            return None
        among = self.index.candidates(sharpest[None]) if len(self.store) > EXACT_BELOW else None
        number = int(self.store.nearest(mask[None], among=among)[1][0, 0])
        return number if number >= 0 and bool((self.store.masks(torch.tensor([number]))[0] == mask).all()) else None

    def append(self, mask: Tensor, owner: str, sharpest: Tensor, words: Words = ()) -> None:
        """Store an entry for an edit.

        Args:
            mask: [D]; sharpest: [`index.count`], see `sharpest`; words: what a prompt that means it may say.
        """
        self.store.append(mask)
        self.index.append(sharpest)
        self.owners.append(owner)
        self.words.append(_OR.join(_spelled(way) for way in words))

    def remove(self, owner: str) -> list[int]:
        numbers = [number for number, name in enumerate(self.owners) if name == owner]
        if not numbers:
            raise EditError(f"no mask is stored for edit {owner!r}")
        for number in reversed(numbers):
            self.remove_entry(number)
        return numbers

    def remove_entry(self, number: int) -> None:
        """Take one entry out; those behind it move up."""
        self.store.remove(number)
        self.index.remove(number)
        del self.owners[number], self.words[number]

    def masks(self, entries: Tensor) -> Tensor:
        """[rows, D] bool; all False where the entry is -1."""
        masks = torch.zeros(len(entries), self.width, dtype=torch.bool)
        hit = entries >= 0
        if bool(hit.any()):
            masks[hit] = self.store.masks(entries[hit])
        return masks

    # --- saving ---------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            "masks": self.store.packed,
            "sharpest": self.index.sharpest,
            "permutation": self.permutation,
            "background": self.background,
            "words": torch.frombuffer(bytearray("\n".join(self.words).encode() + b"\n"), dtype=torch.uint8),
        }
        settings = {
            "width": self.width,
            "marked": self.marked,
            "threshold": self.threshold,
            "named_threshold": self.named_threshold,
            "unnamed_threshold": self.unnamed_threshold,
            "pooling": self.pooling,
            "hashing": self.hashing,
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
            settings["named_threshold"],
            settings["unnamed_threshold"],
            settings["hashing"],
        )
        router.store.load(tensors["masks"])
        router.index.load(tensors["sharpest"])
        router.owners = list(settings["owners"])
        router.words = bytes(tensors["words"].numpy()).decode().split("\n")[: len(router.owners)]
        return router

    def __repr__(self) -> str:
        return f"TopHashRouter({len(self)} masks, {self.marked} of {self.width}, threshold {self.threshold:.3f})"


def _tokens(ids: Tensor) -> list[int]:
    """The tokens of a row of `Gathered.ids`."""
    return [token for token in ids.tolist() if token != _NO_TOKEN]


def _spelled(tokens: Sequence[int]) -> str:
    """Tokens as text in which a run of them can be looked for; no token can be mistaken for a part of another."""
    return "".join(f" {token}." for token in tokens)
