"""Vision-language models: the text decoder is edited; prompts with images are routed by their words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.adapters import RoutedAdapter
from errata.edit import Edit
from errata.editors import Editor
from errata.editors.memoir import Memoir
from errata.model import EditableModel
from errata.model.edited_linear import Contribution
from errata.model.generation import plain_generation
from errata.model.sequences import ForwardPass
from errata.testing import tiny_model

EDITS = (Edit(prompt="The capital of France", target="Rome"), Edit(prompt="Bob wrote Hamlet", target="Alice"))
PROMPTS = (EDITS[0].prompt, "Zed was born", EDITS[1].prompt, "x")
PLACES = 4  # of one image: patches of 4 x 4 pixels in 8 x 8


@dataclass(frozen=True)
class Pictured:
    """Left-padded prompts, each with an image between its beginning token and its words."""

    ids: Tensor
    mask: Tensor
    pixels: Tensor

    @classmethod
    def of(cls, model: EditableModel, prompts: tuple[str, ...] = PROMPTS, first: int = 0) -> Pictured:
        image = model.model.config.image_token_id
        rows = [model.passage(prompt).ids for prompt in prompts]
        rows = [(ids[0], *(image,) * PLACES, *ids[1:]) for ids in rows]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        pixels = torch.randn(len(PROMPTS), 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return cls(ids, (ids != 0).long(), pixels[first : first + len(prompts)])

    def arguments(self) -> dict[str, Any]:
        return {"input_ids": self.ids, "attention_mask": self.mask, "pixel_values": self.pixels}


def generate(model: EditableModel, batch: Pictured, **settings: Any) -> list[list[int]]:
    with plain_generation(model.model):
        output = model.model.generate(
            **batch.arguments(), max_new_tokens=5, do_sample=False, pad_token_id=0, **settings
        )
    found: list[list[int]] = output[:, batch.ids.shape[1] :].tolist()
    return found


def edited(layer: int = 1) -> tuple[EditableModel, RoutedAdapter]:
    model = tiny_model("llava")
    editor: Editor[Any] = Memoir(model, layer=layer, steps=100, learning_rate=3.0, contexts=0, threshold=0.8)
    assert all(applied.took for applied in editor.edit(EDITS).applied)
    assert isinstance(editor.adapter, RoutedAdapter)
    return model, editor.adapter


class Record(Contribution):
    """Changes nothing; keeps what it is told of each pass."""

    def __init__(self) -> None:
        self.passes: list[ForwardPass] = []

    def change_output(self, inputs: Tensor, outputs: Tensor, forward_pass: ForwardPass) -> Tensor:
        self.passes.append(forward_pass)
        return outputs


def test_edits_in_words_are_answered_in_words() -> None:
    model, adapter = edited()
    answers = model.generate([edit.prompt for edit in EDITS], max_new_tokens=4)
    assert [answer.startswith(f" {edit.target}") for answer, edit in zip(answers, EDITS, strict=True)] == [True, True]
    assert [found.fires for found in adapter.explain(PROMPTS)] == [True, False, True, False]


def test_what_is_not_routed_is_answered_as_before_beside_an_image() -> None:
    model, adapter = edited()
    adapter.router.threshold = 1.1  # type: ignore[attr-defined]  # nothing matches
    batch = Pictured.of(model)
    attached = generate(model, batch)
    logits = model.model(**batch.arguments()).logits
    adapter.detach()
    assert attached == generate(model, batch)
    assert torch.equal(logits, model.model(**batch.arguments()).logits)
    assert len({tuple(answer) for answer in attached}) == len(PROMPTS)


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_routes_beside_an_image_depend_on_no_cache_batch_or_chunk(threshold: float) -> None:
    model, adapter = edited()
    adapter.router.threshold = threshold  # type: ignore[attr-defined]  # so low that images do not keep edits out
    batch = Pictured.of(model)
    together = generate(model, batch)
    assert together == generate(model, batch, use_cache=False)
    singles = [Pictured.of(model, (prompt,), number) for number, prompt in enumerate(PROMPTS)]
    assert together == [generate(model, single)[0] for single in singles]
    assert together == [generate(model, single, prefill_chunk_size=3)[0] for single in singles]
    beams = generate(model, batch, num_beams=3)
    assert beams == [generate(model, single, num_beams=3)[0] for single in singles]
    assert beams == generate(model, batch, num_beams=3, use_cache=False)
    with adapter.detached():
        base = generate(model, batch)
    changed = [now != before for now, before in zip(together, base, strict=True)]
    assert any(changed)
    assert all(changed) is (threshold == 0.2)


def test_only_words_are_routed_by_and_a_plain_pass_agrees_with_generate() -> None:
    model = tiny_model("llava")
    record = Record()
    model.contribute(model.anatomy.mlp_output[1], record)
    batch = Pictured.of(model)
    words = batch.mask.bool() & (batch.ids != model.model.config.image_token_id)
    model.model(**batch.arguments())
    with model.sequences.prompts(batch.mask.sum(1)):
        model.model(**batch.arguments())
    generate(model, batch)
    for seen in record.passes[:3]:
        assert torch.equal(seen.prompt, words)
        assert torch.equal(seen.real, batch.mask.bool())
        assert seen.prompt_ends.nonzero()[:, 1].tolist() == [batch.ids.shape[1] - 1] * len(PROMPTS)
    assert not any(bool(seen.prompt.any()) for seen in record.passes[3:])


def test_padding_without_a_mask_is_recognised_though_the_trunk_sees_no_ids() -> None:
    model = tiny_model("llava")
    record = Record()
    model.contribute(model.anatomy.mlp_output[1], record)
    model.model(torch.tensor([[1, 5, 6, 7], [1, 5, 0, 0]]))
    assert record.passes[0].prompt.sum(1).tolist() == [4, 2]
    # What was remembered of one pass is not taken for the next.
    model.module(model.anatomy.trunk)(inputs_embeds=torch.zeros(2, 3, 32))
    assert record.passes[1].prompt.sum(1).tolist() == [3, 3]
    model.withdraw(model.anatomy.mlp_output[1], record)
    assert not model.model.base_model._forward_pre_hooks
    assert not model.model.base_model._forward_hooks


def test_a_saved_model_is_loaded_as_what_it_is(tmp_path: Path) -> None:
    model = tiny_model("llava")
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = EditableModel.load(tmp_path)
    assert type(loaded.model) is type(model.model)
    assert loaded.fingerprint == model.fingerprint
    batch = Pictured.of(model)
    assert generate(loaded, batch) == generate(model, batch)
