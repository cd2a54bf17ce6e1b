"""The index proposes, the store compares: together they find what comparing everything finds, whatever happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from errata.errors import ConfigError
from errata.routing import MaskStore, pack
from errata.routing.index import SharpestIndex

WIDTH, MARKED, SHARPEST = 600, 170, 24


def features(count: int, seed: int) -> Tensor:
    """[count, WIDTH], heavy-tailed as activations are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator) * torch.randn(count, WIDTH, generator=generator).exp()


def near(stored: Tensor, seed: int, kept: float = 0.9) -> Tensor:
    """Features that share much with those stored."""
    return kept * stored + (1 - kept**2) ** 0.5 * features(len(stored), seed)


def hashed(values: Tensor) -> tuple[Tensor, Tensor]:
    """Masks [n, WIDTH] and sharpest features [n, SHARPEST]."""
    top = values.abs().topk(MARKED, dim=1).indices
    return torch.zeros(values.shape, dtype=torch.bool).scatter_(1, top, True), top[:, :SHARPEST]


class Shelf:
    """A store and its index, filled alike."""

    def __init__(self, **limits: int) -> None:
        self.store, self.index = MaskStore(WIDTH, MARKED), SharpestIndex(WIDTH, SHARPEST, **limits)

    def add(self, values: Tensor) -> None:
        for mask, sharpest in zip(*hashed(values), strict=True):
            self.store.append(mask)
            self.index.append(sharpest)

    def remove(self, number: int) -> None:
        self.store.remove(number)
        self.index.remove(number)

    def agrees(self, queries: Tensor) -> bool:
        masks, sharpest = hashed(queries)
        found = self.store.nearest(masks, among=self.index.candidates(sharpest))
        exact = self.store.nearest(masks)
        return torch.equal(found[0], exact[0]) and torch.equal(found[1], exact[1])


def test_paraphrases_find_the_mask_that_comparing_all_finds() -> None:
    stored = features(3000, 0)
    shelf = Shelf(postings=2000, candidates=64)
    shelf.add(stored)
    asked = torch.arange(0, 3000, 15)
    assert shelf.agrees(near(stored[asked], 1))
    assert all(len(proposed) <= 64 for proposed in shelf.index.candidates(hashed(near(stored[asked], 1))[1]))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_it_stays_right_through_any_life(draw: st.DataObject) -> None:
    shelf, kept = Shelf(), features(0, 0)
    for seed in range(draw.draw(st.integers(2, 8))):
        what = draw.draw(st.sampled_from(["append", "repeat", "remove", "load"]))
        if what == "append":
            new = features(draw.draw(st.integers(1, 90)), seed)
        elif what == "repeat" and len(kept):
            new = kept[draw.draw(st.integers(0, len(kept) - 1))][None].expand(draw.draw(st.integers(1, 5)), -1)
        else:
            new = kept[:0]
        shelf.add(new)
        kept = torch.cat([kept, new])
        if what == "remove":
            for _ in range(min(len(kept), draw.draw(st.integers(1, 20)))):
                number = draw.draw(st.integers(0, len(kept) - 1))
                shelf.remove(number)
                kept = torch.cat([kept[:number], kept[number + 1 :]])
        if what == "load":
            again = Shelf()
            again.store.load(shelf.store.packed)
            again.index.load(shelf.index.sharpest)
            shelf = again
    assert len(shelf.index) == len(shelf.store) == len(kept)
    if len(kept):
        masks, sharpest = hashed(kept)
        assert torch.equal(shelf.store.packed, pack(masks))
        assert torch.equal(shelf.index.sharpest.long(), sharpest)
        assert shelf.agrees(near(kept, 99))


def test_of_equal_masks_the_earliest_is_found_and_after_its_removal_the_next() -> None:
    one = features(1, 0)
    shelf = Shelf()
    shelf.add(features(40, 1))
    shelf.add(one.expand(5, -1))
    masks, sharpest = hashed(one)
    for expected in (40, 40, 40):
        shares, numbers = shelf.store.nearest(masks, 2, among=shelf.index.candidates(sharpest))
        assert shares.tolist() == [[1.0, 1.0]]
        assert numbers.tolist() == [[expected, expected + 1]]
        shelf.remove(expected)
    shelf.remove(3)
    assert shelf.store.nearest(masks, among=shelf.index.candidates(sharpest))[1].tolist() == [[39]]


def test_rows_of_a_batch_are_independent() -> None:
    stored = features(500, 0)
    shelf = Shelf(postings=600, candidates=16)
    shelf.add(stored)
    _, sharpest = hashed(near(stored[:20], 1))
    together = shelf.index.candidates(sharpest)
    assert all(torch.equal(shelf.index.candidates(sharpest[row : row + 1])[0], together[row]) for row in range(20))
    assert all(proposed.tolist() == sorted(set(proposed.tolist())) for proposed in together)


def test_a_query_reads_no_more_postings_than_it_may() -> None:
    shelf = Shelf(postings=50, candidates=8)
    same = torch.arange(SHARPEST)
    for number in range(300):  # one feature is everybody's, the others are shared by few
        shelf.index.append(torch.cat([torch.tensor([0]), 24 + (number * 7 + same[1:]) % 500]))
    everybody = torch.cat([torch.tensor([0]), 24 + (150 * 7 + same[1:]) % 500])
    (proposed,) = shelf.index.candidates(everybody[None])
    assert 150 in proposed.tolist()
    assert len(proposed) == 8
    # Where even the shortest list is longer than that, it is read all the same.
    assert shelf.index.candidates(torch.zeros(1, 1, dtype=torch.long))[0].tolist() == list(range(8))


def test_what_shares_nothing_is_not_proposed_and_does_not_fire() -> None:
    shelf = Shelf()
    shelf.index.append(torch.arange(SHARPEST))
    mask = torch.zeros(1, WIDTH, dtype=torch.bool)
    mask[:, :MARKED] = True
    shelf.store.append(mask[0])
    elsewhere = shelf.index.candidates(torch.arange(100, 100 + SHARPEST)[None])
    assert elsewhere[0].tolist() == []
    shares, numbers = shelf.store.nearest(mask, among=elsewhere)
    assert (shares.tolist(), numbers.tolist()) == ([[0.0]], [[-1]])


def test_an_empty_index_proposes_nothing() -> None:
    index = SharpestIndex(WIDTH, SHARPEST)
    assert [len(proposed) for proposed in index.candidates(torch.arange(SHARPEST).expand(2, -1))] == [0, 0]
    index.load(index.sharpest)
    assert len(index) == 0


def test_an_index_comes_back_from_a_file_without_being_copied(tmp_path: Path) -> None:
    stored = features(2500, 0)
    shelf = Shelf()
    shelf.add(stored)
    save_file({"masks": shelf.store.packed, "sharpest": shelf.index.sharpest}, tmp_path / "router.safetensors")
    tensors = load_file(tmp_path / "router.safetensors")
    again = Shelf()
    again.store.load(tensors["masks"])
    again.index.load(tensors["sharpest"])
    assert again.store.packed.data_ptr() == tensors["masks"].data_ptr()
    assert again.index.sharpest.data_ptr() == tensors["sharpest"].data_ptr()
    before = tensors["masks"].clone(), tensors["sharpest"].clone()
    again.add(features(100, 1))
    shelf.add(features(100, 1))
    for one in (again, shelf):
        one.remove(7)
    asked = near(torch.cat([stored[::20], features(100, 1)]), 2)
    assert again.agrees(asked)
    sharpest = hashed(asked)[1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.index.candidates(sharpest), shelf.index.candidates(sharpest), strict=True)
    )
    assert torch.equal(tensors["masks"], before[0])  # what was loaded is never written to
    assert torch.equal(tensors["sharpest"], before[1])


def test_lists_made_in_pieces_are_those_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errata.routing.index._PIECE", 64)
    _, sharpest = hashed(features(200, 0))
    one_by_one, at_once = SharpestIndex(WIDTH, SHARPEST), SharpestIndex(WIDTH, SHARPEST)
    for row in sharpest:
        one_by_one.append(row)
    at_once.load(one_by_one.sharpest)
    for feature in range(WIDTH):
        asked = torch.tensor([[feature]])
        assert at_once.candidates(asked)[0].tolist() == one_by_one.candidates(asked)[0].tolist()
        assert at_once.candidates(asked)[0].tolist() == (sharpest == feature).any(1).nonzero()[:, 0].tolist()


def test_what_does_not_fit_is_refused() -> None:
    index = SharpestIndex(WIDTH, SHARPEST)
    with pytest.raises(ConfigError, match="between 1 and 8 features"):
        SharpestIndex(8, 9)
    with pytest.raises(ConfigError, match="takes 24 features of an entry"):
        index.append(torch.arange(5))
    with pytest.raises(ConfigError, match="rows of 24 features"):
        index.load(torch.zeros(3, 5, dtype=torch.uint16))
    with pytest.raises(IndexError, match="none has number 0"):
        index.remove(0)
