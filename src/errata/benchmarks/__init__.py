"""`errata bench NAME`: ratios measured in one run, on users' machines too.

A benchmark is a function that returns `{"ratios": {...}, "rows": [...]}`, and a `"figure"` if it draws one; what it is
slower or faster than is always measured beside it, in the same process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from errata.errors import ConfigError, unknown_name
from errata.progress import Progress

__all__ = ["benchmark", "benchmark_names"]

_BENCHMARKS = {
    "batch": "errata.benchmarks.batch:run",
    "memory": "errata.benchmarks.memory:run",
    "methods": "errata.benchmarks.methods:run",
    "overhead": "errata.benchmarks.overhead:run",
    "routing": "errata.benchmarks.routing:run",
    "scoring": "errata.benchmarks.scoring:run",
    "tail": "errata.benchmarks.tail:run",
    "weights": "errata.benchmarks.weights:run",
}


def benchmark_names() -> list[str]:
    """The names of all benchmarks, sorted."""
    return sorted(_BENCHMARKS)


def benchmark(name: str) -> Callable[[Progress], dict[str, Any]]:
    """Raises ConfigError, with the nearest names, for a benchmark that does not exist."""
    if name not in _BENCHMARKS:
        raise ConfigError(unknown_name("benchmark", name, _BENCHMARKS))
    module, _, attribute = _BENCHMARKS[name].partition(":")
    found: Callable[[Progress], dict[str, Any]] = getattr(importlib.import_module(module), attribute)
    return found
