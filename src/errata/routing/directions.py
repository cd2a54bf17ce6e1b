"""Directions, each with a number, and the search for those that point most nearly where a query does.

Closeness is the cosine. Up to `EXACT_BELOW` directions a query is compared with all of them. Beyond, they are divided
into cells around centres (spherical k-means; Dhillon and Modha 2001), about as many cells as each has members, and a
query is compared with those in the cells whose centres are nearest to it. So the index can miss an entry, but it can
never make one fire: what it proposes is compared exactly. Cells are made when they are first needed, made anew when the
store has doubled, and not saved.

Each query is multiplied with the store by itself, so a row's answer does not depend on its batch.

Knows directions. Knows nothing of models, nor of what they stand for.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from errata.routing.keys import Rows

__all__ = ["EXACT_BELOW", "DirectionStore"]

EXACT_BELOW = 16_384  # directions, up to which comparing all is as fast as asking the cells
_PROBED = 32  # cells that a query looks into
_YOUNG = 4096  # directions that stand in no cell yet, and are compared with every query
_SAMPLE = 32  # directions per cell that its centre is found by
_ROUNDS = 4
_PIECE = 1 << 14


class DirectionStore:
    """A growing list of unit vectors.

    Args:
        width: D, numbers in a vector.
        exact_below: entries from which on the cells are asked; probed: how many of them.
    """

    def __init__(self, width: int, exact_below: int = EXACT_BELOW, probed: int = _PROBED) -> None:
        self.width, self.exact_below, self.probed = width, exact_below, probed
        self._rows = Rows(width)
        self._centres = np.empty((0, width), dtype=np.float32)
        self._cells = np.empty(0, dtype=np.int32)  # of the first entries; those behind are young
        self._order = np.empty(0, dtype=np.int64)  # entries by cell
        self._starts = np.zeros(1, dtype=np.int64)  # where each cell's entries begin, and where the last one's end
        self._divided = 0  # how many there were when the centres were found

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def table(self) -> Tensor:
        """[n, D] float32, a view that must not be written to."""
        return self._rows.table

    def load(self, table: Tensor) -> None:
        """Replace everything by directions [n, D]."""
        self._rows.load(table)
        self._divided, self._cells = 0, self._cells[:0]

    def append(self, direction: Tensor) -> int:
        """Add one direction [D], which is brought to length one; returns its number."""
        return self._rows.append(F.normalize(direction.float(), dim=0))

    def remove(self, number: int) -> None:
        """Take one out; those behind it move up by one."""
        self._rows.remove(number)
        if number < len(self._cells):
            self._put_in_cells(np.delete(self._cells, number))

    def nearest(self, queries: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
        """The `count` nearest directions: cosines [q, c] float32 and numbers [q, c], nearest first.

        c is less than `count` where fewer are stored. Of equally near ones the latest stored comes first.
        """
        wanted = F.normalize(queries.detach().to("cpu", torch.float32), dim=1).numpy()
        table = self.table.numpy()
        count = min(count, len(table))
        scores = np.empty((len(wanted), count), dtype=np.float32)
        numbers = np.empty((len(wanted), count), dtype=np.int64)
        if len(table) > self.exact_below:
            self._divide()
        for row, query in enumerate(wanted):
            among = self._proposed(query, count) if len(table) > self.exact_below else None
            found = table @ query if among is None else table[among] @ query
            for place in range(count):
                latest = len(found) - 1 - int(found[::-1].argmax())
                scores[row, place] = found[latest]
                numbers[row, place] = latest if among is None else among[latest]
                found[latest] = -np.inf
        return torch.from_numpy(scores), torch.from_numpy(numbers)

    # --- cells ------------------------------------------------------------------------------------------------------

    def _proposed(self, query: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        """Numbers of the entries to compare with, ascending: at least `count`."""
        by_nearness = np.argsort(-(self._centres @ query), kind="stable")
        young = np.arange(len(self._cells), len(self), dtype=np.int64)
        found, looked = len(young), 0
        for cell in by_nearness:
            if looked >= self.probed and found >= count:
                break
            found += int(self._starts[cell + 1] - self._starts[cell])
            looked += 1
        parts = [self._order[self._starts[cell] : self._starts[cell + 1]] for cell in by_nearness[:looked]]
        return np.sort(np.concatenate([*parts, young]))

    def _divide(self) -> None:
        """Bring the cells up to date with what was stored since."""
        table = self.table.numpy()
        if len(table) > 2 * self._divided:
            self._find_centres(table)
            self._put_in_cells(self._nearest_centres(table))
            self._divided = len(table)
        elif len(table) - len(self._cells) > _YOUNG:
            self._put_in_cells(np.concatenate([self._cells, self._nearest_centres(table[len(self._cells) :])]))

    def _find_centres(self, table: NDArray[np.float32]) -> None:
        cells = max(1, round(len(table) ** 0.5))
        drawn = np.random.default_rng(0).permutation(len(table))[: _SAMPLE * cells]
        sample = table[drawn]
        self._centres = sample[:cells].copy()
        for _ in range(_ROUNDS):
            sums = np.zeros_like(self._centres)
            np.add.at(sums, self._nearest_centres(sample), sample)
            lengths = np.linalg.norm(sums, axis=1, keepdims=True)
            # One that has lost all its members stays where it was.
            self._centres = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), self._centres)

    def _nearest_centres(self, directions: NDArray[np.float32]) -> NDArray[np.int32]:
        pieces = [directions[start : start + _PIECE] for start in range(0, len(directions), _PIECE)]
        return np.concatenate([(piece @ self._centres.T).argmax(axis=1) for piece in pieces]).astype(np.int32)

    def _put_in_cells(self, cells: NDArray[np.int32]) -> None:
        self._cells = cells
        self._order = np.argsort(cells, kind="stable")
        self._starts = np.searchsorted(cells[self._order], np.arange(len(self._centres) + 1))
