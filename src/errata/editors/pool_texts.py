"""What a memory pool's network is trained on: texts to be read, and what is asked about them afterwards.

Atlas's invented documents and edits (`InventedTexts`), or plain texts of a file, each cut into a part that is read and
the piece behind it, which has to be said (`TextData`). What a step holds follows from the seed and its number.

Knows texts, edits and the curriculum (`pool_training.PoolTraining`). Knows no model.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errata.errors import ConfigError

if TYPE_CHECKING:
    from errata.edit import Edit
    from errata.editors.pool_training import PoolTraining

__all__ = ["Asked", "InventedTexts", "ReadText", "Reading", "TextData"]

_EDITS = 6000
_OF_A_SEED = 10_000_000  # documents


@dataclass(frozen=True)
class Asked:
    """Something to be said after a text was read: a prompt, which may be empty, and what follows it.

    Attributes:
        segment: number of the text's segment that says it.
        ends: whether nothing more is to be said behind the answer.
    """

    prompt: str
    answer: str
    segment: int = 0
    ends: bool = False


@dataclass(frozen=True)
class ReadText:
    """A text, in segments that are read one after the other, and what is asked about it."""

    segments: tuple[str, ...]
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class Reading:
    """What a step reads, and is asked.

    Attributes:
        others: prompts about other things and what follows there, to be said, and to be ended, as without a pool; there
            may be none.
        step: which it is, for what changes with the steps; None of one that nothing is learned from.
    """

    texts: tuple[ReadText, ...]
    others: tuple[tuple[str, str], ...] = ()
    step: int | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def parts(self, count: int) -> list[Reading]:
        """As equal parts, each of texts that follow each other."""
        texts, others = (len(own) // count for own in (self.texts, self.others))
        return [
            Reading(
                self.texts[part * texts : (part + 1) * texts],
                self.others[part * others : (part + 1) * others],
                self.step,
            )
            for part in range(count)
        ]


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
                for _ in range(config.texts_at(step))
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
        self.size = config.steps * config.streams * config.batch_size
        texts = [_of_document(number, "validation", 1) for number in range(config.validation)]
        self.validation = Reading(tuple(texts), tuple(self._others(random.Random("validation"), config.others)))

    def _others(self, rng: random.Random, count: int, read: Sequence[Edit] = ()) -> list[tuple[str, str]]:
        """What atlas knows of subjects, or can do, that no edit which is measured is about.

        Args:
            read: edits among the texts; what must stay beside them is asked first.
        """
        near = [(probe.prompt, f"{probe.answer}.") for edit in read for probe in edit.locality]
        near = rng.sample(near, min(len(near), count))
        edits = rng.sample(self._edits, count - len(near))
        return near + [(probe.prompt, f"{probe.answer}.") for edit in edits for probe in rng.sample(edit.locality, 1)]

    def batch(self, step: int, config: PoolTraining) -> Reading:
        rng = random.Random(f"invented {config.seed} {step}")
        texts, alike = list[ReadText](), config.batch_size if rng.random() < config.alike else 1
        read: list[list[Edit]] = [[] for _ in range(config.streams)]
        begin = config.seed * _OF_A_SEED + step * config.streams * config.batch_size
        for number in range(begin, begin + config.texts_at(step)):
            if rng.random() < config.edits:
                edit = self._edits[number % len(self._edits)]
                asked = [Asked(prompt, f"{edit.target}.", ends=True) for prompt in (edit.prompt, *edit.rephrases)]
                # As `MemoryLLM` injects an edit: without a full stop.
                read[len(texts) * config.streams // config.texts_at(step)].append(edit)
                texts.append(ReadText((f"{edit.prompt} {edit.target}",), tuple(asked)))
            else:
                texts.append(_of_document(number, "training", config.segments_of(step, rng), alike))
        others = [one for own in read for one in self._others(rng, config.others, own)]
        return Reading(tuple(texts), tuple(others), step)

    def digest(self) -> str:
        content = "".join(edit.to_json() for edit in self._edits) + repr(self.validation)
        content += repr([_of_document(number, "training", 2) for number in range(100)])
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _of_document(number: int, part: str, segments: int, alike: int = 1) -> ReadText:
    """A document, asked in other words and, for each sentence, in its own: that is where copying is learned."""
    from errata.atlas.documents import document

    found = document(number, part=part, segments=segments, alike=alike)
    segment_of = [segment for segment, text in enumerate(found.segments) for _ in range(text.count(". ") + 1)]
    asked = []
    for question in found.questions:
        told, segment = found.sentences[question.fact], segment_of[question.fact]
        prompts = question.prompt, told.removesuffix(f" {question.answer}.")
        asked += [Asked(prompt, f"{question.answer}.", segment, ends=True) for prompt in prompts]
    return ReadText(found.segments, tuple(asked))
