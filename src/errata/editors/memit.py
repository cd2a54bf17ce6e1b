"""MEMIT and EMMET: many facts at once, in one change of each of a few MLP output projections.

Both keep what ordinary keys give, ‖Δ K₀‖², as it is. They differ in how the facts are memorised (2403.14236, table 1):

    MEMIT (Meng et al. 2023, 2210.07229):   min ‖Δ K − R‖² + λ tr(Δ C Δᵀ)      Δ = R Kᵀ (λ C + K Kᵀ)⁻¹
    EMMET (Gupta et al. 2024, 2403.14236):  min tr(Δ C Δᵀ)  with  Δ K = R      Δ = R (Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹

so EMMET is MEMIT for λ → 0, and ROME (`rome.py`) for many facts. Keys are means in which the bare prompt weighs as much
as all prompts with a text in front together.

The published EMMET adds 0.1 to Kᵀ C⁻¹ K, after a scaling of C that differs from model to model; here that is the
setting `ridge`, 0 unless given. What it guards against, keys that coincide, `solving.solve` meets by leaving out
directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from errata.editors.contexts import memit_contexts
from errata.editors.layers import scaled_layer, shape_key
from errata.editors.located import Located, LocatedConfig
from errata.errors import ConfigError
from errata.model import EditableModel

__all__ = ["Emmet", "EmmetConfig", "Joint", "JointConfig", "Memit", "MemitConfig"]

_MEMIT = "kmeng01/memit, hparams"
_EASYEDIT = "EasyEdit, hparams/MEMIT"
_EASY = {"weight_decay": 1e-3, "clamp": 4.0}
# Keyed by the key width too: Llama 2 and 3 differ in nothing else.
_PUBLISHED: dict[tuple[str, int, int, int], dict[str, Any]] = {
    ("llama", 6, 256, 1536): {
        "layers": (0, 1),
        "weight_decay": 1e-3,
        "clamp": 2.0,
        "source": "ours, measured on atlas in docs/methods/memit.md",
    },
    ("gpt2", 48, 1600, 6400): {"layers": (13, 14, 15, 16, 17), "steps": 20, "source": _MEMIT},
    ("gptj", 28, 4096, 16384): {"layers": (3, 4, 5, 6, 7, 8), "source": _MEMIT},
    ("llama", 32, 4096, 11008): {"layers": (4, 5, 6, 7, 8), **_EASY, "source": _EASYEDIT},
    ("llama", 32, 4096, 14336): {"layers": (4, 5, 6, 7, 8), "learning_rate": 0.1, "source": "AlphaEdit, hparams/MEMIT"},
    ("mistral", 32, 4096, 14336): {"layers": (4, 5, 6, 7, 8), **_EASY, "source": _EASYEDIT},
    ("qwen2", 28, 3584, 18944): {"layers": (4, 5, 6, 7, 8), **_EASY, "source": _EASYEDIT},
}
_PRESERVATION = {("gpt2", 48, 1600, 6400): 20000.0, ("llama", 6, 256, 1536): 150.0}


def _key(model: EditableModel) -> tuple[str, int, int, int]:
    return (*shape_key(model), model.anatomy.key_width[0])


@dataclass(frozen=True, kw_only=True)
class JointConfig(LocatedConfig):
    """Settings of the methods that write a batch in one go, beside those of `LocatedConfig`.

    Attributes:
        layers: blocks whose MLP output projections are changed; the change is spread over them.
        contexts: at most five.
    """

    layers: tuple[int, ...] = (4, 5, 6, 7, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise ConfigError("layers is empty; give at least one block")
        if not 0 <= self.contexts <= 5:
            raise ConfigError(f"contexts must be between 0 and 5, not {self.contexts}")

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        return _PUBLISHED.get(_key(model))

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        layers = tuple(sorted({scaled_layer(model, layer, 32) for layer in range(4, 9)}))
        return {"layers": layers, "source": "MEMIT's for GPT-J and Llama, depth scaled to this model"}


C = TypeVar("C", bound=JointConfig)


class Joint(Located[C]):
    """Writes a batch of facts in one go, with MEMIT's contexts and weights."""

    writes_jointly = True

    @property
    def _chosen(self) -> tuple[int, ...]:
        return self.config.layers

    def _texts(self) -> tuple[str, ...]:
        return memit_contexts(self.model, self.config.seed)

    def _weights(self, count: int) -> Tensor:
        weights = torch.full((count,), 0.5 / max(1, count - 1), dtype=torch.float64)
        weights[0] = 0.5 if count > 1 else 1.0
        return weights


@dataclass(frozen=True, kw_only=True)
class MemitConfig(JointConfig):
    """Settings of MEMIT, beside those of `JointConfig`.

    Attributes:
        preservation: λ, what ordinary keys weigh against one edit's.
    """

    preservation: float = 15000.0

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        found = super().published(model)
        return found and {**found, "preservation": _PRESERVATION.get(_key(model), 15000.0)}

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        # kᵀ C⁻¹ k of an ordinary key is the key width on average, of a subject's key more. A tenth of that leaves each
        # layer more than nine tenths of what it is to write.
        return {**super().derived(model), "preservation": model.anatomy.key_width[0] / 10}


class Memit(Joint[MemitConfig]):
    """Writes a batch of facts by regularised least squares, spread over several layers."""

    name = "memit"
    summary = "a batch of facts in one low-rank change of several early MLPs, by regularised least squares"
    paper = "MEMIT, 2210.07229"
    Config = MemitConfig

    def _ridge(self, layer: int) -> float:
        return self.config.preservation

    def _past_weight(self, layer: int) -> float:
        return self.config.preservation


_EMMET = "scalable-model-editing/unified-model-editing"
_EMMET_LAYERS = {
    ("llama", 6, 256, 1536): (0, "ours, measured on atlas in docs/methods/emmet.md"),
    ("gpt2", 48, 1600, 6400): (17, f"{_EMMET}; v* as {_MEMIT}"),
    ("gptj", 28, 4096, 16384): (5, f"{_EMMET}; v* as {_MEMIT}"),
    ("llama", 32, 4096, 11008): (5, f"{_EMMET}; v* as {_EASYEDIT}"),
}


@dataclass(frozen=True, kw_only=True)
class EmmetConfig(JointConfig):
    """Settings of EMMET, beside those of `JointConfig`.

    Attributes:
        ridge: ρ added to Kᵀ C⁻¹ K; with 0 the facts are met exactly.
        preservation: what ordinary keys weigh against one of an earlier edit, where those are protected.
    """

    layers: tuple[int, ...] = (5,)
    ridge: float = 0.0
    preservation: float = 15000.0

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        own = _EMMET_LAYERS.get(_key(model))
        if own is None:
            return None
        preservation = _PRESERVATION.get(_key(model), 15000.0)
        return {**_PUBLISHED[_key(model)], "layers": own[:1], "preservation": preservation, "source": own[1]}

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        return {
            "layers": (scaled_layer(model, 5, 32),),
            "preservation": model.anatomy.key_width[0] / 10,
            "source": "EMMET's for GPT-J and Llama, depth scaled to this model",
        }


class Emmet(Joint[EmmetConfig]):
    """Writes a batch of facts exactly, by the smallest change in the metric of ordinary keys."""

    name = "emmet"
    summary = "a batch of facts written exactly by the smallest change of an early MLP: ROME for many at once"
    paper = "EMMET, 2403.14236"
    Config = EmmetConfig

    def _ridge(self, layer: int) -> float:
        return self.config.ridge

    def _past_weight(self, layer: int) -> float:
        return self.config.preservation
