"""Texts that are put in front of an edit's prompt while it is trained, so that it also holds in other company.

The model writes them itself, with a generator that is passed: the same model and seed give the same texts, and two
editors in one process share nothing. (The references keep one global list, unseeded, for whatever model comes next.)
"""

from __future__ import annotations

import torch

from errata.model import EditableModel
from errata.model.generation import sample

__all__ = ["memit_contexts", "rome_contexts", "wise_contexts"]

_MEMIT_SEEDS = ("The", "Therefore", "Because", "I", "You")
_WISE_SEEDS = ("I", "You", "Because", "Yes", "Q: ")


def wise_contexts(model: EditableModel, seed: int) -> tuple[str, ...]:
    """Ten texts as WISE and MEMOIR use them: five beginnings, each continued by 5 and by 10 tokens.

    (The WISE paper says ten of length ten; its code, followed here, makes five of each length.)
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        begin + sample(model, begin, tokens=length, top_k=20, generator=generator)
        for length in (5, 10)
        for begin in _WISE_SEEDS
    )


def rome_contexts(model: EditableModel, seed: int) -> tuple[str, ...]:
    """Twenty texts as ROME uses them beside the bare prompt: ten of 5 and ten of 10 tokens, top-k 5, from nothing."""
    generator = torch.Generator().manual_seed(seed)
    texts = [sample(model, "", tokens=length, top_k=5, generator=generator) for length in (5, 10) for _ in range(10)]
    return tuple(text.strip() + "." if text.strip() else "The." for text in texts)


def memit_contexts(model: EditableModel, seed: int) -> tuple[str, ...]:
    """Five texts as MEMIT and its kin use them beside the bare prompt: a beginning each, continued by ten tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        begin + sample(model, begin, tokens=10, top_k=5, generator=generator).rstrip() + "." for begin in _MEMIT_SEEDS
    )
