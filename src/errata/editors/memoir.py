"""MEMOIR: every edit writes its own few columns of one residual matrix (NeurIPS 2025; repository qym7/MEMOIR).

A zero matrix W_m stands beside one MLP output projection. An edit's columns are a hash of its prompt's activations
(`routing.tophash`); training touches only them:

    y_t = W_0 x_t + W_m (m ⊙ x_t),   loss = cross-entropy of the target, bare and behind ten texts of the model's own

A prompt reads the columns of the stored edit it overlaps most, or nothing when none is close enough. This file is the
method for one layer; the reference's traps it avoids are listed in docs/methods/memoir.md. Where it differs by
default:

* decay touches the edit's own columns only (`decay="reference"` decays all: old edits fade, 0.74 after 1,000 edits);
* the threshold is calibrated in `prepare()` relative to chance overlap; `threshold=0.4` gives the paper's fixed one;
* the mask is found once, from the bare prompt's own tokens, never from padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.adapters import BaseIdentity, ColumnMemory, RoutedAdapter, RoutedLayer
from errata.datasets.builtin import background_prompts, paraphrase_sets
from errata.edit import Edit
from errata.editors.base import Editor, EditorConfig, Written
from errata.editors.contexts import wise_contexts
from errata.editors.layers import scaled_layer, shape_key
from errata.errors import ConfigError, NumericsError
from errata.model import EditableModel
from errata.model.anatomy import output_width
from errata.model.tail import Recording, Tail
from errata.progress import Progress
from errata.routing import TopHashRouter, relative_threshold
from errata.routing.tophash import POOLINGS, Pooling

__all__ = ["Memoir", "MemoirConfig", "calibrate_threshold"]

_PUBLISHED: dict[tuple[str, int, int], dict[str, Any]] = {
    ("llama", 32, 4096): {
        "layer": 27,
        "marked": 4096,
        "steps": 30,
        "source": "MEMOIR repository, llama3-8b.yaml (threshold calibrated instead of 0.4)",
    },
    ("mistral", 32, 4096): {
        "layer": 27,
        "marked": 4096,
        "steps": 70,
        "source": "layer and k as for Llama-3 (the settings for Mistral are not published)",
    },
    ("gptj", 28, 4096): {
        "layer": 21,
        "marked": 4096,
        "steps": 70,
        "source": "re-implementation SasyaTitech/NAS (threshold calibrated instead of 0.46)",
    },
}
_PUBLISHED_SHARE = 4096 / 14336  # k/D on Llama-3-8B


@dataclass(frozen=True, kw_only=True)
class MemoirConfig(EditorConfig):
    """Settings of MEMOIR for one layer.

    Attributes:
        layer: block beside whose MLP output projection the memory stands.
        marked: k, columns an edit may write.
        learning_rate, steps, weight_decay, clip_norm: of the inner gradient descent; clip over the whole gradient.
        stop_loss, stop_change: stop when the loss is at most the one and moved by at most the other.
        decay: "active" decays the edit's own columns, "reference" all of them, "none" nothing.
        threshold: a fixed τ as the share of overlap; None calibrates it.
        relative_threshold: a fixed t in τ = k/D + t (1 − k/D); None calibrates it.
        false_fires: share of neighbouring questions that calibration lets fire.
        pooling: which prompt tokens form the features, see `TopHashRouter`; "mean" is the paper's, "auto" takes the
            one that calibration finds to reach most paraphrases at the same rate of false fires ("mean" where
            nothing is calibrated).
        contexts: texts of the model's own put in front of the prompt, at most ten.
        background: prompts averaged for centring; 0 for none.
        full_forward: train through whole forward passes instead of the tail (slow; for comparison).
    """

    layer: int = 27
    marked: int = 4096
    learning_rate: float = 1.0
    steps: int = 30
    weight_decay: float = 1e-5
    clip_norm: float = 1.0
    stop_loss: float = 0.02
    stop_change: float = 1e-4
    decay: Literal["active", "reference", "none"] = "active"
    threshold: float | None = None
    relative_threshold: float | None = None
    false_fires: float = 0.03
    pooling: Pooling | Literal["auto"] = "auto"
    contexts: int = 10
    background: int = 100
    full_forward: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay not in ("active", "reference", "none"):
            raise ConfigError(f"unknown decay {self.decay!r}; choose active, reference or none")
        if self.threshold is not None and self.relative_threshold is not None:
            raise ConfigError("give either threshold or relative_threshold, not both")
        if not 0 <= self.contexts <= 10:
            raise ConfigError(f"contexts must be between 0 and 10, not {self.contexts}")

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        return _PUBLISHED.get(shape_key(model))

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        layer = scaled_layer(model, 27, 32)
        return {
            "layer": layer,
            "marked": max(1, round(_PUBLISHED_SHARE * model.anatomy.key_width[layer])),
            "steps": 70,
            "source": "MEMOIR for Llama-3, depth and k scaled to this model",
        }


class Memoir(Editor[MemoirConfig]):
    """Stores each edit in its own columns of a residual matrix and reads them only for prompts that match."""

    name = "memoir"
    summary = "each edit in its own columns of a residual matrix, read only by prompts that match"
    paper = "MEMOIR, NeurIPS 2025 (qym7/MEMOIR)"
    Config = MemoirConfig

    @property
    def _layer(self) -> int:
        return self.model.anatomy.layer(self.config.layer)

    @property
    def _routed(self) -> RoutedAdapter:
        assert isinstance(self.adapter, RoutedAdapter)
        return self.adapter

    def _new_adapter(self) -> RoutedAdapter:
        model, config = self.model, self.config
        path = model.anatomy.mlp_output[self._layer]
        width = model.anatomy.key_width[self._layer]
        if config.marked > width:
            raise ConfigError(f"marked={config.marked} is more than the {width} features of layer {self._layer}")
        pooling: Pooling = "mean" if config.pooling == "auto" else config.pooling
        router = TopHashRouter.seeded(width, config.marked, torch.Generator().manual_seed(config.seed), pooling)
        memory = ColumnMemory.empty(output_width(model.module(path)), width)
        return RoutedAdapter(
            BaseIdentity.of(model), self.name, config.to_record(), path=path, layer=RoutedLayer(router, memory)
        )

    # --- once per base model ----------------------------------------------------------------------------------------

    def _prepare(self, progress: Progress) -> None:
        adapter, config = self._routed, self.config
        if "calibration" in adapter.notes:
            return
        router = adapter.router
        with adapter.detached():
            adapter.notes["contexts"] = list(wise_contexts(self.model, config.seed))
            if config.threshold is not None:
                self._set_background()
                router.threshold = config.threshold
                adapter.notes["calibration"] = {"kind": "fixed threshold"}
            elif config.relative_threshold is not None:
                self._set_background()
                router.threshold = relative_threshold(config.relative_threshold, router.marked, router.width)
                adapter.notes["calibration"] = {"kind": "fixed relative threshold"}
            else:
                adapter.notes["calibration"] = self._calibrate(progress)
        adapter.notes["calibration"] |= {"pooling": router.pooling, "threshold": router.threshold}

    def _set_background(self) -> None:
        """The mean feature of unrelated prompts, under the router's present pooling."""
        router, config = self._routed.router, self.config
        router.background = torch.zeros(router.width)
        if config.background:
            router.background = self._features(background_prompts(config.background, config.seed)).mean(0)

    def _features(self, prompts: Sequence[str]) -> Tensor:
        return self._routed.features(prompts, self.model)

    def _calibrate(self, progress: Progress) -> dict[str, Any]:
        """Threshold, and pooling where it is free, from questions in several wordings and their neighbours.

        Nothing of any edit is used. Returns what the chosen setting does on these questions, and the others beside it.
        """
        sets = paraphrase_sets(200, self.config.seed)
        prompts = [s.prompt for s in sets]
        paraphrases = [text for s in sets for text in s.paraphrases]
        owners = torch.tensor([owner for owner, s in enumerate(sets) for _ in s.paraphrases])
        neighbours = [text for s in sets for text in s.neighbours]
        router = self._routed.router
        tried: tuple[Pooling, ...] = POOLINGS if self.config.pooling == "auto" else (self.config.pooling,)
        progress.start(f"{self.name}: calibrating the router", len(tried))
        records: dict[Pooling, dict[str, Any]] = {}
        backgrounds: dict[Pooling, Tensor] = {}
        for pooling in tried:
            router.pooling = pooling
            self._set_background()
            backgrounds[pooling] = router.background
            masks = [router.hash(self._features(texts)) for texts in (prompts, paraphrases, neighbours)]
            threshold, record = calibrate_threshold(
                router, masks[0], masks[1], owners, masks[2], self.config.false_fires
            )
            records[pooling] = {**record, "threshold": threshold}
            progress.advance(1)
        best = max(tried, key=lambda pooling: records[pooling]["paraphrases_reached"])
        router.pooling, router.background = best, backgrounds[best]
        router.threshold = records[best]["threshold"]
        others = {pooling: record for pooling, record in records.items() if pooling != best}
        return {"kind": "calibrated", **records[best], "instead_of": others}

    # --- per edit ---------------------------------------------------------------------------------------------------

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        return Written(tuple(self._write_one(edit) for edit in edits))

    def _write_one(self, edit: Edit) -> int:
        adapter = self._routed
        memory = adapter.memory
        assert isinstance(memory, ColumnMemory)
        prompts = [edit.prompt, *(f"{c} {edit.prompt}" for c in adapter.notes["contexts"][: self.config.contexts])]
        batch = self.model.batch([self.model.passage(prompt, edit.target) for prompt in prompts], side="right")
        with adapter.detached():  # the edit reads its own columns alone, whatever its prompt would match
            tail = Tail(self.model, self._layer, full=self.config.full_forward)
            recording = tail.record(batch)
            bare = batch.mask[:1].bool() & (batch.positions[:1] < batch.prompt_lengths[0])
            router = adapter.router
            mask = router.hash(router.features(router.gather(recording.inputs[self._layer][:1], bare)))[0]
            columns = mask.nonzero().squeeze(1)
            values, steps = self._train(tail, recording, columns, memory.weight[:, columns])
        if self.config.decay == "reference":
            kept = (1.0 - self.config.learning_rate * self.config.weight_decay) ** steps
            memory.weight[:, ~mask] *= kept
        memory.write(columns, values)
        router.append(mask, edit.id)
        adapter.memory_version += 1
        return steps

    def _train(self, tail: Tail, recording: Recording, columns: Tensor, start: Tensor) -> tuple[Tensor, int]:
        """Gradient descent on the edit's columns [outputs, k] until the target is said; returns them and the steps."""
        config = self.config
        inputs = recording.inputs[self._layer][:, :, columns.to(recording.outputs.device)]
        values = start.to(inputs.device, torch.float32).clone().requires_grad_(True)
        rows, places, labels = recording.batch.answer_places()
        per_row = torch.bincount(rows).float()

        def read(_: Tensor) -> Tensor:
            return inputs @ values.to(inputs.dtype).T

        before = float("inf")
        taken = 0
        for _ in range(config.steps):
            logits = tail.run(recording, read, rows, places)
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            loss = (losses / per_row[rows]).sum() / len(per_row)
            now = loss.item()
            if not loss.isfinite():
                raise NumericsError("the edit's loss is not finite; lower the learning rate")
            if abs(now - before) <= config.stop_change and now <= config.stop_loss:
                break
            before = now
            (gradient,) = torch.autograd.grad(loss, values)
            with torch.no_grad():
                gradient *= min(1.0, config.clip_norm / (float(gradient.norm()) + 1e-6))
                if config.decay != "none":
                    gradient += config.weight_decay * values
                values -= config.learning_rate * gradient
            taken += 1
        return values.detach().cpu(), taken


def calibrate_threshold(
    router: TopHashRouter, stored: Tensor, paraphrases: Tensor, owners: Tensor, neighbours: Tensor, false_fires: float
) -> tuple[float, dict[str, Any]]:
    """The smallest τ at which at most the share `false_fires` of neighbouring questions match any stored mask.

    Args:
        stored: [n, D] masks as edits would store them; paraphrases: [p, D], each belonging to stored mask
            `owners` [p]; neighbours: [q, D] masks of questions that belong to none.

    Returns:
        τ, and a record of what it does on these questions: share of paraphrases that reach their own mask, share of
        neighbours that fire, and τ relative to chance.
    """
    shelf = TopHashRouter(
        router.width, router.marked, router.threshold, router.permutation, router.background, router.pooling
    ).store
    for mask in stored:
        shelf.append(mask)
    near = shelf.nearest(neighbours)[0][:, 0]
    allowed = int(false_fires * len(near))
    ranked = near.sort(descending=True).values
    # Just above the best neighbour that must not fire any more.
    threshold = float(ranked[allowed]) + 0.5 / router.marked if allowed < len(ranked) else router.marked / router.width
    scores, numbers = shelf.nearest(paraphrases)
    reached = (scores[:, 0] >= threshold) & (numbers[:, 0] == owners)
    chance = router.marked / router.width
    record = {
        "questions": len(stored),
        "paraphrases_reached": float(reached.float().mean()),
        "neighbours_fired": float((near >= threshold).float().mean()),
        "relative_threshold": (threshold - chance) / (1 - chance),
    }
    return threshold, record
