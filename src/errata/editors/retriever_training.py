"""How the retriever of a long-term store is trained: M+'s addition to MemoryLLM's training (2502.00592, section 3.2).

A step is a stream of updates, as in the first stage (`editors.pool_training`): its texts come into a pool one after the
other, each block drops slots, and what is dropped is stored. Then prompts about the texts are read, in front of them
the pool and what the retriever, as it is now, finds in the store: so it learns from the states that it will meet.

    L = − mean log p(m) over the slots m that the answering segment wrote
        − mean log (1 − p(m)) over the slots of all other texts,     both then a mean over prompts and layers

p is the score of `adapters.retriever`. Slots are taken whether they are still in the pool or have been dropped, which
their keys do not depend on. Segments of the same text that do not answer are neither.

The network of the first stage is frozen and no gradient goes through the model: a step is its two passes, forwards. The
paper trains retriever and model together; so the model here has not learned to read more than N slots.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from errata.adapters.pool_network import PoolNetwork
from errata.adapters.pool_reading import retrieved_places, retrieved_spacing
from errata.adapters.retriever import Retriever
from errata.editors.pool_stream import PoolPasses, survivors
from errata.editors.pool_texts import Reading
from errata.editors.pool_training import OF_BEFORE, PoolTraining, StreamLearning
from errata.editors.training import load_trained
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.prefixed_attention import Prefix
from errata.model.probes import probing
from errata.model.scoring import length_batches
from errata.model.tokens import Passage

__all__ = ["MemoryTraining", "RetrieverLearning"]

_METHOD = "memoryllm"
_TOGETHER = 1024  # tokens of one pass
_LEAST = 1e-6  # beside a probability whose logarithm is taken
_OF_SECOND = ("retriever_of", "retrieved")
_OF_NETWORK = ("slots", "new", "spacing")
_SECOND = {  # tried on atlas
    "steps": 600,
    "batch_size_first": None,
    "questions": 2,
    "learning_rate": 3e-3,
    "validate_every": 50,
    "patience": 10,
}
_TIMES_HELD = 3


@dataclass(frozen=True, kw_only=True)
class MemoryTraining(PoolTraining):
    """Settings of both stages: the network of a pool, and with `retriever_of` the retriever of its long-term store.

    Attributes:
        retriever_of: folder of a network that was trained; it is kept as it is and gets a retriever. Slots, new and
            spacing are then those of that network. None for the first stage.
        retrieved: R, slots of each layer that a prompt retrieves; None for a quarter of N.
    """

    retriever_of: str | None = None
    retrieved: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retrieved is not None and self.retriever_of is None:
            raise ConfigError("retrieved belongs to the training of a retriever; give retriever_of=NETWORK too")
        if self.retriever_of is not None and self.begin_with is not None:
            raise ConfigError("begin_with belongs to the first stage; a retriever begins anew, on the network it is of")
        if self.retrieved is not None and self.retrieved < 1:
            raise ConfigError(f"retrieved={self.retrieved} must be at least 1")

    @classmethod
    def for_model(cls, model: EditableModel, **overrides: Any) -> Self:
        """As `EditorConfig.for_model`; the second stage has settings of its own and the size of the network given.

        A stream is three times as long as what a pool holds, N/K updates, so that most of what is asked for is stored.

        Raises:
            ArtifactError, BaseMismatchError: there is no such network for this model.
        """
        folder = overrides.get("retriever_of")
        if not isinstance(folder, str):
            return super().for_model(model, **overrides)
        _, record = load_trained(Path(folder), _METHOD, model)
        sizes = {name: record[name] for name in _OF_NETWORK}
        for name, size in sizes.items():
            if overrides.get(name, size) != size:
                raise ConfigError(
                    f"{name}={overrides[name]}, but the network in {folder} has {name}={size}; leave it out"
                )
        texts = max(math.ceil(_TIMES_HELD * record["slots"] / record["new"]), overrides.get("warm", cls.warm) + 1)
        of_streams = {"batch_size": texts, "validation": 2 * texts}
        made = super().for_model(model, **{**sizes, **_SECOND, **of_streams, **overrides})
        source = f"{', '.join(_OF_NETWORK)}: as the network has; given: {', '.join(sorted(overrides))}"
        return dataclasses.replace(made, source=source)

    def to_record(self) -> dict[str, Any]:
        """What the second stage does not have to say is left out: a run of the first can be gone on with."""
        record = super().to_record()
        return record if self.retriever_of else {n: value for n, value in record.items() if n not in _OF_SECOND}


@dataclass(frozen=True)
class _Asked:
    """A prompt, the update that wrote what answers it, and the number of its text."""

    passage: Passage
    update: int
    text: int


@dataclass
class _Pool:
    """A step's pool, per layer.

    Attributes:
        slots: [L, n, d], all that were written, the oldest first; keys: [n, w], of the retriever.
        short: what is read of those left in the pool; stored: numbers of those that were dropped, the oldest first.
    """

    slots: Tensor
    keys: list[Tensor]
    short: list[Prefix]
    stored: list[Tensor]


class RetrieverLearning(StreamLearning):
    """The training of a retriever, on top of a network that is trained already."""

    network: Retriever

    def __init__(self, model: EditableModel, config: MemoryTraining) -> None:
        assert config.retriever_of is not None
        super().__init__()
        tensors, self._record = load_trained(Path(config.retriever_of), _METHOD, model)
        self._tensors = {name: own for name, own in tensors.items() if not name.startswith("retriever ")}
        generator = torch.Generator().manual_seed(config.seed)
        made = Retriever.to_train(model.layer_count, model.anatomy.hidden_size, generator)
        self.model, self.config, self.network = model, config, made.to(model.device)
        slots, spacing = self._record["slots"], self._record["spacing"]
        self.retrieved = max(1, slots // 4) if config.retrieved is None else config.retrieved
        self.own_spacing = retrieved_spacing(model, slots, spacing, self.retrieved)
        network = PoolNetwork.from_state(self._tensors).to(model.device)
        self._passes = PoolPasses(model, network, slots=slots, spacing=spacing, warm=config.warm)

    def _twin(self) -> RetrieverLearning:
        made = copy.copy(self)
        made._passes = self._passes.twin()
        made.model = made._passes.model
        return made

    # --- a step -------------------------------------------------------------------------------------------------

    def _scores(self, reading: Reading, rng: random.Random) -> dict[str, Tensor]:
        """The loss; "recall", of stored slots of the answering segment the share that is retrieved; "chance", what
        that would be if slots were retrieved at random."""
        learning, passes = torch.is_grad_enabled(), self._passes
        half = torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.config.half)
        with torch.no_grad(), half, passes.network.acting(self.model):
            stream = passes.stream(reading.texts, rng)
            made, number = stream.made, stream.number
            asked = self._asked(reading, number, rng)
            pool = self._pool(made, rng, learning)
            found = self._read(pool, [one.passage for one in asked], learning)
        update_of = torch.arange(made.shape[1]).repeat_interleave(made.shape[2])
        text_of = torch.tensor([text for (text, _), _ in sorted(number.items(), key=lambda item: item[1])])[update_of]
        own = update_of == torch.tensor([one.update for one in asked]).unsqueeze(1)  # [prompts, slots]
        others = text_of != torch.tensor([one.text for one in asked]).unsqueeze(1)
        own, others = own.to(self.model.device), others.to(self.model.device)
        losses, hits, stored, chance = [], 0.0, 0.0, 0.0
        for scores, kept in zip(found, pool.stored, strict=True):
            losses.append(_loss(scores, own, others))
            mine = own[:, kept]
            best = scores.detach()[:, kept].topk(min(self.retrieved, len(kept)), dim=1).indices
            hits += float(mine.gather(1, best).sum())
            stored += float(mine.sum())
            chance += float(mine.sum()) * best.shape[1] / max(len(kept), 1)
        shares = {"recall": hits / max(stored, 1.0), "chance": chance / max(stored, 1.0)}
        return {"loss": torch.stack(losses).mean(), **{name: torch.tensor(value) for name, value in shares.items()}}

    def _asked(self, reading: Reading, number: Mapping[tuple[int, int], int], rng: random.Random) -> list[_Asked]:
        found = []
        for text, one in enumerate(reading.texts):
            for asked in rng.sample(one.asked, min(self.config.questions, len(one.asked))):
                prompt = asked.prompt
                if not prompt:  # a text that has to be gone on with is found by the beginning of what follows
                    words = asked.answer.split()
                    prompt = " ".join(words[: max(1, len(words) // 2)])
                found.append(_Asked(self.model.passage(prompt), number[text, asked.segment], text))
        return found

    def _pool(self, made: Tensor, rng: random.Random, learning: bool) -> _Pool:
        """What becomes of new tokens, [L, updates, K, d], that come into a pool one after the other."""
        left = survivors(made.shape[1], self._record["slots"], made.shape[2], len(made), rng.randrange(2**62))
        slots, attentions = made.flatten(1, 2), self._passes.compression.attentions
        left = [kept.to(slots.device) for kept in left]
        short = self._passes.prefixes([slots[layer, kept].unsqueeze(0) for layer, kept in enumerate(left)])
        every = torch.ones(len(left), slots.shape[1], dtype=torch.bool, device=slots.device)
        for layer, kept in enumerate(left):
            every[layer, kept] = False
        read = [one.entering(own.unsqueeze(0))[0] for one, own in zip(attentions, slots, strict=True)]
        with torch.set_grad_enabled(learning):
            keys = [self.network.keys(layer, states) for layer, states in enumerate(read)]
        return _Pool(slots, keys, short, [row.nonzero().flatten() for row in every])

    def _read(self, pool: _Pool, passages: Sequence[Passage], learning: bool) -> list[Tensor]:
        """Per layer the score of each slot for each prompt, [prompts, slots]."""
        parts: list[list[Tensor]] = [[] for _ in pool.keys]
        order: list[int] = []
        for group in length_batches([len(passage.ids) for passage in passages], _TOGETHER):
            order += group
            batch = self.model.batch([passages[number] for number in group], side="right")
            real = batch.mask.bool()

            def reading_of(layer: int, real: Tensor = real, seen: list[list[Tensor]] = parts) -> Any:
                done = len(seen[layer])

                def probe(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                    if len(seen[layer]) > done:  # the attention makes keys and values of what is retrieved
                        return None
                    states = args[0] if args else kwargs["hidden_states"]
                    with torch.set_grad_enabled(learning):
                        scores = self.network.scores(layer, states.detach(), real.to(states.device), pool.keys[layer])
                    seen[layer].append(scores)
                    prefix = self._prefix(pool, layer, scores.detach())
                    return args, self._passes.compression.attentions[layer].behind(prefix, states, kwargs)

                return probe

            paths = [attention.path for attention in self._passes.compression.attentions]
            with probing(self.model.model, before={path: reading_of(layer) for layer, path in enumerate(paths)}):
                self.model.trunk_states(batch)
        back = torch.tensor(order).argsort().to(pool.slots.device)
        with torch.set_grad_enabled(learning):
            return [torch.cat(own)[back] for own in parts]

    def _prefix(self, pool: _Pool, layer: int, scores: Tensor) -> Prefix:
        """What rows read in a layer: the slots that score best for each, [rows, slots], and the pool behind them."""
        stored, short = pool.stored[layer], pool.short[layer]
        if not len(stored):
            return short
        best = scores[:, stored].topk(min(self.retrieved, len(stored)), dim=1).indices
        chosen = stored[best.sort(dim=1).values]
        places = retrieved_places(self._record["slots"], self._passes.spacing, self.own_spacing, chosen.shape[1])
        attention, network = self._passes.compression.attentions[layer], self._passes.network
        found = Prefix(*attention.keys_and_values(pool.slots[layer][chosen], places.expand(chosen.shape), network))
        whole = Prefix.of_rows([(found.of(torch.tensor([row])), short) for row in range(len(chosen))])
        assert whole is not None
        return whole

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of the network: as it was trained before, bit for bit, and the retriever."""
        factors = ("left", "right")  # which were kept in bfloat16, so that nothing is lost
        tensors = {n: own.bfloat16() if n.startswith(factors) else own for n, own in self._tensors.items()}
        tensors |= {f"retriever {name}": own for name, own in self.network.state().items()}
        before = {name: self._record[name] for name in OF_BEFORE if name in self._record}
        sizes = {name: self._record[name] for name in _OF_NETWORK}
        return tensors, {**sizes, "retrieved": self.retrieved, "first_stage": before}


def _loss(scores: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """−log p over a prompt's own slots, −log (1 − p) over those of other texts; a mean over prompts.

    Args:
        scores: [prompts, slots]; own, others: bool of that shape.
    """
    found = (scores + _LEAST).log().masked_fill(~own, 0).sum(1) / own.sum(1)
    avoided = (1 - scores + _LEAST).log().masked_fill(~others, 0).sum(1) / others.sum(1).clamp(min=1)
    return -(found + avoided).mean()
