"""The one solve behind ROME, EMMET, MEMIT and AlphaEdit: keys and wanted changes in, two thin factors out.

For keys K [inputs, n], changes R [outputs, n] of what comes out there, a metric C and a ridge ρ,

    Δ = R (Kᵀ C⁻¹ K + ρ I)⁻¹ Kᵀ C⁻¹

* ρ = 0, n = 1: ROME (2202.05262, equation 2; with one key throughout, r-ROME);
* ρ = 0, n > 1: EMMET (2403.14236): of all Δ with Δ K = R the smallest in the metric C;
* ρ = λ: MEMIT (2210.07229, equation 14), by the push-through identity R Kᵀ (λ C + K Kᵀ)⁻¹ = Δ;
* ρ = L2 and C⁻¹ replaced by the projection P on a null space: AlphaEdit (2410.02355).

Keys of earlier edits enter as λ C + Σ K Kᵀ, by Woodbury's identity on the keys themselves. So no system is larger than
the number of keys, C is met only through its cached factor, and everything is float64.

Knows matrices. Knows nothing of models, nor where keys and values come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.errors import NumericsError

__all__ = ["Metric", "PastKeys", "Solution", "solve"]

# From keys [inputs, n] to C⁻¹ keys, float64: `KeyStatistics.solve`, `NullSpace.project`.
Metric = Callable[[Tensor], Tensor]

# Share of the largest eigenvalue of Kᵀ C⁻¹ K below which keys do not differ but for rounding.
_NEGLIGIBLE = 1e-6
# Cosine, in the metric, from which on an earlier key is the one that is being written again.
_SAME_KEY = 0.99


@dataclass(frozen=True)
class Solution:
    """A change of weight Δ = left @ rightᵀ. Column i of both is what edit i contributes: with R_i = 0 it would be zero.

    Attributes:
        left: [outputs, n]; right: [inputs, n], its columns of length 1; float64.
        condition: of Kᵀ C⁻¹ K + ρ I, in the directions that were solved for.
        rank: how many those were; where keys coincide, fewer than n.
    """

    left: Tensor
    right: Tensor
    condition: float
    rank: int

    def __call__(self, inputs: Tensor) -> Tensor:
        """What it adds to the output, [rows, columns, outputs], for inputs [rows, columns, inputs]."""
        left, right = (factor.to(inputs.device, torch.float32) for factor in (self.left, self.right))
        return inputs.float() @ right @ left.T


class PastKeys:
    """The keys of earlier edits, which later ones spare: C becomes C + Σ k kᵀ / weight.

    Args:
        weight: λ, what ordinary keys weigh against one earlier key.
    """

    def __init__(self, metric: Metric, weight: float) -> None:
        self._metric, self._weight = metric, weight
        self._sources: list[Tensor] = []
        self._keys = self._solved = self._gram = torch.empty(0, 0)

    def follow(self, stored: Sequence[Tensor]) -> None:
        """Hold these keys, [inputs, any] each; only those not held yet cost a solve with C."""
        count = len(self._sources)
        if count > len(stored) or any(a is not b for a, b in zip(self._sources, stored, strict=False)):
            count = 0
        if new := list(stored[count:]):
            keys = torch.cat(new, dim=1).double()
            solved = self._metric(keys)
            if count:
                across = self._keys.T @ solved
                gram = torch.cat([torch.cat([self._gram, across], 1), torch.cat([across.T, keys.T @ solved], 1)])
                keys, solved = torch.cat([self._keys, keys], 1), torch.cat([self._solved, solved], 1)
            else:
                gram = keys.T @ solved
            self._keys, self._solved, self._gram = keys, solved, gram
        self._sources = list(stored)

    def spared(self, keys: Tensor, solved: Tensor) -> Tensor:
        """(C + Σ k kᵀ / weight)⁻¹ keys, given keys and solved = C⁻¹ keys, [inputs, n] each.

        An earlier key that is among `keys` is not held against them: what is written again (a revised fact, two
        facts of one subject) is not protected from itself.
        """
        if not self._sources:
            return solved
        across = self._keys.T @ solved
        sizes = self._gram.diagonal()[:, None] * (keys * solved).sum(0)
        kept = ~(across.square() > _SAME_KEY**2 * sizes).any(1)
        if not bool(kept.any()):
            return solved
        system = self._gram[kept][:, kept] + self._weight * torch.eye(int(kept.sum()), dtype=torch.float64)
        return solved - self._solved[:, kept] @ torch.cholesky_solve(across[kept], torch.linalg.cholesky(system))


def solve(residual: Tensor, keys: Tensor, metric: Metric, ridge: float = 0.0, past: PastKeys | None = None) -> Solution:
    """Δ = R (Kᵀ C⁻¹ K + ρ I)⁻¹ Kᵀ C⁻¹.

    Where keys coincide there is no Δ with Δ K = R; then it meets R as nearly as can be (for two targets at one key,
    their mean), because directions in which the keys differ by rounding alone are left out.

    Args:
        residual: R, [outputs, n]; keys: K, [inputs, n]; ridge: ρ.
        past: keys of earlier edits to spare, of the same metric.

    Raises:
        NumericsError: keys or residual are not finite, or the keys vanish in the metric.
    """
    residual, keys = residual.double(), keys.double()
    solved = metric(keys)
    if past is not None:
        solved = past.spared(keys, solved)
    gram = keys.T @ solved
    if not bool(torch.isfinite(gram).all() and torch.isfinite(residual).all()):
        raise NumericsError("the keys or values of these edits are not finite; lower the learning rate or the clamp")
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    largest = float(values[-1])
    if not largest > torch.finfo(torch.float64).eps * float(keys.square().sum()):
        raise NumericsError(
            "the keys of these edits vanish in the metric of ordinary keys, so nothing can be written there; choose "
            "another layer, or a larger null space"
        )
    system = values.clamp(min=0.0) + ridge
    kept = system > _NEGLIGIBLE * system[-1]
    right = solved @ (vectors[:, kept] / system[kept]) @ vectors[:, kept].T
    lengths = right.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    return Solution(residual * lengths, right / lengths, float(system[-1] / system[kept][0]), int(kept.sum()))
