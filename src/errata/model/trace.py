"""Causal tracing: which states of a model carry what it knows of a subject (ROME, 2202.05262, section 2).

A fact that the model knows is asked with noise on the embeddings of its subject, so that the model cannot tell any
more. Then single states of the undisturbed run are put back, and what returns of the answer's probability is their
*indirect effect*:

    IE(state) = P(answer | noise, state put back) − P(answer | noise)

States are those of one token in one layer: what leaves the block ("hidden"), what its MLP adds ("mlp"), what its
attention adds ("attention"). One MLP or attention alone moves little in a deep model, so that those of some layers
around are put back together, as in the paper. Averaged over facts, the effects of MLPs at the subject's last token say
where subjects are looked up, which is where ROME and its kin write. (What is stored where and what is best edited
where are not the same question, 2301.04213: this is where to begin, and measuring edits decides.)

Knows forward passes and facts. Knows nothing of editors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from errata.edit import Edit
from errata.errors import ConfigError, EditError
from errata.model.probes import by_rows, probing
from errata.model.scoring import forced_answers
from errata.model.tokens import Passage
from errata.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from errata.model.editable import EditableModel

__all__ = ["KINDS", "PLACES", "CausalTrace", "Restoration", "TracePlan", "causal_trace", "restored"]

Kind = Literal["hidden", "mlp", "attention"]
KINDS: tuple[Kind, ...] = ("hidden", "mlp", "attention")
PLACES = ("subject's last token", "last token")


@dataclass(frozen=True)
class TracePlan:
    """How facts are traced.

    Attributes:
        noise: standard deviation of the noise as a multiple of that of the subjects' embeddings (the paper's 3).
        samples: of noise for each fact (the paper's 10).
        window: share of all layers whose MLPs or attentions are put back together, at least one (the paper's 10 of 48).
        batch_tokens: tokens per forward pass.
    """

    noise: float = 3.0
    samples: int = 10
    window: float = 10 / 48
    seed: int = 0
    batch_tokens: int = 8192


@dataclass(frozen=True)
class CausalTrace:
    """Average indirect effects over the facts that a model knows.

    Attributes:
        asked: facts that were asked; known: of these, those the model knows, which were traced.
        clean, corrupted: mean probability of the answer, undisturbed and with noise on the subject.
        noise: standard deviation of the noise.
        window: layers whose MLPs or attentions were put back together.
        effects, errors: mean indirect effect and its standard error, by place, kind and layer.
    """

    asked: int
    known: int
    clean: float
    corrupted: float
    noise: float
    window: int
    effects: dict[str, dict[str, tuple[float, ...]]]
    errors: dict[str, dict[str, tuple[float, ...]]]

    @property
    def layer(self) -> int:
        """Where the MLP has the largest effect at the subject's last token: where ROME writes."""
        found = self.effects[PLACES[0]]["mlp"]
        return max(range(len(found)), key=lambda layer: found[layer])

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers around that one whose MLPs have at least half of its effect: where MEMIT spreads its writing."""
        found, first, last = self.effects[PLACES[0]]["mlp"], self.layer, self.layer
        while first > 0 and found[first - 1] >= found[self.layer] / 2:
            first -= 1
        while last + 1 < len(found) and found[last + 1] >= found[self.layer] / 2:
            last += 1
        return tuple(range(first, last + 1))

    def to_record(self) -> dict[str, Any]:
        """As JSON holds it."""
        kept = {name: getattr(self, name) for name in ("asked", "known", "clean", "corrupted", "noise", "window")}
        return {**kept, "layer": self.layer, "layers": self.layers, "effects": self.effects, "errors": self.errors}


@dataclass(frozen=True)
class Restoration:
    """One run with noise: with which sample of it, and which states are put back.

    Attributes:
        sample: number of the sample.
        states: kind, layer and column of each.
    """

    sample: int
    states: tuple[tuple[Kind, int, int], ...] = ()


def causal_trace(
    model: EditableModel, facts: Sequence[Edit], plan: TracePlan | None = None, progress: Progress = NO_PROGRESS
) -> CausalTrace:
    """Trace the facts that the model knows. It is the base model that is traced, whatever is attached to it.

    Args:
        facts: those with a subject and a `ground_truth`, the answer of the unedited model, are asked.

    Raises:
        ConfigError: a model that reads prompts with an encoder.
        EditError: none of the facts is known.
        SpanError: a subject does not occur in its prompt.
    """
    plan = plan or TracePlan()
    if model.is_encoder_decoder:
        raise ConfigError(
            f"{type(model.model).__name__} reads prompts with an encoder; causal tracing takes prompt and answer to be "
            "read in one row"
        )
    usable = [(fact, fact.subject, fact.ground_truth) for fact in facts if fact.subject and fact.ground_truth]
    with model.bare():
        passages = [model.passage(fact.prompt, answer) for fact, _, answer in usable]
        answers = forced_answers(model, passages, batch_tokens=plan.batch_tokens)
        spans = [
            (model.subject_span(fact.prompt, subject), passage)
            for (fact, subject, _), passage, found in zip(usable, passages, answers, strict=True)
            if found.predicted == passage.answer
        ]
        if not spans:
            raise EditError(
                f"the model knows none of the {len(usable)} facts with a subject and an answer (ground_truth) that it "
                "was asked; give facts that it knows"
            )
        noise = plan.noise * _spread(model, [id for span, _ in spans for id in span.ids[span.first : span.last + 1]])
        depth, generator = model.layer_count, torch.Generator().manual_seed(plan.seed)
        window = max(1, round(plan.window * depth))
        progress.start("causal trace", len(spans))
        traced = []
        for span, passage in spans:
            columns = {PLACES[0]: span.last, PLACES[1]: len(passage.prompt) - 1}
            single = [
                tuple((kind, near, column) for near in _around(layer, 1 if kind == "hidden" else window, depth))
                for column in columns.values()
                for kind in KINDS
                for layer in range(depth)
            ]
            runs = [Restoration(n, states) for n in range(plan.samples) for states in ((), *single)]
            width = model.model.get_input_embeddings().weight.shape[1]
            drawn = noise * torch.randn(plan.samples, span.last + 1 - span.first, width, generator=generator)
            clean, found = restored(model, passage, span.first, drawn, runs, batch_tokens=plan.batch_tokens)
            traced.append(torch.cat([clean[None], found.view(plan.samples, -1).mean(0)]))
            progress.advance(1)
    probabilities = torch.stack(traced)
    effects = probabilities[:, 2:] - probabilities[:, 1:2]
    errors = effects.std(0, correction=min(1, len(effects) - 1)) / len(effects) ** 0.5
    clean, corrupted = probabilities[:, :2].mean(0).tolist()
    by_place = (_by_place(values, depth) for values in (effects.mean(0), errors))
    return CausalTrace(len(usable), len(spans), clean, corrupted, noise, window, *by_place)


def _by_place(values: Tensor, depth: int) -> dict[str, dict[str, tuple[float, ...]]]:
    shaped = values.view(len(PLACES), len(KINDS), depth).tolist()
    return {
        place: {kind: tuple(layers) for kind, layers in zip(KINDS, kinds, strict=True)}
        for place, kinds in zip(PLACES, shaped, strict=True)
    }


def _around(layer: int, window: int, depth: int) -> range:
    """The layers of a window around one, as far as there are any."""
    return range(max(0, layer - window // 2), min(depth, layer - window // 2 + window))


@torch.no_grad()
def _spread(model: EditableModel, ids: Sequence[int]) -> float:
    """Standard deviation of the embeddings of tokens, over all their numbers."""
    embedding = model.model.get_input_embeddings()
    return float(embedding(torch.tensor(ids, device=model.device)).float().std())


@torch.no_grad()
def restored(
    model: EditableModel,
    passage: Passage,
    first: int,
    noise: Tensor,
    runs: Sequence[Restoration],
    *,
    batch_tokens: int = 8192,
) -> tuple[Tensor, Tensor]:
    """Probabilities of a passage's answer: undisturbed, [], and in each of the runs with noise, [runs].

    Args:
        first: column from which on noise [samples, columns, width] is added to embeddings.
    """
    per_pass = max(1, batch_tokens // len(passage.ids) - 1)
    clean, found = torch.tensor(0.0), []
    for start in range(0, len(runs), per_pass):
        own = runs[start : start + per_pass]
        # The first row is undisturbed: what is put back is copied from there.
        batch = model.batch([passage] * (len(own) + 1), side="right")
        with probing(model.model, after=_disturbances(model, first, noise, own)):
            states = model.answer_states(batch)
        rows, columns, tokens = batch.answer_places()
        logits = model.head(states[rows.to(states.device), columns.to(states.device)]).float()
        scores = logits.log_softmax(-1).gather(1, tokens.to(logits.device).unsqueeze(1)).cpu()
        probabilities = scores.view(len(own) + 1, -1).sum(1).exp()
        clean = probabilities[0]
        found.append(probabilities[1:])
    return clean, torch.cat(found)


def _disturbances(
    model: EditableModel, first: int, noise: Tensor, runs: Sequence[Restoration]
) -> Mapping[str, Callable[..., Any]]:
    """Probes that add noise in all rows but the first one, and put back what each run puts back, by module."""
    anatomy, modules = model.anatomy, dict(model.model.named_modules())
    embedding = model.model.get_input_embeddings()
    paths = {"hidden": anatomy.blocks, "mlp": anatomy.mlp_output, "attention": anatomy.attention_output}
    by_path: dict[str, list[tuple[int, int]]] = {}
    for row, run in enumerate(runs, start=1):
        for kind, layer, column in run.states:
            by_path.setdefault(paths[kind][layer], []).append((row, column))
    added = noise[[run.sample for run in runs]]

    def disturb(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        disturbed = output.clone()
        disturbed[1:, first : first + added.shape[1]] += added.to(output)
        return disturbed

    def putting_back(places: Sequence[tuple[int, int]]) -> Callable[..., Any]:
        def put_back(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            rows, columns = torch.tensor(places, device=states.device).T
            changed = by_rows(states, len(runs) + 1).clone()
            changed[rows, columns] = changed[0, columns]
            changed = changed.reshape(states.shape)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return put_back

    probes = {path: putting_back(places) for path, places in by_path.items()}
    return {**probes, next(path for path, module in modules.items() if module is embedding): disturb}
