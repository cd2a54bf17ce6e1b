"""How edits are measured: what is asked, of which model, and when.

`Examination` asks. What the unedited model answers is asked once and kept; every later question is compared with
that. `run_sequence` applies edits one after another without ever resetting, and at each checkpoint asks about **all**
edits made so far (*final*), beside what was true right after each was made (*immediate*).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from errata.adapters import Adapter
from errata.datasets.mquake import chain
from errata.edit import Edit, Probe
from errata.editors import Editor, EditOutcome
from errata.errors import ConfigError
from errata.evaluation.lifelong import forgetting, retention_by_age
from errata.evaluation.metrics import (
    Score,
    answers_exactly,
    best_answer,
    contains,
    finite_or_none,
    same_text,
    token_accuracy,
    token_f1,
)
from errata.model import EditableModel
from errata.model.generation import Written, write
from errata.model.scoring import forced_answers
from errata.progress import NO_PROGRESS, Progress

__all__ = ["PROTOCOL", "AskedEdit", "Checkpoint", "Examination", "Result", "Singles", "run_sequence", "run_singles"]

PROTOCOL = "errata-1"

# What one prompt earned: generated exact, generated contains, teacher-forced, F1 of what was generated.
Marks = tuple[float, float, float, float]


@dataclass(frozen=True)
class AskedEdit:
    """Everything one edit was asked: per property the marks of each of its prompts, empty where nothing was asked.

    `hops` are the marks of all single hops of the chain that a multi-hop case asks about at its last edit (MQuAKE),
    edited or not, each against its own answer; empty where the edit carries none, or not all of them were asked.
    """

    edit: Edit
    reliability: list[Marks]
    generalization: list[Marks]
    locality: list[Marks]
    portability: list[Marks]
    said: dict[str, str]
    hops: list[Marks] = field(default_factory=list)

    def to_record(self) -> dict[str, Any]:
        """JSON: per property one [exact, contains, teacher-forced, F1] for each prompt, and all that was said."""
        scores = {name: getattr(self, name) for name in ("reliability", "generalization", "locality", "portability")}
        return {"id": self.edit.id, **scores, "said": self.said}


def _mean(marks: Sequence[Marks], part: int) -> float:
    return sum(mark[part] for mark in marks) / len(marks)


def _worst(marks: Sequence[Marks]) -> Marks:
    exact, contained, forced, f1 = (min(mark[part] for mark in marks) for part in range(4))
    return exact, contained, forced, f1


def _score(per_edit: Sequence[Sequence[Marks]]) -> Score:
    """Over edits of which each was asked something."""
    return Score.of(*([_mean(marks, part) for marks in per_edit] for part in range(4)))


@dataclass
class Result:
    """Scores over a set of edits, with what each single edit said."""

    asked: list[AskedEdit]
    protocol: str = PROTOCOL

    def score(self, name: str) -> Score:
        """`name` is reliability, generalization, locality or portability."""
        return _score([marks for asked in self.asked if (marks := getattr(asked, name))])

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
        """Locality or portability per kind of probe, for probes that state one, over the edits that have such."""
        kinds: dict[str, list[list[Marks]]] = {}
        for asked in self.asked:
            own: dict[str, list[Marks]] = {}
            for probe, mark in zip(getattr(asked.edit, name), getattr(asked, name), strict=True):
                if probe.kind:
                    own.setdefault(probe.kind, []).append(mark)
            for kind, marks in own.items():
                kinds.setdefault(kind, []).append(marks)
        return {kind: _score(per_edit) for kind, per_edit in sorted(kinds.items())}

    def any_of(self, name: str) -> dict[str, Score]:
        """Per kind, groups of probes (the wordings of one question), each as good as the best of its probes.

        MQuAKE's accuracy (2305.14795) counts a case when any of three wordings is answered; the mean over the wordings,
        which is stricter, is in `by_kind`. Probes without a group, or alone in theirs, do not count.
        """
        kinds: dict[str, list[list[Marks]]] = {}
        for asked in self.asked:
            groups: dict[tuple[str, str], list[Marks]] = {}
            for probe, mark in zip(getattr(asked.edit, name), getattr(asked, name), strict=True):
                if probe.group:
                    groups.setdefault((probe.kind or "", probe.group), []).append(mark)
            own: dict[str, list[Marks]] = {}
            for (kind, _), marks in groups.items():
                if len(marks) > 1:
                    exact, contained, forced, f1 = (max(mark[part] for mark in marks) for part in range(4))
                    own.setdefault(kind, []).append((exact, contained, forced, f1))
            for kind, best in own.items():
                kinds.setdefault(kind, []).append(best)
        return {kind: _score(per_edit) for kind, per_edit in sorted(kinds.items())}

    def cases(self) -> dict[str, Score]:
        """Over multi-hop cases of several edits (MQuAKE), each as good as the worst of what it consists of.

        `hop_wise` is about every single hop of the case's new chain, edited or not; `instance_wise` about the prompts
        of all its edits. A case that does not carry its chain does not count, nor one of which an edit or a hop was not
        asked. Nothing is left where none counts.
        """
        members: dict[str, list[AskedEdit]] = {}
        hop_wise, instance_wise = [], []
        for asked in self.asked:
            case = asked.edit.extra.get("case_id")
            if case is not None:
                members.setdefault(str(case), []).append(asked)
            hops = chain(asked.edit)
            if not hops:
                continue
            if asked.hops:
                hop_wise.append([_worst(asked.hops)])
            stays = sum(probe.kind == "single_hop" for probe in asked.edit.locality)
            own = members.pop(str(case), [])
            if own and len(own) == len(hops) - stays:
                instance_wise.append([_worst([edit.reliability[0] for edit in own])])
        found = {"hop_wise": hop_wise, "instance_wise": instance_wise}
        return {name: _score(per_case) for name, per_case in found.items() if per_case}

    def to_record(self) -> dict[str, Any]:
        record: dict[str, Any] = {"edits": len(self.asked), "protocol": self.protocol}
        for name in ("reliability", "generalization", "locality", "portability"):
            record[name] = self.score(name).to_record()
        for name in ("locality", "portability"):
            record[f"{name}_by_kind"] = {kind: score.to_record() for kind, score in self.by_kind(name).items()}
        record["portability_any_of"] = {kind: score.to_record() for kind, score in self.any_of("portability").items()}
        record["cases"] = {name: score.to_record() for name, score in self.cases().items()}
        return record


@dataclass
class Examination:
    """Asks a model about edits, in batches, and compares with what the unedited model said.

    Args:
        model: the model, in whatever state it is asked.
        edits: all edits that will ever be asked about.
        max_new_tokens: the same for every question, whatever its answer: no length leaks.
        batch_tokens: padded tokens per batch. More is no faster on a CPU: the longest answer holds a batch up.
    """

    model: EditableModel
    edits: Sequence[Edit]
    max_new_tokens: int = 32
    batch_tokens: int = 4096
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
        written = self._generate(prompts, progress)
        self._said_before = _texts(written)
        pairs = sorted({self._locality_pair(probe) for edit in self.edits for probe in edit.locality})
        self._forced_before = self._forced(pairs, written)

    def ask_unedited(self, progress: Progress = NO_PROGRESS) -> Result:
        """Measure the unedited model, which must be free of adapters, and keep its answers as `ask_base` does.

        Asks everything once, where `ask_base` and then `ask` would ask most of it twice; and nothing where all of it is
        known already, from another examination of the same edits (`share_base`).
        """
        prompts = self._prompts(self.edits)
        if set(prompts) <= self._said_before.keys() and set(self._pairs(self.edits)) <= self._forced_before.keys():
            return self._result(self.edits, self._said_before, self._forced_before)
        progress.start("asking the unedited model", len(prompts))
        written = self._generate(prompts, progress)
        self._said_before = _texts(written)
        self._forced_before = self._forced(self._pairs(self.edits), written)
        return self._result(self.edits, self._said_before, self._forced_before)

    def share_base(self, other: Examination) -> None:
        """Take over what the unedited model said from an examination that asked the same prompts."""
        self._said_before, self._forced_before = other._said_before, other._forced_before

    def base_answer(self, prompt: str) -> str:
        """What the unedited model said to an edit's prompt or a locality prompt."""
        return self._said_before[prompt]

    def _locality_pair(self, probe: Probe) -> tuple[str, str]:
        """The answer behind which locality is teacher-forced: the given one, else what the base said."""
        return probe.prompt, probe.answer or self._said_before.get(probe.prompt, "").strip() or "."

    def _generate(self, prompts: Sequence[str], progress: Progress = NO_PROGRESS) -> dict[str, Written]:
        found: dict[str, Written] = {}
        size = 2048
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            answers = write(self.model, part, max_new_tokens=self.max_new_tokens, batch_tokens=self.batch_tokens)
            found.update(zip(part, answers, strict=True))
            progress.advance(len(part))
        return found

    def _forced(
        self, pairs: Sequence[tuple[str, str]], written: Mapping[str, Written]
    ) -> dict[tuple[str, str], tuple[int, ...]]:
        """Predictions at the places of answers; what the model has just written by itself is not asked again."""
        passages = {pair: self.model.passage(*pair) for pair in pairs}
        found = {pair: written[pair[0]].predictions(passages[pair].answer) for pair in pairs}
        missing = [pair for pair, known in found.items() if known is None]
        answers = forced_answers(self.model, [passages[pair] for pair in missing], batch_tokens=self.batch_tokens)
        asked = {pair: answer.predicted for pair, answer in zip(missing, answers, strict=True)}
        return {pair: asked[pair] if known is None else known for pair, known in found.items()}

    def ask(self, edits: Sequence[Edit] | None = None, progress: Progress = NO_PROGRESS) -> Result:
        """Measure the model as it is now. `ask_base` must have been called on the unedited model."""
        edits = self.edits if edits is None else edits
        prompts = self._prompts(edits)
        progress.start("asking the edited model", len(prompts))
        written = self._generate(prompts, progress)
        return self._result(edits, _texts(written), self._forced(self._pairs(edits), written))

    def ask_targets(self, edits: Sequence[Edit]) -> list[tuple[Marks, list[Marks]]]:
        """Per edit, reliability and generalization alone: what is asked right after it was made."""
        written = self._generate(sorted({prompt for edit in edits for prompt, _ in _targets(edit)}))
        forced = self._forced(sorted({pair for edit in edits for pair in _targets(edit)}), written)
        said = _texts(written)
        found = []
        for edit in edits:
            first, *others = (
                self._right(prompt, answer, edit.aliases, said, forced) for prompt, answer in _targets(edit)
            )
            found.append((first, others))
        return found

    def _prompts(self, edits: Sequence[Edit]) -> list[str]:
        """Every prompt that is asked about these edits, once."""
        probes = {probe.prompt for edit in edits for probe in (*edit.locality, *edit.portability)}
        return sorted(probes | {prompt for edit in edits for prompt, _ in _targets(edit)})

    def _pairs(self, edits: Sequence[Edit]) -> list[tuple[str, str]]:
        """Every prompt with an answer that is teacher-forced behind it, once."""
        pairs = {pair for edit in edits for pair in _targets(edit)}
        pairs |= {(probe.prompt, probe.answer or "") for edit in edits for probe in edit.portability}
        pairs |= {self._locality_pair(probe) for edit in edits for probe in edit.locality}
        return sorted(pairs)

    def _right(
        self,
        prompt: str,
        answer: str,
        aliases: Sequence[str],
        said: Mapping[str, str],
        forced: Mapping[tuple[str, str], tuple[int, ...]],
    ) -> Marks:
        """What is written may name the answer in any of its names; forced is its first name alone."""
        text, names = said[prompt], (answer, *aliases)
        share = token_accuracy(forced[prompt, answer], self.model.passage(prompt, answer).answer)
        exact, contained, f1 = (best_answer(way, text, names) for way in (answers_exactly, contains, token_f1))
        return exact, contained, share, f1

    def _result(
        self,
        edits: Sequence[Edit],
        said: Mapping[str, str],
        forced: Mapping[tuple[str, str], tuple[int, ...]],
    ) -> Result:
        def right(prompt: str, answer: str, aliases: Sequence[str]) -> Marks:
            return self._right(prompt, answer, aliases, said, forced)

        def unchanged(probe: Probe) -> Marks:
            pair = self._locality_pair(probe)
            before, now = self._said_before[probe.prompt], said[probe.prompt]
            same = float(same_text(before, now))
            return same, same, token_accuracy(forced[pair], self._forced_before[pair]), token_f1(now, before)

        def asked(edit: Edit) -> AskedEdit:
            probes = (*edit.locality, *edit.portability)
            hops = chain(edit)
            # An edited hop is asked as a rephrase of its edit, another one for locality; nothing is asked for this.
            all_asked = all((hop.prompt, hop.answer) in forced and hop.prompt in said for hop in hops)
            return AskedEdit(
                edit,
                [right(edit.prompt, edit.target, edit.aliases)],
                [right(text, edit.target, edit.aliases) for text in edit.rephrases],
                [unchanged(probe) for probe in edit.locality],
                [right(probe.prompt, probe.answer or "", probe.aliases) for probe in edit.portability],
                {prompt: said[prompt] for prompt in (edit.prompt, *edit.rephrases, *(p.prompt for p in probes))},
                [right(hop.prompt, hop.answer or "", hop.aliases) for hop in hops] if all_asked else [],
            )

        return Result([asked(edit) for edit in edits])


def _texts(found: Mapping[str, Written]) -> dict[str, str]:
    return {prompt: one.text for prompt, one in found.items()}


def _targets(edit: Edit) -> list[tuple[str, str]]:
    """The edited prompt and its other wordings, each with the target."""
    return [(edit.prompt, edit.target), *((text, edit.target) for text in edit.rephrases)]


@dataclass
class Checkpoint:
    """The state of a sequential run after some number of edits.

    Attributes:
        edits: how many were made; result: all of them asked now (*final*).
        immediate: reliability and generalization right after each edit was made, each {generated, teacher_forced}.
        retention: per age (edits made since, by powers of two), the share that still answers, generated.
        forgetting: mean over edits of the best earlier success minus the success now.
        perplexity: on held-out text, NaN if none was given; seconds: spent editing so far.
        batch_size: edits written together; a checkpoint ends a batch early.
        guard: after how many edits the guard gave each of its verdicts first; empty where nothing is guarded.
        guard_perplexity: on the same held-out text, right when each verdict was first given.
    """

    edits: int
    result: Result
    immediate: dict[str, dict[str, float | None]]
    retention: dict[int, float]
    forgetting: float
    perplexity: float
    seconds: float
    prepare_seconds: float
    applied: int
    refused: int
    batch_size: int = 1
    guard: dict[str, int] = field(default_factory=dict)
    guard_perplexity: dict[str, float | None] = field(default_factory=dict)

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
            "perplexity": finite_or_none(self.perplexity),
            "seconds_per_edit": self.seconds_per_edit,
            "prepare_seconds": self.prepare_seconds,
            "edits_applied": self.applied,
            "edits_refused": self.refused,
            "batch_size": self.batch_size,
            "guard": self.guard,
            "guard_perplexity": self.guard_perplexity,
        }


@dataclass
class _Progressed:
    """What a sequential run carries from checkpoint to checkpoint; kept with saved rows so a run can go on.

    `immediate` holds per edit, for reliability and generalization, the share generated and the share teacher-forced,
    or None where nothing was asked; `best` the best reliability (generated) so far.
    """

    done: int = 0
    seconds: float = 0.0
    prepare_seconds: float = 0.0
    immediate: list[dict[str, list[float] | None]] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    applied: int = 0
    refused: int = 0
    guard: dict[str, int] = field(default_factory=dict)
    guard_perplexity: dict[str, float | None] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        return dict(vars(self))

    def reliable_at_once(self) -> list[float]:
        """Per edit, whether its own prompt was answered with the target right after it was made, generated."""
        return [found[0] if (found := own["reliability"]) else 0.0 for own in self.immediate]

    def immediate_scores(self) -> dict[str, dict[str, float | None]]:
        scores: dict[str, dict[str, float | None]] = {}
        for name in ("reliability", "generalization"):
            asked = [found for own in self.immediate if (found := own[name]) is not None]
            means = [sum(found[part] for found in asked) / len(asked) if asked else None for part in range(2)]
            scores[name] = dict(zip(("generated", "teacher_forced"), means, strict=True))
        return scores


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
            for verdict in {record.verdict for record in outcome.guard} - state.guard.keys():
                state.guard[verdict] = state.done + len(batch)
                if texts:  # of the run's own text, which the guard does not know
                    state.guard_perplexity[verdict] = finite_or_none(editor.model.perplexity(texts))
            for own, others in examination.ask_targets(batch):
                general = [_mean(others, 0), _mean(others, 2)] if others else None
                state.immediate.append({"reliability": [own[0], own[2]], "generalization": general})
            state.done += len(batch)
            progress.advance(len(batch), note=f"{sum(state.reliable_at_once()):.0f} right at once")
            if after_edit is not None:
                after_edit(state.done, outcome)
        result = examination.ask(edits[:goal])
        success = [asked.reliability[0][0] for asked in result.asked]
        earlier = state.best + state.reliable_at_once()[len(state.best) :]
        best = [max(pair) for pair in zip(earlier, success, strict=True)]
        state.best = best
        yield (
            Checkpoint(
                edits=goal,
                result=result,
                immediate=state.immediate_scores(),
                retention=retention_by_age(success),
                forgetting=forgetting([best, success]),
                perplexity=editor.model.perplexity(texts) if texts else math.nan,
                seconds=state.seconds,
                prepare_seconds=state.prepare_seconds,
                applied=state.applied,
                refused=state.refused,
                batch_size=editor.config.batch_size,
                guard=dict(state.guard),
                guard_perplexity=dict(state.guard_perplexity),
            ),
            state.to_record(),
        )


@dataclass(frozen=True)
class Singles:
    """What edits do alone: each of them was written into an empty adapter, asked about, and taken out again.

    Attributes:
        result: a refused edit was asked about all the same, without having been made.
        seconds: spent editing, all together.
    """

    result: Result
    applied: int
    refused: int
    seconds: float


def run_singles(editor: Editor[Any], examination: Examination, progress: Progress = NO_PROGRESS) -> Singles:
    """Make every edit of the examination as if it were the only one, and ask about it.

    Args:
        editor: its adapter is attached and holds nothing. It goes back to that, bit for bit, after every edit.
    """
    if editor.adapter.edits():
        raise ConfigError("the adapter holds edits already; single edits are made into an empty one")
    examination.ask_base(editor.adapter)
    editor.prepare(progress)
    empty = editor.adapter.snapshot()
    asked: list[AskedEdit] = []
    applied, seconds = 0, 0.0
    progress.start(f"{editor.name}: single edits", len(examination.edits))
    for edit in examination.edits:
        outcome = editor.edit([edit])
        applied, seconds = applied + len(outcome.applied), seconds + outcome.seconds
        asked += examination.ask([edit]).asked
        empty()
        progress.advance()
    return Singles(Result(asked), applied, len(asked) - applied, seconds)
