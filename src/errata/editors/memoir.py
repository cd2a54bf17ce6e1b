"""MEMOIR: every edit writes its own few columns of one residual matrix (NeurIPS 2025; repository qym7/MEMOIR).

A zero matrix W_m stands beside one MLP output projection. An edit's columns are a hash of its prompt's activations
(`routing.tophash`); training touches only them:

    y_t = W_0 x_t + W_m (m ⊙ x_t),   loss = cross-entropy of the target, bare and behind texts of the model's own

A prompt reads the columns of the stored edit it overlaps most, or nothing when none is close enough. Where this differs
from the paper by default, each a setting, with its evidence in docs/methods/memoir.md:

* the memory acts from the prompt's last token on, so training runs only the answer's places (`acts`);
* a change is sought in the span of the edit's own activations, known as two thin factors, and spares the keys of stored
  edits (`ridge`; `editors.dual`); many edits may be trained side by side (`batch_size`);
* edits may stand in several layers, each where most room is left for it (`layers`);
* thresholds are calibrated, and a prompt that names the edit's subject needs less overlap (`subject_check`).

`compat="reference"` is the published code for one layer, with the quirks that change numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.adapters import BaseIdentity, ColumnMemory, RoutedAdapter, RoutedLayer
from errata.adapters.base import check_change
from errata.adapters.memories import Acts
from errata.adapters.memories import Written as WrittenColumns
from errata.edit import Edit
from errata.editors.base import Editor, EditorConfig, Written
from errata.editors.calibration import Found, Preparation, Questions, calibrate
from errata.editors.contexts import wise_contexts
from errata.editors.dual import Descent, Space, compressed, descend
from errata.editors.layers import scaled_layer, shape_key
from errata.editors.memory import MemoryPart, reading, weight_entries
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.anatomy import output_width
from errata.model.answer_tail import AnswerTail
from errata.model.probes import capturing_inputs
from errata.model.scoring import READ_TOKENS, length_batches
from errata.model.spans import spellings
from errata.model.tail import Recording, Tail
from errata.model.tokens import Passage
from errata.paths import cache_folder
from errata.progress import NO_PROGRESS, Progress
from errata.routing import MaskStore, TopHashRouter, relative_threshold
from errata.routing.tophash import POOLINGS, Gathered, Pooling

__all__ = ["Memoir", "MemoirConfig"]

_PUBLISHED: dict[tuple[str, int, int], dict[str, Any]] = {
    ("llama", 32, 4096): {
        "layer": 27,
        "marked": 4096,
        "steps": 30,
        "learning_rate": 1.0,
        "clip_norm": 1.0,
        "source": "MEMOIR repository, llama3-8b.yaml (threshold calibrated instead of 0.4)",
    },
    ("mistral", 32, 4096): {
        "layer": 27,
        "marked": 4096,
        "steps": 70,
        "learning_rate": 1.0,
        "clip_norm": 1.0,
        "source": "layer and k as for Llama-3 (the settings for Mistral are not published)",
    },
    ("gptj", 28, 4096): {
        "layer": 21,
        "marked": 4096,
        "steps": 70,
        "learning_rate": 1.0,
        "clip_norm": 1.0,
        "source": "re-implementation SasyaTitech/NAS (threshold calibrated instead of 0.46)",
    },
}
_PUBLISHED_SHARE = 4096 / 14336  # k/D on Llama-3-8B
_FORMAT = 3  # of what `prepare` keeps
_ROUND = 0.5  # share of a batch's edits after which those that are done leave it
# What the published code does; `compat="reference"` takes these for settings that are left at their defaults.
_REFERENCE: dict[str, Any] = {
    "acts": "all",
    "ridge": None,
    "subject_check": False,
    "pooling": "mean",
    "learning_rate": 1.0,
    "clip_norm": 1.0,
    "contexts": 10,
    "ending": False,
    "decay": "all",
    "stop_loss": 0.02,
    "stop_change": 1e-4,
}


@dataclass(frozen=True, kw_only=True)
class MemoirConfig(EditorConfig):
    """Settings of MEMOIR.

    Attributes:
        layer: block beside whose MLP output projection the memory stands; prompts are recognised there.
        layers: more layers above it with a memory of their own.
        layer_choice: "roomiest" puts each edit into the layer where stored keys span least of its own, "all" into all
            layers at once.
        marked: k, columns an edit may write.
        acts: "answer" lets the memory act from the prompt's last token on, "all" at every token (the paper).
        ridge: λ in units of the mean squared norm of stored keys: less spares them more. None spares nothing.
        learning_rate, steps, clip_norm: of the inner gradient descent; clip over an edit's whole gradient.
        stop_loss, stop_change: stop when the loss is at most the one and moved by at most the other.
        decay: "none", "active" fades the edit's own columns at every step, "all" fades all of them (the published code:
            old edits keep 0.74 after 1,000 edits); by the factor 1 − learning_rate · weight_decay.
        threshold: a fixed τ as the share of overlap; None calibrates it.
        relative_threshold: a fixed t in τ = k/D + t (1 − k/D); None calibrates it.
        false_fires: share of neighbouring questions (the same of another subject) that calibration lets fire.
        subject_check: ask of a prompt whether it names the edit's subject, and let one that does match with less
            overlap. For edits with a subject, where thresholds are calibrated.
        pooling: which prompt tokens form the features, see `TopHashRouter`; "mean" is the paper's, "auto" takes the
            one that calibration finds to reach most paraphrases at the same rate of false fires ("mean" where
            nothing is calibrated).
        contexts: texts of the model's own put in front of the prompt, at most ten.
        ending: also train that the text goes on behind the target as the unedited model would go on.
        background: prompts averaged for centring; 0 for none.
        permute: send features through a permutation on their way to columns; False is the paper's ablation.
        mask: "random" marks columns that have nothing to do with the prompt's features (ablation).
        conditional_read: False lets the nearest edit answer however far it is (ablation).
        full_forward: train through whole forward passes instead of the tail (slow; for comparison).
        compat: "reference" does what the published code does, quirks included, wherever a setting is at its default:
            acts="all", ridge=None, no subject check, mean pooling, ten contexts, no ending, its learning rate, its
            clipping, decay of all columns, its stopping rule, a loss that counts one answer token more than there are.
    """

    adjustable: ClassVar[frozenset[str]] = EditorConfig.adjustable | {
        "conditional_read",
        "contexts",
        "decay",
        "ending",
        "layer_choice",
        "ridge",
    }

    layer: int = 27
    layers: tuple[int, ...] = ()
    layer_choice: Literal["roomiest", "all"] = "roomiest"
    marked: int = 4096
    acts: Acts = "answer"
    ridge: float | None = 0.03
    learning_rate: float = 2.0
    steps: int = 30
    weight_decay: float = 1e-5
    clip_norm: float = 2.0
    stop_loss: float = 0.01
    stop_change: float = 1.0
    decay: Literal["none", "active", "all"] = "none"
    threshold: float | None = None
    relative_threshold: float | None = None
    false_fires: float = 0.03
    subject_check: bool = True
    pooling: Pooling | Literal["auto"] = "auto"
    contexts: int = 2
    ending: bool = True
    background: int = 100
    permute: bool = True
    mask: Literal["tophash", "random"] = "tophash"
    conditional_read: bool = True
    full_forward: bool = False
    compat: Literal["fixed", "reference"] = "fixed"

    def __post_init__(self) -> None:
        if self.compat == "reference":
            defaults = {one.name: one.default for one in dataclasses.fields(self)}
            for name, value in _REFERENCE.items():
                if getattr(self, name) == defaults[name]:
                    object.__setattr__(self, name, value)
        super().__post_init__()
        if self.threshold is not None and self.relative_threshold is not None:
            raise ConfigError("give either threshold or relative_threshold, not both")
        if not 0 <= self.contexts <= 10:
            raise ConfigError(f"contexts must be between 0 and 10, not {self.contexts}")
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, not {self.steps}")
        if self.ridge is not None and self.ridge <= 0:
            raise ConfigError(f"ridge must be above 0, not {self.ridge}; give null to spare stored edits nothing")
        if self.decay != "none" and self.layers:
            raise ConfigError("decay belongs to the published method of one layer; leave out layers, or decay")

    @property
    def is_calibrated(self) -> bool:
        """Whether thresholds are found by asking questions."""
        return self.threshold is None and self.relative_threshold is None

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


@dataclass
class _Job:
    """One edit on its way into the memory.

    Attributes:
        mask: [D]; columns: [k]; sharpest: features for the index.
        replaces: the entry that has the very same mask, which it takes the place of.
        spaces, keys: per layer, where its change is sought, and its own keys [n, k].
        factors: per layer [outputs, r], what was found.
    """

    edit: Edit
    mask: Tensor
    columns: Tensor
    sharpest: Tensor
    replaces: int | None
    spaces: dict[int, Space] = dataclasses.field(default_factory=dict)
    keys: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    factors: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True)
class _Recorded:
    """The rows of some edits, recorded.

    Attributes:
        owner: [rows], the edit that each row belongs to.
        acts, trained: [rows, columns], where the memory acts, and where that bears on a label.
        labels: rows, columns and tokens of what is to be predicted, [n] each.
    """

    tail: Tail
    recording: Recording
    owner: Tensor
    acts: Tensor
    trained: Tensor
    labels: tuple[Tensor, Tensor, Tensor]

    def of_edits(self, kept: Tensor) -> _Recorded | None:
        """The rows of some of the edits, kept [edits] bool; None where they must be recorded anew."""
        rows = kept[self.owner]
        recording = self.tail.narrowed(self.recording, rows)
        if recording is None:
            return None
        numbers = kept.long().cumsum(0) - 1
        places, columns, wanted = self.labels
        there = rows.to(places.device)
        mine = there[places]
        return _Recorded(
            self.tail,
            recording,
            numbers[self.owner[rows]],
            self.acts[there],
            self.trained[there],
            ((there.long().cumsum(0) - 1)[places[mine]], columns[mine], wanted[mine]),
        )


class Memoir(Editor[MemoirConfig]):
    """Stores each edit in its own columns of a residual matrix and reads them only for prompts that match."""

    name = "memoir"
    summary = "each edit in its own columns of a residual matrix, read only by prompts that match"
    paper = "MEMOIR, NeurIPS 2025 (qym7/MEMOIR)"
    Config = MemoirConfig
    edits_encoders = True
    writes_jointly = True

    @property
    def _layers(self) -> tuple[int, ...]:
        """All layers with a memory, the one where prompts are recognised first."""
        anatomy, config = self.model.anatomy, self.config
        first, *further = (anatomy.layer(layer) for layer in (config.layer, *config.layers))
        return (first, *sorted(set(further) - {first}))

    @property
    def _routed(self) -> RoutedAdapter:
        assert isinstance(self.adapter, RoutedAdapter)
        return self.adapter

    @property
    def _router(self) -> TopHashRouter:
        router = self._routed.router
        assert isinstance(router, TopHashRouter)
        return router

    @property
    def _memories(self) -> dict[int, ColumnMemory]:
        """Per layer."""
        found = dict(zip(self._layers, self._routed.layer.memories, strict=True))
        return {layer: memory for layer, memory in found.items() if isinstance(memory, ColumnMemory)}

    @property
    def _acts(self) -> Acts:
        """An encoder reads prompts alone: there is no answer's place to wait for."""
        return "all" if self.model.is_encoder_decoder else self.config.acts

    def _new_adapter(self) -> RoutedAdapter:
        model, config = self.model, self.config
        first, *further = self._layers
        width = model.anatomy.key_width[first]
        if any(layer < first for layer in further):
            raise ConfigError(
                f"layers {list(config.layers)} must stand above layer {config.layer}, where prompts are recognised"
            )
        if odd := [layer for layer in further if model.anatomy.key_width[layer] != width]:
            raise ConfigError(f"layers {odd} have another key width than layer {first} ({width}); leave them out")
        if config.marked > width:
            raise ConfigError(f"marked={config.marked} is more than the {width} features of layer {first}")
        pooling: Pooling = "mean" if config.pooling == "auto" else config.pooling
        generator = torch.Generator().manual_seed(config.seed)
        router = TopHashRouter.seeded(
            width, config.marked, generator, pooling, permute=config.permute, hashing=config.mask
        )
        paths = [model.anatomy.mlp_output[layer] for layer in (first, *further)]
        memories = [ColumnMemory.empty(output_width(model.module(path)), width, self._acts) for path in paths]
        return RoutedAdapter(
            BaseIdentity.of(model),
            self.name,
            config.to_record(),
            path=paths[0],
            layer=RoutedLayer(router, memories[0], memories[1:]),
            further_paths=paths[1:],
        )

    # --- once per base model ----------------------------------------------------------------------------------------

    def _memory_to_prepare(self) -> list[MemoryPart]:
        entries = weight_entries(self.model, [self.model.anatomy.mlp_output[layer] for layer in self._layers])
        squares = sum(self.model.anatomy.key_width[layer] ** 2 for layer in self._layers)
        fewer = "give memory to fewer layers"
        parts = [
            reading(self.model, READ_TOKENS),
            MemoryPart("the residual matrix", 4 * entries, fewer, on_host=True),
            MemoryPart("a copy of it beside the model", self.model.dtype.itemsize * entries, fewer),
        ]
        if self.config.ridge is not None:
            spare = "spare stored edits nothing (ridge null)"
            parts.append(MemoryPart("the second moment of stored keys", 4 * squares, spare, on_host=True))
        return parts

    def _memory_to_write(self, edits: Sequence[Edit]) -> list[MemoryPart]:
        anatomy, marked, rows = self.model.anatomy, self.config.marked, 1 + self.config.contexts
        layers, together = len(self._layers), min(len(edits), self.config.batch_size)
        smaller = "give a smaller batch_size, or mark fewer columns"
        columns = 4 * layers * together * (rows + 1) * anatomy.hidden_size * marked
        # Two thin factors and the keys, in two bytes each; some four of each.
        kept = 2 * 4 * layers * len(edits) * (anatomy.hidden_size + 2 * marked)
        return [
            self._backward_pass(edits, self.model.layer_count - self._layers[0]),
            MemoryPart("columns of the edits of a batch", columns, smaller),
            MemoryPart("the metric that spares stored keys", 4 * 3 * marked**2, smaller, on_host=True),
            MemoryPart("what these edits leave", kept, "write fewer edits", on_host=True),
        ]

    def _prepare(self, progress: Progress) -> None:
        adapter, router, config = self._routed, self._router, self.config
        if "calibration" not in adapter.notes:
            questions = Questions.ask(self.model, config.background, config.seed, calibrating=config.is_calibrated)
            place = cache_folder("memoir") / f"{self._digest(questions)}.safetensors"
            made = Preparation.read(place)
            if made is None:
                with self.model.bare():  # all of it belongs to the base model, whatever is attached to it
                    made = self._measure(questions, progress)
                with suppress(OSError):  # it can be made again: a folder that cannot be written to stops nobody
                    made.write(place)
            router.background, router.pooling = made.background, made.pooling
            thresholds = {"threshold": made.threshold, "named": made.named, "unnamed": made.unnamed}
            adapter.notes["contexts"] = made.contexts
            adapter.notes["calibration"] = {**made.record, "pooling": made.pooling, **thresholds}
        found = adapter.notes["calibration"]
        router.threshold = found["threshold"] if config.conditional_read else 0.0
        looks = config.subject_check and config.conditional_read
        router.named_threshold, router.unnamed_threshold = (found["named"], found["unnamed"]) if looks else (None, None)

    def _digest(self, questions: Questions) -> str:
        """Everything that `_measure` depends on, hashed."""
        config = self.config
        names = (
            "marked",
            "pooling",
            "seed",
            "threshold",
            "relative_threshold",
            "false_fires",
            "permute",
            "mask",
        )
        parts = {
            "format": _FORMAT,
            "weights": self.model.fingerprint,
            "dtype": str(self.model.dtype),
            "layer": self._layers[0],
            "subject_check": config.subject_check,
            "questions": questions.digest(),
            **{name: getattr(config, name) for name in names},
        }
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def _measure(self, questions: Questions, progress: Progress) -> Preparation:
        """Contexts, background, thresholds, and pooling where it is free."""
        config, router = self.config, self._router
        contexts = list(wise_contexts(self.model, config.seed))
        tried: tuple[Pooling, ...] = (router.pooling,)
        if questions.prompts and config.pooling == "auto" and config.mask == "tophash":
            tried = POOLINGS
        zeros = torch.zeros(router.width)
        # One router per pooling, empty, so that one pass over the questions serves all of them.
        routers = [dataclasses.replace(router, pooling=p, background=zeros, owners=[], words=[]) for p in tried]
        progress.start(f"{self.name}: reading questions", len(questions))
        if questions.background:
            for one, gathered in zip(routers, self._gathered(questions.background, routers, progress), strict=True):
                one.background = one.features(gathered).mean(0)
        if not questions.prompts:
            threshold, kind = config.threshold, "fixed threshold"
            if threshold is None:
                assert config.relative_threshold is not None
                kind = "fixed relative threshold"
                threshold = relative_threshold(config.relative_threshold, router.marked, router.width)
            return Preparation(routers[0].background, contexts, router.pooling, threshold, None, None, {"kind": kind})

        def masks(texts: Sequence[Passage]) -> list[Tensor]:
            found = self._gathered(texts, routers, progress)
            return [one.masks_of(gathered) for one, gathered in zip(routers, found, strict=True)]

        asked = [masks(part) for part in (questions.prompts, questions.paraphrases, questions.neighbours)]
        beside = masks(questions.beside) if questions.beside else [torch.empty(0, router.width, dtype=torch.bool)] * 3
        results: dict[Pooling, Found] = {}
        for number, one in enumerate(routers):
            stored, reworded, near = (part[number] for part in asked)
            store = MaskStore(router.width, router.marked)
            for mask in stored:
                store.append(mask)
            results[one.pooling] = calibrate(
                store,
                questions,
                reworded,
                near,
                beside[number],
                config.false_fires,
                config.subject_check,
            )
        best = max(tried, key=lambda pooling: results[pooling].record["paraphrases_reached"])
        instead_of = {
            pooling: {**found.record, "threshold": found.threshold, "named": found.named}
            for pooling, found in results.items()
            if pooling != best
        }
        found = results[best]
        return Preparation(
            routers[tried.index(best)].background,
            contexts,
            best,
            found.threshold,
            found.named,
            found.unnamed,
            {"kind": "calibrated", **found.record, "instead_of": instead_of},
        )

    @torch.no_grad()
    def _gathered(
        self, passages: Sequence[Passage], routers: Sequence[TopHashRouter], progress: Progress
    ) -> list[Gathered]:
        """What each router gathers of each prompt, from one pass over the prompts."""
        path, width = self._routed.path, max(len(p.ids) for p in passages)
        found: list[list[tuple[list[int], Gathered]]] = [[] for _ in routers]
        for indices in length_batches([len(p.ids) for p in passages], READ_TOKENS):
            batch = self.model.batch([passages[i] for i in indices], side="right")
            with capturing_inputs(self.model.model, [path], len(indices)) as inputs:
                self.model.trunk_states(batch)
            for router, own in zip(routers, found, strict=True):
                own.append((indices, router.gather(inputs[path], batch.mask.bool(), ids=batch.ids)))
            progress.advance(len(indices))
        return [_in_order(own, len(passages), width) for own in found]

    # --- per edit ---------------------------------------------------------------------------------------------------

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        adapter, config = self._routed, self.config
        with adapter.detached():  # an edit reads its own columns alone, whatever its prompt would match
            recorded = self._record(edits)
            jobs = self._jobs(edits, recorded)
            self._find_spaces(jobs, recorded)
            self._train(jobs, recorded)
        for job in jobs:  # before anything is written: a refused batch leaves all as it was
            for layer in job.spaces:
                check_change(job.factors[layer], f"the change that edit {job.edit.id} makes to the memory")
        changes = {layer: [self._change(job, layer) for job in jobs] for layer in self._layers}
        if config.decay != "none":
            (memory,) = self._memories.values()
            for job in jobs:
                others = self._kept(job.steps) if config.decay == "all" else 1.0
                kept = torch.full((memory.weight.shape[1],), others)
                kept[job.columns] = 1.0  # its own are faded in what was found
                memory.fade(kept)
        displaced = []
        for job_number, job in enumerate(jobs):
            displaced.append(self._displace(job))
            for layer, memory in self._memories.items():
                found = changes[layer][job_number]
                memory.append(*(found or (None, None)))
            words = spellings(self.model.tokenizer, job.edit.prompt, job.edit.subject) if job.edit.subject else ()
            self._router.append(job.mask, job.edit.id, job.sharpest, words)
        adapter.memory_version += 1
        return Written(tuple(job.steps for job in jobs), tuple(displaced))

    def _jobs(self, edits: Sequence[Edit], recorded: _Recorded) -> list[_Job]:
        """Masks of the edits' bare prompts, the first row of each."""
        router = self._router
        if router.pooling == "last" and router.hashing == "tophash" and not self.model.is_encoder_decoder:
            # All that decides is in the recording already.
            rows = torch.cat([torch.zeros(1, dtype=torch.long), recorded.owner.diff().nonzero().squeeze(1) + 1])
            batch = recorded.recording.batch
            ends = (batch.positions == batch.prompt_lengths.unsqueeze(1) - 1).long().argmax(dim=1)[rows]
            inputs = recorded.recording.inputs[self._layers[0]][rows, ends].unsqueeze(1)
            gathered = router.gather(inputs, torch.ones(len(rows), 1, dtype=torch.bool))
        else:
            bare = [self.model.passage(edit.prompt) for edit in edits]
            (gathered,) = self._gathered(bare, [router], NO_PROGRESS)
        masks, sharpest = router.masks_of(gathered), router.sharpest(router.features(gathered))
        return [
            _Job(edit, mask, mask.nonzero().squeeze(1), sharp, router.find(mask, sharp))
            for edit, mask, sharp in zip(edits, masks, sharpest, strict=True)
        ]

    def _prompts(self, edit: Edit) -> list[str]:
        contexts = self._routed.notes["contexts"][: self.config.contexts]
        return [edit.prompt, *(f"{context} {edit.prompt}" for context in contexts)]

    def _record(self, edits: Sequence[Edit]) -> _Recorded:
        config, model = self.config, self.model
        kind = AnswerTail if self._acts == "answer" and not config.full_forward else Tail
        tail = kind(model, self._layers, full=config.full_forward)
        per_edit = [[model.passage(prompt, edit.target) for prompt in self._prompts(edit)] for edit in edits]
        recording = tail.record(model.batch([passage for own in per_edit for passage in own], side="right"))
        owner = torch.tensor([number for number, own in enumerate(per_edit) for _ in own])
        batch = recording.batch
        labels = batch.answer_places()
        real = batch.mask.bool()
        acts = real if self._acts == "all" else real & (batch.positions >= batch.prompt_lengths.unsqueeze(1) - 1)
        trained = acts.clone()
        if model.is_encoder_decoder:  # its answers end with the end token anyway
            return _Recorded(tail, recording, owner, acts, trained, labels)
        ends = real & (real.long().flip(1).cumsum(1).flip(1) == 1)
        if config.ending:
            rows, columns = ends.nonzero(as_tuple=True)
            with torch.no_grad():
                follows = tail.run(recording, {}, rows, columns).argmax(dim=1).to(rows.device)
            places, others, wanted = labels
            labels = torch.cat([places, rows]), torch.cat([others, columns]), torch.cat([wanted, follows])
        elif self._acts == "answer":
            trained &= ~ends  # what is read there decides nothing that is trained
        return _Recorded(tail, recording, owner, acts, trained, labels)

    def _find_spaces(self, jobs: Sequence[_Job], recorded: _Recorded) -> None:
        """Where each edit's change is sought: in which layers, in which columns, under which metric."""
        trained = recorded.trained
        owner = recorded.owner.to(trained.device)
        first_row = torch.tensor([int((owner == number).nonzero()[0]) for number in range(len(jobs))])
        for layer, memory in self._memories.items():
            inputs = recorded.recording.inputs[layer]
            for job, row in zip(jobs, first_row.tolist(), strict=True):
                own = inputs[row][trained[row]].float().cpu()[:, job.columns]
                job.keys[layer] = own.bfloat16()
            moments = self._moments(jobs, layer, memory)
            for number, job in enumerate(jobs):
                mine = owner == number
                keys = inputs[mine][trained[mine]].float().cpu()[:, job.columns]
                start = memory.weight[:, job.columns]
                old = None if job.replaces is None else memory.written[job.replaces]
                if old is not None and (change := old.change()) is not None:
                    start = start - change
                moment, ridge = moments[number]
                job.spaces[layer] = Space.of(keys, job.columns, start, moment, ridge)
        if self.config.layer_choice == "roomiest":
            for job in jobs:
                # Of layers that differ by rounding alone, as empty ones do, the lowest.
                best = max(sorted(job.spaces), key=lambda layer: round(job.spaces[layer].room, 4))
                job.spaces = {best: job.spaces[best]}

    def _moments(self, jobs: Sequence[_Job], layer: int, memory: ColumnMemory) -> list[tuple[Tensor | None, float]]:
        """Per edit, the second moment [k, k] of all keys but its own in its columns, and λ.

        Those of the other edits of its batch count too: they are trained without knowing of each other.
        """
        if self.config.ridge is None:
            return [(None, 1.0)] * len(jobs)
        whole = memory.moment
        numbers = torch.tensor([number for number, job in enumerate(jobs) for _ in job.keys[layer]])
        spread = torch.zeros(len(numbers), len(whole))  # all keys of the batch, [n, D], zero outside their columns
        for number, job in enumerate(jobs):
            spread[(numbers == number).nonzero(), job.columns] = job.keys[layer].float()
        count = sum(len(one.keys) for one in memory.written if one is not None)
        energy = float(whole.trace())
        if len(jobs) > 1:
            count, energy = count + len(spread), energy + float(spread.square().sum())
        if not count:
            return [(None, 1.0)] * len(jobs)
        ridge = self.config.ridge * max(energy / count, 1e-12)
        found: list[tuple[Tensor | None, float]] = []
        for number, job in enumerate(jobs):
            others = spread[numbers != number][:, job.columns]
            moment = whole[job.columns.unsqueeze(1), job.columns] + others.T @ others
            old = None if job.replaces is None else memory.written[job.replaces]
            if old is not None:
                moment = moment - old.keys.float().T @ old.keys.float()
            found.append((moment, ridge))
        return found

    def _train(self, jobs: Sequence[_Job], recorded: _Recorded) -> None:
        """Train all edits side by side. Whenever half of them are done, the others go on without these."""
        config = self.config
        descent = Descent(
            config.learning_rate,
            config.steps,
            config.clip_norm,
            config.stop_loss,
            config.stop_change,
            config.compat == "reference",
        )
        waiting, begin = list(jobs), None
        while waiting:
            found = descend(
                recorded.tail,
                recorded.recording,
                {layer: [job.spaces.get(layer) for job in waiting] for layer in self._layers},
                recorded.owner,
                recorded.acts,
                recorded.labels,
                descent,
                begin,
                until=_ROUND,
            )
            for number, job in enumerate(waiting):
                job.steps = int(found.steps[number])
                for layer, space in job.spaces.items():
                    job.factors[layer] = found.factors[layer][number, :, : len(space.basis)]
            if int(found.steps.max()) == config.steps:
                return
            on = ~found.done
            waiting, begin = [job for job, goes_on in zip(waiting, on, strict=True) if goes_on], found.waiting
            if waiting:
                recorded = recorded.of_edits(on) or self._record([job.edit for job in waiting])

    def _kept(self, steps: int) -> float:
        return float((1.0 - self.config.learning_rate * self.config.weight_decay) ** steps)

    def _change(self, job: _Job, layer: int) -> tuple[WrittenColumns, Tensor] | None:
        """What the job enters in a layer's memory, and by how much it changes its columns [outputs, k]."""
        if layer not in job.spaces:
            return None
        space, keys = job.spaces[layer], job.keys[layer]
        outputs, inputs = compressed(job.factors[layer], space.basis)
        if self.config.decay == "none":
            one = WrittenColumns(job.columns, keys, outputs, inputs)
            made = one.change()
            assert made is not None
            return one, made
        faded = (self._kept(job.steps) - 1.0) * space.start
        return WrittenColumns(job.columns, keys, None, None), faded + job.factors[layer] @ space.basis

    def _displace(self, job: _Job) -> str | None:
        """Take out the entry whose mask is this very one, and what the edit itself has from before, if it has anything.

        Returns:
            The edit that owned the former, if it was another.
        """
        router = self._router
        same_mask = router.find(job.mask, job.sharpest)
        owner = None if same_mask is None else router.owners[same_mask]
        entries = [] if same_mask is None or owner == job.edit.id else [same_mask]
        if self.adapter.holds(job.edit.id):  # its prompt may have had other white space, and so another mask
            entries += [number for number, name in enumerate(router.owners) if name == job.edit.id]
        for memory in self._memories.values():
            memory.forget(entries)
        for number in sorted(entries, reverse=True):
            router.remove_entry(number)
        return None if owner == job.edit.id else owner


def _in_order(parts: Sequence[tuple[list[int], Gathered]], count: int, width: int) -> Gathered:
    """What was gathered in batches, in the order of the prompts, on the CPU."""

    def joined(name: str) -> Tensor:
        first: Tensor = getattr(parts[0][1], name)
        whole = torch.full((count, width) if name == "ids" else (count, *first.shape[1:]), -1, dtype=first.dtype)
        for indices, part in parts:
            values: Tensor = getattr(part, name).cpu()
            if name == "ids":
                whole[indices, : values.shape[1]] = values
            else:
                whole[indices] = values
        return whole

    return Gathered(*(joined(name) for name in ("sums", "counts", "last", "seen", "ids")))
