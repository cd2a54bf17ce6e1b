"""`errata methods` and `errata doctor`: what there is, and what fits a model."""

from __future__ import annotations

import dataclasses
from typing import Any

from errata.cli.output import emit, plain

__all__ = ["doctor", "methods"]


def methods(as_json: bool) -> None:
    from errata.editors import editor_class, editor_names

    rows = []
    for name in editor_names():
        cls = editor_class(name)
        settings = {f.name: f.default for f in dataclasses.fields(cls.Config) if f.name != "source"}
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


def doctor(model_name: str, device: str | None, dtype: str | None, as_json: bool) -> None:
    from errata.cli.common import load_model
    from errata.editors import editor_class, editor_names
    from errata.errors import TailError

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

    emit(record, as_json, words)
