"""Encoder-decoder models: prompts are read by an encoder, whose layers are edited, and answered by a decoder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, WhisperConfig, WhisperForConditionalGeneration

from errata.adapters import RoutedAdapter
from errata.edit import Edit
from errata.editors import editor_class
from errata.editors.contexts import wise_contexts
from errata.editors.ft import FineTune
from errata.editors.memoir import Memoir
from errata.errors import AnatomyError, ConfigError, ModelError
from errata.model import EditableModel
from errata.model.edited_linear import Contribution
from errata.model.generation import continued
from errata.model.scoring import forced_answers
from errata.model.sequences import ForwardPass
from errata.model.tail import Tail
from errata.testing import FAMILIES, byte_tokenizer, tiny_hf_model, tiny_model

ENCODERS = ("t5", "flan_t5")
PROMPTS = ["The capital of France", "Bob wrote", "x", "Zed was born in Berlin"]


class Record(Contribution):
    """Changes nothing; keeps what it is told of each pass."""

    def __init__(self) -> None:
        self.passes: list[ForwardPass] = []

    def change_output(self, inputs: Tensor, outputs: Tensor, forward_pass: ForwardPass) -> Tensor:
        self.passes.append(forward_pass)
        return outputs


def test_prompts_keep_their_end_and_answers_get_one() -> None:
    model = tiny_model("t5")
    passage = model.passage("Who?", " Rome")
    assert model.tokenizer.decode(passage.prompt) == "Who?</s>"
    assert model.tokenizer.decode(passage.answer) == "Rome</s>"
    assert model.passage("Who?") == type(passage)(passage.prompt, ())
    # Also where the tokenizer closes nothing by itself.
    opening = EditableModel(tiny_hf_model("t5"), byte_tokenizer())
    assert opening.tokenizer.decode(opening.passage("Who?", "Rome").answer) == "<s>Rome</s>"


def test_a_batch_has_the_encoder_s_columns_and_the_decoder_s() -> None:
    model = tiny_model("t5")
    passages = [model.passage("The capital of France", "Rome"), model.passage("x", "Rome Paris"), model.passage("Who?")]
    batch = model.batch(passages, side="left")  # padded on the right all the same
    assert batch.ids.shape == (3, max(len(p.prompt) for p in passages))
    assert batch.prompt_lengths.tolist() == batch.mask.sum(1).tolist() == [len(p.prompt) for p in passages]
    assert not batch.starts.any()
    rows, columns, labels = batch.answer_places()
    assert labels.tolist() == [*passages[0].answer, *passages[1].answer]
    assert [columns[rows == row].tolist() for row in range(3)] == [[*range(len(p.answer))] for p in passages]
    # What predicts a token has been given the start token and the answer's tokens before it, never itself.
    given = batch.arguments()["decoder_input_ids"]
    assert given[1].tolist() == [0, *passages[1].answer[:-1]]
    assert given[0].tolist() == [0, *passages[0].answer, *[0] * 9][: given.shape[1]]


@pytest.mark.parametrize("family", ENCODERS)
def test_forced_answers_are_those_of_the_plain_model(family: str) -> None:
    model = tiny_model(family)
    passages = [
        model.passage(prompt, answer) for prompt, answer in zip(PROMPTS, ("Rome", "x", "Ann B", "Bob"), strict=True)
    ]
    for passage, found in zip(passages, forced_answers(model, passages), strict=True):
        labels = torch.tensor([passage.answer])
        with torch.no_grad():
            plain = model.model(input_ids=torch.tensor([passage.prompt]), labels=labels)
        assert found.predicted == tuple(plain.logits[0].argmax(-1).tolist())
        assert -sum(found.log_probs) / len(found.log_probs) == pytest.approx(float(plain.loss), rel=1e-4)


@pytest.mark.parametrize("family", ENCODERS)
def test_generation_is_that_of_the_plain_model(family: str) -> None:
    model = tiny_model(family)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([model.passage(prompt).prompt])
        output = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        expected.append(model.tokenizer.decode(output[0], skip_special_tokens=True).split("\n")[0])
    assert model.generate(PROMPTS, max_new_tokens=8) == expected
    assert len(set(expected)) > 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tracker_follows_the_encoder_alone(side: str) -> None:
    model = tiny_model("t5")
    record = Record()
    model.contribute(model.anatomy.mlp_output[1], record)
    model.tokenizer.padding_side = side
    try:
        batch = model.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    finally:
        model.tokenizer.padding_side = "right"
    model.model.generate(**batch, max_new_tokens=4, min_new_tokens=4, num_beams=2, do_sample=False)
    (seen,) = record.passes  # no decoding step reaches an edited layer
    assert torch.equal(seen.prompt, batch["attention_mask"].bool())
    assert seen.prompt_ends.sum(1).tolist() == [1] * len(PROMPTS)


def test_perplexity_is_of_the_second_half_of_a_text_given_the_first() -> None:
    model = tiny_model("t5")
    text = "The capital of France is Paris"
    ids = model.passage(text).ids
    half = len(ids) // 2
    with torch.no_grad():
        loss = model.model(input_ids=torch.tensor([ids[:half]]), labels=torch.tensor([ids[half:]])).loss
    assert model.perplexity([text, "x"[:0]]) == pytest.approx(math.exp(float(loss)), rel=1e-4)


def test_contexts_are_the_model_s_own_answers() -> None:
    model = tiny_model("flan_t5")
    found = wise_contexts(model, seed=0)
    assert found == wise_contexts(model, seed=0) != wise_contexts(model, seed=1)
    assert all(text.startswith(("I ", "You ", "Because ", "Yes ", "Q:  ")) for text in found)
    assert len({text.split(" ", 1)[1] for text in found}) > 5


@pytest.mark.parametrize("family", ENCODERS)
def test_routed_edits_hold_in_plain_generate(family: str) -> None:
    model = tiny_model(family)
    edits = [Edit(prompt="The capital of France", target="Rome"), Edit(prompt="Bob wrote", target="Alice")]
    editor = Memoir(model, layer=1, steps=150, learning_rate=3.0, contexts=0, threshold=0.8)
    assert all(applied.took for applied in editor.edit(edits).applied)
    assert isinstance(editor.adapter, RoutedAdapter)
    # The answer ends where the target does: the end token is part of what was learned.
    assert model.generate([edits[-1].prompt]) == ["Alice"]
    batch = model.batch([model.passage(prompt) for prompt in PROMPTS])
    ways = [continued(model, batch, max_new_tokens=5, **settings).tolist() for settings in ({}, {"use_cache": False})]
    assert ways[0] == ways[1]
    beams = continued(model, batch, max_new_tokens=5, num_beams=3)
    singles = [
        continued(model, model.batch([model.passage(prompt)]), max_new_tokens=5, num_beams=3)[0] for prompt in PROMPTS
    ]
    assert beams.tolist() == [row.tolist() for row in singles]
    with editor.adapter.detached():
        base = continued(model, batch, max_new_tokens=5).tolist()
    assert [now != before for now, before in zip(ways[0], base, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize("family", ENCODERS)
def test_a_saved_model_is_loaded_as_what_it_is(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = EditableModel.load(tmp_path)
    assert loaded.is_encoder_decoder
    assert loaded.fingerprint == model.fingerprint
    assert loaded.generate(PROMPTS, max_new_tokens=5) == model.generate(PROMPTS, max_new_tokens=5)


def test_methods_that_read_prompt_and_answer_in_one_row_refuse() -> None:
    model = tiny_model("t5")
    with pytest.raises(ConfigError, match=r"rome cannot edit tiny-t5-0: .*T5ForConditionalGeneration reads the prompt"):
        editor_class("rome")(model)
    assert editor_class("rome").unsuitable(tiny_model("llama")) is None


def test_only_encoders_of_text_are_edited() -> None:
    config = WhisperConfig(
        vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    with pytest.raises(AnatomyError, match="reads input_features, not text"):
        EditableModel(WhisperForConditionalGeneration(config), byte_tokenizer())


def bart() -> EditableModel:
    """A model whose only norm beside the encoder's blocks stands in front of them, and positions count columns."""
    config = BartConfig(
        vocab_size=400, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, initializer_range=0.2, dropout=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BartForConditionalGeneration(config).eval()
        torch.nn.init.normal_(model.model.encoder.layernorm_embedding.weight)
    return EditableModel(model, byte_tokenizer("<s> $A </s>"), model_id="bart")


def test_bart_s_first_norm_is_not_taken_for_its_last() -> None:
    model = bart()
    batch = model.batch([model.passage(prompt, "Rome") for prompt in PROMPTS], side="left")
    rows, columns, _ = batch.answer_places()
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(0)) * 0.1
    tail, full = Tail(model, 1), Tail(model, 1, full=True)
    recording = tail.record(batch)
    found = tail.run(recording, lambda inputs: inputs @ weight.T, rows, columns)
    expected = full.run(recording, lambda inputs: inputs @ weight.T, rows, columns)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, model.forward(batch).logits[rows, columns], atol=1e-2)
    assert model.verdicts["final norm"] is False


def test_bart_is_edited_and_its_padding_is_neutral() -> None:
    model = bart()
    alone = [model.generate([prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert model.generate(PROMPTS, max_new_tokens=6) == alone
    (applied,) = FineTune(model, learning_rate=1e-2, steps=20).edit([Edit(prompt="Bob wrote", target="Rome")]).applied
    assert applied.probability_after > 100 * applied.probability_before


def test_a_model_must_say_what_its_answers_begin_with() -> None:
    hf = tiny_hf_model("t5")
    hf.config.decoder_start_token_id = hf.generation_config.decoder_start_token_id = None
    hf.config.bos_token_id = hf.generation_config.bos_token_id = None
    model = EditableModel(hf, byte_tokenizer())
    with pytest.raises(ModelError, match="set decoder_start_token_id in its config"):
        model.batch([model.passage("x")])


def test_all_families_are_known_for_what_they_are() -> None:
    assert {family for family in FAMILIES if tiny_model(family).is_encoder_decoder} == set(ENCODERS)
