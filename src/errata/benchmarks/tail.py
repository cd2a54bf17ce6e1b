"""Training an edit on the blocks above it against training it through whole forward passes: same code, same result.

Two models: atlas (six blocks, the memory beside the fifth) and a random Llama of 24 blocks and hidden size 256, with
the memory beside several blocks of its upper third. Both ways run alternately, a few edits each, without early
stopping, so that both take the same steps; the median over edits is compared.

How much the tail can save follows from the depth: whole passes run every block forward, and both ways run the blocks
above the layer forward and back. With n of them, whole rows could not give more than (24 + n) / 2n; that the tail runs
the answers' places alone comes on top.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from errata.atlas.edits import world_edits
from errata.benchmarks.models import random_llama
from errata.editors.memoir import Memoir
from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress

__all__ = ["run"]

_EDITS, _STEPS = 6, 25
# Of the deep model: where its upper third begins, MEMOIR's relative depth (27 of 32), and the deepest published for
# routed memories (WISE, 29 of 32), whose ratio is the one that is named.
_DEEP_LAYERS = (16, 20, 22)


def _compare(name: str, model: EditableModel, layer: int, progress: Progress) -> dict[str, Any]:
    edits = world_edits(_EDITS + 1)
    ways = {}
    for full in (False, True):
        settings: dict[str, Any] = {"steps": _STEPS, "stop_loss": 0.0, "relative_threshold": 0.5, "layer": layer}
        ways[full] = Memoir(model, full_forward=full, **settings)
        ways[full].prepare()
        ways[full].adapter.detach()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    progress.start(f"bench tail: {name}, layer {layer}", len(edits))
    for number, edit in enumerate(edits):
        for full, editor in ways.items():
            editor.adapter.attach(model)
            began = time.perf_counter()
            editor.edit([edit])
            if number:  # the first edit warms both ways up
                seconds[full].append(time.perf_counter() - began)
            editor.adapter.detach()
        progress.advance(1)
    prompts = [model.passage(edit.prompt) for edit in edits]
    logits = {}
    for full, editor in ways.items():
        editor.adapter.attach(model)
        with torch.no_grad():
            logits[full] = model.forward(model.batch(prompts)).logits
        editor.adapter.detach()
    tail, whole = statistics.median(seconds[False]), statistics.median(seconds[True])
    return {
        "model": name,
        "blocks": model.layer_count,
        "layer": layer,
        "tail_seconds_per_edit": tail,
        "full_seconds_per_edit": whole,
        "ratio": whole / tail,
        "largest_difference_of_logits": float((logits[False] - logits[True]).abs().max()),
    }


def run(progress: Progress = NO_PROGRESS) -> dict[str, Any]:
    """Ratios full / tail: how many times faster an edit is through the tail."""
    rows = [_compare("atlas", EditableModel.load("atlas"), 4, progress)]
    deep = random_llama(24, 256, "eager")
    name = "random Llama, 24 blocks, hidden size 256"
    rows += [_compare(name, deep, layer, progress) for layer in _DEEP_LAYERS]
    return {"ratios": {"tail_vs_full": rows[0]["ratio"], "tail_vs_full_24": rows[-1]["ratio"]}, "rows": rows}
