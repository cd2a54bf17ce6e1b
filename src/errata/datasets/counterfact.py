"""CounterFact (Meng et al. 2022, ROME): its full form, and the flat one that EasyEdit ships.

full: `requested_rewrite {prompt with {}, subject, target_new.str, target_true.str}`, `paraphrase_prompts`,
`neighborhood_prompts`, ...; the neighbours share the old object, so their answer is the old target. Files built on it
add fields of their own, each of which becomes a probe:

* `portability` (EasyEdit, EVOKE): a question that follows from the edit, "one_hop";
* `alternative_subject` (EasyEdit): the prompt with another name of the subject, "subject_alias";
* `distracting_neighborhood_prompts` (EasyEdit) and `prefix_distraction` (EVOKE): neighbours behind the edit's own
  sentence, "distracting";
* `unrelated_relation` (EasyEdit): another fact of the subject, "same_subject";
* `relation_specificity` (EVOKE): another fact of the subject, "relation_specificity".

Prompts to write freely from, and others that have the new object anyway (`generation_prompts`, `attribute_prompts`),
have no answer that an edit should or should not change; they are kept in `extra`.

flat: `prompt, subject, target_new, ground_truth, rephrase_prompt, locality_prompt, locality_ground_truth`.
"""

from __future__ import annotations

from typing import Any

from errata.datasets.fields import edit_of, filled, named, one_hop, probe, required, texts
from errata.edit import Edit

__all__ = ["KEYS", "NAME", "TRUTH", "read", "recognises"]

NAME = "CounterFact"
KEYS = "requested_rewrite; or prompt, target_new, rephrase_prompt"
TRUTH = "ground_truth"

_FULL = {
    "case_id",
    "paraphrase_prompts",
    "neighborhood_prompts",
    "portability",
    "alternative_subject",
    "distracting_neighborhood_prompts",
    "prefix_distraction",
    "unrelated_relation",
    "relation_specificity",
}
_FLAT = {
    "case_id",
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
    flat = "target_new" in record and "prompt" in record
    return "requested_rewrite" in record or (flat and ("locality_prompt" in record or "rephrase_prompt" in record))


def read(record: dict[str, Any]) -> Edit:
    """A record as an edit. Raises FieldProblem when a field does not fit."""
    return _read_full(record) if "requested_rewrite" in record else _read_flat(record)


def _read_full(record: dict[str, Any]) -> Edit:
    rewrite = required(record, "requested_rewrite", dict)
    subject = required(rewrite, "subject", str, "requested_rewrite.")
    template = required(rewrite, "prompt", str, "requested_rewrite.")
    prompt = filled(template, subject, "requested_rewrite.prompt")
    new, true = (
        required(required(rewrite, name, dict, "requested_rewrite."), "str", str, f"requested_rewrite.{name}.")
        for name in ("target_new", "target_true")
    )
    locality = [probe(text, true, "same_relation") for text in texts(record, "neighborhood_prompts")]
    for field in ("distracting_neighborhood_prompts", "prefix_distraction"):
        locality += [probe(text, true, "distracting") for text in texts(record, field)]
    if record.get("unrelated_relation"):
        other = required(record, "unrelated_relation", dict)
        answer = required(other, "object", str, "unrelated_relation.")
        question = required(other, "question", str, "unrelated_relation.")
        locality.append(probe(question, answer, "same_subject", relation=other.get("relation_id")))
    if record.get("relation_specificity"):
        specific = required(record, "relation_specificity", dict)
        known = required(specific, "answer", dict, "relation_specificity.")
        value = required(known, "value", str, "relation_specificity.answer.")
        asked = required(specific, "prompt", str, "relation_specificity.")
        aliases = texts(known, "aliases", "relation_specificity.answer.")
        locality.append(probe(asked, value, "relation_specificity", aliases))
    portability = one_hop(record)
    if record.get("alternative_subject"):
        alias = required(record, "alternative_subject", str)
        portability.append(probe(template.replace("{}", alias), new, "subject_alias"))
    return edit_of(
        record,
        _FULL,
        id=named("counterfact", record, "case_id"),
        prompt=prompt,
        target=new,
        subject=subject,
        ground_truth=true,
        rephrases=texts(record, "paraphrase_prompts"),
        locality=locality,
        portability=portability,
        source=NAME,
    )


def _read_flat(record: dict[str, Any]) -> Edit:
    locality = []
    if record.get("locality_prompt"):
        locality = [probe(record["locality_prompt"], record.get("locality_ground_truth"), "same_relation")]
    return edit_of(
        record,
        _FLAT,
        id=named("counterfact", record, "case_id"),
        prompt=required(record, "prompt", str),
        target=required(record, "target_new", str),
        subject=record.get("subject"),
        ground_truth=record.get("ground_truth"),
        rephrases=[record["rephrase_prompt"]] if record.get("rephrase_prompt") else [],
        locality=locality,
        source=NAME,
    )
