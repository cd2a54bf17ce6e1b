"""What methods share that locate a fact and then write it: ROME, EMMET, MEMIT, AlphaEdit.

A fact is a key, what an MLP output projection reads at the subject's last token, and a value, what should come out of
the last edited layer there. `values.py` finds the value, `solving.py` the change of weight that gives it; here is what
lies between: contexts, statistics of ordinary keys, several layers, keys of earlier edits.

**Several layers.** Each gets its share of what is still missing in the residual stream behind the last one: divided by
the layers to go, with keys and residual stream read anew while what the layers below were given is in place (MEMIT,
2210.07229, section 4.3). This is a step of its own, which any of the methods can take.

**Earlier edits.** With `protect_past="cache"` their keys are kept in the adapter, and later edits spare them like
ordinary ones. A key is the one its edit was solved with; AlphaEdit's code reads it again after the batch, which gives
the same, because the layers below were in place already.

**Norms.** With `anchor_norms` each v* is given the norm that values have on the unedited model (NAS, 2602.02543): what
one edit adds to the weights makes the values of the next ones longer, and they the weights again. The norm is the mean
over sixteen facts of errata's own; it is the MLP's output with δ that is scaled.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from errata.adapters import DeltaAdapter, WeightChange
from errata.datasets.builtin import corpus_texts, paraphrase_sets, plain_texts
from errata.edit import Edit
from errata.editors.base import Editor, EditorConfig, Written
from errata.editors.memory import MemoryPart, backward_pass, reading
from errata.editors.solving import Metric, PastKeys, Solution, solve
from errata.editors.values import TargetValue, ValueSettings, find_target_values
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.probes import adding, capturing_inputs, probing
from errata.model.scoring import length_batches
from errata.model.statistics import KeyStatistics, StatisticsPlan, key_statistics
from errata.model.tail import Tail
from errata.progress import Progress

__all__ = ["Located", "LocatedConfig"]

_BATCH_TOKENS = 8192
_PROBES = 16


@dataclass(frozen=True, kw_only=True)
class LocatedConfig(EditorConfig):
    """Settings of all methods that locate a fact and then write it.

    Attributes:
        steps, learning_rate, weight_decay, clamp, kl_factor, stop_loss: of the search for v*, see `ValueSettings`.
        corpus: text file for the statistics of ordinary keys; None uses errata's built-in texts.
        tokens_per_width: token budget for them as a multiple of the key width.
        contexts: how many texts of the model's own are put in front of the prompt.
        protect_past: "cache" keeps the keys of edits, and later edits spare them.
        anchor_norms: give every v* the norm that values have on the unedited model.
        full_forward: search v* through whole forward passes (slow; for comparison).
    """

    adjustable: ClassVar[frozenset[str]] = EditorConfig.adjustable | {"contexts"}

    steps: int = 25
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 0.75
    kl_factor: float = 0.0625
    stop_loss: float = 0.05
    corpus: str | None = None
    tokens_per_width: float = 20.0
    contexts: int = 5
    protect_past: Literal["none", "cache"] = "none"
    anchor_norms: bool = False
    full_forward: bool = False


C = TypeVar("C", bound=LocatedConfig)


class Located(Editor[C]):
    """Writes facts into MLP output projections by solving for the change of weight."""

    needs_subject = True

    # --- what a method defines --------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def _chosen(self) -> tuple[int, ...]:
        """The layers to edit, as they are given in the settings."""

    @abc.abstractmethod
    def _texts(self) -> tuple[str, ...]:
        """All texts that may stand in front of a prompt."""

    @abc.abstractmethod
    def _weights(self, count: int) -> Tensor:
        """What the keys of a prompt weigh in their mean, [count], the bare prompt's first."""

    @abc.abstractmethod
    def _ridge(self, layer: int) -> float:
        """ρ of `solving.solve`."""

    @abc.abstractmethod
    def _past_weight(self, layer: int) -> float:
        """What ordinary keys weigh against one of an earlier edit."""

    @property
    def _uses_statistics(self) -> bool:
        return True

    def _metric(self, layer: int) -> Metric:
        """C⁻¹ of a layer's keys."""
        return self._statistics[layer].solve

    @property
    def _acts_on(self) -> Literal["mlp", "residual"]:
        """Where v* is sought, see `ValueSettings`."""
        return "residual"

    def _missing(self, value: TargetValue) -> Tensor:
        """What the one edited layer lacks of v*, [hidden]."""
        return value.delta

    def _solve(self, layer: int, residual: Tensor, keys: Sequence[Tensor]) -> tuple[Solution, Tensor]:
        """The change of one layer, and the keys [width, edits] it was solved with.

        Args:
            residual: [hidden, edits]; keys: per edit, [prompts, width], the bare prompt first.
        """
        mean = torch.stack([self._weights(len(own)) @ own for own in keys], dim=1)
        return solve(residual, mean, self._metric(layer), self._ridge(layer), self._pasts.get(layer)), mean

    # --- what is common ---------------------------------------------------------------------------------------------

    @property
    def _layers(self) -> tuple[int, ...]:
        return tuple(sorted({self.model.anatomy.layer(layer) for layer in self._chosen}))

    def _path(self, layer: int) -> str:
        return self.model.anatomy.mlp_output[layer]

    @property
    def _delta(self) -> DeltaAdapter:
        assert isinstance(self.adapter, DeltaAdapter)
        return self.adapter

    def _new_adapter(self) -> DeltaAdapter:
        paths = [self._path(layer) for layer in self._layers]
        return DeltaAdapter.for_layers(self.model, paths, self.name, self.config.to_record())

    def _prepare(self, progress: Progress) -> None:
        config, layers = self.config, self._layers
        self._statistics: dict[int, KeyStatistics] = {}
        with self.model.bare():  # all of this belongs to the base model, whatever is attached to it
            self._place = self._acts_on
            if self._place == "residual" and not _passes_on(self.model, layers[-1]):
                if len(layers) > 1:
                    raise ConfigError(
                        f"{self.model.model_id} does not add what its MLPs put out to the residual stream as it is, so "
                        f"a change cannot be spread over layers {', '.join(map(str, layers))}; give one of them"
                    )
                self._place = "mlp"
            if "contexts" not in self._delta.notes:
                self._delta.notes["contexts"] = list(self._texts())
            if self._uses_statistics:
                width = max(self.model.anatomy.key_width[layer] for layer in layers)
                if config.corpus is None:
                    # Built-in texts have about twenty tokens each.
                    texts = plain_texts(max(2000, int(config.tokens_per_width * width / 8)))
                else:
                    texts = corpus_texts(config.corpus)
                plan = StatisticsPlan(tokens_per_width=config.tokens_per_width)
                self._statistics = key_statistics(self.model, layers, texts, plan, progress=progress)
            if config.anchor_norms and "value_norm" not in self._delta.notes:
                self._delta.notes["value_norm"] = self._usual_norm()
        protects = config.protect_past == "cache"
        self._pasts = {layer: PastKeys(self._metric(layer), self._past_weight(layer)) for layer in layers if protects}

    def _memory_to_prepare(self) -> list[MemoryPart]:
        squares = [8 * self.model.anatomy.key_width[layer] ** 2 for layer in self._layers]
        if not self._uses_statistics:
            return []
        fewer = "edit fewer layers"
        return [
            MemoryPart("second moments of keys, with their factors", 2 * sum(squares), fewer, on_host=True),
            MemoryPart("making these", 2 * max(squares), fewer, on_host=True),
            reading(self.model, StatisticsPlan.batch_tokens),
        ]

    def _memory_to_write(self, edits: Sequence[Edit]) -> list[MemoryPart]:
        # v* is sought in batches of so many tokens, or of one edit where that is longer.
        blocks = self.model.layer_count - self._layers[-1]
        one, batch = self._backward_pass(edits[:1], blocks), self._backward_pass(edits, blocks)
        most = backward_pass(self.model, ValueSettings.batch_tokens // 16, 16, blocks, one.remedy)
        together = max(one, min(batch, most, key=lambda part: part.size), key=lambda part: part.size)
        kept = 2 if self.config.protect_past == "cache" else 1
        return [together, *self._memory_of_changes(len(edits), kept)]

    @property
    def _contexts(self) -> list[str]:
        contexts: list[str] = self._delta.notes["contexts"][: self.config.contexts]
        return contexts

    def _values(self, edits: Sequence[Edit]) -> list[TargetValue]:
        config = self.config
        settings = ValueSettings(
            config.steps,
            config.learning_rate,
            config.weight_decay,
            config.clamp,
            config.kl_factor,
            config.stop_loss,
            acts_on=self._place,
        )
        last, full = self._layers[-1], config.full_forward
        return find_target_values(self.model, last, edits, self._contexts, settings, full_forward=full)

    def _usual_norm(self) -> float:
        """The mean norm of what the last layer's MLP should put out, over facts that nobody has asked for."""
        sets = paraphrase_sets(_PROBES)
        asked = [
            Edit(prompt=one.prompt, target=other.subject, subject=one.subject)
            for one, other in zip(sets, [*sets[1:], sets[0]], strict=True)
        ]
        return sum(float((value.outputs[0] + value.delta).norm()) for value in self._values(asked)) / len(asked)

    def _anchored(self, value: TargetValue) -> TargetValue:
        put_out = value.outputs[0] + value.delta
        scaled = put_out * (self._delta.notes["value_norm"] / float(put_out.norm()))
        return replace(value, delta=scaled - value.outputs[0])

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        layers, values = self._layers, self._values(edits)
        if self.config.anchor_norms:
            values = [self._anchored(value) for value in values]
        for layer, past in self._pasts.items():
            past.follow(self._delta.stored_keys(self._path(layer)))
        wanted = _columns([value.initial + value.delta for value in values])
        solutions: dict[int, Solution] = {}
        changes: list[WeightChange] = []
        for number, layer in enumerate(layers):
            if len(layers) == 1:
                keys = [value.keys.double().cpu() for value in values]
                residual = _columns([self._missing(value) for value in values])
            else:
                keys, present = self._read(edits, layer, solutions)
                residual = (wanted - present) / (len(layers) - number)
            solutions[layer], solved = self._solve(layer, residual, keys)
            changes += self._changes(layer, edits, solutions[layer], solved)
        prompts = [edit.prompt for edit in edits]
        of = [*range(len(edits))] * len(layers)
        self._delta.add(self._delta.measured(changes, prompts, self.model, of))
        return Written(
            tuple(value.steps for value in values), condition=max(found.condition for found in solutions.values())
        )

    def _changes(self, layer: int, edits: Sequence[Edit], solution: Solution, keys: Tensor) -> list[WeightChange]:
        """A solution as one change per edit, so that each can be subtracted."""
        left, right, kept = (each.float() for each in (solution.left, solution.right, keys))
        return [
            WeightChange(
                self._path(layer),
                (edit.id,),
                left[:, n : n + 1],
                right[:, n : n + 1],
                keys=kept[:, n : n + 1] if self._pasts else None,
            )
            for n, edit in enumerate(edits)
        ]

    @torch.no_grad()
    def _read(
        self, edits: Sequence[Edit], layer: int, solutions: Mapping[int, Solution]
    ) -> tuple[list[Tensor], Tensor]:
        """What stands at the subjects' last tokens while the solutions for lower layers are in place.

        Returns:
            per edit, the keys of a layer [prompts, width], the bare prompt first; and what leaves the last edited block
            in the bare prompts, [hidden, edits]; float64.
        """
        model, last = self.model, self.model.anatomy.blocks[self._layers[-1]]
        prompts = [text for edit in edits for text in (edit.prompt, *(f"{c} {edit.prompt}" for c in self._contexts))]
        each = len(self._contexts) + 1
        subjects = [model.subject_span(text, edits[n // each].subject or "") for n, text in enumerate(prompts)]
        keys: list[Tensor] = [torch.empty(0)] * len(prompts)
        leaving = list(keys)
        found: dict[str, Any] = {}

        def at_end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found["leaving"] = output[0] if isinstance(output, tuple) else output

        for indices in length_batches([len(subject.ids) for subject in subjects], _BATCH_TOKENS):
            batch = model.batch([model.passage(prompts[n]) for n in indices], side="right")
            with (
                adding(model.model, {self._path(one): solution for one, solution in solutions.items()}, len(indices)),
                capturing_inputs(model.model, [self._path(layer)], len(indices)) as inputs,
                probing(model.model, after={last: at_end}),
            ):
                model.trunk_states(batch)
            for row, n in enumerate(indices):
                place = row, subjects[n].last
                keys[n] = inputs[self._path(layer)][place].double().cpu()
                leaving[n] = found["leaving"][place].double().cpu()
        return [torch.stack(keys[n : n + each]) for n in range(0, len(keys), each)], _columns(leaving[::each])


def _columns(vectors: Sequence[Tensor]) -> Tensor:
    """[size, vectors], float64."""
    return torch.stack([vector.double().cpu() for vector in vectors], dim=1)


def _passes_on(model: EditableModel, layer: int) -> bool:
    """Whether a block adds what its MLP puts out to the residual stream as it is; found by trying, see `Tail`."""
    verdict = f"additive {layer}"
    if verdict not in model.verdicts:
        Tail(model, layer).record(model.batch([model.passage("The capital of France", "Paris")]))
    return model.verdicts[verdict]
