"""The checkpoint that comes with the package, and opening it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.errors import ArtifactError

if TYPE_CHECKING:
    import torch

    from errata.model import EditableModel

__all__ = ["ATLAS_NAMES", "checkpoint_folder", "open_atlas", "open_checkpoint", "shipped_provenance"]

ATLAS_NAMES = ("atlas", "atlas-instruct")
_HERE = Path(__file__).parent


def checkpoint_folder() -> Path:
    """Where the shipped model lies, in Hugging Face form; its instruction-tuned factors are in `instruct/`.

    Raises:
        ArtifactError: the package was installed without it.
    """
    folder = _HERE / "checkpoint"
    if not (folder / "model.safetensors").is_file():
        raise ArtifactError(
            "the atlas checkpoint is missing from this installation; install errata again, or train one where it is "
            f"looked for (an hour or two): errata atlas train --out {shlex.quote(str(folder))}"
        )
    return folder


def shipped_provenance() -> dict[str, Any]:
    """How the shipped checkpoint was made and what was measured of it."""
    record: dict[str, Any] = json.loads((checkpoint_folder() / "provenance.json").read_text(encoding="utf-8"))
    return record


def open_checkpoint(
    folder: Path, model_id: str, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> EditableModel:
    """Load an atlas of any size from a run's folder; float32 in memory unless a dtype is given."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from errata.model import EditableModel

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    # Eager attention is the fastest on a CPU for a model this small.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32, attn_implementation="eager")
    return EditableModel(model if device is None else model.to(device), tokenizer, model_id=model_id)


def open_atlas(
    name: str = "atlas", *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> EditableModel:
    """Load the shipped atlas, or its instruction-tuned variant under the name "atlas-instruct"."""
    model = open_checkpoint(checkpoint_folder(), name, device=device, dtype=dtype)
    if name == "atlas-instruct":
        from errata.atlas.instruct import merge_instruct

        merge_instruct(model, checkpoint_folder() / "instruct")
        model.__dict__.pop("fingerprint", None)  # it was taken of the base, before the factors were added
    return model
