"""The store of directions: exact below, through cells above, and the same numbers in both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from errata.routing.directions import DirectionStore


def drawn(count: int, width: int = 12, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def filled(table: torch.Tensor, **settings: int) -> DirectionStore:
    store = DirectionStore(table.shape[1], **settings)
    for row in table:
        store.append(3.0 * row)
    return store


def test_what_is_nearest_is_found_exactly() -> None:
    table, queries = drawn(50), drawn(7, seed=1)
    scores, numbers = filled(table).nearest(5.0 * queries, count=3)
    expected = (queries @ table.T).topk(3, dim=1)
    assert torch.equal(numbers, expected.indices)
    assert torch.allclose(scores, expected.values, atol=1e-6)


def test_of_equally_near_ones_the_latest_comes_first_and_few_are_no_error() -> None:
    store = filled(drawn(1).repeat(3, 1))
    assert store.nearest(drawn(1), count=5)[1].tolist() == [[2, 1, 0]]
    assert DirectionStore(4).nearest(torch.ones(2, 4), count=2)[1].shape == (2, 0)


def test_a_row_does_not_depend_on_its_batch() -> None:
    store, queries = filled(drawn(300)), drawn(9, seed=1)
    together = store.nearest(queries)[0]
    assert all(torch.equal(together[row : row + 1], store.nearest(queries[row : row + 1])[0]) for row in range(9))


@pytest.mark.parametrize("exact_below", [1000, 100])
def test_removing_moves_the_later_ones_up(exact_below: int) -> None:
    table = drawn(300)
    store = filled(table, exact_below=exact_below, probed=300)
    store.nearest(table[:1])
    for gone in (299, 17, 0):
        store.remove(gone)
        table = torch.cat([table[:gone], table[gone + 1 :]])
    assert torch.equal(store.nearest(table)[1][:, 0], torch.arange(297))


def test_cells_find_near_entries_and_never_make_one_nearer() -> None:
    centres = drawn(40, 24)
    table = F.normalize(
        centres.repeat(25, 1) + 0.08 * torch.randn(1000, 24, generator=torch.Generator().manual_seed(2))
    )
    store, exact = filled(table, exact_below=100, probed=4), filled(table)
    queries = F.normalize(table[::7] + 0.02 * torch.randn(143, 24, generator=torch.Generator().manual_seed(3)))
    (scores, numbers), (best, right) = store.nearest(queries, 2), exact.nearest(queries, 2)
    assert bool((scores <= best + 1e-6).all())
    assert float((numbers[:, 0] == right[:, 0]).float().mean()) > 0.97
    # All cells together hold everything.
    store.probed = 1000
    assert torch.equal(store.nearest(queries, 2)[1], right)


def test_what_is_stored_after_the_cells_were_made_is_found_at_once() -> None:
    store = filled(drawn(200), exact_below=100, probed=1)
    store.nearest(drawn(1))
    new = drawn(30, seed=5)
    for row in new:
        store.append(row)
    assert torch.equal(store.nearest(new)[1][:, 0], torch.arange(200, 230))


def test_a_loaded_table_answers_as_the_one_that_was_saved() -> None:
    store, queries = filled(drawn(300), exact_below=100), drawn(20, seed=1)
    loaded = DirectionStore(12, exact_below=100)
    loaded.load(store.table)
    assert torch.equal(loaded.nearest(queries)[1], store.nearest(queries)[1])
