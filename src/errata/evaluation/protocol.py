"""How edits are measured: what is asked, of which model, and when.

`Examination` asks. What the unedited model answers is asked once and kept; every later question is compared with
that. `run_sequence` applies edits one after another without ever resetting, and at each checkpoint asks about **all**
edits made so far (*final*), beside what was true right after each was made (*immediate*).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from errata.adapters import Adapter
from errata.edit import Edit, Probe
from errata.editors import Editor, EditOutcome
from errata.evaluation.metrics import Score, answers_exactly, bootstrap_mean, contains, same_text, token_accuracy
from errata.model import EditableModel, Passage
from errata.model.scoring import forced_answers
from errata.progress import NO_PROGRESS, Progress

__all__ = ["PROTOCOL", "AskedEdit", "Checkpoint", "Examination", "Result", "run_sequence"]

PROTOCOL = "errata-1"


@dataclass(frozen=True)
class AskedEdit:
    """Everything one edit was asked for, as means over its own prompts; NaN-free lists, empty where nothing was asked.

    Each list holds one (generated exact, generated contains, teacher-forced) triple per prompt.
    """

    edit: Edit
    reliability: list[tuple[float, float, float]]
    generalization: list[tuple[float, float, float]]
    locality: list[tuple[float, float, float]]
    portability: list[tuple[float, float, float]]
    said: dict[str, str]


def _mean(triples: Sequence[tuple[float, float, float]], part: int) -> float:
    return sum(triple[part] for triple in triples) / len(triples)


@dataclass
class Result:
    """Scores over a set of edits, with what each single edit said."""

    asked: list[AskedEdit]
    protocol: str = PROTOCOL

    def score(self, name: str) -> Score:
        """`name` is reliability, generalization, locality or portability."""
        per_edit = [triples for asked in self.asked if (triples := getattr(asked, name))]
        return Score.of(*([_mean(triples, part) for triples in per_edit] for part in range(3)))

    @property
    def reliability(self) -> Score:
        return self.score("reliability")

    @property
    def generalization(self) -> Score:
        return self.score("generalization")

    @property
    def locality(self) -> Score:
        return self.score("locality")

    @property
    def portability(self) -> Score:
        return self.score("portability")

    def by_kind(self, name: str) -> dict[str, Score]:
        """Locality or portability per kind of probe, for probes that state one."""
        kinds: dict[str, list[tuple[float, float, float]]] = {}
        for asked in self.asked:
            for probe, triple in zip(getattr(asked.edit, name), getattr(asked, name), strict=True):
                if probe.kind:
                    kinds.setdefault(probe.kind, []).append(triple)
        return {
            kind: Score.of(*([t[part] for t in triples] for part in range(3)))
            for kind, triples in sorted(kinds.items())
        }

    def to_record(self) -> dict[str, Any]:
        record: dict[str, Any] = {"edits": len(self.asked), "protocol": self.protocol}
        for name in ("reliability", "generalization", "locality", "portability"):
            record[name] = self.score(name).to_record()
        record["locality_by_kind"] = {kind: score.to_record() for kind, score in self.by_kind("locality").items()}
        return record


@dataclass
class Examination:
    """Asks a model about edits, in batches, and compares with what the unedited model said.

    Args:
        model: the model, in whatever state it is asked.
        edits: all edits that will ever be asked about.
        max_new_tokens: the same for every question, whatever its answer: no length leaks.
        batch_tokens: padded tokens per batch.
    """

    model: EditableModel
    edits: Sequence[Edit]
    max_new_tokens: int = 20
    batch_tokens: int = 16384
    _said_before: dict[str, str] = field(default_factory=dict)
    _forced_before: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)

    def ask_base(self, adapter: Adapter | None = None, progress: Progress = NO_PROGRESS) -> None:
        """Ask the unedited model everything locality will be compared with; the adapter is detached meanwhile."""
        if self._said_before:
            return
        if adapter is not None and adapter.is_attached:
            with adapter.detached():
                self.ask_base(None, progress)
            return
        prompts = sorted(
            {probe.prompt for edit in self.edits for probe in edit.locality} | {e.prompt for e in self.edits}
        )
        progress.start("asking the unedited model", len(prompts))
        said = self._generate(prompts, progress)
        self._said_before = said
        pairs = sorted({self._locality_pair(probe) for edit in self.edits for probe in edit.locality})
        self._forced_before = self._forced(pairs)

    def share_base(self, other: Examination) -> None:
        """Take over what the unedited model said from an examination that asked the same prompts."""
        self._said_before, self._forced_before = other._said_before, other._forced_before

    def base_answer(self, prompt: str) -> str:
        """What the unedited model said to an edit's prompt or a locality prompt."""
        return self._said_before[prompt]

    def _locality_pair(self, probe: Probe) -> tuple[str, str]:
        """The answer behind which locality is teacher-forced: the given one, else what the base said."""
        return probe.prompt, probe.answer or self._said_before.get(probe.prompt, "").strip() or "."

    def _generate(self, prompts: Sequence[str], progress: Progress = NO_PROGRESS) -> dict[str, str]:
        said: dict[str, str] = {}
        size = 2048
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            answers = self.model.generate(part, max_new_tokens=self.max_new_tokens, batch_tokens=self.batch_tokens)
            said.update(zip(part, answers, strict=True))
            progress.advance(len(part))
        return said

    def _passages(self, pairs: Sequence[tuple[str, str]]) -> list[Passage]:
        return [self.model.passage(prompt, answer) for prompt, answer in pairs]

    def _forced(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[int, ...]]:
        answers = forced_answers(self.model, self._passages(pairs), batch_tokens=self.batch_tokens)
        return {pair: answer.predicted for pair, answer in zip(pairs, answers, strict=True)}

    def ask(self, edits: Sequence[Edit] | None = None, progress: Progress = NO_PROGRESS) -> Result:
        """Measure the model as it is now. `ask_base` must have been called on the unedited model."""
        edits = list(self.edits if edits is None else edits)
        wanted: dict[str, list[tuple[str, str]]] = {}
        for edit in edits:
            answers = [(edit.prompt, edit.target), *((text, edit.target) for text in edit.rephrases)]
            answers += [(probe.prompt, probe.answer or "") for probe in edit.portability]
            wanted[edit.id] = answers
        prompts = {prompt for pairs in wanted.values() for prompt, _ in pairs}
        prompts |= {probe.prompt for edit in edits for probe in edit.locality}
        progress.start("asking the edited model", len(prompts))
        said = self._generate(sorted(prompts), progress)
        pairs = {pair for answers in wanted.values() for pair in answers}
        pairs |= {self._locality_pair(probe) for edit in edits for probe in edit.locality}
        forced = self._forced(sorted(pairs))
        tokens = {
            pair: passage.answer for pair, passage in zip(sorted(pairs), self._passages(sorted(pairs)), strict=True)
        }

        def right(prompt: str, answer: str) -> tuple[float, float, float]:
            text = said[prompt]
            share = token_accuracy(forced[prompt, answer], tokens[prompt, answer])
            return float(answers_exactly(text, answer)), float(contains(text, answer)), share

        def unchanged(probe: Probe) -> tuple[float, float, float]:
            pair = self._locality_pair(probe)
            before, now = self._said_before[probe.prompt], said[probe.prompt]
            same = float(same_text(before, now))
            return same, same, token_accuracy(forced[pair], self._forced_before[pair])

        def asked(edit: Edit) -> AskedEdit:
            probes = (*edit.locality, *edit.portability)
            return AskedEdit(
                edit,
                [right(edit.prompt, edit.target)],
                [right(text, edit.target) for text in edit.rephrases],
                [unchanged(probe) for probe in edit.locality],
                [right(probe.prompt, probe.answer or "") for probe in edit.portability],
                {prompt: said[prompt] for prompt in (edit.prompt, *edit.rephrases, *(p.prompt for p in probes))},
            )

        return Result([asked(edit) for edit in edits])


@dataclass
class Checkpoint:
    """The state of a sequential run after some number of edits.

    Attributes:
        edits: how many were made; result: all of them asked now (*final*).
        immediate: share of them whose own prompt was answered with the target right after they were made, generated.
        retention: per age (edits made since, by powers of two), the share that still answers, generated.
        forgetting: mean over edits of the best earlier success minus the success now.
        perplexity: on held-out text, NaN if none was given; seconds: spent editing so far.
    """

    edits: int
    result: Result
    immediate: float
    retention: dict[int, float]
    forgetting: float
    perplexity: float
    seconds: float
    prepare_seconds: float
    applied: int
    refused: int

    @property
    def seconds_per_edit(self) -> float:
        return self.seconds / max(1, self.applied)

    def to_record(self) -> dict[str, Any]:
        return {
            **self.result.to_record(),
            "edits": self.edits,
            "immediate": self.immediate,
            "retention": {str(age): share for age, share in self.retention.items()},
            "forgetting": self.forgetting,
            "perplexity": None if math.isnan(self.perplexity) else self.perplexity,
            "seconds_per_edit": self.seconds_per_edit,
            "prepare_seconds": self.prepare_seconds,
            "edits_applied": self.applied,
            "edits_refused": self.refused,
        }


def retention_by_age(success: Sequence[float]) -> dict[int, float]:
    """Success of edits grouped by age, the newest first: ages 0, 1, 2-3, 4-7, ... keyed by the youngest of a group."""
    newest_first = list(reversed(success))
    groups: dict[int, float] = {}
    start = 0
    while start < len(newest_first):
        stop = max(start + 1, 2 * start)
        group = newest_first[start:stop]
        groups[start] = sum(group) / len(group)
        start = stop
    return groups


@dataclass
class _Progressed:
    """What a sequential run carries from checkpoint to checkpoint; kept with saved rows so a run can go on."""

    done: int = 0
    seconds: float = 0.0
    prepare_seconds: float = 0.0
    immediate: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    applied: int = 0
    refused: int = 0

    def to_record(self) -> dict[str, Any]:
        return dict(vars(self))


def run_sequence(
    editor: Editor[Any],
    examination: Examination,
    checkpoints: Sequence[int],
    *,
    texts: Sequence[str] = (),
    resume: dict[str, Any] | None = None,
    after_edit: Callable[[int, EditOutcome], None] | None = None,
    progress: Progress = NO_PROGRESS,
) -> Iterator[tuple[Checkpoint, dict[str, Any]]]:
    """Apply the examination's edits in their order and stop at each checkpoint to ask about all of them so far.

    Args:
        editor: its adapter is attached and, for a resumed run, holds the edits made before.
        checkpoints: numbers of edits, ascending.
        texts: held-out text for perplexity.
        resume: the state yielded with the last finished checkpoint.
        after_edit: called with the number of edits made and the outcome of the last batch.

    Yields:
        Each checkpoint with a JSON state from which the run can go on.
    """
    state = _Progressed(**(resume or {}))
    edits = list(examination.edits)
    examination.ask_base(editor.adapter)
    for goal in (g for g in checkpoints if g > state.done):
        goal = min(goal, len(edits))
        if goal <= state.done:
            break
        progress.start(f"{editor.name}: editing", goal, state.done)
        while state.done < goal:
            batch = edits[state.done : min(goal, state.done + editor.config.batch_size)]
            outcome = editor.edit(batch)
            state.seconds += outcome.seconds
            state.prepare_seconds += outcome.prepare_seconds
            state.applied += len(outcome.applied)
            state.refused += len(outcome.refused)
            said = editor.model.generate([edit.prompt for edit in batch], max_new_tokens=examination.max_new_tokens)
            state.immediate += [float(answers_exactly(text, e.target)) for text, e in zip(said, batch, strict=True)]
            state.done += len(batch)
            progress.advance(len(batch), note=f"{sum(state.immediate):.0f} right at once")
            if after_edit is not None:
                after_edit(state.done, outcome)
        result = examination.ask(edits[:goal])
        success = [asked.reliability[0][0] for asked in result.asked]
        best = [max(pair) for pair in zip(state.best + state.immediate[len(state.best) : goal], success, strict=True)]
        forgetting = sum(b - s for b, s in zip(best, success, strict=True)) / goal
        state.best = best
        yield (
            Checkpoint(
                edits=goal,
                result=result,
                immediate=sum(state.immediate[:goal]) / goal,
                retention=retention_by_age(success),
                forgetting=forgetting,
                perplexity=editor.model.perplexity(texts) if texts else math.nan,
                seconds=state.seconds,
                prepare_seconds=state.prepare_seconds,
                applied=state.applied,
                refused=state.refused,
            ),
            state.to_record(),
        )


def accuracy(model: EditableModel, pairs: Sequence[tuple[str, str]], *, max_new_tokens: int = 20) -> float:
    """Share of prompts whose generated answer is exactly the one given."""
    said = model.generate([prompt for prompt, _ in pairs], max_new_tokens=max_new_tokens)
    hits = [float(answers_exactly(text, answer)) for text, (_, answer) in zip(said, pairs, strict=True)]
    return bootstrap_mean(hits).value
