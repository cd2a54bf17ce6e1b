"""Where errata keeps what can be made again. No folder is created before something is written into it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(purpose: str) -> Path:
    """`$ERRATA_CACHE/purpose`, or the user's cache folder if the variable is not set."""
    root = os.environ.get("ERRATA_CACHE")
    if root:
        return Path(root) / purpose
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "errata" / purpose
