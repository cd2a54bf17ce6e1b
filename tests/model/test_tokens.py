"""Prompts with answers as token ids, padded batches, fingerprints, statistics of keys."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from errata.adapters import BaseIdentity, RoutedAdapter
from errata.errors import ArtifactError, BaseMismatchError, NumericsError
from errata.model import EditableModel
from errata.model.edited_linear import Contribution
from errata.model.fingerprint import weights_fingerprint
from errata.model.probes import capturing_inputs
from errata.model.statistics import StatisticsPlan, key_statistics
from errata.model.tokens import encode_passage
from errata.progress import SilentProgress
from errata.testing import byte_tokenizer, metaspace_tokenizer, tiny_hf_model, tiny_model

WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
    lambda t: bool(t.strip())
)


@settings(deadline=None, max_examples=100)
@given(WORDS, WORDS)
@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), metaspace_tokenizer()], ids=["bytes", "marked spaces"])
def test_a_prompt_keeps_the_ids_it_has_alone(tokenizer: object, prompt: str, answer: str) -> None:
    passage = encode_passage(tokenizer, prompt, answer)  # type: ignore[arg-type]
    assert list(passage.prompt) == tokenizer(prompt)["input_ids"]  # type: ignore[operator]
    assert passage.answer
    assert 1 not in passage.answer, "no second beginning token"


def test_an_end_token_is_only_cut_off_where_the_tokenizer_puts_it() -> None:
    tokenizer = copy.deepcopy(byte_tokenizer())
    assert encode_passage(tokenizer, "Ann</s>", "Rome").prompt[-1] == tokenizer.eos_token_id
    closing = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = closing
    passage = encode_passage(tokenizer, "Ann", "Rome")
    assert 2 not in passage.ids
    assert passage.ids == encode_passage(byte_tokenizer(), "Ann", "Rome").ids


def test_one_space_goes_between_unless_there_is_white_space() -> None:
    tokenizer = byte_tokenizer()
    for prompt, answer, whole in (
        ("Ann is", "Rome", "Ann is Rome"),
        ("x\n", "4", "x\n4"),
        ("Ann is", " Rome", "Ann is Rome"),
    ):
        passage = encode_passage(tokenizer, prompt, answer)
        assert tokenizer.decode(list(passage.ids), skip_special_tokens=True) == whole


@pytest.mark.parametrize("side", ["left", "right"])
def test_answer_places_predict_the_answer(side: str) -> None:
    model = tiny_model("llama")
    passages = [model.passage("The capital of France is", "Rome"), model.passage("Who?", "Ann Bob"), model.passage("x")]
    batch = model.batch(passages, side=side)  # type: ignore[arg-type]
    rows, columns, labels = batch.answer_places()
    assert rows.tolist() == [0] * len(passages[0].answer) + [1] * len(passages[1].answer)
    assert labels.tolist() == [*passages[0].answer, *passages[1].answer]
    first = int(batch.starts[0]) + len(passages[0].prompt) - 1
    assert int(columns[0]) == first


def test_a_half_precision_checkpoint_has_one_fingerprint_however_it_is_loaded(tmp_path: Path) -> None:
    model = tiny_hf_model("llama", tie_word_embeddings=True).bfloat16()
    model.save_pretrained(tmp_path)
    prints = {
        dtype: weights_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
    }
    assert prints[torch.bfloat16] == prints[torch.float32] == weights_fingerprint(model)
    assert prints[torch.float16] != prints[torch.float32], "if this ever holds, say so in the docstring"


def test_float16_is_named_as_a_reason_for_another_fingerprint() -> None:
    adapter = RoutedAdapter(BaseIdentity.of(tiny_model("llama")))
    half = EditableModel(tiny_hf_model("llama").half(), byte_tokenizer())
    with pytest.raises(BaseMismatchError, match=r"loaded in float16.*load its own base in float32 or bfloat16"):
        adapter.attach(half)


def test_the_fingerprint_sees_one_weight_and_ignores_precision_and_adapters() -> None:
    model = tiny_hf_model("llama")
    before = weights_fingerprint(model)
    half = tiny_hf_model("llama").bfloat16()
    assert weights_fingerprint(half) == before
    assert weights_fingerprint(half.float()) == before
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 0.1
    assert weights_fingerprint(model) != before
    assert weights_fingerprint(tiny_hf_model("llama", seed=1)) != before


TEXTS = [f"The capital of {name} is Rome, {i} times" for i, name in enumerate(["France", "Spain", "Zed", "Ann"] * 60)]
PLAN = StatisticsPlan(tokens_per_width=4.0, batch_tokens=512, autocast=False)


def naive(layer: int, budget: int) -> tuple[torch.Tensor, int]:
    """Second moment of the keys, one text at a time, in float64, up to the batch in which the budget is met."""
    model = tiny_model("llama")
    keys = []
    path = model.anatomy.mlp_output[layer]
    for text in TEXTS:
        with torch.no_grad(), capturing_inputs(model.model, [path], 1) as inputs:
            model.trunk_states(model.batch([model.passage(text)]))
        keys.append(inputs[path][0, 1:].double())
    return torch.cat(keys), budget


def test_one_pass_equals_the_definition_for_every_layer(tmp_path: Path) -> None:
    model = tiny_model("llama")
    found = key_statistics(model, [1, 3], TEXTS, PLAN, folder=tmp_path)
    for layer, statistics in found.items():
        keys, _ = naive(layer, 0)
        keys = keys[: statistics.tokens]
        assert torch.allclose(statistics.second_moment, keys.T @ keys / len(keys), rtol=1e-3, atol=1e-4)
        assert torch.allclose(statistics.mean, keys.mean(0), rtol=1e-3, atol=1e-4)
        width = len(statistics.mean)
        shrunk = statistics.second_moment + PLAN.shrinkage * statistics.second_moment.diagonal().mean() * torch.eye(
            width
        )
        assert torch.allclose(statistics.cholesky @ statistics.cholesky.T, shrunk, atol=1e-8)
        key = keys[:2].T
        assert torch.allclose(shrunk @ statistics.solve(key), key, atol=1e-6)
    assert 4 * 96 <= found[1].tokens < 4 * 96 + 512


def test_what_is_kept_is_not_computed_again_and_depends_on_everything(tmp_path: Path) -> None:
    model = tiny_model("llama")
    key_statistics(model, [1], TEXTS, PLAN, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1

    class Counting(SilentProgress):
        count = 0

        def advance(self, count: int = 1, note: str = "") -> None:
            self.count += count

    progress = Counting()
    key_statistics(model, [1], TEXTS, PLAN, folder=tmp_path, progress=progress)
    assert progress.count == 0
    key_statistics(model, [1, 2], TEXTS, PLAN, folder=tmp_path, progress=progress)
    assert progress.count > 0
    for other in (StatisticsPlan(tokens_per_width=5.0, autocast=False), StatisticsPlan(tokens_per_width=4.0)):
        key_statistics(model, [1], TEXTS, other, folder=tmp_path)
    key_statistics(model, [1], TEXTS[1:], PLAN, folder=tmp_path)
    key_statistics(tiny_model("llama", seed=1), [1], TEXTS, PLAN, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


class PowerCut(SilentProgress):
    """Ends everything after some batches."""

    left = 3

    def advance(self, count: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_pass_goes_on_where_it_was(tmp_path: Path) -> None:
    plan = StatisticsPlan(tokens_per_width=20.0, batch_tokens=256, autocast=False, checkpoint_batches=1)
    with pytest.raises(KeyboardInterrupt):
        key_statistics(tiny_model("llama"), [2], TEXTS, plan, folder=tmp_path / "a", progress=PowerCut())
    assert [p.name.startswith("partial") for p in (tmp_path / "a").iterdir()] == [True]
    resumed = key_statistics(tiny_model("llama"), [2], TEXTS, plan, folder=tmp_path / "a")[2]
    whole = key_statistics(tiny_model("llama"), [2], TEXTS, plan, folder=tmp_path / "b")[2]
    assert resumed.tokens == whole.tokens
    assert torch.equal(resumed.second_moment, whole.second_moment)
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_interrupted_passes_over_many_layers_are_told_apart(tmp_path: Path) -> None:
    plan = StatisticsPlan(tokens_per_width=20.0, batch_tokens=256, autocast=False, checkpoint_batches=1)
    model = tiny_model("llama", num_hidden_layers=6)
    for layers in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 5]):
        with pytest.raises(KeyboardInterrupt):
            key_statistics(model, layers, TEXTS, plan, folder=tmp_path, progress=PowerCut())
    assert len(list(tmp_path.iterdir())) == 2
    assert list(key_statistics(model, [0, 1, 2, 3, 5], TEXTS, plan, folder=tmp_path)) == [0, 1, 2, 3, 5]


def test_going_on_with_other_batches_skips_no_text(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plans = [
        StatisticsPlan(tokens_per_width=20.0, batch_tokens=size, autocast=False, checkpoint_batches=1)
        for size in (256, 512)
    ]
    with pytest.raises(KeyboardInterrupt):
        key_statistics(model, [1], TEXTS, plans[0], folder=tmp_path / "a", progress=PowerCut())
    resumed, whole = (key_statistics(model, [1], TEXTS, plans[1], folder=tmp_path / name)[1] for name in "ab")
    assert torch.equal(resumed.second_moment, whole.second_moment)


def test_statistics_are_those_of_the_base_whatever_is_attached(tmp_path: Path) -> None:
    class Shift(Contribution):
        def weight_change(self) -> torch.Tensor:
            return torch.ones(32, 96)

    model, shift = tiny_model("llama"), Shift()
    base = key_statistics(model, [2], TEXTS, PLAN, folder=tmp_path / "a")[2]
    path = model.anatomy.mlp_output[0]
    model.contribute(path, shift)
    found = key_statistics(model, [2], TEXTS, PLAN, folder=tmp_path / "b")[2]
    model.withdraw(path, shift)
    assert torch.equal(found.second_moment, base.second_moment)


def test_blocks_above_the_last_layer_asked_for_are_not_run(tmp_path: Path) -> None:
    model = tiny_model("llama")
    run: list[int] = []
    for number, path in enumerate(model.anatomy.blocks):
        model.module(path).register_forward_hook(lambda *_, number=number: run.append(number))
    key_statistics(model, [1], TEXTS, PLAN, folder=tmp_path)
    assert set(run) == {0, 1}


def test_too_little_text_is_refused_with_the_amount_needed(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match=r"fewer than one per dimension.*about 384 tokens"):
        key_statistics(tiny_model("llama"), [1], TEXTS[:3], PLAN, folder=tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    key_statistics(model, [1], TEXTS, PLAN, folder=tmp_path)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="delete the file"):
        key_statistics(model, [1], TEXTS, PLAN, folder=tmp_path)
