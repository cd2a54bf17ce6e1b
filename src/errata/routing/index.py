"""Which of a million stored masks are worth comparing: inverted lists of each mask's sharpest features.

A mask marks thousands of features, and two masks share many of them by chance. The few with the largest |a_j| are
another matter: of their 64 sharpest features, prompts that belong together share dozens and prompts that do not share
a handful. So each feature keeps a list of the entries among whose sharpest it is. A query counts how often each entry
stands in the lists of its own sharpest features, and those that stand in most of them are the candidates; the store
then compares their whole masks exactly (`MaskStore.nearest(..., among=...)`). So the index can miss an entry, but it
can never make one fire.

Long lists say little, because they belong to features that are sharp in many prompts. A query reads the shortest
first, up to a fixed number of postings, so its cost does not grow with the store. docs/routing.md has the measurements
that this design, and its three numbers, were chosen by.

Knows which features are sharp. Knows neither masks nor models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from errata.errors import ConfigError
from errata.routing.masks import Rows

__all__ = ["EXACT_BELOW", "SHARPEST", "SharpestIndex"]

EXACT_BELOW = 4096  # entries, up to which comparing all of them is as fast as asking an index
SHARPEST = 64  # features of an entry that are indexed
_POSTINGS = 98_304  # that a query reads at most
_CANDIDATES = 2048  # that a query proposes at most
_PIECE = 1 << 15  # entries whose lists are made at a time


class SharpestIndex:
    """Inverted lists of entries by their sharpest features; numbers are those of the `MaskStore` it goes with.

    What is appended, removed and loaded here must be appended, removed and loaded there, in the same order. After
    loading, the lists are made when they are first needed.

    Args:
        width: D, features there are.
        sharpest: features of each entry that are indexed; at most D.
        postings: list items that a query reads at most; the shortest list is always read whole.
        candidates: entries that a query proposes at most.
    """

    def __init__(
        self, width: int, sharpest: int = SHARPEST, postings: int = _POSTINGS, candidates: int = _CANDIDATES
    ) -> None:
        if not 0 < sharpest <= width:
            raise ConfigError(f"an index takes between 1 and {width} features of an entry, not {sharpest}")
        self.width, self.count = width, sharpest
        self.postings, self.candidates_at_most = postings, candidates
        self._rows = Rows(sharpest, np.min_scalar_type(width - 1))
        # Per feature the places of its entries, ascending, in an array that may have room for more. None: to be made.
        self._lists: list[NDArray[np.int32]] | None = None
        self._lengths = np.zeros(width, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes held, room for entries to come included."""
        return self._rows.nbytes + sum(one.nbytes for one in self._lists or ())

    @property
    def sharpest(self) -> Tensor:
        """[n, sharpest], each entry's features, for saving; to be read only: it may share the index's memory."""
        return torch.from_numpy(self._rows.whole())

    def load(self, sharpest: Tensor) -> None:
        """Replace everything by features as `sharpest` gives them, shared and not copied."""
        rows = sharpest.cpu().numpy()
        if rows.dtype != self._rows.dtype or rows.ndim != 2 or rows.shape[1] != self.count:
            raise ConfigError(
                f"this index takes rows of {self.count} features ({self._rows.dtype}), not {rows.dtype} of shape "
                f"{list(rows.shape)}"
            )
        self._rows.load(rows)
        self._lists = None

    def append(self, sharpest: Tensor) -> None:
        """Add an entry by its features [sharpest], in any order."""
        if sharpest.shape != (self.count,):
            raise ConfigError(f"this index takes {self.count} features of an entry, not {list(sharpest.shape)}")
        features = sharpest.cpu().numpy()
        lists = self._made()
        place = self._rows.append(features)
        for feature in features.tolist():
            length = self._lengths[feature]
            if length == len(lists[feature]):
                room = np.empty(max(8, length + length // 2), dtype=np.int32)
                room[:length] = lists[feature]
                lists[feature] = room
            lists[feature][length] = place
        self._lengths[features] += 1

    def remove(self, number: int) -> None:
        """Take an entry out; those behind it move up by one in number."""
        lists = self._made()
        place = self._rows.remove(number)
        features = self._rows.at(np.array([place]))[0]
        for feature in features.tolist():
            entries = lists[feature][: self._lengths[feature]]
            at = np.searchsorted(entries, place)
            entries[at:-1] = entries[at + 1 :]
        self._lengths[features] -= 1

    def candidates(self, sharpest: Tensor) -> list[Tensor]:
        """For each query, given by its features [q, any number], the entries to compare: numbers, ascending."""
        lists = self._made()
        return [torch.from_numpy(self._rows.numbers_of(self._propose(row, lists))) for row in sharpest.cpu().numpy()]

    def _propose(self, features: NDArray[Any], lists: list[NDArray[np.int32]]) -> NDArray[np.int64]:
        """Places of the entries that stand in most of these features' lists, ascending."""
        lengths = self._lengths[features]
        order = np.argsort(lengths, kind="stable")
        read = max(1, int(np.searchsorted(np.cumsum(lengths[order]), self.postings, side="right")))
        places = np.concatenate([lists[f][:n] for f, n in zip(features[order[:read]], lengths[order], strict=False)])
        places.sort()
        first = np.flatnonzero(np.diff(places, prepend=-1))
        times = np.diff(first, append=len(places))
        entries = places[first].astype(np.int64)
        if len(entries) <= self.candidates_at_most:
            return entries
        # All that stand in at least `least` lists, and of those one short of it the earliest, up to the limit.
        at_least = np.bincount(times)[::-1].cumsum()[::-1]
        least = int(np.argmax(np.append(at_least, 0) <= self.candidates_at_most))
        chosen = times >= least
        chosen[np.flatnonzero(times == least - 1)[: self.candidates_at_most - int(chosen.sum())]] = True
        return entries[chosen]

    def _made(self) -> list[NDArray[np.int32]]:
        """The lists, made of the rows if that has not happened yet."""
        if self._lists is None:
            rows = self._rows.whole()
            pieces = [rows[start : start + _PIECE] for start in range(0, len(rows), _PIECE)]
            found = [np.bincount(piece.reshape(-1), minlength=self.width) for piece in pieces]
            self._lengths = np.sum(found, axis=0, dtype=np.int64) if found else np.zeros(self.width, dtype=np.int64)
            ends = np.cumsum(self._lengths)
            places = np.empty(rows.size, dtype=np.int32)
            free = ends - self._lengths  # where the next place of each feature goes
            for number, (piece, counts) in enumerate(zip(pieces, found, strict=True)):
                # Stable, so that places stay in order within a feature; of 16-bit numbers this is a radix sort.
                by_feature = np.argsort(piece.reshape(-1), kind="stable") // self.count + number * _PIECE
                begins = np.cumsum(counts) - counts
                places[np.repeat(free - begins, counts) + np.arange(piece.size)] = by_feature
                free += counts
            self._lists = np.split(places, ends[:-1])
        return self._lists
