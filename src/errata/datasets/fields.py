"""What the readers share: taking a field that must be there, and questions that several files hold alike."""

from __future__ import annotations

from typing import Any, TypeVar

from errata.edit import FieldProblem

__all__ = ["cut_off", "one_hop", "required"]

T = TypeVar("T")


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


def one_hop(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The question that follows from the edit, in records that carry one (EasyEdit's portability files)."""
    hop = record.get("portability")
    if not isinstance(hop, dict) or not hop.get("New Question"):
        return []
    return [
        {"prompt": hop["New Question"], "answer": required(hop, "New Answer", str, "portability."), "kind": "one_hop"}
    ]


def cut_off(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The locality probe of WISE's files of long texts: unrelated text that breaks off, and how it goes on."""
    prompt = record.get("locality_prompt")
    if not prompt:
        return []
    return [{"prompt": prompt, "answer": record.get("locality_ground_truth") or None, "kind": "unrelated"}]
