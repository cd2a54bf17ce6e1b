"""Points in a layer's input space, each with a radius, and exact search for the nearest one.

Distances are Euclidean and computed from differences. The usual expansion into squared norms and a product is faster
by a matrix multiplication, but it cancels: near a key it is wrong by a share of the norm that is larger than the radii
of close neighbours. Each query is measured against the same pieces of the store, whoever else is asked in the same
call, so a row's answer does not depend on its batch.

Knows points. Knows nothing of models, nor of what a radius means.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from errata.errors import ConfigError

__all__ = ["KeyStore", "Rows"]

_PIECE = 1 << 20  # numbers of the store that are measured at once: 4 MB, which stays in the processor's cache


class Rows:
    """A growing table of float32 rows on the CPU. Room doubles, so n appends copy O(n) rows.

    Args:
        width: numbers in a row.
    """

    def __init__(self, width: int) -> None:
        if width < 1:
            raise ConfigError(f"a row holds at least one number, not {width}")
        self.width = width
        self._buffer = torch.empty(0, width)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def table(self) -> Tensor:
        """[n, width], a view: it shows later changes of a row, and must not be written to."""
        return self._buffer[: self._count]

    def load(self, table: Tensor) -> None:
        """Replace everything by the rows of a table [n, width]."""
        self._buffer = table.detach().to("cpu", torch.float32).reshape(-1, self.width).clone()
        self._count = len(self._buffer)

    def append(self, row: Tensor) -> int:
        """Add one row [width]; returns its number."""
        if row.shape != (self.width,):
            raise ConfigError(f"rows of this table have {self.width} numbers, not {tuple(row.shape)}")
        if self._count == len(self._buffer):
            grown = torch.empty(max(16, 2 * self._count), self.width)
            grown[: self._count] = self.table
            self._buffer = grown
        self._buffer[self._count] = row.detach().to("cpu", torch.float32)
        self._count += 1
        return self._count - 1

    def remove(self, number: int) -> None:
        """Take one row out; those behind it move up by one."""
        self._buffer[number : self._count - 1] = self._buffer[number + 1 : self._count].clone()
        self._count -= 1


class KeyStore:
    """A growing list of keys, each with a radius, and exact search among those that are awake.

    A key with a negative radius sleeps: it keeps its number and its place, and no search finds it.

    Args:
        width: D, numbers in a key.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._keys = Rows(width)
        self._radii = np.empty(0)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def keys(self) -> Tensor:
        """[n, D] float32, a view that must not be written to."""
        return self._keys.table

    @property
    def radii(self) -> Tensor:
        """[n] float64, a copy."""
        return torch.from_numpy(self._radii[: len(self)].copy())

    def load(self, keys: Tensor, radii: Tensor) -> None:
        """Replace everything by keys [n, D] and radii [n]."""
        if len(keys) != len(radii):
            raise ConfigError(f"{len(keys)} keys need as many radii, not {len(radii)}")
        self._keys.load(keys)
        self._radii = radii.cpu().double().numpy().copy()

    def append(self, key: Tensor, radius: float) -> int:
        """Add one key [D]; returns its number."""
        number = self._keys.append(key)
        if number == len(self._radii):
            self._radii = np.concatenate([self._radii, np.full(max(16, number), -1.0)])
        self._radii[number] = radius
        return number

    def remove(self, number: int) -> None:
        """Take one key out; those behind it move up by one."""
        self._radii[number : len(self) - 1] = self._radii[number + 1 : len(self)].copy()
        self._keys.remove(number)

    def radius(self, number: int) -> float:
        return float(self._radii[number])

    def set_radius(self, number: int, radius: float) -> None:
        self._radii[number] = radius

    def sleep(self) -> None:
        """Let every key sleep."""
        self._radii[:] = -1.0

    def distances(self, queries: Tensor) -> np.ndarray:
        """Euclidean distances of queries [q, D] to all keys: [q, n] float32, infinite to those that sleep."""
        keys, wanted = self._keys.table.numpy(), queries.detach().to("cpu", torch.float32).numpy()
        squares = np.empty((len(wanted), len(keys)), dtype=np.float32)
        step = max(1, _PIECE // self.width)
        room = np.empty((min(step, len(keys)), self.width), dtype=np.float32)
        for start in range(0, len(keys), step):
            piece = keys[start : start + step]
            for row, query in enumerate(wanted):
                difference = np.subtract(piece, query, out=room[: len(piece)])
                np.einsum("nd,nd->n", difference, difference, out=squares[row, start : start + len(piece)])
        found = np.sqrt(squares, out=squares)
        found[:, self._radii[: len(keys)] < 0] = np.inf
        return found

    def nearest(self, queries: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
        """The `count` nearest keys that are awake: distances [q, c] float64 and numbers [q, c], nearest first.

        c is less than `count` where fewer keys are awake. Of equally near ones the latest stored comes first.
        """
        found = self.distances(queries)
        count = min(count, int((self._radii[: len(self)] >= 0).sum()))
        distances, numbers = np.empty((len(found), count)), np.empty((len(found), count), dtype=np.int64)
        rows = np.arange(len(found))
        for place in range(count):
            latest = found.shape[1] - 1 - found[:, ::-1].argmin(axis=1)
            distances[:, place], numbers[:, place] = found[rows, latest], latest
            found[rows, latest] = np.inf
        return torch.from_numpy(distances), torch.from_numpy(numbers)
