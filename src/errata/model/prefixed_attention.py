"""Keys and values in front of a block's attention, which every token of a sequence may read.

What stands there is given as hidden states, as they would enter the block: the block itself turns them into keys and
values, through its own norm, projections and rotary embedding, so no family needs a model file of its own. Only the
tokens of the sequence ask; the states in front are asked, and are not carried on to the next block.

* They are not put on the KV cache: the attention is given a cache that hands them out in front of what it holds. Text
  keeps the positions it has, counted from zero, and what stands in front has negative ones. Rotary embeddings see
  distances only, so this is the same as counting through, and keys that are cached stay right.
* What a sequence reads is settled when it begins, and stored with its KV cache like a route (`sequences`). It may be
  the same for all sequences (`PrefixContribution.prefix`), or chosen for each of them by its prompt (`own_prefix`).
* Keys and values are made by the base weights, and changes that belong to what stands there; nothing else that is
  attached has a part in them.

Knows blocks, masks and caches. Knows nothing of where the states come from.
"""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from errata.errors import ModelError
from errata.model.anatomy import attention_of
from errata.model.edited_linear import Contribution

if TYPE_CHECKING:
    from errata.model.editable import EditableModel
    from errata.model.sequences import ForwardPass

__all__ = ["Prefix", "PrefixContribution", "PrefixedAttention", "RowPrefix", "attention_path", "unprefixable"]

_ATTRIBUTE = "_errata_prefix"
_ROTARY = "rotary_emb"  # what families call the rotary embedding of a trunk
_CACHES = ("past_key_values", "layer_past")  # what families call the cache of a block
_IMPLEMENTATIONS = ("eager", "sdpa")  # those that are given which key each token may read, as a tensor


class Prefix:
    """Keys and values in front of sequences. No dataclass, so that it stays whole when the rows of a cache move.

    Attributes:
        keys, values: [rows, heads, places, width] each; one row that all sequences share, or one for each.
        visible: [rows, places] bool, False where a row has nothing; everywhere True if not given.
    """

    def __init__(self, keys: Tensor, values: Tensor, visible: Tensor | None = None) -> None:
        self.keys, self.values = keys, values
        if visible is None:
            visible = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
        self.visible = visible

    def of(self, rows: Tensor) -> Prefix:
        """Row i of it is what row rows[i] was; what all rows share stays shared."""
        return Prefix(*(one if len(one) == 1 else one[rows] for one in (self.keys, self.values, self.visible)))

    @classmethod
    def of_rows(cls, own: Sequence[tuple[Prefix, ...]]) -> Prefix | None:
        """What each row has, one behind the other; None if no row has anything.

        Args:
            own: for each row its prefixes, each of one row. Rows that have fewer places are filled up in front.
        """
        if all(parts == own[0] for parts in own):
            if not own[0]:
                return None
            keys, values, visible = (
                torch.cat([getattr(part, name) for part in own[0]], dim=-1 if name == "visible" else 2)
                for name in ("keys", "values", "visible")
            )
            return cls(keys, values, visible)
        one = next(part for parts in own for part in parts)
        widest = max(sum(part.keys.shape[2] for part in parts) for parts in own)
        shape = (len(own), one.keys.shape[1], widest)
        keys = one.keys.new_zeros(*shape, one.keys.shape[3])
        values = one.values.new_zeros(*shape, one.values.shape[3])
        visible = one.visible.new_zeros(len(own), widest)
        for row, parts in enumerate(own):
            end = widest
            for part in reversed(parts):
                places = slice(end - part.keys.shape[2], end)
                keys[row, :, places], values[row, :, places] = part.keys[0], part.values[0]
                visible[row, places] = part.visible[0]
                end = places.start
        return cls(keys, values, visible)


@dataclass(frozen=True)
class RowPrefix:
    """What each sequence has in front of it for itself, beside what all of them share.

    A dataclass, unlike `Prefix`: where the rows of a cache move, their numbers do, and the keys and values stay put.

    Attributes:
        prefix: a row for each sequence that had something when the sequences began.
        rows: [rows], the number of its row there that each sequence has now, -1 where it has none.
    """

    prefix: Prefix
    rows: Tensor

    @functools.cached_property
    def each(self) -> list[tuple[Prefix, ...]]:
        """For each sequence its own prefix, of one row; nothing where it has none."""
        keys, values, visible = self.prefix.keys, self.prefix.values, self.prefix.visible
        places = [slice(row, row + 1) for row in self.rows.tolist()]
        return [(Prefix(keys[one], values[one], visible[one]),) if one.start >= 0 else () for one in places]


class _Joined:
    """What the rows of a pass read, and the same as one. No dataclass, so that it stays whole when rows move."""

    def __init__(self, own: list[tuple[Prefix, ...]]) -> None:
        self.own, self.prefix = own, Prefix.of_rows(own)


class PrefixContribution(Contribution, abc.ABC):
    """What one adapter puts in front of one block's attention."""

    @abc.abstractmethod
    def prefix(self, attention: PrefixedAttention) -> Prefix | None:
        """Keys and values for sequences that begin now, one row for all of them; None while there are none."""

    def own_prefix(self, attention: PrefixedAttention, states: Tensor, prompt: Tensor) -> RowPrefix | None:
        """What each sequence that begins now has for itself, in front of `prefix`; None where none has anything.

        Asked once, in the pass in which the sequences begin.

        Args:
            states: [rows, columns, hidden], what the attention reads in this pass.
            prompt: [rows, columns] bool, the tokens that belong to a prompt; of rows that this adapter does not act on
                there are none.
        """
        return None


class _Recorded(Exception):
    """Carries tensors out of a block, which need not be run any further."""

    def __init__(self, *found: Tensor) -> None:
        super().__init__()
        self.found = found


class _RecordingCache:
    """In the place of a KV cache: stops a block at its keys and values."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise _Recorded(keys, values)


def _stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Stops a block at what its attention reads."""
    raise _Recorded(args[0] if args else kwargs["hidden_states"])


class _CacheBehind:
    """In the place of a KV cache, or of none: hands out a prefix in front of all that the cache holds."""

    def __init__(self, cache: Any, prefix: Prefix) -> None:
        self._cache, self._prefix = cache, prefix

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._cache is not None:
            keys, values = self._cache.update(keys, values, *args, **kwargs)
        rows, prefix = keys.shape[0], self._prefix
        return (
            torch.cat([prefix.keys.to(keys).expand(rows, -1, -1, -1), keys], dim=2),
            torch.cat([prefix.values.to(values).expand(rows, -1, -1, -1), values], dim=2),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def attention_path(model: EditableModel, layer: int) -> str:
    """Where the attention of a block stands."""
    block = model.anatomy.blocks[layer]
    found = attention_of(model.module(block))
    assert found is not None, "blocks are found by their attention"
    return f"{block}.{found[0]}"


def unprefixable(model: EditableModel) -> str | None:
    """Why nothing can stand in front of a model's attention, in words, or None where it can."""
    kind, config = type(model.model).__name__, model.model.config.get_text_config()
    if model.is_encoder_decoder:
        return f"{kind} reads prompts with an encoder; a model with a decoder alone is needed"
    rotary = getattr(model.module(model.anatomy.trunk), _ROTARY, None)
    block = inspect.signature(model.module(model.anatomy.blocks[0]).forward).parameters
    attention = inspect.signature(model.module(attention_path(model, 0)).forward).parameters
    if rotary is None or "position_embeddings" not in block:
        return (
            f"{kind} does not give its blocks rotary position embeddings, so what stands in front of a text would have "
            "no place; a model in the manner of Llama is needed"
        )
    if _cache_name(block) is None or _cache_name(attention) is None or "attention_mask" not in attention:
        return f"the attention of {kind} takes no KV cache and mask by the names that are known"
    required = [p.name for p in block.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if unknown := [name for name in required if name not in ("hidden_states", "attention_mask")]:
        return f"the blocks of {kind} also need {', '.join(unknown)}, and what that is in front of a text is not known"
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    windowed = getattr(config, "sliding_window", None) is not None and not getattr(config, "layer_types", None)
    if windowed or any(one != "full_attention" for one in kinds):
        return f"some layers of {kind} see a sliding window only, from which what stands in front of a text falls out"
    scaling = getattr(rotary, "rope_type", "default")
    if not isinstance(scaling, str) or scaling in ("dynamic", "longrope"):
        return f"the rotary embedding of {kind} ({scaling}) changes with the length of the text"
    return None


def _cache_name(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    return next((name for name in _CACHES if name in parameters), None)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to attention scores: nothing where it is True."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


class PrefixedAttention:
    """A block's attention, and what is put in front of it while it is called as a hook before the attention.

    Args:
        model: one that is not `unprefixable`; layer: the block's number.

    Attributes:
        path, attention: where the attention stands, and itself.
        contributions: of what is attached, in the order of attachment.
    """

    def __init__(self, model: EditableModel, layer: int) -> None:
        self.path = attention_path(model, layer)
        self.attention = model.module(self.path)
        self.contributions: list[PrefixContribution] = []
        self._block = model.module(model.anatomy.blocks[layer])
        self._block_cache = str(_cache_name(inspect.signature(self._block.forward).parameters))
        self._rotary: Any = getattr(model.module(model.anatomy.trunk), _ROTARY)
        self._config = model.model.config.get_text_config()
        self._tracker = model.sequences
        self._handle: Any = None

    @classmethod
    def at(cls, model: EditableModel, path: str) -> PrefixedAttention | None:
        """The one that is in place at an attention."""
        found = vars(model.module(path)).get(_ATTRIBUTE)
        return found if isinstance(found, cls) else None

    @classmethod
    def put(cls, model: EditableModel, path: str) -> PrefixedAttention:
        """Put one in place. Raises ModelError where a model has no such attention, or cannot be prefixed."""
        if (reason := unprefixable(model)) is not None:
            raise ModelError(f"nothing can be put in front of the attention of {model.model_id}: {reason}")
        layer = next((n for n, block in enumerate(model.anatomy.blocks) if path.startswith(f"{block}.")), 0)
        made = cls(model, layer)
        if made.path != path:
            raise ModelError(f"{path} is not the attention of a block; the nearest one is {made.path}")
        setattr(made.attention, _ATTRIBUTE, made)
        made._handle = made.attention.register_forward_pre_hook(made, with_kwargs=True)
        return made

    def remove(self, contribution: Contribution) -> None:
        """Take a contribution out; with the last one, the attention is as it was."""
        self.contributions = [c for c in self.contributions if c is not contribution]
        if not self.contributions:
            self._handle.remove()
            delattr(self.attention, _ATTRIBUTE)

    def keys_and_values(
        self, states: Tensor, positions: Tensor, keeping: object | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the block's attention would put on its KV cache for hidden states that enter the block.

        Args:
            states: [rows, places, hidden].
            positions: [rows, places], in tokens; the text's first one stands at 0.
            keeping: whose changes of weight act, see `SequenceTracker.suspended`.

        Returns:
            keys, values: [rows, heads, places, width] each.
        """
        keys, values = self._stopped(states, positions, keeping)
        return keys, values

    def entering(self, states: Tensor) -> Tensor:
        """What the attention reads of hidden states that enter the block: past the norm in front of it, if one is.

        Args:
            states: [rows, places, hidden]; what is returned has the same shape.
        """
        # Before the hook that is in place, if one is: the attention is not to be run.
        handle = self.attention.register_forward_pre_hook(_stop, with_kwargs=True, prepend=True)
        try:
            (found,) = self._stopped(states, torch.zeros(states.shape[:2]))
        finally:
            handle.remove()
        return found

    def _stopped(self, states: Tensor, positions: Tensor, keeping: object | None = None) -> tuple[Tensor, ...]:
        """What stops the block, run over hidden states at these positions."""
        parameter = next(self._block.parameters())
        states, positions = states.to(parameter), positions.to(parameter.device)
        arguments = {self._block_cache: _RecordingCache(), "position_embeddings": self._rotary(states, positions)}
        with self._tracker.suspended(keeping):
            try:
                self._block.forward(states, attention_mask=None, **arguments)  # no pass that a probe should see
            except _Recorded as recorded:
                return recorded.found
        raise ModelError(f"{type(self._block).__name__} ran without putting its keys and values on a cache")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._tracker.is_suspended:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        prefix = self._prefix(states)
        return None if prefix is None else (args, self.behind(prefix, states, kwargs))

    def _prefix(self, states: Tensor) -> Prefix | None:
        """What the rows of the pass under way read. Of themselves, the attention reads [rows, columns, hidden]."""
        rows, current = int(states.shape[0]), self._tracker.current
        adapters = None if current is None else current.store.adapters
        own: list[tuple[Prefix, ...]] = [()] * rows
        for contribution in self.contributions:
            acts = torch.ones(rows, dtype=torch.bool)
            if adapters is not None:
                acts = adapters.having(self._tracker.owners.get(contribution))
            apart: RowPrefix | None = None
            if current is None:  # modules that are run by hand: whose prompt it is, nobody says
                shared = contribution.prefix(self)
            else:
                shared, apart = self._settled(contribution, states, acts, current)
            mine = [()] * rows if apart is None else apart.each
            behind = () if shared is None else (shared,)
            own = [
                (*parts, *first, *behind) if here else parts
                for parts, first, here in zip(own, mine, acts.tolist(), strict=True)
            ]
        if current is None:
            return Prefix.of_rows(own)
        # Put together once, not again for every token that is written.
        joined = current.store.decided.get(self)
        if joined is None or joined.own != own:
            joined = current.store.decided[self] = _Joined(own)
        return joined.prefix

    def _settled(
        self, contribution: PrefixContribution, states: Tensor, acts: Tensor, current: ForwardPass
    ) -> tuple[Prefix | None, RowPrefix | None]:
        """What a contribution gave when these sequences began; nothing if it was attached after that."""
        decided = current.store.decided
        if contribution not in decided and not current.store.frozen:
            prompt = current.prompt & acts.to(current.prompt.device).unsqueeze(1)
            decided[contribution] = contribution.prefix(self), contribution.own_prefix(self, states, prompt)
        found: tuple[Prefix | None, RowPrefix | None] = decided.get(contribution, (None, None))
        return found

    def behind(self, prefix: Prefix, states: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the attention with a prefix in front.

        Args:
            states: [rows, columns, hidden], what the attention reads; kwargs: its arguments as they are.

        Raises:
            ModelError: an implementation of attention that takes no mask as a tensor.
        """
        name = next((name for name in _CACHES if name in kwargs), None)
        implementation = self._config._attn_implementation
        if implementation not in _IMPLEMENTATIONS or name is None or "attention_mask" not in kwargs:
            raise ModelError(
                f"an attention of the implementation {implementation!r} cannot read what stands in front of a text; "
                f"load the model with attn_implementation={' or '.join(map(repr, _IMPLEMENTATIONS))}"
            )
        cache, mask = kwargs[name], kwargs["attention_mask"]
        rows, columns = int(states.shape[0]), int(states.shape[1])
        visible = prefix.visible.to(states.device)
        # Without a mask, `sdpa` lets each token read what stands before it, and would begin to count at the prefix; in
        # `eager` it means that all is read.
        in_order = implementation == "sdpa" and columns > 1
        if mask is None and (in_order or not bool(visible.all())):
            past = 0 if cache is None else int(cache.get_seq_length(self.attention.layer_idx))
            mask = torch.ones(columns, past + columns, dtype=torch.bool, device=states.device)[None, None]
            mask = mask.tril(past) if in_order else mask
            mask = mask if implementation == "sdpa" else _added(mask, states.dtype)
        if mask is not None:
            visible = visible if mask.dtype == torch.bool else _added(visible, mask.dtype)
            wide = (rows, mask.shape[1], columns, -1)
            mask = torch.cat([visible[:, None, None].expand(*wide), mask.expand(*wide)], dim=-1)
        return {**kwargs, name: _CacheBehind(cache, prefix), "attention_mask": mask}
