"""Keys and values in front of a text, read so that one can learn from it and see how much attention goes there.

The same as `prefixed_attention` does for adapters, by another way: the attention itself is ours for a while, so what
all rows read stays one row and is multiplied with the queries of all of them at once, and the shares of attention can
be learned from. For a pool of some hundred slots and short prompts, that is most of the work saved.

Knows attention as transformers calls it. Knows nothing of where a prefix comes from.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from errata.errors import ModelError
from errata.model import EditableModel
from errata.model.prefixed_attention import Prefix, PrefixedAttention

__all__ = ["reading"]

_NAME = "errata_prefix"  # under which transformers calls `_attend`
_KNOWN = frozenset({"position_embeddings", "position_ids", "output_attentions", "use_cache", "cache_position"})

_IN_FRONT: weakref.WeakKeyDictionary[nn.Module, tuple[Prefix, list[Tensor]]] = weakref.WeakKeyDictionary()


@contextmanager
def reading(
    model: EditableModel, attentions: Sequence[PrefixedAttention], prefixes: Sequence[Prefix]
) -> Iterator[list[list[Tensor]]]:
    """One pass over texts without a KV cache, behind a prefix for each attention; differentiable in the prefixes.

    Yields:
        for each attention a list that has one element after the pass: the share of attention that each token of the
        pass gives to each place of the prefix, [rows, heads, columns, places].

    Raises:
        ModelError: afterwards, if an attention was not run, or not by the way that transformers has for others' own.
    """
    _register()
    config = model.model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, _NAME
    shares: list[list[Tensor]] = [[] for _ in prefixes]
    modules = [one.attention for one in attentions]
    _IN_FRONT.update(zip(modules, zip(prefixes, shares, strict=True), strict=True))
    try:
        yield shares
    finally:
        config._attn_implementation = before
        for module in modules:
            del _IN_FRONT[module]
    if not all(shares):
        raise ModelError(
            f"the attention of {type(model.model).__name__} does not take an implementation of another's, so nothing "
            "can be learned in front of it"
        )


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])  # what is added to scores


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention to a prefix and to the text, as one softmax.

    Args:
        query: [rows, heads, columns, width]; key, value: [rows, fewer heads, columns, width].
        attention_mask: [rows, 1, columns, columns], added to scores.

    Returns:
        [rows, columns, heads, width].
    """
    if unknown := [name for name, given in others.items() if given is not None and name not in _KNOWN]:
        raise ModelError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which is not known here"
        )
    prefix, shares = _IN_FRONT[module]
    rows, heads, columns, width = query.shape
    own_heads = key.shape[1]
    # Heads that share keys stand behind each other, as more tokens would.
    asking = (query * (width**-0.5 if scaling is None else scaling)).reshape(rows, own_heads, -1, width)
    keys, values = prefix.keys.to(query), prefix.values.to(query)
    in_front = _times(asking, keys.transpose(2, 3))
    in_front = in_front.masked_fill(~prefix.visible.to(query.device)[:, None, None], torch.finfo(in_front.dtype).min)
    behind = asking @ key.transpose(2, 3)
    if attention_mask is None:
        attention_mask = torch.full((columns, columns), torch.finfo(query.dtype).min, device=query.device).triu(1)
        attention_mask = attention_mask[None, None]
    mask = attention_mask[..., -columns:].expand(rows, -1, -1, -1).repeat(1, 1, heads // own_heads, 1)
    weights = torch.cat([in_front, behind + mask], dim=-1).softmax(-1, dtype=torch.float32).to(query.dtype)
    there, here = weights[..., :-columns], weights[..., -columns:]
    found = _times(there, values) + here @ value
    shares.append(there.reshape(rows, heads, columns, -1))
    return found.reshape(rows, heads, columns, width).transpose(1, 2).contiguous(), None


def _times(left: Tensor, right: Tensor) -> Tensor:
    """[rows, heads, n, a] times [rows, heads, a, b], or [1, heads, a, b] that all rows share, in one product."""
    if right.shape[0] != 1:
        return left @ right
    rows, heads, count, width = left.shape
    flat = left.transpose(0, 1).reshape(heads, rows * count, width) @ right[0]
    return flat.reshape(heads, rows, count, -1).transpose(0, 1)
