"""How MemoryLLM is trained: what is left of a stream of updates, what gradients reach, and runs that are gone on with."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.adapters import AutoAdapter, PoolAdapter
from errata.adapters.pool import Pool
from errata.editors import pool_texts
from errata.editors.memoryllm import MemoryLLM
from errata.editors.pool_stream import survivors
from errata.editors.pool_texts import Asked, InventedTexts, Reading, ReadText, TextData
from errata.editors.pool_training import PoolLearning, PoolTraining, _looked_at_own
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.progress import SilentProgress
from errata.testing import tiny_model

TRAINING: dict[str, Any] = {
    "slots": 24,
    "new": 4,
    "rank": 2,
    "batch_size": 6,
    "warm": 2,
    "others": 3,
    "steps": 6,
    "validation": 6,
    "validate_every": 2,
    "learning_rate": 1e-2,
    "half": False,
}
PARAGRAPHS = [
    f"{name} was born in {city}. {name} plays the {thing}. The capital of {city} is {name}."
    for name in ("Ann", "Bob", "Zed", "Emma")
    for city, thing in (("Rome", "flute"), ("Paris", "piano"), ("Berlin", "flute"))
]


@pytest.fixture(autouse=True)
def few_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are drawn from, not the thousands that a real training has made first."""
    monkeypatch.setattr(pool_texts, "_EDITS", 60)


def settings(model: EditableModel, **changes: Any) -> PoolTraining:
    return PoolTraining.for_model(model, **{**TRAINING, **changes})


def test_what_survives_a_stream_is_what_a_pool_would_hold() -> None:
    """As often, per age, as in a pool that is updated for real; and in the order of writing."""
    slots, new, updates = 20, 4, 8
    counts = torch.zeros(updates)
    for seed in range(200):
        (left,) = survivors(updates, slots, new, 1, seed)
        assert left.tolist() == sorted(left.tolist())
        counts += torch.bincount(left // new, minlength=updates)
    expected = torch.tensor([new * (1 - new / slots) ** (updates - 1 - update) for update in range(updates)])
    assert torch.allclose(counts / 200, expected, atol=0.25)
    assert counts[-1] == 200 * new, "nothing was dropped after the last one"
    pool = Pool(2, slots, new, 1, 5)
    for update in range(updates):
        numbers = torch.arange(update * new, (update + 1) * new, dtype=torch.float32)
        pool.update(numbers.view(1, -1, 1).expand(2, -1, -1), "")
    for layer, left in enumerate(survivors(updates, slots, new, 2, 5)):
        held = pool.states[layer, pool.order[layer]][pool.born[layer, pool.order[layer]] > 0]
        assert held.flatten().tolist() == left.tolist(), "slot by slot"
    assert int(pool.counts.sum()) == pytest.approx(2 * int(expected.sum()), abs=8)


def reading() -> Reading:
    names = ("Ann", "Bob", "Zed", "Emma", "Alice", "Paris")
    texts = [
        ReadText((f"{name} was born in Rome.",) * (1 + number % 2), (Asked(f"Where was {name} born?", "Rome."),))
        for number, name in enumerate(names)
    ]
    return Reading(tuple(texts), (("The capital of France", "Paris."),))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_gradients_reach_all_of_the_network_and_nothing_else(family: str) -> None:
    model = tiny_model(family)
    learning = PoolLearning(model, settings(model))
    with torch.no_grad():
        for left in learning.network.left:  # at zero, nothing would reach the other factor
            left.normal_(std=0.02)
    learning.optimizer()
    loss = learning.learn(reading(), random.Random(0))
    assert loss > 0
    missing = [n for n, p in learning.network.named_parameters() if p.grad is None or not bool(p.grad.any())]
    # What leaves the last block is written, but read by no block after it; keys and values of slots come before that.
    blocks = model.layer_count
    allowed = {n for n in missing if n.startswith(("left", "right"))}
    assert set(missing) == allowed
    assert len(allowed) < 2 * len(learning.network.paths) / blocks
    assert all(parameter.grad is None for parameter in model.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_what_is_trained_is_what_an_editor_then_writes_and_reads(family: str) -> None:
    """New tokens and answers of the training's own passes, against those of adapters."""
    model = tiny_model(family)
    config = settings(model, slots=4, alone=1.0)
    learning = PoolLearning(model, config)
    with torch.no_grad():
        for left in learning.network.left:
            left.normal_(std=0.1)
        learning.network.positions.normal_()
    learning.network.version += 1
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PARAGRAPHS[:2]]
    with torch.no_grad():
        nothing = torch.zeros(model.layer_count, 1, 4, model.anatomy.hidden_size)
        first, _ = learning.passes.compression.written(learning.network, nothing, torch.tensor([False]), ids[:1])
        made, _ = learning.passes.compression.written(learning.network, first, torch.tensor([True]), ids[1:])
        passage = model.passage("Where was Ann born?", "Rome.")
        with learning.network.learning(model, model.dtype):
            logits = learning.passes.read(learning.passes.prefixes(list(made)), [passage]).logits
    adapter = PoolAdapter.for_model(
        model, "", {}, slots=4, new=4, seed=0, network=learning.network, spacing=learning.spacing
    )
    (own,) = learning.passes.compression([adapter], ids[:1])
    adapter.update(own, "a")
    (own,) = learning.passes.compression([adapter], ids[1:])
    assert torch.allclose(own, made[:, 0], atol=1e-5)
    adapter.update(own, "b")
    base = model.forward(model.batch([passage])).logits
    adapter.attach(model)
    with torch.no_grad():
        batch = model.batch([passage], side="right")
        rows, columns, _ = batch.answer_places()
        found = model.forward(batch).logits[rows, columns]
    assert torch.allclose(found, logits, atol=1e-4)
    adapter.detach()
    assert torch.equal(model.forward(model.batch([passage])).logits, base)


@pytest.mark.parametrize(("alone", "asked", "not_asked"), [(1.0, "alone", "pool"), (0.0, "pool", "alone")])
def test_a_step_may_ask_in_one_way_only(alone: float, asked: str, not_asked: str) -> None:
    model = tiny_model("llama")
    learning = PoolLearning(model, settings(model, alone=alone))
    learning.optimizer()
    nothing_else = Reading(reading().texts)
    assert 0 < learning.learn(nothing_else, random.Random(0)) < float("inf")
    scores = learning.examine(nothing_else)
    assert 0 <= scores[asked] <= 1
    assert not_asked not in scores


def test_streams_side_by_side_are_learned_from_like_one_after_the_other() -> None:
    """On threads with copies of the model: the mean of both gradients, to the last bit whichever ends first."""
    model = tiny_model("llama")
    learning = PoolLearning(model, settings(model, streams=2, batch_size=3))
    with torch.no_grad():
        for left in learning.network.left:
            left.normal_(std=0.02)
    learning.optimizer()
    both = Reading(reading().texts, (("The capital of France", "Paris."), ("The capital of Italy", "Rome.")))
    assert [len(part) for part in both.parts(2)] == [3, 3]
    found = []
    for side_by_side in (True, True, False):
        if not side_by_side:
            learning._twins = [learning, learning]
            monkeypatch = pytest.MonkeyPatch()
            monkeypatch.setattr("errata.threads.ThreadPoolExecutor", _OneAfterTheOther)
        loss = learning.learn(both, random.Random(0))
        found.append(
            [torch.tensor(loss), *(p.grad.clone() for p in learning.network.parameters() if p.grad is not None)]
        )
    monkeypatch.undo()
    for one, again, apart in zip(*found, strict=True):
        assert torch.equal(one, again)
        assert torch.allclose(one, apart, rtol=1e-3, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


class _OneAfterTheOther:
    """In the place of a pool of threads."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _OneAfterTheOther:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    map = staticmethod(map)


def test_looking_is_the_share_of_the_attention_to_slots_that_its_own_text_gets() -> None:
    """By hand: two heads, the beginning vector and three slots, of updates 0, 0 and 1; a token of no slot is left out."""
    looked = torch.tensor([[[0.5, 0.1, 0.1, 0.3], [0.2, 0.2, 0.2, 0.4]], [[0.9, 0.1, 0.0, 0.0], [0.6, 0.2, 0.1, 0.1]]])
    wrote = torch.tensor([0, 0, 1])
    share = (0.2 / 0.5 + 0.4 / 0.8) / 2
    assert float(_looked_at_own(looked, torch.tensor([0, 7]), wrote)) == pytest.approx(-math.log(share), abs=1e-3)
    assert float(_looked_at_own(looked, torch.tensor([7, 7]), wrote)) == 0
    model = tiny_model("llama")
    losses = [
        float(PoolLearning(model, settings(model, look=look, alone=0.0)).examine(reading())["loss"])
        for look in (0, 1.0)
    ]
    assert losses[1] > losses[0], "the term is part of the loss"


def test_what_a_step_asks_and_reads_changes_as_training_goes_on() -> None:
    model = tiny_model("llama")
    config = settings(model, steps=100, alone=0.2, alone_first=0.8, batch_size=8, batch_size_first=4, streams=2)
    assert [config.alone_at(step) for step in (0, 25, 99)] == pytest.approx([0.8, 0.2, 0.2])
    data = InventedTexts(config)
    assert [len(data.batch(step, config)) for step in (0, 74, 75, 99)] == [8, 8, 16, 16]
    assert len(data.batch(0, config).others) == 2 * config.others


def test_edits_are_read_in_training_as_they_are_injected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    data = InventedTexts(settings(model, edits=1.0))
    editor = MemoryLLM(model, network="untrained", slots=4, new=2)
    editor.prepare()
    injected: list[list[int]] = []
    monkeypatch.setattr(
        editor._compression, "inject", lambda _, texts, __: injected.extend(list(ids) for _, ids in texts)
    )
    editor._write(data._edits[:1], SilentProgress())
    (segment,) = data.batch(0, settings(model, edits=1.0)).texts[0].segments
    assert injected == [PoolLearning(model, settings(model)).passes.ids(segment)]


def test_beside_edits_that_are_read_their_own_locality_is_asked_first() -> None:
    config = settings(tiny_model("llama"), edits=1.0, others=3, streams=2)
    data = InventedTexts(config)
    told = {f"{edit.prompt} {edit.target}": {probe.prompt for probe in edit.locality} for edit in data._edits}
    for part in data.batch(0, config).parts(2):
        near = set().union(*(told[text.segments[0]] for text in part.texts))
        assert len(part.others) == 3
        assert {prompt for prompt, _ in part.others} <= near
    assert len(InventedTexts(settings(tiny_model("llama"), edits=0.0)).batch(0, config).others) == 6


def test_an_answer_that_ends_is_followed_by_the_token_that_ends_it() -> None:
    model = tiny_model("llama")
    learning = PoolLearning(model, settings(model))
    plain, ending = (learning._passage(Asked("Ann was born in", "Rome.", ends=ends)) for ends in (False, True))
    assert ending.prompt == plain.prompt
    assert ending.answer == (*plain.answer, model.tokenizer.eos_token_id)
    model.model.generation_config.eos_token_id = [7, 9]  # what generation stops at decides
    assert learning._ending("Ann", "Rome.").answer[-1] == 7
    assert all(asked.ends for text in InventedTexts(settings(model)).validation.texts for asked in text.asked)
    assert not any(asked.ends for text in reading().texts for asked in text.asked)


def test_a_question_sees_its_own_text_and_as_many_others_as_are_drawn() -> None:
    model = tiny_model("llama")
    learning = PoolLearning(model, settings(model, fewer=1.0))
    seen = learning._seen([3] * 300, 2, 16, random.Random(0))
    assert bool(seen[:300, 3].all())
    counts = seen[:300].sum(dim=1)
    assert set(counts.tolist()) > {1, 2, 16}
    assert 0.3 < float((counts <= 4).float().mean()) < 0.7, "each doubling is as likely"
    assert bool(PoolLearning(model, settings(model, fewer=0.0))._seen([1, 2], 1, 16, random.Random(0)).all())


def trained(model: EditableModel, out: Path, **changes: Any) -> dict[str, Any]:
    config = settings(model, **changes)
    record: dict[str, Any] = MemoryLLM.train(model, TextData(PARAGRAPHS, "paragraphs", config, piece=4), out, config)
    return record


def test_a_run_is_gone_on_with_as_if_it_had_not_been_interrupted(tmp_path: Path) -> None:
    model = tiny_model("llama")
    whole = trained(model, tmp_path / "whole")
    assert whole["finished"]
    config = settings(model)
    data = TextData(PARAGRAPHS, "paragraphs", config, piece=4)
    out = tmp_path / "killed"
    step = PoolLearning.learn

    def failing(self: PoolLearning, batch: Reading, rng: random.Random) -> float:
        if batch.step == 3:
            raise KeyboardInterrupt
        return step(self, batch, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PoolLearning, "learn", failing)
        with pytest.raises(KeyboardInterrupt):
            MemoryLLM.train(model, data, out, config)
    again = MemoryLLM.train(model, data, out, config)
    assert again["validation"] == whole["validation"]
    files = [(folder / "network.safetensors").read_bytes() for folder in (tmp_path / "whole", out)]
    assert files[0] == files[1]


def test_a_training_goes_on_from_another_ones_network(tmp_path: Path) -> None:
    """Not as one that was interrupted: with steps, data and a learning rate of its own, and it says so."""
    model = tiny_model("llama")
    first = trained(model, tmp_path / "first", rank=3)
    again = trained(model, tmp_path / "second", rank=3, begin_with=str(tmp_path / "first"), seed=1, steps=2)
    digest = json.loads((tmp_path / "first" / "network.json").read_text())["digest"]
    assert again["begun_with"]["digest"] == digest
    assert again["begun_with"]["steps"] == first["steps"]
    # The factors are kept in bfloat16.
    learning = PoolLearning(model, settings(model, rank=3, begin_with=str(tmp_path / "first")))
    data = TextData(PARAGRAPHS, "paragraphs", settings(model), piece=4)
    assert learning.examine(data.validation)["loss"] == pytest.approx(first["validation"]["loss"], rel=1e-2)
    third = trained(model, tmp_path / "third", rank=3, begin_with=str(tmp_path / "second"), steps=2)
    assert third["begun_with"]["begun_with"]["digest"] == digest, "the whole chain is known"
    with pytest.raises(ConfigError, match=r"has other sizes \(new=4\) than new=4 and rank=2"):
        trained(model, tmp_path / "other", begin_with=str(tmp_path / "first"))


def test_another_seed_reads_other_documents() -> None:
    model = tiny_model("llama")
    one, other = (settings(model, seed=seed, edits=0.0) for seed in (0, 1))
    read = [
        {text.segments for text in InventedTexts(own).batch(step, own).texts} for own in (one, other) for step in (0, 1)
    ]
    assert not read[0] & read[2]
    assert not read[1] & read[3]


def test_an_editor_takes_the_network_with_its_own_numbers(tmp_path: Path) -> None:
    model = tiny_model("llama")
    trained(model, tmp_path / "network", spacing=0.25)
    larger = MemoryLLM(model, network=str(tmp_path / "network"), slots=48)
    assert larger.adapter.spacing == 0.25, "as it was trained, in a pool of another size too"
    larger.adapter.detach()
    editor = MemoryLLM(model, network=str(tmp_path / "network"))
    assert (editor.adapter.pool.slots, editor.adapter.pool.new) == (24, 4)
    assert editor.adapter.spacing == 0.25
    editor.inject({"a": PARAGRAPHS[0]})
    prompt = "Where was Ann born?"
    (said,) = model.generate([prompt], max_new_tokens=4)
    editor.adapter.save_pretrained(tmp_path / "pool")
    editor.adapter.detach()
    with pytest.raises(ConfigError, match="none comes with errata"):
        MemoryLLM(tiny_model("llama", seed=1))
    with pytest.raises(ConfigError, match="trained with new=4, not 2"):
        MemoryLLM(model, network=str(tmp_path / "network"), new=2)
    loaded = [AutoAdapter.from_pretrained(tmp_path / "pool", model=model, name=name) for name in ("one", "two")]
    assert loaded[0].network is loaded[1].network, "whose changes of weight are then merged once"
    assert model.generate([prompt], max_new_tokens=4, adapters="one") == [said]
    # Attached twice, the network still changes a weight once.
    path = loaded[0].network.paths[0]
    assert len(model.module(path)._changing(model.module(path).contributions)) == 1
    for one in loaded:
        one.detach()


def test_long_texts_come_with_the_curriculum_and_every_draw_repeats() -> None:
    model = tiny_model("llama")
    config = settings(model, segments=4, long=1.0, steps=100, edits=0.5, batch_size=20)
    assert config.segments_at(0) == 1
    assert config.segments_at(99) == 4
    data = InventedTexts(config)
    assert data.batch(3, config) == data.batch(3, config) != data.batch(4, config)
    assert {len(text.segments) for text in data.batch(0, config).texts} == {1}
    late = data.batch(99, config)
    assert {len(text.segments) for text in late.texts} > {2}
    assert {1} < {len(text.segments) for text in late.texts}, "edits are short"
    for text in late.texts:
        for asked in text.asked:
            assert asked.answer.removesuffix(".") in text.segments[asked.segment]
    known = {text for one in data.validation.texts for text in one.segments}
    assert not known & {text for one in late.texts for text in one.segments}
    assert len(late.others) == config.others
    assert data.digest() == InventedTexts(config).digest()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"new": 30}, "new=30 must be from 1 to slots=24"),
        ({"alone": 1.5}, "alone=1.5 is a share, from 0 to 1"),
        ({"warm": 6}, "batch_size=6 must be more than warm=6"),
        ({"rank": 0}, "must be at least 1"),
        ({"streams": 0}, "must be at least 1"),
        ({"alone_first": 2.0}, "alone_first=2.0 is a share, from 0 to 1"),
        ({"batch_size_first": 2}, "batch_size_first=2 must be more than warm=2"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        settings(tiny_model("llama"), **changes)


def test_texts_are_cut_into_what_is_read_and_what_follows() -> None:
    model = tiny_model("llama")
    config = settings(model, segments=3, long=1.0)
    data = TextData([" ".join(str(n) for n in range(40))] * 12, "numbers", config, piece=8)
    for text in data.batch(5, config).texts:
        (asked,) = text.asked
        words = " ".join((*text.segments, asked.answer)).split()
        numbers = [int(word) for word in words]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert asked.segment == len(text.segments) - 1
    with pytest.raises(ConfigError, match="few: 2 texts are too few"):
        TextData(["two words"] * 2, "few", config)
