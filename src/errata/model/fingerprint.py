"""A fingerprint of a model's weights: equal for equal weights, whatever device or precision they are loaded in.

Every parameter is rounded to bfloat16 and read as integers; two integer sums per parameter, one of them weighted by
position, are exact on any device and independent of the order of summation. A bf16 checkpoint therefore has the
same fingerprint when loaded in float32, and one changed weight (beyond bf16 rounding) gives another.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

__all__ = ["weights_fingerprint"]

_BLOCK = 1 << 24
_PRIME = 65_521


def _checksums(parameter: Tensor) -> tuple[int, int]:
    plain, weighted = 0, 0
    flat = parameter.detach().reshape(-1)
    for start in range(0, flat.numel(), _BLOCK):
        values = flat[start : start + _BLOCK].to(torch.bfloat16).view(torch.int16).to(torch.int64)
        places = torch.arange(start, start + values.numel(), device=values.device) % _PRIME + 1
        plain += int(values.sum())
        weighted += int((values * places).sum())
    return plain, weighted


def weights_fingerprint(model: nn.Module, prefix: str = "") -> str:
    """Hex digest over names, shapes and values of the parameters whose name begins with `prefix`."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        if name.startswith(prefix):
            digest.update(f"{name} {tuple(parameter.shape)} {_checksums(parameter)}\n".encode())
    return digest.hexdigest()
