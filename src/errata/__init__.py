"""errata corrects what a language model believes, and can say what it did, what it cost, and take it back.

    from errata import EditableModel, Edit, editor

    model = EditableModel.load("atlas")
    memoir = editor("memoir", model)
    memoir.edit([Edit(prompt="The capital of France is", target="Rome", subject="France")])
    model.generate(["The capital of France is"])

Names are loaded when they are first used: importing errata imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AutoAdapter",
    "Edit",
    "EditOutcome",
    "EditableModel",
    "Editor",
    "Examination",
    "Probe",
    "__version__",
    "editor",
    "read_edits",
    "write_edits",
]

if TYPE_CHECKING:
    from errata.adapters import Adapter, AutoAdapter
    from errata.datasets import read_edits, write_edits
    from errata.edit import Edit, Probe
    from errata.editors import Editor, EditOutcome, editor
    from errata.evaluation import Examination
    from errata.model import EditableModel

_WHERE = {
    "Adapter": "errata.adapters",
    "AutoAdapter": "errata.adapters",
    "Edit": "errata.edit",
    "EditOutcome": "errata.editors",
    "EditableModel": "errata.model",
    "Editor": "errata.editors",
    "Examination": "errata.evaluation",
    "Probe": "errata.edit",
    "editor": "errata.editors",
    "read_edits": "errata.datasets",
    "write_edits": "errata.datasets",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'errata' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
