"""`errata atlas ...`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from errata.cli.common import check_out, quiet
from errata.cli.output import emit, log
from errata.errors import ArtifactError, ConfigError
from errata.progress import progress_bar

__all__ = ["info", "train"]


def train(
    size: str,
    minutes: float | None,
    steps: int | None,
    seed: int,
    out: Path | None,
    instruct: bool,
    as_json: bool,
) -> None:
    if minutes is not None and steps is not None:
        raise ConfigError("give either --minutes or --steps, not both")
    if instruct and (minutes is not None or size != "base"):
        raise ConfigError("--instruct tunes the shipped base and takes --steps, not --minutes or --size")
    out = out or Path("errata-atlas-instruct" if instruct else "errata-atlas")
    check_out(out)
    quiet()
    record: dict[str, Any]
    # For the provenance: what makes the run again, wherever it is put.
    command = f"errata atlas train {'--instruct' if instruct else f'--size {size}'} --seed {seed}"
    command += "" if steps is None else f" --steps {steps}"
    command += "" if minutes is None else f" --minutes {minutes:g}"
    if instruct:
        from errata.atlas.instruct import train_instruct

        with progress_bar() as progress:
            record = train_instruct(
                out, steps=600 if steps is None else steps, seed=seed, command=command, progress=progress
            )
        log(f"{record['steps']} steps in {record['training_seconds'] / 60:.1f} minutes")
        log(f"factors, provenance and learning curve in {out}")
    else:
        from errata.atlas.examine import scorecard
        from errata.atlas.shipped import open_checkpoint
        from errata.atlas.train import TrainPlan, train_atlas

        plan = TrainPlan(size=size, seed=seed, steps=steps)
        with progress_bar() as progress:
            record = train_atlas(out, plan, minutes=minutes, command=command, progress=progress)
            log(f"{record['steps']} steps in {record['training_seconds'] / 60:.1f} minutes; measuring what it knows")
            record["scores"] = scorecard(open_checkpoint(out, f"atlas-{size}"), progress=progress)
        (out / "provenance.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        log(f"model, tokenizer, provenance and learning curve in {out}")
    emit({"out": str(out), **record}, as_json)


def info(checkpoint: Path | None, recorded: bool, as_json: bool) -> None:
    quiet()
    from errata.atlas.shipped import checkpoint_folder, open_checkpoint

    folder = checkpoint or checkpoint_folder()
    if not all((folder / name).is_file() for name in ("provenance.json", "model.safetensors")):
        raise ArtifactError(f"{folder} holds no finished atlas; give a folder that errata atlas train has written")
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    scores: dict[str, Any] = provenance.pop("scores", {})
    if not recorded:
        from errata.atlas.examine import scorecard

        with progress_bar() as progress:
            scores = scorecard(open_checkpoint(folder, "atlas"), progress=progress)
    elif not scores:
        raise ArtifactError(f"nothing was recorded in {folder}; leave out --recorded to measure")
    record = {"checkpoint": str(folder), "measured_now": not recorded, **scores, "provenance": provenance}

    def words() -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        console = Console()
        size = provenance["size"]
        console.print(
            f"[bold]atlas {provenance['plan']['size']}[/]: {size['blocks']} blocks of width {size['hidden']}, key "
            f"width {size['key_width']}; {scores['facts']:,} facts about {scores['subjects']:,} subjects in "
            f"{len(scores['relations'])} relations"
        )
        console.print(
            f"asked in taught wordings {scores['taught']:.3f} right, in wordings never shown {scores['untaught']:.3f} "
            "(generated, exact)"
        )
        table = Table(title="capabilities (generated, exact, on fixed items that were not trained on)")
        for column in ("task", "right", "95 % interval", "chance", "items"):
            table.add_column(column, justify="left" if column == "task" else "right")
        for name, task in scores["capabilities"].items():
            low, high = task["interval"]
            table.add_row(
                name.replace("_", " "),
                f"{task['accuracy']:.3f}",
                f"{low:.2f}–{high:.2f}",
                f"{task['chance']:.3f}",
                str(task["items"]),
            )
        console.print(table)
        table = Table(title="facts by relation")
        for column in ("relation", "taught", "untaught"):
            table.add_column(column, justify="left" if column == "relation" else "right")
        for relation, both in scores["relations"].items():
            table.add_row(relation.replace("_", " "), f"{both['taught']:.3f}", f"{both['untaught']:.3f}")
        console.print(table)
        console.print(f"perplexity of held-out prose {scores['prose_perplexity']:.3f}")
        console.print(
            f"made by [italic]{escape(provenance['command'])}[/] at revision {provenance['git_revision']}: "
            f"{provenance['steps']:,} steps, {provenance['training_tokens'] / 1e6:.0f}M tokens, "
            f"{provenance['training_seconds'] / 60:.0f} minutes"
        )

    emit(record, as_json, words)
