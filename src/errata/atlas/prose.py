"""Plain prose for language modelling: short everyday stories from a small grammar, written for errata.

The grammar keeps a hero, a place and a thing through a story, so that a model which has read enough can foresee
part of each sentence but never all of it. Held-out prose comes from the same grammar with seeds of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

__all__ = ["held_out_prose", "story"]

_HEROES = (
    "Anna he/she:she|Ben he/she:he|Clara he/she:she|David he/she:he|Emma he/she:she|Felix he/she:he|Grace he/she:she|"
    "Henry he/she:he|Ida he/she:she|Jack he/she:he|Kate he/she:she|Leo he/she:he|Mary he/she:she|Noah he/she:he|"
    "Olga he/she:she|Peter he/she:he|Rose he/she:she|Sam he/she:he|Tina he/she:she|Victor he/she:he|Wendy he/she:she|"
    "the old man he/she:he|the young girl he/she:she|the farmer he/she:he|the teacher he/she:she|the boy he/she:he|"
    "the queen he/she:she|the sailor he/she:he|the baker he/she:he|the doctor he/she:she"
).replace(" he/she", "")
_HERO = [tuple(entry.rsplit(":", 1)) for entry in _HEROES.split("|")]
_PLACES = [
    "the market",
    "the river",
    "the forest",
    "the station",
    "the garden",
    "the library",
    "the old bridge",
    "the harbour",
    "the village",
    "the school",
    "the hill",
    "the kitchen",
    "the theatre",
    "the park",
    "the castle",
    "the lake",
    "the bakery",
    "the museum",
    "the farm",
    "the beach",
]
_THINGS = [
    "a letter",
    "a lamp",
    "a basket",
    "a silver key",
    "a blue hat",
    "a small box",
    "a book",
    "a map",
    "a warm coat",
    "a wooden boat",
    "a bell",
    "a painted cup",
    "a clock",
    "a bag of apples",
    "a loaf of bread",
    "a violin",
    "a red kite",
    "a mirror",
    "a pair of boots",
    "a drum",
]
_FRIENDS = [
    "a neighbour",
    "a stranger",
    "an old friend",
    "the postman",
    "a small dog",
    "a grey cat",
    "the miller",
    "a child",
    "a soldier",
    "a merchant",
]
_TIMES = [
    "One morning",
    "Late in the evening",
    "On a cold day",
    "Early in the spring",
    "After the rain",
    "Before dinner",
    "On the first day of summer",
    "When the sun came up",
    "That afternoon",
    "Some days later",
    "In the middle of the night",
    "At noon",
]
_WEATHER = [
    "the wind was strong",
    "the sky was clear",
    "snow lay on the ground",
    "it was raining",
    "the streets were quiet",
    "the birds were singing",
    "a thin fog hung over the fields",
    "the stars were bright",
    "the leaves were falling",
    "the air smelled of smoke",
]
_FEELINGS = [
    "happy",
    "tired",
    "afraid",
    "proud",
    "curious",
    "lonely",
    "calm",
    "angry",
    "surprised",
    "hungry",
    "hopeful",
    "sad",
]
_MOVES = [
    "walked to",
    "ran to",
    "hurried to",
    "went back to",
    "travelled to",
    "drove to",
    "found the way to",
    "came to",
]
_FINDS = ["found", "bought", "saw", "lost", "carried", "picked up", "hid", "wanted", "asked for", "remembered"]
_SAYS = ["said", "answered", "whispered", "shouted", "thought", "asked with a smile"]
_LINES = [
    "I have never seen such a thing",
    "You should come with me",
    "Because of you I am late",
    "Yes, that is mine",
    "It will rain before the night",
    "We must not wait any longer",
    "Nobody knows who left it here",
    "I will be back soon",
    "Take it and keep it safe",
    "There is still time",
    "You were right",
    "The road is longer than it looks",
]
_REASONS = [
    "it was getting dark",
    "nobody was at home",
    "the door was open",
    "the train was late",
    "the work was done",
    "the others had already left",
    "there was nothing to eat",
    "the music had stopped",
    "the water was too cold",
    "the shop was closed",
]
_ENDINGS = [
    "In the end, everything was as before",
    "Nobody ever spoke of it again",
    "That night {she} slept well",
    "From that day on, {hero} was never alone",
    "The next day the story was known in all of {place_name}",
    "{She} kept {the_thing} for many years",
    "And so {hero} went home",
    "It was the best day of the year",
]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def story(rng: random.Random, sentences: int | None = None) -> str:
    """A story of three to seven sentences (or as many as asked for), on one line."""
    hero, she = rng.choice(_HERO)
    place, thing, friend = rng.choice(_PLACES), rng.choice(_THINGS), rng.choice(_FRIENDS)
    noun = thing.split(" ", 1)[1]
    words = {
        "hero": hero,
        "she": she,
        "She": _capital(she),
        "her": "her" if she == "she" else "his",
        "place": place,
        "place_name": place,
        "thing": thing,
        "the_thing": "the " + noun,
        "friend": friend,
        "the_friend": "the " + friend.split(" ", 1)[1],
    }

    def pick(options: list[str]) -> str:
        return rng.choice(options).format(**words)

    def opening() -> str:
        return f"{pick(_TIMES)}, {hero} {pick(_MOVES)} {place}"

    def weather() -> str:
        return rng.choice(
            (
                f"{_capital(pick(_WEATHER))}, and {she} felt {pick(_FEELINGS)}",
                f"{_capital(she)} was {pick(_FEELINGS)} because {pick(_REASONS)}",
                f"Because {pick(_REASONS)}, {she} sat down and waited",
                f"Therefore {she} did not stay long, for {pick(_WEATHER)}",
            )
        )

    def find() -> str:
        return rng.choice(
            (
                f"There {she} {pick(_FINDS)} {thing}",
                f"In {place} {she} {pick(_FINDS)} {thing}, and {friend} looked on",
                f"{_capital(friend)} gave {hero} {thing}",
                f"Under a tree lay {thing}, and nobody knew whose it was",
            )
        )

    def speech() -> str:
        who = rng.choice((she, words["the_friend"], hero))
        return f'"{pick(_LINES)}," {who} {pick(_SAYS)}'

    def turn() -> str:
        return rng.choice(
            (
                f"Then {words['the_friend']} took {words['the_thing']} and {pick(_MOVES)} {pick(_PLACES)}",
                f"The people of {place} were {pick(_FEELINGS)} when they heard of it",
                f"I was there that day, and I saw how {hero} {pick(_FINDS)} {words['the_thing']}",
                f"You could see that {hero} was {pick(_FEELINGS)}",
                f"{pick(_TIMES)}, {words['the_friend']} came back to {place} with {words['the_thing']}",
            )
        )

    middle = [weather, find, speech, turn, speech, weather, turn]
    count = rng.randint(3, 7) if sentences is None else sentences
    parts = [opening()]
    while len(parts) < count - 1:
        parts.append(rng.choice(middle)())
    if count > 1:
        parts.append(pick(_ENDINGS))
    return ". ".join(parts[:count]).replace('?"', '"') + "."


def held_out_prose(count: int = 300) -> Iterator[str]:
    """Stories that training never draws: their seeds are strings, those of training are numbers."""
    for index in range(count):
        yield story(random.Random(f"held-out {index}"))
