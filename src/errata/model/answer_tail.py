"""A tail in which only the answer is run: what stands before a prompt's last token is read once and kept.

A memory that acts from the last prompt token on leaves the beginnings of prompts as they were, in every block. Their
keys and values are then put on a KV cache that never changes, and each training step runs only the places whose
prediction is asked for: two or three tokens of a row instead of all of them.

Whether a model can be run so is found by trying, once per layer: without a change both ways must give the same
predictions. Where they do not (encoders, recurrent states, caches of another make), and while other adapters are
attached, whose routes need whole prompts, the whole row is recorded as `Tail` does it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from errata.model.tail import Recording, Tail
from errata.model.tokens import TokenBatch

__all__ = ["AnswerTail"]


@functools.cache
def _kept(kind: type[DynamicLayer]) -> type[DynamicLayer]:
    """A layer of a cache that shows what is added to it, and does not keep it."""

    class Kept(kind):  # type: ignore[misc]
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)

    return Kept


@dataclass(frozen=True)
class _AnswerBatch(TokenBatch):
    """Rows from their prompts' last token on; `before` marks the real tokens that stand on the cache already."""

    cache: DynamicCache
    before: Tensor

    def arguments(self) -> dict[str, Any]:
        mask = torch.cat([self.before, self.mask], dim=1)
        return {**super().arguments(), "attention_mask": mask, "past_key_values": self.cache, "use_cache": True}


class AnswerTail(Tail):
    """The part of a model that a change from the last prompt token on can reach.

    `Recording.batch` holds those columns alone, with positions and prompt lengths as in the whole rows.
    """

    @torch.no_grad()
    def record(self, batch: TokenBatch) -> Recording:
        verdict = f"answers alone {self.first}"
        if (
            self.full
            or self.model.is_encoder_decoder
            or self.model.adapters
            or int(batch.prompt_lengths.max()) < 2
            or not self.model.verdicts.get(verdict, True)
        ):
            return super().record(batch)
        answers = self._begun(batch)
        if answers is None:
            self.model.verdicts[verdict] = False
            return super().record(batch)
        recording = super().record(answers)
        if verdict not in self.model.verdicts:
            whole = super().record(batch)
            self.model.verdicts[verdict] = self._agree(recording, whole)
            if not self.model.verdicts[verdict]:
                return whole
        return recording

    def _begun(self, batch: TokenBatch) -> TokenBatch | None:
        """The rest of the rows, on a cache of their beginnings; None if the model keeps another kind of cache."""
        real, first = batch.mask.bool(), (batch.prompt_lengths - 1).unsqueeze(1)
        earlier = real & (batch.positions < first)
        later = real & (batch.positions >= first)
        begun, begun_mask, begun_positions = _packed(batch, earlier, left=True)
        self.model.sequences.acquire()
        try:
            with self.model.sequences.prompts(batch.prompt_lengths):
                output = self.model.module(self.model.anatomy.trunk)(
                    input_ids=begun, attention_mask=begun_mask, position_ids=begun_positions, use_cache=True
                )
        finally:
            self.model.sequences.release()
        cache = getattr(output, "past_key_values", None)
        layers = getattr(cache, "layers", [])
        if not isinstance(cache, DynamicCache) or {type(layer) for layer in layers} - _KINDS:
            return None
        for layer in layers:
            layer.__class__ = _kept(type(layer))  # type: ignore[arg-type]  # mypy takes no class for hashable
        ids, mask, positions = _packed(batch, later, left=False)
        return _AnswerBatch(
            ids, mask, positions, batch.prompt_lengths, torch.zeros_like(batch.starts), cache, begun_mask
        )

    def _agree(self, answers: Recording, whole: Recording) -> bool:
        """Whether both recordings predict the same, no change made."""

        def logits(recording: Recording) -> Tensor:
            rows, columns, _ = recording.batch.answer_places()
            return self.run(recording, {}, rows, columns).float()

        alone, together = logits(answers), logits(whole)
        allowed = max(1e-3, 16 * torch.finfo(answers.outputs.dtype).eps)
        return bool((alone - together).abs().max() <= allowed * together.abs().max())


_KINDS = {DynamicLayer, DynamicSlidingWindowLayer}


def _packed(batch: TokenBatch, chosen: Tensor, *, left: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen tokens of each row moved together: ids, mask and positions, [rows, most chosen in a row]."""
    counts = chosen.sum(1, keepdim=True)
    width = int(counts.max())
    rank = chosen.long().cumsum(1) - 1 + (width - counts if left else torch.zeros_like(counts))
    rows, columns = chosen.nonzero(as_tuple=True)
    places = rank[rows, columns]

    def moved(values: Tensor, filler: int) -> Tensor:
        target = torch.full((len(values), width), filler, dtype=values.dtype, device=values.device)
        target[rows, places] = values[rows, columns]
        return target

    # Any token serves as padding, for it is masked; that of the row's own beginning surely exists.
    return moved(batch.ids, int(batch.ids[0, 0])), moved(batch.mask, 0), moved(batch.positions, 0)
