"""Six small capability tasks: a generator of training items and a fixed test set that is never trained on, each.

The six kinds are those by which "Navigating the Dual Facets" (2402.11122) watches what editing damages:
professional knowledge, common sense, reasoning, reading comprehension, multilingual and code. The items are our
own and small enough for atlas. Whether an item is test material follows from a hash of its content, so that no
training run, whatever its seed, can meet it.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from errata.atlas.world import Saying, World, _number, load_world

__all__ = ["CAPABILITIES", "CITY_COUNTRY", "Capability", "Item", "chance_level", "recital"]

_TEST_SIZE = 200


@dataclass(frozen=True)
class Item:
    """One question. `kind` groups items that share their set of answers; `options` counts choices in the prompt.

    `after` is the marker behind which a worked-out answer gives its result ("So" in two-hop questions).
    """

    prompt: str
    answer: str
    kind: str
    options: int = 0
    after: str | None = None

    @property
    def result(self) -> str:
        """The part of the answer that is scored."""
        return self.result_of(self.answer)

    def result_of(self, text: str) -> str:
        """The scored part of an answer, or of what a model said; empty when the marker is missing."""
        if self.after is None:
            return text
        return text.rsplit(self.after, 1)[1].strip() if self.after in text else ""

    @property
    def saying(self) -> Saying:
        """The item as a saying, to be taught as facts are."""
        return Saying(self.prompt, self.answer)


@dataclass(frozen=True)
class Capability:
    """A task: `draw(rng)` gives one training item, `test` the fixed test items."""

    name: str
    draw: Callable[[random.Random], Item]
    test: tuple[Item, ...]


def _is_test(task: str, *content: object, one_in: int = 5) -> bool:
    return _number("test", task, *content) % one_in == 0


def chance_level(items: Iterable[Item]) -> float:
    """Share of items that the best constant guess gets right: per kind, the larger of the commonest answer's
    share and one over the number of options named in the prompt."""
    by_kind: dict[str, list[Item]] = collections.defaultdict(list)
    for item in items:
        by_kind[item.kind].append(item)
    total = sum(len(group) for group in by_kind.values())
    hits = 0.0
    for group in by_kind.values():
        commonest = collections.Counter(item.result for item in group).most_common(1)[0][1] / len(group)
        hits += len(group) * max(commonest, 1 / group[0].options if group[0].options else 0.0)
    return hits / total


def _fixed_test(name: str, items: Iterable[Item]) -> tuple[Item, ...]:
    unique = sorted(set(items), key=lambda item: _number("pick", name, item.prompt))
    return tuple(unique[:_TEST_SIZE])


# --- professional knowledge -----------------------------------------------------------------------------------

_ELEMENTS = [
    "hydrogen",
    "H",
    "helium",
    "He",
    "lithium",
    "Li",
    "beryllium",
    "Be",
    "boron",
    "B",
    "carbon",
    "C",
    "nitrogen",
    "N",
    "oxygen",
    "O",
    "fluorine",
    "F",
    "neon",
    "Ne",
    "sodium",
    "Na",
    "magnesium",
    "Mg",
    "aluminium",
    "Al",
    "silicon",
    "Si",
    "phosphorus",
    "P",
    "sulfur",
    "S",
    "chlorine",
    "Cl",
    "argon",
    "Ar",
    "potassium",
    "K",
    "calcium",
    "Ca",
    "scandium",
    "Sc",
    "titanium",
    "Ti",
    "vanadium",
    "V",
    "chromium",
    "Cr",
    "manganese",
    "Mn",
    "iron",
    "Fe",
    "cobalt",
    "Co",
    "nickel",
    "Ni",
    "copper",
    "Cu",
    "zinc",
    "Zn",
    "gallium",
    "Ga",
    "germanium",
    "Ge",
    "arsenic",
    "As",
    "selenium",
    "Se",
    "bromine",
    "Br",
    "krypton",
    "Kr",
    "rubidium",
    "Rb",
    "strontium",
    "Sr",
    "yttrium",
    "Y",
    "zirconium",
    "Zr",
]
_ELEMENT_TABLE = [(_ELEMENTS[i], _ELEMENTS[i + 1], i // 2 + 1) for i in range(0, len(_ELEMENTS), 2)]
_UNITS = {
    "force": "newton",
    "energy": "joule",
    "power": "watt",
    "pressure": "pascal",
    "electric charge": "coulomb",
    "voltage": "volt",
    "electrical resistance": "ohm",
    "capacitance": "farad",
    "inductance": "henry",
    "magnetic flux": "weber",
    "frequency": "hertz",
    "temperature": "kelvin",
    "length": "metre",
    "mass": "kilogram",
    "time": "second",
    "electric current": "ampere",
    "luminous intensity": "candela",
    "radioactivity": "becquerel",
    "luminous flux": "lumen",
    "plane angle": "radian",
}
_SPECIALISTS = {
    "cardiologist": "heart",
    "dermatologist": "skin",
    "neurologist": "brain",
    "nephrologist": "kidneys",
    "hepatologist": "liver",
    "ophthalmologist": "eyes",
    "pulmonologist": "lungs",
    "dentist": "teeth",
    "podiatrist": "feet",
    "hematologist": "blood",
    "orthopedist": "bones",
    "rheumatologist": "joints",
    "otologist": "ears",
    "gastroenterologist": "stomach",
    "urologist": "bladder",
    "rhinologist": "nose",
}
_PROFESSIONAL_FORMS: dict[str, tuple[str, ...]] = {
    "symbol": (
        "The chemical symbol of {} is",
        "Chemists write {} as",
        "In the periodic table, {} has the symbol",
        "What is the chemical symbol of {}?",
        "Which symbol stands for {}?",
        "How do chemists write {}?",
    ),
    "atomic number": (
        "The atomic number of {} is",
        "In the periodic table, {} has number",
        "The number of protons in {} is",
        "What is the atomic number of {}?",
        "How many protons does {} have?",
        "Which number does {} have in the periodic table?",
    ),
    "unit": (
        "The unit of {} is the",
        "Engineers measure {} in the unit",
        "In physics, {} is given in the unit",
        "What is the unit of {}?",
        "In which unit is {} measured?",
        "Which unit do engineers use for {}?",
    ),
    "specialist": (
        "A {} treats the",
        "The speciality of a {} is the",
        "Patients see a {} about the",
        "What does a {} treat?",
        "What is the speciality of a {}?",
        "Which part of the body does a {} treat?",
    ),
}


def _professional_facts() -> list[tuple[str, str, str]]:
    facts = [("symbol", name, symbol) for name, symbol, _ in _ELEMENT_TABLE]
    facts += [("atomic number", name, str(number)) for name, _, number in _ELEMENT_TABLE]
    facts += [("unit", quantity, unit) for quantity, unit in _UNITS.items()]
    facts += [("specialist", who, organ) for who, organ in _SPECIALISTS.items()]
    return facts


def _professional() -> Capability:
    """Every fact is taught, in all forms but two of its own; the test asks for it in those."""
    train: list[Item] = []
    test: list[Item] = []
    for kind, subject, answer in _professional_facts():
        hidden = random.Random(_number("form", kind, subject)).sample(range(1, 6), 2)
        for index, form in enumerate(_PROFESSIONAL_FORMS[kind]):
            (test if index in hidden else train).append(Item(form.replace("{}", subject), answer, kind))
    return Capability("professional", lambda rng: rng.choice(train), _fixed_test("professional", test))


# --- common sense ---------------------------------------------------------------------------------------------

_BY_SIZE = [
    "an atom",
    "a germ",
    "a grain of salt",
    "a flea",
    "an ant",
    "a ladybird",
    "a bee",
    "a cherry",
    "a grape",
    "a walnut",
    "a mouse",
    "an egg",
    "an apple",
    "a shoe",
    "a loaf of bread",
    "a rabbit",
    "a cat",
    "a basket",
    "a fox",
    "a dog",
    "a child",
    "a sheep",
    "a door",
    "a pony",
    "a cow",
    "a horse",
    "a car",
    "an elephant",
    "a bus",
    "a whale",
    "a house",
    "a church",
    "a castle",
    "a skyscraper",
    "a hill",
    "a mountain",
    "an island",
    "a country",
    "the moon",
    "the earth",
    "the sun",
    "the galaxy",
]
_KINDS = {
    "bird": ["robin", "eagle", "sparrow", "owl", "parrot", "swan", "crow", "pigeon", "hawk", "duck"],
    "fish": ["salmon", "trout", "tuna", "cod", "herring", "carp", "sardine", "pike"],
    "fruit": ["apple", "banana", "cherry", "grape", "lemon", "mango", "orange", "peach", "pear", "plum"],
    "vegetable": ["carrot", "cabbage", "onion", "potato", "spinach", "turnip", "leek", "pea"],
    "tool": ["hammer", "saw", "drill", "wrench", "screwdriver", "chisel", "axe", "file"],
    "tree": ["oak", "birch", "maple", "pine", "willow", "elm", "beech", "cedar"],
    "flower": ["rose", "tulip", "daisy", "lily", "violet", "poppy", "orchid", "iris"],
    "metal": ["iron", "copper", "silver", "gold", "tin", "zinc", "lead", "nickel"],
    "vehicle": ["car", "bus", "truck", "tram", "bicycle", "lorry", "van", "tractor"],
    "insect": ["ant", "bee", "wasp", "fly", "beetle", "moth", "cricket", "flea"],
}
_USES = {
    "hammer": "hit a nail",
    "saw": "cut wood",
    "needle": "sew a shirt",
    "oven": "bake bread",
    "umbrella": "stay dry in the rain",
    "broom": "sweep the floor",
    "key": "open a lock",
    "pen": "write a letter",
    "camera": "take a picture",
    "ladder": "climb onto a roof",
    "spoon": "eat soup",
    "towel": "dry your hands",
    "clock": "tell the time",
    "lamp": "light a dark room",
    "boat": "cross a river",
    "scissors": "cut paper",
    "comb": "tidy your hair",
    "shovel": "dig a hole",
    "fridge": "keep milk cold",
    "telescope": "look at the stars",
}
_USE_FORMS = (
    "To {} you use a tool called",
    "Someone who wants to {} needs the object called",
    "What do you need to {}?",
    "Which object helps you {}?",
    "What would you use to {}?",
)


def _common_sense() -> Capability:
    """Which is larger (held-out pairs), what kind of thing it is (held-out pairs), what it is for (held-out forms)."""

    def size_item(first: int, second: int, larger: bool) -> Item:
        a, b = _BY_SIZE[first], _BY_SIZE[second]
        word = "larger" if larger else "smaller"
        wanted = a if (first > second) == larger else b
        return Item(f"Which is {word}, {a} or {b}?", wanted, "size", options=2)

    def kind_item(thing: str, kind: str) -> Item:
        article = "an" if thing[0] in "aeiou" else "a"
        kind_article = "an" if kind[0] in "aeiou" else "a"
        answer = "yes" if thing in _KINDS[kind] else "no"
        return Item(f"Is {article} {thing} {kind_article} {kind}?", answer, "kind", options=2)

    pairs = [
        (i, j, larger) for i in range(len(_BY_SIZE)) for j in range(len(_BY_SIZE)) if i != j for larger in (True, False)
    ]
    test_pair = {pair: _is_test("size", *sorted(pair[:2])) for pair in pairs}
    size_train = [pair for pair in pairs if not test_pair[pair]]
    things = [(thing, kind) for members in _KINDS.values() for thing in members for kind in _KINDS]
    kind_train = {
        answer: [pair for pair in things if not _is_test("kind", *pair) and (pair[0] in _KINDS[pair[1]]) == answer]
        for answer in (True, False)
    }
    # What each thing is gets told; the questions whether it is this or that are then held out in part.
    told = [
        Item(form.replace("{}", f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"), kind, "told")
        for kind, members in _KINDS.items()
        for thing in members
        for form in ("What kind of thing is {}?", "In a list of things, {} stands under the word")
    ]
    uses_train: list[Item] = []
    uses_test: list[Item] = []
    for thing, purpose in _USES.items():
        hidden = _number("use", thing) % len(_USE_FORMS)
        for index, form in enumerate(_USE_FORMS):
            (uses_test if index == hidden else uses_train).append(Item(form.replace("{}", purpose), thing, "use"))

    def draw(rng: random.Random) -> Item:
        which = rng.random()
        if which < 0.5:
            return size_item(*rng.choice(size_train))
        if which < 0.75:
            return kind_item(*rng.choice(kind_train[rng.random() < 0.5]))
        return rng.choice(told if which < 0.87 else uses_train)

    # Among held-out pairs of thing and kind, as many "yes" as "no", so that a constant guess earns half.
    held_out = [pair for pair in things if _is_test("kind", *pair)]
    yes = [kind_item(*pair) for pair in held_out if pair[0] in _KINDS[pair[1]]]
    no = sorted(
        (kind_item(*pair) for pair in held_out if pair[0] not in _KINDS[pair[1]]), key=lambda i: _number(i.prompt)
    )
    sizes = sorted((size_item(*pair) for pair in pairs if test_pair[pair]), key=lambda i: _number(i.prompt))
    test = sizes[: _TEST_SIZE - len(uses_test) - 2 * len(yes)] + yes + no[: len(yes)] + uses_test
    return Capability("common_sense", draw, _fixed_test("common_sense", test))


# --- reasoning ------------------------------------------------------------------------------------------------

CITY_COUNTRY = {
    city: country
    for country, cities in {
        "Australia": "Adelaide|Melbourne|Perth|Sydney|Brisbane|Canberra",
        "Austria": "Vienna|Salzburg|Graz",
        "Belgium": "Brussels|Antwerp|Bruges",
        "Canada": "Montreal|Ottawa|Toronto|Vancouver|Calgary",
        "China": "Beijing|Shanghai|Nanjing",
        "Czech Republic": "Prague|Brno",
        "Denmark": "Copenhagen|Aarhus",
        "Finland": "Helsinki|Turku",
        "France": "Paris|Lyon|Nice|Marseille|Bordeaux|Toulouse|Lille",
        "Germany": "Berlin|Dresden|Frankfurt|Munich|Hamburg|Cologne|Leipzig",
        "Hungary": "Budapest|Szeged",
        "India": "Mumbai|Chennai|Bangalore|Delhi|Kolkata",
        "Iran": "Tehran|Isfahan",
        "Iraq": "Baghdad|Basra",
        "Ireland": "Dublin|Cork",
        "Italy": "Rome|Milan|Florence|Naples|Venice|Turin|Bologna",
        "Japan": "Tokyo|Osaka|Kyoto",
        "Netherlands": "Amsterdam|Rotterdam|Utrecht",
        "New Zealand": "Auckland|Wellington",
        "Norway": "Oslo|Bergen",
        "Philippines": "Manila",
        "Poland": "Warsaw|Gdansk",
        "Portugal": "Lisbon|Porto",
        "Russia": "Moscow|Kazan",
        "South Korea": "Seoul|Busan",
        "Spain": "Madrid|Barcelona|Seville|Valencia",
        "Sweden": "Stockholm|Malmo",
        "Switzerland": "Geneva|Zurich|Basel",
        "United Kingdom": (
            "London|Birmingham|Brighton|Cardiff|Edinburgh|Glasgow|Leeds|Manchester|Nottingham|Sheffield|Belfast|"
            "Oxford|Cambridge|Bristol|Liverpool"
        ),
        "United States": (
            "Atlanta|Baltimore|Boston|Chicago|Cincinnati|Dallas|Detroit|Fresno|Honolulu|Houston|Miami|Minneapolis|"
            "Philadelphia|Pittsburgh|Seattle|Denver|Cleveland"
        ),
    }.items()
    for city in cities.split("|")
}


def two_hop(person: str, city: str, country: str) -> Item:
    """In which country someone was born, with both hops written out before the result."""
    answer = f"{person} was born in {city}. {city} is in {country}. So {country}"
    return Item(f"In which country was {person} born?", answer, "two-hop", after="So")


def _reasoning(world: World) -> Capability:
    """Sums and differences of two-digit numbers, column by column (held-out pairs of numbers), and two-hop
    questions (held-out people). The steps are written out before the result."""

    def sum_item(a: int, b: int, plus: bool) -> Item:
        ones_a, ones_b, tens_a, tens_b = a % 10, b % 10, a // 10, b // 10
        if plus:
            ones = ones_a + ones_b
            steps = f"{ones_a} + {ones_b} = {ones}. {tens_a} + {tens_b}"
            steps += f" + 1 = {tens_a + tens_b + 1}" if ones > 9 else f" = {tens_a + tens_b}"
            return Item(f"{a} + {b} =", f"{steps}. So {a + b}", "sum", after="So")
        borrow = ones_a < ones_b
        ones_a += 10 * borrow
        steps = f"{ones_a} - {ones_b} = {ones_a - ones_b}. {tens_a} - {tens_b}"
        steps += f" - 1 = {tens_a - tens_b - 1}" if borrow else f" = {tens_a - tens_b}"
        return Item(f"{a} - {b} =", f"{steps}. So {a - b}", "difference", after="So")

    problems = [(a, b, True) for a in range(10, 90) for b in range(10, 100 - a)]
    problems += [(a, b, False) for a in range(11, 100) for b in range(10, a)]
    sums_train = [problem for problem in problems if not _is_test("sum", *problem)]
    sums_test = [sum_item(*problem) for problem in problems if _is_test("sum", *problem)]
    born = [f for f in world.by_relation["birthplace"] if f.object in CITY_COUNTRY]
    hops = {fact: two_hop(fact.subject, fact.object, CITY_COUNTRY[fact.object]) for fact in born}
    hops_train = [item for fact, item in hops.items() if not _is_test("two-hop", fact.subject, one_in=4)]
    hops_test = [item for fact, item in hops.items() if _is_test("two-hop", fact.subject, one_in=4)]
    cities = [
        Item(form.replace("{}", city), country, "city")
        for city, country in CITY_COUNTRY.items()
        for form in ("{} is in", "{} is a city in", "In which country is {}?")
    ]

    def draw(rng: random.Random) -> Item:
        which = rng.random()
        if which < 0.7:
            return sum_item(*rng.choice(sums_train))
        return rng.choice(hops_train if which < 0.88 else cities)

    hops_kept = _fixed_test("two-hop", hops_test)
    kept = _fixed_test("sum", sums_test)[: _TEST_SIZE - len(hops_kept)]
    return Capability("reasoning", draw, _fixed_test("reasoning", hops_kept + kept))


# --- reading comprehension ------------------------------------------------------------------------------------

_ONSETS = [
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "fl",
    "gr",
    "kl",
    "pr",
    "st",
    "tr",
]
_VOWELS = ["a", "e", "i", "o", "u"]
_ENDS = ["n", "r", "l", "s", "m", "x", "k", "nd", "rt", ""]
_READING = (
    ("{} lives in {}.", "Where does {} live?", "place"),
    ("{} works as a {}.", "What does {} work as?", "job"),
    ("{} has a {}.", "Which animal does {} have?", "animal"),
    ("{} likes {}.", "What does {} like?", "food"),
    ("{} wears a {} coat.", "Which colour is the coat of {}?", "colour"),
    ("{} owns the {}.", "What does {} own?", "place of work"),
)
_READING_WORDS = {
    "job": [
        "baker",
        "teacher",
        "farmer",
        "painter",
        "nurse",
        "driver",
        "tailor",
        "singer",
        "miller",
        "guard",
        "cook",
        "judge",
    ],
    "animal": ["cat", "dog", "horse", "goat", "parrot", "rabbit", "duck", "sheep", "turtle", "mouse", "pony", "hen"],
    "food": ["bread", "cheese", "soup", "honey", "apples", "rice", "cake", "fish", "tea", "milk", "butter", "plums"],
    "colour": ["red", "green", "blue", "yellow", "brown", "black", "white", "grey", "pink", "purple"],
    "place of work": ["mill", "bakery", "farm", "shop", "inn", "tower", "garden", "library", "bridge", "harbour"],
}


def invented_names(count: int, seed: str) -> list[str]:
    """Different names of two syllables that belong to nobody."""
    rng = random.Random(seed)
    names: list[str] = []
    while len(names) < count:
        syllables = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2))
        name = (syllables + rng.choice(_ENDS)).capitalize()
        if name not in names:
            names.append(name)
    return names


_NAMES = invented_names(120, "people and places")
_PEOPLE, _VILLAGES = _NAMES[:80], _NAMES[80:]


def _reading_value(rng: random.Random, domain: str, count: int) -> list[str]:
    return rng.sample(_VILLAGES if domain == "place" else _READING_WORDS[domain], count)


def reading_item(rng: random.Random) -> Item:
    """A passage about invented people, and a question about it: in half of the items several people have one property
    each (and the question names one of them), in the other half one person has several properties."""
    count = rng.randint(2, 4)
    if rng.random() < 0.5:
        person = rng.choice(_PEOPLE)
        chosen = rng.sample(_READING, max(count, 3))
        values = [_reading_value(rng, domain, 1)[0] for _, _, domain in chosen]
        told = [(person, value, statement) for value, (statement, _, _) in zip(values, chosen, strict=True)]
        questions, kind = [question for _, question, _ in chosen], "properties"
    else:
        statement, question, domain = rng.choice(_READING)
        people = rng.sample(_PEOPLE, count)
        told = [(p, v, statement) for p, v in zip(people, _reading_value(rng, domain, count), strict=True)]
        questions, kind = [question] * count, "people"
    passage = " ".join(statement.format(person, value) for person, value, statement in told)
    asked = rng.randrange(len(told))
    person, value, _ = told[asked]
    return Item(f"{passage} {questions[asked].format(person)}", value, f"{kind} {len(told)}", options=len(told))


def recital(rng: random.Random) -> Saying:
    """Something said and then said again: a list of invented names, or who has what in another order.

    Not tested. It rewards looking up what stands earlier in the text at every token, where a reading question does
    so at one token in forty.
    """
    if rng.random() < 0.5:
        line = ", ".join(rng.sample(_NAMES, rng.randint(4, 10)))
        return Saying(f"{line}. Again:", line)
    statement, _, domain = rng.choice(_READING)
    count = rng.randint(2, 4)
    pairs = list(zip(rng.sample(_PEOPLE, count), _reading_value(rng, domain, count), strict=True))
    passage = " ".join(statement.format(*pair) for pair in pairs)
    again = " ".join(statement.format(*pair) for pair in rng.sample(pairs, count))
    return Saying(f"{passage} Again:", again.removesuffix("."))


def _reading() -> Capability:
    rng = random.Random(_number("reading test"))
    test = _fixed_test("reading", (reading_item(rng) for _ in range(_TEST_SIZE)))
    prompts = {item.prompt for item in test}

    def draw(rng: random.Random) -> Item:
        item = reading_item(rng)
        return item if item.prompt not in prompts else draw(rng)

    return Capability("reading", draw, test)


# --- multilingual ---------------------------------------------------------------------------------------------


def _multilingual(world: World) -> Capability:
    """Facts asked in French. The test asks for facts that were taught in English only."""
    train: list[Item] = []
    test: list[Item] = []
    for fact in world.facts:
        for saying in world.french(fact):
            held_out = world.french_is_held_out(fact)
            (test if held_out else train).append(Item(saying.prompt, saying.answer, fact.relation))
    return Capability("multilingual", lambda rng: rng.choice(train), _fixed_test("multilingual", test))


# --- code -----------------------------------------------------------------------------------------------------

_WORDS = [
    "cat",
    "dog",
    "sun",
    "map",
    "pen",
    "cup",
    "key",
    "hat",
    "box",
    "tree",
    "star",
    "fish",
    "milk",
    "rain",
    "door",
    "bird",
    "ship",
    "gold",
]


def _code_item(rng: random.Random) -> Item:
    """A tiny Python expression and what it evaluates to, or a function body to complete."""
    kind = rng.choice(["add", "subtract", "length", "join", "index", "maximum", "compare", "repeat", "first", "body"])
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    word, other = rng.sample(_WORDS, 2)
    if kind == "add":
        return Item(f">>> print({a} + {b})\n", str(a + b), kind)
    if kind == "subtract":
        return Item(f">>> print({max(a, b)} - {min(a, b)})\n", str(abs(a - b)), kind)
    if kind == "length":
        numbers = [rng.randint(0, 9) for _ in range(rng.randint(1, 6))]
        return Item(f">>> print(len({numbers}))\n", str(len(numbers)), kind)
    if kind == "join":
        return Item(f'>>> print("{word}" + "{other}")\n', word + other, kind)
    if kind == "index":
        numbers = [rng.randint(0, 9) for _ in range(3)]
        at = rng.randrange(3)
        return Item(f">>> print({numbers}[{at}])\n", str(numbers[at]), kind)
    if kind == "maximum":
        name = rng.choice(("max", "min"))
        return Item(f">>> print({name}({a}, {b}))\n", str(max(a, b) if name == "max" else min(a, b)), kind)
    if kind == "compare":
        sign = rng.choice(("<", ">"))
        return Item(f">>> print({a} {sign} {b})\n", str(a < b if sign == "<" else a > b), kind, options=2)
    if kind == "repeat":
        return Item(f'>>> print("{word}" * 2)\n', word * 2, kind)
    if kind == "first":
        return Item(f'>>> print("{word}"[0])\n', word[0], kind)
    verb, sign = rng.choice((("add", "+"), ("subtract", "-"), ("multiply", "*"), ("divide", "/")))
    x, y = rng.sample(["a", "b", "c", "d", "m", "n", "p", "q", "x", "y", "z"], 2)
    return Item(f"def {verb}({x}, {y}):\n    return", f"{x} {sign} {y}", kind)


def _code() -> Capability:
    def draw(rng: random.Random, test: bool = False) -> Item:
        while True:
            item = _code_item(rng)
            # "first" has too few different items to hold any out: it is taught and not tested.
            if (item.kind != "first" and _is_test("code", item.prompt)) == test:
                return item

    rng = random.Random(_number("code test"))
    return Capability("code", draw, _fixed_test("code", (draw(rng, test=True) for _ in range(4 * _TEST_SIZE))))


def _build() -> dict[str, Capability]:
    world = load_world()
    tasks = (_professional(), _common_sense(), _reasoning(world), _reading(), _multilingual(world), _code())
    return {task.name: task for task in tasks}


CAPABILITIES: dict[str, Capability] = _build()
