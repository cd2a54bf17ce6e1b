"""What the studies of MemoryLLM stand on: pools side by side, each with a text of its own, and questions about texts.

The texts are atlas's invented documents, the part of them of whose names nothing was trained. An answer is right when
what is written up to the end of the sentence is the answer. Questions about one document stand or fall together, so
intervals are over documents.

Knows pools and documents. Knows nothing of what a single study asks.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from errata.adapters import PoolAdapter
from errata.adapters.pool_network import PoolNetwork
from errata.atlas.documents import Document, Question, document
from errata.editors.compression import Compression
from errata.editors.memoryllm import MemoryLLM, MemoryLLMConfig
from errata.errors import NumericsError
from errata.evaluation.metrics import answers_exactly, bootstrap_clusters, finite_or_none
from errata.model import EditableModel
from errata.model.sequences import AdapterNames
from errata.studies.workbench import Arm, Workbench
from errata.threads import side_by_side

__all__ = [
    "ANSWER_TOKENS",
    "METHOD",
    "Pools",
    "Right",
    "answered",
    "first_number",
    "groups",
    "joined",
    "memory_arm",
    "network_of",
    "other_documents",
    "right_answers",
    "updates_to_fill",
]

METHOD = "memoryllm"
ANSWER_TOKENS = 12  # that are written as an answer; atlas's longest has 5
_TOGETHER = 32  # pools side by side, unless batch_size says otherwise
_PLAIN_TOKENS = 4096  # of a batch of questions
_POOLED_TOKENS = 1024  # of one that reads pools: their slots are read again for every token that is written

Right = list[list[int]]
"""Per document, for each of its questions, 1 where it is answered and else 0."""


class Pools:
    """Empty pools as an arm has them, side by side.

    Args:
        seed: of their draws, each of which has its own; count: how many there are.

    Attributes:
        adapters: in order; names: under which they are attached inside `attached`.
        network: that all of them share; slots, new: N and K; chunk_tokens: that one update reads at most.

    Raises:
        ConfigError, ArtifactError: there is no network as the arm's settings want it.
    """

    def __init__(self, bench: Workbench, arm: Arm, seed: str, count: int) -> None:
        config = bench.config(arm)
        assert isinstance(config, MemoryLLMConfig)
        editor = MemoryLLM(bench.model, config)
        editor.adapter.detach()
        one = editor.adapter
        self.model, self.network, self.slots, self.new = bench.model, one.network, one.pool.slots, one.pool.new
        self.chunk_tokens = editor.chunk_tokens
        self.names = [f"pool {number}" for number in range(count)]
        self.adapters = [
            PoolAdapter.for_model(
                bench.model,
                METHOD,
                config.to_record(),
                slots=self.slots,
                new=self.new,
                seed=random.Random(f"{seed} {config.seed} {number}").randrange(2**31),
                spacing=one.spacing,
                network=one.network,
                long_term=0 if one.pool.store is None else one.pool.store.slots,
                retrieved=one.retrieved or None,
            )
            for number in range(count)
        ]
        # In halves, each on a copy of the model, so that two threads may read; the same halves on any machine.
        halves = 2 if count > 1 and bench.model.device.type == "cpu" else 1
        cuts = [count * half // halves for half in range(halves + 1)]
        self._parts = [slice(*cut) for cut in itertools.pairwise(cuts)]
        self._compressions = [Compression(bench.model if half == 0 else bench.model.copy()) for half in range(halves)]

    def without_store(self) -> Pools:
        """The same pools, of whose stores nothing is read."""
        made = copy.copy(self)
        made.adapters = [adapter.without_store() for adapter in self.adapters]
        return made

    @contextmanager
    def attached(self) -> Iterator[None]:
        """All of them on the model for a while, where each question chooses its own."""
        try:
            for part, compression in zip(self._parts, self._compressions, strict=True):
                for adapter, name in zip(self.adapters[part], self.names[part], strict=True):
                    adapter.attach(compression.model, name)
            yield
        finally:
            for adapter in self.adapters:
                adapter.detach()

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts as token ids, without a beginning token."""
        found: list[list[int]] = self.model.tokenizer(list(texts), add_special_tokens=False, padding=False)["input_ids"]
        return found

    def read(self, texts: Sequence[str | None], *, chunks: int | None = None) -> list[list[int]]:
        """Let each pool read a text of its own, or nothing; returns the numbers of the updates that this makes.

        Args:
            chunks: of each text as many are read at most, a chunk in each update.
        """
        before = [adapter.pool.updates for adapter in self.adapters]
        limit = None if chunks is None else chunks * self.chunk_tokens
        reading = [number for number, text in enumerate(texts) if text is not None]
        ids = dict(zip(reading, self.tokens([texts[number] or "" for number in reading]), strict=True))

        def inject(part: slice, compression: Compression) -> None:
            own = [number for number in range(len(texts))[part] if number in ids]
            named = [(texts[number] or "", ids[number][:limit]) for number in own]
            if own:
                compression.inject([self.adapters[number] for number in own], named, self.chunk_tokens)

        side_by_side(inject, self._parts, self._compressions)
        return [list(range(old + 1, one.pool.updates + 1)) for old, one in zip(before, self.adapters, strict=True)]

    def update(self, texts: Sequence[tuple[str, Sequence[int]]]) -> int:
        """Let each pool take a text of one update, a name and its tokens; returns how many were not finite.

        A pool whose update is not stays as it was.
        """

        def take(part: slice, compression: Compression) -> int:
            refused, adapters, own = 0, self.adapters[part], texts[part]
            for adapter, made, (name, _) in zip(
                adapters, compression(adapters, [ids for _, ids in own]), own, strict=True
            ):
                try:
                    adapter.update(made, name)
                except NumericsError:
                    refused += 1
            return refused

        return sum(side_by_side(take, self._parts, self._compressions))

    def ask(self, questions: Sequence[Sequence[Question]]) -> Right:
        """Per pool, which of its questions are answered out of it."""

        def answer(part: slice, compression: Compression) -> Right:
            names = [name for name, own in zip(self.names[part], questions[part], strict=True) for _ in own]
            return right_answers(compression.model, questions[part], adapters=names)

        return [own for half in side_by_side(answer, self._parts, self._compressions) for own in half]

    def slots_of(self, updates: Sequence[Sequence[int]]) -> list[float]:
        """Per pool, how many slots of each layer these updates of its own wrote and are still there, a mean."""
        pairs = zip(self.adapters, updates, strict=True)
        return [float(adapter.pool.left_of(own).float().mean()) for adapter, own in pairs]


def right_answers(
    model: EditableModel,
    questions: Sequence[Sequence[Question]],
    texts: Sequence[str] | None = None,
    adapters: AdapterNames | None = None,
) -> Right:
    """Per document, which of its questions are answered.

    Args:
        texts: for each document, what stands in front of its questions.
        adapters: for each question, which of the attached adapters act.
    """
    in_front = [""] * len(questions) if texts is None else [f"{text} " if text else "" for text in texts]
    prompts = [before + one.prompt for before, own in zip(in_front, questions, strict=True) for one in own]
    tokens = _PLAIN_TOKENS if adapters is None else _POOLED_TOKENS
    said = iter(model.generate(prompts, adapters=adapters, max_new_tokens=ANSWER_TOKENS, batch_tokens=tokens))
    return [[int(answers_exactly(next(said), one.answer)) for one in own] for own in questions]


def answered(name: str, right: Right) -> dict[str, Any]:
    """A column, the share of questions that are answered, and its interval over documents."""
    values = [float(one) for own in right for one in own]
    mean = bootstrap_clusters(values, [str(place) for place, own in enumerate(right) for _ in own])
    return {name: mean.value, f"{name}_interval": [finite_or_none(mean.low), finite_or_none(mean.high)]}


# --- what the studies share -------------------------------------------------------------------------------------------


def memory_arm(bench: Workbench, together: int = _TOGETHER, **own: Any) -> Arm:
    """The method under the user's settings, and the study's; `batch_size` is how many pools are read side by side."""
    bench.methods([METHOD])
    return bench.arm(METHOD, {"batch_size": together, **own})


def network_of(bench: Workbench, arm: Arm) -> PoolNetwork:
    """The network that an arm's settings name. Raises ConfigError or ArtifactError where there is none."""
    return Pools(bench, arm, "", 0).network


def first_number(bench: Workbench) -> int:
    """The number of the first document that is asked about under this seed."""
    return bench.options.seed * 100_000_000


def other_documents(bench: Workbench, stream: int, beside: str) -> Iterator[Document]:
    """Documents about other names than one, others for each stream."""
    numbers = itertools.count(first_number(bench) + 10_000 * (stream + 1))
    return (one for one in (document(number, part="test") for number in numbers) if one.name != beside)


def updates_to_fill(bench: Workbench, pools: Pools) -> int:
    """Updates after which a pool is nearly full: e⁻³, 5 %, of its slots hold nothing (e⁻¹ where it is to be quick)."""
    return math.ceil((1 if bench.options.quick else 3) * pools.slots / pools.new)


def groups(count: int, size: int) -> list[range]:
    """Numbers from 0 in groups, each of which is a row of its own, so that a study goes on where it was stopped."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def joined(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was found of groups of documents, as of one group: lists behind each other."""

    def join(parts: Sequence[Any]) -> Any:
        if isinstance(parts[0], dict):
            return {name: join([part[name] for part in parts]) for name in parts[0]}
        return [item for part in parts for item in part] if isinstance(parts[0], list) else parts[0]

    return {name: join([group[name] for group in found]) for name in found[0]}
