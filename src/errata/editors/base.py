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
from types import NoneType, UnionType
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from errata.adapters import Adapter, LayerChange, RevertResult
from errata.edit import Edit
from errata.editors.guard import Guard, GuardMode, GuardRecord, guard_words
from errata.editors.memory import MemoryNeeded, MemoryPart, backward_pass, weight_entries
from errata.errors import ConfigError, EditError, NumericsError, SpanError, unknown_name
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.model.scoring import forced_answers
from errata.model.spans import find_subject
from errata.progress import NO_PROGRESS, Progress

__all__ = ["AppliedEdit", "EditOutcome", "Editor", "EditorConfig", "RefusedEdit"]


@dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """Settings common to all editors.

    Attributes:
        batch_size: edits written together, by methods that can (`Editor.writes_jointly`).
        seed: of every random choice the editor makes.
        guard: what happens to a batch after which the model has collapsed (`editors.guard`; weight changes only):
            "refuse" takes it back, "warn" keeps it and says so, "off" does not measure.
        source: where the values come from ("paper, table 10", "derived from the model's shape", ...).

    Values are checked against the annotations of their fields.
    """

    # Settings of how later edits are trained. An adapter can be gone on with under other values of these; all
    # other settings shape what it holds already.
    adjustable: ClassVar[frozenset[str]] = frozenset(
        {
            "batch_size",
            "clamp",
            "clip_norm",
            "full_forward",
            "guard",
            "kl_factor",
            "learning_rate",
            "source",
            "steps",
            "stop_change",
            "stop_loss",
            "weight_decay",
        }
    )

    batch_size: int = 1
    seed: int = 0
    guard: GuardMode = "refuse"
    source: str = "defaults"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for one in dataclasses.fields(self):
            object.__setattr__(self, one.name, _checked(one.name, getattr(self, one.name), hints[one.name]))
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
        cls._know(overrides)
        published = cls.published(model)
        values = {"source": "derived from the model's shape", **cls.derived(model)} if published is None else published
        if overrides:
            values = {**values, "source": f"{values.get('source', 'defaults')}; given: {', '.join(sorted(overrides))}"}
        return cls(**{**values, **overrides})

    @classmethod
    def going_on(cls, record: Mapping[str, Any], config: Self | None, overrides: Mapping[str, Any]) -> Self:
        """The settings for more edits into an adapter that was made with `record`.

        Args:
            config: all settings, or None for those of the adapter; overrides: single ones that differ from them.

        Raises:
            ConfigError: a setting that shapes what the adapter holds differs, or an override does not exist.
        """
        made = cls.from_record(record)
        if config is None:
            cls._know(overrides)
            given = {"source": f"{made.source}; later given: {', '.join(sorted(overrides))}"} if overrides else {}
            config = dataclasses.replace(made, **{**given, **overrides})
        for name in sorted(cls._names() - cls.adjustable):
            there, here = getattr(made, name), getattr(config, name)
            if there != here:
                raise ConfigError(
                    f"this adapter was made with {name}={there!r} and cannot be gone on with under {name}={here!r}, "
                    "which would not fit what it holds; leave the setting out, or begin a new adapter"
                )
        return config

    @classmethod
    def _names(cls) -> set[str]:
        return {f.name for f in dataclasses.fields(cls)}

    @classmethod
    def _know(cls, overrides: Mapping[str, Any]) -> None:
        for name in overrides:
            if name not in cls._names():
                raise ConfigError(unknown_name("setting", name, cls._names() - {"source"}))

    def to_record(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Raises ConfigError for settings that this version does not know."""
        known = cls._names()
        unknown = sorted(set(record) - known)
        if unknown:
            raise ConfigError(
                f"settings {', '.join(unknown)} are not known to {cls.__name__}; known: {', '.join(sorted(known))}"
            )
        return cls(**record)


def _in_words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(repr(part) for part in parts)
    if origin in (Union, UnionType):
        return " or ".join(_in_words(part) for part in parts)
    if origin is tuple and parts[-1] is Ellipsis:
        return f"a list of which each is {_in_words(parts[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return words.get(hint, str(hint))


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value if it fits. Strictly: true is no number and 2.0 no whole one. JSON's lists serve as tuples."""
    expected: TypeAdapter[Any] = TypeAdapter(hint)
    for candidate in (value, tuple(value)) if isinstance(value, list) else (value,):
        try:
            return expected.validate_python(candidate, strict=True)
        except ValidationError:
            continue
    raise ConfigError(f"setting {name} is {value!r}; expected {_in_words(hint)}")


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
        superseded: pairs (old id, new id): the new edit answers the same prompt, or stands where the old one stood.
            The ids are equal where an edit was given again with another target.
        changes: the adapter's layers as they are now.
        guard: what the guard found, a record per batch; empty for adapters that do not change weights.
        seconds: writing, without preparation; prepare_seconds: preparation done in this call.
    """

    applied: list[AppliedEdit] = field(default_factory=list)
    refused: list[RefusedEdit] = field(default_factory=list)
    superseded: list[tuple[str, str]] = field(default_factory=list)
    changes: list[LayerChange] = field(default_factory=list)
    guard: list[GuardRecord] = field(default_factory=list)
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
        if self.guard:
            lines.append(guard_words(self.guard))
        return "\n".join(lines)


@dataclass(frozen=True)
class Written:
    """What `_write` reports for a batch.

    Attributes:
        steps: per edit, how many it took.
        displaced: per edit, the id of another edit whose place it took, so that this one can be neither reached nor
            reverted any more; empty where that cannot happen.
        condition: of the worst system that was solved, None where none was.
    """

    steps: tuple[int | None, ...]
    displaced: tuple[str | None, ...] = ()
    condition: float | None = None


C = TypeVar("C", bound=EditorConfig)

_CONTEXT_TOKENS = 20  # of a text that is put in front of a prompt
_INSTEAD = "Begin a new adapter, take a method that holds out longer, or keep it all the same (force, --force)"


class Editor(abc.ABC, Generic[C]):
    """An editing method at work on one model.

    Args:
        model: the model to edit. The editor's adapter is attached to it and stays attached; `adapter.detach()`
            returns the base model, bit for bit.
        config: settings; by default the published or derived ones for this model.
        adapter: an adapter of this method to go on with, as loaded from disk; its settings are the default then.
        overrides: single settings that differ from the default configuration.

    Raises:
        ConfigError: settings that do not exist or do not fit, the model or the adapter; a model that this method
            cannot edit.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type[EditorConfig]]
    needs_subject: ClassVar[bool] = False
    # Whether the method also holds where an encoder reads the prompt, and so has the keys, and a decoder writes the
    # answer (`errata.model.encoder_decoder`).
    edits_encoders: ClassVar[bool] = False
    # Whether a batch is written in one go. Other methods get their edits one by one, whatever the batch size.
    writes_jointly: ClassVar[bool] = False

    def __init__(
        self, model: EditableModel, config: C | None = None, *, adapter: Adapter | None = None, **overrides: Any
    ) -> None:
        if config is not None and overrides:
            raise ConfigError("give either a configuration or single settings, not both")
        reason = self.unsuitable(model)
        if reason is not None:
            raise ConfigError(f"{self.name} cannot edit {model.model_id}: {reason}")
        if adapter is None:
            loaded = config or self.Config.for_model(model, **overrides)
        else:
            if adapter.editor != self.name:
                raise ConfigError(f"this adapter was written by {adapter.editor!r}; {self.name!r} cannot go on with it")
            if adapter.is_attached and adapter.model is not model:
                raise ConfigError(
                    f"this adapter is attached to another model ({adapter.model.model_id}); detach it first, or go on "
                    "with it there"
                )
            loaded = self.Config.going_on(adapter.editor_config, config, overrides)
        self.model = model
        self.config: C = loaded  # type: ignore[assignment]
        self._prepared = False
        self._guard: Guard | None = None
        self.adapter = self._new_adapter() if adapter is None else adapter
        if not self.adapter.is_attached:
            self.adapter.attach(model)
        self.adapter.editor_config = loaded.to_record()

    @classmethod
    def unsuitable(cls, model: EditableModel) -> str | None:
        """Why this method cannot edit a model, in words, or None when it can."""
        if model.is_encoder_decoder and not cls.edits_encoders:
            return (
                f"it takes prompt and answer to be read in one row, and {type(model.model).__name__} reads the prompt "
                "with an encoder and writes the answer with a decoder; use a method that edits encoders, such as memoir"
            )
        for path in model.anatomy.mlp_output:
            weight = getattr(model.module(path), "weight", None)
            # One byte holds an integer or an eighth-precision float; either way its scale is kept elsewhere.
            if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() == 1:
                return f"{path} is quantised; load the model in a floating-point dtype"
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

    def _memory_to_prepare(self) -> list[MemoryPart]:
        """What `_prepare` takes, and what is held from then on however many edits there are."""
        return []

    def _memory_to_write(self, edits: Sequence[Edit]) -> list[MemoryPart]:
        """What writing takes, and what these edits leave behind. Here: training through all blocks."""
        return [self._backward_pass(edits, self.model.layer_count)]

    def _backward_pass(self, edits: Sequence[Edit], blocks: int) -> MemoryPart:
        """Of a batch, each edit with the texts that the settings put in front of its prompt."""
        longest = max(edits, key=lambda edit: len(edit.prompt) + len(edit.target))
        contexts = getattr(self.config, "contexts", 0)
        length = len(self.model.passage(longest.prompt, longest.target).ids) + (_CONTEXT_TOKENS if contexts else 0)
        together = min(len(edits), self.config.batch_size) if self.writes_jointly else 1
        remedy = "give shorter edits" if together == 1 else "give a smaller batch_size"
        return backward_pass(self.model, together * (1 + contexts), length, blocks, remedy)

    def _memory_of_changes(self, count: int, rank: int = 1) -> list[MemoryPart]:
        """What an adapter that changes weights holds of so many changes of a rank, and the sum that acts."""
        paths = list(self.adapter.contributions())
        sides = sum(sum(weight_of(self.model.module(path)).shape) for path in paths)
        entries = weight_entries(self.model, paths)
        fewer = "change fewer layers"
        return [
            MemoryPart("the changes of these edits", 4 * rank * count * sides, "write fewer edits", on_host=True),
            MemoryPart("the edited weights", entries * (4 + self.model.dtype.itemsize), fewer),
        ]

    @abc.abstractmethod
    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        """Write a batch into the adapter, all of it or nothing. A batch of one unless `writes_jointly`.

        Raises:
            EditError, SpanError, NumericsError: the batch is refused; the adapter is as it was.
        """

    # --- what users call --------------------------------------------------------------------------------------------

    def memory_needed(self, edits: Sequence[Edit]) -> MemoryNeeded:
        """What these edits will take beside the loaded model: preparation, if that is still to come, and writing."""
        parts = [] if self._prepared else self._memory_to_prepare()
        return MemoryNeeded((*parts, *(self._memory_to_write(edits) if edits else ())), self.model.device)

    def prepare(self, progress: Progress = NO_PROGRESS, *, force: bool = False) -> float:
        """Compute what is needed once per base model (statistics, thresholds); returns the seconds it took.

        Cached and resumable where it is long; called by `edit()` when it has not been called before.

        Args:
            force: begin although it does not seem to fit in memory.

        Raises:
            ConfigError: it cannot fit in the memory that is free.
        """
        if self._prepared:
            return 0.0
        began = time.perf_counter()
        if not force:
            self.memory_needed(()).check()
        self._prepare(progress)
        if self.config.guard != "off" and self.adapter.changes_weights:
            self._guard = Guard(self.model, self.adapter, self.config.guard)
        self._prepared = True
        return time.perf_counter() - began

    def edit(self, edits: Sequence[Edit], progress: Progress = NO_PROGRESS, *, force: bool = False) -> EditOutcome:
        """Write edits into the adapter, in order; can be called again and again.

        An edit that cannot be written is refused with its reason and the others go on. Of two edits with the same
        prompt the later one supersedes the earlier, and the outcome says so; the same edit given twice is one.

        Args:
            force: keep what the guard calls a collapse all the same, and begin what does not seem to fit in memory.

        Raises:
            ConfigError: the adapter is not attached to this editor's model, so that edits would be trained against
                other weights than they will act on; or the edits cannot fit in the memory that is free.
        """
        if not self.adapter.is_attached or self.adapter.model is not self.model:
            where = "attached to another model" if self.adapter.is_attached else "detached"
            raise ConfigError(
                f"the editor's adapter is {where}; call adapter.attach(model) with the model of the editor"
            )
        if not force:
            self.memory_needed(edits).check()
        outcome = EditOutcome(prepare_seconds=self.prepare(progress, force=force))
        began = time.perf_counter()
        held: dict[str, list[Edit]] = {}
        for edit in self.adapter.edits():
            held.setdefault(_question(edit), []).append(edit)
        names = {edit.id: question for question, found in held.items() for edit in found}
        progress.start(f"{self.name}: editing", len(edits))
        usable = [edit for edit in edits if self._accepts(edit, names, outcome)]
        progress.advance(len(edits) - len(usable))
        size = self.config.batch_size if self.writes_jointly else 1
        for start in range(0, len(usable), size):
            batch = usable[start : start + size]
            self._write_batch(batch, held, outcome, progress, force)
            progress.advance(len(batch), note=f"{sum(e.took for e in outcome.applied)} took")
        outcome.seconds = time.perf_counter() - began
        outcome.changes = self.adapter.layer_changes(self.model)
        outcome.memory_version = self.adapter.memory_version
        return outcome

    def revert_exactly(self, edit_ids: Sequence[str], progress: Progress = NO_PROGRESS) -> list[RevertResult]:
        """Take edits out as if they had never been made: the others are written anew, in their order.

        `adapter.revert` subtracts instead, at once, and says where that is only approximate. Batches are filled anew,
        and what an edit superseded does not come back. `self.adapter` is another object afterwards.

        Raises:
            EditError: the adapter does not hold one of them, or another edit cannot be written any more; nothing
                changed.
        """
        old, name, gone = self.adapter, self.adapter.name, set(edit_ids)
        others = [edit for edit in old.edits() if edit.id not in gone]
        for edit_id in edit_ids:
            if not old.holds(edit_id):
                raise EditError(f"this adapter holds no edit {edit_id!r}; it holds {len(old.edits())}: see edits()")
        old.detach()
        try:
            self.adapter, self._prepared = self._new_adapter(), False
            self.adapter.attach(self.model, name)
            self.adapter.editor_config = self.config.to_record()
            for refused in self.edit(others, progress).refused:
                raise EditError(f"edit {refused.edit_id!r} cannot be written without these: {refused.reason}")
        except BaseException:
            self.adapter.detach()
            self.adapter, self._prepared = old, False
            old.attach(self.model, name)
            raise
        self.adapter.memory_version += old.memory_version + 1
        reason = f"the other {len(others)} edits were written anew"
        return [RevertResult(edit_id, "exact", reason) for edit_id in edit_ids]

    def _accepts(self, edit: Edit, names: dict[str, str], outcome: EditOutcome) -> bool:
        """Whether an edit can be tried; `names` says which prompt each id known so far belongs to."""
        try:
            if names.setdefault(edit.id, _question(edit)) != _question(edit):
                raise EditError(f"the id {edit.id!r} belongs to an edit of another prompt; give each an id of its own")
            if self.needs_subject and edit.subject is None:
                raise SpanError(
                    f"{self.name} needs to know the subject; add the field 'subject', spelled as in the prompt"
                )
            if self.needs_subject and edit.subject is not None:
                find_subject(edit.prompt, edit.subject)
        except (EditError, SpanError) as error:
            outcome.refused.append(RefusedEdit(edit.id, str(error)))
            return False
        return True

    def _write_batch(
        self,
        batch: Sequence[Edit],
        held: dict[str, list[Edit]],
        outcome: EditOutcome,
        progress: Progress,
        force: bool,
    ) -> None:
        edits, overtaken = _without_overtaken(batch)
        passages = [self.model.passage(edit.prompt, edit.target) for edit in edits]
        before = forced_answers(self.model, passages)
        if self._guard is not None:
            self._guard.begin()
        try:
            written = self._write(edits, progress)
        except (EditError, SpanError, NumericsError) as error:
            outcome.refused += [RefusedEdit(edit.id, str(error)) for edit in batch]
            return
        if self._guard is not None:
            record = self._guard.examine(edits, written.condition, force=force)
            outcome.guard.append(record)
            if not record.kept:
                reason = f"the model would collapse, and nothing was changed: {'; '.join(record.reasons)}. {_INSTEAD}"
                outcome.refused += [RefusedEdit(edit.id, reason) for edit in batch]
                return
        outcome.superseded += overtaken
        for edit, displaced in zip(edits, written.displaced or (None,) * len(edits), strict=True):
            self._enter(edit, displaced, held, outcome)
        after = forced_answers(self.model, passages)
        for edit, passage, old_answer, new_answer, steps in zip(
            edits, passages, before, after, written.steps, strict=True
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

    def _enter(self, edit: Edit, displaced: str | None, held: dict[str, list[Edit]], outcome: EditOutcome) -> None:
        """Enter a written edit in the adapter's list, in place of what it holds for the same prompt."""
        question = _question(edit)
        older = [old for old in held.get(question, ()) if self.adapter.holds(old.id)]
        ids = [old.id for old in older if (old.id, old.target) != (edit.id, edit.target)]
        if displaced is not None and displaced not in ids and self.adapter.holds(displaced):
            ids.append(displaced)
        for old_id in ids:
            self.adapter.supersede(old_id, edit.id)
            outcome.superseded.append((old_id, edit.id))
        self.adapter.remember(edit)
        held[question] = [edit]


def _question(edit: Edit) -> str:
    """The prompt, white space aside: what two edits have in common of which only one can be in force."""
    return " ".join(edit.prompt.split())


def _without_overtaken(batch: Sequence[Edit]) -> tuple[list[Edit], list[tuple[str, str]]]:
    """The edits of a batch of which no later one has the same prompt, and who overtook the others: (old id, new id)."""
    latest: dict[str, Edit] = {}
    overtaken = []
    for edit in batch:
        old = latest.pop(_question(edit), None)
        if old is not None and (old.id, old.target) != (edit.id, edit.target):
            overtaken.append((old.id, edit.id))
        latest[_question(edit)] = edit
    return list(latest.values()), overtaken
