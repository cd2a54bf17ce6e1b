"""How a result was made: what has to be the same for two results to be comparable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from errata import __version__
from errata.editors import EditorConfig
from errata.evaluation.protocol import PROTOCOL
from errata.model import EditableModel

__all__ = ["run_provenance"]


def run_provenance(
    model: EditableModel, editor_config: EditorConfig | Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Version, protocol, the model with its weights' fingerprint, where it ran, and the editor's settings, as JSON.

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
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        # Through JSON, so that it compares with what was saved: lists, not tuples.
        "settings": None if settings is None else json.loads(json.dumps(dict(settings))),
    }
