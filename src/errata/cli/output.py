"""What every command shares: JSON or words on standard output, logs on standard error, errors with a next step."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from errata.errors import ArtifactError, ErrataError

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["emit", "error_object", "fail", "guarded", "log", "plain"]


def log(message: str) -> None:
    """A line for people, on standard error."""
    typer.echo(message, err=True)


def emit(record: Mapping[str, Any], as_json: bool, in_words: Callable[[], None] | None = None) -> None:
    """The result: exactly one JSON object on standard output, or words for people."""
    if as_json:
        sys.stdout.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    elif in_words is not None:
        in_words()


def plain(*cells: str) -> tuple[Text, ...]:
    """Cells of a table, taken as they are: prompts and answers may hold what rich reads as markup ("[/INST]")."""
    from rich.text import Text

    return tuple(Text(cell) for cell in cells)


def error_object(kind: str, message: str) -> None:
    """An error as the one JSON object on standard output."""
    emit({"error": {"type": kind, "message": message}}, as_json=True)


def fail(error: Exception, as_json: bool) -> NoReturn:
    """Report an error and leave with status 1; with --json also as the one JSON object on standard output."""
    if as_json:
        error_object(type(error).__name__, str(error))
    typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1)


def guarded(kept: str = "nothing was written") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command whose expected errors become messages; anything else is a bug and keeps its traceback.

    Args:
        kept: what is left after Ctrl-C, in words; the status is then 130, as of any program that is interrupted.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            as_json = bool(kwargs.get("as_json"))
            try:
                command(*args, **kwargs)
            except ErrataError as error:
                fail(error, as_json)
            except OSError as error:
                if error.filename is None:  # not about a file: a closed pipe, say
                    raise
                fail(ArtifactError(f"{error.filename} cannot be read or written: {error.strerror or error}"), as_json)
            except KeyboardInterrupt:
                message = f"interrupted; {kept}"
                if as_json:
                    error_object("Interrupted", message)
                log(message)
                raise typer.Exit(130) from None

        return wrapper

    return decorate
