"""SERAC's router: prompts gathered over passes, nearest embeddings, the view."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from errata.errors import ConfigError, EditError, SequenceError
from errata.routing import ScopeRouter, within_class_view

ASKED: list[tuple[int, ...]] = []


def embed(prompts: Sequence[Sequence[int]]) -> Tensor:
    """How often each of four tokens occurs."""
    ASKED.extend(tuple(prompt) for prompt in prompts)
    return torch.stack([torch.bincount(torch.tensor(prompt), minlength=4).float() for prompt in prompts])


def router(threshold: float = 0.9) -> ScopeRouter:
    made = ScopeRouter(4, threshold, "words", "digest")
    made.embed = embed
    for owner, row in (("a", [1.0, 0, 0, 0]), ("b", [0, 1.0, 1.0, 0])):
        made.append(owner, torch.tensor(row))
    return made


def gathered(made: ScopeRouter, rows: list[list[int]], prompt: list[list[bool]] | None = None) -> Tensor:
    ids = torch.tensor(rows)
    return made.gather(ids, torch.ones_like(ids, dtype=torch.bool) if prompt is None else torch.tensor(prompt), ids=ids)


def test_the_nearest_entry_answers_if_it_is_near_enough() -> None:
    made = router()
    route = made.decide(gathered(made, [[0, 0], [1, 2], [1, 3], [3, 3]]))
    assert route.entry.tolist() == [0, 1, -1, -1]
    assert route.nearest.tolist()[:3] == [0, 1, 1]
    assert route.score[2] == pytest.approx(0.5)
    assert made.decide(gathered(made, [[1, 1]])).second.tolist() == [0]


def test_a_prompt_in_chunks_with_padding_is_one_prompt_and_equal_ones_are_read_once() -> None:
    made = router()
    first, second = torch.tensor([[0, 1], [3, 1]]), torch.tensor([[2, 3], [2, 0]])
    before = made.gather(first, torch.tensor([[False, True], [False, True]]), ids=first)
    read = made.gather(second, torch.tensor([[True, False], [True, False]]), before, second)
    ASKED.clear()
    assert made.decide(read).entry.tolist() == [1, 1]
    assert ASKED == [(1, 2)]


def test_nothing_stored_asks_no_encoder() -> None:
    made = ScopeRouter(4, 0.5, "words", "digest")
    assert made.decide(gathered(made, [[0]])).entry.tolist() == [-1]


def test_what_cannot_be_read_is_an_error() -> None:
    made = router()
    with pytest.raises(SequenceError, match="embeddings instead of token ids"):
        made.gather(torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))
    made.embed = None
    with pytest.raises(ConfigError, match="attach its adapter"):
        made.decide(gathered(made, [[0]]))
    with pytest.raises(EditError, match="'c'"):
        made.remove("c")


def test_an_entry_is_taken_out_and_the_state_is_all_there_is() -> None:
    made = router()
    made.view = torch.eye(4)
    assert made.remove("a") == [0]
    tensors, settings = made.state()
    again = ScopeRouter.from_state(tensors, settings)
    again.embed = embed
    assert again.owners == ["b"]
    assert again.threshold == made.threshold
    assert torch.equal(again.decide(gathered(again, [[1, 2]])).score, made.decide(gathered(made, [[1, 2]])).score)
    assert again.decide(gathered(again, [[0, 0]])).entry.tolist() == [-1]


def test_through_the_view_the_wordings_of_a_question_differ_alike_in_every_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([5.0, 1.0, 0.2, 0.05])
    classes = torch.arange(50).repeat_interleave(8)
    rows = torch.randn(50, 4, generator=generator)[classes] + scales * torch.randn(400, 4, generator=generator)
    seen = (rows @ within_class_view(rows, classes, shrinkage=0.0)).double()
    means = torch.zeros(50, 4, dtype=torch.float64).index_add(0, classes, seen) / 8
    apart = seen - means[classes]
    assert torch.allclose(apart.T @ apart / 400, torch.eye(4, dtype=torch.float64), atol=1e-4)
    # Shrunk without end, it leaves cosines as they are.
    plain = within_class_view(rows, classes, shrinkage=1e12)
    assert torch.allclose(plain / plain[0, 0], torch.eye(4), atol=1e-5)
