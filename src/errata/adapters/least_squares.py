"""Changes of weight that are joined by least squares instead of being added up.

Each edit says what it wants at its own keys K_i [inputs, n_i]: a change of output V_i. The layer's change D is the one
that meets all of them best,

    minimise  Σ ‖D K_i − V_i‖² + λ ‖D‖²,     D = Σ V_i K_iᵀ (λ I + Σ K_i K_iᵀ)⁻¹

and it is reached edit by edit, as recursive least squares: with A_i = A_{i−1} + K_i K_iᵀ,

    D_i = D_{i−1} + (V_i − D_{i−1} K_i) K_iᵀ A_i⁻¹

Whichever way edits come, D is the same. So an edit is taken out by solving again without it, which is exact.

Knows matrices and adapters. Knows nothing of where wanted changes come from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.adapters.base import BaseIdentity, RevertResult
from errata.adapters.delta import DeltaAdapter, WeightChange

__all__ = ["LeastSquaresAdapter", "RidgeInverse", "Wanted", "recursion"]


@dataclass(frozen=True)
class RidgeInverse:
    """A⁻¹ for A = λ I + Σ K Kᵀ, by Woodbury's identity: I / λ − U Uᵀ, with a column of U for each key.

    Once there are as many keys as the layer has inputs, A⁻¹ itself takes no more room and is held instead.

    Attributes:
        spent: U, [inputs, keys], float64; dense: A⁻¹, [inputs, inputs], in its place.
    """

    ridge: float
    spent: Tensor
    dense: Tensor | None = None

    @classmethod
    def empty(cls, inputs: int, ridge: float) -> RidgeInverse:
        return cls(ridge, torch.zeros(inputs, 0, dtype=torch.float64))

    def apply(self, keys: Tensor) -> Tensor:
        """A⁻¹ keys, [inputs, n] each, float64."""
        if self.dense is not None:
            return self.dense @ keys
        return keys / self.ridge - self.spent @ (self.spent.T @ keys)

    def extended(self, keys: Tensor) -> tuple[RidgeInverse, Tensor]:
        """With more keys [inputs, n], and A⁻¹ of these keys, [inputs, n], they being in A already."""
        keys = keys.double()
        solved = self.apply(keys)
        factor = torch.linalg.cholesky(torch.eye(keys.shape[1], dtype=torch.float64) + keys.T @ solved)
        spent = torch.linalg.solve_triangular(factor, solved.T, upper=False).T
        gain = torch.linalg.solve_triangular(factor.T, spent.T, upper=True).T
        if self.dense is not None:
            return replace(self, dense=self.dense - spent @ spent.T), gain
        spent = torch.cat([self.spent, spent], dim=1)
        if spent.shape[1] < len(spent):
            return replace(self, spent=spent), gain
        dense = torch.eye(len(spent), dtype=torch.float64) / self.ridge - spent @ spent.T
        return RidgeInverse(self.ridge, spent[:, :0], dense), gain


@dataclass(frozen=True)
class Wanted:
    """What an edit wants of a layer: changes of output, values [outputs, n], at inputs, keys [inputs, n]; float32."""

    path: str
    edit_id: str
    keys: Tensor
    values: Tensor


class LeastSquaresAdapter(DeltaAdapter):
    """Weight changes of which the sum is what meets all edits best at their keys.

    What it holds of an edit is its step of the recursion: left V_i − D_{i−1} K_i, right A_i⁻¹ K_i, and the keys K_i.
    """

    adapter_type: ClassVar[str] = "least_squares"

    def __init__(
        self,
        base: BaseIdentity,
        editor: str = "",
        editor_config: Mapping[str, Any] | None = None,
        *,
        shapes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(base, editor, editor_config, shapes=shapes)
        # Per layer, A⁻¹ and the keys that are in it.
        self._inverses: dict[str, tuple[list[Tensor], RidgeInverse]] = {}

    @property
    def ridges(self) -> dict[str, float]:
        """λ of each layer, by module path; to be set before the first edit, and saved with the notes."""
        found: dict[str, float] = self.notes.setdefault("ridges", {})
        return found

    def steps(self, wanted: Sequence[Wanted]) -> list[WeightChange]:
        """The changes, to be added, that take in what a batch of edits wants."""
        found: list[WeightChange] = []
        for path in dict.fromkeys(one.path for one in wanted):
            own = [one for one in wanted if one.path == path]
            total = self._layers[path].weight_change()
            assert total is not None
            solved = recursion([one.keys for one in own], [one.values for one in own], self._inverse(path), total)
            found += [
                WeightChange(path, (one.edit_id,), left.float(), right.float(), keys=one.keys)
                for one, (left, right) in zip(own, solved, strict=True)
            ]
        return found

    def forget(self, edit_ids: Collection[str]) -> None:
        """Take out what edits want, and solve again for the others."""
        kept: list[WeightChange] = []
        for path, layer in self._layers.items():
            own = [change for change in self._changes if change.path == path]
            values = _values(own)
            rest = [number for number, change in enumerate(own) if not set(change.edit_ids) & set(edit_ids)]
            solved = recursion(
                [_keys(own[number]) for number in rest],
                [values[number] for number in rest],
                RidgeInverse.empty(layer.shape[1], self.ridges[path]),
                torch.zeros(layer.shape),
            )
            kept += [
                replace(own[number], left=left.float(), right=right.float())
                for number, (left, right) in zip(rest, solved, strict=True)
            ]
        self._changes = sorted(kept, key=lambda change: change.batch)
        self._rebuild()

    def _inverse(self, path: str) -> RidgeInverse:
        """A⁻¹ for all keys of a layer, taken in one edit after the other: after loading the same, bit for bit."""
        stored = self.stored_keys(path)
        sources, inverse = self._inverses.get(path, ([], None))
        if (
            inverse is None
            or len(sources) > len(stored)
            or any(a is not b for a, b in zip(sources, stored, strict=False))
        ):
            sources, inverse = [], RidgeInverse.empty(self._layers[path].shape[1], self.ridges[path])
        for keys in stored[len(sources) :]:
            inverse, _ = inverse.extended(keys)
        self._inverses[path] = stored, inverse
        return inverse

    def _revert(self, edit_id: str) -> RevertResult:
        batches = {change.batch for change in self._changes if edit_id in change.edit_ids}
        beside = {i for c in self._changes if c.batch in batches for i in c.edit_ids} - {edit_id}
        self.forget([edit_id])
        if beside:
            reason = f"solved again without it, but {len(beside)} edits of its own batch were computed together with it"
            return RevertResult(edit_id, "approximate", reason)
        return RevertResult(edit_id, "exact", "the least squares of all others are solved again without it")

    def _supersede(self, old_id: str, new_id: str) -> None:
        self.forget([old_id])


def recursion(
    keys: Sequence[Tensor], values: Sequence[Tensor], inverse: RidgeInverse, total: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The steps D_i − D_{i−1} as factors left [outputs, n] and right [inputs, n], float64, one per edit.

    Args:
        keys, values: K_i [inputs, n] and V_i [outputs, n] of the edits to be taken in, in order.
        inverse, total: A⁻¹ and D [outputs, inputs] before them.
    """
    total = total.double()
    for own, wanted in zip(keys, values, strict=True):
        inverse, right = inverse.extended(own)
        left = wanted.double() - total @ own.double()
        total = total + left @ right.T
        yield left, right


def _keys(change: WeightChange) -> Tensor:
    assert change.keys is not None
    return change.keys


def _values(changes: Sequence[WeightChange]) -> list[Tensor]:
    """What each step of one layer's recursion was made for: V_i = left_i + D_{i−1} K_i, [outputs, n] each, float64."""
    if not changes:
        return []
    left, right, keys = (
        torch.cat([part(change).double() for change in changes], dim=1)
        for part in (lambda change: change.left, lambda change: change.right, _keys)
    )
    owner = torch.tensor([number for number, change in enumerate(changes) for _ in range(_keys(change).shape[1])])
    effects = (right.T @ keys) * (owner[:, None] < owner)  # of each earlier step, at each key
    return list(torch.split(left + left @ effects, [_keys(change).shape[1] for change in changes], dim=1))
