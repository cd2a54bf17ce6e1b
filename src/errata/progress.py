"""One progress bar for long work. It writes to standard error, so that standard output stays machine-readable.

Library code takes a `Progress` and reports to it; it never decides whether a bar is shown. Nothing here imports
anything heavy until a bar is really drawn.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = ["NO_PROGRESS", "Progress", "SilentProgress", "progress_bar"]


class Progress(Protocol):
    """What long work reports to: where it stands, and in words what it is doing."""

    def start(self, description: str, total: int | None = None, done: int = 0) -> None:
        """Begin a new stretch of work of `total` units, of which `done` are behind us."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Report `count` finished units; `note` is shown beside the bar."""


class SilentProgress:
    """Reports nothing."""

    def start(self, description: str, total: int | None = None, done: int = 0) -> None:
        pass

    def advance(self, count: int = 1, note: str = "") -> None:
        pass


NO_PROGRESS: Progress = SilentProgress()


class _Lines:
    """For logs: a line now and then instead of a bar."""

    def __init__(self, every: float = 30.0) -> None:
        self.every = every
        self.description = ""
        self.total: int | None = None
        self.done = self.first = 0
        self.began = self.said = 0.0

    def start(self, description: str, total: int | None = None, done: int = 0) -> None:
        self.description, self.total, self.done = description, total, done
        self.began = self.said = time.monotonic()
        self.first = done

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said < self.every:
            return
        self.said = now
        left = ""
        if self.total and self.done > self.first:
            seconds = (now - self.began) / (self.done - self.first) * (self.total - self.done)
            left = f", {seconds / 60:.0f} min left"
        print(
            f"{self.description}: {self.done}/{self.total or '?'}{left}  {note}".rstrip(), file=sys.stderr, flush=True
        )


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Progress]:
    """A bar with a note, the time spent and the time left; a line every half minute when nobody is at a terminal."""
    if not enabled:
        yield NO_PROGRESS
        return
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns: list[Any] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    ]
    with RichProgress(*columns, console=Console(stderr=True)) as bar:

        class _Bar:
            task: Any = None

            def start(self, description: str, total: int | None = None, done: int = 0) -> None:
                if self.task is not None:
                    bar.remove_task(self.task)
                self.task = bar.add_task(description, total=total, completed=done, note="")

            def advance(self, count: int = 1, note: str = "") -> None:
                if self.task is not None:
                    bar.update(self.task, advance=count, note=note)

        yield _Bar()
