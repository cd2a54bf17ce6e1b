"""Which token belongs to which sequence in a forward pass, and where each prompt ends.

A routed adapter decides once per sequence, from its prompt alone, and must then keep to that decision for as long
as the sequence is being continued. This module finds out what it needs to know from the forward pass itself, so
that plain `model.generate`, a scorer's `model(ids)` and our own batches all work without extra arguments:

* a forward pre-hook on the trunk reads the attention mask and the length of the KV cache;
* `generate` is wrapped while an adapter is attached, because only there the end of the prompt is known when
  the cache is off, when a draft model proposes tokens, or when the prompt is read in chunks;
* what was decided is stored **on the cache object**: it lives and dies with it, is copied with it, follows its rows
  when they are reordered, selected or repeated, and two caches can never be confused.

The same holds for the choice of adapters, where several are attached and each sequence is to have its own
(`selecting`): it is made when a sequence begins and stored with what was decided for it.

Two things a forward pass does not say, and what is assumed of them. Without an attention mask, trailing padding is
recognised by its token ids (see `_without_padding`). And without `generate` or an announcement (`prompts`), the first
single token on a cache is taken as the beginning of the answer: a prompt read in chunks whose last chunk is one token
must be announced, or that token does not count.

Knows hooks, masks and caches. Knows nothing of what is routed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from errata.errors import ConfigError, SequenceError, unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "BASE",
    "AdapterNames",
    "ForwardPass",
    "RouteStore",
    "RowAdapters",
    "SequenceTracker",
    "each_tensor",
    "positions_of",
    "prompt_mask",
]

BASE = "__base__"
"""In the place of an adapter's name: no adapter at all. PEFT's word for it."""

AdapterNames = str | Sequence[str | Sequence[str]]
"""A name for all sequences, or for each sequence its name or names."""

_ATTRIBUTE = "_errata_routes"
_TRACKER = "_errata_tracker"


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value of a store with every tensor in it changed, through tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        return change(value) if value.dim() else value
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: each_tensor(getattr(value, f.name), change) for f in fields(value) if f.init})
    if isinstance(value, (tuple, list)):
        items = [each_tensor(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: each_tensor(item, change) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class RowAdapters:
    """Which adapters act on which rows.

    Attributes:
        sets: sets of names; rows: [rows], which of them each row has, kept on the CPU where asking costs nothing.
    """

    sets: tuple[frozenset[str], ...]
    rows: Tensor

    @classmethod
    def of(cls, names: Sequence[frozenset[str]]) -> RowAdapters:
        """From the names of each row."""
        sets = tuple(dict.fromkeys(names))
        return cls(sets, torch.tensor([sets.index(own) for own in names], dtype=torch.long))

    def names(self) -> list[frozenset[str]]:
        """The names of each row."""
        return [self.sets[number] for number in self.rows.tolist()]

    def having(self, name: str | None) -> Tensor:
        """[rows], True where the adapter of this name acts."""
        return torch.tensor([name in names for names in self.sets])[self.rows]


@dataclass
class RouteStore:
    """What was gathered and decided for the sequences of one KV cache, per owner (an adapter's layer).

    Attributes:
        rows: sequences of the cache, those of its last pass.
        seen: columns that have passed so far, padding included.
        frozen: the prompts are complete: decisions are final.
        gathered: what each owner has accumulated over the prompt so far.
        decided: what each owner has decided. Tensors in both, alone or in tuples, lists, dictionaries and dataclasses,
            have one row per sequence, so that they can follow the rows of the cache.
        read: real tokens that have passed so far, [rows]; None before the first pass.
        adapters: which adapters act on which sequence; None when all of them act on all.
    """

    rows: int
    seen: int = 0
    frozen: bool = False
    gathered: dict[object, Any] = field(default_factory=dict)
    decided: dict[object, Any] = field(default_factory=dict)
    read: Tensor | None = None
    adapters: RowAdapters | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RouteStore:
        """A copied cache goes on separately: same decisions, own dictionaries; owners and tensors are shared."""
        return replace(self, gathered=dict(self.gathered), decided=dict(self.decided))

    def widen(self, count: int) -> None:
        """Hold `count` rows from now on: those there are, or each of them several times side by side (beams).

        Raises:
            SequenceError: count is no multiple of the present rows.
        """
        if count != self.rows:
            self._change(lambda values: self.expanded(values, count))
            self.rows = count

    def select(self, indices: Tensor) -> None:
        """Row i becomes what row indices[i] was; `indices` may also be a boolean mask of the rows to keep."""
        self._change(lambda values: values[indices.to(values.device)])
        self.rows = int(indices.sum()) if indices.dtype == torch.bool else len(indices)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.gathered = {owner: each_tensor(value, change) for owner, value in self.gathered.items()}
        self.decided = {owner: each_tensor(value, change) for owner, value in self.decided.items()}
        self.read = each_tensor(self.read, change)
        self.adapters = each_tensor(self.adapters, change)

    def expanded(self, rows: Tensor, count: int) -> Tensor:
        """Per-sequence values [rows, ...] for a pass of `count` rows; beams of one prompt stand side by side."""
        if rows.shape[0] == count:
            return rows
        if count % rows.shape[0] == 0:
            return rows.repeat_interleave(count // rows.shape[0], dim=0)
        raise SequenceError(
            f"a KV cache whose routes were decided for {rows.shape[0]} sequences is now used for {count}; change its "
            "rows through its own methods (reorder_cache, batch_select_indices, batch_repeat_interleave)"
        )


@functools.cache
def _followed(kind: type) -> type:
    """A class of caches that takes its routes along whenever its rows move, and is `kind` in every other respect.

    A subclass and not a wrapped instance, because methods put on an instance would, in a deep copy of the cache,
    still move the rows of the original.
    """

    def routes(cache: Any) -> RouteStore | None:
        store = getattr(cache, _ATTRIBUTE, None)
        return store if isinstance(store, RouteStore) and cache.get_seq_length() else None

    class Followed(kind):  # type: ignore[misc]
        follows_rows = True

        def reorder_cache(self, beam_idx: Tensor) -> None:
            store = routes(self)
            super().reorder_cache(beam_idx)
            if store is not None:
                store.select(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            store = routes(self)
            super().batch_select_indices(indices)
            if store is not None:
                store.select(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            store = routes(self)
            super().batch_repeat_interleave(repeats)
            if store is not None:
                store.widen(store.rows * repeats)

        def crop(self, tokens_to_remove: int) -> None:
            store = routes(self)
            if store is not None and not store.frozen and tokens_to_remove:
                raise SequenceError(
                    "tokens were taken out of a KV cache whose prompt may still go on, but what a router has read of "
                    "them cannot be unread; announce where the prompt ends (EditableModel.sequences.prompts), or begin "
                    "again with an empty cache"
                )
            super().crop(tokens_to_remove)

    Followed.__name__, Followed.__qualname__, Followed.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Followed


def _keep_routes(cache: Any, store: RouteStore) -> None:
    """Put a store on a cache; it stays there, and follows its rows, also while no adapter is attached."""
    setattr(cache, _ATTRIBUTE, store)
    if hasattr(cache, "reorder_cache") and not hasattr(cache, "follows_rows"):
        cache.__class__ = _followed(type(cache))  # type: ignore[arg-type]  # mypy takes no class for hashable


@dataclass
class ForwardPass:
    """One forward pass as its sequences see it.

    Attributes:
        real: [rows, columns], False on padding.
        prompt: [rows, columns], True on the tokens of this pass that belong to a prompt. Where images stand is False:
            edits are put in words, and the hundreds of places of one image would drown them.
        past: tokens already in the KV cache, per row and padding included.
        store: the decisions these sequences live under.
        goes_on: [rows], True where more of the prompt is known to follow in later passes; None when of no row it is.
        ids: [rows, columns], the tokens themselves; None where the pass was given embeddings.
    """

    real: Tensor
    prompt: Tensor
    past: int
    store: RouteStore
    goes_on: Tensor | None = None
    ids: Tensor | None = None

    @property
    def rows(self) -> int:
        return int(self.real.shape[0])

    @property
    def is_prefill(self) -> bool:
        """True while prompts are being read, False once decisions are final and tokens are being added."""
        return not self.store.frozen

    @property
    def prompt_ends(self) -> Tensor:
        """[rows, columns], True where the last token of a row's complete prompt stands, as far as that is known.

        A prompt may be read in several passes over a KV cache, and only `generate` or an announcement tells where it
        ends. Without either, each pass may be the last one, so its last token counts. A row has no such place in a
        pass that reads nothing of its prompt (decoding), or only a beginning.
        """
        ends = self.prompt & (self._ahead == 1)
        return ends if self.goes_on is None else ends & ~self.goes_on.unsqueeze(1)

    @property
    def answering(self) -> Tensor:
        """[rows, columns], True from the last token of a row's prompt on: the places that say what comes next."""
        said = self.real & (self._ahead <= 1)
        return said if self.goes_on is None else said & ~self.goes_on.unsqueeze(1)

    @property
    def _ahead(self) -> Tensor:
        """[rows, columns], prompt tokens from each place to the end of the pass."""
        return self.prompt.long().flip(1).cumsum(1).flip(1)


def prompt_mask(real: Tensor, lengths: Tensor | None) -> Tensor:
    """True on the first `lengths` real tokens of each row, wherever its padding stands; all real ones if None."""
    if lengths is None:
        return real
    return real & (real.long().cumsum(dim=1) <= lengths.to(real.device).unsqueeze(1))


def positions_of(mask: Tensor) -> Tensor:
    """Position ids [rows, columns] that count real tokens from zero, so that padding on either side is neutral."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _real_from_mask(mask: Any, rows: int, past: int, columns: int, device: torch.device) -> Tensor | None:
    """[rows, columns] of the new tokens, from whatever form of attention mask the trunk was given; None if none."""
    if isinstance(mask, dict):
        masks = [value for value in mask.values() if isinstance(value, Tensor)]
        # Of a mask for each kind of layer, that of full attention: a window may have left part of a prompt behind.
        mask = mask.get("full_attention", masks[0] if masks else None)
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise SequenceError(f"an attention mask of type {type(mask).__name__} is not understood; pass a tensor")
    if mask.dim() == 2:
        real = mask[:, -columns:] if mask.shape[1] != past + columns else mask[:, past:]
        return real.to(device=device, dtype=torch.bool)
    if mask.dim() == 4:
        # A prepared mask: a token is real when it may attend to itself. Keys that have left a sliding window are not
        # in it, keys of a static cache that are still to come are.
        first = min(past, mask.shape[-1] - columns)
        if first < 0:
            return None
        own = mask[:, 0].diagonal(offset=first, dim1=1, dim2=2)
        real = own if own.dtype == torch.bool else own >= 0
        return real.expand(rows, columns).to(device)
    raise SequenceError(f"an attention mask of {mask.dim()} dimensions is not understood; pass [rows, tokens]")


def _without_padding(ids: Tensor, fillers: Iterable[int]) -> Tensor:
    """[rows, columns], False on what looks like trailing padding, for token ids [rows, columns] without a mask.

    Scorers (lm-eval) pad on the right and pass no mask, which is harmless to a causal model but not to a router. A run
    of one filling token at the end of a row counts as padding when some other row has none: a batch is as wide as its
    longest row. Only routing is touched; what the model computes is not.
    """
    real = torch.ones_like(ids, dtype=torch.bool)
    backwards = ids.flip(1)
    runs = torch.stack([(backwards == filler).long().cumprod(1).sum(1) for filler in fillers]).amax(0)
    if bool((runs > 0).all()):
        return real
    ends = (ids.shape[1] - runs).clamp(min=1)
    return real & (torch.arange(ids.shape[1], device=ids.device) < ends.unsqueeze(1))


def _listed(names: frozenset[str] | None) -> str:
    """A row's adapters, in words."""
    return "all adapters" if names is None else " + ".join(sorted(names)) or BASE


class SequenceTracker:
    """Follows the forward passes of one model while anything is attached to it.

    `current` is the pass under way; it is None outside of one. All that is attached to a model shares its one tracker.
    `owners` has the name of the adapter that each attached contribution belongs to, if it belongs to one.
    """

    def __init__(self, model: PreTrainedModel, trunk: nn.Module) -> None:
        self.current: ForwardPass | None = None
        self.is_suspended = False
        self.kept: object | None = None  # whose changes of weight act nevertheless, see `suspended`
        self._is_unfollowed = False
        self.owners: dict[object, str] = {}
        self._selected: frozenset[str] | tuple[frozenset[str], ...] | None = None  # for all, or for each sequence
        self._model = model
        self._trunk = trunk
        self._users = 0
        self._handles: list[Any] = []
        self._announced: Tensor | None = None  # prompt lengths in real tokens, [rows]
        self._generating: list[_Generation] = []
        self._ids: Tensor | None = None  # of a pass of a model that embeds them before the trunk, among images
        self._image_token: int | None = getattr(model.config, "image_token_id", None)
        self._following: _FollowedGenerate | None = None
        self._replaced: Any = None  # a `generate` that somebody else had put on the model

    @classmethod
    def of(cls, model: PreTrainedModel, trunk: nn.Module) -> SequenceTracker:
        """The tracker of a model, the same for every `EditableModel` made of it; it is kept on the trunk."""
        tracker = vars(trunk).get(_TRACKER)
        if not isinstance(tracker, cls):
            tracker = cls(model, trunk)
            object.__setattr__(trunk, _TRACKER, tracker)
        return tracker

    def acquire(self) -> None:
        """Start following the model, if nobody does yet."""
        self._users += 1
        if self._users > 1:
            return
        self._handles = [
            self._trunk.register_forward_pre_hook(self._before, with_kwargs=True),
            self._trunk.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        if self._image_token is not None:
            whole = self._model.base_model
            self._handles += [
                whole.register_forward_pre_hook(self._remember_ids, with_kwargs=True),
                whole.register_forward_hook(self._forget_ids, with_kwargs=True, always_call=True),
            ]
        # An attribute of the object, not of its class: other models are not touched, and deleting it undoes it.
        self._replaced = vars(self._model).get("generate")
        self._following = _FollowedGenerate(self, self._model.generate)
        object.__setattr__(self._model, "generate", self._following)

    def release(self) -> None:
        """Stop following when the last user is gone; the model is then as it was."""
        self._users -= 1
        if self._users > 0:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._following is None:
            return
        self._following.is_active = False
        # If somebody has wrapped it meanwhile, theirs stays; what it wraps only passes calls on from now on.
        if vars(self._model).get("generate") is self._following:
            object.__delattr__(self._model, "generate")
            if self._replaced is not None:
                object.__setattr__(self._model, "generate", self._replaced)
        self._following = self._replaced = None

    @contextmanager
    def suspended(self, keeping: object | None = None) -> Iterator[None]:
        """Follow nothing for a while: the edited layers act as their bases. May be nested.

        Args:
            keeping: whose changes of weight act nevertheless (`Contribution.shared`).
        """
        before, self.is_suspended, self.kept = (self.is_suspended, self.kept), True, keeping
        try:
            yield
        finally:
            self.is_suspended, self.kept = before

    @contextmanager
    def unfollowed(self) -> Iterator[None]:
        """Follow nothing for a while, where nobody is routed; what is attached goes on changing weights."""
        before, self._is_unfollowed = self._is_unfollowed, True
        try:
            yield
        finally:
            self._is_unfollowed = before

    @contextmanager
    def prompts(self, lengths: Sequence[int] | Tensor | None) -> Iterator[None]:
        """Announce how many real tokens of each row are prompt; what follows is an answer being scored.

        On a KV cache they are counted from its beginning, so a prompt may be given in chunks under one announcement.
        """
        before = self._announced
        self._announced = None if lengths is None else torch.as_tensor(lengths, dtype=torch.long)
        try:
            yield
        finally:
            self._announced = before

    @property
    def is_selecting(self) -> bool:
        """True while sequences that begin get adapters of their own."""
        return self._selected is not None

    @property
    def adapter_names(self) -> list[str]:
        """Names of the attached adapters, in the order of attachment."""
        return list(dict.fromkeys(self.owners.values()))

    @contextmanager
    def selecting(self, names: AdapterNames | None) -> Iterator[None]:
        """Let sequences that begin inside have the adapters named; None changes nothing. See `EditableModel.selecting`.

        Raises:
            ConfigError: no adapter of such a name is attached.
        """
        before = self._selected
        if names is not None:
            self._selected = self._checked(names)
        try:
            yield
        finally:
            self._selected = before

    @contextmanager
    def narrowed(self, indices: Sequence[int], of: int) -> Iterator[None]:
        """Run a batch that consists of the sequences of these numbers, out of `of` of them, each with its adapters.

        Raises:
            SequenceError: adapters were selected for another number of sequences.
        """
        before = self._selected
        if isinstance(before, tuple):
            self._check_count(len(before), of)
            self._selected = tuple(before[index] for index in indices)
        try:
            yield
        finally:
            self._selected = before

    def _checked(self, names: AdapterNames) -> frozenset[str] | tuple[frozenset[str], ...]:
        if not isinstance(names, str):
            return tuple(self._checked_set((own,) if isinstance(own, str) else own) for own in names)
        return self._checked_set((names,))

    def _checked_set(self, names: Sequence[str]) -> frozenset[str]:
        for name in names:
            if name != BASE and name not in self.adapter_names:
                raise ConfigError(unknown_name("adapter", name, [*self.adapter_names, BASE]))
        if BASE in names and len(names) > 1:
            raise ConfigError(f"{BASE!r} means no adapter, but it was given together with others: {', '.join(names)}")
        return frozenset(names) - {BASE}

    @staticmethod
    def _check_count(names: int, sequences: int) -> None:
        if names != sequences:
            raise SequenceError(
                f"adapters were selected for {names} sequences, but there are {sequences}; give one name for each "
                f"sequence ({BASE!r} for none), or a single string for all of them"
            )

    @contextmanager
    def entered(self, forward_pass: ForwardPass | None) -> Iterator[None]:
        """Run modules by hand as part of a recorded pass; None if it was recorded while suspended."""
        before, self.current = self.current, forward_pass
        try:
            yield
        finally:
            self.current = before

    # --- hooks ------------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.current = None
        names = kwargs.pop("adapter_names", None)  # PEFT's argument, which not every forward would take
        if self.is_suspended or self._is_unfollowed:
            return
        with self.selecting(names):
            self._follow(args, kwargs)

    def _follow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("cu_seq_lens_q") is not None:
            raise SequenceError(
                "packed (continuous) batching gives many requests in one row, which routed adapters do not support "
                "yet; use generate with a padded batch, or detach the adapter"
            )
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs.get("inputs_embeds") if self._ids is None else self._ids
        if not isinstance(tokens, Tensor):
            raise SequenceError("a forward pass without input_ids or inputs_embeds cannot be followed")
        rows, columns = int(tokens.shape[0]), int(tokens.shape[1])
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        generation = self._generating[-1] if self._generating else None
        store = getattr(cache, _ATTRIBUTE, None) if past else None
        if store is None:
            if past and cache is not None:
                raise SequenceError(
                    "this KV cache was filled before the adapter was attached, or by another model; begin again "
                    "with an empty cache"
                )
            store = RouteStore(rows)
            if generation is not None and generation.ahead is not None:
                store = generation.ahead.store.__deepcopy__({})
        store.widen(rows)
        self._select(store, is_new=not store.seen, may_repeat=generation is not None)
        if past and not store.frozen and generation is None and self._announced is None and columns == 1:
            store.frozen = True  # one more token on a cache: the prompt is over
        goes_on: Tensor | None = None
        if store.frozen:
            # Nothing is decided any more, so nobody needs the mask, whatever form it has by now.
            real = torch.ones(rows, columns, dtype=torch.bool, device=tokens.device)
            prompt = torch.zeros_like(real)
            if generation is not None and generation.ahead is not None and past < generation.prompt_columns:
                whole = store.expanded(generation.ahead.prompt, rows)  # one of the chunks that were decided ahead
                part = whole[:, past : past + columns]
                prompt[:, : part.shape[1]] = part
                goes_on = whole[:, past + columns :].any(dim=1)
        else:
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            real = self._real(mask, tokens, past, generation is not None)
            if generation is not None:
                places = torch.arange(past, past + columns, device=real.device)
                prompt = real & (places < generation.prompt_columns)
                if past + columns < generation.prompt_columns:
                    goes_on = torch.ones(rows, dtype=torch.bool, device=real.device)
            elif self._announced is None:
                prompt = real
            else:
                read = 0 if store.read is None else store.read.to(self._announced.device)
                left = self._announced - read
                prompt = prompt_mask(real, left)
                goes_on = left.to(real.device) > real.sum(1)
            if tokens.dim() == 2 and self._image_token is not None:
                prompt = prompt & (tokens != self._image_token)
        ids = tokens if tokens.dim() == 2 else None
        self.current = ForwardPass(real, prompt, past, store, goes_on, ids)
        if cache is not None:
            _keep_routes(cache, store)

    def _select(self, store: RouteStore, is_new: bool, may_repeat: bool) -> None:
        """Give the sequences of a store the adapters that are selected now, or check that these are theirs."""
        selected = self._selected
        if selected is None:
            return
        if isinstance(selected, frozenset):
            rows = (selected,) * store.rows
        else:
            # Beams of one prompt stand side by side; `generating` has compared the number of prompts.
            repeats = max(store.rows // max(len(selected), 1), 1) if may_repeat else 1
            rows = tuple(own for own in selected for _ in range(repeats))
            self._check_count(len(rows), store.rows)
        if is_new:
            store.adapters = RowAdapters.of(rows)
            return
        began = [None] * store.rows if store.adapters is None else store.adapters.names()
        for row, (had, wanted) in enumerate(zip(began, rows, strict=True)):
            if had != wanted:
                raise SequenceError(
                    f"sequence {row} of this KV cache began with {_listed(had)} and cannot go on with "
                    f"{_listed(wanted)}; keep to the selection, or begin again with an empty cache"
                )

    def _remember_ids(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ids = kwargs.get("input_ids", args[0] if args else None)

    def _forget_ids(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._ids = None

    def _real(self, mask: Any, tokens: Tensor, past: int, is_generation: bool) -> Tensor:
        """[rows, columns], False where the new tokens are padding."""
        rows, columns = int(tokens.shape[0]), int(tokens.shape[1])
        real = _real_from_mask(mask, rows, past, columns, tokens.device)
        if real is not None:
            return real
        if mask is None and tokens.dim() == 2 and rows > 1 and not past and not is_generation:
            configs = (self._model.config, getattr(self._model, "generation_config", None))
            pad_ids = {getattr(config, "pad_token_id", None) for config in configs}
            return _without_padding(tokens, {0} | {pad_id for pad_id in pad_ids if isinstance(pad_id, int)})
        return torch.ones(rows, columns, dtype=torch.bool, device=tokens.device)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        done, self.current = self.current, None
        if done is None:
            return
        store = done.store
        store.seen += int(done.real.shape[1])
        generation = self._generating[-1] if self._generating else None
        if generation is not None:
            store.frozen = store.frozen or store.seen >= generation.prompt_columns
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            return
        if not store.frozen:
            store.read = done.real.sum(1) + (0 if store.read is None else store.read.to(done.real.device))
            if generation is None and self._announced is not None:
                store.frozen = bool((store.read.cpu() >= self._announced.cpu()).all())
        if not hasattr(cache, _ATTRIBUTE):
            _keep_routes(cache, store)

    # --- generate ---------------------------------------------------------------------------------------------

    @contextmanager
    def generating(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Around a call of generate: its arguments say where the prompts end."""
        inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        columns = int(inputs.shape[1]) if isinstance(inputs, Tensor) else 1
        if isinstance(inputs, Tensor) and isinstance(self._selected, tuple):
            self._check_count(len(self._selected), int(inputs.shape[0]))
        generation = _Generation(columns)
        settings = kwargs.get("generation_config") or self._model.generation_config
        chunk = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
        in_chunks = chunk and not self._model.config.is_encoder_decoder  # an encoder reads its prompts whole
        if in_chunks and isinstance(inputs, Tensor) and kwargs.get("past_key_values") is None:
            images = {k: v for k, v in kwargs.items() if k.startswith(("pixel_", "image_")) and v is not None}
            generation.ahead = self._read_ahead(inputs, kwargs.get("attention_mask"), images)
        self._generating.append(generation)
        try:
            yield
        finally:
            self._generating.pop()

    def _read_ahead(self, inputs: Tensor, mask: Tensor | None, images: dict[str, Any]) -> ForwardPass:
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
                whole = self._model.base_model if images else self._trunk
                whole(**{name: inputs}, **images, attention_mask=mask, position_ids=positions_of(mask), use_cache=False)
            finally:
                handle.remove()
        store = held[0].store
        store.frozen, store.seen = True, int(inputs.shape[1])
        return held[0]


@dataclass
class _Generation:
    """A call of generate under way: where its prompts end, and the pass that decided ahead of reading in chunks."""

    prompt_columns: int
    ahead: ForwardPass | None = None


class _FollowedGenerate:
    """Stands in the place of a model's `generate` while its passes are followed.

    An object and no closure: a deep copy of the model gets one that generates with the copy. It takes PEFT's argument
    `adapter_names` besides those of the plain one, see `EditableModel.selecting`.
    """

    def __init__(self, tracker: SequenceTracker, plain: Callable[..., Any]) -> None:
        functools.update_wrapper(self, plain)
        self.tracker, self.plain = tracker, plain
        self.is_active = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_active:
            return self.plain(*args, **kwargs)
        with self.tracker.selecting(kwargs.pop("adapter_names", None)):
            if self.tracker.is_suspended:
                return self.plain(*args, **kwargs)
            with self.tracker.generating(args, kwargs):
                return self.plain(*args, **kwargs)
