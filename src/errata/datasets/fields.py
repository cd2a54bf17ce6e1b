"""What the readers share: taking fields that must be there, probes, and an edit that keeps what it has no place for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from errata.edit import Edit, FieldProblem

__all__ = ["cut_off", "edit_of", "filled", "named", "one_hop", "probe", "required", "same_length", "texts"]

T = TypeVar("T")

_HOP = {"New Question", "New Answer"}


def required(record: dict[str, Any], field: str, kind: type[T], prefix: str = "") -> T:
    """The field's value. Raises FieldProblem when it is missing or of another type."""
    if field not in record:
        raise FieldProblem(prefix + field, "is missing", f"found the keys {sorted(record)}")
    value = record[field]
    if not isinstance(value, kind):
        raise FieldProblem(
            prefix + field, f"expected {kind.__name__}, found {type(value).__name__}", "correct the value"
        )
    return value


def texts(record: dict[str, Any], field: str, prefix: str = "") -> list[str]:
    """A list of texts that may be missing. Raises FieldProblem when it is something else."""
    found = required(record, field, list, prefix) if record.get(field) is not None else []
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise FieldProblem(
                f"{prefix}{field}.{number}", f"expected str, found {type(text).__name__}", "correct the value"
            )
    return found


def same_length(first: list[Any], second: list[Any], fields: tuple[str, str]) -> None:
    """Raises FieldProblem unless two lists that belong together have the same length."""
    if len(first) != len(second):
        raise FieldProblem(
            fields[1],
            f"has {len(second)} entries, {fields[0]} has {len(first)}",
            "give as many answers as there are questions",
        )


def filled(template: str, subject: str, field: str) -> str:
    """A prompt with its subject in place of '{}'. Raises FieldProblem unless there is one place for it.

    Filled in by hand: str.format would trip over braces elsewhere in the prompt.
    """
    if template.count("{}") != 1:
        raise FieldProblem(
            field, f"needs one '{{}}' for the subject, found {template!r}", "write it as 'The capital of {} is'"
        )
    return template.replace("{}", subject)


def named(form: str, record: dict[str, Any], field: str) -> str:
    """The id of an edit whose record has one ("counterfact-12"), else nothing, and it will be derived."""
    return f"{form}-{record[field]}" if record.get(field) not in (None, "") else ""


def probe(prompt: Any, answer: str | None, kind: str, aliases: Iterable[str] = (), **more: Any) -> dict[str, Any]:
    """A probe as a record; other names of its answer go to `aliases`."""
    others = [alias for alias in aliases if alias != answer]
    found = {"prompt": prompt, "answer": answer or None, "kind": kind, **more}
    return {**found, "aliases": others} if others else found


def edit_of(record: dict[str, Any], used: Collection[str], **fields: Any) -> Edit:
    """An edit of these fields. What the record has besides those used is kept in `extra`, under its own key unless an
    Edit has a field of that name, which it then does not mean.

    Raises:
        FieldProblem: a field does not fit.
    """
    kept = {key: value for key, value in record.items() if key not in used}
    extra = {f"record_{key}" if key in Edit.model_fields else key: value for key, value in kept.items()}
    return Edit.from_record({**extra, **{key: value for key, value in fields.items() if value is not None}})


def one_hop(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The question that follows from the edit, in records that carry one (EasyEdit's portability files)."""
    hop = record.get("portability")
    if not isinstance(hop, dict) or not hop.get("New Question"):
        return []
    more = {key.lower().replace(" ", "_"): value for key, value in hop.items() if key not in _HOP}
    return [probe(hop["New Question"], required(hop, "New Answer", str, "portability."), "one_hop", **more)]


def cut_off(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The locality probe of WISE's files of long texts: unrelated text that breaks off, and how it goes on."""
    if not record.get("locality_prompt"):
        return []
    return [probe(record["locality_prompt"], record.get("locality_ground_truth"), "unrelated")]
