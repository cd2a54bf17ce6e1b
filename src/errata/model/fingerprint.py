"""A fingerprint of a model's weights: equal for equal weights, whatever device they are on.

Every parameter is rounded to bfloat16 and read as integers; two integer sums per parameter, one of them weighted by
position, are exact on any device and independent of the order of summation. One changed weight (beyond bf16
rounding) gives another fingerprint.

Of precision it is independent only as far as loading loses nothing that bfloat16 can hold: a checkpoint has the same
fingerprint in float32 and bfloat16, but in float16 very small weights lose digits (and float32 weights are rounded
twice), so there it has another, and so do the adapters that are made with it.
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
