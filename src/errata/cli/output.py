"""What every command shares: JSON or words on standard output, logs on standard error, errors with a next step."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NoReturn

import typer

from errata.errors import ErrataError

__all__ = ["emit", "fail", "guarded", "log"]


def log(message: str) -> None:
    """A line for people, on standard error."""
    typer.echo(message, err=True)


def emit(record: Mapping[str, Any], as_json: bool, in_words: Callable[[], None] | None = None) -> None:
    """The result: exactly one JSON object on standard output, or words for people."""
    if as_json:
        sys.stdout.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    elif in_words is not None:
        in_words()


def fail(error: Exception, as_json: bool) -> NoReturn:
    """Report an error and leave with status 1; with --json also as the one JSON object on standard output."""
    if as_json:
        sys.stdout.write(
            json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}, ensure_ascii=False) + "\n"
        )
    typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose expected errors become messages; anything else is a bug and keeps its traceback."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ErrataError as error:
            fail(error, bool(kwargs.get("as_json")))

    return wrapper
