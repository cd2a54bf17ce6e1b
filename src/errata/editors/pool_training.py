"""How a model learns to write a memory pool and to read it: MemoryLLM's three routines (2402.04624, section 3).

A step is a stream of updates. Its texts are compressed side by side, each on top of new tokens of another one; they
come into a pool one after the other, in random order, and each block drops slots as `adapters.pool` does. Then it is
asked about the texts, or has to go on with them:

    NEW KNOWLEDGE         half of the questions are answered from the new tokens of their own text alone, the others
                          from the whole pool, slots of all other texts beside
    CONTINUOUS CONTEXTS   some texts are long: segments that follow each other, each an update on top of the one before.
                          More segments as training goes on
    ANTI-FORGETTING       a question to the whole pool comes as many updates after its text as the order happens to
                          put between them, so part of the text's slots has been dropped

    L = −log p(answer) + c · KL(p₀ ‖ p),   p₀ what the model says of other things without a pool

The network (`adapters.pool_network`) learns through both passes: what is written, and how it is read.

What we do differently. The paper runs the routines one after the other on one text at a time, and carries one pool from
step to step. Here a step has a pool of its own, made by its own texts: gradients reach all that is read, two batched
passes serve a whole stream, and a run that was interrupted goes on as if it had not been. Slots older than the step's
first update are absent, so a pool is as full as its updates make it. The last term is not in the paper, which trains on
corpora that show what a model must not forget.
"""

from __future__ import annotations

import abc
import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errata.adapters.pool import default_spacing
from errata.adapters.pool_network import PoolNetwork
from errata.editors.compression import Compression
from errata.editors.layers import shape_key
from errata.editors.training import TrainingConfig
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.prefixed_attention import Prefix
from errata.model.probes import probing
from errata.model.scoring import length_batches
from errata.model.tokens import Passage
from errata.progress import Progress

__all__ = ["Asked", "InventedTexts", "PoolLearning", "PoolTraining", "ReadText", "Reading", "TextData", "survivors"]

_EDITS = 6000
_RISING = 100  # steps
_TOGETHER, _READ_TOGETHER = 1024, 640  # tokens of one pass, of texts and of questions

_PUBLISHED: dict[tuple[str, int, int], dict[str, Any]] = {
    # How far they were tried: docs/methods/memoryllm.md.
    ("llama", 6, 256): {
        "slots": 640,
        "new": 32,
        "rank": 64,
        "batch_size": 24,
        "warm": 4,
        "questions": 3,
        "others": 8,
        "learning_rate": 2e-3,
        "steps": 1500,
        "long": 0.1,
        "segments": 2,
        "edits": 0.15,
        "validate_every": 100,
        "source": "ours, tried on atlas",
    },
}


@dataclass(frozen=True)
class Asked:
    """Something to be said after a text was read: a prompt, which may be empty, and what follows it.

    Attributes:
        segment: number of the text's segment that says it.
    """

    prompt: str
    answer: str
    segment: int = 0


@dataclass(frozen=True)
class ReadText:
    """A text, in segments that are read one after the other, and what is asked about it."""

    segments: tuple[str, ...]
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class Reading:
    """What a step reads, and is asked.

    Attributes:
        others: prompts about other things and what follows there, to be said as without a pool; there may be none.
        step: which it is, for the learning rate.
    """

    texts: tuple[ReadText, ...]
    others: tuple[tuple[str, str], ...] = ()
    step: int = 0

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, kw_only=True)
class PoolTraining(TrainingConfig):
    """Settings of the training for MemoryLLM.

    Attributes:
        batch_size: texts of one step.
        slots, new: N and K, of the pools that it is trained for.
        spacing: between neighbouring slots, see `PoolAdapter.for_model`.
        rank: of the changes of weight.
        alone: share of questions that are answered from the new tokens of their text alone.
        fewer: share of the other questions whose pool holds some of the step's texts only, as a younger one would; from
            one text to all of them, each doubling as likely.
        long: share of texts that have several segments; segments: most that they have, reached after half of the steps.
        questions: asked about a text, at most.
        others: prompts about other things in a step; keep: c, the weight of their term.
        warm: texts of a step on top of whose new tokens the others are read.
        edits: share of texts that are the statement of one edit, where edits are at hand.
        half: make passes in bfloat16; the network itself stays in float32.
    """

    batch_size: int = 40
    steps: int = 4000
    learning_rate: float = 1e-3
    clip_norm: float = 1.0
    slots: int = 7680
    new: int = 256
    spacing: float | None = None
    rank: int = 8
    alone: float = 0.5
    fewer: float = 0.5
    long: float = 0.2
    segments: int = 4
    questions: int = 2
    others: int = 16
    keep: float = 1.0
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
        if min(self.rank, self.segments, self.questions, self.warm) < 1 or self.others < 0:
            raise ConfigError("rank, segments, questions and warm must be at least 1, others at least 0")
        for name in ("alone", "fewer", "long", "edits"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} is a share, from 0 to 1")
        if self.batch_size <= self.warm:
            raise ConfigError(f"batch_size={self.batch_size} must be more than warm={self.warm}")

    def segments_at(self, step: int) -> int:
        """The curriculum: most segments of a text at a step."""
        return min(self.segments, 1 + int(self.segments * step / max(1, self.steps // 2)))

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

    def segments_of(self, step: int, rng: random.Random) -> int:
        """How many segments a text of a step has."""
        most = self.segments_at(step)
        return rng.randint(2, most) if most > 1 and rng.random() < self.long else 1


class TextData:
    """Plain texts: a part is read, and the next one has to be said.

    Args:
        texts: longer than two pieces of `piece` words where possible; shorter ones are halved.
        source: where they come from, in words.

    Raises:
        ConfigError: fewer than ten texts have two words or more.
    """

    def __init__(self, texts: Sequence[str], source: str, config: PoolTraining, piece: int = 200) -> None:
        self.source = source
        usable = [words for text in texts if len(words := text.split()) > 1]
        if len(usable) < 10:
            raise ConfigError(
                f"{source}: {len(usable)} texts are too few to train on; give a file of ten paragraphs or more"
            )
        order = list(range(len(usable)))
        random.Random(f"held out {config.seed}").shuffle(order)
        held_out = max(1, round(config.held_out * len(usable)))
        self._piece = piece
        self._training = [usable[number] for number in order[held_out:]]
        self.size = len(self._training)
        self.validation = Reading(
            tuple(
                self._cut(usable[number], 1, random.Random(number)) for number in order[:held_out][: config.validation]
            )
        )

    def _cut(self, words: Sequence[str], segments: int, rng: random.Random) -> ReadText:
        """Segments of a text, and the piece behind them as what follows."""
        piece = min(self._piece, -(-len(words) // 2))
        segments = max(1, min(segments, len(words) // piece - 1))
        begin = rng.randint(0, max(0, len(words) - piece * (segments + 1)))
        parts = [words[begin + piece * n : begin + piece * (n + 1)] for n in range(segments + 1)]
        texts = [" ".join(part) for part in parts if part]
        return ReadText(tuple(texts[:-1]), (Asked("", texts[-1], len(texts) - 2),))

    def batch(self, step: int, config: PoolTraining) -> Reading:
        rng = random.Random(f"texts {config.seed} {step}")
        return Reading(
            tuple(
                self._cut(rng.choice(self._training), config.segments_of(step, rng), rng)
                for _ in range(config.batch_size)
            ),
            step=step,
        )

    def digest(self) -> str:
        content = "\x1e".join(" ".join(words) for words in self._training) + repr(self.validation)
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class InventedTexts:
    """Atlas's invented documents (`atlas.documents`), statements of counterfactual edits, and what is asked of both."""

    source = "atlas's invented documents and edits of reserved subjects"

    def __init__(self, config: PoolTraining) -> None:
        from errata.atlas.edits import training_edits

        self._edits = training_edits(_EDITS, seed=config.seed)
        self.size = config.steps * config.batch_size
        texts = [_of_document(number, "validation", 1) for number in range(config.validation)]
        self.validation = Reading(tuple(texts), self._others(random.Random("validation"), config.others))

    def _others(self, rng: random.Random, count: int) -> tuple[tuple[str, str], ...]:
        """What atlas knows of subjects, or can do, that no edit which is measured is about."""
        edits = rng.sample(self._edits, count)
        return tuple((probe.prompt, f"{probe.answer}.") for edit in edits for probe in rng.sample(edit.locality, 1))

    def batch(self, step: int, config: PoolTraining) -> Reading:
        rng = random.Random(f"invented {config.seed} {step}")
        texts = []
        for number in range(step * config.batch_size, (step + 1) * config.batch_size):
            if rng.random() < config.edits:
                edit = self._edits[number % len(self._edits)]
                asked = [Asked(prompt, f"{edit.target}.") for prompt in (edit.prompt, *edit.rephrases)]
                # As `MemoryLLM` injects an edit: without a full stop.
                texts.append(ReadText((f"{edit.prompt} {edit.target}",), tuple(asked)))
            else:
                texts.append(_of_document(number, "training", config.segments_of(step, rng)))
        return Reading(tuple(texts), self._others(rng, config.others), step)

    def digest(self) -> str:
        content = "".join(edit.to_json() for edit in self._edits) + repr(self.validation)
        content += repr([_of_document(number, "training", 2) for number in range(100)])
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _of_document(number: int, part: str, segments: int) -> ReadText:
    """A document, asked in other words and, for each sentence, in its own: that is where copying is learned."""
    from errata.atlas.documents import document

    found = document(number, part=part, segments=segments)
    segment_of = [segment for segment, text in enumerate(found.segments) for _ in range(text.count(". ") + 1)]
    asked = []
    for question in found.questions:
        told, segment = found.sentences[question.fact], segment_of[question.fact]
        asked.append(Asked(question.prompt, f"{question.answer}.", segment))
        asked.append(Asked(told.removesuffix(f" {question.answer}."), f"{question.answer}.", segment))
    return ReadText(found.segments, tuple(asked))


def survivors(updates: int, slots: int, new: int, layers: int, generator: torch.Generator) -> list[Tensor]:
    """What is left of a pool's updates: per layer, numbers of new tokens (update · K + place), oldest first.

    It was full of older slots before, which are left out.
    """
    left = []
    for _ in range(layers):
        order = torch.full((slots,), -1)
        for update in range(updates):
            kept = torch.ones(slots, dtype=torch.bool)
            kept[torch.randperm(slots, generator=generator)[:new]] = False
            order = torch.cat([order[kept], torch.arange(update * new, (update + 1) * new)])
        left.append(order[order >= 0])
    return left


@dataclass(frozen=True)
class _Stream:
    """The updates of a step.

    Attributes:
        made: [L, updates, K, d], in the order in which they come into the pool.
        number: of the update that each text's segment is, by text and segment.
    """

    made: Tensor
    number: dict[tuple[int, int], int]


class StreamLearning(abc.ABC):
    """What the trainings of a pool's network and of its retriever share, as `run_training` takes them.

    Attributes:
        network: what is trained; config: its settings.
    """

    network: nn.Module
    config: PoolTraining

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
            group["lr"] = self.config.learning_rate_at(batch.step)
        loss = self._scores(batch, rng)["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @torch.no_grad()
    def examine(self, validation: Reading) -> dict[str, float]:
        """Means over readings of the size of a step; what is left over counts only where there is nothing else."""
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
        self.model, self.config = model, config
        generator = torch.Generator().manual_seed(config.seed)
        self.network = PoolNetwork.to_train(model, config.new, config.rank, generator).to(model.device)
        self.compression = Compression(model)
        self.spacing = default_spacing(model, config.slots) if config.spacing is None else config.spacing

    # --- a step -------------------------------------------------------------------------------------------------

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.model.tokenizer(text, add_special_tokens=False, padding=False)["input_ids"]
        return found

    def _stream(self, texts: Sequence[ReadText], rng: random.Random) -> _Stream:
        """Texts compressed, segment by segment, in a random order of texts."""
        warm, network = texts[: self.config.warm], self.network
        order = rng.sample(range(len(texts)), len(texts))
        nothing = network.positions.new_zeros(
            self.model.layer_count, len(warm), network.new, network.beginning.shape[1]
        )
        with torch.no_grad():
            first, counts = self.compression.written(
                network, nothing, torch.zeros(len(warm), dtype=torch.bool), [self._ids(one.segments[0]) for one in warm]
            )
            width, (layers, _, _, hidden) = first.shape[2], first.shape
            held = counts.clamp(max=width).unsqueeze(1)
            tiled = width - held + (torch.arange(network.new) - network.new) % held  # as the first update of a pool
            first = first.gather(2, tiled.to(first.device)[None, :, :, None].expand(layers, -1, -1, hidden))
        below = first[:, [rng.randrange(len(warm)) for _ in texts]]
        pieces: dict[tuple[int, int], Tensor] = {}
        for segment in range(max(len(one.segments) for one in texts)):
            going = [number for number, one in enumerate(texts) if len(one.segments) > segment]
            ids = [self._ids(texts[number].segments[segment]) for number in going]
            newest = below.clone()
            for group in length_batches([max(len(one), network.new) for one in ids], _TOGETHER):
                rows = [going[place] for place in group]
                filled = torch.ones(len(rows), dtype=torch.bool)
                made, _ = self.compression.written(network, below[:, rows], filled, [ids[place] for place in group])
                for row, number in enumerate(rows):
                    pieces[number, segment] = made[:, row]
                newest[:, rows] = made.detach().to(newest)
            below = newest
        keys = [(number, segment) for number in order for segment in range(len(texts[number].segments))]
        return _Stream(torch.stack([pieces[key] for key in keys], dim=1), {key: n for n, key in enumerate(keys)})

    def _prefixes(self, states: Sequence[Tensor]) -> list[Prefix]:
        """What is read of slots of each block, [rows, n, d], oldest first; the beginning vector stands in front.

        To be called, as `_read`, while the network is in place.
        """
        found = []
        for layer, (own, attention) in enumerate(zip(states, self.compression.attentions, strict=True)):
            rows, count, width = own.shape
            beginning = self.network.beginning[layer].to(own).view(1, 1, width).expand(rows, -1, -1)
            slots = self.spacing * torch.arange(-count, 0.0)
            places = torch.cat([torch.tensor([-self.spacing * (self.config.slots + 1)]), slots]).expand(rows, -1)
            found.append(Prefix(*attention.keys_and_values(torch.cat([beginning, own], dim=1), places, self.network)))
        return found

    def _read(self, prefixes: Sequence[Prefix], passages: Sequence[Passage]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits where answers are predicted, [n, vocabulary], what should be said there, and of which row, [n].

        Args:
            prefixes: of each block, one row for all passages, or one for each.
        """
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for group in length_batches([len(passage.ids) for passage in passages], _READ_TOGETHER):
            numbers = torch.tensor(group)
            own = [one.of(numbers) for one in prefixes]
            logits, labels, rows = self._read_together(own, [passages[number] for number in group])
            parts.append((logits, labels, numbers[rows.cpu()]))
        logits, labels, rows = (torch.cat(found) for found in zip(*parts, strict=True))
        order = rows.argsort(stable=True)
        return logits[order], labels[order], rows[order]

    def _read_together(self, prefixes: Sequence[Prefix], passages: Sequence[Passage]) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        batch = model.batch(passages, side="right")
        rows, columns, labels = batch.answer_places()

        def reading_of(layer: int) -> Any:
            def probe(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                states = args[0] if args else kwargs["hidden_states"]
                return args, self.compression.attentions[layer].behind(prefixes[layer], states, kwargs)

            return probe

        probes = {one.path: reading_of(layer) for layer, one in enumerate(self.compression.attentions)}
        with probing(model.model, before=probes):
            states = model.trunk_states(batch)
        return model.head(states[rows, columns]).float(), labels, rows

    def _passage(self, asked: Asked) -> Passage:
        return self.model.passage(asked.prompt, asked.answer)

    def _scores(self, reading: Reading, rng: random.Random) -> dict[str, Tensor]:
        """The loss; "alone" and "pool", the shares of questions whose answer is the first choice at every place, with
        the text's own tokens and with all; "kept", the share of places of other things whose first choice stayed."""
        config, model, texts = self.config, self.model, reading.texts
        beside = [model.passage(prompt, answer) for prompt, answer in reading.others]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=config.half):
            before = self._said_without(beside) if beside else None
            with self.network.learning(model, torch.bfloat16 if config.half else model.dtype):
                return self._scores_in_place(texts, beside, before, rng)

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
        self, texts: Sequence[ReadText], beside: Sequence[Passage], before: Tensor | None, rng: random.Random
    ) -> dict[str, Tensor]:
        config, model = self.config, self.model
        stream = self._stream(texts, rng)
        updates = stream.made.shape[1]
        alone: list[tuple[int, Asked]] = []
        pooled: list[tuple[int, Asked]] = []
        for number, text in enumerate(texts):
            for asked in rng.sample(text.asked, min(config.questions, len(text.asked))):
                (alone if rng.random() < config.alone else pooled).append((stream.number[number, asked.segment], asked))
        generator = torch.Generator().manual_seed(rng.randrange(2**62))
        losses, right = [], {}
        if alone:
            used = sorted({number for number, _ in alone})
            of_used = self._prefixes([layer[used] for layer in stream.made])
            rows = torch.tensor([used.index(number) for number, _ in alone])
            theirs = [one.of(rows) for one in of_used]
            logits, labels, rows = self._read(theirs, [self._passage(asked) for _, asked in alone])
            losses.append(_per_row(logits, labels, rows, len(alone)))
            right["alone"] = _all_right(logits, labels, rows, len(alone))
        if pooled or beside:
            left = survivors(updates, config.slots, config.new, model.layer_count, generator)
            flat = stream.made.flatten(1, 2)
            whole = self._prefixes([flat[layer, kept.to(flat.device)].unsqueeze(0) for layer, kept in enumerate(left)])
            seen = self._seen([number for number, _ in pooled], len(beside), updates, rng)
            for one, kept in zip(whole, left, strict=True):
                one.visible = F.pad(seen[:, kept // config.new], (1, 0), value=True).to(one.keys.device)
            logits, labels, rows = self._read(whole, [*(self._passage(asked) for _, asked in pooled), *beside])
            own = rows < len(pooled)
        if pooled:
            losses.append(_per_row(logits[own], labels[own], rows[own], len(pooled)))
            right["pool"] = _all_right(logits[own], labels[own], rows[own], len(pooled))
        loss = torch.cat(losses).mean()
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
        return tensors, {"slots": config.slots, "new": config.new, "spacing": self.spacing}


def _per_row(logits: Tensor, labels: Tensor, rows: Tensor, count: int) -> Tensor:
    """[count], the mean loss of each row."""
    losses = F.cross_entropy(logits, labels.to(logits.device), reduction="none")
    rows = rows.to(losses.device)
    return losses.new_zeros(count).index_add(0, rows, losses) / torch.bincount(rows, minlength=count)


def _all_right(logits: Tensor, labels: Tensor, rows: Tensor, count: int) -> Tensor:
    """Share of rows in which every label is the first choice."""
    wrong = rows.to(logits.device)[logits.argmax(-1) != labels.to(logits.device)]
    return (torch.bincount(wrong, minlength=count) == 0).float().mean()
