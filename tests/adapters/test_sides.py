"""Side memories: which one answers, what it adds, tombstones, shards that come and go, and what is on disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errata.adapters import AutoAdapter, BaseIdentity
from errata.adapters.sides import SideSettings, WiseAdapter, base_layer, mlp_activation
from errata.edit import Edit
from errata.errors import EditError, ModelError, SequenceError
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.model.sequences import ForwardPass, RouteStore
from errata.routing.activation import Scored, blocked, choose, effects
from errata.testing import tiny_model

OUTPUTS, WIDTH = 32, 96
PROMPTS = ("The capital of France", "Bob wrote Hamlet", "The flute of Ann", "Zed was born in")


def sparse(seed: int, size: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = size * torch.randn(OUTPUTS, WIDTH, generator=generator)
    return noise * (torch.rand(OUTPUTS, WIDTH, generator=generator) < 0.3)


def key_of(adapter: WiseAdapter, prompt: str, model: EditableModel) -> Tensor:
    """The layer's input at a prompt's last token."""
    held: list[Tensor] = []
    handle = base_layer(model, adapter.path).register_forward_pre_hook(lambda module, args: held.append(args[0]))
    batch = model.batch([model.passage(prompt)])
    with torch.no_grad(), adapter.detached():
        model.trunk_states(batch)
    handle.remove()
    return held[0][0, -1]


def adapter_with(
    model: EditableModel, per_shard: int, count: int = 4, threshold: float = 1e-3, **settings: Any
) -> WiseAdapter:
    """Edits e0, e1, ... of `PROMPTS`, so many to a shard; the shard's change is drawn anew for each."""
    path = model.anatomy.mlp_output[1]
    settings = {"mode": "retrieve", "shards_per_memory": 1, "score": "linear", "choice": "activation", **settings}
    adapter = WiseAdapter(BaseIdentity.of(model), "test", {}, path=path, settings=SideSettings(**settings))
    adapter.attach(model)
    for number, prompt in enumerate(PROMPTS[:count]):
        adapter.write(f"e{number}", sparse(number), threshold, key_of(adapter, prompt, model))
        adapter.remember(Edit(id=f"e{number}", prompt=prompt, target="Rome"))
        if adapter.layer.current is not None and adapter.layer.current.shards[0].written == per_shard:
            adapter.layer.finish()
    return adapter


def logits(model: EditableModel, *prompts: str) -> Tensor:
    batch = model.batch([model.passage(prompt) for prompt in prompts], side="left")
    with torch.no_grad():
        return model.forward(batch).logits[:, -1]


# --- scores and choices ----------------------------------------------------------------------------------------------


def test_both_scores_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, delta = torch.randn(3, 5, generator=generator), torch.randn(3, 5, generator=generator)
    tokens = torch.randn(2, 4, 5, generator=generator)
    linear = effects(tokens, delta)
    assert linear.shape == (2, 4)
    for row in range(2):
        for column in range(4):
            x = tokens[row, column]
            assert torch.isclose(linear[row, column], (delta @ x).norm(), rtol=1e-5)
            moved = nn.functional.silu((weight + delta) @ x) - nn.functional.silu(weight @ x)
            activated = effects(tokens, delta, tokens @ weight.T, nn.functional.silu)
            assert torch.isclose(activated[row, column], moved.norm(), rtol=1e-4)


def test_the_memory_that_is_moved_most_answers_if_it_passes() -> None:
    thresholds = torch.tensor([2.0, 5.0, 1.0])
    scores = torch.tensor([[3.0, 4.0, 0.5], [1.0, 1.0, 0.5], [3.0, 6.0, 9.0], [2.0, 4.9, 0.0], [3.0, 0.0, 4.0]])
    assert choose(scores, thresholds).tolist() == [0, -1, 2, 0, 2]
    # The published code lets the growing memory (the last) compete with a score below its own threshold.
    thresholds = torch.tensor([2.0, 5.0, 4.5])
    assert choose(scores, thresholds).tolist() == [0, -1, 2, 0, 0]
    assert choose(scores, thresholds, growing=True).tolist() == [0, -1, 2, 0, -1]
    # Another preference decides among those that pass, and lets no other pass.
    preference = torch.tensor([[0.0, 9.0, 9.0]]).expand(5, 3)
    assert choose(scores, torch.tensor([2.0, 5.0, 1.0]), preference=preference).tolist() == [0, -1, 1, 0, 2]


def test_a_tombstone_blocks_what_is_nearest_to_it_within_its_radius() -> None:
    held, buried = torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([[4.0, 0.0], [10.0, 0.0]])
    queries = torch.tensor([[4.0, 0.0], [1.9, 0.0], [2.2, 0.0], [4.0, 4.0], [10.0, 0.0]])
    # The last stands where an edit is held: it is a newer one of the same prompt.
    assert blocked(queries, held, buried, torch.tensor([3.0, 9.0])).tolist() == [True, False, True, False, False]
    assert blocked(queries, held, buried, torch.tensor([math.inf, 9.0])).tolist() == [True, False, True, True, False]


def test_long_prompts_are_scored_by_their_largest_token_only_in_the_reference() -> None:
    model = tiny_model("llama")
    for compat, answered in (("fixed", [-1, -1]), ("reference", [-1, 3])):
        adapter = adapter_with(model, per_shard=9, threshold=5.0, compat=compat)
        sums, peaks = torch.tensor([[100.0], [101.0]]), torch.tensor([[7.0], [7.0]])
        counts, last = torch.tensor([100, 101]), torch.zeros(2, WIDTH)
        assert adapter.layer.decide(Scored(sums, peaks, counts, last, (3,))).entry.tolist() == answered
        adapter.detach()


def test_the_nearest_edit_tells_memories_apart_where_scores_do_not() -> None:
    model = tiny_model("llama")
    for choice, named in (("nearest", ["e0", "e1", "e2", "e3"]), ("activation", ["e3", "e3", "e3", "e3"])):
        adapter = adapter_with(model, per_shard=1, choice=choice)
        adapter.layer.memories[-1].delta.mul_(30.0)  # moves every prompt farther than the others do
        assert [explained.edit_id for explained in adapter.explain(PROMPTS)] == named
        adapter.detach()


# --- reading ---------------------------------------------------------------------------------------------------------


def test_each_row_meets_its_own_memory() -> None:
    model = tiny_model("llama")
    layer = adapter_with(model, per_shard=1).layer
    generator = torch.Generator().manual_seed(1)
    inputs, outputs = torch.randn(4, 5, WIDTH, generator=generator), torch.randn(4, 5, OUTPUTS, generator=generator)
    numbers = torch.tensor([2, -1, 0, 2])
    read = layer.read(inputs, outputs, numbers)
    assert torch.equal(read[1], outputs[1])
    for row, number in ((0, 2), (2, 0), (3, 2)):
        assert torch.allclose(read[row], outputs[row] + inputs[row] @ sparse(number).T, atol=1e-5)


def test_only_prompt_tokens_count_and_chunks_add_up() -> None:
    model = tiny_model("llama")
    layer = adapter_with(model, per_shard=2, score="activated").layer
    inputs = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    prompt = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    whole = layer.gather(inputs, prompt)
    assert layer.base is not None
    outputs = layer.base(inputs)
    for column, memory in enumerate(layer.answering):
        tokens = effects(inputs, memory.delta, outputs, layer.activation)
        assert torch.allclose(whole.sums[:, column], torch.stack([tokens[0, 2:].sum(), tokens[1, :4].sum()]))
        assert torch.allclose(whole.peaks[:, column], torch.stack([tokens[0, 2:].max(), tokens[1, :4].max()]))
    assert torch.equal(whole.last, torch.stack([inputs[0, 5], inputs[1, 3]]))
    parts = None
    for at in (0, 2, 4):
        parts = layer.gather(inputs[:, at : at + 2], prompt[:, at : at + 2], parts)
    assert parts is not None
    for name in ("sums", "peaks", "counts", "last"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name))


def test_edits_made_while_a_prompt_is_read_in_parts_are_noticed() -> None:
    model = tiny_model("llama")
    adapter = adapter_with(model, per_shard=1)
    inputs, prompt = torch.randn(1, 2, WIDTH), torch.ones(1, 2, dtype=torch.bool)
    begun = adapter.layer.gather(inputs, prompt)
    adapter.write("new", sparse(9), 0.0, torch.ones(WIDTH))
    with pytest.raises(SequenceError, match="edits were made while a prompt was being read"):
        adapter.layer.gather(inputs, prompt, begun)


def test_sequences_read_before_it_was_attached_go_on_as_they_began() -> None:
    layer = adapter_with(tiny_model("llama"), per_shard=1).layer
    store = RouteStore(1)
    store.frozen = True
    real, outputs = torch.ones(1, 1, dtype=torch.bool), torch.randn(1, 1, OUTPUTS)
    assert torch.equal(
        layer.change_output(torch.randn(1, 1, WIDTH), outputs, ForwardPass(real, real, 0, store)), outputs
    )


# --- the nonlinearity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "same_as"),
    [
        ("llama", nn.functional.silu),
        ("gpt2", lambda x: nn.functional.gelu(x, approximate="tanh")),
        ("gptj", lambda x: nn.functional.gelu(x, approximate="tanh")),
        ("gpt_neox", nn.functional.gelu),
        ("opt", nn.functional.relu),
        ("falcon", nn.functional.gelu),
        ("phi3", nn.functional.silu),
        ("gemma2", lambda x: nn.functional.gelu(x, approximate="tanh")),
    ],
)
def test_the_nonlinearity_is_found_by_what_it_does(family: str, same_as: Any) -> None:
    model = tiny_model(family)
    model.model.train()
    x = torch.linspace(-4, 4, 33)
    assert torch.allclose(mlp_activation(model, model.anatomy.mlp_output[1])(x), same_as(x), atol=1e-6)


def test_without_a_nonlinearity_the_linear_score_is_offered() -> None:
    model = tiny_model("llama")
    model.module("model.layers.1.mlp").act_fn = nn.Identity()
    adapter = WiseAdapter(BaseIdentity.of(model), path=model.anatomy.mlp_output[1], settings=SideSettings())
    with pytest.raises(ModelError, match=r"found none; side memories can be scored without: score='linear'"):
        adapter.attach(model)
    assert not adapter.is_attached
    assert model.module(adapter.path) is base_layer(model, adapter.path)
    linear = SideSettings(score="linear")
    WiseAdapter(BaseIdentity.of(model), path=model.anatomy.mlp_output[1], settings=linear).attach(model)


# --- shards ----------------------------------------------------------------------------------------------------------


def test_shards_are_merged_into_new_memories_or_into_one() -> None:
    model = tiny_model("llama")
    adapter = adapter_with(model, per_shard=1, shards_per_memory=2)
    assert [memory.owners for memory in adapter.layer.memories] == [["e0", "e1"], ["e2", "e3"]]
    adapter.detach()
    adapter = adapter_with(model, per_shard=1, shards_per_memory=2, mode="merge")
    (memory,) = adapter.layer.memories
    assert memory.owners == ["e0", "e1", "e2", "e3"]
    assert [shard.numbers for shard in memory.shards] == [(0, 1), (2,), (3,)]
    kept, second, third = (shard.delta for shard in memory.shards)
    # 0.6 for what was merged before, 0.2 for each new shard; where all agree, the mean has these weights.
    agree = (kept > 0) & (second > 0) & (third > 0)
    assert bool(agree.any())
    assert torch.allclose(memory.delta[agree], (0.6 * kept + 0.2 * second + 0.2 * third)[agree], atol=1e-6)


def test_unmerged_shards_answer_beside_the_current_one() -> None:
    adapter = adapter_with(tiny_model("llama"), per_shard=2, count=3, shards_per_memory=2)
    assert [memory.owners for memory in adapter.layer.answering] == [["e0", "e1"], ["e2"]]


def test_one_epsilon_serves_all_only_in_the_references_merge_mode() -> None:
    model = tiny_model("llama")
    for compat, mode, expected in (
        ("reference", "merge", 0.5),
        ("reference", "retrieve", math.inf),
        ("fixed", "merge", math.inf),
    ):
        adapter = adapter_with(model, per_shard=4, threshold=0.5, compat=compat, mode=mode)
        assert adapter.layer.begin(OUTPUTS, WIDTH).threshold == expected
        adapter.detach()


# --- taking edits out ------------------------------------------------------------------------------------------------


def test_a_tombstone_leaves_the_prompt_to_the_base_and_the_others_alone() -> None:
    model = tiny_model("llama")
    base = logits(model, *PROMPTS)
    adapter = adapter_with(model, per_shard=9)
    before = logits(model, *PROMPTS)
    result = adapter.revert("e1")
    assert result.exactness == "approximate"
    assert "tombstone" in result.reason
    assert "3 other edits share" in result.reason
    now = logits(model, *PROMPTS)
    assert torch.equal(now[1], base[1])
    for row in (0, 2, 3):
        assert torch.equal(now[row], before[row])
        assert not torch.equal(now[row], base[row])
    explained = adapter.explain([PROMPTS[1]])[0]
    assert (explained.fires, explained.score) == (False, 0.0)
    # Made again, the prompt is answered again, tombstone or not.
    adapter.write("again", sparse(7), 1e-3, key_of(adapter, PROMPTS[1], model))
    assert adapter.explain([PROMPTS[1]])[0].edit_id == "again"
    assert adapter.explain([PROMPTS[1]])[0].fires


def test_a_newer_edit_of_a_prompt_wins_over_one_in_an_older_memory() -> None:
    model = tiny_model("llama")
    adapter = adapter_with(model, per_shard=2, count=2)
    adapter.write("new", 1e-2 * sparse(7), 1e-3, key_of(adapter, PROMPTS[0], model))  # hardly moves anything
    adapter.remember(Edit(id="new", prompt=PROMPTS[0], target="Berlin"))
    assert adapter.explain([PROMPTS[0]])[0].edit_id == "e0"
    adapter.supersede("e0", "new")
    assert adapter.explain([PROMPTS[0]])[0].edit_id == "new"
    assert [e.id for e in adapter.edits()] == ["e1", "new"]
    assert adapter.explain([PROMPTS[1]])[0].edit_id == "e1"


def test_the_last_edit_of_a_shard_takes_the_shard_with_it() -> None:
    model = tiny_model("llama")
    base = logits(model, *PROMPTS)
    adapter = adapter_with(model, per_shard=1, shards_per_memory=2)
    merged = adapter.layer.memories[0]
    result = adapter.revert("e0")
    assert (result.exactness, "last edit of its shard" in result.reason) == ("exact", True)
    left = adapter.layer.memories[0]
    assert left is not merged
    assert torch.equal(left.delta, sparse(1))
    for name in ("e3", "e2", "e1"):
        adapter.revert(name)
    assert torch.equal(logits(model, *PROMPTS), base)
    assert (adapter.layer.answering, adapter.layer.next_shard) == ([], 0)


def test_dropping_a_shard_is_exact_and_says_who_goes_with_it() -> None:
    model = tiny_model("llama")
    adapter = adapter_with(model, per_shard=2, shards_per_memory=2)
    result = adapter.revert("e0", how="drop_shard")
    assert result.exactness == "exact"
    assert "1 other edits with it: e1" in result.reason
    assert [e.id for e in adapter.edits()] == ["e2", "e3"]
    assert torch.equal(adapter.layer.memories[0].delta, sparse(3))
    with pytest.raises(EditError, match="holds no edit 'e0'"):
        adapter.revert("e0", how="drop_shard")


def test_what_was_merged_for_good_is_not_dropped() -> None:
    adapter = adapter_with(tiny_model("llama"), per_shard=1, shards_per_memory=2, mode="merge")
    with pytest.raises(EditError, match="merged for good with 1 others"):
        adapter.revert("e0", how="drop_shard")
    assert adapter.revert("e2", how="drop_shard").exactness == "exact"
    assert adapter.revert("e0").exactness == "approximate"


# --- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merging", ["ties", "dare", "slerp"])
def test_what_is_saved_is_sparse_and_comes_back_bit_for_bit(tmp_path: Path, merging: str) -> None:
    model = tiny_model("llama")
    adapter = adapter_with(model, per_shard=1, count=3, shards_per_memory=2, merging=merging, score="activated")
    adapter.layer.memories[0].threshold = 0.125
    adapter.revert("e1")
    before, explained = logits(model, *PROMPTS), adapter.explain(PROMPTS)
    adapter.notes["margins"] = {"margin_low": 1.0}
    adapter.save_pretrained(tmp_path)
    adapter.detach()
    loaded = AutoAdapter.from_pretrained(tmp_path, model=model)
    assert isinstance(loaded, WiseAdapter)
    assert torch.equal(logits(model, *PROMPTS), before)
    assert loaded.explain(PROMPTS) == explained
    assert loaded.notes == adapter.notes
    for mine, other in zip(loaded.layer.answering, adapter.layer.answering, strict=True):
        assert (mine.number, mine.threshold, mine.owners) == (other.number, other.threshold, other.owners)
        assert torch.equal(mine.delta, other.delta)
    tensors, _ = adapter._state()
    for shard, entries in ((sparse(0), "0.values"), (sparse(2), "2.values")):
        assert len(tensors[entries]) == int(shard.count_nonzero()) < 0.4 * shard.numel()
    assert not any(tensor.shape == (OUTPUTS, WIDTH) for tensor in tensors.values())


def test_random_content_answers_the_same_prompts_and_moves_them_equally_far(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = adapter_with(model, per_shard=2, threshold=1.0, score="activated")
    noise = adapter.with_random_content(torch.Generator().manual_seed(0))
    explained = adapter.explain([*PROMPTS, "x", "Berlin was"])
    inputs = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    numbers, nothing = torch.tensor([adapter.layer.memories[0].number, -1]), torch.zeros(2, 3, OUTPUTS)
    real, random = (each.layer.read(inputs, nothing, numbers) for each in (adapter, noise))
    assert torch.allclose(real.norm(dim=-1), random.norm(dim=-1), rtol=1e-4)
    assert torch.cosine_similarity(real[0], random[0], dim=-1).abs().max() < 0.7
    with adapter.detached():
        noise.attach(model)
        assert noise.explain([*PROMPTS, "x", "Berlin was"]) == explained
        noise.save_pretrained(tmp_path)
        noise.detach()
    again = AutoAdapter.from_pretrained(tmp_path)
    assert isinstance(again, WiseAdapter)
    assert torch.allclose(again.layer.read(inputs, nothing, numbers), random, atol=1e-5)


def test_explaining_needs_no_attachment_and_leaves_none() -> None:
    model = tiny_model("llama")
    adapter = adapter_with(model, per_shard=2, score="activated")
    attached = adapter.explain(PROMPTS)
    adapter.detach()
    assert adapter.explain(PROMPTS, model) == attached
    assert adapter.layer.base is None


def test_layer_changes_name_the_largest_memory() -> None:
    model = tiny_model("llama")
    adapter = adapter_with(model, per_shard=2)
    (change,) = adapter.layer_changes(model)
    largest = max(float(sparse(1).norm()), float(sparse(3).norm()))
    assert (change.module, change.entries) == (adapter.path, 4)
    assert change.norm == pytest.approx(largest)
    assert change.relative_norm == pytest.approx(largest / float(weight_of(base_layer(model, adapter.path)).norm()))
