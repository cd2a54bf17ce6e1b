"""What fine-tuning methods minimise. Knows logits and labels, no model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["target_loss"]


def target_loss(logits: Tensor, labels: Tensor, rows: Tensor, edits: int) -> Tensor:
    """Cross-entropy of the target tokens: the mean over each edit's own, and then over edits.

    So a long target weighs no more than a short one.

    Args:
        logits: [tokens, vocabulary]; labels: [tokens]; rows: [tokens], which edit each belongs to.
    """
    losses = F.cross_entropy(logits.float(), labels.to(logits.device), reduction="none")
    rows = rows.to(losses.device)
    counts = torch.bincount(rows, minlength=edits).clamp(min=1)
    return (torch.zeros(edits, device=losses.device).index_add(0, rows, losses) / counts).mean()
