"""A model again, for another thread: what is its own, and what it shares."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from errata.adapters import PoolAdapter
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.testing import tiny_model

PROMPTS = ["Ann was born in", "The capital of France is", "Where was Bob born?"]


def test_a_copy_says_the_same_on_the_same_weights() -> None:
    model = tiny_model("llama")
    said = model.generate(PROMPTS, max_new_tokens=4)
    made = model.copy()
    pairs = zip(model.model.parameters(), made.model.parameters(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs), "a copy costs no memory"
    assert made.fingerprint == model.fingerprint
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda one: one.generate(PROMPTS, max_new_tokens=4), (model, made))) == [said, said]


def test_what_is_attached_to_a_copy_does_not_touch_the_model() -> None:
    model = tiny_model("llama")
    said = model.generate(PROMPTS, max_new_tokens=4)
    made = model.copy()
    adapter = PoolAdapter.for_model(made, "", {}, slots=4, new=2, seed=0)
    adapter.update(torch.randn(model.layer_count, 2, model.anatomy.hidden_size), "a text")
    adapter.attach(made, "pool")
    assert made.generate(PROMPTS, max_new_tokens=4) != said
    assert model.generate(PROMPTS, max_new_tokens=4) == said
    assert model.adapters == {}
    assert isinstance(made, EditableModel)
    with pytest.raises(ConfigError, match="detach pool from the model before it is copied"):
        made.copy()
