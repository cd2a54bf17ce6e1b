"""What a training of MemoryLLM runs a model through: texts become a stream of a pool's updates, and are asked about.

The same compression and the same reading as of an adapter (`editors.compression`, `adapters.pool_reading`), for many
texts at once and differentiably. Both stages of the training stand on it.

Knows models, pools and texts. Knows nothing of what is learned from them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.adapters.pool_network import PoolNetwork
from errata.adapters.pool_slots import Pool, last_ones
from errata.editors.compression import Compression
from errata.editors.pool_texts import ReadText
from errata.model import EditableModel
from errata.model.prefix_reading import reading
from errata.model.prefixed_attention import Prefix
from errata.model.scoring import length_batches
from errata.model.tokens import Passage

__all__ = ["Answers", "PoolPasses", "Stream", "survivors"]

_TOGETHER, _READ_TOGETHER = 1024, 640  # tokens of one pass, of texts and of questions


def survivors(updates: int, slots: int, new: int, layers: int, seed: int) -> list[Tensor]:
    """What is left of a pool's updates: per layer, numbers of new tokens (update · K + place), oldest first.

    A pool that holds no states says it, so that the same slots are dropped as in use.
    """
    pool = Pool(layers, slots, new, 0, seed)
    for _ in range(updates):
        pool.update(torch.zeros(layers, new, 0), "")
    numbers = ((pool.born - 1) * new + pool.places).gather(1, pool.order)
    return [row[row >= 0] for row in numbers]


@dataclass(frozen=True)
class Stream:
    """The updates of a step.

    Attributes:
        made: [L, updates, K, d], in the order in which they come into the pool.
        number: of the update that each text's segment is, by text and segment.
    """

    made: Tensor
    number: dict[tuple[int, int], int]


@dataclass(frozen=True)
class Answers:
    """What is said behind prompts.

    Attributes:
        logits: where answers are predicted, [n, vocabulary]; labels: what should be said there, [n].
        rows: of which passage, [n], ascending.
        looked: per block, the shares of attention that each token of a prompt gives to each place of the prefix,
            [tokens, heads, places]; askers: of which passage each token is, [tokens].
    """

    logits: Tensor
    labels: Tensor
    rows: Tensor
    looked: list[Tensor]
    askers: Tensor


class PoolPasses:
    """A network's passes over texts and questions.

    Args:
        slots, spacing: N of the pools, and the distance between neighbouring slots.
        warm: texts of a stream on top of whose new tokens the others are read.
    """

    def __init__(self, model: EditableModel, network: PoolNetwork, *, slots: int, spacing: float, warm: int) -> None:
        self.model, self.network, self.slots, self.spacing, self.warm = model, network, slots, spacing, warm
        self.compression = Compression(model)

    def twin(self) -> PoolPasses:
        """The same on a copy of the model, which another thread may run; the network's numbers are shared."""
        return PoolPasses(
            self.model.copy(), copy.copy(self.network), slots=self.slots, spacing=self.spacing, warm=self.warm
        )

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.model.tokenizer(text, add_special_tokens=False, padding=False)["input_ids"]
        return found

    def stream(self, texts: Sequence[ReadText], rng: random.Random) -> Stream:
        """Texts compressed, segment by segment, in a random order of texts."""
        warm, network = texts[: self.warm], self.network
        order = rng.sample(range(len(texts)), len(texts))
        nothing = network.positions.new_zeros(
            self.model.layer_count, len(warm), network.new, network.beginning.shape[1]
        )
        with torch.no_grad():
            first, counts = self.compression.written(
                network, nothing, torch.zeros(len(warm), dtype=torch.bool), [self.ids(one.segments[0]) for one in warm]
            )
            width, (layers, _, _, hidden) = first.shape[2], first.shape
            held = counts.clamp(max=width).unsqueeze(1)
            tiled = width - held + last_ones(network.new, held)  # as the first update of a pool
            first = first.gather(2, tiled.to(first.device)[None, :, :, None].expand(layers, -1, -1, hidden))
        below = first[:, [rng.randrange(len(warm)) for _ in texts]]
        pieces: dict[tuple[int, int], Tensor] = {}
        for segment in range(max(len(one.segments) for one in texts)):
            going = [number for number, one in enumerate(texts) if len(one.segments) > segment]
            ids = [self.ids(texts[number].segments[segment]) for number in going]
            newest = below.clone()
            for group in length_batches([max(len(one), network.new) for one in ids], _TOGETHER):
                rows = [going[place] for place in group]
                filled = torch.ones(len(rows), dtype=torch.bool)
                made, _ = self.compression.written(network, below[:, rows], filled, [ids[place] for place in group])
                for row, number in enumerate(rows):
                    pieces[number, segment] = made[:, row]
                newest[:, rows] = made.detach().to(newest)
            below = newest
        keys = [(number, segment) for number in order for segment in range(len(texts[number].segments))]
        return Stream(torch.stack([pieces[key] for key in keys], dim=1), {key: n for n, key in enumerate(keys)})

    def prefixes(self, states: Sequence[Tensor]) -> list[Prefix]:
        """What is read of slots of each block, [rows, n, d], oldest first; the beginning vector stands in front.

        To be called, as `read`, while the network is in place.
        """
        found = []
        for layer, (own, attention) in enumerate(zip(states, self.compression.attentions, strict=True)):
            rows, count, width = own.shape
            beginning = self.network.beginning[layer].to(own).view(1, 1, width).expand(rows, -1, -1)
            slots = self.spacing * torch.arange(-count, 0.0)
            places = torch.cat([torch.tensor([-self.spacing * (self.slots + 1)]), slots]).expand(rows, -1)
            found.append(Prefix(*attention.keys_and_values(torch.cat([beginning, own], dim=1), places, self.network)))
        return found

    def read(self, prefixes: Sequence[Prefix], passages: Sequence[Passage]) -> Answers:
        """What is said behind passages' prompts.

        Args:
            prefixes: of each block, one row for all passages, or one for each.
        """
        parts = []
        for group in length_batches([len(passage.ids) for passage in passages], _READ_TOGETHER):
            numbers = torch.tensor(group)
            batch = self.model.batch([passages[number] for number in group], side="right")
            rows, columns, labels = batch.answer_places()
            with reading(self.model, self.compression.attentions, [one.of(numbers) for one in prefixes]) as shares:
                states = self.model.trunk_states(batch)
            logits = self.model.head(states[rows, columns]).float()
            asking = batch.prompt_lengths.unsqueeze(1)
            tokens = (torch.arange(states.shape[1], device=asking.device) < asking).nonzero(as_tuple=True)
            looked = [share[tokens[0], :, tokens[1]] for (share,) in shares]
            parts.append((logits, labels, numbers[rows.cpu()], numbers[tokens[0].cpu()], looked))
        rows = torch.cat([part[2] for part in parts])
        order = rows.argsort(stable=True)
        return Answers(
            torch.cat([part[0] for part in parts])[order],
            torch.cat([part[1] for part in parts])[order],
            rows[order],
            [torch.cat(own) for own in zip(*(part[4] for part in parts), strict=True)],
            torch.cat([part[3] for part in parts]),
        )
