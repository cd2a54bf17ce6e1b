"""Which token belongs to which sequence in a forward pass, and where each prompt ends.

A routed adapter decides once per sequence, from its prompt alone, and must then keep to that decision for as long
as the sequence is being continued. This module finds out what it needs to know from the forward pass itself, so
that plain `model.generate`, a scorer's `model(ids)` and our own batches all work without extra arguments:

* a forward pre-hook on the trunk reads the attention mask and the length of the KV cache;
* `generate` is wrapped while an adapter is attached, because only there the end of the prompt is known when
  the cache is off, when a draft model proposes tokens, or when the prompt is read in chunks;
* what was decided is stored **on the cache object**: it lives and dies with it, is copied with it, and two caches
  can never be confused.

Knows hooks, masks and caches. Knows nothing of what is routed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from errata.errors import SequenceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ForwardPass", "RouteStore", "SequenceTracker", "positions_of", "prompt_mask"]

_ATTRIBUTE = "_errata_routes"


@dataclass
class RouteStore:
    """What was gathered and decided for the sequences of one KV cache, per owner (an adapter's layer).

    Attributes:
        rows: sequences when the store was made; later passes may hold a multiple of it (beams).
        seen: prompt columns that have passed so far, padding included.
        frozen: the prompts are complete: decisions are final.
        gathered: what each owner has accumulated over the prompt so far.
        decided: what each owner has decided.
    """

    rows: int
    seen: int = 0
    frozen: bool = False
    gathered: dict[object, Any] = field(default_factory=dict)
    decided: dict[object, Any] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> RouteStore:
        """A copied cache goes on separately: same decisions, own dictionaries; owners and tensors are shared."""
        return RouteStore(self.rows, self.seen, self.frozen, dict(self.gathered), dict(self.decided))

    def expanded(self, rows: Tensor, count: int) -> Tensor:
        """Per-sequence values [rows, ...] for a pass of `count` rows; beams of one prompt stand side by side."""
        if rows.shape[0] == count:
            return rows
        if count % rows.shape[0] == 0:
            return rows.repeat_interleave(count // rows.shape[0], dim=0)
        raise SequenceError(
            f"a KV cache whose routes were decided for {rows.shape[0]} sequences is now used for {count}; select or "
            "reorder rows before the prompt is read, not after"
        )


@dataclass
class ForwardPass:
    """One forward pass as its sequences see it.

    Attributes:
        real: [rows, columns], False on padding.
        prompt: [rows, columns], True on the tokens of this pass that belong to a prompt.
        past: tokens already in the KV cache, per row and padding included.
        store: the decisions these sequences live under.
    """

    real: Tensor
    prompt: Tensor
    past: int
    store: RouteStore

    @property
    def rows(self) -> int:
        return int(self.real.shape[0])

    @property
    def is_prefill(self) -> bool:
        """True while prompts are being read, False once decisions are final and tokens are being added."""
        return not self.store.frozen


def prompt_mask(real: Tensor, lengths: Tensor | None) -> Tensor:
    """True on the first `lengths` real tokens of each row, wherever its padding stands; all real ones if None."""
    if lengths is None:
        return real
    return real & (real.long().cumsum(dim=1) <= lengths.to(real.device).unsqueeze(1))


def positions_of(mask: Tensor) -> Tensor:
    """Position ids [rows, columns] that count real tokens from zero, so that padding on either side is neutral."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _real_from_mask(mask: Any, rows: int, past: int, columns: int, device: torch.device) -> Tensor:
    """[rows, columns] of the new tokens, from whatever form of attention mask the trunk was given."""
    if isinstance(mask, dict):
        masks = [value for value in mask.values() if isinstance(value, Tensor)]
        mask = masks[0] if masks else None
    if mask is None:
        return torch.ones(rows, columns, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor):
        raise SequenceError(f"an attention mask of type {type(mask).__name__} is not understood; pass a tensor")
    if mask.dim() == 2:
        real = mask[:, -columns:] if mask.shape[1] != past + columns else mask[:, past:]
        return real.to(device=device, dtype=torch.bool)
    if mask.dim() == 4:
        # A prepared mask: a token is real when it may attend to itself.
        own = mask[:, 0].diagonal(offset=past, dim1=1, dim2=2)
        real = own if own.dtype == torch.bool else own >= 0
        return real.expand(rows, columns).to(device)
    raise SequenceError(f"an attention mask of {mask.dim()} dimensions is not understood; pass [rows, tokens]")


class SequenceTracker:
    """Follows the forward passes of one model while anything is attached to it.

    `current` is the pass under way; it is None outside of one. Several attached layers share one tracker.
    """

    def __init__(self, model: PreTrainedModel, trunk: nn.Module) -> None:
        self.current: ForwardPass | None = None
        self._model = model
        self._trunk = trunk
        self._users = 0
        self._handles: list[Any] = []
        self._announced: Tensor | None = None  # prompt lengths in real tokens, [rows]
        self._generating: list[_Generation] = []

    def acquire(self) -> None:
        """Start following the model, if nobody does yet."""
        self._users += 1
        if self._users > 1:
            return
        self._handles = [
            self._trunk.register_forward_pre_hook(self._before, with_kwargs=True),
            self._trunk.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        # An attribute of the object, not of its class: other models are not touched, and deleting it undoes it.
        object.__setattr__(self._model, "generate", self._following(self._model.generate))

    def release(self) -> None:
        """Stop following when the last user is gone; the model is then as it was."""
        self._users -= 1
        if self._users > 0:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        object.__delattr__(self._model, "generate")

    @contextmanager
    def prompts(self, lengths: Sequence[int] | Tensor | None) -> Iterator[None]:
        """Announce how many real tokens of each row are prompt; what follows is an answer being scored."""
        before = self._announced
        self._announced = None if lengths is None else torch.as_tensor(lengths, dtype=torch.long)
        try:
            yield
        finally:
            self._announced = before

    @contextmanager
    def entered(self, forward_pass: ForwardPass) -> Iterator[None]:
        """Run modules by hand as part of a recorded pass."""
        before, self.current = self.current, forward_pass
        try:
            yield
        finally:
            self.current = before

    # --- hooks ------------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("cu_seq_lens_q") is not None:
            raise SequenceError(
                "packed (continuous) batching gives many requests in one row, which routed adapters do not support "
                "yet; use generate with a padded batch, or detach the adapter"
            )
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if not isinstance(tokens, Tensor):
            raise SequenceError("a forward pass without input_ids or inputs_embeds cannot be followed")
        rows, columns = int(tokens.shape[0]), int(tokens.shape[1])
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        real = _real_from_mask(mask, rows, past, columns, tokens.device)

        generation = self._generating[-1] if self._generating else None
        store = getattr(cache, _ATTRIBUTE, None) if past else None
        if store is None:
            if past and cache is not None:
                raise SequenceError(
                    "this KV cache was filled before the adapter was attached, or by another model; begin again "
                    "with an empty cache"
                )
            store = RouteStore(rows)
            if generation is not None and generation.decided is not None:
                store = generation.decided.__deepcopy__({})
        if past and not store.frozen and generation is None and columns == 1:
            store.frozen = True  # one more token on a cache: the prompt is over
        if store.frozen:
            prompt = torch.zeros_like(real)
        elif generation is not None:
            end = generation.prompt_columns
            prompt = real & (torch.arange(past, past + columns, device=real.device) < end)
        else:
            prompt = prompt_mask(real, self._announced)
        self.current = ForwardPass(real, prompt, past, store)
        if cache is not None:
            setattr(cache, _ATTRIBUTE, store)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        done, self.current = self.current, None
        if done is None:
            return
        done.store.seen += int(done.real.shape[1])
        generation = self._generating[-1] if self._generating else None
        if generation is not None and done.store.seen >= generation.prompt_columns:
            done.store.frozen = True
        cache = getattr(output, "past_key_values", None)
        if cache is not None and not hasattr(cache, _ATTRIBUTE):
            setattr(cache, _ATTRIBUTE, done.store)

    # --- generate ---------------------------------------------------------------------------------------------

    def _following(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
            if inputs is None:
                inputs = kwargs.get("inputs_embeds")
            columns = int(inputs.shape[1]) if isinstance(inputs, Tensor) else 1
            generation = _Generation(columns)
            settings = kwargs.get("generation_config") or self._model.generation_config
            chunk = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
            if chunk and isinstance(inputs, Tensor) and kwargs.get("past_key_values") is None:
                generation.decided = self._decide_ahead(inputs, kwargs.get("attention_mask"))
            self._generating.append(generation)
            try:
                return generate(*args, **kwargs)
            finally:
                self._generating.pop()

        return wrapper

    def _decide_ahead(self, inputs: Tensor, mask: Tensor | None) -> RouteStore:
        """Read whole prompts once, only to decide: in chunks the first layers would run before the decision."""
        with torch.no_grad():
            name = "input_ids" if inputs.dim() == 2 else "inputs_embeds"
            if mask is None:
                mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
            held: list[ForwardPass] = []
            handle = self._trunk.register_forward_pre_hook(
                lambda *_: held.append(self.current) if self.current else None
            )
            try:
                self._trunk(**{name: inputs}, attention_mask=mask, position_ids=positions_of(mask), use_cache=False)
            finally:
                handle.remove()
        store = held[0].store
        store.frozen, store.seen = True, int(inputs.shape[1])
        return store


@dataclass
class _Generation:
    """A call of generate under way: where its prompts end, and decisions taken ahead of chunked reading."""

    prompt_columns: int
    decided: RouteStore | None = None
