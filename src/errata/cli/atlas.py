"""`errata atlas ...`"""

from __future__ import annotations

from pathlib import Path

from errata.cli.output import emit, log
from errata.errors import ConfigError
from errata.progress import progress_bar

__all__ = ["train"]


def train(
    size: str,
    minutes: float | None,
    steps: int | None,
    seed: int,
    out: Path,
    as_json: bool,
    command: str,
) -> None:
    if minutes is not None and steps is not None:
        raise ConfigError("give either --minutes or --steps, not both")
    from errata.atlas.train import TrainPlan, train_atlas

    plan = TrainPlan(size=size, seed=seed, steps=steps)
    with progress_bar() as progress:
        record = train_atlas(out, plan, minutes=minutes, command=command, progress=progress)
    log(
        f"{record['steps']} steps in {record['training_seconds'] / 60:.1f} minutes; model, provenance and learning curve in {out}"
    )
    emit({"out": str(out), **record}, as_json)
