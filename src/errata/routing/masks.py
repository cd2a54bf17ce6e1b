"""Sets of features as bits: packing, and exact search for the stored set that overlaps a query most.

A mask marks k of D features. Masks are stored packed, eight features a byte, because the search reads every byte of
the store: a million masks of 14,336 features are 1.8 GB packed and 14.3 GB as bytes. All masks of one store mark the
same number of features, so overlap, Hamming distance and Jaccard similarity rank alike.

Knows bits. Knows nothing of models.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from errata.errors import ConfigError

__all__ = ["MaskStore", "chance_overlap", "pack", "unpack"]


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
        self._bytes = (width + 7) // 8
        self._buffer = np.empty((0, self._bytes), dtype=np.uint8)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def packed(self) -> Tensor:
        """[n, ceil(D/8)] uint8, a copy."""
        return torch.from_numpy(self._buffer[: self._count].copy())

    def load(self, packed: Tensor) -> None:
        """Replace everything by masks as `packed` gives them."""
        self._buffer = packed.cpu().numpy().astype(np.uint8).reshape(-1, self._bytes).copy()
        self._count = len(self._buffer)

    def append(self, mask: Tensor) -> int:
        """Add one mask [D] bool; returns its number. Room doubles, so n appends copy O(n) bytes."""
        if int(mask.sum()) != self.marked:
            raise ConfigError(f"this store holds masks of {self.marked} features, not {int(mask.sum())}")
        if self._count == len(self._buffer):
            grown = np.empty((max(16, 2 * len(self._buffer)), self._bytes), dtype=np.uint8)
            grown[: self._count] = self._buffer[: self._count]
            self._buffer = grown
        self._buffer[self._count] = pack(mask[None])[0].numpy()
        self._count += 1
        return self._count - 1

    def remove(self, index: int) -> None:
        """Take one mask out; those behind it move up by one."""
        self._buffer[index : self._count - 1] = self._buffer[index + 1 : self._count].copy()
        self._count -= 1

    def masks(self, indices: Tensor) -> Tensor:
        """[n, D] bool of the masks with these numbers."""
        return unpack(torch.from_numpy(self._buffer[indices.cpu().numpy()]), self.width)

    def overlaps(self, queries: Tensor) -> Tensor:
        """Share of each stored mask that each query marks too: [q, D] bool -> [q, n] in [0, 1]."""
        packed = pack(queries).numpy()
        stored = self._buffer[: self._count]
        shares = np.empty((len(packed), self._count), dtype=np.float32)
        for row, query in enumerate(packed):
            shares[row] = np.bitwise_count(stored & query).sum(axis=1, dtype=np.int32)
        return torch.from_numpy(shares / np.float32(self.marked))

    def nearest(self, queries: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
        """The `count` stored masks that overlap each query most: shares [q, c] and numbers [q, c], best first.

        Of equally good ones the earliest stored comes first, whatever the size of the batch.
        """
        shares = self.overlaps(queries)
        count = min(count, self._count)
        order = torch.argsort(shares, dim=1, descending=True, stable=True)[:, :count]
        return shares.gather(1, order), order
