"""What an edited model writes when it is let to write: the texts, their fluency, and whether they are about the target.

Asks a model. The measures themselves are in `errata.evaluation.texts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.datasets.reading import iterate_records
from errata.edit import Edit
from errata.errors import ConfigError, FormatError
from errata.evaluation.metrics import Measure, bootstrap_mean, finite_or_none
from errata.evaluation.texts import consistency, fluency
from errata.model import EditableModel
from errata.model.generation import continued
from errata.model.scoring import length_batches
from errata.progress import NO_PROGRESS, Progress

__all__ = ["FreeText", "read_references", "write_freely"]

_TOKENS = 100
_KEY = "generation_prompts"  # of CounterFact's full records, kept in an edit's `extra`


@dataclass(frozen=True)
class FreeText:
    """What was written about each edit, and how it reads.

    Attributes:
        tokens: of every text, the same for all: n-gram entropy grows with length.
        fluency: mean n-gram entropy of the texts, in hundredths of a bit (see `texts.fluency`).
        consistency: mean likeness to reference texts about the target, over edits whose target has some.
        texts: per edit id, what was written behind each of its prompts.
    """

    tokens: int
    fluency: Measure
    consistency: Measure
    texts: dict[str, dict[str, str]]

    def to_record(self) -> dict[str, Any]:
        """JSON without the texts, null for what was not asked."""

        def measure(found: Measure) -> dict[str, Any]:
            interval = [finite_or_none(found.low), finite_or_none(found.high)]
            return {"value": finite_or_none(found.value), "interval": interval, "edits": found.count}

        return {
            "tokens": self.tokens,
            "fluency": measure(self.fluency),
            "consistency": measure(self.consistency),
        }


def write_freely(
    model: EditableModel,
    edits: Sequence[Edit],
    *,
    references: Mapping[str, Sequence[str]] | None = None,
    tokens: int = _TOKENS,
    batch_tokens: int = 4096,
    progress: Progress = NO_PROGRESS,
) -> FreeText:
    """Let a model write exactly `tokens` tokens behind prompts about each edit's subject (2202.05262, appendix).

    Prompts are CounterFact's `generation_prompts` where an edit has them in `extra`, else the edit's own. Greedy, and
    no end token or line break ends a text: the original samples among the five likeliest tokens, so values differ.

    Args:
        references: texts by the object they are about, see `read_references`.
    """
    asked = [_prompts(edit) for edit in edits]
    prompts = sorted({prompt for own in asked for prompt in own})
    progress.start("writing freely", len(prompts))
    written = _written(model, prompts, tokens, batch_tokens, progress)
    fluencies = [_mean([fluency(written[prompt]) for prompt in own]) for own in asked]
    known = references or {}
    corpus = [text for texts in known.values() for text in texts]
    about = [
        consistency(" ".join(written[prompt] for prompt in own), known[edit.target], corpus)
        for edit, own in zip(edits, asked, strict=True)
        if known.get(edit.target)
    ]
    texts = {edit.id: {prompt: written[prompt] for prompt in own} for edit, own in zip(edits, asked, strict=True)}
    return FreeText(tokens, bootstrap_mean(fluencies), bootstrap_mean(about), texts)


def _prompts(edit: Edit) -> list[str]:
    given = edit.extra.get(_KEY)
    listed = [text for text in given if isinstance(text, str) and text.strip()] if isinstance(given, list) else []
    return list(dict.fromkeys(listed)) or [edit.prompt]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _written(
    model: EditableModel, prompts: Sequence[str], tokens: int, batch_tokens: int, progress: Progress
) -> dict[str, str]:
    passages = [model.passage(prompt) for prompt in prompts]
    found: dict[str, str] = {}
    for indices in length_batches([len(passage.ids) + tokens for passage in passages], batch_tokens):
        batch = model.batch([passages[i] for i in indices], side="left")
        with model.sequences.narrowed(indices, len(passages)):
            output = continued(model, batch, max_new_tokens=tokens, eos_token_id=None)
        for index, row in zip(indices, output.tolist(), strict=True):
            found[prompts[index]] = model.tokenizer.decode(row, skip_special_tokens=True)
        progress.advance(len(indices))
    return found


def read_references(path: Path) -> dict[str, list[str]]:
    """Texts by the object they are about, from records of {"object", "text"}: JSONL, JSON or CSV, gzipped or not.

    Raises:
        FormatError: a record that is something else; names file, line, field and remedy.
        ConfigError: the file holds no records.
    """
    found: dict[str, list[str]] = {}
    for record in iterate_records(path):
        if isinstance(record, FormatError):
            raise record
        for field in ("object", "text"):
            value = record.value.get(field) if isinstance(record.value, dict) else None
            if not isinstance(value, str) or not value.strip():
                remedy = 'write {"object": "Rome", "text": "Rome is a city ..."}, one a line'
                raise FormatError(str(path), record.line, field, "is missing or no text", remedy)
        found.setdefault(record.value["object"].strip(), []).append(record.value["text"])
    if not found:
        raise ConfigError(f"--references {path} holds no texts; write one {{object, text}} a line")
    return found
