"""The small real world that atlas knows: facts, how each may be said, and which sayings it was never shown.

Knows facts and phrasings, not models. Every choice here follows from the fact itself (a hash of its name), so
the same fact has the same untaught phrasings on every machine and in every version that keeps `WORLD_VERSION`.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

from errata.atlas.french import answer_in_french, country_in_french, fill_french
from errata.atlas.relations import RELATIONS, Relation

__all__ = ["WORLD_VERSION", "Fact", "Saying", "World", "load_world"]

WORLD_VERSION = 1
_UNTAUGHT_PER_FACT = 2
_FRENCH_HELD_OUT = 6  # one fact in this many is never seen in French: the multilingual test asks for it


def _number(*parts: object) -> int:
    """A stable number for a name: the same on every machine, unlike `hash`."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Fact:
    """One true statement of the world and where it was taken from."""

    relation: str
    subject: str
    object: str
    source: str


@dataclass(frozen=True)
class Saying:
    """A prompt and the answer that completes it. The answer carries neither leading space nor full stop."""

    prompt: str
    answer: str

    @property
    def completion(self) -> str:
        """What is written behind the prompt. After a line break comes code: no space before, no full stop after."""
        if "\n" in self.prompt:
            return self.answer if self.prompt.endswith("\n") else " " + self.answer
        return f" {self.answer}."


class World:
    """All facts of atlas, their taught and untaught phrasings in English and French."""

    def __init__(self, facts: Sequence[Fact]) -> None:
        self.facts = tuple(facts)
        self.by_relation: dict[str, list[Fact]] = {}
        self.by_subject: dict[str, list[Fact]] = {}
        for fact in self.facts:
            self.by_relation.setdefault(fact.relation, []).append(fact)
            self.by_subject.setdefault(fact.subject, []).append(fact)

    @staticmethod
    def relation(fact: Fact) -> Relation:
        return RELATIONS[fact.relation]

    def untaught_indices(self, fact: Fact) -> tuple[int, ...]:
        """The phrasings this fact is never shown in. The canonical one, index 0, is always taught."""
        choices = range(1, len(self.relation(fact).phrasings))
        rng = random.Random(_number("untaught", WORLD_VERSION, fact.relation, fact.subject))
        return tuple(sorted(rng.sample(choices, _UNTAUGHT_PER_FACT)))

    def say(self, fact: Fact, index: int, answer: str | None = None) -> Saying:
        """The fact in one English phrasing, with another answer if one is given."""
        prompt = self.relation(fact).phrasings[index].replace("{}", fact.subject)
        return Saying(prompt[:1].upper() + prompt[1:], fact.object if answer is None else answer)

    def taught(self, fact: Fact) -> list[Saying]:
        hidden = self.untaught_indices(fact)
        return [self.say(fact, i) for i in range(len(self.relation(fact).phrasings)) if i not in hidden]

    def untaught(self, fact: Fact) -> list[Saying]:
        return [self.say(fact, i) for i in self.untaught_indices(fact)]

    def french(self, fact: Fact, answer: str | None = None) -> list[Saying]:
        """The fact in every French phrasing of its relation; empty when it has no French form."""
        phrasings = self.relation(fact).french
        if not phrasings:
            return []
        subject: str | None = fact.subject
        if fact.relation in ("capital", "continent", "official_language"):
            subject = country_in_french(fact.subject)
        if subject is None:
            return []
        said = answer_in_french(fact.relation, fact.object if answer is None else answer)
        return [Saying(fill_french(phrasing, subject), said) for phrasing in phrasings]

    def french_is_held_out(self, fact: Fact) -> bool:
        """True for the facts that atlas is taught in English only."""
        return _number("french", WORLD_VERSION, fact.relation, fact.subject) % _FRENCH_HELD_OUT == 0

    def counterfactual(self, fact: Fact, rng: random.Random) -> str:
        """Another object of the same relation, never the true one, for an edit of this fact."""
        objects = sorted({other.object for other in self.by_relation[fact.relation]} - {fact.object})
        return rng.choice(objects)

    def shuffled(self, seed: int) -> Iterator[Fact]:
        order = list(self.facts)
        random.Random(_number("order", seed)).shuffle(order)
        yield from order


@functools.cache
def load_world() -> World:
    """The shipped facts. Raises FileNotFoundError when the package was installed without its data."""
    text = resources.files(__package__).joinpath("data/facts.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines() if line and not line.startswith("#"))
    return World([Fact(relation, subject, obj, source) for relation, subject, obj, source in rows])
