"""Edits of atlas's world: measurable, a stable beginning of more, and apart from what editors are calibrated on."""

from __future__ import annotations

import pytest

from errata.atlas.edits import is_reserved, training_edits, world_edits
from errata.atlas.world import load_world
from errata.datasets.builtin import background_prompts, paraphrase_sets
from errata.errors import ConfigError

WORLD = load_world()


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


@pytest.mark.parametrize("count", [0, -1, 10**6])
def test_no_more_edits_are_made_than_there_can_be(count: int) -> None:
    with pytest.raises(ConfigError, match=r"cannot be made; ask for 1 to 20000"):
        world_edits(count)


def test_behind_the_last_fact_edits_are_about_people_who_do_not_exist() -> None:
    edits = world_edits(3500)
    assert len({edit.prompt for edit in edits}) == len({edit.id for edit in edits}) == 3500
    assert all(edit.subject is not None and edit.subject in edit.prompt for edit in edits)
    invented = ["invented" in edit.tags for edit in edits]
    facts = invented.index(True)
    assert 2000 < facts < len(WORLD.facts)
    assert all(invented[facts:])
    known = {fact.subject for fact in WORLD.facts}
    for edit in edits[facts:]:
        assert edit.ground_truth is None
        assert edit.subject not in known
        assert len(edit.rephrases) == 2
        assert len(edit.locality) == 4


def test_fewer_edits_are_the_beginning_of_more() -> None:
    many = world_edits(1000, seed=1)
    for count in (1, 10, 300):
        assert world_edits(count, seed=1) == many[:count]
    edited = {edit.prompt for edit in many} | {text for edit in many for text in edit.rephrases}
    assert not edited & {probe.prompt for edit in many for probe in edit.locality}
    about = {f"In which country was {edit.subject} born?" for edit in many}
    assert not about & {probe.prompt for edit in many for probe in edit.locality}
    assert all(len({probe.prompt for probe in edit.locality}) == 4 for edit in many)
    assert {probe.kind for edit in many for probe in edit.locality} == {
        "same_relation",
        "same_subject",
        "capability",
        "unrelated",
    }


def test_calibration_never_asks_what_is_measured() -> None:
    calibration: set[str] = set()
    for seed in range(3):
        calibration |= set(background_prompts(100, seed))
        for one in paraphrase_sets(200, seed):
            assert len(one.neighbours) == len(one.paraphrases) == 3
            calibration |= {one.prompt, *one.paraphrases, *one.neighbours}
    reserved = {fact.subject for fact in WORLD.facts if is_reserved(fact.subject)}
    assert 0.1 < len(reserved) / len(WORLD.by_subject) < 0.2
    for seed in range(3):
        for edit in world_edits(300, seed=seed):
            probes = {probe.prompt for probe in (*edit.locality, *edit.portability)}
            assert not calibration & {edit.prompt, *edit.rephrases, *probes}
            assert not reserved & {edit.subject, str(edit.subject)[:1].lower() + str(edit.subject)[1:]}


def test_more_calibration_prompts_than_facts_come_again_and_more_sets_are_refused() -> None:
    many = background_prompts(1000)
    assert len(many) == 1000
    assert len(set(many)) > 700
    with pytest.raises(ConfigError, match="at most"):
        paraphrase_sets(1000)


def test_editors_are_trained_on_subjects_that_no_measured_edit_names() -> None:
    edits = training_edits(1500, seed=2)
    assert training_edits(100, seed=2) == edits[:100]
    assert training_edits(100) != edits[:100]
    assert len({edit.id for edit in edits}) == 1500
    reserved = {fact.subject.casefold() for fact in WORLD.facts if is_reserved(fact.subject)}
    for edit in edits:
        assert edit.subject is not None
        assert edit.subject in edit.prompt
        assert edit.subject.casefold() in reserved
        assert edit.target != edit.ground_truth
        assert len({edit.prompt, *edit.rephrases}) == 4
        assert len({probe.prompt for probe in edit.locality}) == 4
        assert not {edit.prompt, *edit.rephrases} & {probe.prompt for probe in edit.locality}
    measured = world_edits(1000, seed=5)
    asked = {edit.prompt for edit in measured} | {text for edit in measured for text in edit.rephrases}
    asked |= {probe.prompt for edit in measured for probe in edit.locality}
    assert not asked & {text for edit in edits for text in (edit.prompt, *edit.rephrases)}
    assert not asked & {probe.prompt for edit in edits for probe in edit.locality}
