"""Which layer a method edits when nothing is published for the model: the published choice, scaled to its depth."""

from __future__ import annotations

from errata.model import EditableModel

__all__ = ["scaled_layer", "shape_key"]


def scaled_layer(model: EditableModel, published_layer: int, published_count: int) -> int:
    """The block at the same relative depth as block `published_layer` of a model of `published_count` blocks."""
    if published_count < 2:
        return 0
    return round(published_layer / (published_count - 1) * (model.layer_count - 1))


def shape_key(model: EditableModel) -> tuple[str, int, int]:
    """(architecture, blocks, hidden size): what published settings are looked up by."""
    return model.architecture, model.layer_count, model.anatomy.hidden_size
