"""The contract of everything that decides which stored entry answers a prompt.

A router reads a prompt as it passes the edited layer (`gather`, once per pass while the prompt is read), decides at its
end, and gives one edit per entry (`owners`). What it gathers and how it measures closeness is its own affair:
overlaps of masks, distances to keys, norms of a side memory's effect.

Knows tensors. Knows nothing of models, nor of what is read once an entry was chosen.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

__all__ = ["Route", "Router"]


@dataclass(frozen=True, kw_only=True)
class Route:
    """What was decided for each sequence; all [rows].

    Attributes:
        entry: the entry that answers, -1 for none.
        nearest, score: the entry that comes closest (-1 when nothing is stored) and how close; larger is closer.
        threshold: the score from which that entry answers.
        second, second_score: the runner-up, -1 when there is none.
    """

    entry: Tensor
    nearest: Tensor
    score: Tensor
    threshold: Tensor
    second: Tensor
    second_score: Tensor


class Router(abc.ABC):
    """Decides once per sequence, from its prompt alone, which stored entry answers.

    Rows are independent: what one sequence gathers and gets must not depend on the others of its batch.

    Attributes:
        kind: its name in saved adapters.
        owners: the edit that each entry belongs to, in the order of the entries' numbers.
    """

    kind: ClassVar[str]
    owners: list[str]

    def __len__(self) -> int:
        return len(self.owners)

    @abc.abstractmethod
    def gather(self, inputs: Tensor, prompt: Tensor, before: Any = None, ids: Tensor | None = None) -> Any:
        """Add this pass's prompt tokens to what was gathered so far.

        Args:
            inputs: of the edited layer, [rows, columns, D]; prompt: [rows, columns], True on tokens of prompts.
            before: what the previous pass over the same sequences returned; None at the first.
            ids: [rows, columns], the tokens; None where the pass was given embeddings.

        Returns:
            Anything whose tensors, also in tuples, lists, dictionaries and dataclasses, have one row per sequence.
        """

    @abc.abstractmethod
    def decide(self, gathered: Any) -> Route:
        """The route of each sequence whose prompt was gathered."""

    @abc.abstractmethod
    def remove(self, owner: str) -> list[int]:
        """Take an edit's entries out and return their numbers; entries behind them move up. Raises EditError if it
        has none."""

    @abc.abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON that `from_state` makes the same router of."""

    @classmethod
    @abc.abstractmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self: ...
