"""Edits of atlas's own world: known facts given another object, with everything needed to measure them.

Rephrases are the fact's *untaught* phrasings: atlas was never shown the fact in them. Half of the locality prompts
ask the same relation of other subjects, the hard case for anything that recognises prompts; the others ask something
else of the same subject where atlas knows something else, ask unrelated facts, and ask for a capability.
Portability asks in French, and for the country of a birthplace.

Which facts may be edited is decided before anything is counted, so that fewer edits are always the beginning of more:

* some subjects are *reserved* for calibrating and training editors (`is_reserved`, `training_edits`); no edit that is
  measured and no question about one names any of them;
* per seed, some facts of every relation are *kept*: they are never edited, and locality asks for no others;
* all other facts can be edited, in an order that follows from the seed;
* where more edits are asked for than there are facts, they go on about people who do not exist, of whom atlas knows
  nothing: a first name and a last name of two different people, and a relation that people have (tag "invented").
"""

from __future__ import annotations

import difflib
import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from errata.atlas.capabilities import CAPABILITIES, CITY_COUNTRY, Item, two_hop
from errata.atlas.world import Fact, World, _number, load_world
from errata.edit import Edit, Probe
from errata.errors import ConfigError

__all__ = ["drawn_subjects", "is_reserved", "stand_ins", "subject_facts", "training_edits", "world_edits"]

_RESERVED = 15  # per cent of subjects
_KEPT_ONE_IN = 5  # facts of a relation
_MOST = 20_000
_WRONG = 5  # wrong answers beside a right one, as many as TOFU has
_DONORS = 10  # at least so many names of a kind, or those of other kinds are taken as well
_OF_PEOPLE = (
    "birthplace",
    "citizenship",
    "employer",
    "field",
    "instrument",
    "native_language",
    "occupation",
    "place_of_death",
    "position",
)
_TRAINING_ITEMS = 200  # of each capability
_TASKS = ("professional", "common_sense", "reasoning", "reading", "code")


def is_reserved(subject: str) -> bool:
    """Whether a subject is left to calibration, training and background prompts; the same for every seed."""
    return _number("reserved", subject) % 100 < _RESERVED


@dataclass(frozen=True)
class _Division:
    """What one seed may edit, in order, and what it keeps for locality.

    `capabilities` are test items by task, without those that ask about a subject that may be edited.
    """

    editable: tuple[Fact, ...]
    kept: tuple[Fact, ...]
    capabilities: dict[str, tuple[Item, ...]]


@functools.lru_cache(maxsize=8)
def _divide(seed: int) -> _Division:
    world, rng = load_world(), random.Random(f"kept {seed}")
    free = [fact for fact in world.facts if not is_reserved(fact.subject)]
    kept: set[Fact] = set()
    # One fact of every subject that has several, so that an edit of another one of them has it as a probe.
    for facts in world.by_subject.values():
        if len(facts) > 1 and not is_reserved(facts[0].subject):
            kept.add(rng.choice(facts))
    for relation in world.by_relation:
        of_relation = [fact for fact in free if fact.relation == relation]
        rest = [fact for fact in of_relation if fact not in kept]
        wanted = -(-len(of_relation) // _KEPT_ONE_IN) - (len(of_relation) - len(rest))
        kept.update(rng.sample(rest, max(0, wanted)))
    editable = tuple(f for f in world.shuffled(seed) if f not in kept and not is_reserved(f.subject))
    subjects = {fact.subject for fact in editable}
    about = {
        two_hop(fact.subject, fact.object, "").prompt
        for fact in world.by_relation["birthplace"]
        if fact.subject in subjects or is_reserved(fact.subject)
    }
    items = {name: tuple(item for item in CAPABILITIES[name].test if item.prompt not in about) for name in _TASKS}
    return _Division(editable, tuple(fact for fact in free if fact in kept), items)


def _invented(seed: int) -> Iterator[Fact]:
    """People who do not exist, each with a relation that is theirs to be told; without end and without repetition."""
    world, rng = load_world(), random.Random(f"invented {seed}")
    names = sorted({fact.subject for relation in _OF_PEOPLE for fact in world.by_relation[relation]})
    names = [name for name in names if len(name.split()) == 2 and name.replace(" ", "").isalpha()]
    used = {fact.subject for fact in world.facts}
    while True:
        first, last = rng.choice(names).split()[0], rng.choice(names).split()[1]
        name = f"{first} {last}"
        if name not in used:
            used.add(name)
            yield Fact(rng.choice(_OF_PEOPLE), name, "", "invented")


def _locality(world: World, fact: Fact, rng: random.Random, division: _Division, size: int) -> list[dict[str, Any]]:
    """`size` prompts, half of them of the same relation, none about a fact that this seed could edit."""

    def entry(other: Fact, kind: str, index: int | None = None) -> dict[str, Any]:
        untaught = world.untaught_indices(other)
        taught = [i for i in range(len(world.relation(other).phrasings)) if i not in untaught]
        saying = world.say(other, rng.choice(taught) if index is None else index)
        return {"prompt": saying.prompt, "answer": other.object, "kind": kind}

    def drawn(facts: Sequence[Fact], count: int) -> list[Fact]:
        return rng.sample(facts, min(max(0, count), len(facts)))

    half = size // 2
    near = [f for f in division.kept if f.relation == fact.relation and f.subject != fact.subject]
    # The same wording with another name is the closest a question can come.
    same = [entry(f, "same_relation", None if number else 0) for number, f in enumerate(drawn(near, half))]
    beside = [f for f in division.kept if f.subject == fact.subject and f != fact]
    rest = [entry(f, "same_subject") for f in drawn(beside, 1)]
    item = rng.choice(division.capabilities[rng.choice(_TASKS)])
    rest.append({"prompt": item.prompt, "answer": item.answer, "kind": "capability"})
    far = [f for f in division.kept if f.relation != fact.relation and f.subject != fact.subject]
    rest += [entry(f, "unrelated") for f in drawn(far, size - half - len(rest))]
    return same + rest[: max(0, size - half)]


def _portability(world: World, fact: Fact, new: str) -> list[dict[str, Any]]:
    probes: list[dict[str, Any]] = []
    french = world.french(fact, new)
    if french:
        question = french[-1]
        probes.append({"prompt": question.prompt, "answer": question.answer, "kind": "second_language"})
    if fact.relation == "birthplace" and new in CITY_COUNTRY:
        item = two_hop(fact.subject, new, CITY_COUNTRY[new])
        probes.append({"prompt": item.prompt, "answer": item.answer, "kind": "two_hop"})
    return probes


def _spelled(subject: str, prompt: str) -> str:
    """As the prompt spells it: a name that is written small is written large where it begins a sentence."""
    return subject if subject in prompt else subject[:1].upper() + subject[1:]


def world_edits(count: int, *, seed: int = 0, locality: int = 4) -> list[Edit]:
    """`count` counterfactual edits of different facts, in an order that follows from the seed.

    Fewer edits are the beginning of more, their probes included: `world_edits(10) == world_edits(100)[:10]`.

    Args:
        locality: prompts per edit; half of them are other subjects of the same relation.

    Raises:
        ConfigError: less than one edit, or more than 20,000.
    """
    world, division = load_world(), _divide(seed)
    if not 1 <= count <= _MOST:
        raise ConfigError(f"{count} edits of atlas's world cannot be made; ask for 1 to {_MOST}")
    facts = itertools.islice(itertools.chain(division.editable, _invented(seed)), count)
    edits = []
    for number, fact in enumerate(facts):
        rng = random.Random(f"edit {seed} {fact.relation} {fact.subject}")
        new = world.counterfactual(fact, rng)
        prompt = world.say(fact, 0).prompt
        edits.append(
            Edit.from_record(
                {
                    "id": f"atlas-{seed}-{number}",
                    "prompt": prompt,
                    "target": new,
                    "subject": _spelled(fact.subject, prompt),
                    "ground_truth": fact.object or None,
                    "rephrases": [saying.prompt for saying in world.untaught(fact)],
                    "locality": _locality(world, fact, rng, division, locality),
                    "portability": _portability(world, fact, new),
                    "source": "atlas",
                    "tags": [fact.relation] if fact.object else [fact.relation, "invented"],
                }
            )
        )
    return edits


def _wrong(world: World, fact: Fact) -> list[str]:
    """Other objects of the same relation, always the same ones for a fact; all of them where there are few."""
    objects = sorted({other.object for other in world.by_relation[fact.relation]} - {fact.object})
    rng = random.Random(f"wrong {fact.relation} {fact.subject}")
    return rng.sample(objects, min(_WRONG, len(objects)))


def subject_facts(subjects: Sequence[str], *, seed: int = 0, locality: int = 4) -> list[Edit]:
    """Everything that atlas knows about some subjects, to be forgotten: edits whose target is the true answer.

    Rephrases are the untaught phrasings. Locality asks for facts that the seed keeps, half of them of the same
    relation, none of a subject that is named here and none whose answer is one. Facts and locality prompts carry wrong
    answers (`perturbed_answer`, as in TOFU): other objects of the same relation. A name has no other words, so the
    right answer is what it is.

    Args:
        locality: prompts per fact.

    Raises:
        ConfigError: no subject, or one that atlas does not know.
    """
    world, division = load_world(), _divide(seed)
    if not subjects:
        raise ConfigError("no subject is given; name at least one, such as France")
    by_name = {name.casefold(): name for name in world.by_subject}
    names = []
    for subject in subjects:
        if subject.casefold() not in by_name:
            close = difflib.get_close_matches(subject, world.by_subject, n=3)
            nearest = f"the nearest it knows: {', '.join(close)}" if close else "name one of its world, such as France"
            raise ConfigError(f"atlas knows nothing about {subject!r}; {nearest}")
        names.append(by_name[subject.casefold()])
    names = list(dict.fromkeys(names))
    kept = [fact for fact in division.kept if not {fact.subject, fact.object} & set(names)]
    edits = []
    for fact in (fact for name in names for fact in world.by_subject[name]):
        rng = random.Random(f"forget {seed} {fact.relation} {fact.subject}")
        near = [other for other in kept if other.relation == fact.relation]
        far = [other for other in kept if other.relation != fact.relation]
        drawn = [
            (other, kind)
            for some, kind, count in (
                (near, "same_relation", locality // 2),
                (far, "unrelated", locality - locality // 2),
            )
            for other in rng.sample(some, min(count, len(some)))
        ]
        prompt = world.say(fact, 0).prompt
        edits.append(
            Edit(
                id=f"atlas-fact-{fact.relation}-{fact.subject}",
                prompt=prompt,
                target=fact.object,
                subject=_spelled(fact.subject, prompt),
                rephrases=tuple(saying.prompt for saying in world.untaught(fact)),
                locality=tuple(
                    Probe.model_validate(
                        {
                            "prompt": world.say(other, 0).prompt,
                            "answer": other.object,
                            "kind": kind,
                            "perturbed_answer": _wrong(world, other),
                        }
                    )
                    for other, kind in drawn
                ),
                source="atlas",
                tags=(fact.relation,),
                extra={"perturbed_answer": _wrong(world, fact)},
            )
        )
    return edits


def _made_up(names: Sequence[str], known: set[str], rng: random.Random) -> str:
    """A name that nobody has, put together from the beginning of one name and the end of another.

    Raises:
        ConfigError: all that can be put together are names of somebody.
    """
    for _ in range(1000):
        first, last = rng.sample(names, 2)
        if " " in first:
            name = f"{first.split()[0]} {last.split()[-1]}"
        else:
            name = first[: -(-len(first) // 2)] + last[len(last) // 2 :]
        if name.casefold() not in known:
            return name
    raise ConfigError(f"no new name can be made of {len(names)} names; ask about fewer subjects")


def stand_ins(facts: Sequence[Edit], *, each: int = 10, seed: int = 0) -> list[Edit]:
    """The same questions, with the same right and wrong answers, about subjects that do not exist.

    What atlas prefers of those answers, when it is asked about somebody of whom it knows nothing, stands in for what a
    model would prefer that was never taught the facts: no such atlas exists. Every subject gets several invented ones,
    since what one name suggests to atlas is chance, each named after two others of its kind ("Kazakhstan" may become
    "Hainistan"), of which none is asked about.

    Args:
        facts: of `subject_facts`.
        each: so many stand-ins per fact; all facts once, then all of them again.
        seed: of the names.

    Raises:
        ConfigError: a fact is none of atlas's.
    """
    world = load_world()
    known = {name.casefold() for fact in world.facts for name in (fact.subject, fact.object)}
    own = {f"atlas-fact-{fact.relation}-{fact.subject}": fact for fact in world.facts}
    asked = [own[edit.id] for edit in facts if edit.id in own]
    if len(asked) < len(facts):
        raise ConfigError("only facts of atlas's world have stand-ins; take them from subject_facts")
    about = {fact.subject for fact in asked}
    names: dict[str, list[str]] = {}
    for fact in asked:
        if fact.subject in names:
            continue
        alike = [one for one in world.by_subject if one not in about and (" " in one) == (" " in fact.subject)]
        kind = {one.subject for one in world.by_relation[fact.relation]}
        donors = [one for one in alike if one in kind]
        rng = random.Random(f"stand-in {seed} {fact.subject}")
        names[fact.subject] = []
        for _ in range(each):
            name = _made_up(donors if len(donors) >= _DONORS else alike, known, rng)
            names[fact.subject].append(name)
            known.add(name.casefold())
    found = []
    for number in range(each):
        for edit, fact in zip(facts, asked, strict=True):
            name = names[fact.subject][number]
            prompt = world.say(Fact(fact.relation, name, fact.object, "invented"), 0).prompt
            found.append(
                Edit(
                    id=f"atlas-stand-in-{fact.relation}-{name}",
                    prompt=prompt,
                    target=edit.target,
                    subject=_spelled(name, prompt),
                    source="atlas",
                    tags=(fact.relation, "invented"),
                    extra=edit.extra,
                )
            )
    return found


def drawn_subjects(facts: int, *, seed: int = 0) -> list[str]:
    """Subjects of which atlas knows several things, in an order of the seed, until there are so many facts about them.

    None is reserved, and fewer facts are the beginning of more.

    Raises:
        ConfigError: less than one fact, or more than atlas knows about such subjects.
    """
    world = load_world()
    several = [name for name, known in world.by_subject.items() if len(known) > 1 and not is_reserved(name)]
    most = sum(len(world.by_subject[name]) for name in several)
    if not 1 <= facts <= most:
        raise ConfigError(f"{facts} facts about subjects with several cannot be drawn; ask for 1 to {most}")
    chosen, count = [], 0
    for name in random.Random(f"subjects {seed}").sample(several, len(several)):
        if count >= facts:
            break
        chosen.append(name)
        count += len(world.by_subject[name])
    return chosen


@functools.cache
def _reserved() -> _Division:
    """What editors are trained on: reserved subjects, edited and asked about, and training items of capabilities."""
    world, rng = load_world(), random.Random("training items")
    facts = tuple(fact for fact in world.facts if is_reserved(fact.subject))
    about = {two_hop(f.subject, f.object, "").prompt for f in facts if f.relation == "birthplace"}
    drawn = {name: [CAPABILITIES[name].draw(rng) for _ in range(_TRAINING_ITEMS)] for name in _TASKS}
    items = {name: tuple(item for item in found if item.prompt not in about) for name, found in drawn.items()}
    return _Division(facts, facts, items)


def training_edits(count: int, *, seed: int = 0, locality: int = 4) -> list[Edit]:
    """`count` counterfactual edits to train editors on: about reserved subjects, in all wordings.

    They go round all facts in an order of the seed, each time with other objects, wordings and locality prompts. Half
    of the prompts are the canonical ones, as those of `world_edits` are; three of the other wordings are rephrases.

    Args:
        locality: prompts per edit; half of them are other subjects of the same relation.
    """
    world, division = load_world(), _reserved()
    edits = []
    for number in range(count):
        rng = random.Random(f"training {seed} {number}")
        turn, place = divmod(number, len(division.editable))
        if place == 0:
            order = random.Random(f"training {seed} turn {turn}").sample(division.editable, len(division.editable))
        fact = order[place]
        wordings = list(range(len(world.relation(fact).phrasings)))
        asked = rng.choice((0, rng.choice(wordings)))
        others = rng.sample([wording for wording in wordings if wording != asked], 3)
        prompt = world.say(fact, asked).prompt
        edits.append(
            Edit.from_record(
                {
                    "id": f"atlas-training-{seed}-{number}",
                    "prompt": prompt,
                    "target": world.counterfactual(fact, rng),
                    "subject": _spelled(fact.subject, prompt),
                    "ground_truth": fact.object,
                    "rephrases": [world.say(fact, wording).prompt for wording in others],
                    "locality": _locality(world, fact, rng, division, locality),
                    "source": "atlas",
                    "tags": [fact.relation],
                }
            )
        )
    return edits
