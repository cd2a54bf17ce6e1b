"""Baselines that are always there: what the numbers would be without the edits, or with edits that say nothing new.

* **unedited**: the base model, asked the same questions;
* **no-op**: the same method writes back what the model already answers; any loss is damage and nothing else;
* **random content**: the finished adapter with its outputs rotated at random, the norm kept; tells whether
  locality suffers from what was written or merely from how much.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from errata.adapters import Adapter
from errata.edit import Edit
from errata.editors import Editor
from errata.evaluation.metrics import finite_or_none
from errata.evaluation.protocol import Examination, Result
from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress

__all__ = ["Control", "no_op_control", "no_op_edits", "random_control"]

_FIRST_CLAUSE = re.compile(r"^(.*?)(?:[.!?](?:\s|$)|\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Control:
    """One baseline: what was asked of it and the perplexity of held-out text under it.

    Attributes:
        applied, refused: edits that were written for it and that the editor refused (some refuse an edit that changes
            nothing); None where none were made.
    """

    name: str
    result: Result
    perplexity: float | None
    applied: int | None = None
    refused: int | None = None

    def to_record(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **self.result.to_record(),
            "perplexity": finite_or_none(self.perplexity),
            "edits_applied": self.applied,
            "edits_refused": self.refused,
        }


def _perplexity(model: EditableModel, texts: Sequence[str]) -> float | None:
    return model.perplexity(texts) if texts else None


def no_op_edits(examination: Examination) -> list[Edit]:
    """The same edits with the unedited model's own answer as target; edits it had no answer to are left out.

    Portability is not asked: what would follow from the original targets does not follow from these.
    """
    written = []
    for edit in examination.edits:
        match = _FIRST_CLAUSE.match(examination.base_answer(edit.prompt).strip())
        answer = match.group(1).strip() if match else ""
        if answer:
            changed = {"target": answer, "id": f"{edit.id}-no-op", "portability": ()}
            written.append(edit.model_copy(update=changed))
    return written


def no_op_control(
    editor: Editor[Any], examination: Examination, texts: Sequence[str], progress: Progress = NO_PROGRESS
) -> Control:
    """Write back what is already believed, with a fresh editor; it is detached again afterwards."""
    edits = no_op_edits(examination)
    asking = Examination(examination.model, edits, examination.max_new_tokens, examination.batch_tokens)
    asking.share_base(examination)
    try:
        outcome = editor.edit(edits, progress)
        result, perplexity = asking.ask(progress=progress), _perplexity(examination.model, texts)
    finally:
        editor.adapter.detach()
    return Control(f"no-op ({editor.name})", result, perplexity, len(outcome.applied), len(outcome.refused))


def random_control(
    adapter: Adapter, examination: Examination, texts: Sequence[str], *, seed: int = 0, progress: Progress = NO_PROGRESS
) -> Control:
    """The adapter with random content of the same norm, asked about the original edits; the adapter stays attached."""
    model = adapter.model
    noise = adapter.with_random_content(torch.Generator().manual_seed(seed))
    with adapter.detached():
        noise.attach(model)
        try:
            result = examination.ask(progress=progress)
            return Control(f"random content ({adapter.editor})", result, _perplexity(model, texts))
        finally:
            noise.detach()
