"""The Edit: one correction of what a model believes, and how we will know that it worked.

Knows nothing of models or files. One edit is one JSON object a line (`to_json` / `from_record`); benchmark files
become edits in `errata.datasets`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from errata.errors import EditError

__all__ = ["Edit", "FieldProblem", "Probe"]


class FieldProblem(EditError):
    """A field of a record that does not fit; readers turn it into a `FormatError` with file and line.

    Args:
        field: the field's name, None for the record as a whole.
        problem: what was found; remedy: what to write instead.
    """

    def __init__(self, field: str | None, problem: str, remedy: str) -> None:
        self.field, self.problem, self.remedy = field, problem, remedy
        super().__init__(f"field {field!r}: {problem}; {remedy}" if field else f"{problem}; {remedy}")


class Probe(BaseModel):
    """A prompt that is asked to see what an edit did, with the answer if one is right or was given.

    `kind` says what it probes ("same_relation", "same_subject", "unrelated", "second_language", ...); free text.
    `aliases` are other names of the answer, each of them right. Probes of an edit with the same `group` are wordings of
    one question, of which it may be enough that any is answered (MQuAKE's multi-hop questions).
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    prompt: str
    answer: str | None = None
    kind: str | None = None
    aliases: tuple[str, ...] = ()
    group: str | None = None

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty; write the text that is to be completed")
        return value


def _as_probes(value: Any) -> Any:
    """A locality or portability entry may be a bare prompt."""
    if isinstance(value, str) or not isinstance(value, Iterable) or isinstance(value, dict):
        value = [value]
    return [{"prompt": item} if isinstance(item, str) else item for item in value]


def _derived_id(prompt: str, target: str, subject: Any) -> str:
    named = subject if isinstance(subject, str) and subject.strip() else ""
    text = "\x1f".join((prompt, target.strip(), named))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class Edit(BaseModel):
    """One correction.

    Attributes:
        prompt: the text before the answer ("The capital of France is").
        target: the new answer ("Rome"), without leading space; what the model shall say from now on.
        id: names the edit; by default derived from prompt, target and subject.
        aliases: other names of the target; where what the model writes is scored, each of them is right.
        subject: the words of the prompt that the fact is about; some methods need them.
        ground_truth: the old answer.
        rephrases: other ways to ask; generalization is measured on them.
        locality: prompts whose answer must stay what it was.
        portability: prompts whose answer follows from the edit; each with that answer.
        extra: keys of the record that errata does not know. They are kept and written back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    target: str
    id: str = ""
    aliases: tuple[str, ...] = ()
    subject: str | None = None
    ground_truth: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    source: str | None = None
    author: str | None = None
    created_at: datetime | None = None
    tags: tuple[str, ...] = ()
    extra: dict[str, Any] = Field(default_factory=dict)

    @field_validator("prompt")
    @classmethod
    def _prompt_has_words(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty; write the text before the answer")
        return value

    @field_validator("target")
    @classmethod
    def _target_has_words(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty; write what the model shall answer")
        return value.strip()

    @field_validator("subject", "ground_truth")
    @classmethod
    def _nothing_is_none(cls, value: str | None) -> str | None:
        return value if value and value.strip() else None

    @field_validator("rephrases", mode="before")
    @classmethod
    def _one_rephrase(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("locality", "portability", mode="before")
    @classmethod
    def _probes(cls, value: Any) -> Any:
        return _as_probes(value)

    @field_validator("portability")
    @classmethod
    def _answered(cls, value: tuple[Probe, ...]) -> tuple[Probe, ...]:
        for probe in value:
            if probe.answer is None:
                raise ValueError(f"entry {probe.prompt!r} has no answer; give {{prompt, answer}}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("id") and isinstance(data.get("prompt"), str):
            data = {**data, "id": _derived_id(data["prompt"], str(data.get("target")), data.get("subject"))}
        return data

    @property
    def has_derived_id(self) -> bool:
        """Whether the id is the one that follows from prompt, target and subject, rather than one that was given."""
        return self.id == _derived_id(self.prompt, self.target, self.subject)

    @classmethod
    def from_record(cls, record: Any) -> Edit:
        """An edit from one decoded JSON object; unknown keys go to `extra`.

        Raises:
            FieldProblem: naming the field that does not fit and what to write instead.
        """
        if not isinstance(record, dict):
            raise FieldProblem(
                None, f"expected an object, found {type(record).__name__}", 'write {"prompt": ..., "target": ...}'
            )
        known = {key: value for key, value in record.items() if key in cls.model_fields and key != "extra"}
        extra = {key: value for key, value in record.items() if key not in known}
        if isinstance(known.get("id"), int):
            known["id"] = str(known["id"])
        try:
            return cls(**known, extra=extra)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or None
            if first["type"] == "missing":
                raise FieldProblem(
                    field, "is missing", f"every edit needs it; found the keys {sorted(record)}"
                ) from error
            message = first["msg"].removeprefix("Value error, ")
            problem, _, remedy = message.partition("; ")
            found = repr(first["input"])
            found = found if len(found) <= 60 else found[:57] + "..."
            raise FieldProblem(field, f"{problem} (found {found})", remedy or "correct the value") from error

    def to_record(self) -> dict[str, Any]:
        """The JSON object of this edit: what is set, with the unknown keys back in their place."""
        data = self.model_dump(mode="json", exclude={"extra"}, exclude_defaults=True, exclude_none=True)
        return {"id": self.id, **{k: v for k, v in data.items() if k != "id"}, **self.extra}

    def to_json(self) -> str:
        """One line of JSONL, without the line break."""
        return json.dumps(self.to_record(), ensure_ascii=False)
