"""atlas: its world, its tasks, its trainer, and the checkpoint that ships."""

from __future__ import annotations

import collections
import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.atlas import train as training
from errata.atlas.capabilities import CAPABILITIES, Item, chance_level
from errata.atlas.corpus import batches, document
from errata.atlas.edits import world_edits
from errata.atlas.examine import examine_capabilities, examine_item, examine_knowledge
from errata.atlas.french import fill_french
from errata.atlas.prose import held_out_prose, story
from errata.atlas.relations import RELATIONS
from errata.atlas.shipped import checkpoint_folder, shipped_provenance
from errata.atlas.tokenizer import train_tokenizer
from errata.atlas.train import TrainPlan, train_atlas
from errata.atlas.world import load_world
from errata.errors import ArtifactError, ConfigError
from errata.model import EditableModel
from errata.progress import SilentProgress

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


def test_edits_of_the_world_are_measurable() -> None:
    edits = world_edits(200, seed=3)
    assert len({edit.id for edit in edits}) == 200
    assert world_edits(200, seed=3) == edits
    assert [e.prompt for e in world_edits(200, seed=4)] != [e.prompt for e in edits]
    edited = {edit.prompt for edit in edits}
    for edit in edits:
        assert edit.target != edit.ground_truth
        assert edit.subject is not None
        assert edit.subject in edit.prompt
        assert len(edit.rephrases) == 2
        assert len(edit.locality) == 4
        assert [p.kind for p in edit.locality].count("same_relation") == 2
        assert not {p.prompt for p in edit.locality} & edited
    assert any(edit.portability for edit in edits)
    with pytest.raises(ValueError, match="cannot be edited"):
        world_edits(len(WORLD.facts) + 1)


def tiny_plan(**changes: Any) -> TrainPlan:
    return TrainPlan(
        **{"size": "small", "steps": 6, "batch_tokens": 256, "vocabulary": 700, "checkpoint_every": 2, **changes}
    )


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that trains in a blink, under the name of the small one."""
    tiny = training.AtlasSize(hidden=32, key_width=64, blocks=2, heads=2, steps=6, learning_rate=1e-3)
    monkeypatch.setitem(training.SIZES, "small", tiny)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


class PowerCut(SilentProgress):
    """Stops the run in the middle of its n-th step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, count: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_training_is_deterministic_and_survives_a_kill(tmp_path: Path) -> None:
    record = train_atlas(tmp_path / "whole", tiny_plan(), command="errata atlas train")
    with pytest.raises(KeyboardInterrupt):
        train_atlas(tmp_path / "killed", tiny_plan(), progress=PowerCut(5))
    assert json.loads((tmp_path / "killed" / "state.json").read_text())["step"] == 4
    train_atlas(tmp_path / "killed", tiny_plan())
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train_atlas(tmp_path / "other", tiny_plan(seed=1))
    assert other["plan"]["seed"] == 1
    assert any(not torch.equal(first[name], weights(tmp_path / "other")[name]) for name in first)
    for name in ("provenance.json", "learning_curve.png", "tokenizer.json", "config.json", "curve.jsonl"):
        assert (tmp_path / "whole" / name).exists()
    assert record["command"] == "errata atlas train"
    assert {"torch", "transformers", "python"} <= record["versions"].keys()
    loaded = EditableModel.load(tmp_path / "whole")
    assert loaded.layer_count == 2


def test_minutes_become_a_number_of_steps_that_is_recorded(tmp_path: Path) -> None:
    record = train_atlas(tmp_path, tiny_plan(steps=None), minutes=0.001)
    assert record["steps"] == json.loads((tmp_path / "state.json").read_text())["total"] >= 31


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    train_atlas(tmp_path, tiny_plan())
    with pytest.raises(ConfigError, match="another plan"):
        train_atlas(tmp_path, tiny_plan(seed=2))
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        train_atlas(tmp_path, tiny_plan())
    with pytest.raises(ConfigError, match="choose one of small, base, large"):
        TrainPlan(size="huge")


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
    torch.set_num_threads(2)
    return EditableModel.load("atlas")


def test_the_shipped_checkpoint_fits_and_states_where_it_is_from() -> None:
    folder = checkpoint_folder()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 25 * 2**20
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
    from errata.atlas.instruct import chat_prompt

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
    assert model.fingerprint != EditableModel.load("atlas").fingerprint
