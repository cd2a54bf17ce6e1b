"""Rows of several finished comparisons in one table, where they were made alike.

A number is comparable with another only if both were asked the same things in the same way. Rows say how they were made
(`made`), and what differs is named: joining refuses unless it is asked to go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.errors import ArtifactError, ConfigError
from errata.evaluation.rows import RowFile, digest

__all__ = ["JoinedRows", "join_comparisons"]

# Seeds may differ: that is what rows of several seeds are for. They are shown.
_SEEDS = ("seed", "order_seed")


@dataclass(frozen=True)
class JoinedRows:
    """Rows of several folders.

    Attributes:
        rows: each with its `folder`. A method that stands in several folders is named "METHOD (FOLDER)",
            except for the unedited model where nothing differs: it is there once per number of edits.
        differs: what is not the same in all of them, by name, with the value in each folder; empty where nothing is.
        seeds: the same for seeds, which may differ.
    """

    rows: list[dict[str, Any]]
    differs: dict[str, dict[str, Any]]
    seeds: dict[str, dict[str, Any]]


def join_comparisons(folders: Sequence[Path], *, allow_mixed: bool = False) -> JoinedRows:
    """The rows of comparisons in these folders.

    Args:
        allow_mixed: also where protocol, version, model, tokenizer, precision, device or edits differ.

    Raises:
        ConfigError: they were made differently, naming what differs; or a folder is named twice.
        ArtifactError: a folder holds no comparison, one of an earlier version, or a damaged one.
    """
    if len({folder.resolve() for folder in folders}) < len(folders) or not folders:
        raise ConfigError("name one or more folders, each of them once")
    read = {str(folder): _read(folder) for folder in folders}
    made = {name: _made(name, rows) | {"edits": edits} for name, (rows, edits) in read.items()}
    differing = _differing(made)
    seeds = {key: differing.pop(key) for key in _SEEDS if key in differing}
    if differing and not allow_mixed:
        told = "; ".join(
            f"{key} is {' and '.join(f'{_short(value)} in {name}' for name, value in values.items())}"
            for key, values in differing.items()
        )
        raise ConfigError(
            f"these rows were not made alike: {told}. --allow-mixed puts them into one table all the same"
        )
    several = _in_several({name: rows for name, (rows, _) in read.items()})
    if not differing:
        several.discard("unedited")  # it said the same everywhere
    joined: list[dict[str, Any]] = []
    for name, (rows, _) in read.items():
        for row in rows:
            if row["method"] == "unedited" and ("unedited", row["edits"]) in {
                (r["method"], r["edits"]) for r in joined
            }:
                continue
            label = f"{row['method']} ({Path(name).name})" if row["method"] in several else row["method"]
            joined.append({**row, "method": label, "folder": name})
    return JoinedRows(joined, differing, seeds)


def _read(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """A folder's rows and what its edits are."""
    rows = RowFile(folder / "rows.jsonl", {"method", "of", "baseline", "edits"}).read()
    head = folder / "comparison.json"
    if not rows:
        orders = sorted(path.name for path in folder.glob("order-*"))
        hint = f"; it has {', '.join(orders)}: name these" if orders else ""
        raise ArtifactError(f"{folder} holds no rows of a comparison{hint}; errata compare --out {folder} makes them")
    if any("made" not in row for row in rows):
        raise ArtifactError(f"rows in {folder} do not say how they were made; make them again with errata compare")
    try:
        edits = json.loads(head.read_text(encoding="utf-8"))["edits"]
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{head} is missing or damaged ({error}); make the comparison again") from error
    return rows, list(edits)


def _made(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How a folder's rows were made; seeds as the list of those that its runs had."""
    shared = {key: value for key, value in rows[0]["made"].items() if key not in _SEEDS}
    for row in rows:
        if {key: value for key, value in row["made"].items() if key not in _SEEDS} != shared:
            raise ArtifactError(f"rows in {name} were made in different ways; make the comparison again")
    seeds = {key: sorted({row["made"][key] for row in rows} - {None}) for key in _SEEDS}
    return {**shared, **seeds}


def _differing(made: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    first = next(iter(made.values()))
    keys = [key for key in first if key != "edits" and any(one.get(key) != first[key] for one in made.values())]
    found: dict[str, dict[str, Any]] = {key: {name: one.get(key) for name, one in made.items()} for key in keys}
    shared = min(len(one["edits"]) for one in made.values())
    if any(one["edits"][:shared] != first["edits"][:shared] for one in made.values()):
        alike = all(sorted(one["edits"]) == sorted(first["edits"]) for one in made.values())
        named = {name: digest("\n".join(one["edits"][:shared])) for name, one in made.items()}
        # Of the same edits in other orders, checkpoints before the last are about other edits.
        found["order of the edits" if alike else "edits"] = named
    return found


def _in_several(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> set[str]:
    methods = [{row["method"] for row in own} for own in rows.values()]
    return {name for own in methods for name in own if sum(name in other for other in methods) > 1}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
