"""Asking about edits in batches against asking one prompt at a time: same model, same answers.

A thousand edits in the form of flat CounterFact: the prompt, another wording and one neighbour each, generated and
teacher-forced. Single prompts are asked for the first of them only; the ratio is of seconds per edit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from errata.atlas.edits import world_edits
from errata.edit import Edit
from errata.evaluation.protocol import Examination, Result
from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress

__all__ = ["run"]

_EDITS, _SINGLE = 1000, 60


def _flat(edit: Edit) -> Edit:
    return edit.model_copy(
        update={"rephrases": edit.rephrases[:1], "locality": edit.locality[:1], "portability": ()}, deep=True
    )


def _asked(model: EditableModel, edits: Sequence[Edit], progress: Progress, **settings: Any) -> tuple[float, Result]:
    """Seconds that asking took, and what came out; the unedited model's answers are asked before."""
    examination = Examination(model, edits, **settings)
    examination.ask_base(progress=progress)
    began = time.perf_counter()
    result = examination.ask(progress=progress)
    return time.perf_counter() - began, result


def run(progress: Progress = NO_PROGRESS, edits: int = _EDITS, single: int = _SINGLE) -> dict[str, Any]:
    """`batched_vs_single`: seconds per edit one prompt at a time, over those in batches."""
    model, some = EditableModel.load("atlas"), [_flat(edit) for edit in world_edits(edits)]
    _asked(model, some[:4], NO_PROGRESS)  # warms up
    alone, expected = _asked(model, some[:single], progress, batch_tokens=1)
    together, found = _asked(model, some, progress)
    differ = sum(one.said != other.said for one, other in zip(expected.asked, found.asked[:single], strict=True))
    row = {
        "edits": edits,
        "prompts": sum(len(asked.said) for asked in found.asked),
        "seconds": together,
        "edits_per_second": edits / together,
        "single_edits_per_second": single / alone,
        "edits_answered_otherwise": differ,
    }
    return {"ratios": {"batched_vs_single": (alone / single) / (together / edits)}, "rows": [row]}
