"""`errata train METHOD`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from errata.cli.common import check_out, load_edits, load_model, parse_settings, this_command
from errata.cli.output import emit, log
from errata.errors import ConfigError
from errata.progress import progress_bar

__all__ = ["train"]


def train(
    method: str,
    model_name: str,
    edits_path: Path | None,
    limit: int | None,
    out: Path | None,
    minutes: float | None,
    seed: int | None,
    settings: list[str],
    strict: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    given = parse_settings(settings)
    if seed is not None:
        given["seed"] = seed
    from errata.editors import editor_class, editor_names
    from errata.editors.training import TrainedEditor, TrainingData, built_in_training_data

    cls = editor_class(method)
    if not issubclass(cls, TrainedEditor):
        trained = [name for name in editor_names() if issubclass(editor_class(name), TrainedEditor)]
        raise ConfigError(f"{method} needs no training; methods that do: {', '.join(trained)}")
    folder = out or Path(f"errata-{method}")
    check_out(folder)
    if edits_path is None and limit is not None:
        raise ConfigError("--limit belongs to --edits; the built-in edits are taken whole")
    edits = None if edits_path is None else load_edits(edits_path, limit, strict).edits
    model = load_model(model_name, device, dtype)
    config = cls.Training.for_model(model, **given)
    data = built_in_training_data(config) if edits is None else TrainingData.of(edits, str(edits_path), config)
    log(f"{model.model_id}: training {method} on {len(data.training):,} edits of {data.source}")
    log(f"settings: {config.source}; at most {config.steps:,} steps of {config.batch_size} edits")
    with progress_bar() as progress:
        record: dict[str, Any] = cls.train(
            model, data, folder, config, minutes=minutes, command=this_command(), progress=progress
        )

    def words() -> None:
        best = record["validation"]
        print(f"{record['steps']:,} steps in {record['training_seconds'] / 60:.1f} minutes")
        print(f"on {record['data']['validation']} edits about other subjects:")
        for name, value in record["validation_before"].items():
            print(f"  {name} {value:.4f} before, now {best[name]:.4f}")
        if not record["finished"]:
            print("the same command, with more --minutes, goes on")
        print(f"network in {folder}; next: errata edit --method {method} --set network={folder} --model {model_name}")

    emit({"method": method, "out": str(folder), **record}, as_json, words)
