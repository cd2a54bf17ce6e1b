"""Texts that are put in front of an edit's prompt while it is trained, so that it also holds in other company.

The model writes them itself, with a generator of their own: the same model and seed give the same texts, which are kept
in errata's cache. (The references keep one global list, unseeded, for whatever model comes next.)
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from errata.model import EditableModel
from errata.model.generation import sample
from errata.paths import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["memit_contexts", "rome_contexts", "wise_contexts"]

_MEMIT_SEEDS = ("The", "Therefore", "Because", "I", "You")
_WISE_SEEDS = ("I", "You", "Because", "Yes", "Q: ")
_FORMAT = 1

Writer = Callable[[EditableModel, int], tuple[str, ...]]


def _described(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of all that decides how a tokenizer cuts and joins text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _kept(write: Writer) -> Writer:
    """Written once per model and seed, and read from errata's cache after that."""

    @functools.wraps(write)
    def contexts(model: EditableModel, seed: int) -> tuple[str, ...]:
        parts = {
            "format": _FORMAT,
            "kind": write.__name__,
            "seed": seed,
            "weights": model.fingerprint,
            "dtype": str(model.dtype),
            "tokenizer": _described(model.tokenizer),
        }
        name = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
        place = cache_folder("contexts") / f"{name}.json"
        if place.is_file():
            return tuple(json.loads(place.read_text(encoding="utf-8")))
        with model.bare():  # they belong to the base model, whatever is attached to it
            texts = write(model, seed)
        with suppress(OSError):  # they can be written again: a folder that cannot be written to stops nobody
            place.parent.mkdir(parents=True, exist_ok=True)
            draft = place.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(texts), encoding="utf-8")
            draft.replace(place)
        return texts

    return contexts


@_kept
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


@_kept
def rome_contexts(model: EditableModel, seed: int) -> tuple[str, ...]:
    """Twenty texts as ROME uses them beside the bare prompt: ten of 5 and ten of 10 tokens, top-k 5, from nothing."""
    generator = torch.Generator().manual_seed(seed)
    texts = [sample(model, "", tokens=length, top_k=5, generator=generator) for length in (5, 10) for _ in range(10)]
    return tuple(text.strip() + "." if text.strip() else "The." for text in texts)


@_kept
def memit_contexts(model: EditableModel, seed: int) -> tuple[str, ...]:
    """Five texts as MEMIT and its kin use them beside the bare prompt: a beginning each, continued by ten tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        begin + sample(model, begin, tokens=10, top_k=5, generator=generator).rstrip() + "." for begin in _MEMIT_SEEDS
    )
