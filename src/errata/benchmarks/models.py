"""Random models of the shapes that benchmarks need: their speed and size are those of trained ones."""

from __future__ import annotations

import torch

from errata.model import EditableModel

__all__ = ["random_llama"]


def random_llama(blocks: int, hidden: int, attention: str | None = None) -> EditableModel:
    """A Llama of so many random blocks, its keys four times as wide as `hidden`, with atlas's tokenizer.

    Args:
        attention: implementation of attention, transformers' own choice if not given.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = EditableModel.load("atlas").tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        **({} if attention is None else {"attn_implementation": attention}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EditableModel(LlamaForCausalLM(config).eval(), tokenizer, model_id=f"random-{blocks}-{hidden}")
