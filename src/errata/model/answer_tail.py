"""A tail in which only the end of each row is run: what stands before its first change is read once and kept.

A memory that acts from the last prompt token on, or a value sought for the subject's last token, leaves what stands
before it as it was, in every block. The keys and values of those beginnings are put on a KV cache that never changes,
and each training step runs the rest: two or three tokens of a row instead of all of them, where answers alone are
changed. What many rows begin with (the texts that editors put in front of prompts) is read once for all of them.

Whether a model can be run so is found by trying, once per layer: without a change both ways must give the same
predictions. Where they do not (encoders, recurrent states, caches of another make), and while adapters are attached
whose routes need whole prompts, the whole row is recorded as `Tail` does it.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from errata.model.tail import Recording, Tail
from errata.model.tokens import TokenBatch

__all__ = ["AnswerTail"]

_LEAST_SHARED = 4  # tokens of a beginning that is worth being read apart
_WORTHWHILE = 0.8  # share of the padded tokens that may be left


@functools.cache
def _kept(kind: type[DynamicLayer]) -> type[DynamicLayer]:
    """A layer of a cache that shows what is added to it, and does not keep it."""

    class Kept(kind):  # type: ignore[misc]
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)

    return Kept


@dataclass(frozen=True)
class _AnswerBatch(TokenBatch):
    """Rows from the first token that may change on; `before` marks the real tokens that stand on the cache already."""

    cache: DynamicCache
    before: Tensor

    def of_rows(self, kept: Tensor) -> _AnswerBatch:
        cache = DynamicCache()
        for layer in self.cache.layers:
            own = copy.copy(layer)
            there = kept.to(layer.keys.device)
            own.keys, own.values = layer.keys[there], layer.values[there]
            cache.layers.append(own)
        return replace(super().of_rows(kept), cache=cache, before=self.before[kept])

    def arguments(self) -> dict[str, Any]:
        mask = torch.cat([self.before, self.mask], dim=1)
        return {**super().arguments(), "attention_mask": mask, "past_key_values": self.cache, "use_cache": True}


class AnswerTail(Tail):
    """The part of a model that a change can reach which begins within the prompt, by default at its last token.

    `Recording.batch` holds those columns alone, with positions and prompt lengths as in the whole rows.
    """

    @torch.no_grad()
    def record(self, batch: TokenBatch, begins: Tensor | None = None) -> Recording:
        """Run the whole model once over a batch and keep what the tail needs.

        Args:
            begins: [rows], position of the first token that a change acts on, within the prompt.

        Raises:
            TailError: blocks and final norm do not reproduce what the trunk returns.
        """
        begins = batch.prompt_lengths - 1 if begins is None else begins.to(batch.prompt_lengths)
        if self.full or self.model.is_encoder_decoder or int(begins.max()) < 1 or not self.model.treats_rows_alike:
            return super().record(batch)
        verdicts = self.model.verdicts
        shared = _shared_beginnings(batch, begins)
        for leads in (shared, None) if shared else (None,):
            verdict = f"answers alone {self.first}" + (", beginnings shared" if leads else "")
            if not verdicts.get(verdict, True):
                continue
            with self.model.sequences.unfollowed():
                answers = self._begun(batch, begins, leads)
                recording = None if answers is None else super().record(answers)
            if recording is None:
                verdicts[verdict] = False
                continue
            if verdict not in verdicts:
                verdicts[verdict] = self._agree(recording, super().record(batch))
            if verdicts[verdict]:
                return recording
        return super().record(batch)

    def _begun(self, batch: TokenBatch, begins: Tensor, leads: _Leads | None = None) -> TokenBatch | None:
        """The rest of the rows, on a cache of their beginnings; None if the model keeps another kind of cache.

        What rows have in common, `leads`, is read once. Then padding may stand in the middle of what they attend to,
        which a window that slides over the cache would count.
        """
        real = batch.mask.bool()
        earlier = real & (batch.positions < begins.unsqueeze(1))
        later = real & ~earlier
        cache, before = None, batch.mask[:, :0]
        if leads is not None:
            apart, own = batch.of_rows(leads.first_with), leads.length_of[leads.first_with].unsqueeze(1)
            cache, mask = self._read(*_packed(apart, apart.mask.bool() & (apart.positions < own), left=True))
            if cache is None or {type(layer) for layer in cache.layers} != {DynamicLayer}:
                return None
            for layer in cache.layers:
                chosen = leads.number_of.to(layer.keys.device)
                layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]
            before = mask[leads.number_of] * (leads.length_of > 0).unsqueeze(1)
            earlier &= batch.positions >= leads.length_of.unsqueeze(1)
        cache, before = self._read(*_packed(batch, earlier, left=True), cache, before)
        if cache is None or {type(layer) for layer in cache.layers} - _KINDS:
            return None
        for layer in cache.layers:
            layer.__class__ = _kept(type(layer))  # type: ignore[arg-type]  # mypy takes no class for hashable
        ids, mask, positions = _packed(batch, later, left=False)
        return _AnswerBatch(ids, mask, positions, batch.prompt_lengths, torch.zeros_like(batch.starts), cache, before)

    def _read(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: DynamicCache | None = None,
        before: Tensor | None = None,
    ) -> tuple[DynamicCache | None, Tensor]:
        """Put tokens on a cache, and which of the places there are real."""
        whole = mask if before is None else torch.cat([before, mask], dim=1)
        given = {} if cache is None else {"past_key_values": cache}
        output = self.model.module(self.model.anatomy.trunk)(
            input_ids=ids, attention_mask=whole, position_ids=positions, use_cache=True, **given
        )
        made = getattr(output, "past_key_values", None)
        return (made if isinstance(made, DynamicCache) else None), whole


@dataclass(frozen=True)
class _Leads:
    """Beginnings that rows have in common.

    Attributes:
        first_with: [rows] bool, the first row that has each of them.
        number_of: [rows], which one a row has, counted in the order of `first_with`; any where it has none.
        length_of: [rows], tokens of it, 0 where a row has none.
    """

    first_with: Tensor
    number_of: Tensor
    length_of: Tensor


def _shared_beginnings(batch: TokenBatch, begins: Tensor) -> _Leads | None:
    """For each row the beginning by which most tokens are saved, None where it would not be many.

    The last token before `begins` [rows] is never part of it: each row that has one also has a token of its own there.
    """
    rows = [ids[real].tolist() for ids, real in zip(batch.ids, batch.mask.bool(), strict=True)]
    beginnings = [
        [tuple(ids[:length]) for length in range(_LEAST_SHARED, begin)]
        for ids, begin in zip(rows, begins.tolist(), strict=True)
    ]
    having = Counter(beginning for own in beginnings for beginning in own)
    chosen = [max(own, key=lambda shared: len(shared) * (having[shared] - 1), default=()) for own in beginnings]
    chosen = [own if having[own] > 1 else () for own in chosen]
    first: dict[tuple[int, ...], int] = {}
    for row, own in enumerate(chosen):
        if own:
            first.setdefault(own, row)
    numbers = {own: number for number, own in enumerate(first)}
    left = [begin - len(own) for begin, own in zip(begins.tolist(), chosen, strict=True)]
    apart = max(map(len, chosen)) * len(first) + max(left) * len(chosen)
    if apart > _WORTHWHILE * len(chosen) * int(begins.max()):
        return None
    device = batch.ids.device
    first_with = torch.zeros(len(chosen), dtype=torch.bool, device=device)
    first_with[list(first.values())] = True
    number_of = torch.tensor([numbers.get(own, 0) for own in chosen], device=device)
    return _Leads(first_with, number_of, torch.tensor([len(own) for own in chosen], device=device))


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
