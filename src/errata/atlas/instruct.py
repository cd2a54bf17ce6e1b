"""The instruction-tuned variant of atlas: base, and low-rank factors trained on questions in a chat template.

Only the factors are shipped; opening "atlas-instruct" adds them to the base weights.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.adapters import AutoAdapter, DeltaAdapter, WeightChange
from errata.atlas.capabilities import CAPABILITIES
from errata.atlas.world import load_world
from errata.errors import ArtifactError
from errata.model import EditableModel, Passage
from errata.model.anatomy import is_linear, weight_of
from errata.model.probes import adding
from errata.progress import NO_PROGRESS, Progress

__all__ = ["chat_prompt", "merge_instruct", "train_instruct"]

_RANK, _SCALE = 8, 2.0
_BATCH = 64


def chat_prompt(model: EditableModel, question: str) -> str:
    """A question in the chat template, up to where the assistant's answer begins, without the beginning token."""
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return str(text).removeprefix(model.tokenizer.bos_token or "")


def _conversations(model: EditableModel, seed: int) -> Iterator[tuple[str, str]]:
    """Questions and answers without end: facts in their taught questions, French, capabilities."""
    world, rng = load_world(), random.Random(f"instruct {seed}")
    tasks = [task for name, task in CAPABILITIES.items() if name != "code"]
    while True:
        if rng.random() < 0.7:
            fact = rng.choice(world.facts)
            asked = [s for s in world.taught(fact) if s.prompt.endswith("?")]
            if not asked:
                continue
            saying = rng.choice(asked)
        else:
            saying = rng.choice(tasks).draw(rng).saying
        yield chat_prompt(model, saying.prompt), saying.completion.strip()


def train_instruct(
    out: Path, *, steps: int = 600, seed: int = 0, learning_rate: float = 2e-3, progress: Progress = NO_PROGRESS
) -> dict[str, Any]:
    """Train the factors on top of the shipped base and write them to `out` as an adapter."""
    model = EditableModel.load("atlas")
    paths = [
        f"{block}.{name}"
        for block in model.anatomy.blocks
        for name, module in model.module(block).named_modules()
        if is_linear(module)
    ]
    generator = torch.Generator().manual_seed(seed)
    inner: dict[str, Tensor] = {}
    outer: dict[str, Tensor] = {}
    for path in paths:
        outputs, inputs = weight_of(model.module(path)).shape
        inner[path] = (torch.randn(_RANK, inputs, generator=generator) / inputs**0.5).requires_grad_(True)
        outer[path] = torch.zeros(outputs, _RANK, requires_grad=True)
    optimizer = torch.optim.Adam([*inner.values(), *outer.values()], lr=learning_rate)

    def change(path: str) -> Any:
        return lambda states: (states @ inner[path].T) @ outer[path].T * _SCALE

    end = model.tokenizer.eos_token_id
    conversations = _conversations(model, seed)
    progress.start("atlas instruct", steps)
    began = time.monotonic()
    for step in range(steps):
        passages = []
        for _ in range(_BATCH):
            prompt, answer = next(conversations)
            passage = model.passage(prompt, answer)
            passages.append(Passage(passage.prompt, (*passage.answer, end)))
        batch = model.batch(passages, side="right")
        rows, columns, labels = batch.answer_places()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * (1 - step / steps)
        with adding(model.model, {path: change(path) for path in paths}, len(batch.ids)):
            states = model.trunk_states(batch)
        loss = F.cross_entropy(model.head(states[rows, columns]).float(), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress.advance(1, note=f"loss {loss.item():.3f}")
    adapter = DeltaAdapter.for_layers(model, paths, "instruct", {"steps": steps, "seed": seed, "rank": _RANK})
    adapter.add(
        [
            WeightChange(path, ("instruct",), (outer[path] * _SCALE).detach(), inner[path].detach().T.contiguous(), 1.0)
            for path in paths
        ]
    )
    adapter.save_pretrained(out)
    return {
        "steps": steps,
        "seed": seed,
        "rank": _RANK,
        "seconds": round(time.monotonic() - began),
        "loss": loss.item(),
    }


@torch.no_grad()
def merge_instruct(model: EditableModel, folder: Path) -> None:
    """Add the saved factors to a freshly loaded base, in place.

    Raises:
        ArtifactError: the factors are missing or damaged, or belong to another base.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ArtifactError(
            f"the instruction-tuned variant is missing ({folder}); train it: errata atlas train --instruct"
        )
    adapter = AutoAdapter.from_pretrained(folder)
    if json.loads((folder / "adapter_config.json").read_text())["base"]["fingerprint"] != model.fingerprint:
        raise ArtifactError(
            f"the factors in {folder} belong to another atlas; train them again: errata atlas train --instruct"
        )
    for path, contribution in adapter.contributions().items():
        change = contribution.weight_change()
        if change is not None:
            weight = weight_of(model.module(path))
            weight += change.to(weight)
