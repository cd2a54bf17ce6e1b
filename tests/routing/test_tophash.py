"""The TopHash of MEMOIR: which columns a prompt marks, and which stored edit answers it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from errata.errors import ConfigError, EditError
from errata.routing import Gathered, Route, TopHashRouter, relative_threshold
from errata.routing.tophash import POOLINGS, Pooling, Words

WIDTH, MARKED = 40, 10


def router(pooling: Any = "mean", **settings: Any) -> TopHashRouter:
    made = TopHashRouter.seeded(WIDTH, MARKED, torch.Generator().manual_seed(0), pooling, **settings)
    made.threshold = 0.6
    return made


def test_tophash_marks_the_permuted_places_of_the_largest() -> None:
    made = router()
    features = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    masks = made.hash(features)
    for row in range(3):
        largest = features[row].abs().argsort(descending=True)[:MARKED]
        assert set(masks[row].nonzero().squeeze(1).tolist()) == set(made.permutation[largest].tolist())
    assert sorted(made.permutation.tolist()) == list(range(WIDTH))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gathering_in_parts_equals_gathering_at_once(pooling: Pooling) -> None:
    made = router(pooling)
    inputs = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2))
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


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gathering_follows_the_layers_device_not_the_token_ids(pooling: Pooling) -> None:
    made = router(pooling)
    inputs, prompt = torch.zeros(2, 7, WIDTH, device="meta"), torch.ones(2, 7, dtype=torch.bool)
    gathered = made.gather(inputs, prompt, made.gather(inputs, prompt))
    assert {x.device.type for x in (gathered.sums, gathered.counts, gathered.last, gathered.seen)} == {"meta"}


def read(made: TopHashRouter, features: Tensor, ids: Tensor | None = None) -> Gathered:
    """What a router gathers from prompts of one token each, with these features; token ids [rows, n] if given."""
    gathered = made.gather(features[:, None], torch.ones(len(features), 1, dtype=torch.bool))
    return Gathered(gathered.sums, gathered.counts, gathered.last, gathered.seen, ids)


def add(made: TopHashRouter, features: Tensor, *owners: str, words: Words = ()) -> None:
    for mask, sharpest, owner in zip(made.hash(features), made.sharpest(features), owners, strict=True):
        made.append(mask, owner, sharpest, words)


def test_nothing_fires_below_the_threshold() -> None:
    made = router()
    features = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(3))
    assert made.decide(read(made, features)).entry.tolist() == [-1, -1]
    add(made, features[:1], "edit")
    route = made.decide(read(made, features))
    assert route.entry.tolist()[0] == 0
    assert float(route.score[0]) == 1.0
    assert route.threshold.tolist() == [0.6, 0.6]
    made.threshold = float(route.score[1]) + 0.01
    assert made.decide(read(made, features)).entry.tolist() == [0, -1]


@pytest.mark.parametrize("exact_below", [4096, 1])
def test_an_entry_is_found_by_its_very_mask_and_removed_by_its_owner(
    exact_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("errata.routing.tophash.EXACT_BELOW", exact_below)
    made = router()
    features = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(4))
    asked = list(zip(made.hash(features), made.sharpest(features), strict=True))
    assert made.find(*asked[0]) is None
    add(made, features[:3], "edit-0", "edit-1", "edit-2")
    assert [made.find(*one) for one in asked] == [0, 1, 2, None]
    assert made.remove("edit-1") == [1]
    assert made.owners == ["edit-0", "edit-2"]
    assert [made.find(*one) for one in asked] == [0, None, 1, None]
    with pytest.raises(EditError, match="no mask is stored"):
        made.remove("edit-1")


def test_a_large_router_decides_as_a_small_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made = router()
    features = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(5)) ** 3
    add(made, features, *(f"edit-{number}" for number in range(300)))
    made.remove("edit-17")
    asked = read(made, features + 0.05 * torch.randn(features.shape, generator=torch.Generator().manual_seed(6)))
    exact = made.decide(asked)
    indexed, proposed = [], made.index.candidates

    def candidates(sharpest: Tensor) -> list[Tensor]:
        indexed.append(len(sharpest))
        return proposed(sharpest)

    monkeypatch.setattr(made.index, "candidates", candidates)
    made.decide(asked)
    assert not indexed
    monkeypatch.setattr("errata.routing.tophash.EXACT_BELOW", 1)
    found = made.decide(asked)
    assert indexed == [300]
    for name in ("entry", "nearest", "score", "threshold"):
        assert torch.equal(getattr(found, name), getattr(exact, name))
    assert int((exact.entry >= 0).sum()) > 290


@pytest.mark.parametrize("hashing", ["tophash", "random"])
def test_a_router_comes_back_from_its_state(hashing: Any) -> None:
    made = router("last", hashing=hashing, permute=False)
    made.named_threshold, made.unnamed_threshold = 0.3, 0.9
    features = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(7))
    add(made, features[:1], "edit", words=((3, 4), (5,)))
    add(made, features[1:], "other", "third")
    made.remove("other")
    tensors, settings = made.state()
    again = TopHashRouter.from_state(tensors, settings)
    assert again.owners == made.owners == ["edit", "third"]
    assert again.words == made.words
    assert torch.equal(again.store.packed, made.store.packed)
    assert torch.equal(again.index.sharpest, made.index.sharpest)
    assert torch.equal(again.permutation, torch.arange(WIDTH))
    for name in ("threshold", "named_threshold", "unnamed_threshold", "pooling", "hashing", "width", "marked"):
        assert getattr(again, name) == getattr(made, name)
    asked = read(made, features[[0, 0, 2]], torch.tensor([[3, 4], [9, 9], [1, 5]]))
    assert decided(again, asked) == decided(made, asked)
    if hashing == "tophash":
        assert [least for _, _, least in decided(again, asked)] == [0.3, 0.9, 0.6]
    empty = router()
    assert TopHashRouter.from_state(*empty.state()).words == []


# --- what a prompt says ------------------------------------------------------------------------------------------------


def decided(made: TopHashRouter, asked: Gathered) -> list[tuple[int, float, float]]:
    """Per prompt the entry that answers, its score and its threshold."""
    route = made.decide(asked)
    return list(zip(route.entry.tolist(), route.score.tolist(), route.threshold.tolist(), strict=True))


def with_words(*words: Words) -> tuple[TopHashRouter, Tensor]:
    """A router that looks at words, with one entry for each; and features at an overlap of six tenths with the first."""
    made = router()
    made.named_threshold, made.unnamed_threshold = 0.5, 0.8
    features = torch.zeros(len(words), WIDTH)
    for number, own in enumerate(words):
        features[number, 10 * number : 10 * number + 10] = 10.0
        add(made, features[number : number + 1], f"edit-{number}", words=own)
    near = torch.zeros(1, WIDTH)
    near[0, :6], near[0, 20:24] = 5.0, 5.0
    return made, near


@pytest.mark.parametrize(
    ("words", "ids", "threshold"),
    [
        (((3, 4),), [1, 3, 4, 9], 0.5),  # named
        (((8,), (3, 4)), [3, 4], 0.5),  # in one way or the other
        (((3, 4),), [1, 3, 9, 4], 0.8),  # not in one piece
        (((3, 4),), [1, 34], 0.8),  # other tokens with the same figures
        (((3, 4),), [13, 4], 0.8),
        (((3, 4),), [3, -1, 4, -1], 0.5),  # -1 is where no token of the prompt stands
        ((), [1, 3, 4, 9], 0.6),  # nothing known of the entry
        (((3, 4),), None, 0.6),  # nothing known of the prompt
    ],
)
def test_what_a_prompt_says_decides_how_close_it_must_come(
    words: Words, ids: list[int] | None, threshold: float
) -> None:
    made, near = with_words(words)
    asked = read(made, near, None if ids is None else torch.tensor([ids]))
    made.threshold = 0.61
    ((entry, score, least),) = decided(made, asked)
    expected = 0.61 if threshold == 0.6 else threshold
    assert (score, least) == (pytest.approx(0.6), pytest.approx(expected))
    assert entry == (0 if score >= expected else -1)


def test_words_are_not_looked_at_where_no_thresholds_are_given_for_them() -> None:
    made, near = with_words(((3, 4),))
    made.threshold, made.unnamed_threshold = 0.7, None
    assert decided(made, read(made, near, torch.tensor([[3, 4]])))[0][::2] == (-1, 0.7)


def test_of_two_near_entries_the_one_that_is_named_answers() -> None:
    made, _ = with_words(((3,),), ((7,),))
    between = torch.zeros(1, WIDTH)
    between[0, :4], between[0, 10:16] = 5.0, 5.0  # more of the second
    made.named_threshold = 0.4

    def routed(*ids: int) -> Route:
        return made.decide(read(made, between, torch.tensor([ids])))

    named, other, both, neither = routed(1, 3), routed(1, 7), routed(3, 7), routed(1, 2)
    assert [int(route.entry) for route in (named, other, both, neither)] == [0, 1, 1, -1]
    assert (int(named.second), float(named.second_score)) == (1, pytest.approx(0.6))
    assert float(named.score) == pytest.approx(0.4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_tokens_are_gathered_in_parts_as_at_once(pooling: Pooling) -> None:
    made = router(pooling)
    inputs = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2))
    prompt = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    ids = torch.arange(14).view(2, 7)
    whole = made.gather(inputs, prompt, ids=ids)
    gathered = None
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        part = slice(start, stop)
        gathered = made.gather(inputs[:, part], prompt[:, part], gathered, ids[:, part])
    assert gathered is not None
    assert gathered.ids is not None
    assert whole.ids is not None
    assert gathered.ids.tolist() == whole.ids.tolist() == [[-1, -1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, -1, -1]]
    # A pass that was given embeddings: what the prompt says is not known from then on.
    unknown = made.gather(inputs, prompt, made.gather(inputs, prompt), ids)
    assert unknown.ids is None


# --- ablations ---------------------------------------------------------------------------------------------------------


def test_without_a_permutation_columns_are_the_features_themselves() -> None:
    made = router(permute=False)
    features = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(2, WIDTH, dtype=torch.bool).scatter_(1, features.abs().topk(MARKED, dim=1).indices, True)
    assert torch.equal(made.hash(features), expected)
    assert not torch.equal(router().hash(features), expected)


def test_random_masks_have_nothing_to_do_with_features() -> None:
    made = router(hashing="random")
    features = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1)).expand(4, -1)
    ids = torch.tensor([[3, 4, 5, -1], [-1, 3, 4, 5], [3, 4, 6, -1], [3, 5, 4, -1]])
    masks = made.masks_of(read(made, features, ids))
    assert masks.sum(1).tolist() == [MARKED] * 4
    assert torch.equal(masks[0], masks[1])  # the same prompt, padded elsewhere
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3])
    elsewhere = made.masks_of(read(made, features + 1, ids))
    assert torch.equal(elsewhere, masks)
    made.append(masks[0], "edit", made.sharpest(features)[0])
    assert made.decide(read(made, features, ids)).entry.tolist() == [0, 0, -1, -1]
    with pytest.raises(ConfigError, match="drawn from a prompt's token ids"):
        made.masks_of(read(made, features))


def test_random_masks_are_compared_with_all_that_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of sharp features knows nothing of them."""
    monkeypatch.setattr("errata.routing.tophash.EXACT_BELOW", 1)
    made = router(hashing="random")
    generator = torch.Generator().manual_seed(3)
    ids = torch.arange(30).view(10, 3)
    masks = made.masks_of(read(made, torch.randn(10, WIDTH, generator=generator), ids))
    for number, mask in enumerate(masks):
        made.append(mask, f"edit-{number}", made.sharpest(torch.randn(1, WIDTH, generator=generator))[0])

    def candidates(sharpest: Tensor) -> list[Tensor]:
        raise AssertionError("the index was asked")

    monkeypatch.setattr(made.index, "candidates", candidates)
    asked = read(made, torch.randn(10, WIDTH, generator=generator), ids)
    assert made.decide(asked).entry.tolist() == list(range(10))


def test_a_relative_threshold_starts_at_chance() -> None:
    assert relative_threshold(0.0, 4096, 14336) == pytest.approx(4096 / 14336)
    assert relative_threshold(0.16, 4096, 14336) == pytest.approx(0.4, abs=0.001)
    assert relative_threshold(1.0, 4096, 14336) == 1.0


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose mean, content_mean or last"):
        router("median")


def test_every_pooling_has_its_name() -> None:
    assert set(POOLINGS) == set(get_args(Pooling))
