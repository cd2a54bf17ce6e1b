"""`errata methods` and `errata doctor`: what there is, and what fits a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.output import emit, plain
from errata.errors import ConfigError

if TYPE_CHECKING:
    from errata.model import EditableModel
    from errata.model.trace import CausalTrace

__all__ = ["doctor", "methods"]


def methods(as_json: bool) -> None:
    from errata.editors import editor_class, editor_names

    rows = []
    for name in editor_names():
        cls = editor_class(name)
        settings = {
            field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            for field in dataclasses.fields(cls.Config)
            if field.name != "source"
        }
        rows.append(
            {
                "name": name,
                "summary": cls.summary,
                "paper": cls.paper,
                "needs_subject": cls.needs_subject,
                "settings": settings,
            }
        )

    def words() -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(show_lines=True)
        for column in ("method", "what it does", "paper", "needs subject", "settings (--set name=value)"):
            table.add_column(column, overflow="fold")
        for row in rows:
            settings = ", ".join(row["settings"])
            needs = "yes" if row["needs_subject"] else "no"
            table.add_row(*plain(row["name"], row["summary"], row["paper"], needs, settings))
        Console().print(table)

    emit({"methods": rows}, as_json, words)


def _traced(model: EditableModel, data: Path | None, facts: int, figure: Path | None) -> CausalTrace:
    """Trace facts of a file or of atlas's world, and draw what was found."""
    from errata.atlas.edits import world_edits
    from errata.cli.common import load_edits
    from errata.evaluation.figures import save_figure, trace_figure
    from errata.model.trace import causal_trace
    from errata.progress import progress_bar

    edits = world_edits(facts) if data is None else load_edits(data, facts, strict=False).edits
    with progress_bar() as progress:
        found = causal_trace(model, edits, progress=progress)
    if figure is not None:
        save_figure(trace_figure(found.to_record()), figure)
    return found


def _show_trace(found: CausalTrace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"indirect effects of states on the answers of {found.known} facts (of {found.asked} asked)")
    names = [(place, kind) for place, kinds in found.effects.items() for kind in kinds]
    for name in ("layer", *(f"{place}: {kind}" for place, kind in names)):
        table.add_column(name, justify="right", overflow="fold")
    for layer in range(len(found.effects[names[0][0]][names[0][1]])):
        table.add_row(str(layer), *(f"{found.effects[place][kind][layer]:.3f}" for place, kind in names))
    Console().print(table)
    print(f"probability of the answer: {found.clean:.3f}, {found.corrupted:.3f} with noise on the subject")
    print(f"MLPs look subjects up in layer {found.layer}, with at least half of its effect in {list(found.layers)}")


def doctor(
    model_name: str,
    trace: bool,
    data: Path | None,
    facts: int,
    figure: Path | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    from errata.cli.common import load_model
    from errata.editors import editor_class, editor_names
    from errata.errors import TailError

    if not trace and (data or figure):
        raise ConfigError("--data and --figure belong to the causal trace; add --trace")
    model = load_model(model_name, device, dtype)
    anatomy = model.anatomy
    problems = []
    try:
        _ = model.head
    except TailError as error:
        problems.append(str(error))
    suited: dict[str, Any] = {}
    for name in editor_names():
        cls = editor_class(name)
        reason = cls.unsuitable(model)
        if reason is None and problems:
            reason = problems[0]
        config = None if reason else cls.Config.for_model(model)
        suited[name] = {
            "can": reason is None,
            "why_not": reason,
            "settings_from": None if config is None else config.source,
            "settings": None if config is None else {k: v for k, v in config.to_record().items() if k != "source"},
        }
    parameters = sum(p.numel() for p in model.model.parameters())
    traced = _traced(model, data, facts, figure) if trace else None
    record = {
        "model": model.model_id,
        "class": type(model.model).__name__,
        "architecture": model.architecture,
        "parameters": parameters,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "fingerprint": model.fingerprint,
        "tokenizer": {
            "class": type(model.tokenizer).__name__,
            "fast": bool(getattr(model.tokenizer, "is_fast", False)),
            "beginning_token": model.tokenizer.bos_token,
            "chat_template": bool(getattr(model.tokenizer, "chat_template", None)),
        },
        "anatomy": {
            "blocks": len(anatomy.blocks),
            "hidden_size": anatomy.hidden_size,
            "key_width": anatomy.key_width[0],
            "trunk": anatomy.trunk,
            "first_block": anatomy.blocks[0],
            "mlp_output": anatomy.mlp_output[0],
            "attention_output": anatomy.attention_output[0],
            "final_norm": anatomy.final_norm,
            "head": anatomy.head,
        },
        "problems": problems,
        "methods": suited,
        "trace": None if traced is None else traced.to_record(),
    }

    def words() -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        title = f"{record['model']}: {record['class']}, {parameters / 1e6:.1f}M parameters, {record['dtype']}"
        table = Table(title=Text(title), show_header=False)
        for key, value in {
            **record["anatomy"],
            **{f"tokenizer: {k}": v for k, v in record["tokenizer"].items()},
        }.items():
            table.add_row(*plain(key.replace("_", " "), str(value)))
        console.print(table)
        fits = Table(title="methods")
        for column in ("method", "fits", "settings from, or why not"):
            fits.add_column(column, overflow="fold")
        for name, found in suited.items():
            fits.add_row(*plain(name, "yes" if found["can"] else "no", found["settings_from"] or found["why_not"]))
        console.print(fits)
        if traced is not None:
            _show_trace(traced)

    emit(record, as_json, words)
