"""How fast each method writes, and how much memory it takes, beside what was said before it began.

Every method works in a process of its own, so that its peak is its own: a thread looks at the memory that the process
has resident, every few milliseconds, from when the model is loaded. Speed is that of real edits on atlas, preparation
aside; beside it, where a method can, that of the same method with whole forward passes and one edit at a time. Memory
is measured on random weights, wide enough for what matters to stand out: eight blocks of width 512, keys 2,048 wide.
Settings are derived from that shape; there are fewer steps and tokens, which does not change the peak.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Sequence
from typing import Any

import psutil

from errata.atlas.edits import world_edits
from errata.benchmarks.models import random_llama
from errata.edit import Edit
from errata.editors import Editor, editor_class, editor_names
from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress

__all__ = ["measure", "run"]

_EDITS, _FULL, _FEW = 32, 8, 4
_SHORT: dict[str, dict[str, Any]] = {
    **{method: {"steps": 3} for method in ("ft", "grace", "lora", "melo", "memoir", "wise")},
    **{method: {"steps": 3, "tokens_per_width": 10.0} for method in ("alphaedit", "emmet", "memit", "rome")},
    "simie": {"inner_settings": {"steps": 3, "tokens_per_width": 10.0}},
}
_UNTRAINED = ("memoryllm", "mend")  # as fast as trained, and no network need be at hand
_LOOK = 0.003  # seconds


class _Peak:
    """The most memory that was resident while this was on, less what was when it began.

    Attributes:
        size: bytes.
    """

    size = 0

    def __enter__(self) -> _Peak:
        self._process, self._on = psutil.Process(), True
        self._begun = int(self._process.memory_info().rss)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._on:
            self.size = max(self.size, int(self._process.memory_info().rss) - self._begun)
            time.sleep(_LOOK)

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()


def _speed(editor: Editor[Any], edits: Sequence[Edit]) -> float:
    """Edits per second, preparation aside; the model is as before after it."""
    editor.prepare()
    outcome = editor.edit(edits)
    editor.adapter.detach()
    return len(outcome.applied) / outcome.seconds


def measure(method: str, edits: int = _EDITS, blocks: int = 8, hidden: int = 512) -> dict[str, Any]:
    """Edits per second on atlas, and peak memory on a random model; to be called in a fresh process."""
    cls, some = editor_class(method), world_edits(edits)
    settings: dict[str, Any] = {"network": "untrained"} if method in _UNTRAINED else {}
    editor = cls(EditableModel.load("atlas"), **settings)
    speed = _speed(editor, some)
    row: dict[str, Any] = {"method": method, "edits_per_second": speed}
    if hasattr(editor.config, "full_forward"):
        plain = {"full_forward": True} | ({"batch_size": 1} if hasattr(editor.config, "batch_size") else {})
        full = _speed(cls(editor.model, **settings, **plain), some[:_FULL])
        row |= {"plain_edits_per_second": full, "vs_plain": speed / full}
    model = random_llama(blocks, hidden)
    model.generate([some[0].prompt], max_new_tokens=1)
    settings |= {"guard": "off", **_SHORT.get(method, {})}  # the guard reads prose, whatever the method
    with _Peak() as peak:
        editor = cls(model, **settings)
        needed = editor.memory_needed(some[:_FEW])
        editor.edit(some[:_FEW])
    return row | {
        "peak_mb": peak.size / 1e6,
        "estimate_mb": needed.total / 1e6,
        "estimate_over_peak": needed.total / max(1, peak.size),
    }


def run(progress: Progress = NO_PROGRESS) -> dict[str, Any]:
    """`METHOD_estimate`: the memory that was said to be needed over what was taken. `METHOD_vs_plain`: edits per second
    over those of the same method with whole forward passes and one edit at a time.
    """
    names = list(editor_names())
    progress.start("bench methods", len(names))
    rows = []
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (name,)))
        progress.advance(1)
    ratios = {f"{row['method']}_estimate": row["estimate_over_peak"] for row in rows}
    ratios |= {f"{row['method']}_vs_plain": row["vs_plain"] for row in rows if "vs_plain" in row}
    return {"ratios": ratios, "rows": rows}
