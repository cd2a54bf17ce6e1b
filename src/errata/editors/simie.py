"""SimIE: any editor of weights, made to last by least squares over all its edits (Guo et al. 2025, ICML).

The inner editor is only ever asked what it is good at: to write a batch into the base model, as if there had been no
other. Its change of weight Δ_i counts at that batch's own keys, all tokens of prompts and targets, K_i. What the model
gets is the one change that comes nearest to all of these,

    D_i = D_{i−1} + (Δ_i − D_{i−1}) K_i K_iᵀ A_i⁻¹,   A_i = λ I + Σ K K^T up to i

which is recursive least squares: in the end min Σ ‖(D − Δ_i) K_i‖² + λ ‖D‖², whatever the order.

What we do differently from the authors' code, which holds A as a dense matrix per layer and no more: the keys are kept,
so that A⁻¹ needs no more room than they do (`adapters.least_squares`), an edit can be taken out exactly, and a prompt
that is edited anew does not go on asking for its old target. λ is relative to the size of ordinary keys, because
published values differ by a factor of a thousand: 10 (the authors' example) and 10⁴ (EasyEdit).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from errata.adapters import DeltaAdapter, LeastSquaresAdapter, Wanted
from errata.datasets.builtin import plain_texts
from errata.edit import Edit
from errata.editors.base import Editor, EditorConfig, Written
from errata.editors.layers import shape_key
from errata.editors.memory import MemoryPart
from errata.editors.registry import editor_class
from errata.errors import ConfigError, NumericsError
from errata.model import EditableModel
from errata.model.probes import capturing_inputs
from errata.model.scoring import length_batches
from errata.model.tokens import Passage
from errata.progress import Progress

__all__ = ["Simie", "SimieConfig"]

_ORDINARY, _ORDINARY_TOKENS = 64, 64  # texts, and tokens of each, from which the size of keys is known well enough
_BATCH_TOKENS = 4096

_PUBLISHED: dict[tuple[str, int, int], dict[str, Any]] = {
    ("llama", 6, 256): {"inner": "memit", "source": "ours, measured on atlas in docs/methods/simie.md"},
    ("llama", 32, 4096): {
        "inner": "memit",
        "ridge": 10.0,
        "relative": False,
        "source": "SimIE's example, MEMIT on Llama 2",
    },
}


@dataclass(frozen=True, kw_only=True)
class SimieConfig(EditorConfig):
    """Settings of SimIE.

    Attributes:
        inner: name of the editor that writes each batch into the base model.
        inner_settings: its settings; what is not given is its published or derived value for the model.
        ridge: λ.
        relative: the ridge is in units of the mean squared norm of ordinary keys.
    """

    inner: str = "rome"
    inner_settings: dict[str, Any] = field(default_factory=dict)
    ridge: float = 0.01
    relative: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner == Simie.name or self.ridge <= 0:
            raise ConfigError("simie needs a positive ridge, and an inner editor that is not simie itself")
        # As it will be read from disk.
        object.__setattr__(self, "inner_settings", json.loads(json.dumps(self.inner_settings)))

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        return _PUBLISHED.get(shape_key(model))

    @classmethod
    def for_model(cls, model: EditableModel, **overrides: Any) -> Self:
        """As for all editors; the inner editor's settings are looked up too, so that they are saved whole."""
        config = super().for_model(model, **overrides)
        given = {"seed": config.seed, **config.inner_settings}
        return replace(config, inner_settings=editor_class(config.inner).Config.for_model(model, **given).to_record())


class Simie(Editor[SimieConfig]):
    """Lets another editor write each batch into the base model, and joins all batches by least squares."""

    name = "simie"
    summary = "any editor of weights, its edits joined by recursive least squares (setting 'inner', rome by default)"
    paper = "Towards Lifelong Model Editing via Simulating Ideal Editor, ICML 2025"
    Config = SimieConfig

    def __init__(self, model: EditableModel, config: SimieConfig | None = None, **given: Any) -> None:
        super().__init__(model, config, **given)
        # As the inner editor has them.
        self.needs_subject = self._inner.needs_subject  # type: ignore[misc]
        self.writes_jointly = self._inner.writes_jointly  # type: ignore[misc]

    @cached_property
    def _inner(self) -> Editor[Any]:
        """The inner editor, its adapter detached. Nothing needs guarding there: the whole is guarded here."""
        cls = editor_class(self.config.inner)
        config = cls.Config.from_record({**self.config.inner_settings, "guard": "off"})
        inner: Editor[Any] = cls(self.model, config)
        inner.adapter.detach()
        if not isinstance(inner.adapter, DeltaAdapter):
            raise ConfigError(
                f"simie joins changes of weight, and {self.config.inner} makes none; take an inner editor that does, "
                "such as rome, memit or ft"
            )
        return inner

    @property
    def _joined(self) -> LeastSquaresAdapter:
        assert isinstance(self.adapter, LeastSquaresAdapter)
        return self.adapter

    @property
    def _paths(self) -> list[str]:
        return list(self._joined.contributions())

    def _new_adapter(self) -> DeltaAdapter:
        paths = list(self._inner.adapter.contributions())
        return LeastSquaresAdapter.for_layers(self.model, paths, self.name, self.config.to_record())

    def _prepare(self, progress: Progress) -> None:
        with self._joined.detached():
            adapter = self._empty()
            self._inner.prepare(progress)
            self._read_back(adapter)
        if not self._joined.ridges:
            sizes = dict.fromkeys(self._paths, 1.0)
            if self.config.relative:
                texts = [self.model.passage(text) for text in plain_texts(_ORDINARY)]
                passages = [Passage(text.ids[:_ORDINARY_TOKENS], ()) for text in texts]
                with self.model.bare():
                    keys = self._keys(passages)
                for path in sizes:
                    # An attention sink's keys may be a thousand times as large.
                    rows = torch.cat([own[path][:, 1:] for own in keys], dim=1)
                    sizes[path] = float(rows.square().sum(0).mean())
            self._joined.ridges.update({path: self.config.ridge * size for path, size in sizes.items()})

    def _memory_to_prepare(self) -> list[MemoryPart]:
        return self._inner._memory_to_prepare()

    def _memory_to_write(self, edits: Sequence[Edit]) -> list[MemoryPart]:
        anatomy, longest = self.model.anatomy, max(edits, key=lambda edit: len(edit.prompt) + len(edit.target))
        tokens = len(self.model.passage(longest.prompt, longest.target).ids)
        # Keys, steps and what is wanted at the keys, for every token; and A⁻¹ through its keys, in float64.
        sides = 2 * max(anatomy.key_width) + anatomy.hidden_size
        keys = len(edits) * tokens
        inverse = 8 * max(anatomy.key_width) * min(keys, max(anatomy.key_width))
        fewer = "write fewer edits, or take an inner editor that changes fewer layers"
        return [
            *self._inner._memory_to_write(edits),
            MemoryPart("keys of these edits", 4 * len(self._paths) * keys * sides, fewer, on_host=True),
            MemoryPart("least squares", 2 * len(self._paths) * inverse, fewer, on_host=True),
        ]

    def _empty(self) -> DeltaAdapter:
        """The inner editor with an empty adapter, attached, that knows what the last one did."""
        adapter = self._inner._new_adapter()
        assert isinstance(adapter, DeltaAdapter)
        adapter.notes, adapter.kept = dict(self._joined.notes.get("inner", {})), dict(self._joined.kept)
        self._inner.adapter = adapter
        adapter.attach(self.model)
        return adapter

    def _read_back(self, adapter: DeltaAdapter) -> None:
        adapter.detach()
        self._joined.notes["inner"], self._joined.kept = adapter.notes, adapter.kept

    @torch.no_grad()
    def _keys(self, passages: Sequence[Passage]) -> list[dict[str, Tensor]]:
        """Per passage and layer, the inputs [inputs, tokens] at all its tokens, float32 on the CPU."""
        found: list[dict[str, Tensor]] = [{} for _ in passages]
        for indices in length_batches([len(passage.ids) for passage in passages], _BATCH_TOKENS):
            batch = self.model.batch([passages[n] for n in indices], side="right")
            with capturing_inputs(self.model.model, self._paths, len(indices)) as inputs:
                self.model.trunk_states(batch)
            for row, n in enumerate(indices):
                count = len(passages[n].ids)
                found[n] = {path: inputs[path][row, :count].float().cpu().T for path in self._paths}
        return found

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        joined = self._joined
        with joined.detached():  # the inner editor and the keys are those of the base model
            keys = self._keys([self.model.passage(edit.prompt, edit.target) for edit in edits])
            adapter = self._empty()
            try:
                written = self._inner._write(edits, progress)
                changes = {path: one.weight_change() for path, one in adapter.contributions().items()}
            finally:
                self._read_back(adapter)
        wanted = [
            Wanted(path, edit.id, own[path], change @ own[path])
            for path, change in changes.items()
            if change is not None
            for edit, own in zip(edits, keys, strict=True)
        ]
        restore = joined.snapshot()
        try:
            if again := [edit.id for edit in edits if joined.holds(edit.id)]:
                joined.forget(again)
            of = [*range(len(edits))] * (len(wanted) // len(edits))
            joined.add(joined.measured(joined.steps(wanted), [edit.prompt for edit in edits], self.model, of))
        except NumericsError:
            restore()
            raise
        return written
