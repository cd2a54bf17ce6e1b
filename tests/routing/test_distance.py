"""GRACE's rules on hand-made keys: add, expand, split, removal as a fold over those that remain."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.errors import EditError
from errata.routing import DistanceRouter
from errata.routing.distance import Compat

ROME, PARIS, BERN = (7,), (8, 2), (9,)


def at(*places: float) -> Tensor:
    """A point of the plane."""
    return torch.tensor([places[0], places[1] if len(places) > 1 else 0.0])


def plane(
    *edits: tuple[Tensor, tuple[int, ...]], radius: float = 1.0, compat: Compat = "fixed", expand: bool = True
) -> DistanceRouter:
    router = DistanceRouter(2, radius, compat, expand=expand)
    for number, (key, label) in enumerate(edits):
        router.append(f"e{number}", key, label)
    return router


def radii(router: DistanceRouter) -> list[float]:
    return [round(radius, 4) for radius in router.store.radii.tolist()]


def answers(router: DistanceRouter, *places: Tensor) -> list[int]:
    return router.decide(torch.stack(places)).entry.tolist()


def test_what_lies_apart_founds_balls_of_their_own() -> None:
    router = plane((at(0), ROME), (at(2.01), PARIS))
    assert (radii(router), router.cells) == ([1.0, 1.0], [0, 1])
    # Inclusive: a point on the sphere is inside.
    assert answers(router, at(0), at(0, 1.0), at(0, 1.001), at(2.5), at(1.005)) == [0, 0, -1, 1, -1]


def test_equal_labels_within_reach_join_and_the_ball_grows_if_it_must() -> None:
    router = plane((at(0), ROME), (at(0.5), ROME))
    assert (radii(router), router.cells, router.origins) == ([1.0, -1.0], [0, 0], [-1, 0])
    router.append("e2", at(1.75), ROME)
    assert (radii(router), router.cells, router.origins) == ([1.75, -1.0, -1.0], [0, 0, 0], [-1, 0, 1])
    # The ball answers with the latest content; its founder is what came closest.
    route = router.decide(at(1.7)[None])
    assert (int(route.entry), int(route.nearest)) == (2, 0)
    # Beyond both radii a ball is founded, whatever its label.
    router.append("e3", at(-2.76), ROME)
    assert router.cells == [0, 0, 0, 3]


def test_without_expanding_only_what_lies_inside_joins() -> None:
    router = plane((at(0), ROME), (at(0.5), ROME), (at(1.5), ROME), (at(1.6), PARIS), expand=False)
    assert router.cells == [0, 0, 2, 3]
    assert radii(router) == [1.0, -1.0, 0.05, 0.05]
    assert router.joins(at(0.4), ROME) == 1
    assert plane((at(0), ROME), expand=False).joins(at(1.01), ROME) is None
    assert DistanceRouter(2, 1.0, "reference").expand


def test_other_labels_within_reach_split() -> None:
    router = plane((at(0), ROME), (at(1.2), PARIS))
    assert radii(router) == [0.6, 0.6]
    assert router.store.radius(0) == pytest.approx(0.6 - 1e-5, abs=1e-7)
    assert answers(router, at(0.59), at(0.61), at(1.7)) == [0, 1, 1]
    # Labels are compared whole: one that begins alike is another.
    assert plane((at(0), PARIS), (at(0.5), PARIS[:1])).cells == [0, 1]


def test_a_split_lets_no_ball_grow_unless_it_shall_be_as_published() -> None:
    edits = ((at(0), ROME), (at(0.2), PARIS), (at(-1.0), BERN))
    assert radii(plane(*edits)) == [0.1, 0.1, 0.5]
    assert radii(plane(*edits, compat="reference")) == [0.5, 0.1, 0.5]
    wide = ((at(0), ROME), (at(1.9), ROME), (at(-2.8), BERN))  # the first ball has grown to 1.9
    assert radii(plane(*wide))[2] == 1.0


def test_who_joined_is_not_lost_to_a_split_unless_it_shall_be_as_published() -> None:
    edits = ((at(0), ROME), (at(1.8), ROME), (at(0, 1.0), PARIS))
    fixed, reference = plane(*edits), plane(*edits, compat="reference")
    assert (fixed.cells, reference.cells) == ([0, 1, 2], [0, 0, 2])
    assert answers(reference, at(1.8)) == [-1]
    assert radii(fixed) == [0.5, 1.0, 0.5]
    assert answers(fixed, *(key for key, _ in edits)) == [0, 1, 2]
    # A new key that is nearer to one that joined than its founder, without touching the ball it joined.
    beside = plane((at(0), ROME), (at(1.8), ROME), (at(3.5), PARIS))
    assert beside.cells == [0, 1, 2]
    assert answers(beside, at(1.8)) == [1]


def test_reference_compares_labels_in_the_wrong_order() -> None:
    # Two founders; the third meets the first and is given the label of the second.
    edits = ((at(0), ROME), (at(5), PARIS), (at(0.5), PARIS))
    assert plane(*edits, compat="reference").cells == [0, 1, 0]
    assert plane(*edits).cells == [0, 1, 2]


def test_the_very_same_point_with_another_label_is_taken_over() -> None:
    router = plane((at(0), ROME))
    assert router.append("again", at(0), PARIS) == "e0"
    assert answers(router, at(0)) == [1]
    assert router.append("third", at(0), PARIS) is None  # joins


def test_joining_is_foreseen() -> None:
    router = plane((at(0), ROME), (at(0.5), ROME), (at(9), PARIS))
    assert router.joins(at(1.9), ROME) == 1
    assert router.joins(at(2.1), ROME) is None
    assert router.joins(at(0.1), PARIS) is None
    assert DistanceRouter(2, 1.0).joins(at(0), ROME) is None


def same(first: DistanceRouter, second: DistanceRouter) -> None:
    (tensors, settings), (others, other_settings) = first.state(), second.state()
    assert settings == other_settings
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize(("compat", "expand"), [("fixed", False), ("fixed", True), ("reference", True)])
def test_removing_gives_what_would_be_there_without_the_edit(compat: Compat, expand: bool) -> None:
    rng, joined, split, released = random.Random(0), 0, 0, 0
    for crowd in (1.0, 3.0, 8.0):
        generator = torch.Generator().manual_seed(int(crowd))
        keys = crowd * torch.randn(40, 2, generator=generator)
        edits: list[tuple[str, Tensor, tuple[int, ...]]] = [
            (f"e{n}", key, rng.choice([ROME, PARIS, BERN])) for n, key in enumerate(keys)
        ]
        router = DistanceRouter(2, 0.7, compat, expand=expand)
        for edit in edits:
            router.append(*edit)
        joined += sum(cell != number for number, cell in enumerate(router.cells))
        split += sum(0 <= radius < 0.7 for radius in router.store.radii.tolist())
        released += sum(o >= 0 and c == n for n, (o, c) in enumerate(zip(router.origins, router.cells, strict=True)))
        while len(edits) > 1:
            number = rng.randrange(len(edits))
            assert router.remove(edits.pop(number)[0]) == [number]
            fresh = DistanceRouter(2, 0.7, compat, expand=expand)
            for edit in edits:
                fresh.append(*edit)
            same(router, fresh)
    assert min(joined, split) > 2  # otherwise this would prove little
    assert (released > 0) == (compat == "fixed")
    with pytest.raises(EditError, match="no key is stored for edit 'nobody'"):
        router.remove("nobody")


def test_removing_measures_only_what_the_missing_edit_can_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    router = plane(*((at(10.0 * n), (n,)) for n in range(20)))
    measured: list[float] = []
    nearest = router.store.nearest

    def counted(queries: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
        measured.extend(queries[:, 0].tolist())
        return nearest(queries, count)

    monkeypatch.setattr(router.store, "nearest", counted)
    router.remove("e12")
    assert measured == [130.0]  # the key of e13, whose nearest it was
    same_as = plane(*((at(10.0 * n), (n,)) for n in range(20) if n != 12))
    assert router.cells == same_as.cells


def test_prompts_are_read_to_their_last_token_in_any_batch_and_in_chunks() -> None:
    router = DistanceRouter(2, 1.0)
    inputs = torch.arange(12.0).view(2, 3, 2)
    prompt = torch.tensor([[True, True, False], [False, True, True]])  # padding, or an answer, on either side
    assert router.gather(inputs, prompt).tolist() == [[2.0, 3.0], [10.0, 11.0]]
    first = router.gather(inputs[:, :1], prompt[:, :1])
    assert first[0].tolist() == [0.0, 1.0]
    assert not bool(first[1].isfinite().any())  # nothing of this prompt was read yet
    assert router.gather(inputs[:, 1:], prompt[:, 1:], first).tolist() == [[2.0, 3.0], [10.0, 11.0]]


def test_nothing_fires_before_anything_is_stored_or_read() -> None:
    empty = DistanceRouter(2, 1.0).decide(torch.zeros(2, 2))
    assert empty.entry.tolist() == empty.nearest.tolist() == empty.second.tolist() == [-1, -1]
    assert empty.score.tolist() == [0.0, 0.0]
    unread = plane((at(0), ROME)).decide(torch.full((1, 2), torch.inf))
    assert (unread.entry.tolist(), unread.score.tolist()) == ([-1], [0.0])


def test_scores_are_larger_where_it_is_closer_and_fire_from_the_threshold_on() -> None:
    route = plane((at(0), ROME), (at(9), PARIS), radius=3.0).decide(torch.stack([at(0), at(3), at(3.01)]))
    assert route.score.tolist() == pytest.approx([1.0, 0.25, 1 / 4.01])
    assert route.threshold.tolist() == [0.25] * 3
    assert (route.entry >= 0).tolist() == (route.score >= route.threshold).tolist() == [True, True, False]
    assert (route.second.tolist(), route.second_score.tolist()[0]) == ([1, 1, 1], pytest.approx(0.1))
    alone: Any = plane((at(0), ROME)).decide(at(0)[None])
    assert (alone.second.tolist(), alone.second_score.tolist()) == ([-1], [0.0])


@pytest.mark.parametrize("compat", ["fixed", "reference"])
def test_a_loaded_router_goes_on_as_the_saved_one(compat: Compat) -> None:
    edits = [(at(0), ROME), (at(1.8), ROME), (at(0, 1.0), PARIS), (at(7), PARIS)]
    router = plane(*edits, compat=compat)
    loaded = DistanceRouter.from_state(*router.state())
    same(router, loaded)
    for one in (router, loaded):
        one.append("more", at(0.6, 0.6), ROME)
        one.remove("e2")
    same(router, loaded)
    assert "4 keys" in repr(loaded)
