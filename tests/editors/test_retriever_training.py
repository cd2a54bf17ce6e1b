"""How a retriever is trained: what gradients reach, that adapters then retrieve the same, runs that are gone on with."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from errata.adapters import AutoAdapter, PoolAdapter
from errata.edit import Edit
from errata.editors.memoryllm import MemoryLLM, MemoryLLMConfig
from errata.editors.pool_texts import Asked, Reading, ReadText, TextData
from errata.editors.pool_training import PoolTraining
from errata.editors.retriever_training import MemoryTraining, RetrieverLearning, _loss
from errata.editors.training import load_trained
from errata.errors import ArtifactError, ConfigError
from errata.model import EditableModel
from errata.testing import tiny_model

SIZES: dict[str, Any] = {"slots": 8, "new": 2, "rank": 2}
TRAINING: dict[str, Any] = {
    "batch_size": 8,
    "warm": 2,
    "others": 0,
    "validation": 8,
    "validate_every": 2,
    "half": False,
}
NAMES = ("Ann", "Bob", "Zed", "Emma", "Alice", "Paul")
PARAGRAPHS = [
    f"{name} was born in {city}. {name} plays the flute in {city}." for name in NAMES for city in ("Rome", "Spain")
]


def reading(offset: int = 0) -> Reading:
    """Eight texts, two of two segments."""
    pairs = [(name, city) for city in ("Rome", "Spain", "Paris") for name in NAMES][offset : offset + 8]
    texts = []
    for number, (name, city) in enumerate(pairs):
        segments = (f"{name} was born in {city}.", f"{name} plays the flute.")[: 1 + number // 6]
        texts.append(ReadText(segments, (Asked(f"Where was {name} born?", f"{city}."),)))
    return Reading(tuple(texts))


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def first(model: EditableModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network of the first stage."""
    out = tmp_path_factory.mktemp("first")
    config = PoolTraining.for_model(model, **SIZES, **TRAINING, steps=2)
    MemoryLLM.train(model, TextData(PARAGRAPHS, "paragraphs", config, piece=3), out, config)
    return str(out)


def settings(model: EditableModel, first: str, **changes: Any) -> MemoryTraining:
    given = {**TRAINING, "steps": 6, "learning_rate": 1e-2, **changes}
    return MemoryTraining.for_model(model, retriever_of=first, **given)


def trained(model: EditableModel, first: str, out: Path, **changes: Any) -> dict[str, Any]:
    config = settings(model, first, **changes)
    record: dict[str, Any] = MemoryLLM.train(model, TextData(PARAGRAPHS, "paragraphs", config, piece=3), out, config)
    return record


@pytest.fixture(scope="module")
def second(model: EditableModel, first: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("second")
    trained(model, first, out)
    return str(out)


# --- a step -----------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_retriever_of_every_layer_and_nothing_else(model: EditableModel, first: str) -> None:
    learning = RetrieverLearning(model, settings(model, first))
    learning.optimizer()
    network = learning._passes.network
    before = {name: own.clone() for name, own in network.state().items()}
    assert learning.learn(reading(), random.Random(0)) > 0
    for name, parameter in learning.network.named_parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad.flatten(1).abs().amax(1) > 0).all()), name
    assert all(parameter.grad is None for parameter in (*model.model.parameters(), *network.parameters()))
    assert all(torch.equal(own, before[name]) for name, own in network.state().items())
    assert not model.model.model.layers[0].self_attn._forward_pre_hooks


def test_the_loss_is_that_of_the_paper() -> None:
    scores = torch.tensor([[0.9, 0.2, 0.4, 0.5]])
    own, others = (torch.tensor([one]).bool() for one in ([1, 1, 0, 0], [0, 0, 1, 0]))
    expected = -(torch.tensor([0.9, 0.2]).log().mean() + torch.tensor(0.6).log())
    assert float(_loss(scores, own, others)) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_scores_and_states_are_those_that_adapters_then_have(family: str, tmp_path: Path) -> None:
    """A stream put into a real pool: the same slots are stored, and each prompt retrieves what the training saw."""
    model = tiny_model(family)
    config = PoolTraining.for_model(model, **SIZES, **TRAINING, steps=1, learning_rate=0.1)
    data = TextData(PARAGRAPHS, "paragraphs", config, piece=3)
    MemoryLLM.train(model, data, tmp_path / "first", config)
    learning = RetrieverLearning(model, settings(model, str(tmp_path / "first"), retrieved=4))
    passes, text = learning._passes, reading(3)
    rng = random.Random(1)
    with torch.no_grad(), passes.network.acting(model):
        made = passes.stream(text.texts, rng).made
        passages = [model.passage(prompt) for prompt in ("Where was Ann born?", "Zed", "The flute of Emma")]
        # A pool takes the stream, and says which slots it still has.
        adapter = pool_with(model, learning, made)
        pool = learning._pool(made, rng, learning=False)
        short = adapter.pool
        numbers = short.states[..., 0].new_full(short.order.shape, -1).long()
        for layer in range(model.layer_count):
            for row in range(short.slots):
                same = (made[layer].flatten(0, 1) == short.states[layer, row]).all(1).nonzero()
                numbers[layer, row] = int(same[0]) if len(same) else -1
        in_order = [own[own >= 0] for own in (numbers[layer, short.order[layer]] for layer in range(model.layer_count))]
        assert [len(own) for own in in_order] == short.counts.tolist()
        pool.short = passes.prefixes([pool.slots[layer, own].unsqueeze(0) for layer, own in enumerate(in_order)])
        every = torch.arange(pool.slots.shape[1])
        pool.stored = [every[~torch.isin(every, own)] for own in in_order]
        scores = learning._read(pool, passages, learning=False)
    adapter.attach(model)
    retrieved = adapter.retrieve([model.tokenizer.decode(p.ids, skip_special_tokens=True) for p in passages])
    for row, own in enumerate(retrieved):
        for layer, born in enumerate(own):
            stored = pool.stored[layer]
            best = stored[scores[layer][row, stored].topk(4).indices.sort().values]
            assert (best // 2 + 1).tolist() == born.tolist(), "updates are counted from 1"
    adapter.detach()


def pool_with(model: EditableModel, learning: RetrieverLearning, made: Tensor) -> PoolAdapter:
    """A pool with the retriever as it is now, into which a stream, [L, updates, K, d], has come."""
    tensors, record = learning.kept()
    from errata.adapters.pool_network import PoolNetwork

    tensors = {name: own.float() for name, own in tensors.items()}
    adapter = PoolAdapter.for_model(
        model, "", {}, slots=record["slots"], new=record["new"], seed=7, spacing=record["spacing"],
        network=PoolNetwork.from_state(tensors), long_term=100, retrieved=record["retrieved"],
    )  # fmt: skip
    for update in range(made.shape[1]):
        adapter.update(made[:, update], f"text {update}")
    return adapter


def test_a_retriever_comes_to_find_what_its_prompts_are_about(model: EditableModel, first: str) -> None:
    learning = RetrieverLearning(model, settings(model, first, steps=10_000, retrieved=3))
    optimizer = learning.optimizer()
    before = learning.examine(reading())
    for step in range(40):
        optimizer.zero_grad()
        learning.learn(Reading(reading().texts, step=100), random.Random(step))
        optimizer.step()
    after = learning.examine(reading())
    assert set(after) == {"loss", "recall", "chance"}
    assert after["loss"] < before["loss"] - 0.3
    assert after["recall"] > max(before["recall"], after["chance"]) + 0.2


# --- a run ------------------------------------------------------------------------------------------------------------


def test_what_comes_of_it_holds_the_network_as_it_was_and_a_retriever(
    model: EditableModel, first: str, second: str
) -> None:
    before, after = (load_file(Path(folder) / "network.safetensors") for folder in (first, second))
    assert {name: own for name, own in after.items() if not name.startswith("retriever ")}.keys() == before.keys()
    assert all(torch.equal(after[name], own) for name, own in before.items())
    _, record = load_trained(Path(second), "memoryllm", model)
    _, old = load_trained(Path(first), "memoryllm", model)
    assert {name: record[name] for name in ("slots", "new", "spacing")} == {
        "slots": 8,
        "new": 2,
        "spacing": old["spacing"],
    }
    assert record["retrieved"] == 2
    assert record["first_stage"]["digest"] == record["plan"]["network"] == old["digest"]
    assert record["first_stage"]["command"] == old["command"]


def test_a_run_is_gone_on_with_as_if_it_had_not_been_interrupted(
    model: EditableModel, first: str, second: str, tmp_path: Path
) -> None:
    step, steps = RetrieverLearning.learn, []

    def failing(self: RetrieverLearning, batch: Reading, rng: random.Random) -> float:
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(batch.step)
        return step(self, batch, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetrieverLearning, "learn", failing)
        with pytest.raises(KeyboardInterrupt):
            trained(model, first, tmp_path)
    again = trained(model, first, tmp_path)
    assert again["finished"]
    assert (tmp_path / "network.safetensors").read_bytes() == (Path(second) / "network.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="another plan"):
        trained(model, first, tmp_path, seed=1)


def test_runs_of_the_first_stage_have_the_plan_they_had(model: EditableModel) -> None:
    old, new = (kind.for_model(model, **SIZES, **TRAINING) for kind in (PoolTraining, MemoryTraining))
    assert old.to_record() == new.to_record()
    assert MemoryTraining.from_record(new.to_record()) == new


def test_the_second_stage_is_of_the_size_of_the_first(model: EditableModel, first: str, tmp_path: Path) -> None:
    config = MemoryTraining.for_model(model, retriever_of=first)
    assert (config.slots, config.new, config.steps, config.batch_size) == (8, 2, 600, 12)
    assert "slots, new, spacing: as the network has" in config.source
    assert MemoryTraining.for_model(model, retriever_of=first, slots=8, steps=5).steps == 5
    with pytest.raises(ConfigError, match=r"slots=9, but the network in .* has slots=8; leave it out"):
        MemoryTraining.for_model(model, retriever_of=first, slots=9)
    with pytest.raises(ConfigError, match="give retriever_of=NETWORK too"):
        MemoryTraining.for_model(model, retrieved=3)
    with pytest.raises(ArtifactError, match="holds no trained network"):
        MemoryTraining.for_model(model, retriever_of=str(tmp_path))


# --- the editor -------------------------------------------------------------------------------------------------------


def test_an_editor_stores_what_it_drops_and_reads_it_again(
    model: EditableModel, first: str, second: str, tmp_path: Path
) -> None:
    edits = [Edit(prompt=f"{name} was born in", target="Rome", id=name) for name in NAMES]
    plain, editor = (MemoryLLM(model, network=second, long_term=most) for most in (0, 30))
    editor.adapter.detach()
    plain.edit(edits)
    plain.adapter.detach()
    base = model.generate(["Where was Ann born?"], max_new_tokens=3)
    editor.adapter.attach(model)
    editor.edit(edits)
    assert editor.adapter.retrieved == 2
    assert torch.equal(editor.adapter.pool.states, plain.adapter.pool.states), "what is written is the same"
    found = editor.adapter.pool.accounting()
    assert torch.equal(found.stored, 2 * len(edits) - found.short_term)
    assert bool((found.stored > 0).all())
    assert {part.what for part in editor._memory_to_prepare()} >= {"the long-term store"}
    size = model.layer_count * (30 * ((32 + 16) * 4 + 3 * 8 + 1) + 8)  # order, update and place; what is forgotten
    assert [part.size for part in editor._memory_to_prepare() if part.on_host] == [size]
    (one,) = editor.adapter.explain(["Where was Ann born?"])
    assert one.retrieved > 0  # type: ignore[attr-defined]
    editor.adapter.save_pretrained(tmp_path)
    said = model.generate(["Where was Ann born?"], max_new_tokens=6)
    editor.adapter.detach()
    assert model.generate(["Where was Ann born?"], max_new_tokens=3) == base
    going_on = MemoryLLM(model, adapter=AutoAdapter.from_pretrained(tmp_path))
    assert going_on.config.long_term == 30
    assert model.generate(["Where was Ann born?"], max_new_tokens=6) == said
    assert editor.adapter.revert("Zed").exactness == "approximate"
    (result,) = going_on.revert_exactly(["Zed"])
    assert result.exactness == "exact"
    found = going_on.adapter.pool.accounting()
    assert torch.equal(found.stored, 2 * (len(edits) - 1) - found.short_term)
    going_on.adapter.detach()
    with pytest.raises(
        ConfigError, match=rf"has none; train one: .*--set retriever_of={first} .*network=errata-retriever"
    ):
        MemoryLLM(model, network=first, long_term=30)
    with pytest.raises(ConfigError, match="--set retriever_of=NETWORK"):
        MemoryLLM(model, network="untrained", long_term=30)


def test_settings_of_a_store_are_checked_and_left_out_where_there_is_none(model: EditableModel) -> None:
    with pytest.raises(ConfigError, match="long_term=-1 must be at least 0"):
        MemoryLLM(model, network="untrained", long_term=-1)
    with pytest.raises(ConfigError, match="retrieved=3 needs a store"):
        MemoryLLM(model, network="untrained", retrieved=3)
    record = MemoryLLMConfig.for_model(model, network="untrained").to_record()
    assert not {"long_term", "retrieved"} & record.keys()
    assert MemoryLLMConfig.from_record(record).long_term == 0
    assert MemoryLLMConfig.for_model(model, long_term=5).to_record()["long_term"] == 5
