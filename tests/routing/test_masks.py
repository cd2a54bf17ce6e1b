"""Packed masks: packing, overlap against the definition, growing and removing, and the TopHash of MEMOIR."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.errors import ConfigError, EditError
from errata.routing import MaskStore, TopHashRouter, chance_overlap, pack, relative_threshold, unpack


def random_masks(count: int, width: int, marked: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, width, generator=generator)
    return torch.zeros(count, width, dtype=torch.bool).scatter_(1, scores.topk(marked, dim=1).indices, True)


SHAPES = st.integers(1, 70).flatmap(lambda width: st.tuples(st.just(width), st.integers(1, width), st.integers(1, 12)))


@settings(deadline=None, max_examples=80)
@given(SHAPES, st.integers(0, 1000))
def test_packing_is_lossless_and_overlap_is_what_it_says(shape: tuple[int, int, int], seed: int) -> None:
    width, marked, count = shape
    masks, queries = random_masks(count, width, marked, seed), random_masks(3, width, marked, seed + 1)
    assert torch.equal(unpack(pack(masks), width), masks)
    store = MaskStore(width, marked)
    for mask in masks:
        store.append(mask)
    expected = (queries[:, None] & masks[None]).sum(-1) / marked
    assert torch.allclose(store.overlaps(queries), expected.float())
    shares, numbers = store.nearest(queries, count=2)
    assert torch.equal(shares[:, 0], store.overlaps(queries).max(1).values)
    assert torch.equal(store.masks(numbers[:, 0]), masks[numbers[:, 0]])


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.data())
def test_removal_keeps_the_others_in_order(shape: tuple[int, int, int], draw: st.DataObject) -> None:
    width, marked, count = shape
    masks = list(random_masks(count, width, marked, 0))
    store = MaskStore(width, marked)
    for mask in masks:
        store.append(mask)
    while masks:
        at = draw.draw(st.integers(0, len(masks) - 1))
        store.remove(at)
        del masks[at]
        assert len(store) == len(masks)
        if masks:
            assert torch.equal(store.masks(torch.arange(len(masks))), torch.stack(masks))


def test_chance_overlap_is_that_of_random_masks() -> None:
    mean, deviation = chance_overlap(400, 1400)
    store = MaskStore(1400, 400)
    for mask in random_masks(300, 1400, 400, 0):
        store.append(mask)
    found = store.overlaps(random_masks(30, 1400, 400, 1))
    assert abs(float(found.mean()) - mean) < 0.002
    assert abs(float(found.std()) - deviation) < 0.1 * deviation
    assert mean == pytest.approx(400 / 1400)


def test_masks_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="between 1 and 8"):
        MaskStore(8, 9)
    with pytest.raises(ConfigError, match="masks of 3 features, not 2"):
        MaskStore(8, 3).append(torch.tensor([1, 1, 0, 0, 0, 0, 0, 0], dtype=torch.bool))


def test_ties_go_to_the_earliest_whatever_the_batch() -> None:
    store = MaskStore(8, 2)
    mask = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
    for _ in range(5):
        store.append(mask)
    assert store.nearest(mask[None])[1].tolist() == [[0]]
    assert store.nearest(mask[None].expand(4, -1))[1].tolist() == [[0]] * 4


def router(width: int = 40, marked: int = 10, pooling: str = "mean") -> TopHashRouter:
    made = TopHashRouter.seeded(width, marked, torch.Generator().manual_seed(0), pooling)  # type: ignore[arg-type]
    made.threshold = 0.6
    return made


def test_tophash_marks_the_permuted_places_of_the_largest() -> None:
    made = router()
    features = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    masks = made.hash(features)
    for row in range(3):
        largest = features[row].abs().argsort(descending=True)[:10]
        assert set(masks[row].nonzero().squeeze(1).tolist()) == set(made.permutation[largest].tolist())
    assert sorted(made.permutation.tolist()) == list(range(40))


@pytest.mark.parametrize("pooling", ["mean", "content_mean", "last"])
def test_gathering_in_parts_equals_gathering_at_once(pooling: str) -> None:
    made = router(pooling=pooling)
    inputs = torch.randn(2, 7, 40, generator=torch.Generator().manual_seed(2))
    prompt = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    whole = made.features(made.gather(inputs, prompt))
    gathered = None
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        gathered = made.gather(inputs[:, start:stop], prompt[:, start:stop], gathered)
    assert gathered is not None
    assert torch.allclose(made.features(gathered), whole, atol=1e-6)
    own = inputs[0, 2:]
    expected = {"mean": own.mean(0), "content_mean": own[1:].mean(0), "last": own[-1]}[pooling]
    assert torch.allclose(whole[0], expected, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "content_mean", "last"])
def test_gathering_follows_the_layers_device_not_the_token_ids(pooling: str) -> None:
    made = router(pooling=pooling)
    inputs, prompt = torch.zeros(2, 7, 40, device="meta"), torch.ones(2, 7, dtype=torch.bool)
    gathered = made.gather(inputs, prompt, made.gather(inputs, prompt))
    assert {x.device.type for x in (gathered.sums, gathered.counts, gathered.last, gathered.seen)} == {"meta"}


def test_nothing_fires_below_the_threshold() -> None:
    made = router()
    features = torch.randn(2, 40, generator=torch.Generator().manual_seed(3))
    assert made.match(features).entry.tolist() == [-1, -1]
    made.append(made.hash(features)[0], "edit")
    route = made.match(features)
    assert route.entry.tolist()[0] == 0
    assert float(route.score[0]) == 1.0
    assert route.threshold.tolist() == [0.6, 0.6]
    made.threshold = float(route.score[1]) + 0.01
    assert made.match(features).entry.tolist() == [0, -1]


def test_the_same_mask_changes_owner_and_removal_is_by_owner() -> None:
    made = router()
    masks = made.hash(torch.randn(3, 40, generator=torch.Generator().manual_seed(4)))
    for number, mask in enumerate(masks):
        assert made.append(mask, f"edit-{number}") is None
    assert made.append(masks[1], "newer") == "edit-1"  # which can be reached no more, and is not lost silently
    assert made.append(masks[1], "newer") is None
    assert made.owners == ["edit-0", "newer", "edit-2"]
    assert made.remove("newer") == [1]
    assert len(made) == 2
    with pytest.raises(EditError, match="no mask is stored"):
        made.remove("edit-1")


def test_a_router_comes_back_from_its_state() -> None:
    made = router(pooling="last")
    made.append(made.hash(torch.randn(1, 40))[0], "edit")
    tensors, settings_ = made.state()
    again = TopHashRouter.from_state(tensors, settings_)
    assert again.owners == made.owners
    assert torch.equal(again.store.packed, made.store.packed)
    assert torch.equal(again.permutation, made.permutation)
    assert (again.threshold, again.pooling) == (made.threshold, made.pooling)


def test_a_relative_threshold_starts_at_chance() -> None:
    assert relative_threshold(0.0, 4096, 14336) == pytest.approx(4096 / 14336)
    assert relative_threshold(0.16, 4096, 14336) == pytest.approx(0.4, abs=0.001)
    assert relative_threshold(1.0, 4096, 14336) == 1.0


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose mean, content_mean or last"):
        router(pooling="median")
