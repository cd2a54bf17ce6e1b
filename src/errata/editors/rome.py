"""ROME: one rank-one change of an MLP output projection per fact (Meng et al. 2022, 2202.05262).

With key k* (the subject's, averaged over contexts), wanted output v* and second moment C of ordinary keys:

    u = C⁻¹ k*,   Λ = (v* − W k*) / (uᵀ k*),   W ← W + Λ uᵀ

This is **r-ROME** (2403.07175), the default: one key throughout. `variant="original"` takes W k and uᵀ k from the
bare prompt while u comes from the averaged key, as the paper's code did; where the subject comes first and no
beginning token precedes it, that denominator can be tiny and the change explodes ("disabling edit").

ROME writes one fact at a time; EMMET (`memit.py`) is the same for many at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from errata.editors.contexts import rome_contexts
from errata.editors.layers import scaled_layer, shape_key
from errata.editors.located import Located, LocatedConfig
from errata.editors.solving import Metric, Solution
from errata.editors.values import TargetValue
from errata.errors import ConfigError, NumericsError
from errata.model import EditableModel

__all__ = ["Rome", "RomeConfig"]

_ROME = "kmeng01/rome, hparams"
_EASYEDIT = "EasyEdit, hparams/ROME (there without statistics)"
_PUBLISHED: dict[tuple[str, int, int], dict[str, Any]] = {
    # Single edits on layers 0 to 4 of atlas: docs/methods/rome.md.
    ("llama", 6, 256): {
        "layer": 0,
        "steps": 25,
        "weight_decay": 1e-3,
        "preservation": 150.0,
        "source": "EasyEdit's ROME for Llama, with statistics; layer ours, measured in docs/methods/rome.md",
    },
    ("gpt2", 24, 1024): {"layer": 8, "clamp": 3.0, "source": _ROME},
    ("gpt2", 36, 1280): {"layer": 12, "source": _ROME},
    ("gpt2", 48, 1600): {"layer": 17, "source": _ROME},
    ("gptj", 28, 4096): {"layer": 5, "source": _ROME},
    ("gpt_neox", 44, 6144): {"layer": 15, "source": _ROME},
    ("llama", 32, 4096): {"layer": 5, "steps": 25, "weight_decay": 1e-3, "source": _EASYEDIT},
    ("mistral", 32, 4096): {"layer": 5, "steps": 25, "weight_decay": 1e-3, "source": _EASYEDIT},
}


@dataclass(frozen=True, kw_only=True)
class RomeConfig(LocatedConfig):
    """Settings of ROME, beside those of `LocatedConfig`.

    Attributes:
        layer: block whose MLP output projection is changed.
        spread: blocks over which the change is spread besides; then v* is sought in the residual stream.
        variant: "r-rome" with one key throughout, or "original".
        use_statistics: weigh keys by C⁻¹ as the paper does; without, u = k*.
        preservation: what ordinary keys weigh against one of an earlier edit, where those are protected.
        contexts: at most twenty.
    """

    layer: int = 5
    spread: tuple[int, ...] = ()
    variant: Literal["r-rome", "original"] = "r-rome"
    steps: int = 20
    clamp: float = 4.0
    use_statistics: bool = True
    preservation: float = 15000.0
    contexts: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contexts <= 20:
            raise ConfigError(f"contexts must be between 0 and 20, not {self.contexts}")

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        return _PUBLISHED.get(shape_key(model))

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        return {
            "layer": scaled_layer(model, 5, 32),
            "steps": 25,
            "weight_decay": 1e-3,
            "preservation": model.anatomy.key_width[0] / 10,
            "source": "EasyEdit's ROME for Llama, with statistics, depth scaled to this model",
        }


class Rome(Located[RomeConfig]):
    """Writes each fact as a rank-one change of one MLP output projection."""

    name = "rome"
    summary = "one rank-one change of an early MLP per fact (r-ROME; variant 'original' for the paper's)"
    paper = "ROME, 2202.05262; r-ROME, 2403.07175"
    Config = RomeConfig

    @property
    def _chosen(self) -> tuple[int, ...]:
        return (*self.config.spread, self.config.layer)

    @property
    def _acts_on(self) -> Literal["mlp", "residual"]:
        return "residual" if self.config.spread else "mlp"

    @property
    def _uses_statistics(self) -> bool:
        return self.config.use_statistics

    def _ridge(self, layer: int) -> float:
        return 0.0

    def _past_weight(self, layer: int) -> float:
        return self.config.preservation

    def _texts(self) -> tuple[str, ...]:
        return rome_contexts(self.model, self.config.seed)

    def _weights(self, count: int) -> Tensor:
        return torch.full((count,), 1.0 / count, dtype=torch.float64)

    def _metric(self, layer: int) -> Metric:
        return super()._metric(layer) if self.config.use_statistics else lambda keys: keys

    def _missing(self, value: TargetValue) -> Tensor:
        if self.config.variant == "original":
            return value.delta  # v* − W k, both of the bare prompt
        return value.initial + value.delta - value.outputs.mean(0)

    def _solve(self, layer: int, residual: Tensor, keys: Sequence[Tensor]) -> tuple[Solution, Tensor]:
        solution, mean = super()._solve(layer, residual, keys)
        if self.config.variant == "original":
            strength, usual = (float(key @ solution.right[:, 0]) for key in (keys[0][0], mean[:, 0]))
            if abs(strength) < 1e-8:
                raise NumericsError(
                    "the bare prompt's key is orthogonal to the direction of this edit: it would explode"
                )
            solution = replace(solution, left=residual / strength, condition=abs(usual / strength))
        return solution, mean
