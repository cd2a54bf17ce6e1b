"""Options that several commands share, and how they become library calls."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.output import log
from errata.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from errata.adapters import Adapter
    from errata.datasets import EditFile
    from errata.model import EditableModel

__all__ = [
    "check_out",
    "load_adapter",
    "load_edits",
    "load_model",
    "load_texts",
    "parse_numbers",
    "parse_settings",
    "quiet",
    "save_adapter",
    "this_command",
]


def quiet() -> None:
    """Keep libraries' own bars and notices off standard error."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def this_command() -> str:
    """What was typed, to be kept with what it made."""
    return shlex.join(["errata", *sys.argv[1:]])


def check_out(folder: Path) -> None:
    """Before long work: whether its results can be written to a folder, which may have to be made.

    Raises:
        ConfigError: the name or one above it is a file's.
        ArtifactError: writing there is not allowed.
    """
    place = folder
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"--out {folder} cannot be a folder: {place} is a file; give another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ArtifactError(f"--out {folder} cannot be written: no permission for {place}; give another --out")


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Raises ArtifactError, naming the folder, when the disk is full or does not let us write."""
    from safetensors import SafetensorError

    try:
        adapter.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"the adapter cannot be written to {folder}: {error}") from error


def load_model(name: str, device: str | None = None, dtype: str | None = None) -> EditableModel:
    quiet()
    from errata.model import EditableModel

    return EditableModel.load(name, device=device, dtype=dtype)


def load_edits(path: Path, limit: int | None, strict: bool) -> EditFile:
    """Read a file of edits and report every record that was left out."""
    from errata.datasets import read_edits

    found = read_edits(path, limit=limit, strict=strict)
    for problem in found.problems:
        log(f"left out: {problem}")
    if found.problems:
        log(f"{len(found.problems)} records left out, {len(found.edits)} read; --strict stops at the first instead")
    if found.conflicts:
        log(f"{len(found.conflicts)} prompts have several targets, all kept; errata data show {path} lists them")
    return found


def load_adapter(folder: Path | None, model: EditableModel) -> Adapter | None:
    from errata.adapters import AutoAdapter

    return None if folder is None else AutoAdapter.from_pretrained(folder, model=model)


def load_texts(path: Path | None) -> list[str]:
    """Held-out text for perplexity: the file's, or errata's own prose."""
    from errata.datasets.builtin import corpus_texts, held_out_texts

    return held_out_texts() if path is None else corpus_texts(path)


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs; values are JSON where they can be, else text. Lists become tuples."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name:
            raise ConfigError(f"--set {pair!r} is not understood; write --set name=value, as in --set steps=50")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        settings[name.strip().replace("-", "_")] = tuple(value) if isinstance(value, list) else value
    return settings


def parse_numbers(text: str, option: str, least: int = 1) -> list[int]:
    """ "1,10,100" as whole numbers, none below the least."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise ConfigError(
            f"{option} {text!r} is not understood; write whole numbers from {least} up with commas, as in "
            f"{'1,10,100' if least else '0,1,2'}"
        )
    return numbers
