"""Invented texts with questions, to train and measure a memory that reads a text and is asked about it afterwards.

A document is about one person or one event that does not exist. It tells a few facts, each in a sentence of its own
that names its subject, and asks for each of them in other words. What it tells is drawn from the objects that a
relation has in atlas's world and is true of no subject of it, so that only who has read the document can answer.

Every document follows from its number and its part alone: a million of them need no file, and a run that was killed
goes on at any number. The parts share no last name, and every name holds one, of a person or of an event: what is
measured on "validation" or "test" was never trained on.

Names are dealt out before any comes again. Of "test", events do so after 15,485 documents and people after 146,583:
its first 100,000 documents have 83,097 different names, 80,000 of people and 3,097 of events. Counted over
the first 20,000 of them, a document of 2 or 3 facts is 12 to 48 of atlas's tokens long, nine in ten are 17 to 36;
nine answers in ten are one token.
"""

from __future__ import annotations

import functools
import itertools
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from errata.atlas.capabilities import _READING_WORDS
from errata.atlas.edits import _OF_PEOPLE
from errata.atlas.prose import _PLACES
from errata.atlas.relations import RELATIONS, Relation
from errata.atlas.world import Saying, _number, load_world
from errata.errors import ConfigError, unknown_name

__all__ = ["Document", "Question", "document", "documents"]

_PARTS = {"training": range(65), "validation": range(65, 75), "test": range(75, 100)}  # per cent of last names
_EVENTS_ONE_IN = 5  # documents; there are far fewer names for events than for people
_FACTS = (2, 3)  # of a segment, where no number is asked for
_LONGEST_NAME = 12  # letters; every sentence repeats it
_KINDS = (
    "Award",
    "Ball",
    "Circus",
    "Concert",
    "Congress",
    "Day",
    "Dinner",
    "Festival",
    "Forum",
    "Games",
    "League",
    "Marathon",
    "Mission",
    "Night",
    "Open",
    "Party",
    "Prize",
    "Show",
    "Trial",
    "Week",
)

# Relations of the world. "instrument" and "religion" have too few objects: a guess would often be right.
_WORLDLY_OF_PEOPLE = (
    "birthplace",
    "citizenship",
    "employer",
    "field",
    "genre",
    "native_language",
    "occupation",
    "place_of_death",
    "position",
)
_WORLDLY_OF_EVENTS = ("founded_in", "genre", "headquarters", "network")

# Relations of our own, of words that atlas has read; each has the objects of a relation of the world or of a list.
_COLOURS = tuple(_READING_WORDS["colour"])
_ANIMALS = tuple(_READING_WORDS["animal"])
_FOOD = tuple(food for food in _READING_WORDS["food"] if food not in ("milk", "tea"))  # those are not eaten
_SITES = tuple(place.removeprefix("the ") for place in _PLACES)
_OWN_OF_PEOPLE: tuple[tuple[Relation, tuple[str, ...]], ...] = (
    (
        Relation(
            "residence",
            (
                "{} lives in",
                "The home of {} is in",
                "The house of {} stands in",
                "{} came to live in",
                "{} found a home in",
            ),
            ("Where does {} live?", "In which city does {} live?", "Where is the home of {}?"),
        ),
        ("headquarters",),
    ),
    (
        Relation(
            "animal",
            (
                "{} has a",
                "The animal of {} is a",
                "At home, {} has a",
                "In the house of {} lives a",
                "{} owns a",
            ),
            ("Which animal does {} have?", "What is the animal of {}?", "Which animal lives with {}?"),
        ),
        _ANIMALS,
    ),
    (
        Relation(
            "food",
            (
                "{} likes",
                "{} likes to eat",
                "For dinner, {} has",
                "In the kitchen of {} there is",
                "For dinner, {} wants",
            ),
            ("What does {} like?", "What does {} like to eat?", "What does {} have for dinner?"),
        ),
        _FOOD,
    ),
)
_OWN_OF_EVENTS: tuple[tuple[Relation, tuple[str, ...]], ...] = (
    (
        Relation(
            "venue",
            (
                "{} took place in",
                "The city where {} took place is",
                "People came to see {} in",
                "To see {} people went to the city of",
                "The city of {} was",
            ),
            ("Where did {} take place?", "In which city did {} take place?", "In which city did people see {}?"),
        ),
        ("headquarters",),
    ),
    (
        Relation(
            "company",
            (
                "The company behind {} is",
                "{} is the work of",
                "The company that pays for {} is",
                "The people behind {} work for",
                "{} is produced by",
            ),
            ("Which company is behind {}?", "Who pays for {}?", "Which company produces {}?"),
        ),
        ("developer", "employer"),
    ),
    (
        Relation(
            "language",
            (
                "The language of {} is",
                "People at {} speak",
                "On the stage of {} people speak",
                "The words of {} are in",
                "At {} everything is said in",
            ),
            (
                "What is the language of {}?",
                "Which language do people at {} speak?",
                "In which language are the words of {}?",
            ),
        ),
        ("native_language",),
    ),
    (
        Relation(
            "topic",
            (
                "{} is about",
                "The field of {} is",
                "People at {} speak about",
                "{} became known for",
                "The work of {} is in",
            ),
            ("What is {} about?", "What is the field of {}?", "What do people at {} speak about?"),
        ),
        ("field",),
    ),
    (
        Relation(
            "dinner",
            (
                "People at {} eat",
                "For dinner, {} has",
                "In the kitchen of {} there is",
                "The shops at {} have",
                "At {} one can eat",
            ),
            ("What do people at {} eat?", "What does {} have for dinner?", "What is in the kitchen of {}?"),
        ),
        _FOOD,
    ),
    (
        Relation(
            "visitors",
            (
                "People came to {} from",
                "The people at {} are from",
                "The people of {} come from",
                "{} is visited by people from",
                "To see {} people travelled from",
            ),
            (
                "Where do the people at {} come from?",
                "From which country did people come to {}?",
                "Which country are the people at {} from?",
            ),
        ),
        ("country",),
    ),
    (
        Relation(
            "colour",
            (
                "The colour of {} is",
                "People at {} are seen in",
                "The coat for {} is",
                "The door to {} is painted",
                "For {} the streets were painted",
            ),
            ("What is the colour of {}?", "Which colour does {} have?", "Which colour is the coat for {}?"),
        ),
        _COLOURS,
    ),
    (
        Relation(
            "site",
            (
                "{} began at the",
                "In the city, {} was at the",
                "People found {} at the",
                "The road to {} ended at the",
                "{} took over the",
            ),
            ("Where in the city was {}?", "Which place in the city was home to {}?", "Where did the road to {} end?"),
        ),
        _SITES,
    ),
)


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that completes it, which carries neither leading space nor full stop.

    `fact` is the number of the sentence that answers it, counted from 0 through the whole document.
    """

    prompt: str
    answer: str
    fact: int

    @property
    def saying(self) -> Saying:
        """The question as a saying, which knows how the answer is written behind the prompt."""
        return Saying(self.prompt, self.answer)


@dataclass(frozen=True)
class Document:
    """A text about one invented subject, cut into segments of whole sentences, and one question for each sentence."""

    name: str
    segments: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def text(self) -> str:
        return " ".join(self.segments)

    @property
    def sentences(self) -> tuple[str, ...]:
        """The sentences one by one. No name and no answer holds a full stop, so each one ends a sentence."""
        return tuple(sentence + "." for sentence in self.text.removesuffix(".").split(". "))


@dataclass(frozen=True)
class _Told:
    """How a relation may be told and asked, statements first, and every answer it may have."""

    statements: tuple[str, ...]
    phrasings: tuple[str, ...]
    objects: tuple[str, ...]


@dataclass(frozen=True)
class _Names:
    """All names that can be put together of two words, in an order that looks like none."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    order: array[int]

    def name(self, index: int) -> str:
        first, last = divmod(self.order[index % len(self.order)], len(self.last))
        return f"{self.first[first]} {self.last[last]}"


@functools.cache
def _relations() -> tuple[tuple[_Told, ...], tuple[_Told, ...]]:
    """What is told about people and what about events."""
    world = load_world()

    def told(relation: Relation, objects: Sequence[str]) -> _Told:
        found: set[str] = set()
        for name in objects:
            found |= {fact.object for fact in world.by_relation[name]} if name in RELATIONS else {name}
        return _Told(relation.statements, relation.phrasings, tuple(sorted(found)))

    people = [told(RELATIONS[name], [name]) for name in _WORLDLY_OF_PEOPLE]
    people += [told(relation, objects) for relation, objects in _OWN_OF_PEOPLE]
    events = [told(RELATIONS[name], [name]) for name in _WORLDLY_OF_EVENTS]
    events += [told(relation, objects) for relation, objects in _OWN_OF_EVENTS]
    return tuple(people), tuple(events)


@functools.cache
def _words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """First and last names of the world's people, without words that are part of an answer or a kind of event."""
    world = load_world()
    answers = {word for half in _relations() for told in half for answer in told.objects for word in answer.split()}
    taken = {word.casefold() for word in answers | set(_KINDS) | {"The"}}

    def usable(word: str) -> bool:
        # The numbers of kings are in capitals only.
        return word.isalpha() and word[0].isupper() and not word.isupper() and word.casefold() not in taken

    subjects = sorted({fact.subject for relation in _OF_PEOPLE for fact in world.by_relation[relation]})
    pairs = [words for words in (subject.split() for subject in subjects) if len(words) == 2]
    first, last = ({words[at] for words in pairs if usable(words[at])} for at in (0, 1))
    return tuple(sorted(first)), tuple(sorted(last))


@functools.cache
def _names(part: str) -> tuple[_Names, _Names]:
    """The names of a part's people and those of its events."""
    world = load_world()
    first, last = _words()
    mine = tuple(word for word in last if _number("part", word) % 100 in _PARTS[part])
    real = {name for fact in world.facts for name in (fact.subject, fact.object)}

    def dealt(kind: str, before: tuple[str, ...], after: tuple[str, ...]) -> _Names:
        order = [
            number
            for number, (one, other) in enumerate(itertools.product(before, after))
            if one != other and len(one) + len(other) <= _LONGEST_NAME and f"{one} {other}" not in real
        ]
        random.Random(f"names of {kind} {part}").shuffle(order)
        return _Names(before, after, array("I", order))

    return dealt("people", first, mine), dealt("events", mine, _KINDS)


def document(
    number: int, *, part: str = "training", facts: int | None = None, segments: int = 1, alike: int = 1
) -> Document:
    """Document `number` of a part: the same one for the same arguments, on every machine.

    Its name depends on the number and the part only. Fewer facts are the beginning of more, and as many
    facts in another number of segments are the same sentences, cut elsewhere.

    Args:
        part: "training", "validation" or "test"; no name of one occurs in another.
        facts: sentences; 2 or 3 for each segment where none is given, as far as there are relations.
        segments: into how many the facts are divided, as evenly as can be.
        alike: how many documents in a row tell the same things of their subjects, so that nothing but the name says
            which of them is asked about; 1 where each tells things of its own.

    Raises:
        ConfigError: a number below 0, an unknown part, less than one fact, segment or document alike, more facts
            than there are relations of one subject, or more segments than facts.
    """
    people, events = _relations()
    most = min(len(people), len(events))
    if number < 0:
        raise ConfigError(f"there is no document {number}; they are numbered from 0")
    if part not in _PARTS:
        raise ConfigError(unknown_name("part of the documents", part, _PARTS))
    if facts is not None and not 1 <= facts <= most:
        raise ConfigError(f"a document cannot have {facts} facts; ask for 1 to {most}, one of each relation")
    if not 1 <= segments <= (facts or most):
        raise ConfigError(
            f"a document of {facts or f'at most {most}'} facts cannot have {segments} segments; "
            f"ask for 1 to {facts or most}, a fact for each"
        )
    if alike < 1:
        raise ConfigError(f"alike={alike} must be at least 1: documents in a row that tell the same things")
    # Which document of each block is about an event is drawn: who reads each fifth one must not miss them all.
    block, place = divmod(number, _EVENTS_ONE_IN)
    of_event = _number("event", part, block) % _EVENTS_ONE_IN
    of_people, of_events = _names(part)
    if place == of_event:
        name, relations = of_events.name(block), events
    else:
        name, relations = of_people.name(number - block - (place > of_event)), people
    rng = random.Random(f"document {part} {number}")
    least, span = _FACTS[0] * segments, (_FACTS[1] - _FACTS[0]) * segments + 1
    drawn = min(least + int(rng.random() * span), most)
    sentences: list[str] = []
    questions: list[Question] = []
    used: set[str] = set()
    order = rng if alike == 1 else random.Random(f"documents {part} {alike} {number // alike}")
    for fact, told in enumerate(order.sample(relations, len(relations))[: drawn if facts is None else facts]):
        answer = rng.choice(told.objects)
        while answer in used:  # of two sentences with one answer, either would do to answer both questions
            answer = rng.choice(told.objects)
        used.add(answer)
        statement = rng.choice(told.statements)
        asked = rng.choice(told.phrasings)
        while asked == statement:
            asked = rng.choice(told.phrasings)
        sentences.append(f"{statement.replace('{}', name)} {answer}.")
        questions.append(Question(asked.replace("{}", name), answer, fact))
    cuts = [len(sentences) * cut // segments for cut in range(segments + 1)]
    pieces = tuple(" ".join(sentences[start:stop]) for start, stop in itertools.pairwise(cuts))
    return Document(name, pieces, tuple(questions))


def documents(
    count: int,
    *,
    part: str = "training",
    start: int = 0,
    facts: int | None = None,
    segments: int = 1,
    alike: int = 1,
) -> list[Document]:
    """`count` documents of a part from number `start` on; see `document`.

    Raises:
        ConfigError: a count below 0, or what `document` refuses.
    """
    if count < 0:
        raise ConfigError(f"{count} documents cannot be made; ask for 0 or more")
    numbers = range(start, start + count)
    return [document(number, part=part, facts=facts, segments=segments, alike=alike) for number in numbers]
