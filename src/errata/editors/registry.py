"""All editing methods by name. Other packages add theirs through the entry-point group `errata.editors`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from errata.errors import ConfigError, unknown_name

__all__ = ["GROUP", "editor_class", "editor_names", "method_of"]

GROUP = "errata.editors"

# Targets are imported when asked for, so listing the names costs nothing.
_BUILT_IN: dict[str, str] = {
    "alphaedit": "errata.editors.alphaedit:AlphaEdit",
    "emmet": "errata.editors.memit:Emmet",
    "ft": "errata.editors.ft:FineTune",
    "grace": "errata.editors.grace:Grace",
    "lora": "errata.editors.lora:Lora",
    "melo": "errata.editors.melo:Melo",
    "memit": "errata.editors.memit:Memit",
    "memoryllm": "errata.editors.memoryllm:MemoryLLM",
    "memoir": "errata.editors.memoir:Memoir",
    "mend": "errata.editors.mend:Mend",
    "rome": "errata.editors.rome:Rome",
    "serac": "errata.editors.serac:Serac",
    "simie": "errata.editors.simie:Simie",
    "ultraedit": "errata.editors.ultraedit:UltraEdit",
    "wise": "errata.editors.wise:Wise",
}


def _targets() -> dict[str, str]:
    targets = dict(_BUILT_IN)
    for entry in entry_points(group=GROUP):
        if targets.get(entry.name, entry.value) != entry.value:
            raise ConfigError(
                f"two editors are called {entry.name!r}: {targets[entry.name]} and {entry.value}; uninstall one of them"
            )
        targets[entry.name] = entry.value
    return targets


def editor_names() -> Iterator[str]:
    """The names of all methods, sorted."""
    yield from sorted(_targets())


def editor_class(name: str) -> Any:
    """The class of an editing method. Raises ConfigError, with the nearest names, for one that does not exist."""
    targets = _targets()
    if name not in targets:
        raise ConfigError(unknown_name("method", name, targets))
    module, _, attribute = targets[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def method_of(run: str) -> str:
    """The method of a run's name, which is METHOD, or METHOD@LABEL where one method is run under several settings.

    Raises:
        ConfigError: the label is empty or no name for a folder; the method does not exist.
    """
    method, sign, label = run.partition("@")
    if sign and not _LABEL.fullmatch(label):
        raise ConfigError(f"{run!r}: what stands behind @ must be letters, digits, _ and -, as in rome@original")
    editor_class(method)
    return method
