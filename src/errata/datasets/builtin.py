"""Texts that come with errata, for what an editor needs once per base model when the user gives nothing.

All are drawn from atlas's world: real subjects in many phrasings, and plain prose. They suit atlas best; for a
large model, a sample of the text it is used on is better (`corpus` in the editors' settings).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from errata.errors import ConfigError

if TYPE_CHECKING:
    from errata.atlas.world import Fact

__all__ = ["ParaphraseSet", "background_prompts", "corpus_texts", "held_out_texts", "paraphrase_sets", "plain_texts"]


@dataclass(frozen=True)
class ParaphraseSet:
    """One fact's question in several wordings, and the same questions about another subject.

    Attributes:
        prompt: the wording an edit would use; paraphrases: other wordings of it.
        neighbours: the same relation asked of other subjects, which the edit must leave alone.
        subject: what the question is about, in its own words; beside: other questions about it.
    """

    prompt: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]
    subject: str
    beside: tuple[str, ...]


def plain_texts(count: int, seed: int = 0) -> list[str]:
    """Ordinary text: prose, statements, questions with answers."""
    return list(_plain_texts(count, seed))


@functools.lru_cache(maxsize=2)
def _plain_texts(count: int, seed: int) -> tuple[str, ...]:
    from errata.atlas.corpus import sample_texts

    return tuple(sample_texts(seed, count))


def held_out_texts(count: int = 300) -> list[str]:
    """Prose that atlas was not trained on, for perplexity."""
    return list(_held_out_texts(count))


@functools.lru_cache(maxsize=2)
def _held_out_texts(count: int) -> tuple[str, ...]:
    from errata.atlas.prose import held_out_prose

    return tuple(held_out_prose(count))


def corpus_texts(path: str | Path) -> list[str]:
    """A text file as a list of texts: paragraphs between blank lines, or lines when there are none.

    Raises:
        ConfigError: the file cannot be read or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the corpus {str(path)!r} cannot be read ({error}); give a UTF-8 text file") from error
    parts = [part.strip() for part in (text.split("\n\n") if "\n\n" in text else text.splitlines())]
    parts = [part for part in parts if part]
    if not parts:
        raise ConfigError(f"the corpus {str(path)!r} is empty; give a text file with some paragraphs")
    return parts


def background_prompts(count: int = 100, seed: int = 0) -> list[str]:
    """Prompts of all kinds of content, about subjects that no edit of atlas's world names."""
    from errata.atlas.world import load_world

    world, rng, facts = load_world(), random.Random(f"background {seed}"), _reserved_facts()
    # More prompts than facts: every fact once before any comes again, in another draw of its phrasing.
    drawn = [fact for _ in range(-(-count // len(facts))) for fact in rng.sample(facts, len(facts))][:count]
    return [world.say(fact, rng.randrange(len(world.relation(fact).phrasings))).prompt for fact in drawn]


def paraphrase_sets(count: int, seed: int = 0, paraphrases: int = 3, neighbours: int = 3) -> Sequence[ParaphraseSet]:
    """Questions in several wordings with neighbours, to calibrate what counts as the same question.

    All are about subjects that no edit of atlas's world names.

    Raises:
        ConfigError: more sets than leave anybody to be a neighbour.
    """
    from errata.atlas.world import load_world

    world, rng, reserved = load_world(), random.Random(f"paraphrase {seed}"), _reserved_facts()
    if count > len(reserved) // 2:
        raise ConfigError(f"{count} paraphrase sets cannot be made; ask for at most {len(reserved) // 2}")
    facts = rng.sample(reserved, count)
    chosen = set(facts)
    sets = []
    for fact in facts:
        wordings = range(1, len(world.relation(fact).phrasings))
        others = [f for f in reserved if f.relation == fact.relation and f not in chosen]
        beside = rng.sample(others, min(neighbours, len(others)))
        sets.append(
            ParaphraseSet(
                world.say(fact, 0).prompt,
                tuple(world.say(fact, i).prompt for i in rng.sample(wordings, min(paraphrases, len(wordings)))),
                tuple(world.say(other, rng.choice((0, rng.choice(wordings)))).prompt for other in beside),
                fact.subject,
                tuple(world.say(other, 0).prompt for other in world.by_subject[fact.subject] if other != fact),
            )
        )
    return sets


def _reserved_facts() -> list[Fact]:
    """The facts of atlas's world that are never edited nor asked about in measuring edits."""
    from errata.atlas.edits import is_reserved
    from errata.atlas.world import load_world

    return [fact for fact in load_world().facts if is_reserved(fact.subject)]
