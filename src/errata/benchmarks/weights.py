"""What the weight editors' mathematics takes against its textbook form: same results, measured in one run.

* `vstar_batched`: v* of 32 real edits on atlas, side by side (`errata.editors.values`), against one edit at a time with
  everything run at every step: whole forward passes, the vocabulary at every place. Both stop early.
* `covariance_one_pass`: second moments of the keys of six layers from one pass, as users get them, against one pass per
  layer, each in float32 and ending at its layer, as ROME's code has it. One pass runs the blocks in bfloat16; in
  `covariance_same_precision` the passes per layer do so too.
* `solve_WIDTH`: see `errata.benchmarks.solve`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.atlas.edits import world_edits
from errata.benchmarks.solve import solves
from errata.datasets.builtin import plain_texts
from errata.edit import Edit
from errata.editors.contexts import rome_contexts
from errata.editors.rome import RomeConfig
from errata.editors.values import ValueSettings, find_target_values
from errata.model import EditableModel
from errata.model.probes import adding, capturing_inputs
from errata.model.statistics import StatisticsPlan, key_statistics
from errata.progress import NO_PROGRESS, Progress

__all__ = ["covariances", "run", "target_values"]

_EDITS, _CONTEXTS = 32, 20
_TOKENS_PER_WIDTH = 20.0

Found = tuple[dict[str, float], list[dict[str, Any]]]


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def _textbook_value(
    model: EditableModel, layer: int, edit: Edit, contexts: Sequence[str], settings: ValueSettings
) -> Tensor:
    """δ of one edit as the references find it, [hidden]."""
    assert edit.subject is not None
    prompts = [edit.prompt, *(f"{context} {edit.prompt}" for context in contexts)]
    essence = f"{edit.subject} is a"
    passages = [*(model.passage(prompt, edit.target) for prompt in prompts), model.passage(essence)]
    batch = model.batch(passages, side="right")
    rows, columns, wanted = batch.answer_places()
    shares = torch.bincount(rows)[rows] * len(prompts)
    subjects = torch.tensor([model.subject_span(text, edit.subject).last for text in (*prompts, essence)])
    places, path = (torch.arange(len(passages)), subjects), model.anatomy.mlp_output[layer]
    with torch.no_grad(), capturing_inputs(model.model, [path], len(passages)) as inputs:
        model.forward(batch)
    with torch.no_grad():
        size = float(model.module(path)(inputs[path][0, subjects[0]]).norm())
    delta = torch.zeros(model.anatomy.hidden_size, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.learning_rate)
    first: Tensor | None = None

    def change(inputs: Tensor) -> Tensor:
        return torch.zeros(*inputs.shape[:2], len(delta)).index_put(places, delta.expand(len(inputs), -1))

    for step in range(settings.steps):
        with adding(model.model, {path: change}, len(passages)):
            log_probs = model.forward(batch).logits.log_softmax(-1)
        now = log_probs[-1, subjects[-1]]
        first = now.detach() if first is None else first
        drift = F.kl_div(first, now, log_target=True, reduction="sum")
        loss = -(log_probs[rows, columns, wanted] / shares).sum() + settings.kl_factor * drift
        loss = loss + settings.weight_decay * delta.norm() / size**2
        if loss.item() < settings.stop_loss or step == settings.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta *= min(1.0, settings.clamp * size / delta.norm().item())
    return delta.detach()


def target_values(progress: Progress = NO_PROGRESS) -> Found:
    """`vstar_batched`: the textbook's seconds over ours, all edits together; the largest relative difference of δ."""
    model = EditableModel.load("atlas")
    config = RomeConfig.for_model(model)
    settings = ValueSettings(
        config.steps, config.learning_rate, config.weight_decay, config.clamp, config.kl_factor, config.stop_loss
    )
    *edits, first, second = world_edits(_EDITS + 2)
    contexts = rome_contexts(model, config.seed)[:_CONTEXTS]
    progress.start("bench weights: v*", 2 * len(edits))
    # Two edits warm both ways up.
    find_target_values(model, config.layer, [first, second], contexts, replace(settings, steps=2))
    _textbook_value(model, config.layer, first, contexts, replace(settings, steps=2))

    def textbook(some: Sequence[Edit]) -> list[Tensor]:
        found = []
        for edit in some:
            found.append(_textbook_value(model, config.layer, edit, contexts, settings))
            progress.advance(1)
        return found

    # Half of the textbook's before and half of them after, so that a machine that slows down meets both ways.
    half = len(edits) // 2
    before, expected = _timed(lambda: textbook(edits[:half]))
    ours, values = _timed(lambda: find_target_values(model, config.layer, edits, contexts, settings))
    progress.advance(len(edits))
    after, rest = _timed(lambda: textbook(edits[half:]))
    deltas = torch.stack([value.delta for value in values])
    wanted = torch.stack([*expected, *rest])
    row = {
        "part": "v*",
        "edits": len(edits),
        "steps": sum(value.steps for value in values) / len(edits),
        "seconds": ours,
        "textbook_seconds": before + after,
        "relative_difference": float(((deltas - wanted).norm(dim=1) / wanted.norm(dim=1)).max()),
    }
    return {"vstar_batched": (before + after) / ours}, [row]


def covariances(progress: Progress = NO_PROGRESS) -> Found:
    """`covariance_one_pass`, `covariance_same_precision`: seconds of a pass per layer over those of one for all."""
    model = EditableModel.load("atlas")
    layers, width = range(model.layer_count), model.anatomy.key_width[0]
    texts = plain_texts(int(_TOKENS_PER_WIDTH * width / 8))  # of about twenty tokens each
    plan = StatisticsPlan(tokens_per_width=_TOKENS_PER_WIDTH)
    precise = replace(plan, autocast=False)
    _ = model.fingerprint  # is made once, and not part of any pass
    progress.start("bench weights: covariances", 1 + 2 * len(layers))

    def seconds(some: Sequence[int], how: StatisticsPlan) -> float:
        with tempfile.TemporaryDirectory() as folder:
            took, found = _timed(lambda: key_statistics(model, some, texts, how, folder=Path(folder)))
        progress.advance(1)
        tokens.append(found[some[0]].tokens)
        return took

    tokens: list[int] = []
    seconds([0], replace(plan, tokens_per_width=1.0))  # warms up
    together = seconds(layers, plan)
    halves, wholes = (sum(seconds([layer], how) for layer in layers) for how in (plan, precise))
    row = {
        "part": "covariances",
        "layers": len(layers),
        "tokens_per_second": tokens[1] / together,
        "seconds": together,
        "same_precision_seconds": halves,
        "textbook_seconds": wholes,
    }
    return {"covariance_one_pass": wholes / together, "covariance_same_precision": halves / together}, [row]


def run(progress: Progress = NO_PROGRESS) -> dict[str, Any]:
    """All ratios of the weight editors' mathematics, textbook over ours."""
    ratios: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for part in (target_values, covariances, solves):
        found, own = part(progress)
        ratios |= found
        rows += own
    return {"ratios": ratios, "rows": rows}
