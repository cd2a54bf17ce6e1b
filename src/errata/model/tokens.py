"""Texts as token ids: prompts, answers behind prompts, and padded batches of them.

Knows tokenizers. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from errata.model.sequences import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Passage", "TokenBatch", "encode_passage", "pad"]


@dataclass(frozen=True)
class Passage:
    """A prompt and the answer behind it as token ids. The prompt's ids are those it has when it stands alone."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt + self.answer


@dataclass(frozen=True)
class TokenBatch:
    """Padded rows, and how a model that reads prompt and answer in one row is called with them.

    Attributes:
        ids, mask, positions: [rows, columns]; mask is 1 on real tokens, positions count them from zero.
        prompt_lengths: [rows], real tokens of each row that are prompt.
        starts: [rows], column of each row's first real token.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    prompt_lengths: Tensor
    starts: Tensor

    def to(self, device: torch.device) -> Self:
        return type(self)(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def of_rows(self, kept: Tensor) -> Self:
        """Some of the rows, kept [rows] bool, as wide as before."""
        return replace(self, **{one.name: getattr(self, one.name)[kept] for one in fields(TokenBatch)})

    def trunk_arguments(self) -> dict[str, Any]:
        """What the trunk is called with for one pass over the batch."""
        return self.arguments()

    def arguments(self) -> dict[str, Any]:
        """What the whole model is called with for one pass over the batch."""
        return {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "use_cache": False,
        }

    def generation(self) -> tuple[dict[str, Any], int]:
        """What `generate` is called with, and how many columns of its result are not new tokens."""
        return {"input_ids": self.ids, "attention_mask": self.mask}, int(self.ids.shape[1])

    def next_columns(self) -> Tensor:
        """Per row, the column of the logits that say what comes first behind the prompt, [rows]."""
        return self.starts + self.prompt_lengths - 1

    def answer_places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and columns of the logits that predict answer tokens, and the tokens they should predict; [n] each."""
        return self._places_from(self.prompt_lengths - 1)

    def saying_places(self) -> tuple[Tensor, Tensor]:
        """Rows and columns from the last token of each prompt on, where what comes next is said; [n] each."""
        rows, columns = (self.mask.bool() & (self.positions >= self.prompt_lengths.unsqueeze(1) - 1)).nonzero(
            as_tuple=True
        )
        return rows, columns

    def text_places(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same for all tokens that are predicted from others, prompt or answer."""
        return self._places_from(torch.zeros_like(self.prompt_lengths))

    def _places_from(self, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places that predict a token, from position `first` [rows] on."""
        predicting = self.mask.bool() & (self.positions >= first.unsqueeze(1))
        predicting[:, :-1] &= self.mask[:, 1:].bool()
        predicting[:, -1] = False
        rows, columns = predicting.nonzero(as_tuple=True)
        return rows, columns, self.ids[rows, columns + 1]


def encode_passage(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Passage:
    """Tokenise a prompt with its answer, one space between them unless the prompt ends in white space.

    The prompt keeps exactly the ids it has alone, because that is what the model will be given; the answer gets the
    ids that follow them in the whole text, or its own when pairs merge across the border.
    """

    def encode(text: str) -> tuple[int, ...]:
        ids = tuple(tokenizer(text, padding=False)["input_ids"])
        # Some tokenizers close every text, but an answer is to follow. (A text may also end in the end token's name.)
        end = tokenizer.eos_token_id
        is_closed = len(ids) > 1 and ids[-1] == end and tokenizer("x", padding=False)["input_ids"][-1] == end
        return ids[:-1] if is_closed else ids

    alone = encode(prompt)
    if not answer:
        return Passage(alone, ())
    answer = answer if prompt[-1:].isspace() or answer[:1].isspace() else " " + answer
    whole = encode(prompt + answer)
    if whole[: len(alone)] == alone and len(whole) > len(alone):
        return Passage(alone, whole[len(alone) :])
    return Passage(alone, tuple(tokenizer(answer, add_special_tokens=False, padding=False)["input_ids"]))


def pad(
    passages: Sequence[Passage],
    pad_id: int,
    side: Literal["left", "right"] = "left",
    device: torch.device | None = None,
) -> TokenBatch:
    """Pad passages to one width."""
    width = max(len(p.ids) for p in passages)
    ids = torch.full((len(passages), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(passages), width), dtype=torch.long)
    starts = torch.zeros(len(passages), dtype=torch.long)
    for row, passage in enumerate(passages):
        start = width - len(passage.ids) if side == "left" else 0
        ids[row, start : start + len(passage.ids)] = torch.tensor(passage.ids)
        mask[row, start : start + len(passage.ids)] = 1
        starts[row] = start
    lengths = torch.tensor([len(p.prompt) for p in passages])
    batch = TokenBatch(ids, mask, positions_of(mask), lengths, starts)
    return batch if device is None else batch.to(device)
