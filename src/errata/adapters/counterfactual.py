"""SERAC's counterfactual model: a small language model that reads an edit and a question, and answers by the edit.

The published one is a language model of its own with the base's tokenizer. This one has no vocabulary of its own at
all: it reads tokens by the base model's word embeddings, and what it says is read by the base model's head. Both stay
as they are; between them are two blocks of Llama's kind. So it is as large as its blocks, whatever the vocabulary, and
its answers stand in the base's own terms. And it is made to copy: beside what its blocks say stands a pointer, one more
attention over all that was read, whose values are the words themselves (as in See, Liu and Manning 2017).

    h_t = W x_t + C Σ_j a_tj w_j,   a_t = softmax_j≤t (Q x_t · K x_j / √width)

with x the blocks' states and w the word embeddings, each brought to one size. All that it has to learn is where the
answer stands.

Knows embeddings and blocks. Knows nothing of edits, nor how it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errata.adapters.base import random_rotation
from errata.errors import ConfigError

__all__ = ["CounterfactualNetwork", "NetworkShape"]


@dataclass(frozen=True)
class NetworkShape:
    """Sizes of a counterfactual model.

    Attributes:
        embedding: width of the base's word embeddings; hidden: of the states that its head reads.
        width, blocks, heads: of the model itself; its MLPs are four times as wide.
    """

    embedding: int
    hidden: int
    width: int = 128
    blocks: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 1 or self.width % (2 * self.heads):
            raise ConfigError(
                f"a counterfactual model needs sizes of at least 1 and a width that is a multiple of twice its heads, "
                f"not width {self.width} with {self.heads} heads"
            )

    def to_record(self) -> dict[str, int]:
        return asdict(self)


class CounterfactualNetwork(nn.Module):
    """Blocks between the base model's word embeddings and its head.

    Where the base's head is its embedding, as in many small models, C begins as the identity: what is pointed at is
    said. Elsewhere it has to be learned too.
    """

    def __init__(self, shape: NetworkShape, generator: torch.Generator | None = None) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        self.shape = shape
        config = LlamaConfig(
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            num_hidden_layers=shape.blocks,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            attn_implementation="eager",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0 if generator is None else int(torch.randint(1 << 31, (), generator=generator)))
            self.blocks = LlamaModel(config)
            self.read = nn.Linear(shape.embedding, shape.width, bias=False)
            self.write = nn.Linear(shape.width, shape.hidden)
            self.seeking = nn.Linear(shape.width, shape.width, bias=False)
            self.found = nn.Linear(shape.width, shape.width, bias=False)
            self.copied = nn.Linear(shape.embedding, shape.hidden, bias=False)
        nn.init.eye_(self.copied.weight)
        del self.blocks.embed_tokens  # it is always given embeddings

    def forward(self, embedding: nn.Module, texts: Sequence[Sequence[int]]) -> Tensor:
        """The state behind every token, for the base's head, [texts, longest, hidden]; padding stands on the right.

        Args:
            embedding: the base's word embeddings; texts: token ids.
        """
        device = self.read.weight.device
        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
        weight = next(embedding.parameters())
        words = embedding(ids.to(weight.device)).detach().to(device, torch.float32)
        # Word embeddings are anywhere between 0.01 and 10 in size, depending on the family.
        words = F.rms_norm(words, words.shape[-1:])
        output = self.blocks(inputs_embeds=self.read(words), attention_mask=mask.to(device), use_cache=False)
        states = output.last_hidden_state
        # Padding stands on the right, so what is causal never reads it.
        pointed = F.scaled_dot_product_attention(self.seeking(states), self.found(states), words, is_causal=True)
        said: Tensor = self.write(states) + self.copied(pointed)
        return said

    def rotated(self, generator: torch.Generator) -> CounterfactualNetwork:
        """A copy that says something else: its states are turned by a random rotation."""
        other = CounterfactualNetwork(self.shape)
        other.load_state_dict(self.state_dict())
        rotation = random_rotation(self.shape.hidden, generator)
        with torch.no_grad():
            for part in (other.write.weight, other.write.bias, other.copied.weight):
                part.copy_(rotation.to(part) @ part)
        return other

    @classmethod
    def from_tensors(cls, shape: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """As saved: the sizes of `NetworkShape.to_record` and a state dictionary."""
        network = cls(NetworkShape(**shape))
        network.load_state_dict(tensors)
        return network
