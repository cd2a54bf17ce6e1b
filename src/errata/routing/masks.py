"""Sets of features as bits: packing, and exact search for the stored set that overlaps a query most.

A mask marks k of D features. Masks are stored packed, eight features a byte, because the search reads every byte of
the store: a million masks of 14,336 features are 1.8 GB packed and 14.3 GB as bytes. All masks of one store mark the
same number of features, so overlap, Hamming distance and Jaccard similarity rank alike.

Knows bits. Knows nothing of models, nor how candidates are proposed (`routing.index`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from errata.errors import ConfigError

__all__ = ["MaskStore", "Rows", "chance_overlap", "pack", "unpack"]

_CHUNK_BYTES = 1 << 19  # of masks compared at a time: they and what is made of them stay in the processor's cache
_FIRST_ROWS = 64


def pack(masks: Tensor) -> Tensor:
    """[n, D] bool -> [n, ceil(D/8)] uint8; the first feature is the highest bit of the first byte."""
    return torch.from_numpy(np.packbits(masks.cpu().numpy(), axis=-1))


def unpack(packed: Tensor, width: int) -> Tensor:
    """[n, ceil(D/8)] uint8 -> [n, D] bool."""
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), axis=-1, count=width).astype(bool))


def chance_overlap(marked: int, width: int) -> tuple[float, float]:
    """Mean and standard deviation of the overlap share of two independent masks (hypergeometric).

    Two random k-of-D masks share k²/D features on average: k/D of a mask. What is a strong match is therefore a
    matter of k/D, and a threshold that suits one model fires for everything on another.
    """
    k, d = marked, width
    variance = k * (k / d) * (1 - k / d) * ((d - k) / max(d - 1, 1))
    return k / d, variance**0.5 / k


class Rows:
    """A table that grows and shrinks while no row of it is ever moved.

    Rows stand in segments. When the last one is full a new one begins, as long as all before it together, so growing
    copies nothing; a loaded table is the first segment as it is, memory-mapped if it was. A row that is taken out
    stays where it stands and is passed over. Rows have two numbers: their *place*, which is kept for good, and their
    *number* among the rows that are left, in the order in which they came.
    """

    def __init__(self, columns: int, dtype: DTypeLike) -> None:
        self.columns, self.dtype = columns, np.dtype(dtype)
        self._segments: list[NDArray[Any]] = []
        self._starts: list[int] = []  # place of each segment's first row
        self.places = 0  # that are taken, those of removed rows included
        self.removed = np.empty(0, dtype=np.int64)  # places, ascending

    def __len__(self) -> int:
        return self.places - len(self.removed)

    @property
    def nbytes(self) -> int:
        """Bytes held, unused room included."""
        return sum(segment.nbytes for segment in self._segments)

    def load(self, rows: NDArray[Any]) -> None:
        """Replace everything by rows [n, columns]; they are shared, never copied and never written to."""
        self._segments, self._starts = ([rows], [0]) if len(rows) else ([], [])
        self.places, self.removed = len(rows), self.removed[:0]

    def append(self, row: NDArray[Any]) -> int:
        """Add a row [columns]; returns its place."""
        if not self._segments or self.places == self._starts[-1] + len(self._segments[-1]):
            self._segments.append(np.empty((max(_FIRST_ROWS, self.places), self.columns), dtype=self.dtype))
            self._starts.append(self.places)
        self._segments[-1][self.places - self._starts[-1]] = row
        self.places += 1
        return self.places - 1

    def remove(self, number: int) -> int:
        """Take a row out; those behind it move up by one in number. Returns the place it had."""
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} rows; none has number {number}")
        place = int(self.places_of(np.array([number]))[0])
        self.removed = np.insert(self.removed, np.searchsorted(self.removed, place), place)
        return place

    def places_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of rows by number."""
        # The j-th removed place r has r - j rows before it that are left.
        passed: NDArray[np.int64] = np.searchsorted(self.removed - np.arange(len(self.removed)), numbers, side="right")
        return numbers + passed

    def numbers_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of rows by place; none of them may be removed."""
        passed: NDArray[np.int64] = np.searchsorted(self.removed, places)
        return places - passed

    def segments(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Place of the first row, and rows, of each segment; removed rows stand among them."""
        for start, segment in zip(self._starts, self._segments, strict=True):
            yield start, segment[: self.places - start]

    def at(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """[n, columns], the rows that stand at these places."""
        if len(self._segments) == 1:
            return self._segments[0][places]
        found = np.empty((len(places), self.columns), dtype=self.dtype)
        segment_of = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(segment_of):
            here = segment_of == number
            found[here] = self._segments[number][places[here] - self._starts[number]]
        return found

    def whole(self) -> NDArray[Any]:
        """[n, columns], the rows that are left, in order; shared where they stand in one piece, else a copy."""
        if not len(self.removed) and len(self._segments) == 1:
            return self._segments[0][: self.places]
        whole = np.empty((len(self), self.columns), dtype=self.dtype)
        done = 0
        for start, rows in self.segments():
            first, last = np.searchsorted(self.removed, (start, start + len(rows)))
            kept = np.delete(rows, self.removed[first:last] - start, axis=0) if last > first else rows
            whole[done : done + len(kept)] = kept
            done += len(kept)
        return whole


class MaskStore:
    """A growing list of packed masks with exact overlap search.

    Args:
        width: D, features a mask speaks of.
        marked: k, features that every mask marks.
    """

    def __init__(self, width: int, marked: int) -> None:
        if not 0 < marked <= width:
            raise ConfigError(f"a mask marks between 1 and {width} features, not {marked}")
        self.width, self.marked = width, marked
        self._rows = Rows((width + 7) // 8, np.uint8)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes held, room for masks to come included."""
        return self._rows.nbytes

    @property
    def packed(self) -> Tensor:
        """[n, ceil(D/8)] uint8, to be read only: it may share the store's memory."""
        return torch.from_numpy(self._rows.whole())

    def load(self, packed: Tensor) -> None:
        """Replace everything by masks as `packed` gives them. They are shared, not copied: masks that are mapped from
        a file stay there, and are never written to."""
        rows = packed.cpu().numpy()
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != self._rows.columns:
            raise ConfigError(
                f"masks of {self.width} features are rows of {self._rows.columns} bytes (uint8), not "
                f"{rows.dtype} of shape {list(rows.shape)}"
            )
        self._rows.load(rows)

    def append(self, mask: Tensor) -> int:
        """Add one mask [D] bool; returns its number. Nothing that is stored is copied."""
        if int(mask.sum()) != self.marked:
            raise ConfigError(f"this store holds masks of {self.marked} features, not {int(mask.sum())}")
        self._rows.append(pack(mask[None])[0].numpy())
        return len(self) - 1

    def remove(self, index: int) -> None:
        """Take one mask out; those behind it move up by one in number, and none of them is copied."""
        self._rows.remove(index)

    def masks(self, indices: Tensor) -> Tensor:
        """[n, D] bool of the masks with these numbers."""
        return unpack(torch.from_numpy(self._rows.at(self._rows.places_of(indices.cpu().numpy()))), self.width)

    def overlaps(self, queries: Tensor) -> Tensor:
        """Share of each stored mask that each query marks too: [q, D] bool -> [q, n] in [0, 1]."""
        return torch.from_numpy(self._shared(pack(queries).numpy()).astype(np.float32) / np.float32(self.marked))

    def nearest(self, queries: Tensor, count: int = 1, among: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The `count` stored masks that overlap each query most: shares [q, c] and numbers [q, c], best first.

        Of equally good ones the earliest stored comes first, whatever the size of the batch.

        Args:
            queries: [q, D] bool.
            count: how many; c is less where the store holds fewer.
            among: for each query the numbers of the masks to choose from, ascending, such as an index proposes;
                without it all of them. Where they are fewer than c, shares are filled up with 0 and numbers with -1.
        """
        packed = pack(queries).numpy()
        count = min(count, len(self))
        shares = np.zeros((len(packed), count), dtype=np.float32)
        numbers = np.full((len(packed), count), -1, dtype=np.int64)
        everywhere = self._shared(packed) if among is None else None
        for row, query in enumerate(packed):
            if everywhere is not None:
                shared, chosen = everywhere[row], None
            else:
                assert among is not None
                chosen = among[row].cpu().numpy()
                rows = self._rows.at(self._rows.places_of(chosen))
                shared = np.empty(len(chosen), dtype=np.int32)
                _count_shared(rows, query[None], shared[None])
            best = _largest(shared, count)
            shares[row, : len(best)] = shared[best].astype(np.float32) / np.float32(self.marked)
            numbers[row, : len(best)] = best if chosen is None else chosen[best]
        return torch.from_numpy(shares), torch.from_numpy(numbers)

    def _shared(self, packed: NDArray[np.uint8]) -> NDArray[np.int32]:
        """How many features each query [q, bytes] shares with each mask, [q, n]."""
        shared = np.empty((len(packed), self._rows.places), dtype=np.int32)
        for start, rows in self._rows.segments():
            _count_shared(rows, packed, shared[:, start : start + len(rows)])
        return np.delete(shared, self._rows.removed, axis=1) if len(self._rows.removed) else shared


def _count_shared(rows: NDArray[np.uint8], queries: NDArray[np.uint8], out: NDArray[np.int32]) -> None:
    """Popcount of rows [n, bytes] AND queries [q, bytes] into out [q, n], a piece at a time, in the widest words."""
    word = next(
        size for size in (8, 4, 2, 1) if rows.shape[1] % size == 0 and rows.ctypes.data % size == 0
    )  # what is mapped from a file may begin anywhere
    rows, queries = rows.view(f"u{word}"), np.ascontiguousarray(queries).view(f"u{word}")
    step = max(1, _CHUNK_BYTES // (rows.shape[1] * word))
    both = np.empty((min(step, len(rows)), rows.shape[1]), dtype=rows.dtype)
    counts = np.empty(both.shape, dtype=np.uint8)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        marks, ones = both[: len(piece)], counts[: len(piece)]
        for number, query in enumerate(queries):
            np.bitwise_and(piece, query, out=marks)
            np.bitwise_count(marks, out=ones)
            ones.sum(axis=1, dtype=np.int32, out=out[number, start : start + step])


def _largest(values: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """Places of the `count` largest, largest first and of equal ones the first first; fewer where there are fewer."""
    count = min(count, len(values))
    if not count:
        return np.empty(0, dtype=np.int64)
    least = np.partition(values, len(values) - count)[len(values) - count]
    places = np.flatnonzero(values >= least)
    return places[np.argsort(-values[places], kind="stable")[:count]]
