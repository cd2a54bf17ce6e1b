"""WISE's router: how far a side memory would move the layer's output tells whether a prompt is one it was edited for.

    score of a token     ‖φ(W x) − φ((W + Δ) x)‖   with the MLP's nonlinearity φ (WISE's code; its margins are tuned so)
                         ‖Δ x‖                      without (WISE, NeurIPS 2024, equation 3)
    score of a prompt    mean over its tokens
    who answers          of the memories whose score is at least ratio · ε, the one with the largest (WISE), or the one
                         that holds the edit whose key is nearest; ε is the smallest score among a memory's own edits

A key is the layer's input at a prompt's last token. It tells memories apart better than their scores do, which one that
was trained longer has larger throughout.

Besides, a *tombstone* marks the place of an edit that was taken out: a memory does not answer prompts that lie nearer
to a tombstone than to every edit the memory still holds.

Knows tensors. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["SAME_KEY", "Activation", "Score", "Scored", "blocked", "choose", "effects", "key_distances", "last_tokens"]

Activation = Callable[[Tensor], Tensor]
Score = Literal["activated", "linear"]

# Two keys are of the same prompt up to this share of their norm: they are kept in bfloat16, rounded by 0.4 % per entry.
SAME_KEY = 0.01


@dataclass(frozen=True)
class Scored:
    """A prompt as far as it has been read.

    sums, peaks: [rows, memories], of the scores of its tokens; counts: [rows], tokens; last: [rows, D], the layer's
    input at the latest of them; memories: the numbers of the memories that the columns stand for.
    """

    sums: Tensor
    peaks: Tensor
    counts: Tensor
    last: Tensor
    memories: tuple[int, ...]

    def means(self) -> Tensor:
        """[rows, memories]"""
        return self.sums / self.counts.clamp(min=1).unsqueeze(1)


def effects(
    inputs: Tensor, delta: Tensor, outputs: Tensor | None = None, activation: Activation | None = None
) -> Tensor:
    """How far a side memory moves each token, float32: inputs [..., D] and delta [outputs, D] to [...].

    With an activation, `outputs` [..., outputs] are what the base layer gives for these inputs.
    """
    change = inputs @ delta.to(inputs.dtype).T
    if activation is not None:
        assert outputs is not None, "the activated score needs the base layer's outputs"
        change = activation(outputs + change) - activation(outputs)
    norms: Tensor = change.float().norm(dim=-1)
    return norms


def last_tokens(inputs: Tensor, prompt: Tensor, before: Tensor | None) -> Tensor:
    """[rows, D] float32: inputs [rows, columns, D] at each row's last prompt token, `before` where it has none here."""
    rows = torch.arange(len(inputs), device=inputs.device)
    found = inputs[rows, prompt.shape[1] - 1 - prompt.flip(1).long().argmax(dim=1)].float()
    return found if before is None else torch.where(prompt.any(dim=1, keepdim=True), found, before)


def choose(scores: Tensor, thresholds: Tensor, *, preference: Tensor | None = None, growing: bool = False) -> Tensor:
    """Which memory answers each row, [rows], -1 for none; scores [rows, memories], thresholds [memories].

    Args:
        preference: [rows, memories], of which the largest decides among the memories that pass; by default the scores.
        growing: the last memory is the growing one and competes even where it fails its own threshold, so that it can
            keep a memory that passes from answering (the published code does this).
    """
    passes = scores >= thresholds
    contenders = torch.where(passes, scores if preference is None else preference, float("-inf"))
    if growing:
        contenders[:, -1] = scores[:, -1]
    chosen = contenders.argmax(dim=1)
    return torch.where(passes.gather(1, chosen.unsqueeze(1)).squeeze(1), chosen, -1)


def key_distances(queries: Tensor, keys: Tensor) -> Tensor:
    """Euclidean distances [rows, keys] in float32; a row's do not depend on which others are asked with it."""
    return torch.cdist(
        queries.float(), keys.to(queries.device, torch.float32), compute_mode="donot_use_mm_for_euclid_dist"
    )


def blocked(queries: Tensor, held: Tensor, buried: Tensor, radii: Tensor) -> Tensor:
    """[rows], True where a tombstone within its radius is nearer than every edit that is held.

    An edit that stands where a tombstone does wins: it is a newer one of the same prompt.

    Args:
        queries: [rows, D]; held: [n, D], keys of a memory's edits; buried: [t, D], those of tombstones, with radii [t].
    """
    to_buried = key_distances(queries, buried)
    to_buried[to_buried > radii.to(to_buried)] = float("inf")
    to_held = key_distances(queries, held).amin(dim=1)
    nearer: Tensor = to_buried.amin(dim=1) + SAME_KEY * queries.float().norm(dim=1) < to_held
    return nearer
