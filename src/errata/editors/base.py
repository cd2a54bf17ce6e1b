"""The contract of every editing method: a configuration, `prepare()`, `edit()`, and an adapter that it writes.

A method is one file: a frozen configuration, and a subclass of `Editor` that says how a batch of edits is written.
What is common is here: order and conflicts, batches, refusals, the receipt.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Self, TypeVar

from errata.adapters import Adapter, LayerChange
from errata.edit import Edit, find_conflicts
from errata.errors import ConfigError, EditError, NumericsError, SpanError, unknown_name
from errata.model import EditableModel
from errata.model.scoring import forced_answers
from errata.model.spans import find_subject
from errata.progress import NO_PROGRESS, Progress

__all__ = ["AppliedEdit", "EditOutcome", "Editor", "EditorConfig", "RefusedEdit"]


@dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """Settings common to all editors.

    Attributes:
        batch_size: edits written together; 1 is the faithful setting of sequential methods.
        seed: of every random choice the editor makes.
        source: where the values come from ("paper, table 10", "derived from the model's shape", ...).
    """

    batch_size: int = 1
    seed: int = 0
    source: str = "defaults"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {self.batch_size}")

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        """Values printed in a paper for this architecture and size, or None."""
        return None

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        """Values computed from the model's shape, where nothing is published."""
        return {}

    @classmethod
    def for_model(cls, model: EditableModel, **overrides: Any) -> Self:
        """Published values if there are any, else derived ones; `overrides` win.

        Raises:
            ConfigError: an override that this editor does not have.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for name in overrides:
            if name not in known:
                raise ConfigError(unknown_name("setting", name, known - {"source"}))
        published = cls.published(model)
        values = {"source": "derived from the model's shape", **cls.derived(model)} if published is None else published
        if overrides:
            values = {**values, "source": f"{values.get('source', 'defaults')}; given: {', '.join(sorted(overrides))}"}
        return cls(**{**values, **overrides})

    def to_record(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Raises ConfigError for settings that this version does not know."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(record) - known)
        if unknown:
            raise ConfigError(
                f"settings {', '.join(unknown)} are not known to {cls.__name__}; known: {', '.join(sorted(known))}"
            )
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(**values)


@dataclass(frozen=True)
class AppliedEdit:
    """One edit that was written.

    Attributes:
        took: right after writing, every token of the target is the model's first choice (teacher-forced).
        probability_before, probability_after: of the target given the prompt.
        steps: inner optimisation steps, if the method has any.
    """

    edit_id: str
    took: bool
    probability_before: float
    probability_after: float
    steps: int | None = None


@dataclass(frozen=True)
class RefusedEdit:
    """One edit that was not written, and why; the model is as if it had not been given."""

    edit_id: str
    reason: str


@dataclass
class EditOutcome:
    """The receipt of one call of `edit()`.

    Attributes:
        superseded: pairs (old id, new id): the new edit gives the same prompt another target.
        changes: the adapter's layers as they are now.
        seconds: writing, without preparation; prepare_seconds: preparation done in this call.
    """

    applied: list[AppliedEdit] = field(default_factory=list)
    refused: list[RefusedEdit] = field(default_factory=list)
    superseded: list[tuple[str, str]] = field(default_factory=list)
    changes: list[LayerChange] = field(default_factory=list)
    seconds: float = 0.0
    prepare_seconds: float = 0.0
    memory_version: int = 0

    @property
    def seconds_per_edit(self) -> float:
        return self.seconds / max(1, len(self.applied))

    def summary(self) -> str:
        """The receipt in words."""
        took = sum(edit.took for edit in self.applied)
        lines = [f"{len(self.applied)} edits written, {took} of them took, {self.seconds_per_edit:.3f} s per edit"]
        lines += [f"superseded: {old} by {new}" for old, new in self.superseded]
        lines += [f"refused: {edit.edit_id}: {edit.reason}" for edit in self.refused]
        lines += [
            f"{c.module}: norm of change {c.norm:.4g} ({c.relative_norm:.2%} of the weight), {c.entries} edits"
            for c in self.changes
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Written:
    """What `_write` reports for a batch: per edit, how many steps it took."""

    steps: tuple[int | None, ...]


C = TypeVar("C", bound=EditorConfig)


class Editor(abc.ABC, Generic[C]):
    """An editing method at work on one model.

    Args:
        model: the model to edit. The editor's adapter is attached to it and stays attached; `adapter.detach()`
            returns the base model, bit for bit.
        config: settings; by default the published or derived ones for this model.
        adapter: an adapter of this method to go on with, as loaded from disk.
        overrides: single settings that differ from the default configuration.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type[EditorConfig]]
    needs_subject: ClassVar[bool] = False

    def __init__(
        self, model: EditableModel, config: C | None = None, *, adapter: Adapter | None = None, **overrides: Any
    ) -> None:
        if config is not None and overrides:
            raise ConfigError("give either a configuration or single settings, not both")
        if adapter is not None and config is None and not overrides:
            loaded = self.Config.from_record(adapter.editor_config)
        else:
            loaded = config or self.Config.for_model(model, **overrides)
        self.model = model
        self.config: C = loaded  # type: ignore[assignment]
        self._prepared = False
        if adapter is None:
            self.adapter = self._new_adapter()
        else:
            if adapter.editor != self.name:
                raise ConfigError(f"this adapter was written by {adapter.editor!r}; {self.name!r} cannot go on with it")
            self.adapter = adapter
        if not self.adapter.is_attached:
            self.adapter.attach(model)

    @classmethod
    def unsuitable(cls, model: EditableModel) -> str | None:
        """Why this method cannot edit a model, in words, or None when it can."""
        if not next(model.model.parameters()).dtype.is_floating_point:
            return "its weights are quantised; load it in a floating-point dtype"
        if cls.needs_subject and not getattr(model.tokenizer, "is_fast", False):
            return "the subject is found by character offsets, which this tokenizer does not report (load the fast one)"
        return None

    # --- what a method defines --------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _new_adapter(self) -> Adapter:
        """An empty adapter of this method."""

    def _prepare(self, progress: Progress) -> None:
        """Compute what is needed once per base model. The adapter is attached while this runs."""
        return

    @abc.abstractmethod
    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        """Write a batch into the adapter, all of it or nothing.

        Raises:
            EditError, SpanError, NumericsError: the batch is refused.
        """

    # --- what users call --------------------------------------------------------------------------------------------

    def prepare(self, progress: Progress = NO_PROGRESS) -> float:
        """Compute what is needed once per base model (statistics, thresholds); returns the seconds it took.

        Cached and resumable where it is long; called by `edit()` when it has not been called before.
        """
        if self._prepared:
            return 0.0
        began = time.perf_counter()
        self._prepare(progress)
        self._prepared = True
        return time.perf_counter() - began

    def edit(self, edits: Sequence[Edit], progress: Progress = NO_PROGRESS) -> EditOutcome:
        """Write edits into the adapter, in order; can be called again and again.

        An edit that cannot be written is refused with its reason and the others go on. Of two edits with the same
        prompt and different targets the later one supersedes the earlier, and the outcome says so.
        """
        outcome = EditOutcome(prepare_seconds=self.prepare(progress))
        began = time.perf_counter()
        before = list(self.adapter.edits())
        everything = [*before, *edits]
        replaced = {
            everything[later].id: everything[earlier].id
            for earlier, later in find_conflicts(everything)
            if later >= len(before)
        }
        progress.start(f"{self.name}: editing", len(edits))
        usable = [edit for edit in edits if self._accepts(edit, outcome)]
        progress.advance(len(edits) - len(usable))
        for start in range(0, len(usable), self.config.batch_size):
            batch = usable[start : start + self.config.batch_size]
            self._write_batch(batch, replaced, outcome, progress)
            progress.advance(len(batch), note=f"{sum(e.took for e in outcome.applied)} took")
        outcome.seconds = time.perf_counter() - began
        outcome.changes = self.adapter.layer_changes(self.model)
        outcome.memory_version = self.adapter.memory_version
        return outcome

    def _accepts(self, edit: Edit, outcome: EditOutcome) -> bool:
        if not self.needs_subject:
            return True
        try:
            if edit.subject is None:
                raise SpanError(
                    f"{self.name} needs to know the subject; add the field 'subject', spelled as in the prompt"
                )
            find_subject(edit.prompt, edit.subject)
        except SpanError as error:
            outcome.refused.append(RefusedEdit(edit.id, str(error)))
            return False
        return True

    def _write_batch(
        self, batch: Sequence[Edit], replaced: Mapping[str, str], outcome: EditOutcome, progress: Progress
    ) -> None:
        passages = [self.model.passage(edit.prompt, edit.target) for edit in batch]
        before = forced_answers(self.model, passages)
        try:
            written = self._write(batch, progress)
        except (EditError, SpanError, NumericsError) as error:
            outcome.refused += [RefusedEdit(edit.id, str(error)) for edit in batch]
            return
        for edit in batch:
            old = replaced.get(edit.id)
            if old is not None:
                self.adapter.supersede(old, edit.id)
                outcome.superseded.append((old, edit.id))
            self.adapter.remember(edit)
        after = forced_answers(self.model, passages)
        for edit, passage, old_answer, new_answer, steps in zip(
            batch, passages, before, after, written.steps, strict=True
        ):
            outcome.applied.append(
                AppliedEdit(
                    edit.id,
                    new_answer.predicted == passage.answer,
                    old_answer.probability,
                    new_answer.probability,
                    steps,
                )
            )
