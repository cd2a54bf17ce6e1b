"""How a result was made: what has to be the same for two results to be comparable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from errata import __version__
from errata.editors import EditorConfig
from errata.evaluation.protocol import PROTOCOL
from errata.evaluation.rows import digest
from errata.model import EditableModel

__all__ = ["run_provenance", "tokenizer_settings"]


def tokenizer_settings(model: EditableModel) -> dict[str, Any]:
    """What a tokenizer does to a prompt that is not in its words, as JSON.

    `padding_side` is its own; errata itself pads on the left to generate and on the right to score. `begins_with` are
    the ids it puts in front of every text, `ends_with` those behind; `chat_template` is a digest, None without one.
    """
    tokenizer = model.tokenizer
    bare, whole = (list(tokenizer("x", add_special_tokens=way, padding=False)["input_ids"]) for way in (False, True))
    ahead = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    template = getattr(tokenizer, "chat_template", None)
    return {
        "class": type(tokenizer).__name__,
        "tokens": len(tokenizer),
        "padding_side": tokenizer.padding_side,
        "begins_with": whole[:ahead],
        "ends_with": whole[ahead + len(bare) :],
        "chat_template": None if template is None else digest(json.dumps(template, sort_keys=True)),
    }


def run_provenance(
    model: EditableModel, editor_config: EditorConfig | Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Version, protocol, the model with its weights' fingerprint and its tokenizer, where it ran, and the
    editor's settings, as JSON.

    Args:
        editor_config: the settings the edits were written with; None where nothing was edited.
    """
    settings = editor_config.to_record() if isinstance(editor_config, EditorConfig) else editor_config
    return {
        "errata": __version__,
        "protocol": PROTOCOL,
        "model": model.model_id,
        "revision": model.revision,
        "fingerprint": model.fingerprint,
        "tokenizer": tokenizer_settings(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        # Through JSON, so that it compares with what was saved: lists, not tuples.
        "settings": None if settings is None else json.loads(json.dumps(dict(settings))),
    }
