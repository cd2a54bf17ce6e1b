"""A loaded base model and everything that is known about it before any edit."""

from errata.model.anatomy import Anatomy, AnatomyDeclaration, find_anatomy
from errata.model.editable import EditableModel
from errata.model.tokens import Passage, TokenBatch

__all__ = ["Anatomy", "AnatomyDeclaration", "EditableModel", "Passage", "TokenBatch", "find_anatomy"]
