"""Who fires: features of a prompt, and exact search among what is stored."""

from errata.routing.masks import MaskStore, chance_overlap, pack, unpack
from errata.routing.tophash import Gathered, Route, TopHashRouter, relative_threshold

__all__ = ["Gathered", "MaskStore", "Route", "TopHashRouter", "chance_overlap", "pack", "relative_threshold", "unpack"]
