"""What a model makes of a text as it reads it: the new tokens of MemoryLLM's self-update (2402.04624, figure 1b).

    for each block l:   [.. ; h_{l+1}] = block_l([b_l ; e_l + p_l ; h_l]),   e_l the K newest slots of θ_l
                        e'_l = the last K outputs;  only the text's own go on to block l+1

Of a text shorter than K tokens the newest slots ask too, so that there are always K outputs. The first text of all
finds no slots. b_l, p_l and how blocks are changed meanwhile: `adapters.pool_network`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.adapters import PoolAdapter
from errata.adapters.pool_network import PoolNetwork
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.prefixed_attention import Prefix, PrefixedAttention
from errata.model.probes import probing

__all__ = ["Compression", "Injected"]


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
        self.attentions = [PrefixedAttention(model, layer) for layer in range(model.layer_count)]

    @torch.no_grad()
    def __call__(self, adapters: Sequence[PoolAdapter], chunks: Sequence[Sequence[int]]) -> list[Tensor]:
        """The new memory tokens of each pool, [L, K, d]; of an empty one fewer, where its text is shorter than K.

        All are read in one batch by the model that writes pools, whatever is attached.

        Args:
            adapters: pools of this model with one network; chunks: a text for each, as token ids without a beginning
                token.

        Raises:
            ConfigError: the pools have different networks, or differ in K.
        """
        (network, *others) = {adapter.network for adapter in adapters}
        if others:
            raise ConfigError(
                "pools that are updated together must all have the same network and number of new slots per update"
            )
        device = self.model.device
        slots = torch.stack([adapter.pool.newest().to(device) for adapter in adapters], dim=1)
        filled = torch.tensor([not adapter.pool.is_empty for adapter in adapters])
        made, counts = self.written(network, slots, filled, chunks)
        return [made[:, row, -count:] for row, count in enumerate(counts.tolist())]

    def written(
        self, network: PoolNetwork, slots: Tensor, filled: Tensor, chunks: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """New memory tokens of rows that are read side by side, differentiable in network and slots.

        Args:
            slots: [L, rows, K, d], the newest of each row's pool; filled: [rows] bool, False where it has none yet.
            chunks: each row's text.

        Returns:
            [L, rows, at most K, d], and [rows], how many of them count, from the end.
        """
        model, rows, new, device = self.model, len(chunks), network.new, self.model.device
        lengths = torch.tensor([len(chunk) for chunk in chunks])
        asking = torch.where(filled, (new - lengths).clamp(min=0), 0)  # slots, the newest ones, that ask too
        columns = int((lengths + asking).max())
        places = torch.arange(columns) - (columns - lengths).unsqueeze(1)  # [rows, columns]; the text begins at 0
        ids = torch.full((rows, columns), int(model.tokenizer.pad_token_id))
        for row, chunk in enumerate(chunks):
            ids[row, columns - len(chunk) :] = torch.tensor(chunk)
        slots = slots + network.positions.to(slots).unsqueeze(1)
        beginning = network.beginning.to(slots).view(-1, 1, 1, slots.shape[-1]).expand(-1, rows, -1, -1)
        # The other slots are only asked. They stand where they stand in the row, whoever asks.
        before = torch.arange(-new - 1, 0).expand(rows, -1)
        visible = (before < -asking.unsqueeze(1)) & (filled.unsqueeze(1) | (before == -new - 1))
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
                return args, self.attentions[layer].behind(prefixes[layer], states, kwargs)

            return probe

        def leaving(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output)[:, -new:].to(device))

        blocks = model.anatomy.blocks
        probes = {attention.path: reading_of(layer) for layer, attention in enumerate(self.attentions)}
        if bool(asking.any()):
            probes |= {block: entering(layer) for layer, block in enumerate(blocks)}
        with network.acting(model):
            prefixes = [
                Prefix(*attention.keys_and_values(torch.cat(parts, dim=1), before, network), visible.to(device))
                for attention, *parts in zip(self.attentions, beginning, slots, strict=True)
            ]
            with probing(model.model, before=probes, after=dict.fromkeys(blocks, leaving)):
                model.module(model.anatomy.trunk)(
                    input_ids=ids.to(device),
                    attention_mask=(places >= -asking.unsqueeze(1)).long().to(device),
                    position_ids=places.to(device),
                    use_cache=False,
                )
        return torch.stack(outputs), lengths + asking

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
            ConfigError: an adapter is given twice, or the pools differ in network or K.
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
