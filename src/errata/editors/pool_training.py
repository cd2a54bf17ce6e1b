"""How a model learns to write a memory pool and to read it: MemoryLLM's three routines (2402.04624, section 3).

A step is a stream of updates. Its texts are compressed side by side, each on top of new tokens of another one; they
come into a pool one after the other, in random order, and each block drops slots as `adapters.pool` does. Then it is
asked about the texts, or has to go on with them:

    NEW KNOWLEDGE         some of the questions are answered from the new tokens of their own text alone, at first most
                          of them, the others from the whole pool, slots of all other texts beside
    CONTINUOUS CONTEXTS   some texts are long: segments that follow each other, each an update on top of the one before.
                          More segments as training goes on
    ANTI-FORGETTING       a question to the whole pool comes as many updates after its text as the order happens to
                          put between them, so part of the text's slots has been dropped

    L = −log p(answer) + c · KL(p₀ ‖ p) − λ · log a,   p₀ what the model says of other things without a pool,
        a the share of the attention to slots that goes to those of the text that answers, per block and prompt token,
        a mean over heads

The network (`adapters.pool_network`) learns through both passes: what is written, and how it is read.

What we do differently. The paper runs the routines one after the other on one text at a time, and carries one pool from
step to step. Here a step has a pool of its own, made by its own texts: gradients reach all that is read, two batched
passes serve a whole stream, and a run that was interrupted goes on as if it had not been. Slots older than the step's
first update are absent, so a pool is as full as its updates make it. The last two terms are not in the paper, which
trains on corpora that show what a model must not forget, and begins with a model that can find a name in what it has
read. Atlas has to learn that, and does so faster when it is told where to look, as M+ tells its retriever.
"""

from __future__ import annotations

import abc
import copy
import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errata.adapters.pool import default_spacing
from errata.adapters.pool_network import PoolNetwork
from errata.editors.layers import shape_key
from errata.editors.pool_stream import PoolPasses, survivors
from errata.editors.pool_texts import Asked, Reading
from errata.editors.training import TrainingConfig, load_trained
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.generation import end_token
from errata.model.tokens import Passage
from errata.progress import Progress
from errata.threads import side_by_side

__all__ = ["OF_BEFORE", "PoolLearning", "PoolTraining", "StreamLearning"]

Found = TypeVar("Found")

_RISING = 100  # steps
OF_BEFORE = ("digest", "command", "data", "steps", "validation", "begun_with")  # of a network that is gone on with
_LEAST = 1e-4  # beside a share whose logarithm is taken

_PUBLISHED: dict[tuple[str, int, int], dict[str, Any]] = {
    # How far they were tried: docs/methods/memoryllm.md.
    ("llama", 6, 256): {
        "slots": 480,
        "new": 24,
        "spacing": 0.05,
        "rank": 64,
        "batch_size": 20,
        "batch_size_first": 12,
        "streams": 2,
        "warm": 3,
        "questions": 6,
        "others": 4,
        "look": 2.0,
        "learning_rate": 1e-3,
        "steps": 2000,
        "long": 0.1,
        "segments": 2,
        "edits": 0.1,
        "validation": 100,
        "validate_every": 100,
        "source": "ours, tried on atlas",
    },
}


@dataclass(frozen=True, kw_only=True)
class PoolTraining(TrainingConfig):
    """Settings of the training for MemoryLLM.

    Attributes:
        begin_with: folder of a network for this model from which the training goes on, with steps, data and settings of
            its own; None to begin with the model as it is. Give another seed for other documents.
        batch_size: texts of one stream; batch_size_first: the same in the first three quarters of the steps, in which
            reading is learned and a large pool would only cost time; None for no difference.
        streams: of one step, each with a pool of its own. On a CPU they are learned from side by side, each on its
            share of the cores, which small models make better use of.
        slots, new: N and K, of the pools that it is trained for.
        spacing: between neighbouring slots, see `PoolAdapter.for_model`.
        rank: of the changes of weight.
        alone: share of questions that are answered from the new tokens of their text alone; alone_first: the same in
            the first step, from where it falls for a quarter of the steps.
        fewer: share of the other questions whose pool holds some of the step's texts only, as a younger one would; from
            one text to all of them, each doubling as likely.
        long: share of texts that have several segments; segments: most that they have, reached after half of the steps.
        questions: asked about a text, at most.
        alike: share of steps whose documents all tell the same things of their subjects: an answer can only be found by
            the name, among as many as the pool holds texts.
        others: prompts about other things in a step; keep: c, the weight of their term.
        look: λ, the weight of the term that teaches to look for the text that answers, where a prompt names it.
        warm: texts of a step on top of whose new tokens the others are read.
        edits: share of texts that are the statement of one edit, where edits are at hand.
        half: make passes in bfloat16; the network itself stays in float32.
    """

    begin_with: str | None = None
    batch_size: int = 40
    batch_size_first: int | None = None
    streams: int = 1
    steps: int = 4000
    learning_rate: float = 1e-3
    clip_norm: float = 1.0
    slots: int = 7680
    new: int = 256
    spacing: float | None = None
    rank: int = 8
    alone: float = 0.3
    alone_first: float = 0.8
    fewer: float = 0.5
    long: float = 0.2
    segments: int = 4
    questions: int = 2
    alike: float = 0.7
    others: int = 16
    keep: float = 1.0
    look: float = 0.0
    warm: int = 8
    edits: float = 0.2
    half: bool = True
    validation: int = 160
    validate_every: int = 200
    patience: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.new <= self.slots:
            raise ConfigError(f"new={self.new} must be from 1 to slots={self.slots}: an update takes that many")
        if min(self.rank, self.segments, self.questions, self.warm, self.streams) < 1 or self.others < 0:
            raise ConfigError("rank, segments, questions, warm and streams must be at least 1, others at least 0")
        for name in ("alone", "alone_first", "fewer", "long", "alike", "edits"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} is a share, from 0 to 1")
        for name in ("batch_size", "batch_size_first"):
            if (size := getattr(self, name)) is not None and size <= self.warm:
                raise ConfigError(f"{name}={size} must be more than warm={self.warm}")

    def texts_at(self, step: int) -> int:
        """Texts of a step, of all its streams."""
        first = self.batch_size_first if 4 * step < 3 * self.steps else None
        return self.streams * (first or self.batch_size)

    def segments_at(self, step: int) -> int:
        """The curriculum: most segments of a text at a step."""
        return min(self.segments, 1 + int(self.segments * step / max(1, self.steps // 2)))

    def alone_at(self, step: int) -> float:
        """The share of questions that are answered from the new tokens alone, at a step."""
        over = min(1.0, 4 * step / self.steps)
        return (1 - over) * self.alone_first + over * self.alone

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        if shape_key(model) == ("llama", 32, 4096):
            return {"slots": 7680, "new": 256, "learning_rate": 4.6e-6, "source": "MemoryLLM-7B (2402.04624)"}
        return _PUBLISHED.get(shape_key(model))

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        """The paper's proportions: K of the width as 256 of 4,096, N = 30 K."""
        new = max(1, model.anatomy.hidden_size // 16)
        return {"slots": 30 * new, "new": new, "source": "K and N in the paper's proportions, the rest ours"}

    def learning_rate_at(self, step: int) -> float:
        """Rises over the first steps, then falls to a tenth along a cosine."""
        over = min(1.0, step / self.steps)
        falling = 0.55 + 0.45 * math.cos(math.pi * over)
        return self.learning_rate * min(1.0, (step + 1) / _RISING) * falling

    def to_record(self) -> dict[str, Any]:
        """Where nothing is begun with, nothing is said of it."""
        record = super().to_record()
        return record if self.begin_with else {n: value for n, value in record.items() if n != "begin_with"}

    def segments_of(self, step: int, rng: random.Random) -> int:
        """How many segments a text of a step has."""
        most = self.segments_at(step)
        return rng.randint(2, most) if most > 1 and rng.random() < self.long else 1


class StreamLearning(abc.ABC):
    """What the trainings of a pool's network and of its retriever share, as `run_training` takes them.

    Attributes:
        model: for which; network: what is trained; config: its settings.
    """

    model: EditableModel
    network: nn.Module
    config: PoolTraining

    def __init__(self) -> None:
        self._twins: list[StreamLearning] = []

    @abc.abstractmethod
    def _scores(self, reading: Reading, rng: random.Random) -> dict[str, Tensor]:
        """The loss of a step, "loss", and shares of what was right; of what was not asked there is none."""

    def prepare(self, data: Any, progress: Progress) -> None:  # noqa: B027  # nothing has to be done for any of them
        """Nothing: it begins as the model is."""

    def optimizer(self) -> torch.optim.Adam:
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=self.config.learning_rate, betas=(0.9, 0.98))
        return self._optimizer

    def learn(self, batch: Reading, rng: random.Random) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(batch.step or 0)
        learned = [one for one in self.network.parameters() if one.requires_grad]

        def gradients(one: StreamLearning, part: Reading, own: random.Random) -> tuple[float, tuple[Tensor, ...]]:
            with torch.enable_grad():
                loss = one._scores(part, own)["loss"] / self.config.streams
                return float(loss.detach()), torch.autograd.grad(loss, learned, materialize_grads=True)

        found = self._each(gradients, batch.parts(self.config.streams), rng)
        for number, parameter in enumerate(learned):
            parameter.grad = functools.reduce(torch.add, (its[number] for _, its in found))
        return sum(loss for loss, _ in found)

    def _each(self, work: Callable[..., Found], parts: Sequence[Reading], rng: random.Random) -> list[Found]:
        """What `work(learning, part, rng)` finds of each part, side by side where that makes better use of the cores.

        The same, bit for bit, whatever the order in which they end: each part has draws of its own.
        """
        draws = [random.Random(rng.getrandbits(64)) for _ in parts]
        if len(parts) == 1 or self.model.device.type != "cpu":
            return [work(self, part, own) for part, own in zip(parts, draws, strict=True)]
        while len(self._twins) < len(parts):
            self._twins.append(self._twin())
        return side_by_side(work, self._twins, parts, draws)

    @abc.abstractmethod
    def _twin(self) -> StreamLearning:
        """One that learns the same network on a copy of the model, which another thread may run."""

    @torch.no_grad()
    def examine(self, validation: Reading) -> dict[str, float]:
        """Means over readings of the size of a stream; what is left over counts only where there is nothing else."""
        size, found = self.config.batch_size, dict[str, list[float]]()
        for start in range(0, len(validation), size):
            texts = validation.texts[start : start + size]
            if len(texts) < size and found:
                break
            scores = self._scores(Reading(texts, validation.others), random.Random(f"examine {start}"))
            for name, score in scores.items():
                found.setdefault(name, []).append(float(score))
        return {name: sum(values) / len(values) for name, values in found.items()}


class PoolLearning(StreamLearning):
    """The training of a pool's network."""

    network: PoolNetwork

    def __init__(self, model: EditableModel, config: PoolTraining) -> None:
        super().__init__()
        self.model, self.config = model, config
        generator = torch.Generator().manual_seed(config.seed)
        self.network = PoolNetwork.to_train(model, config.new, config.rank, generator).to(model.device)
        self._before: dict[str, Any] = {}
        spacing = default_spacing(model, config.slots)
        if config.begin_with is not None:
            tensors, record = load_trained(Path(config.begin_with), "memoryllm", model)
            own = {name: tensor for name, tensor in tensors.items() if not name.startswith("retriever ")}
            sizes = {name: tuple(tensor.shape) for name, tensor in own.items()}
            if sizes != {name: tuple(tensor.shape) for name, tensor in self.network.state().items()}:
                raise ConfigError(
                    f"the network in {config.begin_with} has other sizes (new={record['new']}) than new={config.new} "
                    f"and rank={config.rank}; give those it was trained with"
                )
            self.network.load(own)
            self._before = {name: record[name] for name in OF_BEFORE if name in record}
            spacing = min(spacing, record["spacing"])
        self.spacing = spacing if config.spacing is None else config.spacing
        self.passes = PoolPasses(model, self.network, slots=config.slots, spacing=self.spacing, warm=config.warm)

    def _twin(self) -> PoolLearning:
        made = copy.copy(self)
        made.passes = self.passes.twin()
        made.model, made.network = made.passes.model, made.passes.network
        return made

    # --- a step -------------------------------------------------------------------------------------------------

    def _passage(self, asked: Asked) -> Passage:
        return (
            self._ending(asked.prompt, asked.answer) if asked.ends else self.model.passage(asked.prompt, asked.answer)
        )

    def _ending(self, prompt: str, answer: str) -> Passage:
        """With the token behind the answer that says that it ends, if the model has one."""
        made, end = self.model.passage(prompt, answer), end_token(self.model)
        return made if end is None else Passage(made.prompt, (*made.answer, end))

    def _scores(self, reading: Reading, rng: random.Random) -> dict[str, Tensor]:
        """The loss; "alone" and "pool", the shares of questions whose answer is the first choice at every place, with
        the text's own tokens and with all; "kept", the share of places of other things whose first choice stayed."""
        config, model = self.config, self.model
        beside = [self._ending(prompt, answer) for prompt, answer in reading.others]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=config.half):
            before = self._said_without(beside) if beside else None
            with self.network.learning(model, torch.bfloat16 if config.half else model.dtype):
                return self._scores_in_place(reading, beside, before, rng)

    @torch.no_grad()
    def _said_without(self, passages: Sequence[Passage]) -> Tensor:
        """Log-probabilities where answers are predicted, [n, vocabulary], of the model as it is."""
        batch = self.model.batch(passages, side="right")
        rows, columns, _ = batch.answer_places()
        with self.model.bare():
            states = self.model.trunk_states(batch)
        said: Tensor = self.model.head(states[rows, columns]).float().log_softmax(-1)
        return said

    def _scores_in_place(
        self, reading: Reading, beside: Sequence[Passage], before: Tensor | None, rng: random.Random
    ) -> dict[str, Tensor]:
        config, model, texts = self.config, self.model, reading.texts
        by_itself = config.alone if reading.step is None else config.alone_at(reading.step)
        stream = self.passes.stream(texts, rng)
        updates = stream.made.shape[1]
        alone: list[tuple[int, Asked]] = []
        pooled: list[tuple[int, Asked]] = []
        for number, text in enumerate(texts):
            for asked in rng.sample(text.asked, min(config.questions, len(text.asked))):
                (alone if rng.random() < by_itself else pooled).append((stream.number[number, asked.segment], asked))
        seed = rng.randrange(2**62)
        losses, right = [], {}
        if alone:
            used = sorted({number for number, _ in alone})
            of_used = self.passes.prefixes([layer[used] for layer in stream.made])
            rows = torch.tensor([used.index(number) for number, _ in alone])
            theirs = [one.of(rows) for one in of_used]
            said = self.passes.read(theirs, [self._passage(asked) for _, asked in alone])
            losses.append(_per_row(said.logits, said.labels, said.rows, len(alone)))
            right["alone"] = _all_right(said.logits, said.labels, said.rows, len(alone))
        if pooled or beside:
            left = survivors(updates, config.slots, config.new, model.layer_count, seed)
            flat = stream.made.flatten(1, 2)
            kept_of = [flat[layer, kept.to(flat.device)].unsqueeze(0) for layer, kept in enumerate(left)]
            whole = self.passes.prefixes(kept_of)
            asking = [number for number, _ in pooled]
            seen = self._seen(asking, len(beside), updates, rng)
            for one, kept in zip(whole, left, strict=True):
                one.visible = F.pad(seen[:, kept // config.new], (1, 0), value=True).to(one.keys.device)
            said = self.passes.read(whole, [*(self._passage(asked) for _, asked in pooled), *beside])
            own = (said.rows < len(pooled)).to(said.logits.device)
            logits, labels, rows = said.logits, said.labels, said.rows
        if pooled:
            losses.append(_per_row(logits[own], labels[own], rows[own.cpu()], len(pooled)))
            right["pool"] = _all_right(logits[own], labels[own], rows[own.cpu()], len(pooled))
        loss = torch.cat(losses).mean()
        if pooled and config.look:
            tokens = said.askers < len(pooled)
            wanted = torch.tensor(asking)[said.askers[tokens]]
            found = [
                _looked_at_own(one[tokens], wanted, kept // config.new)
                for one, kept in zip(said.looked, left, strict=True)
            ]
            loss = loss + config.look * torch.stack(found).mean()
            right["looked"] = torch.stack(found).mean().neg().exp()
        if before is not None:
            after = logits[~own].log_softmax(-1)
            loss = loss + config.keep * (before.exp() * (before - after)).sum(-1).mean()
            right["kept"] = (before.argmax(-1) == after.argmax(-1)).float().mean()
        return {"loss": loss, **right}

    def _seen(self, own: Sequence[int], others: int, updates: int, rng: random.Random) -> Tensor:
        """[questions, updates] bool, what each question's pool holds: all updates, or its own one and some others.

        Args:
            own: the update that answers, for each question about a text; others: questions that follow, about no text.
        """
        seen = torch.ones(len(own) + others, updates, dtype=torch.bool)
        for row in seen:
            if rng.random() < self.config.fewer:
                many = min(updates, round(2 ** (rng.random() * math.log2(updates))))
                row[rng.sample(range(updates), updates - many)] = False
        seen[range(len(own)), own] = True
        return seen

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The factors in bfloat16, which is enough for them."""
        config = self.config
        tensors = {n: t.bfloat16() if n.startswith(("left", "right")) else t for n, t in self.network.state().items()}
        before = {"begun_with": self._before} if self._before else {}
        return tensors, {"slots": config.slots, "new": config.new, "spacing": self.spacing, **before}


def _looked_at_own(looked: Tensor, own: Tensor, wrote: Tensor) -> Tensor:
    """−log of the share of the attention to slots that goes to those of the right update, a mean over tokens.

    Args:
        looked: [tokens, heads, 1 + slots], the first place being that of the beginning vector.
        own: [tokens], the update that answers the question that a token is of.
        wrote: [slots], the update that wrote each slot.
    """
    mine = (wrote == own.unsqueeze(1)).to(looked.device)
    slots = looked[..., 1:].float()
    share = (slots * mine.unsqueeze(1)).sum(-1) / slots.sum(-1).clamp(min=_LEAST)
    there = mine.any(1)  # of some text, all slots may have been dropped
    return -(share.mean(1)[there] + _LEAST).log().mean() if bool(there.any()) else looked.new_zeros(())


def _per_row(logits: Tensor, labels: Tensor, rows: Tensor, count: int) -> Tensor:
    """[count], the mean loss of each row."""
    losses = F.cross_entropy(logits, labels.to(logits.device), reduction="none")
    rows = rows.to(losses.device)
    return losses.new_zeros(count).index_add(0, rows, losses) / torch.bincount(rows, minlength=count)


def _all_right(logits: Tensor, labels: Tensor, rows: Tensor, count: int) -> Tensor:
    """Share of rows in which every label is the first choice."""
    wrong = rows.to(logits.device)[logits.argmax(-1) != labels.to(logits.device)]
    return (torch.bincount(wrong, minlength=count) == 0).float().mean()
