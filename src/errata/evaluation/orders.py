"""The same edits in several orders: what a sequence of edits leaves depends on which came first.

One `Comparison` per order seed, each in a folder of its own; rows of different orders are never mixed. What is shown is
their mean with its spread.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.edit import Edit
from errata.errors import ConfigError
from errata.evaluation.comparison import Comparison
from errata.evaluation.figures import comparison_figure, save_figure
from errata.evaluation.significance import compare_methods
from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress

__all__ = ["OrderedComparisons", "in_order"]

_PROPERTIES = ("reliability", "generalization", "locality", "portability")
_WAYS = ("generated", "teacher_forced", "contains", "f1")


def in_order(edits: Sequence[Edit], seed: int) -> list[Edit]:
    """All edits, shuffled by the seed.

    Edits of one case (MQuAKE's `case_id` in `extra`) that stand together stay so, in their order: what the case asks is
    asked of its last edit, when all of it is written.
    """
    cases: list[list[Edit]] = []
    for edit in edits:
        case = edit.extra.get("case_id")
        if cases and case is not None and cases[-1][-1].extra.get("case_id") == case:
            cases[-1].append(edit)
        else:
            cases.append([edit])
    random.Random(f"order {seed}").shuffle(cases)
    return list(itertools.chain.from_iterable(cases))


class OrderedComparisons:
    """A comparison for each order seed, all of the same edits.

    Args:
        edits: as many of them as the last checkpoint says are edited, in every order.
        seeds: of the orders; each gives the folder `order-SEED` below `folder`.
        settings and more: as for `Comparison`.

    Attributes:
        comparisons: by seed.

    Raises:
        ConfigError: no seed, or one that is named twice; and what `Comparison` raises.
    """

    def __init__(
        self,
        model: EditableModel,
        methods: Sequence[str],
        edits: Sequence[Edit],
        checkpoints: Sequence[int],
        folder: Path,
        seeds: Sequence[int],
        **settings: Any,
    ) -> None:
        if not seeds or len(set(seeds)) < len(seeds):
            raise ConfigError(f"order seeds {list(seeds)}: give one or more different numbers, such as 0,1,2")
        self.folder = folder
        chosen = edits[: max(checkpoints, default=0)]
        self.comparisons = {
            seed: Comparison(
                model,
                methods,
                in_order(chosen, seed),
                checkpoints,
                folder / f"order-{seed}",
                order_seed=seed,
                **settings,
            )
            for seed in seeds
        }

    @property
    def first(self) -> Comparison:
        return next(iter(self.comparisons.values()))

    def run(self, progress: Progress = NO_PROGRESS) -> Iterator[dict[str, Any]]:
        """Yield every row, order by order, and draw the figure of their means at the end."""
        rows = []
        for comparison in self.comparisons.values():
            comparison.examination.share_base(self.first.examination)
            for row in comparison.run(progress):
                rows.append(row)
                yield row
        save_figure(comparison_figure(self.means(rows)), self.folder / "comparison.png")

    def chosen(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of this call's methods and checkpoints, order by order."""
        return [
            row
            for seed, comparison in self.comparisons.items()
            for row in comparison.chosen([row for row in rows if row["made"]["order_seed"] == seed])
        ]

    def means(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One row per method and checkpoint: means over the orders that reached it.

        In each property `generated_interval` is the range over the orders, `spread` their standard deviation (n − 1 in
        the denominator; None for one order). A mean perplexity is None where one of them is.
        """
        groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in self.chosen(rows):
            groups.setdefault((row["method"], row["edits"]), []).append(row)
        found = []
        for (method, edits), own in groups.items():
            same = {"method": method, "of": own[0]["of"], "baseline": own[0]["baseline"], "edits": edits}
            properties = {name: _over_orders([row[name] for row in own]) for name in _PROPERTIES}
            numbers = {name: _mean([row[name] for row in own]) for name in ("perplexity", "seconds_per_edit")}
            orders = [row["made"]["order_seed"] for row in own]
            found.append({**same, **properties, **numbers, "order_seeds": orders})
        order = {"unedited": 0, **{name: number for number, name in enumerate(self.first.methods, start=1)}}
        return sorted(found, key=lambda r: (r["baseline"] and r["method"] != "unedited", order[r["of"]], r["edits"]))

    def differences(self) -> dict[str, list[dict[str, Any]]]:
        """Per property, the best run against every other after the last edit: paired over edits, each a mean over the
        orders. Empty with fewer than two runs, or where one of them stopped early in some order."""
        last, methods = self.first.checkpoints[-1], self.first.methods
        if len(methods) < 2 or not all(one.has_answers(last) for one in self.comparisons.values()):
            return {}
        found: dict[str, list[dict[str, Any]]] = {}
        for name in ("reliability", "generalization", "locality"):
            scores = {}
            for method in methods:
                by_order = [one.per_edit(method, last, name) for one in self.comparisons.values()]
                scores[method] = [sum(own[id] for own in by_order) / len(by_order) for id in sorted(by_order[0])]
            if all(scores.values()):
                best = max(scores, key=lambda method: sum(scores[method]))
                found[name] = [{"edits": last, **one.to_record()} for one in compare_methods(scores, against=best)]
        return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _over_orders(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One property's records of several orders as one."""
    values = [record["generated"] for record in records]
    known = [value for value in values if value is not None]
    spread = statistics.stdev(known) if len(known) > 1 else math.nan
    return {
        **{way: _mean([record[way] for record in records]) for way in _WAYS},
        "generated_interval": [min(known), max(known)] if known else [None, None],
        "spread": None if math.isnan(spread) else spread,
        "edits": records[0]["edits"],
    }
