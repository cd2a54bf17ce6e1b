"""How fast edits are written: many side by side against one by one, and the tail against whole forward passes.

On atlas, real edits with early stopping, as they would be made. All ways take turns: each writes its next 32 edits
into its own adapter while the others are detached, so that whatever else the machine does meets all of them alike.
At the end every way's edits are asked, generated, because speed that costs reliability is none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from errata.atlas.edits import world_edits
from errata.editors import Editor, editor_class
from errata.evaluation.protocol import Examination
from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress

__all__ = ["run"]

_EDITS, _TURN = 256, 32
_BATCHES = (1, 8, 32, 64, 128)
_SLOW_EDITS = 8  # per turn, of the methods that write one by one and of whole forward passes
_METHODS = ("memoir", "grace", "wise")


@dataclass
class _Way:
    """One way of writing edits, at work: its editor, how many edits it takes in a turn, what it took for them."""

    label: dict[str, Any]
    editor: Editor[Any]
    per_turn: int
    seconds: float = 0.0
    done: list[int] = field(default_factory=list)

    def take_turn(self, model: EditableModel, edits: list[Any], first: int, count: int) -> None:
        self.editor.adapter.attach(model)
        try:
            size = self.editor.config.batch_size
            for start in range(first, first + count, size):
                batch = edits[start : min(first + count, start + size)]
                self.seconds += self.editor.edit(batch).seconds
            self.done += range(first, first + count)
        finally:
            self.editor.adapter.detach()

    def row(self, examination: Examination, model: EditableModel, edits: list[Any]) -> dict[str, Any]:
        self.editor.adapter.attach(model)
        try:
            asked = examination.ask_targets([edits[number] for number in self.done])
        finally:
            self.editor.adapter.detach()
        return {
            **self.label,
            "edits": len(self.done),
            "edits_per_second": len(self.done) / self.seconds,
            "reliability": sum(own[0] for own, _ in asked) / len(asked),
        }


def _way(model: EditableModel, method: str, per_turn: int, **settings: Any) -> _Way:
    editor: Editor[Any] = editor_class(method)(model, **settings)
    editor.prepare()
    editor.adapter.detach()
    label = {"method": method, "batch_size": editor.config.batch_size, "passes": "tail"}
    return _Way({**label, "passes": "whole" if settings.get("full_forward") else "tail"}, editor, per_turn)


def run(progress: Progress = NO_PROGRESS) -> dict[str, Any]:
    """`batch32_vs_1`: edits per second in batches of 32 over those one by one (memoir). `METHOD_tail_vs_whole`: one by
    one, through the tail over through whole forward passes."""
    model, edits = EditableModel.load("atlas"), world_edits(_EDITS)
    turns = _EDITS // _TURN
    batched = {size: _way(model, "memoir", _TURN, batch_size=size) for size in _BATCHES}
    passes = {
        (method, full): _way(model, method, _SLOW_EDITS, full_forward=full)
        for method in _METHODS
        for full in (False, True)
    }
    ways = [*batched.values(), *passes.values()]
    progress.start("bench batch", turns * len(ways))
    for turn in range(turns):
        for way in ways:
            size = max(way.per_turn, way.editor.config.batch_size)
            # A batch that is larger than a turn is written once all its edits are due.
            if way.per_turn == _TURN and ((turn + 1) * _TURN) % size == 0:
                way.take_turn(model, edits, (turn + 1) * _TURN - size, size)
            elif way.per_turn == _SLOW_EDITS and turn < 4:
                way.take_turn(model, edits, turn * _SLOW_EDITS, _SLOW_EDITS)
            progress.advance(1)
    examination = Examination(model, edits)
    rows = [way.row(examination, model, edits) for way in ways]
    speed = {size: row["edits_per_second"] for size, row in zip(batched, rows, strict=False)}
    of_passes = dict(zip(passes, rows[len(batched) :], strict=True))
    ratios = {f"batch{size}_vs_1": speed[size] / speed[1] for size in _BATCHES if size > 1}
    for method in _METHODS:
        tail, whole = (of_passes[method, full]["edits_per_second"] for full in (False, True))
        ratios[f"{method}_tail_vs_whole"] = tail / whole
    return {"ratios": ratios, "rows": rows}
