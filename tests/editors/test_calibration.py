"""Calibration keeps its promises: shares of questions that may fire, and what it found comes back from the cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.editors.calibration import Found, Preparation, Questions, calibrate
from errata.model import EditableModel
from errata.routing import MaskStore, TopHashRouter
from errata.testing import metaspace_tokenizer, tiny_hf_model, tiny_model

WIDTH, MARKED, QUESTIONS = 200, 50, 40


@dataclasses.dataclass
class Asked:
    """Masks of made-up questions, with others near them."""

    store: MaskStore
    questions: Any
    paraphrases: Tensor
    neighbours: Tensor
    beside: Tensor

    def calibrate(self, false_fires: float, subjects: bool = True) -> Found:
        parts = (self.paraphrases, self.neighbours, self.beside)
        return calibrate(self.store, self.questions, *parts, false_fires, subjects)

    @property
    def near(self) -> Tensor:
        """How far each neighbour overlaps whatever is stored."""
        return self.store.nearest(self.neighbours)[0][:, 0]

    @property
    def right(self) -> Tensor:
        """How far each other wording overlaps its own question."""
        return self.store.overlaps(self.paraphrases).gather(1, self.questions.reworded.unsqueeze(1)).squeeze(1)

    @property
    def own(self) -> Tensor:
        """How far each other question overlaps the one about its subject."""
        return self.store.overlaps(self.beside).gather(1, self.questions.about.unsqueeze(1)).squeeze(1)


def asked(beside: int = 60) -> Asked:
    generator = torch.Generator().manual_seed(0)
    router = TopHashRouter.seeded(WIDTH, MARKED, generator)
    stored = torch.randn(QUESTIONS, WIDTH, generator=generator)

    def near(count: int, noise: float) -> tuple[Tensor, Tensor]:
        which = torch.arange(count) % QUESTIONS
        return router.hash(stored[which] + noise * torch.randn(count, WIDTH, generator=generator)), which

    store = MaskStore(WIDTH, MARKED)
    for mask in router.hash(stored):
        store.append(mask)
    (paraphrases, reworded), (neighbours, _), (others, about) = near(80, 0.6), near(70, 1.2), near(beside or 1, 1.6)
    others, about = others[:beside], about[:beside]
    return Asked(store, SimpleNamespace(reworded=reworded, about=about), paraphrases, neighbours, others)


@pytest.mark.parametrize("allowed", [0.0, 0.05, 0.2, 1.0])
def test_no_more_neighbours_fire_than_may(allowed: float) -> None:
    given = asked()
    found, near = given.calibrate(allowed), given.near
    assert int((near >= found.threshold).sum()) <= round(allowed * len(near), 6)
    if allowed < 1:  # one mark lower and too many would
        assert int((near >= found.threshold - 1 / MARKED).sum()) > allowed * len(near)
    assert found.threshold > MARKED / WIDTH  # what chance alone gives never suffices


def test_who_does_not_name_the_subject_must_come_closer_than_any_neighbour() -> None:
    given = asked()
    found = given.calibrate(0.05)
    assert not bool((given.near >= found.unnamed).any())
    assert bool((given.near >= found.unnamed - 1 / MARKED).any())


def test_who_names_the_subject_is_missed_as_often_as_mistaken() -> None:
    given = asked()
    found = given.calibrate(0.05)
    (missed, mistaken), (missed_lower, mistaken_lower) = (
        (float((given.right < threshold).float().mean()), float((given.own >= threshold).float().mean()))
        for threshold in (found.named, found.named - 1 / MARKED)
    )
    assert found.named < found.unnamed
    assert missed >= mistaken
    assert missed_lower < mistaken_lower  # one mark lower it is the other way round
    assert 0 < missed < 0.5


def test_a_name_never_makes_it_harder() -> None:
    given = asked()
    given.neighbours = given.neighbours[given.near.argsort()[:3]]  # none comes close
    found = given.calibrate(0.05)
    assert found.named == found.unnamed


@pytest.mark.parametrize("subjects", [True, False])
def test_what_is_recorded_is_what_the_thresholds_do(subjects: bool) -> None:
    given = asked()
    found = given.calibrate(0.05, subjects)
    scores, numbers = given.store.nearest(given.paraphrases)
    first = (scores[:, 0] >= found.threshold) & (numbers[:, 0] == given.questions.reworded)

    def share(which: Tensor) -> Any:
        return pytest.approx(float(which.float().mean()))

    record, chance = found.record, MARKED / WIDTH
    assert record["questions"] == QUESTIONS
    assert record["relative_threshold"] == pytest.approx((found.threshold - chance) / (1 - chance))
    if not subjects:
        assert record["paraphrases_reached"] == share(first)
        assert record["neighbours_fired"] == share(given.near >= found.threshold)
        return
    assert record["paraphrases_reached"] == share(given.right >= found.named)
    assert record["paraphrases_reached_without_subjects"] == share(first)
    assert record["neighbours_fired"] == 0.0
    assert record["neighbours_fired_without_subjects"] == share(given.near >= found.threshold)
    assert record["same_subject_fired"] == share(given.own >= found.named)
    assert record["paraphrases_reached"] > record["paraphrases_reached_without_subjects"] > 0


def test_without_other_questions_about_a_subject_its_name_helps_nothing() -> None:
    found = asked(beside=0).calibrate(0.05)
    assert found.named == found.threshold
    assert found.record["same_subject_fired"] == 0.0


def test_questions_are_told_apart_by_their_tokens_and_whose_they_are() -> None:
    model = tiny_model("llama")
    asked_, again = (Questions.ask(model, 5, 0, calibrating=True) for _ in range(2))
    assert asked_.digest() == again.digest()
    assert len(asked_.prompts) == 200
    assert len(asked_.reworded) == len(asked_.paraphrases)
    assert len(asked_.about) == len(asked_.beside)
    assert len(asked_) == 5 + 200 + sum(map(len, (asked_.paraphrases, asked_.neighbours, asked_.beside)))
    assert max(asked_.reworded.tolist() + asked_.about.tolist()) < 200
    others = [
        Questions.ask(model, 6, 0, calibrating=True),
        Questions.ask(model, 5, 1, calibrating=True),
        Questions.ask(model, 5, 0, calibrating=False),
        Questions.ask(EditableModel(tiny_hf_model("llama"), metaspace_tokenizer()), 5, 0, calibrating=True),
        dataclasses.replace(asked_, about=asked_.about.flip(0)),
    ]
    assert len({asked_.digest(), *(one.digest() for one in others)}) == 1 + len(others)
    plain = others[2]
    assert (len(plain), len(plain.background), len(plain.prompts)) == (5, 5, 0)


def test_what_was_prepared_comes_back_from_its_file(tmp_path: Path) -> None:
    background = torch.arange(6.0).flip(0)[::2]  # not contiguous
    made = Preparation(background, ["a text", "Zürich"], "last", 0.4, None, 0.7, {"kind": "calibrated", "n": 3})
    place = tmp_path / "folder" / "made.safetensors"
    assert Preparation.read(place) is None
    made.write(place)
    found = Preparation.read(place)
    assert found is not None
    assert torch.equal(found.background, background)
    for field in dataclasses.fields(made)[1:]:
        assert getattr(found, field.name) == getattr(made, field.name)
    assert [one.name for one in place.parent.iterdir()] == [place.name]
    place.write_bytes(place.read_bytes()[:20])
    assert Preparation.read(place) is None
