"""Packed masks: packing, overlap against the definition, growing and removing."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from errata.errors import ConfigError
from errata.routing import MaskStore, chance_overlap, pack, unpack
from errata.routing.masks import Rows


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


def test_growing_copies_nothing() -> None:
    rows = Rows(4, np.uint8)
    where = []
    for number in range(1000):
        rows.append(np.full(4, number % 256, dtype=np.uint8))
        where.append([segment.__array_interface__["data"][0] for _, segment in rows.segments()])
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(where))
    assert len(where[-1]) < 10
    assert rows.whole()[:, 0].tolist() == [number % 256 for number in range(1000)]


def test_removing_moves_nothing() -> None:
    rows = Rows(1, np.int64)
    for number in range(300):
        rows.append(np.array([number]))
    where = [segment.__array_interface__["data"][0] for _, segment in rows.segments()]
    left = list(range(300))
    for number in (0, 250, 250, 17, len(left) - 5, 0):
        assert rows.remove(number) == left.pop(number)
    assert [segment.__array_interface__["data"][0] for _, segment in rows.segments()] == where
    assert rows.whole()[:, 0].tolist() == left
    numbers = np.arange(len(left))
    assert rows.places_of(numbers).tolist() == left
    assert rows.numbers_of(np.array(left)).tolist() == numbers.tolist()
    assert rows.at(rows.places_of(numbers[::-1]))[:, 0].tolist() == left[::-1]


def test_masks_are_used_where_a_file_has_them(tmp_path: Path) -> None:
    masks = random_masks(50, 40, 9, 0)
    # A byte in front of them, so that they stand at an odd address.
    save_file({"a": torch.zeros(1, dtype=torch.uint8), "masks": pack(masks)}, tmp_path / "masks.safetensors")
    loaded = load_file(tmp_path / "masks.safetensors")["masks"]
    store = MaskStore(40, 9)
    store.load(loaded)
    assert store.packed.data_ptr() == loaded.data_ptr()
    store.append(masks[3])
    store.remove(0)
    assert torch.equal(loaded, pack(masks))
    kept = torch.cat([masks[1:], masks[3:4]])
    assert torch.equal(store.packed, pack(kept))
    assert torch.equal(store.overlaps(masks), (masks[:, None] & kept[None]).sum(-1).float() / 9)


def test_masks_of_another_width_are_not_loaded() -> None:
    with pytest.raises(ConfigError, match="rows of 5 bytes"):
        MaskStore(40, 9).load(torch.zeros(3, 6, dtype=torch.uint8))


def test_the_nearest_among_some_is_found_among_them() -> None:
    masks, queries = random_masks(60, 40, 9, 0), random_masks(4, 40, 9, 1)
    store = MaskStore(40, 9)
    for mask in masks:
        store.append(mask)
    among = [torch.tensor([5, 9, 30]), torch.arange(60), torch.tensor([7]), torch.tensor([], dtype=torch.long)]
    shares, numbers = store.nearest(queries, 2, among)
    overlaps = store.overlaps(queries)
    for row, chosen in enumerate(among):
        best = chosen[overlaps[row, chosen].argsort(descending=True, stable=True)][:2].tolist()
        assert numbers[row].tolist() == best + [-1] * (2 - len(best))
        assert shares[row].tolist() == [float(overlaps[row, number]) for number in best] + [0.0] * (2 - len(best))


def test_ties_go_to_the_earliest_whatever_the_batch() -> None:
    store = MaskStore(8, 2)
    mask = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
    for _ in range(5):
        store.append(mask)
    assert store.nearest(mask[None])[1].tolist() == [[0]]
    assert store.nearest(mask[None].expand(4, -1))[1].tolist() == [[0]] * 4
