"""Every error a user of errata can meet, each saying what was found, what was expected and what to do next.

    ErrataError
    ├── ConfigError         an option, a setting or a name that does not exist or does not fit
    ├── EditError           an edit that cannot be read or applied
    │   └── FormatError     a file of edits: names file, line, field and remedy
    ├── ModelError          a model that is not understood or lacks what is asked of it
    │   ├── AnatomyError    the roles of its modules could not be found; lists the candidates seen
    │   ├── SpanError       a subject that cannot be placed among the tokens of its prompt
    │   ├── SequenceError   a forward pass whose sequences cannot be told apart
    │   └── TailError       the upper blocks alone do not reproduce the model
    ├── ArtifactError       something on disk that is missing, damaged or of a newer format
    │   └── BaseMismatchError   an adapter that belongs to another base model
    └── NumericsError       NaN, infinity, a singular system, an edit that changed nothing

Anything else that escapes is a bug in errata.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AnatomyError",
    "ArtifactError",
    "BaseMismatchError",
    "ConfigError",
    "EditError",
    "ErrataError",
    "FormatError",
    "ModelError",
    "NumericsError",
    "SequenceError",
    "SpanError",
    "TailError",
    "unknown_name",
]


class ErrataError(Exception):
    """Base of all errors that errata raises on purpose."""


class ConfigError(ErrataError):
    """An option, a setting or a name that does not exist or does not fit."""


class EditError(ErrataError):
    """An edit that cannot be read or applied."""


class FormatError(EditError):
    """A record of an edit file that cannot be understood.

    Args:
        file: the file's name; line: 1-based line or record number; field: the field at fault.
        problem: what was found; remedy: what to write instead.
    """

    def __init__(self, file: str, line: int | None, field: str | None, problem: str, remedy: str) -> None:
        self.file, self.line, self.field, self.problem, self.remedy = file, line, field, problem, remedy
        where = file if line is None else f"{file}:{line}"
        what = problem if field is None else f"field {field!r}: {problem}"
        super().__init__(f"{where}: {what}; {remedy}")


class ModelError(ErrataError):
    """A model that is not understood, or that lacks what is asked of it."""


class AnatomyError(ModelError):
    """The roles of a model's modules could not be found by structure."""


class SpanError(ModelError):
    """A subject that cannot be placed among the tokens of its prompt."""


class SequenceError(ModelError):
    """A forward pass whose sequences cannot be told apart."""


class TailError(ModelError):
    """Running only the upper blocks does not reproduce the model's own logits."""


class ArtifactError(ErrataError):
    """Something on disk that is missing, damaged, or written in a newer format."""


class BaseMismatchError(ArtifactError):
    """An adapter that was made for another base model."""


class NumericsError(ErrataError):
    """NaN or infinity, a system that cannot be solved, or an edit that changed nothing."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: the nearest ones, then the whole list."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2)
    hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}"
