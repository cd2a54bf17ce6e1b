"""Tiny random models of every family errata is tested on, and a tokenizer that needs no file.

For tests: widths of a few dozen, two to six blocks, a vocabulary of bytes. Their knowledge is noise, but their
module trees, masks, caches and norms are those of the real families.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

from errata.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from errata.model import EditableModel

__all__ = ["FAMILIES", "byte_tokenizer", "metaspace_tokenizer", "tiny_hf_model", "tiny_model"]

_HIDDEN, _INNER, _HEADS, _BLOCKS, _VOCABULARY = 32, 96, 4, 4, 400

_T5: dict[str, Any] = {
    "tokenizer": "$A </s>",
    "d_model": _HIDDEN,
    "d_ff": _INNER,
    "d_kv": _HIDDEN // _HEADS,
    "num_layers": _BLOCKS,
    "num_heads": _HEADS,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}

# Config class and the settings that differ from the common ones, per family.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"config": "LlamaConfig", "num_key_value_heads": 2},
    "mistral": {"config": "MistralConfig", "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"config": "Qwen2Config", "num_key_value_heads": 2},
    "qwen3": {"config": "Qwen3Config", "num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {
        "config": "Gemma2Config",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
    },
    "gemma3": {
        "config": "Gemma3TextConfig",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
    },
    "phi3": {"config": "Phi3Config", "num_key_value_heads": 2},
    "gpt2": {
        "config": "GPT2Config",
        "n_embd": _HIDDEN,
        "n_inner": _INNER,
        "n_head": _HEADS,
        "n_layer": _BLOCKS,
        "n_positions": 256,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gptj": {
        "config": "GPTJConfig",
        "n_embd": _HIDDEN,
        "n_inner": _INNER,
        "n_head": _HEADS,
        "n_layer": _BLOCKS,
        "n_positions": 256,
        "rotary_dim": 4,
    },
    "gpt_neox": {"config": "GPTNeoXConfig"},
    "opt": {"config": "OPTConfig", "ffn_dim": _INNER, "word_embed_proj_dim": _HIDDEN, "dropout": 0.0},
    "falcon": {
        "config": "FalconConfig",
        "ffn_hidden_size": _INNER,
        "new_decoder_architecture": False,
        "multi_query": True,
    },
    "olmo2": {"config": "Olmo2Config", "num_key_value_heads": 2},
    # The factors weigh what the layers add against the embeddings, which a random T5 would only repeat.
    "t5": {"config": "T5Config", **_T5, "tie_word_embeddings": True, "initializer_factor": 2.0},
    "flan_t5": {"config": "T5Config", **_T5, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.5},
    "llava": {
        "config": "LlavaConfig",
        "text_config": {"model_type": "llama", "num_key_value_heads": 2},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": _HIDDEN,
            "intermediate_size": _INNER,
            "num_hidden_layers": 2 * _BLOCKS,  # larger than the text decoder, and still not taken for it
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        "image_token_id": _VOCABULARY - 1,
    },
}


# Words that become single tokens, so that a random model can be taught to say them.
_WORDS = (
    " Rome Paris London Bob Alice flute piano is The capital of France Spain Who wrote Hamlet Emma ? plays the was "
    "born in Ann Zed Berlin"
)


@functools.cache
def byte_tokenizer(template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: three special tokens, every byte, and a few whole words.

    `template` says where a text gets the beginning token <s> and the end token </s>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_WORDS] * 4, trainer)
    special = [(token, number) for number, token in enumerate(("<pad>", "<s>", "</s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@functools.cache
def metaspace_tokenizer(texts: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of sentencepiece: words begin with a marked space, unknown characters fall to bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    special = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts or ("the capital of France is Paris", "who wrote the book"), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_hf_model(family: str, seed: int = 0, vocabulary: int = _VOCABULARY, **changes: Any) -> PreTrainedModel:
    """A tiny random model of a family, in float32 and evaluation mode.

    Raises:
        ConfigError: the family is unknown.
    """
    import torch
    import transformers

    from errata.model.editable import auto_class

    if family not in FAMILIES:
        raise ConfigError(unknown_name("family", family, FAMILIES))
    settings = dict(FAMILIES[family])
    settings.pop("tokenizer", None)
    config_class = getattr(transformers, settings.pop("config"))
    common = {
        "vocab_size": vocabulary,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": _BLOCKS,
        "num_attention_heads": _HEADS,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        # Larger than usual, so that a random model's next tokens differ clearly and ties are out of the question.
        "initializer_range": 0.2,
        "attn_implementation": "eager",
    }
    if "text_config" in settings:
        settings["text_config"] = {**common, **settings["text_config"]}
    if {"n_embd", "d_model", "text_config"} & settings.keys():
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            del common[name]
    config = config_class(**{**common, **settings, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
    return model.eval()


@functools.cache
def _pattern(family: str, seed: int) -> PreTrainedModel:
    """Making a model takes transformers many times longer than copying one."""
    return tiny_hf_model(family, seed)


def tiny_model(family: str, seed: int = 0, **changes: Any) -> EditableModel:
    """A tiny random model of a family with a byte tokenizer, ready to be edited."""
    from errata.model import EditableModel

    model = tiny_hf_model(family, seed, **changes) if changes else copy.deepcopy(_pattern(family, seed))
    tokenizer = byte_tokenizer(FAMILIES[family].get("tokenizer", "<s> $A"))
    return EditableModel(model, tokenizer, model_id=f"tiny-{family}-{seed}")
