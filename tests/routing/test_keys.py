"""Keys with radii: exact nearest neighbours, independent of the batch, in a store that grows and shrinks."""

from __future__ import annotations

import pytest
import torch

from errata.errors import ConfigError
from errata.routing import KeyStore
from errata.routing import keys as keys_module
from errata.routing.keys import Rows

WIDTH = 12


def stored(count: int, seed: int = 0, scale: float = 1.0, width: int = WIDTH) -> tuple[KeyStore, torch.Tensor]:
    keys = scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    store = KeyStore(width)
    for number, key in enumerate(keys):
        assert store.append(key, 0.5 + number) == number
    return store, keys


def test_rows_grow_shrink_and_load() -> None:
    rows = Rows(2)
    wanted = [torch.tensor([float(n), -float(n)]) for n in range(100)]
    for number, row in enumerate(wanted):
        assert rows.append(row) == number
    assert torch.equal(rows.table, torch.stack(wanted))
    for number in (99, 40, 0):
        rows.remove(number)
        del wanted[number]
    assert torch.equal(rows.table, torch.stack(wanted))
    again = Rows(2)
    again.load(rows.table)
    again.append(torch.zeros(2))
    assert (len(rows), len(again)) == (97, 98)
    with pytest.raises(ConfigError, match="have 2 numbers, not"):
        rows.append(torch.zeros(3))
    with pytest.raises(ConfigError, match="at least one number"):
        Rows(0)


def test_growing_copies_each_row_a_bounded_number_of_times() -> None:
    rows = Rows(1)
    buffers = set()
    for number in range(2000):
        rows.append(torch.tensor([float(number)]))
        buffers.add(rows.table.data_ptr())
    assert len(buffers) <= 9  # 16, 32, ... 2048


@pytest.mark.parametrize("piece", [WIDTH, 5 * WIDTH, 1 << 20])
def test_the_nearest_keys_are_those_of_a_direct_search(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "_PIECE", piece)
    store, keys = stored(53)
    queries = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))
    distances, numbers = store.nearest(queries, count=3)
    wanted = (queries[:, None] - keys[None]).norm(dim=2).double()
    best = wanted.sort(dim=1)
    assert torch.equal(numbers, best.indices[:, :3])
    assert torch.allclose(distances, best.values[:, :3], rtol=1e-6)


def test_distances_near_a_key_are_right_although_norms_are_large() -> None:
    store, keys = stored(5, scale=1000.0)
    near = keys[3] + torch.eye(WIDTH)[0] * 0.125
    distances, numbers = store.nearest(near[None])
    assert (int(numbers), round(float(distances), 3)) == (3, 0.125)


def test_an_answer_does_not_depend_on_the_batch() -> None:
    store, _ = stored(300, width=257)
    queries = torch.randn(33, 257, generator=torch.Generator().manual_seed(2))
    together = store.nearest(queries, count=2)
    for row, query in enumerate(queries):
        alone = store.nearest(query[None], count=2)
        assert all(torch.equal(a[0], t[row]) for a, t in zip(alone, together, strict=True))


def test_of_equally_near_keys_the_latest_comes_first() -> None:
    store = KeyStore(WIDTH)
    for _ in range(3):
        store.append(torch.ones(WIDTH), 1.0)
    distances, numbers = store.nearest(torch.ones(1, WIDTH), count=2)
    assert numbers.tolist() == [[2, 1]]
    assert distances.tolist() == [[0.0, 0.0]]


def test_sleeping_keys_are_not_found_and_wake_again() -> None:
    store, keys = stored(4)
    store.set_radius(2, -1.0)
    assert int(store.nearest(keys[2:3])[1]) != 2
    assert store.nearest(keys[2:3], count=9)[1].shape == (1, 3)
    store.sleep()
    assert store.nearest(keys[2:3])[1].shape == (1, 0)
    store.set_radius(2, 0.0)
    assert int(store.nearest(keys[:1])[1]) == 2
    assert torch.equal(store.keys, keys)


def test_removing_moves_those_behind_up_and_loading_gives_the_same() -> None:
    store, keys = stored(40)
    store.remove(7)
    kept = [n for n in range(40) if n != 7]
    assert torch.equal(store.keys, keys[kept])
    assert store.radii.tolist() == [0.5 + n for n in kept]
    assert int(store.nearest(keys[8:9])[1]) == 7
    again = KeyStore(WIDTH)
    again.load(store.keys, store.radii)
    queries = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(again.nearest(queries), store.nearest(queries), strict=True))
    again.append(keys[7], 2.5)
    assert (len(again), len(store), again.radius(39)) == (40, 39, 2.5)
    with pytest.raises(ConfigError, match="2 keys need as many radii, not 1"):
        again.load(keys[:2], torch.zeros(1))


def test_an_empty_store_finds_nothing() -> None:
    distances, numbers = KeyStore(WIDTH).nearest(torch.zeros(2, WIDTH), count=2)
    assert distances.shape == numbers.shape == (2, 0)
