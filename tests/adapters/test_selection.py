"""Several adapters on one model, and each sequence of a batch with its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from errata.adapters import Adapter, AutoAdapter, DeltaAdapter, WeightChange
from errata.edit import Edit
from errata.editors.memoir import Memoir
from errata.errors import ConfigError, SequenceError
from errata.model import EditableModel, edited_linear
from errata.model.anatomy import weight_of
from errata.model.edited_linear import Contribution, EditedLinear
from errata.model.scoring import forced_answers, perplexity
from errata.model.sequences import BASE
from errata.model.tail import Tail
from errata.testing import tiny_model

PROMPTS = ("The capital of France", "Who?", "Bob wrote Hamlet", "The flute of Ann plays")
LAYER = 3


def delta(model: EditableModel, seed: int, layer: int = LAYER) -> DeltaAdapter:
    """A random change of one layer, large enough that every token changes its logits."""
    path = model.anatomy.mlp_output[layer]
    adapter = DeltaAdapter.for_layers(model, [path], "delta", {})
    outputs, inputs = weight_of(model.module(path)).shape
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(outputs, 4, generator=generator), torch.randn(inputs, 4, generator=generator)
    adapter.add([WeightChange(path, ("e",), left, 0.2 * right)])
    return adapter


def routed(model: EditableModel) -> Adapter:
    """An edit of the first prompt by a method that routes."""
    editor = Memoir(model, steps=20, learning_rate=3.0, contexts=0, threshold=0.6)
    editor.edit([Edit(prompt=PROMPTS[0], target="Rome", subject="France")])
    editor.adapter.detach()
    return editor.adapter


def three(model: EditableModel, *, attached: bool = True) -> dict[str, Adapter]:
    """A routed adapter and two changes of weight, one of them of the same layer as the other."""
    adapters = {"geo": routed(model), "people": delta(model, 1), "music": delta(model, 2)}
    if attached:
        for name, adapter in adapters.items():
            adapter.attach(model, name)
    return adapters


def ends(model: EditableModel, prompts: Sequence[str] = PROMPTS, **kwargs: Any) -> Tensor:
    """Logits behind each prompt, left-padded in one batch."""
    with torch.no_grad():
        logits: Tensor = model.forward(model.batch([model.passage(p) for p in prompts]), **kwargs).logits[:, -1]
    return logits


def alone(model: EditableModel, adapters: Mapping[str, Adapter], names: Sequence[str], call: Any) -> Any:
    """What a call gives with only the named adapters attached, and nothing selected."""
    chosen = [adapter for name, adapter in adapters.items() if name in names]
    for adapter in adapters.values():
        adapter.detach()
    for adapter in chosen:
        adapter.attach(model)
    found = call()
    for adapter in chosen:
        adapter.detach()
    for name, adapter in adapters.items():
        adapter.attach(model, name)
    return found


# --- names ------------------------------------------------------------------------------------------------------------


def test_adapters_have_names_of_their_own(tmp_path: Path) -> None:
    model = tiny_model("llama")
    first, second, third = (delta(model, seed) for seed in range(3))
    assert first.name is None
    first.attach(model)
    second.attach(model)
    third.attach(model, "geo")
    assert list(model.adapters) == ["delta", "delta-2", "geo"]
    assert model.adapters["geo"] is third
    assert (first.name, second.name, third.name) == ("delta", "delta-2", "geo")
    with third.detached():
        assert "geo" not in model.adapters
    assert model.adapters["geo"] is third
    first.detach()
    assert first.name is None
    assert list(model.adapters) == ["delta-2", "geo"]
    third.save_pretrained(tmp_path)
    loaded = AutoAdapter.from_pretrained(tmp_path, model=model, name="geo of yesterday")
    assert model.adapters["geo of yesterday"] is loaded


@pytest.mark.parametrize(
    ("name", "words"), [("geo", "'geo' is attached already"), (BASE, "cannot be the name"), ("", "cannot be the name")]
)
def test_a_name_that_cannot_be_had_is_an_error_and_nothing_is_attached(name: str, words: str) -> None:
    model = tiny_model("llama")
    delta(model, 0).attach(model, "geo")
    other = delta(model, 1)
    with pytest.raises(ConfigError, match=words):
        other.attach(model, name)
    assert not other.is_attached
    assert list(model.adapters) == ["geo"]


def test_another_wrapper_of_the_model_knows_the_names_that_are_taken() -> None:
    model = tiny_model("llama")
    delta(model, 0).attach(model, "geo")
    again = EditableModel(model.model, model.tokenizer, model_id=model.model_id)
    with pytest.raises(ConfigError, match="attached already"):
        delta(model, 1).attach(again, "geo")
    assert torch.equal(ends(again, adapter_names=["geo"] * 4), ends(model))


# --- which adapters act -----------------------------------------------------------------------------------------------


def test_each_row_has_the_adapters_it_names() -> None:
    model = tiny_model("llama")
    adapters = three(model)
    names = [("geo",), ("people",), (BASE,), ("geo", "music")]
    everything = ends(model)
    with model.selecting(names):
        mixed = ends(model)
    for row, own in enumerate(names):
        expected = alone(model, adapters, own, lambda: ends(model))
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-5, atol=1e-5)
        assert own == (BASE,) or not torch.allclose(mixed[row], everything[row], atol=1e-2)
    assert torch.equal(ends(model), everything)


def test_rows_that_a_routed_adapter_is_not_selected_for_are_untouched_bit_for_bit() -> None:
    model = tiny_model("llama")
    prompts = (PROMPTS[0],) * 2
    base = ends(model, prompts)
    adapters = {"geo": routed(model)}
    adapters["geo"].attach(model, "geo")
    edited = ends(model, prompts)
    assert not torch.equal(edited, base)
    for names in (["geo", BASE], [BASE, "geo"], [BASE, BASE], ["geo", "geo"]):
        with model.selecting(names):
            found = ends(model, prompts)
        for row, name in enumerate(names):
            assert torch.equal(found[row], (base if name == BASE else edited)[row])


def test_one_string_is_for_all_and_none_changes_nothing() -> None:
    model = tiny_model("llama")
    adapters = three(model)
    with model.selecting("people"):
        people = ends(model)
        with model.selecting(None):
            assert torch.equal(ends(model), people)
        with model.selecting(BASE):
            base = ends(model)
        with model.bare():
            assert torch.equal(ends(model), base)
        assert torch.equal(ends(model), people)
    assert torch.equal(people, alone(model, adapters, ["people"], lambda: ends(model)))
    assert torch.equal(base, alone(model, adapters, [], lambda: ends(model)))


def test_rows_with_the_same_weight_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    three(model)
    sizes: list[int] = []
    plain = EditedLinear._linear

    def counted(self: EditedLinear, inputs: Tensor, changing: tuple[Contribution, ...]) -> Tensor:
        if changing:
            sizes.append(len(inputs))
        return plain(self, inputs, changing)

    monkeypatch.setattr(EditedLinear, "_linear", counted)
    for names, expected in (
        (["people", "geo", "music", "people"], [2, 1]),  # the row of "geo" takes the base layer
        (["people"] * 4, [4]),
        (["geo", BASE, BASE, "geo"], []),
        ([("people", "geo"), "people", ("geo", "people"), "people"], [4]),
    ):
        sizes.clear()
        ends(model, adapter_names=names)
        assert sizes == expected


def test_merged_weights_follow_what_is_written_and_are_given_back() -> None:
    model = tiny_model("llama")
    adapters = three(model)
    layer = model.module(model.anatomy.mlp_output[LAYER])
    names = ["people", "music", BASE, ("people", "music")]
    with model.selecting(names):
        before = ends(model)
        assert len(layer._merged) == 3
        people = adapters["people"]
        assert isinstance(people, DeltaAdapter)
        change = people._changes[0]
        people.add([change])
        people.remember(Edit(id="e", prompt="x", target="y"))
        after = ends(model)
        assert [bool(torch.equal(a, b)) for a, b in zip(before, after, strict=True)] == [False, True, True, False]
        people.revert("e")
        assert not torch.equal(ends(model)[0], after[0])
    people.detach()
    assert len(layer._merged) == 1
    assert layer._changed_weight(()) is None


def test_only_so_many_merged_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edited_linear, "_KEPT_WEIGHTS", 2)
    model = tiny_model("llama")
    adapters = {str(seed): delta(model, seed) for seed in range(4)}
    for name, adapter in adapters.items():
        adapter.attach(model, name)
    with model.selecting([*adapters]):
        found = ends(model)
    assert len(model.module(model.anatomy.mlp_output[LAYER])._merged) == 2
    for row, name in enumerate(adapters):
        assert torch.allclose(found[row], alone(model, adapters, [name], lambda: ends(model))[row], atol=1e-5)


def test_a_contribution_without_a_name_acts_only_where_nothing_is_selected() -> None:
    model = tiny_model("llama")
    base = ends(model)
    adapter = delta(model, 0)
    ((path, contribution),) = adapter.contributions().items()
    model.contribute(path, contribution)
    assert not torch.equal(ends(model), base)
    with model.selecting(BASE):
        assert torch.equal(ends(model), base)
    model.withdraw(path, contribution)


# --- the selection belongs to the sequences ---------------------------------------------------------------------------


def test_decoding_goes_on_as_it_began() -> None:
    model = tiny_model("llama")
    adapters = three(model)
    names = ["geo", BASE, "people", "music"]
    batch = model.batch([model.passage(p) for p in PROMPTS])

    def steps(cache: Any, rows: Tensor, count: int = 4) -> Tensor:
        found, mask, step = [], batch.mask[rows], batch.ids[rows, -1:]
        for _ in range(count):
            mask = torch.cat([mask, torch.ones_like(step)], 1)
            logits = model.model(input_ids=step, attention_mask=mask, past_key_values=cache).logits[:, -1]
            step = logits.argmax(-1, keepdim=True)
            found.append(logits)
        return torch.stack(found, 1)

    def read() -> Any:
        return model.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=True).past_key_values

    everyone = torch.arange(4)
    expected = torch.stack(
        [alone(model, adapters, [name], lambda: steps(read(), everyone))[row] for row, name in enumerate(names)]
    )
    with torch.no_grad():
        with model.selecting(names):
            caches = [read() for _ in range(4)]
        caches.append(copy.deepcopy(caches[0]))
        caches[1].reorder_cache(torch.tensor([2, 0, 3, 1]))
        caches[2].batch_select_indices(torch.tensor([3, 1]))
        caches[3].batch_repeat_interleave(2)
        orders = ([0, 1, 2, 3], [2, 0, 3, 1], [3, 1], [0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3])
        for cache, order in zip(caches, orders, strict=True):
            rows = torch.tensor(order)
            torch.testing.assert_close(steps(cache, rows), expected[rows], rtol=1e-4, atol=1e-4)


def test_a_selection_cannot_change_on_a_running_cache() -> None:
    model = tiny_model("llama")
    three(model)
    ids = model.batch([model.passage("Ann plays the"), model.passage("Who? Ann plays")]).ids
    with model.selecting(["geo", "people"]):
        cache = model.model(input_ids=ids, use_cache=True).past_key_values
        model.model(input_ids=ids[:, :1], past_key_values=cache)
    model.model(input_ids=ids[:, :1], past_key_values=cache)
    with (
        pytest.raises(SequenceError, match="sequence 1 of this KV cache began with people and cannot go on with music"),
        model.selecting(["geo", "music"]),
    ):
        model.model(input_ids=ids[:, :1], past_key_values=cache)
    cache = model.model(input_ids=ids, use_cache=True).past_key_values
    with (
        pytest.raises(SequenceError, match=f"began with all adapters and cannot go on with {BASE}"),
        model.selecting(BASE),
    ):
        model.model(input_ids=ids[:, :1], past_key_values=cache)


# --- every way in -----------------------------------------------------------------------------------------------------

MODES: tuple[dict[str, Any], ...] = (
    {},
    {"use_cache": False},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2, "use_cache": False},
    {"cache_implementation": "static", "disable_compile": True},
    {"prompt_lookup_num_tokens": 2},
)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_generate_of_hugging_face_takes_the_argument_of_peft(family: str) -> None:
    model = tiny_model(family)
    adapters = three(model)
    names = ["geo", "people", BASE, ("geo", "music")]
    settings: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

    def generated(row: int, **kwargs: Any) -> list[list[int]]:
        batch = model.batch([model.passage(p) for p in (PROMPTS if row < 0 else PROMPTS[row : row + 1])])
        found = model.model.generate(input_ids=batch.ids, attention_mask=batch.mask, **settings, **kwargs)
        tokens: list[list[int]] = found[:, batch.ids.shape[1] :].tolist()
        return tokens

    for mode in MODES:
        rows = [-1] if "prompt_lookup_num_tokens" not in mode else []  # which takes one prompt at a time
        together = [tokens for row in rows for tokens in generated(row, adapter_names=names, **mode)]
        singly = [tokens for row in range(4) for tokens in generated(row, adapter_names=names[row : row + 1], **mode)]
        expected = [
            tokens
            for row, own in enumerate(names)
            for tokens in alone(model, adapters, own, lambda row=row, mode=mode: generated(row, **mode))
        ]
        assert singly == expected, mode
        assert together in ([], expected), mode
    chunked = [generated(row, adapter_names=names[row : row + 1], prefill_chunk_size=2)[0] for row in range(4)]
    assert chunked == [generated(row, adapter_names=names[row : row + 1])[0] for row in range(4)]


def test_a_forward_pass_takes_it_too() -> None:
    model = tiny_model("llama")
    three(model)
    names = ["geo", "people", BASE, ("geo", "music")]
    with model.selecting(names):
        expected = ends(model)
    assert torch.equal(ends(model, adapter_names=names), expected)
    with model.bare():
        assert torch.equal(ends(model, adapter_names=names), ends(model))


@pytest.mark.parametrize("batch_tokens", [8, 60, 8192])
def test_prompts_keep_their_adapters_when_they_are_batched_by_length(batch_tokens: int) -> None:
    model = tiny_model("llama")
    adapters = three(model)
    prompts = [f"{text}{' is' * extra}" for extra in (3, 0, 2) for text in PROMPTS]
    kinds: list[tuple[str, ...]] = [("geo",), (BASE,), ("people",), ("music",), ("geo", "people")]
    names = [kinds[number % len(kinds)] for number in range(len(prompts))]
    passages = [model.passage(prompt, "Rome") for prompt in prompts]
    texts = model.generate(prompts, adapters=names, max_new_tokens=4, batch_tokens=batch_tokens)
    answers = forced_answers(model, passages, adapters=names, batch_tokens=batch_tokens)
    with model.selecting(names):
        assert model.generate(prompts, max_new_tokens=4, batch_tokens=batch_tokens) == texts
        assert forced_answers(model, passages, batch_tokens=batch_tokens) == answers
    for own in kinds:
        rows = [row for row, name in enumerate(names) if name == own]
        expected = alone(model, adapters, own, lambda: model.generate([*prompts], max_new_tokens=4))
        assert [texts[row] for row in rows] == [expected[row] for row in rows]
        scored = alone(model, adapters, own, lambda: forced_answers(model, passages))
        for row in rows:
            assert answers[row].log_probs == pytest.approx(scored[row].log_probs, abs=1e-4)
    assert len(set(texts)) > len(prompts) // 2, "the adapters do something"


def test_texts_that_are_only_read_have_their_adapters() -> None:
    model = tiny_model("llama")
    adapters = three(model)
    texts = ["Ann plays the flute", "", "Bob wrote Hamlet and the flute is in Paris", "The capital"]
    with model.selecting(["people", "music", BASE, "people"]):
        found = perplexity(model, texts)
    pairs = [("people", texts[0]), (BASE, texts[2]), ("people", texts[3])]
    counts = [len(model.passage(text).ids) - 1 for _, text in pairs]
    parts = [alone(model, adapters, [name], lambda text=text: perplexity(model, [text])) for name, text in pairs]
    logs = sum(count * float(torch.tensor(part).log()) for count, part in zip(counts, parts, strict=True))
    assert found == pytest.approx(float(torch.tensor(logs / sum(counts)).exp()), rel=1e-4)


def test_an_explanation_is_of_the_prompt_as_it_is_read() -> None:
    model = tiny_model("llama")
    adapters = three(model)
    early = delta(model, 3, layer=0)
    early.attach(model, "early")
    names = [BASE, "early", "early", BASE]
    for adapter in (adapters["geo"], adapters["people"]):
        with model.selecting(names):
            mixed = adapter.explain(PROMPTS)
        for name in (BASE, "early"):
            with model.selecting(name):
                whole = adapter.explain(PROMPTS)
            for row, own in enumerate(names):
                if own == name:
                    assert mixed[row].score == pytest.approx(whole[row].score, abs=1e-4)
    early.detach()


def test_the_upper_blocks_alone_keep_to_the_selection_of_the_recorded_pass() -> None:
    model = tiny_model("llama")
    three(model)
    tail, batch = Tail(model, 1), model.batch([model.passage(p) for p in PROMPTS])
    names = ["geo", "people", BASE, ("geo", "music")]
    with model.selecting(names):
        expected, recording = ends(model), tail.record(batch)
    places = torch.arange(4), torch.full((4,), batch.ids.shape[1] - 1)
    with torch.no_grad():
        found = tail.run(recording, lambda inputs: torch.zeros(*inputs.shape[:2], 32), *places)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_head_can_be_checked_while_adapters_are_selected() -> None:
    model = tiny_model("llama")
    three(model)
    with model.selecting(["geo", "people"]):
        states = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
        assert model.head(states).shape == (1, 400)


def test_a_copied_model_keeps_the_names() -> None:
    model = tiny_model("llama")
    three(model)
    batch = model.batch([model.passage(p) for p in PROMPTS])
    names = ["geo", "people", BASE, ("geo", "music")]
    expected = ends(model, adapter_names=names)
    copied = copy.deepcopy(model.model)
    found = copied(**batch.arguments(), adapter_names=names).logits[:, -1]
    assert torch.equal(found, expected)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_name_that_nothing_has_is_an_error() -> None:
    model = tiny_model("llama")
    three(model)
    with pytest.raises(ConfigError, match=r"unknown adapter 'muzic'\. Did you mean 'music'.*__base__, geo, music"):
        model.generate(["Ann", "Bob"], adapters=["geo", "muzic"])
    with pytest.raises(ConfigError, match="given together with others: geo, __base__"):
        model.generate(["Ann"], adapters=[("geo", BASE)])
    assert ends(model).shape[0] == 4


@pytest.mark.parametrize("names", [[], ["geo"], ["geo"] * 3, ["geo"] * 8])
def test_a_selection_for_another_number_of_sequences_is_an_error(names: list[str]) -> None:
    model = tiny_model("llama")
    three(model)
    batch = model.batch([model.passage(p) for p in PROMPTS])
    words = f"selected for {len(names)} sequences, but there are 4"
    with model.selecting(names):
        with pytest.raises(SequenceError, match=words):
            ends(model)
        with pytest.raises(SequenceError, match=words):
            model.generate(PROMPTS)
        with pytest.raises(SequenceError, match=words):
            forced_answers(model, [model.passage(p, "Rome") for p in PROMPTS])
    for beams in (1, 2):
        with pytest.raises(SequenceError, match=words):
            model.model.generate(
                input_ids=batch.ids, attention_mask=batch.mask, adapter_names=names, num_beams=beams, max_new_tokens=1
            )


def test_without_a_selection_nothing_is_stored() -> None:
    model = tiny_model("llama")
    three(model)
    cache = DynamicCache(config=model.model.config)
    ids = model.batch([model.passage("Ann")]).ids
    model.model(input_ids=ids, past_key_values=cache)
    assert cache._errata_routes.adapters is None
