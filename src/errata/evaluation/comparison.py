"""Several methods on the same edits in the same order, without reset, asked at the same checkpoints.

A comparison lives in a folder: in `comparison.json` how it is made, in `rows.jsonl` its finished rows, and per method
its adapter and everything that was said (`answers-N.jsonl`) at every checkpoint, and its counters at the last. A run
that was killed goes on from there; no finished row is made again. Each row says how it was made (`made`), so that rows
of several folders can be put side by side (`errata.evaluation.joining`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.adapters import Adapter, AutoAdapter
from errata.edit import Edit
from errata.editors import Editor, EditorConfig, editor_class, method_of
from errata.errors import ArtifactError, ConfigError
from errata.evaluation.controls import no_op_control, random_control
from errata.evaluation.figures import comparison_figure, save_figure
from errata.evaluation.lifelong import collapse_point, locality_drift
from errata.evaluation.metrics import finite_or_none, held_until
from errata.evaluation.protocol import Examination, Result, run_sequence
from errata.evaluation.provenance import run_provenance
from errata.evaluation.rows import RowFile, digest, write_json, write_lines
from errata.evaluation.significance import compare_methods
from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress

__all__ = ["HORIZON", "Comparison"]

HORIZON = 0.8  # reliability, generated, below which a method no longer holds what it was told


class Comparison:
    """A resumable comparison of methods.

    The folder belongs to one model, in one precision, on one kind of device, under one version of errata, and to one
    order of edits. It may be gone on with by more methods, other checkpoints and more edits behind those it has.

    Args:
        model: the base model; nothing may be attached to it.
        methods: a method named twice is run once; METHOD@LABEL runs it again under settings of its own.
        edits: applied in this order by every method.
        checkpoints: numbers of edits at which everything is asked. They end batches: with a batch size of 100,
            checkpoints 1 and 10 make batches of 1, 9 and then 90 or 100.
        folder: where rows, adapters and the figure go.
        texts: held-out text for perplexity.
        settings: per method, as it is named in `methods`, settings that differ from the default.
        controls: also run no-op edits and random content for each method, at the last checkpoint.
        stop_below: a run whose reliability (generated) has fallen below this share is not gone on with.
        order_seed: by which the edits were put into their order, None for the order they came in; kept with the rows.

    Attributes:
        notes: what differs from what was asked for, in words.
        provenance: how the rows were made: version, model, precision, device, and the settings of each method.

    Raises:
        ConfigError: the folder holds a comparison of something else, a method does not exist, or the checkpoints make
            no sense.
        ArtifactError: what the folder holds is damaged.
    """

    def __init__(
        self,
        model: EditableModel,
        methods: Sequence[str],
        edits: Sequence[Edit],
        checkpoints: Sequence[int],
        folder: Path,
        *,
        texts: Sequence[str] = (),
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        controls: bool = True,
        max_new_tokens: int = 32,
        stop_below: float = 0.0,
        order_seed: int | None = None,
    ) -> None:
        self.model, self.methods, self.notes = model, list(dict.fromkeys(methods)), list[str]()
        self.stop_below, self.order_seed = stop_below, order_seed
        self.checkpoints = self._reachable(checkpoints, len(edits))
        self.edits = list(edits[: self.checkpoints[-1]])
        self.folder, self.texts, self.controls = folder, list(texts), controls
        self.settings = {name: dict((settings or {}).get(name, {})) for name in self.methods}
        self.configs = {name: self._config(name) for name in self.methods}
        self.provenance = run_provenance(model, {name: config.to_record() for name, config in self.configs.items()})
        self.examination = Examination(model, self.edits, max_new_tokens)
        self._fallen: dict[str, int] = {}  # runs that are not gone on with, and after how many edits
        self._head_path = folder / "comparison.json"
        self._rows = RowFile(folder / "rows.jsonl", {"method", "of", "baseline", "edits"})

    def _config(self, method: str) -> EditorConfig:
        """A method's settings. Collapse is what a comparison is to show: the guard says when, and refuses nothing."""
        given = self.settings[method]
        config: EditorConfig = editor_class(method_of(method)).Config.for_model(self.model, **given)
        return config if "guard" in given else dataclasses.replace(config, guard="warn")

    def _reachable(self, checkpoints: Sequence[int], most: int) -> list[int]:
        if not checkpoints or min(checkpoints) < 1 or not most:
            raise ConfigError(
                f"checkpoints {list(checkpoints)} of {most} edits make no comparison; give at least one checkpoint, "
                "each of one edit or more, such as 1,10,100"
            )
        beyond = sorted({c for c in checkpoints if c > most})
        if beyond:
            self.notes.append(f"there are {most} edits: asked at {most} instead of {', '.join(map(str, beyond))}")
        return sorted({min(c, most) for c in checkpoints})

    # --- the folder ---------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What must be the same for the folder's rows to be this comparison's."""
        made = {name: self.provenance[name] for name in ("errata", "protocol", "fingerprint", "tokenizer", "dtype")}
        return {
            **made,
            "device": self.model.device.type,
            "max_new_tokens": self.examination.max_new_tokens,
            "texts": digest("\x1f".join(self.texts)),
        }

    def _keep(self, row: dict[str, Any]) -> dict[str, Any]:
        """Append a finished row, with how it was made."""
        config = self.configs.get(row["of"])
        seeds = {"seed": None if config is None else config.to_record()["seed"], "order_seed": self.order_seed}
        return self._rows.append({**row, "made": {**self._identity(), **seeds}})

    def _open(self) -> list[dict[str, Any]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = self._rows.read()
        head = self._checked_head({row["of"] for row in rows})
        mine = [digest(edit.to_json()) for edit in self.edits]
        edits = max(head["edits"], mine, key=len)
        record = {
            "identity": self._identity(),
            "provenance": {**self.provenance, "settings": {**head["settings"], **self.provenance["settings"]}},
            "edits": edits,
        }
        write_json(self._head_path, record)
        return rows

    def _checked_head(self, methods: set[str]) -> dict[str, Any]:
        """The folder's list of edits and the settings of the methods that have rows; both empty if none has."""
        if not methods:
            return {"edits": [], "settings": {}}
        try:
            head = json.loads(self._head_path.read_text(encoding="utf-8"))
            identity, edits, settings = head["identity"], list(head["edits"]), dict(head["provenance"]["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{self._head_path} is missing or damaged ({type(error).__name__}: {error}); delete {self.folder}, or "
                "give another --out"
            ) from error
        mine = self._identity()
        differs = [f"{k} {identity.get(k)!r}, now {v!r}" for k, v in mine.items() if identity.get(k) != v]
        shared = min(len(edits), len(self.edits))
        if edits[:shared] != [digest(edit.to_json()) for edit in self.edits[:shared]]:
            differs.append("the edits")
        if differs:
            raise ConfigError(
                f"{self.folder} holds a comparison of another model or other edits, or one made otherwise "
                f"({'; '.join(differs)}); give another --out, or delete it"
            )
        settings = {method: record for method, record in settings.items() if method in methods}
        for method, record in self.provenance["settings"].items():
            if settings.get(method, record) != record:
                raise ConfigError(
                    f"{self.folder} holds rows made with other settings of {method}; give another --out, or delete it"
                )
        return {"edits": edits, "settings": settings}

    # --- the runs -----------------------------------------------------------------------------------------------

    def run(self, progress: Progress = NO_PROGRESS) -> Iterator[dict[str, Any]]:
        """Yield every row, those of an earlier run first, and draw the figure at the end."""
        rows = self._open()
        yield from rows
        done = {(row["method"], row["edits"]) for row in rows}
        for row in rows:
            self._note_fall(row)
        parts = [self._unedited(done, progress)]
        for method in self.methods:
            parts.append(self._method(method, done, progress))
            if self.controls:
                parts.append(self._controls(method, done, progress))
        for row in itertools.chain.from_iterable(parts):
            rows.append(row)
            yield row
        save_figure(comparison_figure(self.chosen(rows)), self.folder / "comparison.png")

    def chosen(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of this call's methods and checkpoints, in their order (the folder may hold more)."""
        order = {name: number for number, name in enumerate(["unedited", *self.methods])}
        mine = [r for r in rows if r["of"] in order and r["edits"] in self.checkpoints]
        return sorted(mine, key=lambda r: (r["baseline"] and r["method"] != "unedited", order[r["of"]], r["edits"]))

    @property
    def stopped(self) -> dict[str, int]:
        """Runs that were not gone on with because they fell below `stop_below`, and after how many edits."""
        return {method: edits for method, edits in self._fallen.items() if edits < self.checkpoints[-1]}

    def horizons(self, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Per run, up to how many `edits` reliability (generated, of all of them) stays at `HORIZON` or above, between
        checkpoints on a line, and whether it `fell` below at all; if not, the number is a lower bound."""
        found: dict[str, dict[str, Any]] = {}
        for method in self.methods:
            points = [(row["edits"], row["reliability"]["generated"]) for row in rows if row["method"] == method]
            if points:
                edits, fell = held_until(points, HORIZON)
                found[method] = {"edits": edits, "fell": fell}
        return found

    def drifts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Per run, locality (generated) lost per hundred edits: the slope over its checkpoints. Left out are runs with
        fewer than two checkpoints that asked for locality."""
        found: dict[str, float] = {}
        for method in self.methods:
            own = [row for row in rows if row["method"] == method and row["locality"]["generated"] is not None]
            if len(own) > 1:
                found[method] = locality_drift([(row["edits"], row["locality"]["generated"]) for row in own])
        return found

    def collapses(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
        """Per run, the first checkpoint with a perplexity above ten times the unedited model's, None where there is
        none. Empty where no text was given, or the unedited model has no perplexity itself."""
        base = next((row["perplexity"] for row in rows if row["method"] == "unedited"), None)
        if not self.texts or base is None:
            return {}
        # A row holds None for a perplexity that is no finite number.
        read = [(r["method"], r["edits"], math.inf if r["perplexity"] is None else r["perplexity"]) for r in rows]
        by_run = {method: {edits: value for name, edits, value in read if name == method} for method in self.methods}
        return {method: collapse_point(values, base=base) for method, values in by_run.items() if values}

    def guard_calls(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Per run in which the guard called a collapse: after how many `edits` first, and what held-out text's
        `perplexity` was there as a multiple of the unedited model's (None where it was not read)."""
        base = next((row["perplexity"] for row in rows if row["method"] == "unedited"), None)
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["method"] in self.methods and "collapse" in row["guard"]:
                now = row["guard_perplexity"].get("collapse")
                found[row["method"]] = {
                    "edits": row["guard"]["collapse"],
                    "perplexity": now / base if now and base else None,
                }
        return found

    def differences(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """Per property, the best run against every other, paired over edits, at the last checkpoint that all reached.

        A property of which nothing was asked is left out, and so is everything with fewer than two runs, or where
        answers are missing that an earlier version did not keep.
        """
        reached = [{row["edits"] for row in rows if row["method"] == method} for method in self.methods]
        shared = set.intersection(*reached) if len(reached) > 1 else set[int]()
        if not shared or not self.has_answers(max(shared)):
            return {}
        found: dict[str, list[dict[str, Any]]] = {}
        for name in ("reliability", "generalization", "locality"):
            scores = {method: list(self.per_edit(method, max(shared), name).values()) for method in self.methods}
            if all(scores.values()):
                best = max(scores, key=lambda method: sum(scores[method]))
                found[name] = [
                    {"edits": max(shared), **one.to_record()} for one in compare_methods(scores, against=best)
                ]
        return found

    def has_answers(self, edits: int) -> bool:
        """Whether what every run said at a checkpoint is kept."""
        return all(self._answers(method, edits).is_file() for method in self.methods)

    def _answers(self, method: str, edits: int) -> Path:
        return self.folder / method / f"answers-{edits}.jsonl"

    def per_edit(self, method: str, edits: int, name: str) -> dict[str, float]:
        """A property, generated, of every edit that was asked about it at a finished checkpoint, by the edit's id.

        Where several edits have one id, the later ones' keys have their place behind it.
        """
        found: dict[str, float] = {}
        for number, line in enumerate(RowFile(self._answers(method, edits), {"id", name}).read()):
            if values := [mark[0] for mark in line[name]]:
                key = f"{line['id']} {number}" if line["id"] in found else line["id"]
                found[key] = sum(values) / len(values)
        return found

    def _editor(self, method: str, adapter: Adapter | None = None) -> Editor[Any]:
        made: Editor[Any] = editor_class(method_of(method))(self.model, self.configs[method], adapter=adapter)
        return made

    def _unedited(self, done: set[tuple[str, int]], progress: Progress) -> Iterator[dict[str, Any]]:
        missing = [c for c in self.checkpoints if ("unedited", c) not in done]
        if not missing:
            return
        asked = self.examination.ask_unedited(progress).asked
        perplexity = finite_or_none(self.model.perplexity(self.texts)) if self.texts else None
        for count in missing:
            row = {"method": "unedited", "of": "unedited", "baseline": True, **Result(asked[:count]).to_record()}
            yield self._keep({**row, "edits": count, "perplexity": perplexity, "seconds_per_edit": 0.0})

    def _method(self, method: str, done: set[tuple[str, int]], progress: Progress) -> Iterator[dict[str, Any]]:
        missing = [c for c in self.checkpoints if (method, c) not in done and c <= self._fallen.get(method, c)]
        if not missing:
            return
        place = self.folder / method
        state = self._state(place)
        if state is not None and (missing[0] <= state["done"] or (method, state["done"]) not in done):
            state = None  # a checkpoint was added that the earlier run has passed, or its row is gone: begin again
        adapter = None if state is None else AutoAdapter.from_pretrained(place / f"adapter-{state['done']}")
        self.examination.ask_base(progress=progress)
        editor = self._editor(method, adapter)
        try:
            for checkpoint, after in run_sequence(
                editor, self.examination, self.checkpoints, texts=self.texts, resume=state, progress=progress
            ):
                editor.adapter.save_pretrained(place / f"adapter-{after['done']}")
                write_lines(self._answers(method, checkpoint.edits), (a.to_record() for a in checkpoint.result.asked))
                row = {"method": method, "of": method, "baseline": False, **checkpoint.to_record()}
                if (method, checkpoint.edits) not in done:
                    yield self._keep({**row, "memory_version": editor.adapter.memory_version})
                write_json(place / "state.json", after)
                if self._note_fall(row):
                    return
        finally:
            editor.adapter.detach()

    def _note_fall(self, row: Mapping[str, Any]) -> bool:
        """Whether a run has come to its end with this row, although checkpoints may be left."""
        method, edits, share = row["method"], row["edits"], row["reliability"]["generated"]
        if method not in self.methods or share is None or share >= self.stop_below:
            return False
        self._fallen[method] = min(edits, self._fallen.get(method, edits))
        return True

    def _state(self, place: Path) -> dict[str, Any] | None:
        path = place / "state.json"
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            int(state["done"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); delete it: {place.name} begins again") from error
        return state

    def _controls(self, method: str, done: set[tuple[str, int]], progress: Progress) -> Iterator[dict[str, Any]]:
        """Baselines of the method at the last checkpoint, from the adapter that was saved there; none if it was not
        reached."""
        last = self.checkpoints[-1]
        if self._fallen.get(method, last) < last:
            return
        random_content, no_op = f"random content ({method})", f"no-op ({method})"
        if {(random_content, last), (no_op, last)} <= done:
            return
        self.examination.ask_base(progress=progress)
        if (random_content, last) not in done:
            adapter = AutoAdapter.from_pretrained(self.folder / method / f"adapter-{last}", model=self.model)
            try:
                control = random_control(adapter, self.examination, self.texts, progress=progress)
            finally:
                adapter.detach()
            yield self._keep(self._control_row(control.to_record(), method))
        if (no_op, last) not in done:
            editor = self._editor(method)
            control = no_op_control(editor, self.examination, self.texts, progress)
            yield self._keep(self._control_row(control.to_record(), method))

    def _control_row(self, record: dict[str, Any], method: str) -> dict[str, Any]:
        name, last = record.pop("name"), self.checkpoints[-1]
        return {"method": name, "of": method, "baseline": True, **record, "edits": last, "seconds_per_edit": 0.0}
