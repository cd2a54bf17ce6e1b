"""The WikiBio hallucination set: sentences a language model made up, each with the true one to be said instead.

SelfCheckGPT (Manakul et al. 2023) collected the passages; GRACE made edits of them, and WISE's files are read here:
`prompt, target_new, subject, locality_prompt, locality_ground_truth`. A prompt is the passage so far ("This is a
Wikipedia passage about ..."), a target the next true sentence. Locality prompts are web text cut off at a fixed
number of characters, often within a word, and their answers are what follows there; a few answers are empty.

There are no rephrases: the set is scored by the targets' perplexity and by locality (`errata study hallucination`).
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import cut_off, edit_of, required
from errata.edit import Edit

__all__ = ["KEYS", "NAME", "read", "recognises"]

NAME = "WikiBio hallucinations"
KEYS = "prompt 'This is a Wikipedia passage about ...', target_new, locality_prompt"

_BEGINS = "This is a Wikipedia passage about "
_USED = {"prompt", "target_new", "subject", "locality_prompt", "locality_ground_truth"}


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form, which differs from flat CounterFact by its prompt alone."""
    return "target_new" in record and str(record.get("prompt")).startswith(_BEGINS)


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    return edit_of(
        record,
        _USED,
        prompt=required(record, "prompt", str),
        target=required(record, "target_new", str),
        subject=record.get("subject"),
        locality=cut_off(record),
        source=NAME,
    )
