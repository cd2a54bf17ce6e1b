"""Several methods on the same edits in the same order, without reset, asked at the same checkpoints.

A comparison lives in a folder: finished rows in `rows.jsonl`, and per method the adapter and counters of its last
checkpoint. A run that was killed goes on from there; no finished row is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.adapters import AutoAdapter
from errata.edit import Edit
from errata.editors import Editor, editor_class
from errata.errors import ArtifactError, ConfigError
from errata.evaluation.controls import no_op_control, random_control
from errata.evaluation.figures import comparison_figure, save_figure
from errata.evaluation.protocol import PROTOCOL, Examination, run_sequence
from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress

__all__ = ["Comparison"]


class Comparison:
    """A resumable comparison of methods.

    Args:
        model: the base model; nothing may be attached to it.
        edits: applied in this order by every method.
        checkpoints: numbers of edits at which everything is asked.
        folder: where rows, adapters and the figure go.
        texts: held-out text for perplexity.
        settings: per method, settings that differ from the default.
        controls: also run no-op edits and random content for each method, at the last checkpoint.

    Raises:
        ConfigError: the folder holds a comparison of something else, or a method does not exist.
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
        max_new_tokens: int = 20,
    ) -> None:
        self.model, self.methods, self.edits = model, list(methods), list(edits)
        self.checkpoints = sorted({min(c, len(edits)) for c in checkpoints if c > 0})
        if not self.checkpoints:
            raise ConfigError("give at least one checkpoint of one edit or more, such as 1,10,100")
        self.folder, self.texts, self.controls = folder, list(texts), controls
        self.settings = {name: dict((settings or {}).get(name, {})) for name in self.methods}
        self.configs = {
            name: editor_class(name).Config.for_model(model, **self.settings[name]) for name in self.methods
        }
        self.examination = Examination(model, self.edits[: self.checkpoints[-1]], max_new_tokens)
        self._rows_path = folder / "rows.jsonl"

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=16)
        for edit in self.edits:
            digest.update(edit.to_json().encode())
        for text in self.texts:
            digest.update(text.encode())
        return {
            "protocol": PROTOCOL,
            "model": self.model.fingerprint,
            "edits": digest.hexdigest(),
            "max_new_tokens": self.examination.max_new_tokens,
        }

    def _open(self) -> list[dict[str, Any]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        head = self.folder / "comparison.json"
        identity = self._identity()
        if not head.exists():
            head.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        elif json.loads(head.read_text(encoding="utf-8")) != identity:
            raise ConfigError(
                f"{self.folder} holds a comparison of another model or other edits; give another --out, or delete it"
            )
        if not self._rows_path.exists():
            return []
        rows = []
        for number, line in enumerate(self._rows_path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ArtifactError(
                    f"{self._rows_path}:{number} is damaged ({error.msg}); delete this line and run again"
                ) from error
        return rows

    def _note(self, row: dict[str, Any]) -> dict[str, Any]:
        with open(self._rows_path, "a", encoding="utf-8") as out:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
        return row

    def run(self, progress: Progress = NO_PROGRESS) -> Iterator[dict[str, Any]]:
        """Yield every row, those of an earlier run first, and draw the figure at the end."""
        rows = self._open()
        yield from rows
        done = {(row["method"], row["edits"]) for row in rows}
        for row in self._unedited(done, progress):
            rows.append(row)
            yield row
        for method in self.methods:
            for row in self._method(method, done, progress):
                rows.append(row)
                yield row
        save_figure(comparison_figure(self.chosen(rows)), self.folder / "comparison.png")

    def chosen(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of this call's methods and checkpoints, in their order (the folder may hold more)."""
        order = {name: number for number, name in enumerate(["unedited", *self.methods])}
        mine = [r for r in rows if r["of"] in order and r["edits"] in self.checkpoints]
        return sorted(mine, key=lambda r: (r["baseline"] and r["method"] != "unedited", order[r["of"]], r["edits"]))

    def _unedited(self, done: set[tuple[str, int]], progress: Progress) -> Iterator[dict[str, Any]]:
        missing = [c for c in self.checkpoints if ("unedited", c) not in done]
        if not missing:
            return
        self.examination.ask_base(progress=progress)
        perplexity = self.model.perplexity(self.texts) if self.texts else None
        for count in missing:
            result = self.examination.ask(self.edits[:count])
            row = {"method": "unedited", "of": "unedited", "baseline": True, **result.to_record()}
            yield self._note({**row, "edits": count, "perplexity": perplexity, "seconds_per_edit": 0.0})

    def _method(self, method: str, done: set[tuple[str, int]], progress: Progress) -> Iterator[dict[str, Any]]:
        cls = editor_class(method)
        config = self.configs[method]
        place = self.folder / method
        state: dict[str, Any] | None = None
        adapter = None
        if (place / "state.json").exists():
            state = json.loads((place / "state.json").read_text(encoding="utf-8"))
            if state.pop("config") != json.loads(json.dumps(config.to_record())):
                raise ConfigError(f"{place} was made with other settings of {method}; give another --out, or delete it")
            if any((method, c) not in done and c <= state["done"] for c in self.checkpoints):
                state = None  # a checkpoint was added that the earlier run has passed: begin again
            else:
                adapter = AutoAdapter.from_pretrained(place / f"adapter-{state['done']}")
        names = (f"no-op ({method})", f"random content ({method})")
        last = self.checkpoints[-1]
        controls_missing = self.controls and any((name, last) not in done for name in names)
        if all((method, c) in done for c in self.checkpoints) and not controls_missing:
            return
        self.examination.ask_base(progress=progress)
        editor: Editor[Any] = cls(self.model, config, adapter=adapter)
        try:
            for checkpoint, after in run_sequence(
                editor, self.examination, self.checkpoints, texts=self.texts, resume=state, progress=progress
            ):
                editor.adapter.save_pretrained(place / f"adapter-{after['done']}")
                draft = place / "state.json.new"
                draft.write_text(json.dumps({**after, "config": config.to_record()}), encoding="utf-8")
                row = {"method": method, "of": method, "baseline": False, **checkpoint.to_record()}
                if (method, checkpoint.edits) not in done:
                    yield self._note({**row, "memory_version": editor.adapter.memory_version})
                os.replace(draft, place / "state.json")
            if controls_missing and (names[1], last) not in done:
                control = random_control(editor.adapter, self.examination, self.texts, progress=progress)
                yield self._note(self._control_row(control.to_record(), method, last))
        finally:
            editor.adapter.detach()
        if controls_missing and (names[0], last) not in done:
            control = no_op_control(cls(self.model, config), self.examination, self.texts, progress)
            yield self._note(self._control_row(control.to_record(), method, last))

    @staticmethod
    def _control_row(record: dict[str, Any], method: str, count: int) -> dict[str, Any]:
        name = record.pop("name")
        return {"method": name, "of": method, "baseline": True, **record, "edits": count, "seconds_per_edit": 0.0}
