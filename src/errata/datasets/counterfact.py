"""CounterFact (Meng et al. 2022, ROME): its full form, and the flat one that EasyEdit ships.

full: `requested_rewrite {prompt with {}, subject, target_new.str, target_true.str}`, `paraphrase_prompts`,
`neighborhood_prompts`, ...; the neighbours share the old object, so their answer is the old target.
flat: `prompt, subject, target_new, ground_truth, rephrase_prompt, locality_prompt, locality_ground_truth`.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import one_hop, required
from errata.edit import Edit, FieldProblem

__all__ = ["KEYS", "NAME", "read", "recognises"]

NAME = "CounterFact"
KEYS = "requested_rewrite; or prompt, target_new, rephrase_prompt"

_FULL = {"requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "portability"}
_FLAT = {
    "prompt",
    "subject",
    "target_new",
    "ground_truth",
    "rephrase_prompt",
    "locality_prompt",
    "locality_ground_truth",
}


def recognises(record: dict[str, Any]) -> bool:
    """Whether a record has this form."""
    # KnowEdit's records look alike, but their locality is a dictionary of lists.
    flat = "target_new" in record and "prompt" in record and not isinstance(record.get("locality"), dict)
    return "requested_rewrite" in record or (flat and ("locality_prompt" in record or "rephrase_prompt" in record))


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    return _read_full(record) if "requested_rewrite" in record else _read_flat(record)


def _name(record: dict[str, Any]) -> str:
    return f"counterfact-{record['case_id']}" if "case_id" in record else ""


def _read_full(record: dict[str, Any]) -> Edit:
    rewrite = required(record, "requested_rewrite", dict)
    subject = required(rewrite, "subject", str, "requested_rewrite.")
    template = required(rewrite, "prompt", str, "requested_rewrite.")
    if template.count("{}") != 1:
        raise FieldProblem(
            "requested_rewrite.prompt",
            f"needs one '{{}}' for the subject, found {template!r}",
            "write it as 'The capital of {} is'",
        )
    new = required(
        required(rewrite, "target_new", dict, "requested_rewrite."), "str", str, "requested_rewrite.target_new."
    )
    true = required(
        required(rewrite, "target_true", dict, "requested_rewrite."), "str", str, "requested_rewrite.target_true."
    )
    # The subject is filled in by hand: str.format would trip over braces elsewhere in the prompt.
    return Edit.from_record(
        {
            "id": _name(record),
            "prompt": template.replace("{}", subject),
            "target": new,
            "subject": subject,
            "ground_truth": true,
            "rephrases": record.get("paraphrase_prompts", []),
            "locality": [
                {"prompt": p, "answer": true, "kind": "same_relation"} for p in record.get("neighborhood_prompts", [])
            ],
            "portability": one_hop(record),
            "source": NAME,
            **{key: value for key, value in record.items() if key not in _FULL},
        }
    )


def _read_flat(record: dict[str, Any]) -> Edit:
    locality = []
    if record.get("locality_prompt"):
        locality = [
            {
                "prompt": record["locality_prompt"],
                "answer": record.get("locality_ground_truth"),
                "kind": "same_relation",
            }
        ]
    return Edit.from_record(
        {
            "id": _name(record),
            "prompt": required(record, "prompt", str),
            "target": required(record, "target_new", str),
            "subject": record.get("subject"),
            "ground_truth": record.get("ground_truth"),
            "rephrases": [record["rephrase_prompt"]] if record.get("rephrase_prompt") else [],
            "locality": locality,
            "source": NAME,
            **{key: value for key, value in record.items() if key not in _FLAT},
        }
    )
