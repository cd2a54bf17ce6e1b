"""`errata export`: an adapter as files that other programs load."""

from __future__ import annotations

from pathlib import Path

from errata.cli.common import check_out, load_model
from errata.cli.output import emit

__all__ = ["export"]


def export(
    adapter_path: Path,
    form: str,
    out: Path,
    model_name: str | None,
    rank: int | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    from errata.adapters import AutoAdapter
    from errata.adapters.export import check_export, export_adapter

    check_out(out)
    adapter = AutoAdapter.from_pretrained(adapter_path)
    check_export(adapter, form, out, rank)  # before a model is loaded for nothing
    model = load_model(model_name or adapter.base.model_id, device, dtype)
    exported = export_adapter(adapter, model, form, out, rank=rank)
    record = {
        **exported.to_record(),
        "adapter": str(adapter_path),
        "model": model.model_id,
        "edits": len(adapter.edits()),
    }

    def words() -> None:
        print(f"{len(adapter.edits())} edits of {adapter.editor}, exported as {form} to {out}:")
        for module in exported.modules:
            rank = "dense" if module.rank is None else f"rank {module.rank}"
            print(f"{module.module}: {rank}, relative error {module.relative_error:.2g}")
        print(f"how to load it: {out / 'README.md'}")

    emit(record, as_json, words)
