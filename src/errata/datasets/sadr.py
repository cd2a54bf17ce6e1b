"""The file of "Revealing and Mitigating Over-Attention in Knowledge Editing" (Wang et al. 2025, SADR): edits of
CounterFact and KnowEdit in one form.

`requested_rewrite {prompt, subject, target_new, target_true}` with the subject already in the prompt, and lists of
prompts with targets: `p-paraphrase` (rephrases), `p-reasoning` and `p-subject_alias` (portability), `l-neighbor` and
`l-relation` (locality), `o-commonsense` (a sentence and how it goes on, from PIQA; its wrong ending is kept beside it).
`generation` has prompts to write freely from, and stays in `extra`, as does `rewrite`, the edit once more.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import edit_of, probe, required, same_length, texts
from errata.edit import Edit, FieldProblem

__all__ = ["KEYS", "NAME", "TRUTH", "read", "recognises"]

NAME = "SADR"
KEYS = "requested_rewrite, rewrite, o-commonsense"
TRUTH = "ground_truth"

_LOCALITY = {"l-neighbor": "same_relation", "l-relation": "relation_specificity"}
_PORTABILITY = {"p-reasoning": "reasoning", "p-subject_alias": "subject_alias"}
_USED = {"p-paraphrase", "o-commonsense", *_LOCALITY, *_PORTABILITY}


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    return "requested_rewrite" in record and "rewrite" in record


def _asked(record: dict[str, Any], field: str, kind: str) -> list[dict[str, Any]]:
    if field not in record:
        return []
    block = required(record, field, dict)
    prompts, targets = texts(block, "prompts", f"{field}."), texts(block, "targets", f"{field}.")
    same_length(prompts, targets, (f"{field}.prompts", f"{field}.targets"))
    return [probe(prompt, target, kind) for prompt, target in zip(prompts, targets, strict=True)]


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    rewrite = required(record, "requested_rewrite", dict)
    target = required(rewrite, "target_new", str, "requested_rewrite.")
    locality = [entry for field, kind in _LOCALITY.items() for entry in _asked(record, field, kind)]
    if "o-commonsense" in record:
        other = required(record, "o-commonsense", dict)
        asked = required(other, "prompts", str, "o-commonsense.")
        locality.append(probe(asked, other.get("right"), "common_sense", wrong=other.get("wrong")))
    rephrases = _asked(record, "p-paraphrase", "rephrase")
    for entry in rephrases:
        if entry["answer"] != target:
            raise FieldProblem("p-paraphrase.targets", f"has {entry['answer']!r}", f"write the new target, {target!r}")
    return edit_of(
        record,
        _USED,
        prompt=required(rewrite, "prompt", str, "requested_rewrite."),
        target=target,
        subject=rewrite.get("subject"),
        ground_truth=rewrite.get("target_true"),
        rephrases=[entry["prompt"] for entry in rephrases],
        locality=locality,
        portability=[entry for field, kind in _PORTABILITY.items() for entry in _asked(record, field, kind)],
        source=NAME,
    )
