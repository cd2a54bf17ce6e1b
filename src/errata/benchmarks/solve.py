"""The change of weight for a batch of facts: our solve against the textbook's, at the key widths of large models.

Textbook is MEMIT as its code has it, `solve(λ C + K Kᵀ, K)` in all dimensions of the key, for every batch and layer.
Ours uses the Cholesky factor of C, which is made once per model and layer; what that takes is reported beside. Random
numbers in float64 serve as well as a model's.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from errata.editors.solving import solve
from errata.model.statistics import KeyStatistics
from errata.progress import NO_PROGRESS, Progress

__all__ = ["WIDTHS", "solves"]

WIDTHS = (14336, 16384)  # Llama 3 8B, GPT-J 6B
_EDITS, _OUTPUTS, _WEIGHT, _REPEATS = 32, 64, 15000.0, 3


def solves(progress: Progress = NO_PROGRESS, widths: tuple[int, ...] = WIDTHS) -> tuple[dict[str, float], list[Any]]:
    """`solve_WIDTH`: the textbook's seconds over ours, 32 facts at once; and a row per width.

    Takes 32 bytes of memory per entry of C: about 8.6 GB at 16384.
    """
    progress.start("bench solve", len(widths))
    rows = []
    for width in widths:
        rows.append(_row(width))
        progress.advance(1)
    return {f"solve_{row['width']}": row["textbook_seconds"] / row["seconds"] for row in rows}, rows


def _row(width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # As of keys: a few strong directions above a floor.
    strong, residual, keys = noise(width, 256), noise(_OUTPUTS, _EDITS), noise(width, _EDITS)
    moment = strong @ strong.T / 256
    moment.diagonal().add_(1e-2)
    began = time.perf_counter()
    statistics = KeyStatistics.of(0, moment, torch.zeros(width, dtype=torch.float64), 20 * width, 0.0)
    factored = time.perf_counter() - began
    ours = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        found = solve(residual, keys, statistics.solve, _WEIGHT)
        ours.append(time.perf_counter() - began)
    del statistics
    began = time.perf_counter()
    adjusted = torch.linalg.solve(_WEIGHT * moment + keys @ keys.T, keys)
    textbook = time.perf_counter() - began
    expected = residual @ adjusted.T
    difference = float((found.left @ found.right.T - expected).norm() / expected.norm())
    return {
        "width": width,
        "edits": _EDITS,
        "seconds": min(ours),
        "textbook_seconds": textbook,
        "factor_seconds": factored,
        "relative_difference": difference,
    }
