"""All types of adapter by the name in their files. Other packages add theirs through the entry points of `GROUP`."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from errata.errors import ArtifactError, ConfigError, unknown_name

if TYPE_CHECKING:
    from errata.adapters.base import Adapter

__all__ = ["GROUP", "adapter_class"]

GROUP = "errata.adapters"

_BUILT_IN: dict[str, str] = {
    "delta": "errata.adapters.delta:DeltaAdapter",
    "keyed": "errata.adapters.keyed:KeyedAdapter",
    "least_squares": "errata.adapters.least_squares:LeastSquaresAdapter",
    "pool": "errata.adapters.pool:PoolAdapter",
    "routed": "errata.adapters.routed:RoutedAdapter",
    "scoped": "errata.adapters.scoped:ScopedAdapter",
    "wise": "errata.adapters.sides:WiseAdapter",
}


def adapter_class(name: str) -> type[Adapter]:
    """The class that reads adapters of a type.

    Raises:
        ArtifactError: no installed package brings this type.
        ConfigError: two packages do.
    """
    targets = dict(_BUILT_IN)
    for entry in entry_points(group=GROUP):
        if targets.get(entry.name, entry.value) != entry.value:
            raise ConfigError(
                f"two types of adapter are called {entry.name!r}: {targets[entry.name]} and {entry.value}; uninstall "
                "one of them"
            )
        targets[entry.name] = entry.value
    if name not in targets:
        raise ArtifactError(
            f"{unknown_name('adapter type', name, targets)}; upgrade errata, or install the package that brings it"
        )
    module, _, attribute = targets[name].partition(":")
    found: type[Adapter] = getattr(importlib.import_module(module), attribute)
    return found
