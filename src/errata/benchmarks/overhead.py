"""What an attached routed adapter costs while text is read and written, with up to a million stored entries.

A random Llama of 24 blocks and hidden size 512, MEMOIR's router and memory beside block 20. Traffic either hits, each
prompt being stored, or misses. The model without the adapter takes its turn in every round, and reading the prompt and
writing are timed apart: the route is decided while the prompt is read, and writing only goes on with it. One sequence
at a time, where a fixed cost per pass weighs most.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from errata.adapters import BaseIdentity, ColumnMemory, RoutedAdapter, RoutedLayer
from errata.atlas.edits import world_edits
from errata.benchmarks.models import random_llama
from errata.benchmarks.routing import SyntheticMasks, fill_store
from errata.model import EditableModel
from errata.model.anatomy import output_width
from errata.model.probes import capturing_inputs
from errata.progress import NO_PROGRESS, Progress
from errata.routing import TopHashRouter, pack, relative_threshold
from errata.routing.index import SHARPEST

__all__ = ["run"]

_SIZES = (0, 1_000, 100_000, 1_000_000)
_LAYER, _SHARE = 20, 4096 / 14336  # MEMOIR's k/D on Llama-3
_ROUNDS, _PROMPT, _ANSWER = 9, 128, 16  # tokens of a prompt, tokens written behind it


def _prompts(model: EditableModel, count: int) -> list[Tensor]:
    """Token ids [1, _PROMPT] of so many prompts, each made of other questions."""
    ids = [i for edit in world_edits(60 * count) for i in model.passage(edit.prompt).ids]
    return [torch.tensor([ids[start : start + _PROMPT]]) for start in range(0, count * _PROMPT, _PROMPT)]


@torch.no_grad()
def _answer(model: EditableModel, prompt: Tensor) -> tuple[float, float]:
    """Seconds of this thread for reading a prompt and for writing behind it, greedily."""
    began = time.thread_time()
    found = model.model(prompt, use_cache=True, logits_to_keep=1)
    read = time.thread_time()
    for _ in range(_ANSWER):
        token = found.logits[:, -1].argmax(dim=-1, keepdim=True)
        found = model.model(token, past_key_values=found.past_key_values, use_cache=True)
    return read - began, time.thread_time() - read


@torch.no_grad()
def _inputs(model: EditableModel, path: str, prompt: Tensor) -> Tensor:
    """What the layer at a path gets to see of a prompt, [1, tokens, D]."""
    with capturing_inputs(model.model, [path], 1) as inputs:
        model.model(prompt)
    return inputs[path]


class _Adapters:
    """Adapters with made-up entries, the first of which are those of prompts that shall hit.

    The permutation and the memory's content are the same for all.
    """

    def __init__(self, model: EditableModel, most: int, hits: Sequence[Tensor], progress: Progress) -> None:
        self._model, self._path = model, model.anatomy.mlp_output[_LAYER]
        width = model.anatomy.key_width[_LAYER]
        generator = torch.Generator().manual_seed(0)
        self._router = TopHashRouter.seeded(width, round(_SHARE * width), generator, "last")
        self._router.threshold = relative_threshold(0.9, self._router.marked, width)
        self._weight = 0.01 * torch.randn(output_width(model.module(self._path)), width, generator=generator)
        made = SyntheticMasks(np.random.default_rng(0), width, self._router.marked)
        self._masks, self._sharpest = fill_store(made, made.prompts(most), progress)
        read = [self._router.gather(_inputs(model, self._path, prompt), prompt >= 0) for prompt in hits]
        features = torch.cat([self._router.features(gathered) for gathered in read])
        self._masks[: len(hits)] = pack(self._router.hash(features))
        self._sharpest[: len(hits)] = features.abs().topk(SHARPEST, dim=1).indices.to(self._sharpest.dtype)

    def of_size(self, size: int) -> RoutedAdapter:
        tensors, settings = self._router.state()
        if size:
            tensors |= {"masks": self._masks[:size], "sharpest": self._sharpest[:size]}
        entries = {"owners": [f"entry-{number}" for number in range(size)], "words": [()] * size}
        router = TopHashRouter.from_state(tensors, {**settings, **entries})
        layer = RoutedLayer(router, ColumnMemory(self._weight))
        return RoutedAdapter(BaseIdentity.of(self._model), "memoir", {}, path=self._path, layer=layer)


def run(progress: Progress = NO_PROGRESS, sizes: Sequence[int] = _SIZES) -> dict[str, Any]:
    """Ratios of throughput with the largest number of entries attached to that of the base, the worse of hit and miss.

    Args:
        sizes: entries to measure at, ascending.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = random_llama(24, 512)
        prompts = _prompts(model, 2 * _ROUNDS)
        hits, misses = prompts[:_ROUNDS], prompts[_ROUNDS:]
        adapters = _Adapters(model, sizes[-1], hits, progress)
        rows = []
        for size in sizes:
            adapter = adapters.of_size(size)
            for traffic, asked in (("hit", hits), ("miss", misses)):
                if size or traffic == "miss":
                    rows.append(_compare(model, adapter, traffic, asked, progress))
    finally:
        torch.set_num_threads(threads)
    largest = [row for row in rows if row["entries"] == sizes[-1]]
    ratios = {
        "decode_1m_vs_base": min(row["decode_vs_base"] for row in largest),
        "prefill_1m_vs_base": min(row["prefill_vs_base"] for row in largest),
    }
    return {"ratios": ratios, "rows": rows}


def _compare(
    model: EditableModel, adapter: RoutedAdapter, traffic: str, prompts: Sequence[Tensor], progress: Progress
) -> dict[str, Any]:
    """One adapter, one kind of traffic. Each prompt is answered without and with it, in alternating order."""
    seconds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    fired = 0
    progress.start(f"bench overhead: {len(adapter.router):,} entries, {traffic}", len(prompts))
    with torch.no_grad():
        adapter.attach(model)
        _answer(model, prompts[0])  # lists and copies that are made at the first use
        adapter.detach()
    for number, prompt in enumerate(prompts):
        for attached in (number % 2 == 0, number % 2 == 1):
            if attached:
                adapter.attach(model)
            seconds[attached].append(_answer(model, prompt))
            adapter.detach()
        route = adapter.router.decide(adapter.router.gather(_inputs(model, adapter.path, prompt), prompt >= 0))
        fired += int(route.entry[0] >= 0)
        progress.advance(1)
    read, write = (
        {way: statistics.median(pair[part] for pair in pairs) for way, pairs in seconds.items()} for part in (0, 1)
    )
    return {
        "entries": len(adapter.router),
        "traffic": traffic,
        "fired": fired / len(prompts),
        "prefill_ms": 1e3 * read[True],
        "prefill_vs_base": read[False] / read[True],
        "decode_ms_per_token": 1e3 * write[True] / _ANSWER,
        "decode_vs_base": write[False] / write[True],
    }
