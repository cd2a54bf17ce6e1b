"""Models that read the prompt with one stack and write the answer with another (T5, BART).

Layers are those of the **encoder**, as GRACE edits T5: an edit changes what the decoder gets to read. The encoder runs
once per prompt, so a route is decided and used in that one pass; caches, beams and chunks come after it. Prompts are
closed as the tokenizer closes every text, answers end with the end token: that is how these models are trained.

A batch therefore has two grids of columns. `ids`, `mask`, `positions` and `prompt_lengths` count the encoder's, where
prompts and keys stand; `answer_places` counts the decoder's, where answers are predicted.

Knows tokenizers and the conventions of transformers' encoder-decoder classes. Knows nothing of edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from errata.errors import ModelError
from errata.model.probes import probing
from errata.model.tokens import Passage, TokenBatch, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PairBatch", "decoder_start", "encode_pair", "head_inputs", "pad_pairs"]


@dataclass(frozen=True)
class PairBatch(TokenBatch):
    """Prompts for the encoder, with answers for the decoder. All tokens of the encoder are prompt.

    Attributes:
        decoder_ids: [rows, decoder columns], the start token and the answer but for its last token.
        labels: [rows, decoder columns], the answer: what is to be predicted at each column.
        labelled: [rows, decoder columns], False where the row has no answer token any more.
    """

    decoder_ids: Tensor
    labels: Tensor
    labelled: Tensor

    def trunk_arguments(self) -> dict[str, Any]:
        # Encoders count positions themselves, from the first column: rows are padded on the right.
        return {"input_ids": self.ids, "attention_mask": self.mask}

    def arguments(self) -> dict[str, Any]:
        return {**self.trunk_arguments(), "decoder_input_ids": self.decoder_ids, "use_cache": False}

    def generation(self) -> tuple[dict[str, Any], int]:
        return {**self.trunk_arguments(), "decoder_start_token_id": int(self.decoder_ids[0, 0])}, 1

    def next_columns(self) -> Tensor:
        return torch.zeros_like(self.starts)

    def answer_places(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = self.labelled.nonzero(as_tuple=True)
        return rows, columns, self.labels[rows, columns]

    def text_places(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.answer_places()


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Passage:
    """Tokenise a prompt for the encoder and an answer for the decoder, each as a text of its own.

    The answer ends with the end token, so that a model that has learned it also stops behind it.
    """
    ids = tuple(tokenizer(prompt, padding=False)["input_ids"])
    if not answer:
        return Passage(ids, ())
    labels = tuple(tokenizer(text_target=answer.lstrip(), padding=False)["input_ids"])
    end = tokenizer.eos_token_id
    return Passage(ids, labels if end is None or labels[-1:] == (end,) else (*labels, end))


def pad_pairs(passages: Sequence[Passage], pad_id: int, start: int, device: torch.device | None = None) -> PairBatch:
    """Pad passages to one width for the encoder and one for the decoder, both on the right.

    On the right whatever is done with them: nothing is put behind an encoder's rows, and encoders with learned
    positions (BART) have no other way.
    """
    prompts = pad([Passage(p.prompt, ()) for p in passages], pad_id, "right")
    width = max(1, *(len(p.answer) for p in passages))
    labels = torch.full((len(passages), width), pad_id, dtype=torch.long)
    labelled = torch.zeros((len(passages), width), dtype=torch.bool)
    for row, passage in enumerate(passages):
        labels[row, : len(passage.answer)] = torch.tensor(passage.answer, dtype=torch.long)
        labelled[row, : len(passage.answer)] = True
    first = torch.full((len(passages), 1), start, dtype=torch.long)
    decoder_ids = torch.cat([first, labels[:, :-1]], dim=1)
    batch = PairBatch(
        prompts.ids, prompts.mask, prompts.positions, prompts.prompt_lengths, prompts.starts,
        decoder_ids=decoder_ids, labels=labels, labelled=labelled,
    )  # fmt: skip
    return batch if device is None else batch.to(device)


def decoder_start(model: PreTrainedModel) -> int:
    """The token every answer begins after, as `generate` finds it. Raises ModelError if the model names none."""
    configs = (model.generation_config, model.config)
    for name in ("decoder_start_token_id", "bos_token_id"):
        for config in configs:
            found = getattr(config, name, None)
            if isinstance(found, int):
                return found
    raise ModelError(
        f"{type(model).__name__} names no token its decoder begins with; set decoder_start_token_id in its config"
    )


class _HeadReached(Exception):
    """All but the vocabulary head has run."""


def head_inputs(model: PreTrainedModel, head: str, **arguments: Any) -> Tensor:
    """What the vocabulary head is given in one call of the model, [rows, decoder columns, hidden]; it is not run."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append(args[0])
        raise _HeadReached

    with probing(model, before={head: stop}), suppress(_HeadReached):
        model(**arguments)
    return found[0]
