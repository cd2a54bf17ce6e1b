"""Editing methods: one file each, behind one contract."""

from errata.editors.base import AppliedEdit, Editor, EditorConfig, EditOutcome, RefusedEdit
from errata.editors.registry import editor_class, editor_names

__all__ = ["AppliedEdit", "EditOutcome", "Editor", "EditorConfig", "RefusedEdit", "editor_class", "editor_names"]
