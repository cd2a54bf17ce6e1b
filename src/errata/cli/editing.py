"""`errata edit`, `inject`, `revert`, `generate`, `explain`: writing, taking back and looking at what that does."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.common import check_out, load_adapter, load_edits, load_model, parse_settings, save_adapter
from errata.cli.output import emit, log, plain
from errata.errors import ConfigError
from errata.progress import Progress, progress_bar

if TYPE_CHECKING:
    from errata.adapters import Adapter
    from errata.edit import Edit
    from errata.editors import Editor, EditorConfig
    from errata.editors.guard import GuardRecord
    from errata.model import EditableModel

__all__ = [
    "Writing",
    "edit",
    "explain",
    "found_adapter",
    "generate",
    "given_settings",
    "inject",
    "revert",
    "write_into",
]

_SAVE_EVERY = 100


def _waiting(edits: Sequence[Edit], adapter: Adapter) -> list[Edit]:
    """The edits still to be written: neither held, nor followed in the file by one of the same prompt that is held.

    That later one superseded them, so they are no longer held, though nothing is missing: written again they would
    supersede it in turn.
    """
    held = {(e.id, e.prompt, e.target) for e in adapter.edits()}
    answered: set[str] = set()
    waiting = []
    for e in reversed(edits):
        question = " ".join(e.prompt.split())
        if (e.id, e.prompt, e.target) in held:
            answered.add(question)
        elif question not in answered:
            waiting.append(e)
    return waiting[::-1]


def _check_settings(
    adapter: Adapter, config: type[EditorConfig], model: EditableModel, given: Mapping[str, Any], out: Path
) -> None:
    """Raises ConfigError when the adapter found in `out` was made with other values of the settings that are given."""
    there = config.from_record(adapter.editor_config).to_record()
    here = config.for_model(model, **given).to_record()
    # Only what was given is compared: what was left out is gone on with as it is there.
    differences = [f"{name}: there {there[name]!r}, here {here[name]!r}" for name in given if there[name] != here[name]]
    if differences:
        raise ConfigError(
            f"{out} holds an adapter made with other settings ({'; '.join(differences)}); give another --out, or "
            "leave these settings out"
        )


def found_adapter(out: Path, method: str) -> Adapter | None:
    """The adapter that is to be gone on with, None where the folder holds none. Asked before anything slow is done.

    Raises:
        ConfigError: it is of another method, or the folder cannot be one.
        ArtifactError: the folder cannot be written.
    """
    check_out(out)
    from errata.adapters import AutoAdapter

    adapter = AutoAdapter.from_pretrained(out) if (out / "adapter_config.json").exists() else None
    if adapter is not None and adapter.editor != method:
        raise ConfigError(
            f"{out} holds an adapter of {adapter.editor!r}, which {method!r} cannot go on with; give another --out, or "
            f"--method {adapter.editor}"
        )
    return adapter


def _editor(
    out: Path, adapter: Adapter | None, method: str, model: EditableModel, given: Mapping[str, Any]
) -> Editor[Any]:
    """The editor of a method, going on with the adapter found in `out` if there is one.

    Raises:
        ConfigError: a setting that does not exist, or differs from the adapter's.
    """
    from errata.editors import editor_class

    cls = editor_class(method)
    if adapter is not None:
        _check_settings(adapter, cls.Config, model, given, out)
    made: Editor[Any] = cls(model, adapter=adapter) if adapter is not None else cls(model, **given)
    log(f"{model.model_id}: {method}, settings {made.config.source}")
    return made


@dataclass
class Writing:
    """What was written into an adapter, and by whom; the adapter is attached and saved.

    Attributes:
        record: counts, times, the guard's verdicts and provenance, as JSON.
    """

    editor: Editor[Any]
    guard: list[GuardRecord]
    record: dict[str, Any]

    def words(self) -> None:
        """What `errata edit` says about it."""
        from errata.editors.guard import guard_words

        made = self.record
        print(
            f"{made['edits_applied']} edits written with {made['method']}, {made['edits_took']} of them took on their "
            f"own prompt, {made['edits_refused']} refused"
        )
        print(f"{made['seconds_per_edit']:.3f} s per edit after {made['prepare_seconds']:.1f} s of preparation")
        for change in self.editor.adapter.layer_changes(self.editor.model):
            print(f"{change.module}: norm of change {change.norm:.4g}, {change.relative_norm:.2%} of the weight's")
        if self.guard:
            print(guard_words(self.guard))


def write_into(
    out: Path,
    adapter: Adapter | None,
    method: str,
    model: EditableModel,
    edits: Sequence[Edit],
    given: Mapping[str, Any],
    force: bool,
    progress: Progress,
) -> Writing:
    """Write what is missing of some edits into the adapter in `out`, and save it every hundred edits.

    Args:
        adapter: what `found_adapter` found there.
        given: settings of the method; the rest is derived, or gone on with as it is there.

    Raises:
        ConfigError: a setting that does not exist, or differs from the adapter's.
    """
    from errata.editors.guard import guard_summary
    from errata.evaluation import run_provenance

    editor = _editor(out, adapter, method, model, given)
    waiting = _waiting(edits, editor.adapter)
    if len(waiting) < len(edits):
        log(
            f"{out} holds {len(edits) - len(waiting)} of these edits already, or later ones in their place; "
            f"going on with the other {len(waiting)}"
        )
    applied, refused, seconds, prepare_seconds = 0, [], 0.0, 0.0
    took = 0
    guard: list[GuardRecord] = []
    step = max(_SAVE_EVERY, editor.config.batch_size)
    if waiting:
        needed = editor.memory_needed(waiting)
        log(needed.words())
        if not force:
            needed.check()
        prepare_seconds = editor.prepare(progress, force=force)
    for start in range(0, len(waiting), step):
        outcome = editor.edit(waiting[start : start + step], progress, force=force)
        applied, seconds = applied + len(outcome.applied), seconds + outcome.seconds
        took += sum(a.took for a in outcome.applied)
        refused += outcome.refused
        guard += outcome.guard
        for old, new in outcome.superseded:
            log(f"superseded: {old} by {new}")
        save_adapter(editor.adapter, out)
    if not waiting:
        save_adapter(editor.adapter, out)
    for one in refused:
        log(f"refused: {one.edit_id}: {one.reason}")
    record: dict[str, Any] = {
        "method": method,
        "model": model.model_id,
        "edits_applied": applied,
        "edits_refused": len(refused),
        "edits_held": len(editor.adapter.edits()),
        "edits_took": took,
        "seconds_per_edit": seconds / max(1, applied),
        "prepare_seconds": prepare_seconds,
        "memory_version": editor.adapter.memory_version,
        "guard": guard_summary(guard),
        "adapter": str(out),
        "provenance": run_provenance(model, editor.config),
    }
    return Writing(editor, guard, record)


def given_settings(settings: Sequence[str], batch_size: int | None, seed: int | None) -> dict[str, Any]:
    """Settings of the method from `--set` and the two that have options of their own."""
    given = parse_settings(settings)
    if batch_size is not None:
        given["batch_size"] = batch_size
    if seed is not None:
        given["seed"] = seed
    return given


def edit(
    model_name: str,
    method: str,
    edits_path: Path,
    limit: int | None,
    batch_size: int | None,
    seed: int | None,
    out: Path,
    settings: list[str],
    force: bool,
    strict: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    given = given_settings(settings, batch_size, seed)
    from errata.editors import editor_class

    editor_class(method)  # a method that does not exist is found before anything is read
    check_out(out)
    found = load_edits(edits_path, limit, strict)
    adapter = found_adapter(out, method)
    model = load_model(model_name, device, dtype)
    with progress_bar() as progress:
        written = write_into(out, adapter, method, model, found.edits, given, force, progress)
    record = {**written.record, "records_left_out": len(found.problems)}

    def words() -> None:
        written.words()
        print(f"adapter in {out}; next: errata evaluate --model {model_name} --adapter {out} --edits {edits_path}")

    emit(record, as_json, words)


def inject(
    model_name: str,
    text_path: Path,
    seed: int | None,
    out: Path,
    settings: list[str],
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    from errata.datasets.builtin import corpus_texts
    from errata.editors.memoryllm import MemoryLLM
    from errata.evaluation import run_provenance

    given = given_settings(settings, None, seed)
    adapter = found_adapter(out, MemoryLLM.name)
    texts = corpus_texts(text_path)
    editor = _editor(out, adapter, MemoryLLM.name, load_model(model_name, device, dtype), given)
    assert isinstance(editor, MemoryLLM)
    began = time.perf_counter()
    with progress_bar() as progress:
        done = editor.inject({f"{text_path.name}:{number}": text for number, text in enumerate(texts, 1)}, progress)
    seconds = time.perf_counter() - began
    save_adapter(editor.adapter, out)
    pool, updates = editor.adapter.pool, sum(one.updates for one in done)
    record = {
        "method": editor.name,
        "model": editor.model.model_id,
        "texts": len(done),
        "tokens": sum(one.tokens for one in done),
        "updates": updates,
        "updates_in_all": pool.updates,
        "slots": pool.slots,
        "new": pool.new,
        "seconds_per_update": seconds / updates,
        "memory_version": editor.adapter.memory_version,
        "adapter": str(out),
        "provenance": run_provenance(editor.model, editor.config),
    }

    def words() -> None:
        print(
            f"{len(done)} texts of {record['tokens']} tokens injected in {updates} updates, "
            f"{seconds / updates:.3f} s each; {pool.updates} updates in all"
        )
        print(
            f"each update replaces {pool.new} of {pool.slots} slots per layer; after {updates} more, "
            f"{pool.survival(updates):.0%} of what is there now is left"
        )
        print(f"adapter in {out}; next: errata generate --model {model_name} --adapter {out} PROMPT")

    emit(record, as_json, words)


def revert(
    model_name: str | None,
    adapter_path: Path,
    edit_ids: list[str],
    exact: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    from errata.adapters import AutoAdapter
    from errata.editors import editor_class

    adapter = AutoAdapter.from_pretrained(adapter_path)
    if exact:
        editor = editor_class(adapter.editor)(
            load_model(model_name or adapter.base.model_id, device, dtype), adapter=adapter
        )
        with progress_bar() as progress:
            results = editor.revert_exactly(edit_ids, progress)
        adapter = editor.adapter
    else:
        results = [adapter.revert(edit_id) for edit_id in edit_ids]
    save_adapter(adapter, adapter_path)
    record = {
        "adapter": str(adapter_path),
        "reverted": [vars(result) for result in results],
        "edits_held": len(adapter.edits()),
    }

    def words() -> None:
        for result in results:
            print(f"{result.edit_id} reverted, {result.exactness}: {result.reason}")
        print(f"{len(adapter.edits())} edits are left in {adapter_path}")
        if any(result.exactness == "approximate" for result in results):
            print("with --exact the others would have been written anew, as if these had never been made")

    emit(record, as_json, words)


def generate(
    model_name: str,
    adapter_path: Path | None,
    prompts: list[str],
    max_new_tokens: int,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    model = load_model(model_name, device, dtype)
    before = model.generate(prompts, max_new_tokens=max_new_tokens)
    adapter = load_adapter(adapter_path, model)
    after = before if adapter is None else model.generate(prompts, max_new_tokens=max_new_tokens)
    rows = [
        {"prompt": p, "before": b.strip(), "after": a.strip()} for p, b, a in zip(prompts, before, after, strict=True)
    ]
    record = {"model": model.model_id, "adapter": None if adapter is None else str(adapter_path), "generations": rows}

    def words() -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(show_lines=True)
        for column in ("prompt", "before", "after") if adapter is not None else ("prompt", "answer"):
            table.add_column(column, overflow="fold")
        for row in rows:
            cells = (
                (row["prompt"], row["before"], row["after"]) if adapter is not None else (row["prompt"], row["before"])
            )
            table.add_row(*plain(*cells))
        Console().print(table)

    emit(record, as_json, words)


def explain(
    model_name: str | None, adapter_path: Path, prompts: list[str], device: str | None, dtype: str | None, as_json: bool
) -> None:
    from errata.adapters import AutoAdapter

    adapter = AutoAdapter.from_pretrained(adapter_path)
    model = load_model(model_name or adapter.base.model_id, device, dtype)
    adapter.attach(model)
    edits = {e.id: e for e in adapter.edits()}
    rows = []
    for found in adapter.explain(prompts):
        nearest = edits.get(found.edit_id or "")
        rows.append(
            {
                **vars(found),
                "edit_prompt": nearest.prompt if nearest else None,
                "edit_target": nearest.target if nearest else None,
            }
        )
    record = {"adapter": str(adapter_path), "method": adapter.editor, "edits": len(edits), "explanations": rows}

    def words() -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(show_lines=True)
        for column in ("prompt", "fires", "score", "threshold", "nearest edit", "its target", "runner-up"):
            table.add_column(column, overflow="fold")
        for row in rows:
            second = "–" if row["runner_up"] is None else f"{row['runner_up']} ({row['runner_up_score']:.3f})"
            cells = (
                row["prompt"],
                "yes" if row["fires"] else "no",
                f"{row['score']:.3f}",
                f"{row['threshold']:.3f}",
                f"{row['edit_id'] or '–'}\n{row['edit_prompt'] or ''}",
                row["edit_target"] or "–",
                second,
            )
            table.add_row(*plain(*cells))
        Console().print(table)
        for row in rows:
            if row.get("mean_age") is not None:
                print(f"{row['prompt']}: what is read was written {row['mean_age']:.1f} updates ago, on average")
            if row.get("retrieved_mean_age") is not None:
                print(
                    f"{row['prompt']}: {row['retrieved'] / row['memory']:.0%} of it comes from the long-term store, "
                    f"written {row['retrieved_mean_age']:.1f} updates ago"
                )

    emit(record, as_json, words)
