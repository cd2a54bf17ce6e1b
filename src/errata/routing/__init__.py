"""Who fires: the contract of routers, features of a prompt, and exact search among what is stored."""

from errata.routing.base import Route, Router
from errata.routing.distance import DistanceRouter
from errata.routing.keys import KeyStore
from errata.routing.masks import MaskStore, chance_overlap, pack, unpack
from errata.routing.scope import ScopeRouter, within_class_view
from errata.routing.tophash import Gathered, TopHashRouter, relative_threshold

__all__ = [
    "DistanceRouter",
    "Gathered",
    "KeyStore",
    "MaskStore",
    "Route",
    "Router",
    "ScopeRouter",
    "TopHashRouter",
    "chance_overlap",
    "pack",
    "relative_threshold",
    "unpack",
    "within_class_view",
]
