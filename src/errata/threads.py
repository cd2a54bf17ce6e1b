"""Work done side by side on the cores of one processor.

Small models do not fill several cores with one pass, so two passes at once are worth more than one on twice the cores.
torch gives up Python's lock while it computes. Each thread needs a model of its own (`EditableModel.copy`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

__all__ = ["side_by_side"]

Found = TypeVar("Found")


def side_by_side(work: Callable[..., Found], *arguments: Iterable[Any]) -> list[Found]:
    """What `work` gives for each set of arguments, as `map` does, each on a thread of its own with its share of cores.

    Raises:
        whatever the work raises, of the first set for which it does, when all are done.
    """
    calls = list(zip(*arguments, strict=True))
    if len(calls) < 2:
        return [work(*call) for call in calls]
    threads = torch.get_num_threads()
    share = functools.partial(torch.set_num_threads, max(1, threads // len(calls)))
    try:
        with ThreadPoolExecutor(len(calls), initializer=share) as pool:
            return list(pool.map(lambda call: work(*call), calls))
    finally:
        torch.set_num_threads(threads)
