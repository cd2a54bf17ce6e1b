"""atlas: its world, its tasks, its trainer, and the checkpoint that ships."""

from __future__ import annotations

import collections
import random
from itertools import islice

import pytest

from errata.atlas.capabilities import CAPABILITIES, Item, chance_level
from errata.atlas.corpus import batches, document
from errata.atlas.examine import examine_capabilities, examine_item, examine_knowledge
from errata.atlas.french import fill_french
from errata.atlas.prose import held_out_prose, story
from errata.atlas.relations import RELATIONS
from errata.atlas.shipped import checkpoint_folder, shipped_provenance
from errata.atlas.tokenizer import train_tokenizer
from errata.atlas.world import load_world
from errata.edit import Edit
from errata.model import EditableModel

WORLD = load_world()


def test_the_world_is_large_enough_and_says_where_it_is_from() -> None:
    assert len(WORLD.facts) >= 2500
    assert len(WORLD.by_subject) >= 1500
    assert len(WORLD.by_relation) >= 12
    assert {fact.source for fact in WORLD.facts} == {"T-REx", "LRE", "errata"}
    assert len({(fact.relation, fact.subject) for fact in WORLD.facts}) == len(WORLD.facts), "one object per subject"


def test_every_relation_has_its_phrasings() -> None:
    assert set(WORLD.by_relation) == set(RELATIONS)
    for relation in RELATIONS.values():
        assert len(set(relation.phrasings)) >= 6
        assert len(relation.questions) >= 3
        assert all(text.count("{}") == 1 for text in (*relation.phrasings, *relation.french))
    assert sum(bool(relation.french) for relation in RELATIONS.values()) >= 4


def test_each_untaught_phrasing_is_taught_for_other_facts() -> None:
    for facts in WORLD.by_relation.values():
        taught: collections.Counter[int] = collections.Counter()
        for fact in facts:
            hidden = WORLD.untaught_indices(fact)
            assert len(set(hidden)) == 2
            assert 0 not in hidden, "the canonical prompt is always taught"
            taught.update(i for i in range(len(WORLD.relation(fact).phrasings)) if i not in hidden)
        assert min(taught[i] for i in range(len(WORLD.relation(facts[0]).phrasings))) > len(facts) // 3


def test_training_never_shows_an_untaught_phrasing_or_a_test_item() -> None:
    hidden = {saying.prompt for fact in WORLD.facts for saying in WORLD.untaught(fact)}
    held = {item.prompt for task in CAPABILITIES.values() for item in task.test}
    french = {s.prompt for f in WORLD.facts if WORLD.french_is_held_out(f) for s in WORLD.french(f)}
    rng = random.Random(5)
    for _ in range(20_000):
        shown = {piece for piece, _ in document(WORLD, rng)}
        assert not shown & hidden
        assert not shown & held
        assert not shown & french


@pytest.mark.parametrize(
    ("phrasing", "subject", "expected"),
    [
        ("La capitale [de] {} est", "le Canada", "La capitale du Canada est"),
        ("La capitale [de] {} est", "les Pays-Bas", "La capitale des Pays-Bas est"),
        ("La capitale [de] {} est", "la France", "La capitale de la France est"),
        ("La capitale [de] {} est", "l'Italie", "La capitale de l'Italie est"),
        ("La capitale [de] {} est", "Oman", "La capitale d'Oman est"),
        ("{} est né à", "Émile Zola", "Émile Zola est né à"),
    ],
)
def test_french_articles_contract(phrasing: str, subject: str, expected: str) -> None:
    assert fill_french(phrasing, subject) == expected


@pytest.mark.parametrize("name", CAPABILITIES)
def test_capability_items_are_right_and_their_tests_fixed(name: str) -> None:
    task = CAPABILITIES[name]
    assert len(task.test) == 200
    assert len({item.prompt for item in task.test}) == 200
    assert 0 < chance_level(task.test) < 0.6
    for item in task.test:
        assert examine_item(item.answer + ".", item), item
        assert not examine_item("nonsense", item)
    rng = random.Random(1)
    for _ in range(300):
        item = task.draw(rng)
        if item.kind in ("sum", "difference"):
            assert str(eval(item.prompt.removesuffix("="))) == item.result
        if item.kind in ("add", "subtract", "length", "join", "index", "maximum", "compare", "repeat", "first"):
            expression = item.prompt.removeprefix(">>> print(").strip()[:-1]
            assert str(eval(expression)) == item.answer


def test_a_worked_out_answer_counts_by_its_result() -> None:
    item = Item("1 + 1 =", "1 + 1 = 2. So 2", "sum", after="So")
    assert item.result == "2"
    assert examine_item(" 1 + 1 = 3. So 2.", item)
    assert not examine_item(" 2.", item)
    assert not examine_item(" 1 + 1 = 2. So 3.", item)


def test_chance_is_what_the_best_constant_guess_earns() -> None:
    items = [Item(str(i), "a" if i < 3 else "b", "x") for i in range(4)] + [
        Item(f"o{i}", str(i), "y", options=4) for i in range(4)
    ]
    assert chance_level(items) == pytest.approx((3 + 1) / 8)


def test_held_out_prose_is_not_trained_on() -> None:
    seen = {story(random.Random(seed)) for seed in range(5000)}
    held = list(held_out_prose())
    assert len(held) == len(set(held)) == 300
    assert len(seen & set(held)) < 3, "short stories may coincide; hardly any do"


def test_a_resumed_stream_skips_exactly_what_was_read() -> None:
    tokenizer = train_tokenizer([" ".join(list(RELATIONS["capital"].phrasings))], 400)
    whole = list(islice(batches(tokenizer, 0, 512), 40))
    resumed = list(islice(batches(tokenizer, 0, 512, skip=30), 10))
    assert [b.ids for b in resumed] == [b.ids for b in whole[30:]]
    for batch in whole:
        assert len({len(row) for row in batch.ids}) == 1
        assert all(len(row) == len(w) for row, w in zip(batch.ids, batch.weights, strict=True))


@pytest.fixture(scope="module")
def atlas() -> EditableModel:
    return EditableModel.load("atlas")


def test_the_shipped_checkpoint_fits_and_states_where_it_is_from() -> None:
    folder = checkpoint_folder()
    sizes = {file.relative_to(folder): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    own = {  # of methods, not of the model
        method: sum(size for path, size in sizes.items() if path.parts[0] == method) for method in ("mend", "memoryllm")
    }
    assert sum(sizes.values()) - sum(own.values()) < 25 * 2**20
    assert 0 < own["mend"] < 5e6
    assert 0 < own["memoryllm"] < 15e6
    provenance = shipped_provenance()
    assert provenance["command"].startswith("errata atlas train")
    assert provenance["plan"]["size"] == "base"
    assert provenance["git_revision"]
    assert not provenance["git_revision"].endswith("dirty")
    assert provenance["scores"]["taught"] >= 0.98
    assert provenance["scores"]["untaught"] >= 0.90


def test_the_shipped_checkpoint_knows_what_it_says(atlas: EditableModel) -> None:
    """The recorded scores again, on a sample of the facts."""
    sample = random.Random(0).sample(WORLD.facts, 150)
    known = examine_knowledge(atlas, facts=sample)
    assert known["taught"] >= 0.97
    assert known["untaught"] >= 0.88
    assert atlas.perplexity(held_out_prose(60)) < 4.0


def test_every_capability_is_well_above_chance(atlas: EditableModel) -> None:
    for name, task in examine_capabilities(atlas).items():
        assert task["accuracy"] >= task["chance"] + 0.25, (name, task)


def test_the_instruction_tuned_variant_answers_in_its_template() -> None:
    from errata.atlas.instruct import chat_edit, chat_prompt

    model = EditableModel.load("atlas-instruct")
    asked = [
        (f, s)
        for f in random.Random(1).sample(WORLD.facts, 120)
        for s in WORLD.taught(f)[-1:]
        if s.prompt.endswith("?")
    ]
    said = model.generate([chat_prompt(model, saying.prompt) for _, saying in asked])
    right = sum(text.strip().rstrip(".") == saying.answer for text, (_, saying) in zip(said, asked, strict=True))
    assert right / len(asked) >= 0.9
    edit = Edit(prompt="The capital of France is", target="Rome", subject="France", locality=({"prompt": "Spain is"},))
    asked_so = chat_edit(model, edit)
    assert asked_so.prompt == chat_prompt(model, edit.prompt)
    assert asked_so.locality[0].prompt == chat_prompt(model, "Spain is")
    assert (asked_so.id, asked_so.subject, asked_so.target) == (edit.id, "France", "Rome")
    assert model.fingerprint != EditableModel.load("atlas").fingerprint
