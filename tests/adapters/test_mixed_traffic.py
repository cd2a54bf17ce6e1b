"""Adapters of every method on one model, and a batch in which each sequence has its own: as if each were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from errata.adapters import AutoAdapter
from errata.editors import editor_class, editor_names
from errata.model import EditableModel
from errata.model.generation import continued
from errata.model.sequences import BASE
from errata.testing import Case
from errata.testing.conformance import _ELSEWHERE, UNRELATED

PARAPHRASE = f"Ann: {_ELSEWHERE.prompt}"
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy without a cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams without a cache": {"num_beams": 3, "use_cache": False},
}


def answers(model: EditableModel, prompts: list[str], **settings: Any) -> list[list[int]]:
    """New tokens of plain `generate` over a left-padded batch."""
    batch = model.batch([model.passage(prompt) for prompt in prompts])
    found: list[list[int]] = continued(model, batch, max_new_tokens=5, min_new_tokens=5, **settings).tolist()
    return found


def logits(model: EditableModel, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.forward(model.batch([model.passage(prompt)])).logits[0, -1]
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_every_sequence_is_answered_as_if_its_own_adapters_were_alone(family: str) -> None:
    case = Case(None, family)  # type: ignore[arg-type]  # only its companions are asked for
    model = case.model()
    methods = [name for name in editor_names() if editor_class(name).unsuitable(model) is None]
    adapters = {name: AutoAdapter.from_pretrained(case.companion(name)) for name in methods}
    traffic: list[tuple[str, tuple[str, ...]]] = [(_ELSEWHERE.prompt, (BASE,)), (UNRELATED[0], (BASE,))]
    for name, other in zip(methods, methods[1:] + methods[:1], strict=True):
        traffic += [
            (_ELSEWHERE.prompt, (name,)),
            (PARAPHRASE, (name,)),
            (UNRELATED[0], (name,)),
            (_ELSEWHERE.prompt, (name, other)),
        ]
    alone: dict[str, list[list[int]]] = {mode: [] for mode in MODES}
    seen = {}
    for prompt, names in traffic:
        attached = [adapters[name] for name in methods if name in names]
        for adapter in attached:
            adapter.attach(model)
        seen[prompt, names] = logits(model, prompt)
        for mode, settings in MODES.items():
            alone[mode] += answers(model, [prompt], **settings)
        for adapter in attached:
            adapter.detach()
    for name in methods:
        adapters[name].attach(model, name)
        moved = seen[_ELSEWHERE.prompt, (name,)] - seen[_ELSEWHERE.prompt, (BASE,)]
        assert float(moved.abs().max()) > 1e-3, f"{name} does nothing"
    prompts, rows = [prompt for prompt, _ in traffic], [names for _, names in traffic]
    for mode, settings in MODES.items():
        found = answers(model, prompts, adapter_names=rows, **settings)
        for (prompt, names), tokens, expected in zip(traffic, found, alone[mode], strict=True):
            assert tokens == expected, f"{prompt!r} with {names}, {mode}"
    for name in methods:  # and one adapter for all
        with model.selecting(name):
            chosen = answers(model, prompts)
        places = [place for place, names in enumerate(rows) if names == (name,)]
        assert [chosen[place] for place in places] == [alone["greedy"][place] for place in places]
