"""ROME: one rank-one change of an MLP output projection per fact (Meng et al. 2022, 2202.05262).

With key k* (the subject's, averaged over contexts), wanted output v* and second moment C of ordinary keys:

    u = C⁻¹ k*,   Λ = (v* − W k*) / (uᵀ k*),   W ← W + Λ uᵀ

This is **r-ROME** (2403.07175), the default: one key throughout. `variant="original"` takes W k and uᵀ k from the
bare prompt while u comes from the averaged key, as the paper's code did; where the subject comes first and no
beginning token precedes it, that denominator can be tiny and the change explodes ("disabling edit").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from errata.adapters import DeltaAdapter, WeightChange
from errata.datasets.builtin import corpus_texts, plain_texts
from errata.edit import Edit
from errata.editors.base import Editor, EditorConfig, Written
from errata.editors.contexts import rome_contexts
from errata.editors.layers import scaled_layer, shape_key
from errata.editors.values import ValueSettings, find_target_value
from errata.errors import ConfigError, NumericsError
from errata.model import EditableModel
from errata.model.statistics import KeyStatistics, StatisticsPlan, key_statistics
from errata.progress import Progress

__all__ = ["Rome", "RomeConfig"]

_ROME = "kmeng01/rome, hparams"
_EASYEDIT = "EasyEdit, hparams/ROME (there without statistics)"
_PUBLISHED: dict[tuple[str, int, int], dict[str, Any]] = {
    # Single edits on layers 0 to 4 of atlas: docs/methods/rome.md.
    ("llama", 6, 256): {
        "layer": 0,
        "steps": 25,
        "weight_decay": 1e-3,
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
class RomeConfig(EditorConfig):
    """Settings of ROME.

    Attributes:
        layer: block whose MLP output projection is changed.
        variant: "r-rome" with one key throughout, or "original".
        steps, learning_rate, weight_decay, clamp, kl_factor, stop_loss: of the search for v*, see `ValueSettings`.
        use_statistics: weigh keys by C⁻¹ as the paper does; without, u = k*.
        corpus: text file for C; None uses errata's built-in texts.
        tokens_per_width: token budget for C as a multiple of the key width.
        contexts: texts of the model's own put in front of the prompt, at most twenty.
        full_forward: search v* through whole forward passes (slow; for comparison).
    """

    adjustable: ClassVar[frozenset[str]] = EditorConfig.adjustable | {"contexts"}

    layer: int = 5
    variant: Literal["r-rome", "original"] = "r-rome"
    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 4.0
    kl_factor: float = 0.0625
    stop_loss: float = 0.05
    use_statistics: bool = True
    corpus: str | None = None
    tokens_per_width: float = 20.0
    contexts: int = 20
    full_forward: bool = False

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
            "source": "EasyEdit's ROME for Llama, with statistics, depth scaled to this model",
        }


class Rome(Editor[RomeConfig]):
    """Writes each fact as a rank-one change of one MLP output projection."""

    name = "rome"
    summary = "one rank-one change of an early MLP per fact (r-ROME; variant 'original' for the paper's)"
    paper = "ROME, 2202.05262; r-ROME, 2403.07175"
    Config = RomeConfig
    needs_subject = True

    @property
    def _layer(self) -> int:
        return self.model.anatomy.layer(self.config.layer)

    @property
    def _path(self) -> str:
        return self.model.anatomy.mlp_output[self._layer]

    def _new_adapter(self) -> DeltaAdapter:
        return DeltaAdapter.for_layers(self.model, [self._path], self.name, self.config.to_record())

    def _prepare(self, progress: Progress) -> None:
        assert isinstance(self.adapter, DeltaAdapter)
        config = self.config
        self._statistics: KeyStatistics | None = None
        with self.model.bare():  # both belong to the base model, whatever is attached to it
            if "contexts" not in self.adapter.notes:
                self.adapter.notes["contexts"] = list(rome_contexts(self.model, config.seed))
            if config.use_statistics:
                width = self.model.anatomy.key_width[self._layer]
                if config.corpus is None:
                    # Built-in texts have about twenty tokens each.
                    texts = plain_texts(max(2000, int(config.tokens_per_width * width / 8)))
                else:
                    texts = corpus_texts(config.corpus)
                plan = StatisticsPlan(tokens_per_width=config.tokens_per_width)
                found = key_statistics(self.model, [self._layer], texts, plan, progress=progress)
                self._statistics = found[self._layer]

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        return Written(tuple(self._write_one(edit) for edit in edits))

    def _write_one(self, edit: Edit) -> int:
        assert isinstance(self.adapter, DeltaAdapter)
        config = self.config
        settings = ValueSettings(
            config.steps, config.learning_rate, config.weight_decay, config.clamp, config.kl_factor, config.stop_loss
        )
        contexts = self.adapter.notes["contexts"][: config.contexts]
        value = find_target_value(self.model, self._layer, edit, contexts, settings, full_forward=config.full_forward)
        mean_key = value.keys.mean(0).double().cpu()
        direction = mean_key if self._statistics is None else self._statistics.solve(mean_key[:, None])[:, 0]
        direction = direction / direction.norm()
        wanted = (value.initial + value.delta).double().cpu()
        if config.variant == "original":
            key, present = value.keys[0].double().cpu(), value.initial.double().cpu()
        else:
            key, present = mean_key, value.outputs.mean(0).double().cpu()
        strength = float(direction @ key)
        if abs(strength) < 1e-8:
            raise NumericsError(
                f"the key of {edit.subject!r} is orthogonal to its own direction; its edit would explode"
            )
        factor = (wanted - present) / strength
        change = WeightChange(self._path, (edit.id,), factor.float()[:, None], direction.float()[:, None])
        self.adapter.add(self.adapter.measured([change], [edit.prompt], self.model))
        return value.steps
