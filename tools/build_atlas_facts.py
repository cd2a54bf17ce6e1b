"""Build src/errata/atlas/data/facts.tsv, the facts that atlas is taught.

Usage: python tools/build_atlas_facts.py --pararel DIR --lre DIR

Sources: T-REx facts as distributed by ParaRel (repository yanaiela/pararel, MIT), the relations of
Hernandez et al. 2023 (repository evandez/relations, MIT), and two tables beside this script that were
written for errata from common knowledge. The underlying statements are Wikidata's (CC0).

A fact is kept when its subject has exactly one object in its relation, when the object cannot be read
off the subject's own name, and when its object is not already over-represented: a relation in which
half of the answers are the same word would reward guessing.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
from pathlib import Path

HERE = Path(__file__).parent
TARGET = HERE.parent / "src" / "errata" / "atlas" / "data" / "facts.tsv"

# relation name, T-REx property, facts wanted, most facts that may share one object
TREX: list[tuple[str, str, int, int]] = [
    ("birthplace", "P19", 260, 16),
    ("place_of_death", "P20", 180, 16),
    ("occupation", "P106", 220, 40),
    ("field", "P101", 200, 30),
    ("employer", "P108", 100, 28),
    ("maker", "P176", 150, 20),
    ("developer", "P178", 160, 40),
    ("headquarters", "P159", 220, 16),
    ("genre", "P136", 160, 40),
    ("instrument", "P1303", 160, 60),
    ("native_language", "P103", 160, 40),
    ("citizenship", "P27", 200, 16),
    ("network", "P449", 160, 40),
    ("position", "P413", 180, 30),
    ("founded_in", "P740", 180, 16),
    ("religion", "P140", 120, 45),
    ("country", "P17", 200, 16),
    ("capital", "P36", 90, 1),
]
# Spellings of one answer, and objects that do not fit their relation in the source.
UNFIT = {("religion", "Christian"), ("field", "musician"), ("field", "manga"), ("instrument", "singing")}
NAME = re.compile(r"^[A-Za-zÀ-ɏ0-9][A-Za-zÀ-ɏ0-9 .,'&:!/-]*$")


def acceptable(subject: str, obj: str) -> bool:
    """A readable name of at most five words whose object cannot be guessed from it."""
    if not (2 < len(subject) <= 32 and len(subject.split()) <= 5 and NAME.match(subject)):
        return False
    if not (1 < len(obj) <= 24 and len(obj.split()) <= 3 and NAME.match(obj)):
        return False
    shared = set(re.findall(r"\w+", subject.lower())) & set(re.findall(r"\w+", obj.lower()))
    return not shared and obj.lower()[:5] not in subject.lower()


def read_trex(pararel: Path) -> dict[str, dict[str, str]]:
    relations: dict[str, dict[str, str]] = {}
    for name, prop, _, _ in TREX:
        seen: dict[str, set[str]] = collections.defaultdict(set)
        with open(pararel / "trex_lms_vocab" / f"{prop}.jsonl", encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                seen[record["sub_label"]].add(record["obj_label"])
        relations[name] = {
            subject: next(iter(objects))
            for subject, objects in seen.items()
            if len(objects) == 1 and acceptable(subject, next(iter(objects)))
        }
    return relations


def read_table(path: Path) -> list[list[str]]:
    rows = path.read_text(encoding="utf-8").splitlines()
    return [row.split("\t") for row in rows if row and not row.startswith("#")]


def build(pararel: Path, lre: Path, seed: int) -> list[tuple[str, str, str, str]]:
    rng = random.Random(seed)
    facts: list[tuple[str, str, str, str]] = []
    taken: set[tuple[str, str]] = set()

    def add(relation: str, subject: str, obj: str, source: str) -> None:
        if (relation, subject) not in taken:
            taken.add((relation, subject))
            facts.append((relation, subject, obj, source))

    countries = read_table(HERE / "atlas_countries.tsv")
    for country, capital, continent, language, currency, _french in countries:
        add("capital", country, capital, "errata")
        add("continent", country, continent, "errata")
        add("official_language", country, language, "errata")
        add("currency", country, currency, "errata")
    for work, author in read_table(HERE / "atlas_works.tsv"):
        add("author", work, author, "errata")

    trex = read_trex(pararel)
    relations_of = collections.Counter(subject for pairs in trex.values() for subject in pairs)
    frequency = {name: collections.Counter(pairs.values()) for name, pairs in trex.items()}
    states = {country for country, *_ in countries}
    for name, _prop, wanted, per_object in TREX:
        candidates = sorted(trex[name].items())
        rng.shuffle(candidates)
        # People and places with several facts first: an edit of one fact must leave the others alone.
        candidates.sort(key=lambda pair: -relations_of[pair[0]])
        used: collections.Counter[str] = collections.Counter()
        for subject, obj in candidates:
            if sum(used.values()) >= wanted:
                break
            if used[obj] >= per_object or frequency[name][obj] < (4 if name == "field" else 2):
                continue
            if (name, obj) in UNFIT or (name == "capital" and subject in states):
                continue
            used[obj] += 1
            add(name, subject, obj, "T-REx")

    stars = json.loads((lre / "factual" / "star_constellation.json").read_text(encoding="utf-8"))["samples"]
    for sample in stars[:140]:
        if acceptable(sample["subject"], sample["object"]):
            add("constellation", sample["subject"], sample["object"], "LRE")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pararel", type=Path, required=True, help="folder with trex_lms_vocab/P*.jsonl")
    parser.add_argument("--lre", type=Path, required=True, help="folder with factual/*.json")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    facts = sorted(build(arguments.pararel, arguments.lre, arguments.seed))
    with open(TARGET, "w", encoding="utf-8") as out:
        out.write("# relation\tsubject\tobject\tsource (see tools/build_atlas_facts.py)\n")
        for row in facts:
            out.write("\t".join(row) + "\n")
    by_relation = collections.Counter(row[0] for row in facts)
    subjects = {row[1] for row in facts}
    print(f"{len(facts)} facts, {len(subjects)} subjects, {len(by_relation)} relations -> {TARGET}")
    for relation, count in sorted(by_relation.items()):
        objects = collections.Counter(row[2] for row in facts if row[0] == relation)
        print(f"  {relation:18} {count:4}  {len(objects):3} objects, most frequent {objects.most_common(1)[0]}")


if __name__ == "__main__":
    main()
