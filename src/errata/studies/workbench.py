"""What every study stands on: its edits, sequential runs that are made once, finished rows, and the files it leaves.

A folder of a study holds `rows.jsonl` (every row that was ever finished in it, under a key of all it depends on), a
comparison for each run below `runs/`, and of the last call a page, tables and a figure. Called again after a kill, or
with more edits, a study makes only what is missing.

Knows editors and evaluation. Knows nothing of what a single study asks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.adapters import Adapter, AutoAdapter
from errata.atlas.shipped import ATLAS_NAMES
from errata.edit import Edit
from errata.editors import EditorConfig, editor_class, method_of
from errata.errors import ConfigError, unknown_name
from errata.evaluation import Comparison, Examination, finite_or_none, run_provenance
from errata.evaluation.examples import examples_of
from errata.evaluation.metrics import bootstrap_mean
from errata.evaluation.page import Grid
from errata.evaluation.rows import RowFile, digest
from errata.model import EditableModel
from errata.progress import Progress
from errata.studies.result import StudyResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from errata.studies import Study

__all__ = [
    "PROPERTIES",
    "Arm",
    "StudyOptions",
    "Workbench",
    "measured",
    "properties",
    "scores",
    "share",
]

PROPERTIES = ("reliability", "generalization", "locality")


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What a user may say about any study.

    Attributes:
        folder: where its files go.
        edits: how many edits, None for the study's own number.
        seed: which of atlas's facts are edited, and in which order.
        methods: in place of the study's own, where it compares methods.
        settings: per method, settings that differ from the default.
        data: a file of edits; needed on any model but atlas, and by the studies of one data set.
        words: texts behind prompts are cut to so many words where a study edits long texts; 0 cuts nothing.
        beside: models of another size, folders or hub ids, where a study asks what size does.
        quick: a handful of edits, to see that all of it runs.
        command: what makes the study again, to be printed on its page.
    """

    folder: Path
    edits: int | None = None
    seed: int = 0
    methods: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: Path | None = None
    words: int = 40
    beside: tuple[str, ...] = ()
    quick: bool = False
    command: str = ""


@dataclass(frozen=True)
class Arm:
    """One method under one setting, run from the first edit to the last.

    Attributes:
        label: the columns that tell its rows from those of other arms.
    """

    label: Mapping[str, Any]
    method: str
    settings: Mapping[str, Any]


def properties(record: Mapping[str, Any]) -> dict[str, Any]:
    """A `Result`'s record as a study shows it: generated unless it says forced.

    `near_locality` is locality on the same relation asked of other subjects, `average` the mean of the three
    properties as far as they were asked.
    """
    flat: dict[str, Any] = {"edits": record["edits"]}
    for name in PROPERTIES:
        flat[name] = record[name]["generated"]
        flat[f"{name}_interval"] = record[name]["generated_interval"]
        flat[f"{name}_forced"] = record[name]["teacher_forced"]
        flat[f"{name}_contains"] = record[name]["contains"]
    known = [flat[name] for name in PROPERTIES if flat[name] is not None]
    near = record["locality_by_kind"].get("same_relation")
    return {
        **flat,
        "average": sum(known) / len(known) if known else None,
        "near_locality": None if near is None else near["generated"],
    }


def scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a comparison as a study shows it: final unless it says at once."""
    return {
        **properties(row),
        "at_once": row["immediate"]["reliability"]["generated"],
        "retention": row["retention"],
        "refused": row["edits_refused"],
        "seconds_per_edit": row["seconds_per_edit"],
    }


class _Prefixed:
    """A progress that says which part of the study is on."""

    def __init__(self, progress: Progress, prefix: str) -> None:
        self._progress, self._prefix = progress, prefix

    def start(self, description: str, total: int | None = None, done: int = 0) -> None:
        self._progress.start(f"{self._prefix}: {description}", total, done)

    def advance(self, count: int = 1, note: str = "") -> None:
        self._progress.advance(count, note)


class Workbench:
    """A study's tools, for one model and one set of options.

    Attributes:
        notes: what differs from what was asked for, in words; a study adds its own.
    """

    def __init__(self, study: Study, model: EditableModel, options: StudyOptions, progress: Progress) -> None:
        self.study, self.model, self.options, self.progress = study, model, options, progress
        self.notes: list[str] = []
        self._rows = RowFile(options.folder / "rows.jsonl", {"key", "row"})
        self._finished: dict[str, dict[str, Any]] | None = None
        self._configs: dict[str, dict[str, Any]] = {}
        self._models: dict[str, dict[str, Any]] = {}
        self._runs: dict[str, tuple[Path, Sequence[Edit]]] = {}  # per arm, what was said at its last checkpoint

    def beside(self, model: EditableModel) -> Workbench:
        """The same study on another model: its rows go to the same folder, what it is into the same provenance."""
        other = Workbench(self.study, model, self.options, self.progress)
        other.notes, other._configs, other._finished = self.notes, self._configs, self._known_rows()
        made = run_provenance(model, {})
        self._models[model.model_id] = {name: made[name] for name in ("fingerprint", "revision", "tokenizer")}
        return other

    # --- what is asked for ----------------------------------------------------------------------------------------

    def count(self, usual: int, quick: int) -> int:
        """How many edits to make."""
        if self.options.edits is not None:
            return self.options.edits
        return quick if self.options.quick else usual

    def edits(self, count: int) -> list[Edit]:
        """The first edits of the user's file, or of atlas's world. Raises ConfigError when there is neither."""
        if self.options.data is not None:
            return self.file_edits("", count)
        if self.model.model_id not in ATLAS_NAMES:
            raise ConfigError("only atlas brings edits of its own; give a file of edits for this model: --data FILE")
        from errata.atlas.edits import world_edits

        return world_edits(count, seed=self.options.seed)

    def file_edits(self, form: str, count: int) -> list[Edit]:
        """The first edits of the user's file, which has to be of a certain form unless that is empty."""
        from errata.datasets import read_edits

        if self.options.data is None:
            raise ConfigError(f"this study edits the {form} set, which errata does not bring; give it: --data FILE")
        found = read_edits(self.options.data, limit=count)
        if form and found.format != form:
            raise ConfigError(f"--data {self.options.data} holds {found.format}; this study needs the {form} set")
        self.notes += [f"left out: {problem}" for problem in found.problems]
        if len(found.edits) < count:
            self.notes.append(f"the file holds {len(found.edits)} edits, {count} were asked for")
        return found.edits

    def methods(self, usual: Sequence[str]) -> list[str]:
        """The runs of a study that compares methods, each METHOD or METHOD@LABEL."""
        names = list(dict.fromkeys(self.options.methods or usual))
        for name in names:
            method_of(name)
        self._know(names)
        return names

    def arms(
        self,
        method: str,
        column: str,
        values: Mapping[str, Mapping[str, Any]],
        own: Mapping[str, Any] | None = None,
    ) -> list[Arm]:
        """One arm per value: what it is called in the column, and the settings that make it.

        Args:
            own: settings of the study in all arms; the user's go before them.

        Raises:
            ConfigError: the user sets what this study varies.
        """
        self.methods([method])
        given = dict(self.options.settings.get(method, {}))
        varied = {name for settings in values.values() for name in settings}
        if clash := sorted(varied & given.keys()):
            raise ConfigError(
                f"{self.study.name} varies {method}.{clash[0]} itself; leave --set {method}.{clash[0]} out"
            )
        return [Arm({column: name}, method, {**(own or {}), **given, **own_}) for name, own_ in values.items()]

    def arm(self, run: str, own: Mapping[str, Any] | None = None) -> Arm:
        """The arm of one of `methods`, under the user's settings of that name before the study's own."""
        return Arm({"method": run}, method_of(run), self.given(run, own))

    def _know(self, names: Sequence[str]) -> None:
        for method in self.options.settings:
            if method not in names:
                raise ConfigError(f"--set {method}.…: " + unknown_name("method of this study", method, names))

    def given(self, method: str, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A method's settings: the user's before the study's own."""
        return {**(own or {}), **self.options.settings.get(method, {})}

    # --- runs -----------------------------------------------------------------------------------------------------

    def config(self, arm: Arm) -> EditorConfig:
        """The whole settings of an arm. Raises ConfigError for one that the method does not have."""
        config: EditorConfig = editor_class(arm.method).Config.for_model(self.model, **arm.settings)
        return config

    def enter(self, arm: Arm) -> str:
        """Name an arm's settings in the study's provenance; returns the name."""
        name = " ".join(str(value) for value in arm.label.values())
        self._configs[name] = self.config(arm).to_record()
        return name

    def run(self, arms: Sequence[Arm], edits: Sequence[Edit], checkpoints: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of all arms at all checkpoints: each arm's label and its `scores`."""
        for arm in arms:
            self.config(arm)  # a setting that does not exist is found before anything is run
        rows = []
        for number, arm in enumerate(arms, start=1):
            name = self.enter(arm)
            keys = {count: self._run_key(arm, edits[:count]) for count in checkpoints}
            if not set(keys.values()) <= self._known_rows().keys():
                self._compare(arm, edits, checkpoints, f"{number} of {len(arms)}, {name}")
            rows += [dict(self._known_rows()[key]) for key in keys.values()]
            said = self._run_folder(arm, edits) / arm.method / f"answers-{max(checkpoints)}.jsonl"
            self._runs[name] = said, edits[: max(checkpoints)]
        return rows

    def _compare(self, arm: Arm, edits: Sequence[Edit], checkpoints: Sequence[int], title: str) -> None:
        comparison = Comparison(
            self.model,
            [arm.method],
            edits,
            checkpoints,
            self._run_folder(arm, edits),
            settings={arm.method: arm.settings},
            controls=False,
        )
        for row in comparison.run(_Prefixed(self.progress, title)):
            if row["method"] == arm.method and row["edits"] in checkpoints:
                self._finish(self._run_key(arm, edits[: row["edits"]]), {**arm.label, **scores(row)})

    @contextmanager
    def edited(self, arm: Arm, edits: Sequence[Edit], checkpoints: Sequence[int]) -> Iterator[Adapter]:
        """The model as an arm leaves it after the last checkpoint, its adapter attached; the run is made if need be."""
        self.run([arm], edits, checkpoints)
        place = self._run_folder(arm, edits) / arm.method / f"adapter-{checkpoints[-1]}"
        if not place.is_dir():  # the row is there, but its run was deleted
            self._compare(arm, edits, checkpoints, "again")
        adapter = AutoAdapter.from_pretrained(place, model=self.model)
        try:
            yield adapter
        finally:
            adapter.detach()

    def right_at_once(self, arm: Arm, edits: Sequence[Edit]) -> list[tuple[float, float]]:
        """Per edit of a finished run, reliability right after it was made: generated, teacher-forced."""
        state = json.loads((self._run_folder(arm, edits) / arm.method / "state.json").read_text(encoding="utf-8"))
        return [(own["reliability"][0], own["reliability"][1]) for own in state["immediate"]]

    def _run_folder(self, arm: Arm, edits: Sequence[Edit]) -> Path:
        # The first edit stands for all: a run may be gone on with by more edits behind those it has.
        name = re.sub(r"[^a-z0-9.]+", "-", " ".join([arm.method, *map(str, arm.label.values())]).lower()).strip("-")
        return self.options.folder / "runs" / f"{name[:40]}-{self._key(arm, edits[0].to_json())[:8]}"

    # --- rows -----------------------------------------------------------------------------------------------------

    def _key(self, arm: Arm, *parts: str) -> str:
        """Of everything that a result of this arm depends on, but for the edits."""
        made = run_provenance(self.model, self.config(arm))
        made["settings"].pop("source")
        return digest(json.dumps([self.study.name, dict(arm.label), made, *parts], sort_keys=True))

    def _run_key(self, arm: Arm, edits: Sequence[Edit], *parts: Any) -> str:
        return self._key(arm, digest("\n".join(edit.to_json() for edit in edits)), json.dumps(parts))

    def row(self, arm: Arm, edits: Sequence[Edit], parts: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A row that a study makes itself, or has made before with the same model, settings, edits and `parts`."""
        key = self._run_key(arm, edits, "made by the study", parts)
        if key not in self._known_rows():
            self._finish(key, make())
        return dict(self._known_rows()[key])

    def place(self, arm: Arm, parts: Any) -> Path:
        """A folder below `runs/` for what has to be kept while a row of these parts is made."""
        return self.options.folder / "runs" / f"{arm.method}-{self._run_key(arm, [], 'on the way', parts)[:8]}"

    def _known_rows(self) -> dict[str, dict[str, Any]]:
        if self._finished is None:
            self._finished = {line["key"]: line["row"] for line in self._rows.read()}
        return self._finished

    def _finish(self, key: str, row: dict[str, Any]) -> None:
        if key not in self._known_rows():
            self.options.folder.mkdir(parents=True, exist_ok=True)
            self._known_rows()[key] = self._rows.append({"key": key, "row": row})["row"]

    # --- asking ---------------------------------------------------------------------------------------------------

    def examination(self, edits: Sequence[Edit], adapter: Adapter) -> Examination:
        """Ready to ask the edited model: what the unedited one says is known."""
        examination = Examination(self.model, edits)
        examination.ask_base(adapter, self.progress)
        return examination

    # --- the end --------------------------------------------------------------------------------------------------

    def _examples(self, count: int = 3) -> list[Grid]:
        """A few edits and what was said in the end, in runs of the same edits as the first."""
        shown = next((edits for _, edits in self._runs.values()), [])
        return examples_of(shown, {name: path for name, (path, edits) in self._runs.items() if edits == shown}, count)

    def result(
        self, *, found: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], figure: Figure, **more: Any
    ) -> StudyResult:
        """A result of this study, under its name."""
        return StudyResult(
            name=self.study.name,
            question=self.study.question,
            found=found,
            columns=columns,
            rows=rows,
            figure=figure,
            examples=self._examples(),
            command=self.options.command or f"errata study {self.study.name}",
            notes=self.notes,
            provenance={
                **run_provenance(self.model, self._configs),
                "beside": self._models,
                "seed": self.options.seed,
                "data": None if self.options.data is None else str(self.options.data),
            },
            **more,
        )


def share(values: Sequence[float]) -> float | None:
    """The mean as JSON holds it, None for nothing."""
    return finite_or_none(sum(values) / len(values)) if values else None


def measured(name: str, values: Sequence[float]) -> dict[str, Any]:
    """A column and its interval over edits; None where nothing was asked."""
    if not values:
        return {name: None}
    mean = bootstrap_mean(values)
    return {name: mean.value, f"{name}_interval": [mean.low, mean.high]}
