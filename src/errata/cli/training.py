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
    texts_path: Path | None,
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
    from errata.datasets.builtin import corpus_texts
    from errata.editors import editor_class, editor_names
    from errata.editors.training import Material, TrainedEditor

    cls = editor_class(method)
    if not issubclass(cls, TrainedEditor):
        trained = [name for name in editor_names() if issubclass(editor_class(name), TrainedEditor)]
        raise ConfigError(f"{method} needs no training; methods that do: {', '.join(trained)}")
    folder = out or Path(f"errata-{method}")
    check_out(folder)
    if edits_path is None and limit is not None:
        raise ConfigError("--limit belongs to --edits; what is built in is taken whole")
    if edits_path is not None and texts_path is not None:
        raise ConfigError("give --edits or --texts, whichever the method is trained on, not both")
    edits = None if edits_path is None else load_edits(edits_path, limit, strict).edits
    texts = None if texts_path is None else corpus_texts(texts_path)
    model = load_model(model_name, device, dtype)
    config = cls.Training.for_model(model, **given)
    data: Material
    if texts is not None:
        data = cls.data_of_texts(texts, str(texts_path), config)
    elif edits is not None:
        data = cls.data_of_edits(edits, str(edits_path), config)
    else:
        data = cls.built_in_data(config)
    log(f"{model.model_id}: training {method} on {data.size:,} examples: {data.source}")
    log(f"settings: {config.source}; at most {config.steps:,} steps of {config.batch_size} examples")
    with progress_bar() as progress:
        record: dict[str, Any] = cls.train(
            model, data, folder, config, minutes=minutes, command=this_command(), progress=progress
        )

    def words() -> None:
        best = record["validation"]
        print(f"{record['steps']:,} steps in {record['training_seconds'] / 60:.1f} minutes")
        print(f"on {record['data']['validation']} examples that were held out:")
        for name, value in record["validation_before"].items():
            print(f"  {name} {value:.4f} before, now {best[name]:.4f}")
        if not record["finished"]:
            print("the same command, with more --minutes, goes on")
        print(f"network in {folder}; next: errata edit --method {method} --set network={folder} --model {model_name}")

    emit({"method": method, "out": str(folder), **record}, as_json, words)
