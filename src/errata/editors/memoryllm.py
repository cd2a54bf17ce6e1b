"""MemoryLLM: the model reads a text and rewrites a part of its own memory (ICML 2024, 2402.04624).

    for each block l:   [.. ; h_{l+1}] = block_l([b_l ; e_l ; h_l]),   e_l the K newest slots of θ_l
                        e'_l = the last K outputs;  only the text's own go on to block l+1                  (figure 1b)
                        θ_l ← [θ_l without K slots drawn at random ; e'_l]

One forward pass, no gradient. What is rewritten, and how it is read: `adapters.pool`. Of a text shorter than K tokens
the newest slots ask too, so that there are always K outputs. The first text of all finds no slots, and fills the pool
with what it is compressed into, repeated. Long texts are cut into chunks, of which each is an update.

An edit is injected as the statement that prompt and target make. The training routines of the paper are not built yet:
a model that was not trained to read such slots is changed by them, but does not come to know what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from errata.adapters import PoolAdapter, RevertResult
from errata.adapters.pool import window_of
from errata.edit import Edit
from errata.editors.base import Editor, EditorConfig, Written
from errata.editors.layers import shape_key
from errata.editors.memory import MemoryPart, reading
from errata.errors import ConfigError, EditError
from errata.model import EditableModel
from errata.model.prefixed_attention import Prefix, PrefixedAttention, unprefixable
from errata.model.probes import probing
from errata.progress import NO_PROGRESS, Progress

__all__ = ["Compression", "Injected", "MemoryLLM", "MemoryLLMConfig"]

_CHUNK = 512  # tokens of a text that the paper reads together


@dataclass(frozen=True, kw_only=True)
class MemoryLLMConfig(EditorConfig):
    """Settings of MemoryLLM; the defaults are those of the paper's 7B model.

    Attributes:
        slots: N, memory tokens per layer; new: K, how many of them an update drops and appends.
        chunk_tokens: longest piece of a text that is read in one update. None: 512, or what the model's positions leave
            behind K slots.
        spacing: between the positions of neighbouring slots, in tokens. None: 1, or less where the slots would reach
            further than half of the positions that the model knows.
    """

    adjustable: ClassVar[frozenset[str]] = EditorConfig.adjustable | {"chunk_tokens"}

    slots: int = 7680
    new: int = 256
    chunk_tokens: int | None = None
    spacing: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.new <= self.slots:
            raise ConfigError(f"new={self.new} must be from 1 to slots={self.slots}: an update takes that many")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens={self.chunk_tokens} must be at least 1")

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        if shape_key(model) != ("llama", 32, 4096):
            return None
        return {"slots": 7680, "new": 256, "source": "MemoryLLM-7B (2402.04624)"}

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        """The paper's proportions: K of the width as 256 of 4,096, N = 30 K."""
        new = max(1, model.anatomy.hidden_size // 16)
        return {"slots": 30 * new, "new": new}


@dataclass(frozen=True)
class Injected:
    """A text that was put into a pool: its name there, its length in tokens, and how many updates it took."""

    name: str
    tokens: int
    updates: int


class Compression:
    """What a model makes of texts as it reads them on top of the newest slots of pools.

    Args:
        model: one that is not `unprefixable`.
    """

    def __init__(self, model: EditableModel) -> None:
        self.model = model
        self._attentions = [PrefixedAttention(model, layer) for layer in range(model.layer_count)]

    @torch.no_grad()
    def __call__(self, adapters: Sequence[PoolAdapter], chunks: Sequence[Sequence[int]]) -> list[Tensor]:
        """The new memory tokens of each pool, [L, K, d]; of an empty one fewer, where its text is shorter than K.

        All are read in one batch by the bare model, whatever is attached.

        Args:
            adapters: pools of this model with one K; chunks: a text for each, as token ids without a beginning token.

        Raises:
            ConfigError: the pools differ in K.
        """
        (new, *others) = {adapter.pool.new for adapter in adapters}
        if others:
            raise ConfigError("pools that are updated together must all have the same number of new slots per update")
        model, rows, device = self.model, len(chunks), self.model.device
        lengths = torch.tensor([len(chunk) for chunk in chunks])
        filled = torch.tensor([not adapter.pool.is_empty for adapter in adapters])
        asking = torch.where(filled, (new - lengths).clamp(min=0), 0)  # slots, the newest ones, that ask too
        columns = int((lengths + asking).max())
        places = torch.arange(columns) - (columns - lengths).unsqueeze(1)  # [rows, columns]; the text begins at 0
        ids = torch.full((rows, columns), int(model.tokenizer.pad_token_id))
        for row, chunk in enumerate(chunks):
            ids[row, columns - len(chunk) :] = torch.tensor(chunk)
        slots = torch.stack([adapter.pool.newest().to(device) for adapter in adapters], dim=1)  # [L, rows, K, d]
        beginning = torch.stack([adapter.beginning for adapter in adapters], dim=1).to(slots).unsqueeze(2)
        # The other slots are only asked. They stand where they stand in the row, whoever asks.
        before = torch.arange(-new - 1, 0).expand(rows, -1)
        visible = (before < -asking.unsqueeze(1)) & (filled.unsqueeze(1) | (before == -new - 1))
        prefixes = [
            Prefix(*attention.keys_and_values(torch.cat(parts, dim=1), before), visible.to(device))
            for attention, *parts in zip(self._attentions, beginning, slots, strict=True)
        ]
        asks = (places < 0) & (places >= -asking.unsqueeze(1))
        taken = (places + new).clamp(0, new - 1).unsqueeze(2).expand(-1, -1, slots.shape[-1]).to(device)
        outputs: list[Tensor] = []

        def entering(layer: int) -> Callable[..., Any]:
            def probe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                states = args[0] if args else kwargs["hidden_states"]
                own = slots[layer].gather(1, taken).to(states)
                states = torch.where(asks.to(states.device).unsqueeze(2), own, states)
                return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

            return probe

        def reading_of(layer: int) -> Callable[..., Any]:
            def probe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                states = args[0] if args else kwargs["hidden_states"]
                return args, self._attentions[layer].behind(prefixes[layer], states, kwargs)

            return probe

        def leaving(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output)[:, -new:].to(device))

        blocks = model.anatomy.blocks
        probes = {attention.path: reading_of(layer) for layer, attention in enumerate(self._attentions)}
        if bool(asking.any()):
            probes |= {block: entering(layer) for layer, block in enumerate(blocks)}
        with model.bare(), probing(model.model, before=probes, after=dict.fromkeys(blocks, leaving)):
            model.module(model.anatomy.trunk)(
                input_ids=ids.to(device),
                attention_mask=(places >= -asking.unsqueeze(1)).long().to(device),
                position_ids=places.to(device),
                use_cache=False,
            )
        made = torch.stack(outputs)  # [L, rows, at most K, d]
        counts = (lengths + asking).tolist()
        return [made[:, row, -count:] for row, count in enumerate(counts)]

    def inject(
        self,
        adapters: Sequence[PoolAdapter],
        texts: Sequence[tuple[str, Sequence[int]]],
        chunk_tokens: int,
    ) -> list[Injected]:
        """Update pools that have nothing to do with each other, side by side, each with a text of its own.

        Args:
            adapters: another one for each text, attached or not.
            texts: names, and token ids without a beginning token; cut into chunks of `chunk_tokens`.

        Raises:
            ConfigError: an adapter is given twice, or the pools differ in K.
            BaseMismatchError: an adapter belongs to another model.
            NumericsError: new memory tokens are not finite; that chunk is not in its pool, nor is any after it.
        """
        if len({id(adapter) for adapter in adapters}) < len(adapters):
            raise ConfigError("a pool can take one text at a time; give its texts one after the other")
        for adapter in adapters:
            adapter.check_base(self.model)
        named = [
            (adapter, name, [ids[at : at + chunk_tokens] for at in range(0, len(ids), chunk_tokens)])
            for adapter, (name, ids) in zip(adapters, texts, strict=True)
        ]
        for number in range(max(len(chunks) for _, _, chunks in named)):
            going = [(adapter, name, chunks[number]) for adapter, name, chunks in named if number < len(chunks)]
            made = self([adapter for adapter, _, _ in going], [chunk for _, _, chunk in going])
            for (adapter, name, _), tokens in zip(going, made, strict=True):
                adapter.update(tokens, name)
        return [Injected(name, sum(map(len, chunks)), len(chunks)) for _, name, chunks in named]


class MemoryLLM(Editor[MemoryLLMConfig]):
    """Reads each edit as a statement, and rewrites a part of a pool of memory tokens with what it read."""

    name = "memoryllm"
    summary = (
        "a pool of memory tokens per layer, which the model rewrites as it reads a text; no gradient, but edits take "
        "only on a model that was trained to read it (not built yet)"
    )
    paper = "MemoryLLM, ICML 2024 (2402.04624)"
    Config = MemoryLLMConfig
    adapter: PoolAdapter

    @classmethod
    def unsuitable(cls, model: EditableModel) -> str | None:
        return super().unsuitable(model) or unprefixable(model)

    @property
    def chunk_tokens(self) -> int:
        """Tokens that an update reads at most. Raises ConfigError where the model has no positions for them."""
        window, config = window_of(self.model), self.config
        left = _CHUNK if window is None else window - config.new - 1
        chosen = min(_CHUNK, left) if config.chunk_tokens is None else config.chunk_tokens
        if chosen < 1 or (window is not None and chosen > left):
            raise ConfigError(
                f"{self.model.model_id} knows {window} positions, which are too few for new={config.new} slots with "
                f"chunk_tokens={config.chunk_tokens} behind them; give smaller ones"
            )
        return chosen

    def _new_adapter(self) -> PoolAdapter:
        config = self.config
        return PoolAdapter.for_model(
            self.model,
            self.name,
            config.to_record(),
            slots=config.slots,
            new=config.new,
            seed=config.seed,
            spacing=config.spacing,
        )

    def _prepare(self, progress: Progress) -> None:
        self._compression = Compression(self.model)

    def _memory_to_prepare(self) -> list[MemoryPart]:
        numbers = self.model.layer_count * self.config.slots * self.model.anatomy.hidden_size
        remedy = "give fewer slots"
        return [MemoryPart("keys and values of the slots, at most", 2 * numbers * self.model.dtype.itemsize, remedy)]

    def _memory_to_write(self, edits: Sequence[Edit]) -> list[MemoryPart]:
        return [reading(self.model, self.chunk_tokens + self.config.new)]

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        (edit,) = edits
        passage = self.model.passage(edit.prompt, edit.target)
        ids = passage.ids[int(passage.ids[0] == self.model.tokenizer.bos_token_id) :]
        if len(ids) > self.chunk_tokens:
            raise EditError(
                f"prompt and target are {len(ids)} tokens, more than an update reads (chunk_tokens="
                f"{self.chunk_tokens}); shorten them, or inject them as a text (errata inject)"
            )
        # An edit given again with another target keeps its id, so what it wrote before is told by its updates.
        held = [old for old in self.adapter.edits() if old.id == edit.id and old.target != edit.target]
        stale = self.adapter.pool.updates_of(edit.id) if held else []
        self._compression.inject([self.adapter], [(edit.id, ids)], self.chunk_tokens)
        if stale:
            self.adapter.forget(edit.id, stale)
        return Written((None,))

    def inject(self, texts: Mapping[str, str], progress: Progress = NO_PROGRESS) -> list[Injected]:
        """Put texts of any length into the pool, one after the other. They are no edits: only the pool holds them.

        Args:
            texts: by a name, under which `explain` knows them.

        Raises:
            EditError: a text without tokens, or of an edit's name; nothing is injected.
            NumericsError: a text that gives memory tokens that are not finite; those before it are injected.
        """
        self.prepare(progress)
        tokenised = {}
        for name, text in texts.items():
            tokenised[name] = self.model.tokenizer(text, add_special_tokens=False, padding=False)["input_ids"]
            if not tokenised[name]:
                raise EditError(f"text {name!r} is empty; leave it out")
            if self.adapter.holds(name):
                raise EditError(f"text {name!r} has the name of an edit that this pool holds; give it another one")
        progress.start(f"{self.name}: injecting", len(texts))
        done = []
        for name, ids in tokenised.items():
            done += self._compression.inject([self.adapter], [(name, ids)], self.chunk_tokens)
            self.adapter.documents += 1
            progress.advance(note=f"{self.adapter.pool.updates} updates")
        return done

    def revert_exactly(self, edit_ids: Sequence[str], progress: Progress = NO_PROGRESS) -> list[RevertResult]:
        """As `Editor.revert_exactly`. Raises EditError too where texts were injected, which it does not keep."""
        if self.adapter.documents:
            raise EditError(
                f"{self.adapter.documents} texts were injected into this pool whose wording it does not keep, so they "
                "cannot be written anew; take the edits out without --exact, or build the pool anew"
            )
        return super().revert_exactly(edit_ids, progress)
