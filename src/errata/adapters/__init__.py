"""What is attached to a model and saved to disk."""

from errata.adapters.base import Adapter, AutoAdapter, BaseIdentity, Explanation, LayerChange, RevertResult
from errata.adapters.codebook import Codebook
from errata.adapters.delta import DeltaAdapter, WeightChange
from errata.adapters.keyed import KeyedAdapter
from errata.adapters.least_squares import LeastSquaresAdapter, Wanted
from errata.adapters.memories import ColumnMemory, Memory
from errata.adapters.pool import PoolAdapter
from errata.adapters.routed import RoutedAdapter, RoutedLayer
from errata.adapters.scoped import ScopedAdapter
from errata.adapters.sides import WiseAdapter

__all__ = [
    "Adapter",
    "AutoAdapter",
    "BaseIdentity",
    "Codebook",
    "ColumnMemory",
    "DeltaAdapter",
    "Explanation",
    "KeyedAdapter",
    "LayerChange",
    "LeastSquaresAdapter",
    "Memory",
    "PoolAdapter",
    "RevertResult",
    "RoutedAdapter",
    "RoutedLayer",
    "ScopedAdapter",
    "Wanted",
    "WeightChange",
    "WiseAdapter",
]
