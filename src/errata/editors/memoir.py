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

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errata.adapters import BaseIdentity, ColumnMemory, RoutedAdapter, RoutedLayer
from errata.adapters.base import check_change
from errata.datasets.builtin import background_prompts, paraphrase_sets
from errata.edit import Edit
from errata.editors.base import Editor, EditorConfig, Written
from errata.editors.contexts import wise_contexts
from errata.editors.layers import scaled_layer, shape_key
from errata.errors import ConfigError, NumericsError
from errata.model import EditableModel
from errata.model.anatomy import output_width
from errata.model.probes import capturing_inputs
from errata.model.scoring import length_batches
from errata.model.tail import Recording, Tail
from errata.model.tokens import Passage
from errata.paths import cache_folder
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
_QUESTIONS = 200  # that calibration asks
_FORMAT = 1  # of what `prepare` keeps


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

    adjustable: ClassVar[frozenset[str]] = EditorConfig.adjustable | {"contexts", "decay"}

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

    @property
    def _router(self) -> TopHashRouter:
        router = self._routed.router
        assert isinstance(router, TopHashRouter)
        return router

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
        adapter, router = self._routed, self._router
        if "calibration" in adapter.notes:
            return
        questions = _Questions.ask(self.model, self.config)
        place = cache_folder("memoir") / f"{self._digest(questions)}.safetensors"
        made = _Preparation.read(place)
        if made is None:
            with self.model.bare():  # all of it belongs to the base model, whatever is attached to it
                made = self._measure(questions, progress)
            with suppress(OSError):  # it can be made again: a folder that cannot be written to stops nobody
                made.write(place)
        router.background, router.pooling, router.threshold = made.background, made.pooling, made.threshold
        adapter.notes["contexts"] = made.contexts
        adapter.notes["calibration"] = {**made.record, "pooling": made.pooling, "threshold": made.threshold}

    def _digest(self, questions: _Questions) -> str:
        """Everything that `_measure` depends on, hashed."""
        config = self.config
        parts = {
            "format": _FORMAT,
            "weights": self.model.fingerprint,
            "dtype": str(self.model.dtype),
            "layer": self._layer,
            "marked": config.marked,
            "pooling": config.pooling,
            "seed": config.seed,
            "threshold": config.threshold,
            "relative_threshold": config.relative_threshold,
            "false_fires": config.false_fires,
            "questions": questions.digest(),
        }
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def _measure(self, questions: _Questions, progress: Progress) -> _Preparation:
        """Contexts, background, threshold, and pooling where it is free."""
        config, router = self.config, self._router
        contexts = list(wise_contexts(self.model, config.seed))
        tried: tuple[Pooling, ...] = (router.pooling,)
        if questions.prompts and config.pooling == "auto":
            tried = POOLINGS
        zeros = torch.zeros(router.width)
        # One router per pooling, empty, so that one pass over the questions serves all of them.
        routers = [dataclasses.replace(router, pooling=p, background=zeros, owners=[]) for p in tried]
        progress.start(f"{self.name}: reading questions", len(questions))
        if questions.background:
            found = self._features(questions.background, routers, progress)
            routers = [dataclasses.replace(r, background=f.mean(0)) for r, f in zip(routers, found, strict=True)]
        if not questions.prompts:
            threshold, kind = config.threshold, "fixed threshold"
            if threshold is None:
                assert config.relative_threshold is not None
                kind = "fixed relative threshold"
                threshold = relative_threshold(config.relative_threshold, router.marked, router.width)
            return _Preparation(routers[0].background, contexts, router.pooling, threshold, {"kind": kind})

        def masks(texts: Sequence[Passage]) -> list[Tensor]:
            return [r.hash(f) for r, f in zip(routers, self._features(texts, routers, progress), strict=True)]

        stored, others, near = masks(questions.prompts), masks(questions.paraphrases), masks(questions.neighbours)
        thresholds: dict[Pooling, float] = {}
        records: dict[Pooling, dict[str, Any]] = {}
        for number, one in enumerate(routers):
            threshold, record = calibrate_threshold(
                one, stored[number], others[number], questions.owners, near[number], config.false_fires
            )
            thresholds[one.pooling], records[one.pooling] = threshold, {**record, "threshold": threshold}
        best = max(tried, key=lambda pooling: records[pooling]["paraphrases_reached"])
        instead_of = {pooling: record for pooling, record in records.items() if pooling != best}
        calibration = {"kind": "calibrated", **records[best], "instead_of": instead_of}
        return _Preparation(routers[tried.index(best)].background, contexts, best, thresholds[best], calibration)

    @torch.no_grad()
    def _features(
        self, passages: Sequence[Passage], routers: Sequence[TopHashRouter], progress: Progress
    ) -> list[Tensor]:
        """Each prompt's features as each router sees them, [prompts, D] per router, from one pass over the prompts."""
        path = self._routed.path
        features = [torch.empty(len(passages), router.width) for router in routers]
        for indices in length_batches([len(p.ids) for p in passages], 8192):
            batch = self.model.batch([passages[i] for i in indices], side="right")
            with capturing_inputs(self.model.model, [path], len(indices)) as inputs:
                self.model.trunk_states(batch)
            for router, found in zip(routers, features, strict=True):
                found[indices] = router.features(router.gather(inputs[path], batch.mask.bool())).cpu()
            progress.advance(len(indices))
        return features

    # --- per edit ---------------------------------------------------------------------------------------------------

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        found = [self._write_one(edit) for edit in edits]
        return Written(tuple(steps for steps, _ in found), tuple(displaced for _, displaced in found))

    def _write_one(self, edit: Edit) -> tuple[int, str | None]:
        """Steps taken, and the edit that owned the very same mask until now."""
        adapter, router = self._routed, self._router
        memory = adapter.memory
        assert isinstance(memory, ColumnMemory)
        prompts = [edit.prompt, *(f"{c} {edit.prompt}" for c in adapter.notes["contexts"][: self.config.contexts])]
        batch = self.model.batch([self.model.passage(prompt, edit.target) for prompt in prompts], side="right")
        with adapter.detached():  # the edit reads its own columns alone, whatever its prompt would match
            tail = Tail(self.model, self._layer, full=self.config.full_forward)
            recording = tail.record(batch)
            bare = batch.mask[:1].bool() & (batch.positions[:1] < batch.prompt_lengths[0])
            mask = router.hash(router.features(router.gather(recording.inputs[self._layer][:1], bare)))[0]
            columns = mask.nonzero().squeeze(1)
            values, steps = self._train(tail, recording, columns, memory.weight[:, columns])
        # Before anything is written: a refused edit leaves the memory as it was.
        check_change(values - memory.weight[:, columns], "the memory's change")
        if self.config.decay == "reference":
            kept = (1.0 - self.config.learning_rate * self.config.weight_decay) ** steps
            memory.fade(~mask, kept)
        memory.write(columns, values)
        displaced = router.append(mask, edit.id)
        adapter.memory_version += 1
        return steps, displaced

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
            losses = F.cross_entropy(logits.float(), labels.to(logits.device), reduction="none")
            loss = (losses / per_row[rows].to(losses.device)).sum() / len(per_row)
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


@dataclass(frozen=True)
class _Questions:
    """What a router is prepared with, as tokens: unrelated prompts, questions, other wordings of them, neighbours.

    `owners` [paraphrases] says which question each other wording belongs to.
    """

    background: list[Passage]
    prompts: list[Passage]
    paraphrases: list[Passage]
    owners: Tensor
    neighbours: list[Passage]

    @classmethod
    def ask(cls, model: EditableModel, config: MemoirConfig) -> _Questions:
        fixed = config.threshold is not None or config.relative_threshold is not None
        background = background_prompts(config.background, config.seed) if config.background else []
        sets = [] if fixed else paraphrase_sets(_QUESTIONS, config.seed)
        return cls(
            [model.passage(text) for text in background],
            [model.passage(one.prompt) for one in sets],
            [model.passage(text) for one in sets for text in one.paraphrases],
            torch.tensor([owner for owner, one in enumerate(sets) for _ in one.paraphrases]),
            [model.passage(text) for one in sets for text in one.neighbours],
        )

    def _parts(self) -> tuple[list[Passage], ...]:
        return self.background, self.prompts, self.paraphrases, self.neighbours

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts())

    def digest(self) -> str:
        """Of the tokens, and so of the texts and of the tokenizer."""
        parts = [[passage.ids for passage in part] for part in self._parts()]
        text = json.dumps([parts, self.owners.tolist()])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class _Preparation:
    """What `prepare` finds for one model and one configuration; kept, since it costs thousands of prompts to make.

    `background` is [D]; `record` says how threshold and pooling were found.
    """

    background: Tensor
    contexts: list[str]
    pooling: Pooling
    threshold: float
    record: dict[str, Any]

    @classmethod
    def read(cls, place: Path) -> _Preparation | None:
        """What is kept there; None if nothing is, or nothing that can be read."""
        try:
            with safe_open(place, framework="pt") as file:
                return cls(file.get_tensor("background"), **json.loads(file.metadata()["made"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def write(self, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_suffix(f".{os.getpid()}.new")  # two processes may prepare at once
        made = {name: getattr(self, name) for name in ("contexts", "pooling", "threshold", "record")}
        save_file({"background": self.background.contiguous()}, draft, metadata={"made": json.dumps(made)})
        os.replace(draft, place)


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
