"""WISE: edits in a side memory, which a prompt meets only if the memory moves the layer's output far (NeurIPS 2024).

A change Δ of one MLP output projection is trained beside the base weight, so that with it the target is said and

    L_a = [Δ(irrelevant) − Δ(edit) + γ]₊ + [Δ(irrelevant) − α]₊ + [β − Δ(edit)]₊

where Δ(.) is how far the change moves the layer's output, the mean over a prompt's tokens; later the same number
decides which memory answers a prompt, if any (`routing.activation`). `shard_edits` edits share one shard, a random
share ρ of the entries; `shards_per_memory` shards are merged (`adapters.merging`) into one memory (`mode="merge"`), or
into one memory after the other, of which the one that is moved most answers (`mode="retrieve"`).

What the published code does otherwise, and `compat="reference"` does too: weight decay pulls on every entry, the base
weight's part included, so that a change is dense; the loss of a target of n tokens is divided by n + 1; targets count
as tokens of the prompt when scores are trained; a prompt longer than 100 tokens is scored by its largest token; the
current memory keeps stored ones from answering even where it fails its own threshold; in mode "merge" one ε serves all.
The reference's other traps are listed in docs/methods/wise.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.adapters import BaseIdentity, RevertResult
from errata.adapters.base import check_change
from errata.adapters.merging import MergeRule
from errata.adapters.sides import Choice, Shard, SideSettings, WiseAdapter, base_layer, mlp_activation, seeded
from errata.datasets.builtin import background_prompts
from errata.edit import Edit
from errata.editors.base import Editor, EditorConfig, Written
from errata.editors.contexts import wise_contexts
from errata.editors.layers import scaled_layer, shape_key
from errata.editors.memory import MemoryPart, reading, weight_entries
from errata.errors import ConfigError, EditError, NumericsError
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.model.probes import capturing_inputs
from errata.model.scoring import READ_TOKENS, length_batches
from errata.model.tail import Recording, Tail
from errata.progress import Progress
from errata.routing.activation import Activation, Score, effects

__all__ = ["Wise", "WiseConfig"]

_MARGINS = {"margin_low": 5.0, "margin_high": 20.0, "margin_gap": 10.0}
_SEVEN_B = {**_MARGINS, "learning_rate": 1.0, "steps": 70, "activation_ratio": 0.88, "shard_edits": 500}
# By architecture, blocks, hidden size and key width.
_PUBLISHED: dict[tuple[str, int, int, int], dict[str, Any]] = {
    ("llama", 32, 4096, 11008): {**_SEVEN_B, "layer": 27, "source": "WISE, table 10 (Llama-2-7B)"},
    ("mistral", 32, 4096, 14336): {**_SEVEN_B, "layer": 27, "source": "EasyEdit, hparams/WISE/mistral-7b.yaml"},
    ("qwen2", 28, 3584, 18944): {**_SEVEN_B, "layer": 23, "source": "EasyEdit, hparams/WISE/qwen2.5-7b.yaml"},
    ("gptj", 28, 4096, 16384): {
        **_SEVEN_B,
        "layer": 21,
        "margin_low": 15.0,
        "margin_high": 40.0,
        "margin_gap": 20.0,
        "source": "EasyEdit, hparams/WISE/gpt-j-6B.yaml",
    },
    ("llama", 32, 4096, 14336): {
        **_SEVEN_B,
        "layer": 29,
        "learning_rate": 0.9,
        "steps": 30,
        "margin_low": 2.0,
        "activation_ratio": 0.5,
        "source": "EasyEdit, hparams/WISE/llama-3-8b.yaml (for 3.1: margins 5, 10, 10 and ratio 0.88)",
    },
}
_POOL = 200  # unrelated prompts, of which each edit is given some


@dataclass(frozen=True, kw_only=True)
class WiseConfig(EditorConfig):
    """Settings of WISE.

    Attributes:
        layer: block beside whose MLP output projection the memories stand.
        learning_rate, steps, weight_decay: of the inner gradient descent (no momentum, afresh for every edit).
        stop_loss, stop_change: stop when the loss is at most the one and moved by at most the other.
        norm_clamp: largest size of any entry of a change.
        margin_low, margin_high, margin_gap: α, β and γ: how far an unrelated prompt may, an edit's prompt should be
            moved, and how far these should lie apart. None takes them from the model: β = `margin_scale` times the
            typical size of the layer's output, α and γ in the published proportions 5 : 20 : 10.
        margin_loss: train with these margins at all.
        mask_density: ρ, share of the weight's entries that a shard may change.
        shard_edits: edits per shard; shards_per_memory: k, shards that are merged, 1 to merge none.
        merging: how, see `adapters.merging`; trim_density: share of entries that rules which trim let stand.
        mode: "merge" keeps all merged shards in one memory, "retrieve" makes a new memory of every k.
        activation_ratio: share of ε from which a memory answers (1 in the paper).
        choice: of several memories that could answer, the one that holds the edit whose last prompt token is
            "nearest", or the one with the larger "activation" (the paper).
        score: "activated", differences behind the MLP's nonlinearity (the code), or "linear" (the paper's equation).
        replay: train each edit also on one stored edit of each earlier memory, which must not move it, and on one of
            the same shard, which must; mode "retrieve" only.
        irrelevant: unrelated prompts that each edit is trained with (1 in the paper).
        contexts: texts of the model's own put in front of the prompt, at most ten.
        compat: "reference" follows the published code where that changes numbers, see the module.
        full_forward: train through whole forward passes instead of the tail (slow; for comparison).
    """

    adjustable: ClassVar[frozenset[str]] = EditorConfig.adjustable | {
        "contexts",
        "irrelevant",
        "margin_loss",
        "norm_clamp",
        "replay",
        "shard_edits",
    }

    layer: int = 27
    learning_rate: float = 1.0
    steps: int = 70
    weight_decay: float = 1e-5
    stop_loss: float = 0.02
    stop_change: float = 1e-4
    norm_clamp: float = 1.0
    margin_low: float | None = None
    margin_high: float | None = None
    margin_gap: float | None = None
    margin_scale: float = 1.0
    margin_loss: bool = True
    mask_density: float = 0.2
    shard_edits: int = 50
    shards_per_memory: int = 2
    merging: MergeRule = "ties"
    trim_density: float = 0.53
    mode: Literal["merge", "retrieve"] = "merge"
    activation_ratio: float = 0.88
    score: Score = "activated"
    choice: Choice = "nearest"
    replay: bool = False
    irrelevant: int = 1
    contexts: int = 10
    compat: Literal["fixed", "reference"] = "fixed"
    full_forward: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_density <= 1:
            raise ConfigError(f"mask_density must be above 0 and at most 1, not {self.mask_density}")
        if min(self.shard_edits, self.shards_per_memory, self.irrelevant) < 1:
            raise ConfigError("shard_edits, shards_per_memory and irrelevant must be at least 1 each")
        if not 0 <= self.contexts <= 10 or self.irrelevant > _POOL:
            raise ConfigError(
                f"contexts={self.contexts} and irrelevant={self.irrelevant} must be at most 10 and {_POOL}"
            )
        if self.compat == "reference" and self.choice != "activation":
            raise ConfigError("compat='reference' chooses by activation; give choice='activation' too")
        if self.replay and self.mode != "retrieve":
            raise ConfigError("replay needs mode='retrieve': it keeps several memories from answering for each other")

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        return _PUBLISHED.get((*shape_key(model), model.anatomy.key_width[0]))

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        return {
            "layer": scaled_layer(model, 27, 32),
            "learning_rate": 0.1,  # at 1.0 a step on atlas moves a prompt several times as far as the margins ask
            # On atlas edits of one change, or of changes that are merged, take too much from each other.
            "mode": "retrieve",
            "shard_edits": 25,
            "shards_per_memory": 1,
            "source": "WISE for Llama-2, depth scaled to this model, learning rate and shards found on atlas",
        }


@dataclass(frozen=True)
class _Tokens:
    """Tokens of some prompts at the edited layer.

    inputs: [tokens, D]; outputs: [tokens, outputs], of the base layer; rows: [tokens], which prompt each belongs to;
    count: of prompts.
    """

    inputs: Tensor
    outputs: Tensor
    rows: Tensor
    count: int

    def scores(self, delta: Tensor, activation: Activation | None) -> Tensor:
        """How far a change moves each prompt, the mean over its tokens, [prompts]."""
        moved = effects(self.inputs, delta, self.outputs, activation)
        sums = torch.zeros(self.count, device=moved.device).index_add(0, self.rows, moved)
        return sums / torch.bincount(self.rows, minlength=self.count)

    def of(self, prompts: Tensor) -> _Tokens:
        """The tokens of some of the prompts."""
        numbers = torch.full((self.count,), -1, device=self.rows.device)
        numbers[prompts.to(self.rows.device)] = torch.arange(len(prompts), device=self.rows.device)
        mine = numbers[self.rows]
        kept = mine >= 0
        return _Tokens(self.inputs[kept], self.outputs[kept], mine[kept], len(prompts))


@dataclass(frozen=True)
class _Replayed:
    """Stored edits that an edit is trained with: one of each earlier memory, and one of its own shard, if any."""

    elsewhere: _Tokens
    own: _Tokens | None


@dataclass(frozen=True)
class _Learnt:
    """An edit as it is written: the shard's change [outputs, D] with it, its score under that, its key [D], steps."""

    delta: Tensor
    score: float
    key: Tensor
    steps: int


def _mean_violation(violations: Tensor) -> Tensor:
    """The mean of those above zero; zero when none is."""
    above = violations.relu()
    return above.sum() / (above > 0).sum().clamp(min=1)


class Wise(Editor[WiseConfig]):
    """Trains edits into sparse changes of one weight; a prompt meets the change that moves its activations most."""

    name = "wise"
    summary = "edits in side memories, met only by prompts whose activations they move far"
    paper = "WISE, NeurIPS 2024 (arXiv 2405.14768)"
    Config = WiseConfig

    _pool: _Tokens | None = None

    @property
    def _layer(self) -> int:
        return self.model.anatomy.layer(self.config.layer)

    @property
    def _path(self) -> str:
        return self.model.anatomy.mlp_output[self._layer]

    @property
    def _wise(self) -> WiseAdapter:
        assert isinstance(self.adapter, WiseAdapter)
        return self.adapter

    @property
    def _activation(self) -> Activation | None:
        return None if self.config.score == "linear" else mlp_activation(self.model, self._path)

    def _new_adapter(self) -> WiseAdapter:
        config = self.config
        settings = SideSettings(
            mode=config.mode,
            shards_per_memory=config.shards_per_memory,
            merging=config.merging,
            trim_density=config.trim_density,
            activation_ratio=config.activation_ratio,
            score=config.score,
            choice=config.choice,
            compat=config.compat,
            seed=config.seed,
        )
        base = BaseIdentity.of(self.model)
        return WiseAdapter(base, self.name, config.to_record(), path=self._path, settings=settings)

    def _memory_to_prepare(self) -> list[MemoryPart]:
        return [reading(self.model, min(READ_TOKENS, 20 * _POOL))]

    def _memory_to_write(self, edits: Sequence[Edit]) -> list[MemoryPart]:
        config, entries = self.config, weight_entries(self.model, [self._path])
        fewer = "give larger shards (shard_edits), or a lower mask_density"
        shards = -(-len(edits) // config.shard_edits)
        # A change of a shard is kept as values and places, 4 + 8 bytes each; the present one stands there whole too.
        kept = int(12 * config.mask_density * entries) * shards
        return [
            self._backward_pass(edits, self.model.layer_count - self._layer),
            MemoryPart("a shard's change, its gradient and the weight with it", 4 * 4 * entries, fewer),
            MemoryPart("the shards", kept, fewer, on_host=True),
        ]

    # --- once per base model ----------------------------------------------------------------------------------------

    def _prepare(self, progress: Progress) -> None:
        notes, config = self._wise.notes, self.config
        activation = self._activation
        with self.model.bare():
            self._pool = self._tokens(background_prompts(_POOL, config.seed))
            if "contexts" not in notes:
                notes["contexts"] = list(wise_contexts(self.model, config.seed))
        if "margins" not in notes:
            outputs = self._pool.outputs
            sizes = (outputs if activation is None else activation(outputs)).float().norm(dim=1)
            high = config.margin_scale * float(sizes.median())  # the median: a prompt's first token stands far out
            high = high if config.margin_high is None else config.margin_high
            notes["margins"] = {
                "margin_low": high / 4 if config.margin_low is None else config.margin_low,
                "margin_high": high,
                "margin_gap": high / 2 if config.margin_gap is None else config.margin_gap,
            }

    @torch.no_grad()
    def _tokens(self, prompts: Sequence[str]) -> _Tokens:
        """Prompts at the edited layer, in their order."""
        base, path = base_layer(self.model, self._path), self._path
        passages = [self.model.passage(prompt) for prompt in prompts]
        inputs: list[Tensor] = [torch.empty(0)] * len(passages)
        for indices in length_batches([len(p.ids) for p in passages], READ_TOKENS):
            batch = self.model.batch([passages[i] for i in indices], side="right")
            with capturing_inputs(self.model.model, [path], len(indices)) as captured:
                self.model.trunk_states(batch)
            for row, index in enumerate(indices):
                inputs[index] = captured[path][row, : len(passages[index].ids)]
        together = torch.cat(inputs)
        lengths = torch.tensor([len(part) for part in inputs], device=together.device)
        rows = torch.arange(len(inputs), device=together.device).repeat_interleave(lengths)
        return _Tokens(together, base(together), rows, len(inputs))

    # --- per edit ---------------------------------------------------------------------------------------------------

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        (edit,) = edits
        adapter = self._wise
        shard = adapter.layer.begin(*weight_of(base_layer(self.model, self._path)).shape)
        held = {other.id: other.prompt for other in adapter.edits()}
        learnt = self._learn(edit, shard)
        adapter.write(edit.id, learnt.delta, self._threshold(shard, learnt, edit, held), learnt.key)
        current = adapter.layer.current
        if current is not None and current.shards[0].written >= self.config.shard_edits:
            merged = adapter.layer.finish()
            if merged is not None and self.config.compat == "fixed":
                prompts = {**held, edit.id: edit.prompt}
                with adapter.detached():
                    tokens = self._tokens([prompts[owner] for owner in merged.owners])
                merged.threshold = self._smallest(tokens, merged.delta)
        return Written((learnt.steps,))

    def _threshold(self, shard: Shard, learnt: _Learnt, edit: Edit, held: Mapping[str, str]) -> float:
        """The shard's ε with an edit in it. The earlier edits are scored again: each later one moves them."""
        if self.config.compat == "reference":
            return min(shard.threshold, learnt.score)
        others = [held[owner] for owner in shard.owners if owner != edit.id]
        if not others:
            return learnt.score
        with self._wise.detached():
            return min(learnt.score, self._smallest(self._tokens(others), learnt.delta))

    @torch.no_grad()
    def _smallest(self, tokens: _Tokens, delta: Tensor) -> float:
        """The smallest score of some prompts under a change."""
        return float(tokens.scores(delta.to(tokens.inputs), self._activation).min())

    def mask(self, shard: Shard) -> Tensor:
        """The entries that a shard may change, [outputs, D]; the same for the same seed and number of the shard."""
        generator = seeded("mask", self.config.seed, shard.numbers[0])
        return torch.rand(shard.delta.shape, generator=generator) < self.config.mask_density

    def _learn(self, edit: Edit, shard: Shard) -> _Learnt:
        """Train an edit on top of what a shard holds. Nothing is written.

        Raises:
            NumericsError: the loss or the change is not finite, or nothing changes.
        """
        config, adapter = self.config, self._wise
        prompts = [edit.prompt, *(f"{text} {edit.prompt}" for text in adapter.notes["contexts"][: config.contexts])]
        batch = self.model.batch([self.model.passage(prompt, edit.target) for prompt in prompts], side="right")
        generator = seeded("irrelevant", config.seed, edit.id)
        activation = self._activation
        replayed = self._replayed(edit, shard)
        with adapter.detached():  # the edit meets its own memory alone, whatever its prompt would match
            tail = Tail(self.model, self._layer, full=config.full_forward)
            recording = tail.record(batch)
            base = base_layer(self.model, self._path)
            inputs = recording.inputs[self._layer]
            real = batch.mask.bool().to(inputs.device)
            prompt = real & (batch.positions < batch.prompt_lengths.unsqueeze(1)).to(inputs.device)
            trained = real if config.compat == "reference" else prompt
            edited = _Tokens(inputs[trained], base(inputs[trained]), trained.nonzero()[:, 0], len(prompts))
            assert self._pool is not None, "prepare() comes first"
            irrelevant = self._pool.of(torch.randperm(_POOL, generator=generator)[: config.irrelevant])
            weight = weight_of(base).float() if config.compat == "reference" else None

            def margins(delta: Tensor) -> Tensor:
                moved = edited.scores(delta, activation)
                return self._margin_loss(moved, irrelevant.scores(delta, activation), replayed, delta, activation)

            delta, last, steps = self._train(tail, recording, shard, margins if config.margin_loss else None, weight)
        check_change(delta.cpu() - shard.delta, "the side memory's change")
        with torch.no_grad():
            if config.compat == "reference":
                score = float(edited.scores(last, activation).mean())  # before the last step, as published
            else:
                own = _Tokens(inputs[:1][prompt[:1]], base(inputs[:1][prompt[:1]]), prompt[:1].nonzero()[:, 0], 1)
                score = float(own.scores(delta.to(inputs.dtype), activation)[0])
        key = inputs[0, int(batch.prompt_lengths[0]) - 1]
        return _Learnt(delta.cpu(), score, key, steps)

    def _margin_loss(
        self,
        edited: Tensor,
        irrelevant: Tensor,
        replayed: _Replayed | None,
        delta: Tensor,
        activation: Activation | None,
    ) -> Tensor:
        """L_a, from the scores of the edit's prompts [n] and of unrelated ones [m]."""
        margins = self._wise.notes["margins"]
        low, high, gap = (margins[name] for name in _MARGINS)
        loss = _mean_violation(irrelevant.unsqueeze(0) - edited.unsqueeze(1) + gap)
        loss = loss + _mean_violation(irrelevant - low) + _mean_violation(high - edited)
        if replayed is not None:
            if self.config.compat == "reference":
                low, high = _MARGINS["margin_low"], _MARGINS["margin_high"]  # constants there, whatever the model
            loss = loss + (replayed.elsewhere.scores(delta, activation) - low).relu().mean()
            if replayed.own is not None:
                loss = loss + (high - replayed.own.scores(delta, activation)).relu().mean()
        return loss

    def _replayed(self, edit: Edit, shard: Shard) -> _Replayed | None:
        """Stored edits to train with, drawn by a generator that follows from the edit; None without other memories."""
        mine = shard.numbers[0]
        memories = [m for m in self._wise.layer.memories if all(mine not in other.numbers for other in m.shards)]
        if not self.config.replay or not memories:
            return None
        generator = seeded("replay", self.config.seed, edit.id)
        held = {other.id: other.prompt for other in self.adapter.edits()}

        def drawn(owners: Sequence[str]) -> str:
            return held[owners[int(torch.randint(len(owners), (1,), generator=generator))]]

        elsewhere = [drawn(memory.owners) for memory in memories]
        own = [owner for owner in shard.owners if owner != edit.id]
        with self.model.bare():
            return _Replayed(self._tokens(elsewhere), self._tokens([drawn(own)]) if own else None)

    def _train(
        self, tail: Tail, recording: Recording, shard: Shard, margins: Any, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, int]:
        """Gradient descent on the shard's entries; the change, the change one step before, and the steps.

        Args:
            margins: from a change to L_a, None to do without; weight: the base weight, where decay pulls on it too.
        """
        config = self.config
        device = recording.outputs.device
        mask = self.mask(shard).to(device)
        delta = shard.delta.to(device).clone().requires_grad_(True)
        rows, places, labels = recording.batch.answer_places()
        per_row = torch.bincount(rows).float() + (config.compat == "reference")

        def read(inputs: Tensor) -> Tensor:
            return inputs @ delta.to(inputs.dtype).T

        before, taken = float("inf"), 0
        previous = shard.delta.to(device)
        for _ in range(config.steps):
            logits = tail.run(recording, read, rows, places)
            losses = F.cross_entropy(logits.float(), labels.to(logits.device), reduction="none")
            loss = (losses / per_row[rows].to(losses.device)).sum() / len(per_row)
            if margins is not None:
                loss = loss + margins(delta).to(loss.device)
            now = loss.item()
            if not loss.isfinite():
                raise NumericsError("the edit's loss is not finite; lower the learning rate")
            if abs(now - before) <= config.stop_change and now <= config.stop_loss:
                break
            before = now
            (gradient,) = torch.autograd.grad(loss, delta)
            with torch.no_grad():
                previous = delta.detach().clone()
                gradient = gradient * mask
                gradient += config.weight_decay * (delta if weight is None else delta + weight.to(device))
                delta -= config.learning_rate * gradient
                delta.clamp_(-config.norm_clamp, config.norm_clamp)
            taken += 1
        return delta.detach(), previous, taken

    # --- taking edits out -------------------------------------------------------------------------------------------

    def revert(
        self, edit_id: str, how: Literal["retrain_shard", "drop_shard", "tombstone"] = "retrain_shard"
    ) -> RevertResult:
        """Take one edit out.

        Args:
            how: "retrain_shard" trains all other edits of its shard again, from nothing and in their order;
                the others as in `WiseAdapter.revert`.

        Raises:
            EditError: the adapter does not hold this edit; its shard was merged for good; another edit of the shard
                cannot be trained again.
        """
        adapter = self._wise
        if how != "retrain_shard" or not adapter.holds(edit_id):
            return adapter.revert(edit_id, "drop_shard" if how == "drop_shard" else "tombstone")
        _, shard = adapter.own_shard(edit_id)
        others = [owner for owner in shard.owners if owner != edit_id]
        if not others:
            return adapter.revert(edit_id)
        self.prepare()
        held = {edit.id: edit for edit in adapter.edits()}
        made = Shard(shard.numbers, torch.zeros_like(shard.delta), keys=shard.keys[:0])
        for owner in others:
            try:
                learnt = self._learn(held[owner], made)
            except NumericsError as error:
                raise EditError(f"{edit_id!r} stays: {owner!r} cannot be trained again without it ({error})") from error
            prompts = {edit.id: edit.prompt for edit in held.values()}
            made.threshold = self._threshold(made, learnt, held[owner], prompts)
            made.delta = learnt.delta
            made.keys = torch.cat([made.keys, learnt.key[None].to(torch.bfloat16).cpu()])
            made.owners.append(owner)
            made.written += 1
        made.written = shard.written
        adapter.replace_shard(edit_id, made)
        what = f"the {len(others)} other edits of its shard were trained again without it"
        if self.config.replay:
            return RevertResult(edit_id, "approximate", f"{what}, but replay had shown it to edits of other shards")
        return RevertResult(edit_id, "exact", what)
