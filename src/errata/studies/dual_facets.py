"""What a sequence of edits does to everything else, and why ("Navigating the Dual Facets", 2402.11122).

The paper edits 7B models and asks eight benchmarks of six kinds; here atlas is edited and asked its own six
capabilities of these kinds. Its claims stand in a table beside what was measured, with intervals. Batches and depth are
mitigations that one model can show; instruction tuning takes atlas's tuned variant, edited and asked in its chat
template, and size an atlas of another size (`errata atlas train --size small`, then `--beside FOLDER`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from errata.atlas.instruct import chat_edit, chat_prompt
from errata.edit import Edit
from errata.errors import ConfigError
from errata.evaluation.figures import retention_lines
from errata.evaluation.metrics import Measure, bootstrap_mean
from errata.evaluation.significance import spearman_interval
from errata.evaluation.tables import cell
from errata.model import EditableModel
from errata.studies import facets
from errata.studies.facet_figures import divergence_map, facet_panels
from errata.studies.result import StudyResult, SubTable
from errata.studies.workbench import Arm, Workbench

__all__ = ["dual_facets"]

_METHODS = ("mend", "rome@reference", "rome", "memit", "alphaedit", "grace", "wise", "memoir")
# ROME as EasyEdit ships it: two keys, no statistics.
_SETTINGS = {"rome@reference": {"variant": "original", "use_statistics": False, "contexts": 5}}
_CHECKPOINTS = (1, 5, 10, 20, 50, 100)
_BATCHED = ("memit",)  # of mend, batches and single edits give the same change
_DEEPENED = "rome@reference"
_ELSEWHERE = ("rome@reference", "memit")  # on the tuned model, and on one of another size
_LOST = -0.05  # of accuracy: a whole interval below it counts as a loss


def dual_facets(bench: Workbench) -> StudyResult:
    """Edit one after the other, examine the model at every checkpoint, then try what the paper says mitigates."""
    names = bench.methods(_METHODS)
    arms = {name: bench.arm(name, _SETTINGS.get(name)) for name in names}
    for arm in arms.values():
        bench.config(arm)  # a setting that does not exist is found before anything is asked
    edits = bench.edits(bench.count(max(_CHECKPOINTS), quick=2))
    total = len(edits)
    own = _Subject("", bench, edits, lambda _, question: question)
    others = [_beside(bench, name, edits) for name in bench.options.beside]
    study = _Rows()
    study.unedited(own)
    for name in names:
        study.edited(own, arms[name], sorted({min(point, total) for point in _CHECKPOINTS} | {total}))
    trials = _mitigations(study, own, others, arms)
    claims = _claims(study, names, trials, total)
    modifying = [name for name in names if study.last(name)["divergence"] is not None]
    bench.notes += _notes(bench)
    told = ", ".join(f"{name} {round(study.last(name)['change'], 2) + 0:.2f}" for name in names)
    found = f"After {total} edits, accuracy on six capabilities changed by: {told}."
    main = [row for row in study.rows if row["method"] in names or row["method"] == "unedited"]
    figures = {
        "Retention by age: edits still answered at the end, by how many were made since.": retention_lines(main[1:])
    }
    if modifying:
        figures["How far each layer's weight has moved: one less its cosine with itself unedited."] = divergence_map(
            main, modifying
        )
    return bench.result(
        found=found,
        columns=(
            "method",
            "edits",
            "change",
            "reliability",
            "generalization",
            "divergence",
            "fires",
            "perplexity_prose",
        ),
        rows=study.rows,
        tables=[SubTable("What the paper claims, and what was measured", ("claim", "measured", "holds here"), claims)],
        figure=facet_panels(main, names, found),
        more_figures=figures,
    )


def _notes(bench: Workbench) -> list[str]:
    notes = [
        "change: accuracy with edits less accuracy without, over the same items of all six capabilities; intervals are "
        "bootstrapped over items",
        f"a loss is a change whose whole interval lies below {_LOST}",
        "shots_N: questions behind N examples; shots_N_shuffled: the examples carry each other's answers; recital: a "
        "list from the prompt said again",
        "divergence: one less the cosine of the most changed weight with itself unedited; fires: share of unrelated "
        "prompts on which a routed memory acts",
        "rome@reference: two keys and no statistics, as EasyEdit ships it; rome: r-ROME with statistics",
        "every capability, all domains of text and numbers of examples: result.json",
    ]
    if not bench.options.beside:
        notes.append(
            "size was not measured: train an atlas of another size (errata atlas train --size small --out FOLDER) and "
            "give it: --beside FOLDER"
        )
    return notes


# --- what is edited and asked ---------------------------------------------------------------------------------------


@dataclass
class _Subject:
    """A model under study: what it is called behind a method, the edits as it is given them, how it is asked."""

    label: str
    bench: Workbench
    edits: Sequence[Edit]
    ask: facets.Ask

    def state(self, arm: Arm, count: int, checkpoints: Sequence[int]) -> dict[str, Any]:
        """What is found after so many edits: from a finished row, or from the adapter that was kept there."""
        if count:
            with self.bench.edited(arm, self.edits, [point for point in checkpoints if point <= count]) as adapter:
                return self._kept(arm, count, adapter)
        return self._kept(Arm({"method": "unedited"}, arm.method, {}), 0, None)

    def _kept(self, arm: Arm, count: int, adapter: Any) -> dict[str, Any]:
        make = functools.partial(facets.examine, self.bench.model, adapter, self.ask, self.bench.progress)
        return self.bench.row(arm, self.edits[:count], ["dual facets", self.label, facets.SIZES], make)


def _loaded(bench: Workbench, name: str) -> EditableModel:
    """Where the study's own model is, and as precise."""
    return EditableModel.load(name, device=bench.model.device, dtype=bench.model.dtype)


def _beside(bench: Workbench, name: str, edits: Sequence[Edit]) -> _Subject:
    model = _loaded(bench, name)
    if model.fingerprint == bench.model.fingerprint:
        raise ConfigError(f"--beside {name} is the model of the study itself; give one of another size")
    return _Subject(f" on {name.rstrip('/').rpartition('/')[2]}", bench.beside(model), edits, lambda _, text: text)


def _tuned(bench: Workbench, edits: Sequence[Edit]) -> _Subject:
    """The tuned atlas, edited and asked in its chat template, but for code, which it was not tuned on."""
    model = _loaded(bench, "atlas-instruct")
    return _Subject(
        " on atlas-instruct",
        bench.beside(model),
        [chat_edit(model, edit) for edit in edits],
        lambda name, question: question if name == "code" else chat_prompt(model, question),
    )


@dataclass
class _Rows:
    """All rows, and what was found of each state."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)
    gains: dict[str, list[int]] = field(default_factory=dict)  # of each run's last state, per item

    def unedited(self, subject: _Subject) -> None:
        """Ask a model before any edit. Raises ConfigError when it has nothing to lose."""
        base = subject.state(Arm({"method": "unedited"}, "ft", {}), 0, [])
        if "1" not in "".join(base["right"].values()):
            raise ConfigError(
                f"{subject.bench.model.model_id} has none of atlas's capabilities, so it has none to lose; errata "
                "damage asks others"
            )
        self.bases[subject.label] = base
        self.rows.append({"method": f"unedited{subject.label}", "edits": 0, **facets.summary(base, base)})

    def edited(self, subject: _Subject, arm: Arm, checkpoints: Sequence[int]) -> None:
        base = self.bases[subject.label]
        for row in subject.bench.run([arm], subject.edits, checkpoints):
            now = subject.state(arm, row["edits"], checkpoints)
            self.rows.append({**row, **facets.summary(base, now)})
            self.gains[row["method"]] = facets.gains(base, now)

    def last(self, method: str) -> dict[str, Any]:
        return [row for row in self.rows if row["method"] == method][-1]


# --- what the paper says mitigates ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """A mitigation: the run that has it, and the one that has not."""

    claim: str
    run: str
    against: str


def _mitigations(study: _Rows, own: _Subject, others: Sequence[_Subject], arms: Mapping[str, Arm]) -> list[_Trial]:
    """The same edits in other batches and other layers, on the tuned variant, and on models of another size."""
    total, trials = len(own.edits), []

    def run(subject: _Subject, label: str, name: str, settings: Mapping[str, Any]) -> None:
        study.edited(subject, Arm({"method": label}, arms[name].method, settings), [total])

    for name in (name for name in _BATCHED if name in arms):
        for size in sorted({min(10, total), total} - {1}):
            run(own, f"{name}, batches of {size}", name, {**arms[name].settings, "batch_size": size})
            trials.append(_Trial("Larger batches lose less", f"{name}, batches of {size}", name))
    if _DEEPENED in arms:
        usual: int = vars(own.bench.config(arms[_DEEPENED]))["layer"]
        blocks = len(own.bench.model.anatomy.mlp_output)
        for layer in sorted({blocks // 2, blocks - 1} - set(range(usual + 1))):
            run(own, f"{_DEEPENED}, layer {layer}", _DEEPENED, {**arms[_DEEPENED].settings, "layer": layer})
            trials.append(
                _Trial(f"Editing deeper than layer {usual} loses less", f"{_DEEPENED}, layer {layer}", _DEEPENED)
            )
    tried = [name for name in _ELSEWHERE if name in arms]
    tuned = [_tuned(own.bench, own.edits)] if own.bench.model.model_id == "atlas" and tried else []
    for subject in (*tuned, *(others if tried else ())):
        study.unedited(subject)
        for name in tried:
            # The very settings of the study's own model; those that another model would have by itself differ.
            settings = {key: value for key, value in vars(own.bench.config(arms[name])).items() if key != "source"}
            run(subject, name + subject.label, name, settings)
            if subject in tuned:
                trials.append(_Trial("Instruction tuning makes it lose less", name + subject.label, name))
            elif _parameters(subject) < _parameters(own):
                trials.append(_Trial(f"A larger model than{subject.label[3:]} loses less", name, name + subject.label))
            else:
                trials.append(_Trial(f"The larger{subject.label[3:]} loses less", name + subject.label, name))
    return trials


def _parameters(subject: _Subject) -> int:
    return sum(parameter.numel() for parameter in subject.bench.model.model.parameters())


# --- the claims -----------------------------------------------------------------------------------------------------


def _told(row: Mapping[str, Any], name: str = "change") -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"


def _between(measure: Measure) -> str:
    return f"{measure.value:+.2f} ({measure.low:+.2f} to {measure.high:+.2f})"


def _claims(study: _Rows, names: Sequence[str], trials: Sequence[_Trial], total: int) -> list[dict[str, str]]:
    """The paper's claims as far as they were measured, each with what was found and whether that agrees."""
    claims: list[dict[str, str]] = []

    def say(claim: str, measured: str, holds: str) -> None:
        claims.append({"claim": claim, "measured": measured, "holds here": holds})

    modifying = [name for name in names if study.last(name)["divergence"] is not None]
    fell = {}
    for name in modifying:
        own = [row for row in study.rows if row["method"] == name]
        fell[name] = next((row["edits"] for row in own if row["change_interval"][1] < _LOST), None)
    if modifying:
        measured = "; ".join(
            f"{name} " + (f"from {at} edits, " if at else "not, ") + f"{_told(study.last(name))} at {total}"
            for name, at in fell.items()
        )
        lost = [name for name, at in fell.items() if at]
        holds = "yes" if len(lost) == len(modifying) else f"for {', '.join(lost)} only" if lost else "no"
        say("Methods that change weights lose capabilities within tens of edits", measured, holds)
    if "grace" in names:
        row = study.last("grace")
        kept = row["change_interval"][0] > _LOST
        general = row["generalization"] is not None and row["generalization_interval"][1] >= 0.5
        measured = f"capabilities {_told(row)}; reliability {cell(row['reliability'])}"
        if row["generalization"] is not None:
            measured += f", other wordings {_told(row, 'generalization')}"
        say(
            "GRACE keeps capabilities, and does not answer other wordings",
            measured,
            "yes" if kept and not general else "it generalizes" if kept else "no",
        )
    for trial in trials:
        with_it, without = study.last(trial.run), study.last(trial.against)
        pairs = zip(study.gains[trial.run], study.gains[trial.against], strict=True)
        more = bootstrap_mean([ours - theirs for ours, theirs in pairs])
        say(
            trial.claim,
            f"{trial.run} {_told(with_it)}, reliability {cell(with_it['reliability'])}; {trial.against} "
            f"{_told(without)}, {cell(without['reliability'])}; difference {_between(more)}",
            "yes" if more.low > 0 else "the other way round" if more.high < 0 else "no difference to be seen",
        )
    moved = [row for row in study.rows if row["method"] in modifying]
    for what, column in (
        ("Weights that have moved further have lost more", "divergence"),
        ("So has language modelling (perplexity of prose)", "perplexity_prose"),
        ("So has what is read from the prompt (a recital)", "recital"),
        ("So have answers behind one example", "shots_1"),
    ):
        say(what, *_together(moved, column, falls=column in ("recital", "shots_1")))
    return [claim for claim in claims if claim["measured"]]


def _together(rows: Sequence[Mapping[str, Any]], column: str, *, falls: bool) -> tuple[str, str]:
    """Whether the change of accuracy goes with a column; `falls` where less of the column means more damage."""
    told = [row for row in rows if row[column] is not None]
    runs = [row["method"] for row in told]
    found = spearman_interval([row[column] for row in told], [row["change"] for row in told], runs)
    if len(told) < 3 or found is None:
        return "", ""
    agrees = found.low > 0 if falls else found.high < 0
    against = found.high < 0 if falls else found.low > 0
    return (
        f"rank correlation {_between(found)} over {len(told)} edited models of {len(set(runs))} runs",
        "yes" if agrees else "the other way round" if against else "not to be told",
    )
