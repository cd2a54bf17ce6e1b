"""AlphaEdit: MEMIT confined to what ordinary keys do not use (Fang et al. 2025, 2410.02355).

With P the projection on the eigenvectors of C whose eigenvalues are small, K the batch's keys and K_p those of earlier
edits, the change is Δ P, where Δ minimises ‖(W + Δ P) K − V‖² + L2 ‖Δ P‖² + ‖Δ P K_p‖²:

    Δ P = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + L2 I)⁻¹

In coordinates q = Uᵀ k of the null space P = U Uᵀ this is symmetric, R Qᵀ (L2 I + Q_p Q_pᵀ + Q Qᵀ)⁻¹ Uᵀ, and so MEMIT's
solve with P in the place of C⁻¹ and λ = L2: `solving.solve` does both, in systems of the size of the batch. The
reference solves the unsymmetric system in all dimensions, and keeps P and the sum over K_p as dense matrices per layer.

**Threshold.** Published is 2e-2 on the eigenvalues of C themselves (the paper's footnote says 1e-2), which means
something else in every model and layer. For a model without published settings it is relative: the null space is the
largest that holds at most that share of the squared norm of ordinary keys, and L2 is a multiple of that norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from errata.editors.layers import shape_key
from errata.editors.memit import Joint, JointConfig
from errata.editors.memory import MemoryPart
from errata.editors.solving import Metric
from errata.model import EditableModel
from errata.model.statistics import NullSpace
from errata.progress import Progress

__all__ = ["AlphaEdit", "AlphaEditConfig"]

_ATLAS = ("llama", 6, 256)
# Ours, measured on atlas: docs/methods/alphaedit.md.
_RELATIVE = {"relative": True, "threshold": 0.1, "ridge": 3e-3}


@dataclass(frozen=True, kw_only=True)
class AlphaEditConfig(JointConfig):
    """Settings of AlphaEdit, beside those of `JointConfig`.

    Attributes:
        threshold: of the null space, see `KeyStatistics.null_space`.
        ridge: L2.
        relative: threshold and ridge are in units of the mean squared norm of ordinary keys.
    """

    threshold: float = 2e-2
    ridge: float = 10.0
    relative: bool = False
    protect_past: Literal["none", "cache"] = "cache"

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        found = super().published(model)
        if found is None or shape_key(model) == _ATLAS:
            return found and {**found, **_RELATIVE}
        return {**found, "source": f"{found['source']}; AlphaEdit's threshold and L2"}

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        return {**super().derived(model), **_RELATIVE}


class AlphaEdit(Joint[AlphaEditConfig]):
    """Writes a batch of facts where ordinary keys have next to nothing, sparing the keys of earlier edits."""

    name = "alphaedit"
    summary = "a batch of facts in directions that ordinary keys hardly use, sparing earlier edits"
    paper = "AlphaEdit, 2410.02355"
    Config = AlphaEditConfig

    def _prepare(self, progress: Progress) -> None:
        self._spaces: dict[int, NullSpace] = {}
        super()._prepare(progress)
        config = self.config
        for layer, statistics in self._statistics.items():
            self._spaces[layer] = statistics.null_space(config.threshold, relative=config.relative)
        self._delta.notes["null_spaces"] = {
            str(layer): {"rank": space.rank, "share": space.share} for layer, space in self._spaces.items()
        }

    def _memory_to_prepare(self) -> list[MemoryPart]:
        squares = [8 * self.model.anatomy.key_width[layer] ** 2 for layer in self._layers]
        fewer = "edit fewer layers"
        return [
            *super()._memory_to_prepare(),
            MemoryPart("null spaces", sum(squares) // 2, fewer, on_host=True),  # the thinner half is kept
            MemoryPart("an eigenvalue decomposition", 3 * max(squares), fewer, on_host=True),
        ]

    def _metric(self, layer: int) -> Metric:
        return lambda keys: self._spaces[layer].project(keys)

    def _ridge(self, layer: int) -> float:
        scale = float(self._statistics[layer].second_moment.trace()) if self.config.relative else 1.0
        return self.config.ridge * scale

    def _past_weight(self, layer: int) -> float:
        return self._ridge(layer)
