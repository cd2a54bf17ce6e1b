"""Descent in the span of an edit's own activations is descent on the columns themselves; stored keys are spared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from errata.editors.dual import Descended, Descent, Space, compressed, descend
from errata.errors import NumericsError
from errata.model import EditableModel
from errata.model.answer_tail import AnswerTail
from errata.model.tail import Recording, Tail
from errata.testing import tiny_model

LAYER, WIDTH, OUTPUTS, MARKED = 1, 96, 32, 40
# Each edit is a prompt, what stands before it in further rows, and a target.
EDITS = (
    ("The capital of France", ("Ann is",), "Rome"),
    ("Bob wrote Hamlet", ("x",), "Alice B"),
    ("Zed was born in", (), "Paris xyz"),
)
PLAIN = Descent(learning_rate=0.5, steps=6, clip_norm=math.inf, stop_loss=0.0, stop_change=0.0)


@dataclass(frozen=True)
class Task:
    """Edits recorded in one batch: what `descend` is given."""

    tail: Tail
    recording: Recording
    owner: Tensor
    places: Tensor
    trained: Tensor
    labels: tuple[Tensor, Tensor, Tensor]

    def keys(self, edit: int, columns: Tensor, layer: int = LAYER) -> Tensor:
        mine = self.owner == edit
        return self.recording.inputs[layer][mine][self.trained[mine]][:, columns]

    def descend(
        self,
        spaces: Sequence[Space | None] | dict[int, list[Space | None]],
        settings: Descent,
    ) -> tuple[Tensor, list[int], list[bool]]:
        found = self.descended(spaces, settings)
        return found.factors[LAYER], found.steps.tolist(), found.done.tolist()

    def descended(
        self,
        spaces: Sequence[Space | None] | dict[int, list[Space | None]],
        settings: Descent,
        begin: Descended | None = None,
        until: float = 1.0,
    ) -> Descended:
        per_layer = spaces if isinstance(spaces, dict) else {LAYER: spaces}
        return descend(
            self.tail, self.recording, per_layer, self.owner, self.places, self.labels, settings, begin, until
        )


def task(
    model: EditableModel,
    edits: Sequence[int] = (0, 1, 2),
    layers: tuple[int, ...] = (LAYER,),
    kind: type[Tail] = AnswerTail,
) -> Task:
    chosen = [EDITS[number] for number in edits]
    texts = [[prompt, *(f"{text} {prompt}" for text in contexts)] for prompt, contexts, _ in chosen]
    passages = [model.passage(text, target) for own, (*_, target) in zip(texts, chosen, strict=True) for text in own]
    tail = kind(model, layers)
    recording = tail.record(model.batch(passages, side="right"))
    batch = recording.batch
    places = batch.mask.bool() & (batch.positions >= batch.prompt_lengths.unsqueeze(1) - 1)
    # The answers, and behind them a token that depends on the row alone.
    rows, columns, wanted = batch.answer_places()
    ends = batch.mask.sum(1) - 1
    every = torch.arange(len(ends))
    follows = batch.positions[every, ends] + 9
    labels = torch.cat([rows, every]), torch.cat([columns, ends]), torch.cat([wanted, follows])
    trained = torch.zeros_like(places)
    trained[labels[:2]] = True
    owner = torch.tensor([number for number, own in enumerate(texts) for _ in own])
    return Task(tail, recording, owner, places, trained, labels)


def columns_of(edit: int) -> Tensor:
    return torch.randperm(WIDTH, generator=torch.Generator().manual_seed(edit))[:MARKED].sort().values


def start_of(edit: int) -> Tensor:
    return 0.1 * torch.randn(OUTPUTS, MARKED, generator=torch.Generator().manual_seed(100 + edit))


def space(given: Task, number: int, edit: int, moment: Tensor | None = None, ridge: float = 1.0) -> Space:
    columns = columns_of(edit)
    return Space.of(given.keys(number, columns), columns, start_of(edit), moment, ridge)


def stored_keys(count: int = 12) -> Tensor:
    """Keys [n, k] of other edits, as far from zero as real ones are."""
    return torch.randn(count, MARKED, generator=torch.Generator().manual_seed(7)).abs()


def primal(given: Task, edit: int, settings: Descent) -> list[Tensor]:
    """Plain gradient descent of one edit on its columns themselves: where they stand after every step."""
    weight, columns = start_of(edit), columns_of(edit)
    rows, places, labels = given.labels
    per_row = torch.bincount(rows)[rows] + settings.extra_label
    passed = []
    for _ in range(settings.steps):
        weight = weight.clone().requires_grad_()

        def change(inputs: Tensor, weight: Tensor = weight) -> Tensor:
            return (inputs[..., columns] @ weight.T) * given.places.unsqueeze(2)

        logits = given.tail.run(given.recording, {LAYER: change}, rows, places)
        losses = F.cross_entropy(logits, labels, reduction="none")
        ((losses / per_row).sum() / len(given.owner)).backward()
        assert weight.grad is not None
        clip = min(1.0, settings.clip_norm / float(weight.grad.norm()))
        weight = (weight - settings.learning_rate * clip * weight.grad).detach()
        passed.append(weight)
    return passed


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("clip_norm", [0.05, math.inf])
def test_without_stored_keys_it_is_descent_on_the_columns_themselves(clip_norm: float) -> None:
    given = task(tiny_model("llama"), [0])
    settings = replace(PLAIN, clip_norm=clip_norm)
    expected = primal(given, 0, settings)
    own = space(given, 0, 0)
    assert own.room == pytest.approx(1.0, rel=1e-5)
    assert len(own.basis) <= int(given.trained.sum()) < MARKED
    for steps in range(1, settings.steps + 1):
        factors, taken, done = given.descend([own], replace(settings, steps=steps))
        assert (taken, done) == ([steps], [False])
        assert relative(factors[0] @ own.basis, expected[steps - 1] - start_of(0)) < 1e-3
    if clip_norm < 1:  # so that clipping has been at work: every step is as long as it may be
        first = expected[0] - start_of(0)
        assert float(first.norm()) == pytest.approx(settings.learning_rate * clip_norm, rel=1e-4)


def test_beside_stored_keys_a_step_is_the_gradient_times_the_metric() -> None:
    """ΔW = −η G P / room after one step, with G the gradient on the columns and P = (I + C/λ)⁻¹."""
    given, keys, ridge = task(tiny_model("llama"), [0]), stored_keys(), 0.5
    moment = keys.T @ keys
    own = space(given, 0, 0, moment, ridge)
    factors, _, _ = given.descend([own], replace(PLAIN, steps=1))
    gradient = (start_of(0) - primal(given, 0, replace(PLAIN, steps=1))[0]) / PLAIN.learning_rate
    metric = torch.linalg.inv(torch.eye(MARKED) + moment / ridge)
    assert relative(factors[0] @ own.basis, -PLAIN.learning_rate * gradient @ metric / own.room) < 1e-3


def test_stored_keys_are_moved_less_by_what_is_trained_beside_them() -> None:
    given, keys = task(tiny_model("llama"), [0]), stored_keys()
    own_keys = given.keys(0, columns_of(0))
    moved, learned, rooms = [], [], []
    for moment, ridge in ((None, 1.0), (keys.T @ keys, 10.0), (keys.T @ keys, 0.1)):
        own = space(given, 0, 0, moment, ridge)
        factors, _, _ = given.descend([own], replace(PLAIN, steps=30))
        change = factors[0] @ own.basis
        moved.append(float((keys @ change.T).norm()))
        learned.append(float((own_keys @ change.T).norm()))
        rooms.append(own.room)
    assert moved[0] > 2 * moved[1] > 4 * moved[2]
    assert min(learned) > 0.5 * learned[0]  # what is spared is others' keys, not the edit's own
    assert rooms[0] == pytest.approx(1.0, rel=1e-5)
    assert rooms[0] > rooms[1] > rooms[2] > 0


def test_room_is_what_stored_keys_do_not_span() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, MARKED, generator=generator)
    columns, start = torch.arange(MARKED), torch.zeros(OUTPUTS, MARKED)
    rooms = []
    for count in (0, 1, 4, 20):
        stored = torch.cat([keys, torch.randn(20, MARKED, generator=generator)])[:count]
        rooms.append(Space.of(keys, columns, start, stored.T @ stored, 0.01).room)
    assert rooms[0] == pytest.approx(1.0, rel=1e-5)
    assert rooms[0] > rooms[1] > rooms[2] > rooms[3] > 0
    assert rooms[2] < 0.01  # all three are stored
    one = keys[:1]
    spared = Space.of(one, columns, start, one.T @ one, 2.0).room
    assert spared == pytest.approx(2.0 / (2.0 + float(one.square().sum())), rel=1e-4)  # Sherman and Morrison


def test_keys_that_vanish_leave_nowhere_to_write() -> None:
    with pytest.raises(NumericsError, match="vanish in its columns"):
        Space.of(torch.zeros(3, MARKED), torch.arange(MARKED), torch.zeros(OUTPUTS, MARKED), None, 1.0)


def test_keys_that_repeat_count_once() -> None:
    keys = torch.randn(2, MARKED, generator=torch.Generator().manual_seed(0))
    own = Space.of(keys[[0, 1, 0, 0]], torch.arange(MARKED), torch.zeros(OUTPUTS, MARKED), None, 1.0)
    assert len(own.basis) == 2


def test_side_by_side_each_edit_is_trained_as_it_is_alone() -> None:
    """Other rows, other widths, other ranks, other numbers of steps."""
    model = tiny_model("llama")
    settings = replace(PLAIN, steps=30, clip_norm=1.0, learning_rate=3.0, stop_loss=2.5, stop_change=1.0)
    together = task(model)
    spaces = [space(together, number, number) for number in range(3)]
    factors, steps, done = together.descend(spaces, settings)
    assert len({len(one.basis) for one in spaces}) > 1
    assert len(set(steps)) > 1
    assert any(done)
    for number, own in enumerate(spaces):
        alone = task(model, [number])
        mine = space(alone, 0, number)
        expected, own_steps, own_done = alone.descend([mine], settings)
        assert (own_steps, own_done) == ([steps[number]], [done[number]])
        assert len(mine.basis) == len(own.basis)
        found = factors[number][:, : len(own.basis)] @ own.basis
        assert relative(found, expected[0] @ mine.basis) < 1e-2
        assert not bool(factors[number][:, len(own.basis) :].any())


def test_in_whole_rows_only_the_places_where_the_memory_acts_count() -> None:
    found = []
    for kind in (AnswerTail, Tail):
        given = task(tiny_model("llama"), kind=kind)
        assert bool((given.recording.batch.mask.bool() & ~given.places).any()) is (kind is Tail)
        spaces = [space(given, number, number) for number in range(3)]
        factors, _, _ = given.descend(spaces, PLAIN)
        pairs = zip(factors, spaces, strict=True)
        found.append(torch.stack([own[:, : len(one.basis)] @ one.basis for own, one in pairs]))
    assert relative(found[1], found[0]) < 1e-2


def test_an_edit_is_trained_in_the_layers_where_it_has_a_space() -> None:
    model = tiny_model("llama")
    given = task(model, [0, 1], (1, 2))
    columns = columns_of(0)
    here = [Space.of(given.keys(0, columns), columns, torch.zeros(OUTPUTS, MARKED), None, 1.0), None]
    there = [None, Space.of(given.keys(1, columns, 2), columns, torch.zeros(OUTPUTS, MARKED), None, 1.0)]
    settings = replace(PLAIN, steps=3)
    factors = descend(
        given.tail, given.recording, {1: here, 2: there}, given.owner, given.places, given.labels, settings
    ).factors
    assert [bool(own.any()) for own in factors[1]] == [True, False]
    assert [bool(own.any()) for own in factors[2]] == [False, True]
    alone = descend(
        given.tail, given.recording, {1: here, 2: [None, None]}, given.owner, given.places, given.labels, settings
    ).factors
    assert alone.keys() == {1}
    assert relative(factors[1][0], alone[1][0]) < 1e-4


def test_training_goes_on_where_it_was_left() -> None:
    given = task(tiny_model("llama"))
    spaces = [space(given, number, number) for number in range(3)]
    whole, begun = given.descended(spaces, PLAIN), given.descended(spaces, replace(PLAIN, steps=4))
    finished = given.descended(spaces, PLAIN, begun)
    assert begun.steps.tolist() == [4] * 3
    assert finished.steps.tolist() == whole.steps.tolist() == [PLAIN.steps] * 3
    assert relative(finished.factors[LAYER], whole.factors[LAYER]) < 1e-4
    assert relative(begun.factors[LAYER], whole.factors[LAYER]) > 1e-2


def test_edits_that_are_done_may_leave_the_others() -> None:
    """Those that go on, in a smaller batch, end where they would have."""
    given = task(tiny_model("llama"))
    spaces = [space(given, number, number) for number in range(3)]
    settings = replace(PLAIN, steps=30, clip_norm=1.0, learning_rate=3.0, stop_loss=2.5, stop_change=1.0)
    together = given.descended(spaces, settings)
    first = given.descended(spaces, settings, until=0.3)
    assert int(first.done.sum()) == 1
    stay = (~first.done).nonzero().squeeze(1).tolist()
    rest = task(given.tail.model, stay)
    rows = ~first.done[given.owner]
    recording = given.tail.narrowed(given.recording, rows)
    assert recording is not None
    for smaller in (rest, replace(rest, recording=recording, places=given.places[rows])):
        finished = smaller.descended([spaces[number] for number in stay], settings, first.waiting)
        assert finished.steps.tolist() == together.steps[stay].tolist()
        assert relative(finished.factors[LAYER], together.factors[LAYER][stay]) < 1e-2


def test_the_published_loss_counts_one_answer_token_more() -> None:
    given = task(tiny_model("llama"), [2])
    labels = len(given.labels[0])
    own, once = space(given, 0, 2), replace(PLAIN, steps=1)
    plain, _, _ = given.descend([own], once)
    published, _, _ = given.descend([own], replace(once, extra_label=True))
    assert labels > 1
    assert relative(published * (labels + 1) / labels, plain) < 1e-4


def test_training_stops_where_the_loss_is_low_and_still() -> None:
    given = task(tiny_model("llama"), [0])
    own = space(given, 0, 0)
    learning = replace(PLAIN, steps=200, learning_rate=1.0)
    taken = {}
    for stop_loss, stop_change in ((9.0, 1e9), (3.0, 1e9), (3.0, 1e-2), (0.0, 1e9)):
        settings = replace(learning, stop_loss=stop_loss, stop_change=stop_change)
        _, (steps,), (done,) = given.descend([own], settings)
        taken[stop_loss, stop_change] = steps
        assert done is (steps < 200)
    assert taken[9.0, 1e9] == 1  # a first loss has not moved by anything that is known
    assert 1 < taken[3.0, 1e9] < taken[3.0, 1e-2] < taken[0.0, 1e9] == 200


def test_a_loss_that_is_not_finite_is_said() -> None:
    given = task(tiny_model("llama"), [0])
    with pytest.raises(NumericsError, match="lower the learning rate"):
        given.descend([space(given, 0, 0)], replace(PLAIN, learning_rate=math.inf))


def test_a_change_is_kept_in_as_few_terms_as_hold_it() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(9, MARKED, generator=generator) * torch.logspace(0, 2, 9).unsqueeze(1)
    for rank in (1, 4, 9):
        factors = torch.randn(OUTPUTS, rank, generator=generator) @ torch.randn(rank, 9, generator=generator)
        outputs, inputs = compressed(factors, basis)
        assert (outputs.dtype, inputs.dtype) == (torch.bfloat16, torch.bfloat16)
        assert tuple(outputs.shape) == (OUTPUTS, len(inputs))
        assert len(inputs) <= rank
        whole = factors @ basis
        assert relative(outputs.float() @ inputs.float(), whole) < 2 * torch.finfo(torch.bfloat16).eps
        assert relative(outputs.float() @ inputs.float(), whole) > 0  # it is rounded indeed
    even = torch.linalg.qr(torch.randn(OUTPUTS, 9, generator=generator))[0]
    rows = torch.linalg.qr(torch.randn(MARKED, 9, generator=generator))[0].T
    assert len(compressed(even, rows)[1]) == 9  # nine terms of equal size: none can be spared
