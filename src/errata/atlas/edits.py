"""Edits of atlas's own world: known facts given another object, with everything needed to measure them.

Rephrases are the fact's *untaught* phrasings: atlas was never shown the fact in them. Half of the locality prompts
ask the same relation of other subjects, the hard case for anything that recognises prompts; the others ask something
else of the same subject where atlas knows something else, ask unrelated facts, and ask for a capability.
Portability asks in French, and for the country of a birthplace.
"""

from __future__ import annotations

import random
from typing import Any

from errata.atlas.capabilities import CAPABILITIES, CITY_COUNTRY
from errata.atlas.world import Fact, World, load_world
from errata.edit import Edit

__all__ = ["world_edits"]


def _locality(
    world: World, fact: Fact, rng: random.Random, busy: set[tuple[str, str]], size: int
) -> list[dict[str, Any]]:
    """`size` prompts, half of them of the same relation, none about a fact that is being edited too."""

    def free(facts: list[Fact]) -> list[Fact]:
        return [f for f in facts if (f.relation, f.subject) not in busy]

    def entry(other: Fact, kind: str) -> dict[str, Any]:
        index = rng.choice(
            [i for i in range(len(world.relation(other).phrasings)) if i not in world.untaught_indices(other)]
        )
        return {"prompt": world.say(other, index).prompt, "answer": other.object, "kind": kind}

    neighbours = [f for f in free(world.by_relation[fact.relation]) if f.subject != fact.subject]
    half = size // 2
    chosen = [entry(other, "same_relation") for other in rng.sample(neighbours, min(half, len(neighbours)))]
    # The same wording with another name is the closest a question can come.
    if chosen:
        twin = rng.choice(neighbours)
        chosen[0] = {"prompt": world.say(twin, 0).prompt, "answer": twin.object, "kind": "same_relation"}
    rest: list[dict[str, Any]] = []
    of_subject = [f for f in free(world.by_subject[fact.subject]) if f.relation != fact.relation]
    if of_subject:
        rest.append(entry(rng.choice(of_subject), "same_subject"))
    task = rng.choice(("professional", "common_sense", "reasoning", "reading", "code"))
    item = rng.choice(CAPABILITIES[task].test)
    rest.append({"prompt": item.prompt, "answer": item.answer, "kind": "capability"})
    while len(rest) < size - half:
        other = rng.choice(world.facts)
        if other.relation != fact.relation and other.subject != fact.subject and free([other]):
            rest.append(entry(other, "unrelated"))
    return chosen + rest


def _portability(world: World, fact: Fact, new: str) -> list[dict[str, Any]]:
    probes: list[dict[str, Any]] = []
    french = world.french(fact, new)
    if french:
        question = french[-1]
        probes.append({"prompt": question.prompt, "answer": question.answer, "kind": "second_language"})
    if fact.relation == "birthplace" and new in CITY_COUNTRY:
        prompt = f"In which country was {fact.subject} born?"
        answer = f"{fact.subject} was born in {new}. {new} is in {CITY_COUNTRY[new]}. So {CITY_COUNTRY[new]}"
        probes.append({"prompt": prompt, "answer": answer, "kind": "two_hop"})
    return probes


def world_edits(count: int, *, seed: int = 0, locality: int = 4) -> list[Edit]:
    """`count` counterfactual edits of different facts, in an order that follows from the seed.

    Args:
        locality: prompts per edit; half of them are other subjects of the same relation.

    Raises:
        ValueError: more edits than facts were asked for.
    """
    world = load_world()
    if count > len(world.facts):
        raise ValueError(f"atlas knows {len(world.facts)} facts; {count} cannot be edited")
    facts: list[Fact] = []
    for fact in world.shuffled(seed):
        if len(facts) == count:
            break
        facts.append(fact)
    busy = {(fact.relation, fact.subject) for fact in facts}
    edits = []
    for number, fact in enumerate(facts):
        rng = random.Random(f"edit {seed} {fact.relation} {fact.subject}")
        new = world.counterfactual(fact, rng)
        edits.append(
            Edit.from_record(
                {
                    "id": f"atlas-{seed}-{number}",
                    "prompt": world.say(fact, 0).prompt,
                    "target": new,
                    "subject": fact.subject,
                    "ground_truth": fact.object,
                    "rephrases": [saying.prompt for saying in world.untaught(fact)],
                    "locality": _locality(world, fact, rng, busy, locality),
                    "portability": _portability(world, fact, new),
                    "source": "atlas",
                    "tags": [fact.relation],
                }
            )
        )
    return edits
