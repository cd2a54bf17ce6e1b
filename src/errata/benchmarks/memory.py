"""What a memory pool costs: an update beside a forward pass, reading beside no pool, many pools beside one at a time.

A random Llama of 12 blocks and hidden size 512, K = 64. One update should cost about a forward pass of the text and K
tokens more, whatever the pool holds. Each thing takes its turn with what it is compared with, in every round; seconds
are those of this thread, and ratios are of medians.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from errata.adapters import PoolAdapter
from errata.benchmarks.models import random_llama
from errata.editors.compression import Compression
from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress

__all__ = ["run"]

_NEW, _TEXT, _PROMPT, _WRITTEN = 64, 256, 32, 16  # tokens
_SIZES = (480, 1920, 7680)  # slots per layer
_POOLS = 16
_ROUNDS = 7


def _taking_turns(works: Mapping[str, Callable[[], Any]], progress: Progress, of: str) -> dict[str, float]:
    """Median seconds of each, after one turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    progress.start(f"bench memory: {of}", _ROUNDS + 1)
    for turn in range(_ROUNDS + 1):
        for name, work in works.items():
            began = time.thread_time()
            work()
            if turn:
                seconds[name].append(time.thread_time() - began)
        progress.advance()
    return {name: statistics.median(found) for name, found in seconds.items()}


def _ids(count: int, generator: torch.Generator) -> list[int]:
    found: list[int] = torch.randint(10, 1000, (count,), generator=generator).tolist()
    return found


def _pool(model: EditableModel, slots: int, generator: torch.Generator, seed: int = 0) -> PoolAdapter:
    """A full pool of random states."""
    adapter = PoolAdapter.for_model(model, "", {}, slots=slots, new=_NEW, seed=seed)
    tensors, state = adapter.pool.state()
    states = torch.randn(tensors["states"].shape, generator=generator)
    full = {"states": states, "born": torch.ones_like(tensors["born"])}
    adapter.pool.put_back({**tensors, **full}, {**state, "updates": 1, "texts": {"1": "a text"}})
    return adapter


@torch.no_grad()
def _forward(model: EditableModel, ids: Sequence[int]) -> None:
    model.module(model.anatomy.trunk)(input_ids=torch.tensor([list(ids)]), use_cache=False)


@torch.no_grad()
def _write(model: EditableModel, ids: Sequence[int]) -> None:
    """A prompt is read, and tokens are written behind it."""
    found = model.model(torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1)
    for _ in range(_WRITTEN):
        token = found.logits[:, -1].argmax(dim=-1, keepdim=True)
        found = model.model(token, past_key_values=found.past_key_values, use_cache=True)


def run(progress: Progress = NO_PROGRESS, sizes: Sequence[int] = _SIZES, pools: int = _POOLS) -> dict[str, Any]:
    """Ratios of seconds: an update over a forward pass of the text, and over one of the text and K tokens; writing with
    a pool over writing without, per size; updates of many pools one by one over the same side by side.

    Args:
        sizes: slots per layer, ascending.
        pools: that are updated side by side, with texts of the length of a statement.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(0)
        model = random_llama(12, 512)
        compression = Compression(model)
        rows: list[dict[str, Any]] = []
        ratios: dict[str, float] = {}
        text = _ids(_TEXT, generator)
        longer = [*text, *_ids(_NEW, generator)]
        for size in sizes:
            pool = _pool(model, size, generator)
            works: dict[str, Callable[[], Any]] = {
                "forward": functools.partial(_forward, model, text),
                "forward_and_new": functools.partial(_forward, model, longer),
                "update": functools.partial(compression.inject, [pool], [("text", text)], _TEXT),
            }
            found = _taking_turns(works, progress, f"updates of {size:,} slots")
            rows.append({"part": "update", "slots": size, **found})
        ratios["update_vs_forward"] = rows[-1]["update"] / rows[-1]["forward"]
        ratios["update_vs_forward_and_new"] = rows[-1]["update"] / rows[-1]["forward_and_new"]
        prompt = _ids(_PROMPT, generator)
        for size in sizes:
            pool = _pool(model, size, generator)

            def reading(pool: PoolAdapter = pool) -> None:
                pool.attach(model)
                _write(model, prompt)
                pool.detach()

            found = _taking_turns(
                {"without": lambda: _write(model, prompt), "with": reading}, progress, f"reading {size:,}"
            )
            rows.append({"part": "read", "slots": size, **found})
            ratios[f"read_{size}_vs_none"] = found["with"] / found["without"]
        many = [_pool(model, sizes[0], generator, seed) for seed in range(pools)]
        short = [(f"text {number}", _ids(16, generator)) for number in range(pools)]
        turns: dict[str, Callable[[], Any]] = {
            "one_by_one": lambda: [
                compression.inject([one], [own], _TEXT) for one, own in zip(many, short, strict=True)
            ],
            "together": lambda: compression.inject(many, short, _TEXT),
        }
        found = _taking_turns(turns, progress, f"{pools} pools")
        rows.append({"part": "pools", "pools": pools, **found})
        ratios["together_vs_one_by_one"] = found["one_by_one"] / found["together"]
    finally:
        torch.set_num_threads(threads)
    return {"ratios": ratios, "rows": rows}
