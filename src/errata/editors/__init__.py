"""Editing methods: one file each, behind one contract."""

from __future__ import annotations

from typing import Any

from errata.editors.base import AppliedEdit, Editor, EditorConfig, EditOutcome, RefusedEdit
from errata.editors.registry import editor_class, editor_names, method_of
from errata.model import EditableModel

__all__ = [
    "AppliedEdit",
    "EditOutcome",
    "Editor",
    "EditorConfig",
    "RefusedEdit",
    "editor",
    "editor_class",
    "editor_names",
    "method_of",
]


def editor(method: str, model: EditableModel, **settings: Any) -> Editor[Any]:
    """An editor by name: `editor("memoir", model, steps=50)`. Raises ConfigError for unknown methods or settings."""
    made: Editor[Any] = editor_class(method)(model, **settings)
    return made
