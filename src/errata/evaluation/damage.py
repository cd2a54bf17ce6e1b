"""What edits damaged, and what may explain it: capabilities, language modelling, and how far weights have moved.

The three sides of "Navigating the Dual Facets" (2402.11122), for one adapter: task scores before and after on the same
items; perplexity of held-out text by domain; the similarity of edited and unedited weights, or, where nothing is
written into weights, how often the adapter acts on text that has nothing to do with its edits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errata.adapters import Adapter
from errata.evaluation.harness import TaskScore, run_tasks
from errata.evaluation.lifelong import capability_drop
from errata.evaluation.metrics import bootstrap_mean, finite_or_none
from errata.evaluation.significance import holm, sign_flip_test
from errata.progress import NO_PROGRESS, Progress

__all__ = ["Damage", "TaskDamage", "firing_share", "measure_damage"]

_TEXTS = 200  # of each domain, on which it is seen how often an adapter acts


@dataclass(frozen=True)
class TaskDamage:
    """One task, the same items without the adapter and with it.

    Attributes:
        before, after: mean of the task's metric over items.
        change: after less before; low, high: its 95 % bootstrap interval, paired over items.
        drop: share of the score before that is lost, None where there was nothing to lose.
        p: of a paired permutation test, adjusted for the number of tasks (Holm).
    """

    task: str
    metric: str
    items: int
    before: float
    after: float
    change: float
    low: float
    high: float
    drop: float | None
    p: float
    version: str


@dataclass(frozen=True)
class Damage:
    """What an adapter does to everything that it was not meant to touch.

    Attributes:
        edits: how many it holds; tasks: capabilities.
        perplexity: per domain of held-out text, before and after; NaN where it is no finite number.
        layers: per changed layer what `LayerChange` says of it.
        fires: per domain, share of texts on which a routed adapter acts; empty for one that changes weights.
    """

    edits: int
    tasks: list[TaskDamage]
    perplexity: dict[str, tuple[float, float]]
    layers: list[dict[str, Any]]
    fires: dict[str, float] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """JSON; null for a perplexity that is not finite."""
        return {
            "edits": self.edits,
            "tasks": [vars(task) for task in self.tasks],
            "perplexity": {
                domain: {"before": finite_or_none(before), "after": finite_or_none(after)}
                for domain, (before, after) in self.perplexity.items()
            },
            "layers": self.layers,
            "fires": self.fires,
        }


def measure_damage(
    adapter: Adapter,
    tasks: Sequence[str],
    texts: Mapping[str, Sequence[str]],
    *,
    include: Path | None = None,
    data: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 16,
    progress: Progress = NO_PROGRESS,
) -> Damage:
    """Measure a model without an attached adapter and with it; it stays attached.

    Args:
        texts: held-out text by domain.
        include, data, limit, shots, batch_size: see `run_tasks`.

    Raises:
        ConfigError, FormatError: a task cannot be run.
    """
    model = adapter.model

    def tasks_now() -> dict[str, TaskScore]:
        if not tasks:
            return {}
        return run_tasks(
            model,
            tasks,
            include=include,
            data=data,
            limit=limit,
            shots=shots,
            batch_size=batch_size,
            progress=progress,
        )

    def perplexities() -> dict[str, float]:
        return {domain: model.perplexity(some) for domain, some in texts.items()}

    with adapter.detached():
        before, read_before = tasks_now(), perplexities()
    after, read_after = tasks_now(), perplexities()
    fires = {} if adapter.changes_weights else {domain: firing_share(adapter, some) for domain, some in texts.items()}
    return Damage(
        len(adapter.edits()),
        _compared(before, after),
        {domain: (read_before[domain], read_after[domain]) for domain in texts},
        [dict(vars(change)) for change in adapter.layer_changes(model)],
        fires,
    )


def firing_share(adapter: Adapter, texts: Sequence[str]) -> float:
    """Share of the first texts on which a routed adapter acts; NaN for no texts."""
    explained = adapter.explain(list(texts)[:_TEXTS])
    return sum(one.fires for one in explained) / len(explained) if explained else math.nan


def _compared(before: Mapping[str, TaskScore], after: Mapping[str, TaskScore]) -> list[TaskDamage]:
    differences = {
        task: [now - then for then, now in zip(before[task].items, after[task].items, strict=True)] for task in before
    }
    adjusted = holm([sign_flip_test(own) for own in differences.values()])
    found = []
    for (task, own), p in zip(differences.items(), adjusted, strict=True):
        then, now, change = (bootstrap_mean(v) for v in (before[task].items, after[task].items, own))
        found.append(
            TaskDamage(
                task,
                before[task].metric,
                len(own),
                then.value,
                now.value,
                change.value,
                change.low,
                change.high,
                capability_drop(then.value, now.value) if then.value > 0 else None,
                p,
                before[task].version,
            )
        )
    return found
