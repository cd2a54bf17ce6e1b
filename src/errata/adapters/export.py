"""Leaving errata: an adapter's change of weights as files that other programs load.

* **merged**: a Hugging Face checkpoint of the edited model, with its tokenizer, for `from_pretrained` of transformers;
* **lora**: an adapter as PEFT saves it, for `peft` and what reads its files, such as vLLM. With ΔW = left rightᵀ of all
  edits side by side, B = left and A = rightᵀ, scaled by 1 (LoRA, 2106.09685, section 4.1): nothing is lost. Where a
  change is dense or its rank is to be smaller, the nearest of that rank (Eckart and Young 1936), and how far it is off;
* **patch**: the changes alone, one safetensors file, to be added to the parameters it names.

What answers each prompt by itself, because a router decides, is no change of weights: it is refused with the reason.

Knows adapters, models and these formats. Needs none of the programs that will read them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from errata import __version__
from errata.adapters.base import Adapter
from errata.adapters.delta import DeltaAdapter
from errata.atlas.shipped import ATLAS_NAMES
from errata.errors import ConfigError, unknown_name
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.model.editable import auto_class

__all__ = ["PATCH_FILE", "Exported", "ExportedModule", "check_export", "export_adapter"]

PATCH_FILE = "errata_patch.safetensors"

# A dense change has no rank of its own. This one is small beside any model, and common servers take it.
_DENSE_RANK = 64

_INSTEAD = (
    "The folder of the adapter is what to hand on: errata attaches it anywhere, with its base model. For a plain "
    "checkpoint write the same edits with a method that changes weights, which answers prompts without being asked "
    "whether they match: errata edit --edits ADAPTER/edits.jsonl --method METHOD; errata methods lists them"
)
_ROUTED = {
    "routed": "which of its columns are read is decided for each prompt by what it has in common with the edits' own "
    "prompts; added to the weight, all columns would act on everything",
    "keyed": "each edit has a content of its own that acts where a prompt comes near its key; without keys and radii "
    "there is nothing that could say where",
    "wise": "a side memory answers only prompts that would change it enough, and the base model all others. Merging "
    "joins side memories with one another, not with the base: as weights, a side memory would answer everything",
}


@dataclass(frozen=True)
class ExportedModule:
    """One changed layer.

    Attributes:
        rank: of the factors that were written, None where the change was written whole.
        relative_error: norm of what was left out over the norm of the change; in a merged checkpoint by rounding to
            the model's precision.
    """

    module: str
    rank: int | None
    relative_error: float


@dataclass(frozen=True)
class Exported:
    """What was written, and where."""

    format: str
    folder: Path
    files: tuple[str, ...]
    modules: tuple[ExportedModule, ...]

    def to_record(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


def check_export(adapter: Adapter, form: str, folder: Path, rank: int | None = None) -> None:
    """What can be known before the base model is loaded.

    Raises:
        ConfigError: the adapter is no change of weights, the folder holds something, or the options do not fit.
    """
    if form not in _WRITERS:
        raise ConfigError(unknown_name("format", form, _WRITERS))
    if not adapter.changes_weights or any(one.is_routed for one in adapter.contributions().values()):
        why = _ROUTED.get(adapter.adapter_type, "a router decides for each prompt whether it acts")
        raise ConfigError(
            f"an adapter of {adapter.editor or adapter.adapter_type!r} is no change of weights: {why}. {_INSTEAD}"
        )
    if rank is not None and (form != "lora" or rank < 1):
        raise ConfigError(f"rank {rank} does not fit: only the format lora takes a rank, of at least 1")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder, and nothing is overwritten; give another one")


def export_adapter(
    adapter: Adapter, model: EditableModel, form: str, folder: str | Path, *, rank: int | None = None
) -> Exported:
    """Write an adapter so that it can be used without errata, with a README that says how.

    Args:
        model: its base; whatever is attached to it makes no difference.
        form: "merged", "lora" or "patch".
        folder: must be empty, or not exist.
        rank: for "lora", the largest of any layer; if not given, what the change needs, or 64 where it is dense.

    Raises:
        ConfigError: see `check_export`; or there is nothing to export, or a merged weight would change another too.
        BaseMismatchError: the model is not the adapter's base.
    """
    folder = Path(folder)
    check_export(adapter, form, folder, rank)
    adapter.check_base(model)
    changes = _changes(adapter, model)
    if not changes:
        raise ConfigError("this adapter changes no weight yet, so there is nothing to export; write edits first")
    folder.mkdir(parents=True, exist_ok=True)
    modules = _WRITERS[form](changes, adapter, model, folder, rank)
    (folder / "README.md").write_text(_read_me(form, modules, adapter, model), encoding="utf-8")
    return Exported(form, folder, tuple(sorted(path.name for path in folder.iterdir())), tuple(modules))


@dataclass(frozen=True)
class _Change:
    """What an adapter adds to one layer.

    Attributes:
        layer: the layer in the model; total: [outputs, inputs], float32.
        factors: left [outputs, rank] and right [inputs, rank] with left @ rightᵀ = total, None where there are none.
    """

    path: str
    layer: nn.Module
    total: Tensor
    factors: tuple[Tensor, Tensor] | None

    @property
    def parameter(self) -> str:
        return f"{self.path}.weight"

    def within(self, rank: int | None) -> tuple[Tensor, Tensor, float]:
        """Factors of at most a rank, None for what the change needs, and the relative error (Eckart and Young 1936)."""
        most = min(self.total.shape)
        if self.factors is None:
            rank = min(rank or _DENSE_RANK, most)
            left, values, right = torch.linalg.svd(self.total, full_matrices=False)
        else:
            rank = min(rank or most, most)
            if self.factors[0].shape[1] <= rank:
                return *self.factors, 0.0
            # All that the product of two thin matrices has is in the product of their small triangles.
            outer, inner = (torch.linalg.qr(factor.double()) for factor in self.factors)
            left, values, right = torch.linalg.svd(outer.R @ inner.R.T, full_matrices=False)
            left, right = outer.Q @ left, right @ inner.Q.T
        error = float(values[rank:].norm() / values.norm())
        return (left[:, :rank] * values[:rank]).float(), right[:rank].T.float(), error


def _changes(adapter: Adapter, model: EditableModel) -> list[_Change]:
    """The layers that an adapter changes."""
    found = []
    for path, contribution in adapter.contributions().items():
        total = contribution.weight_change()
        if total is not None and bool(total.any()):
            factors = adapter.factors(path) if isinstance(adapter, DeltaAdapter) else None
            found.append(_Change(path, model.module(path), total, factors))
    return found


def _write_merged(
    changes: Sequence[_Change], adapter: Adapter, model: EditableModel, folder: Path, rank: int | None
) -> list[ExportedModule]:
    state = model.model.state_dict()
    modules = []
    for change in changes:
        base = weight_of(change.layer)
        sharing = [n for n, t in state.items() if n != change.parameter and t.data_ptr() == base.data_ptr()]
        if sharing:
            raise ConfigError(
                f"{change.parameter} is tied to {', '.join(sharing)}, so a merged checkpoint would change both where "
                "the adapter changes one; export it as lora or patch"
            )
        total = change.total.to(base.device)
        merged = (base.float() + total).to(base.dtype)
        lost = float((merged.double() - base.double() - total.double()).norm() / total.double().norm())
        state[change.parameter] = _as_stored(change.layer, merged)
        modules.append(ExportedModule(change.path, None, lost))
    model.model.save_pretrained(folder, state_dict=state)
    model.tokenizer.save_pretrained(folder)
    return modules


def _as_stored(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight [outputs, inputs] as the layer's own parameter stands: Conv1D has it transposed."""
    return (weight.t() if _is_transposed(layer) else weight).contiguous()


def _is_transposed(layer: nn.Module) -> bool:
    return weight_of(layer) is not layer.weight


def _write_lora(
    changes: Sequence[_Change], adapter: Adapter, model: EditableModel, folder: Path, rank: int | None
) -> list[ExportedModule]:
    tensors, modules, ranks = {}, [], {}
    for change in changes:
        left, right, error = change.within(rank)
        name = f"base_model.model.{change.path}"
        tensors[f"{name}.lora_A.weight"] = right.T.contiguous()
        tensors[f"{name}.lora_B.weight"] = left.contiguous()
        ranks[change.path] = left.shape[1]
        modules.append(ExportedModule(change.path, ranks[change.path], error))
    largest = max(ranks.values())
    # Scaled by alpha / r = 1 everywhere. Whoever reads no patterns still scales by 1.
    others = {path: own for path, own in ranks.items() if own != largest}
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if model.is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": model.model_id,
        "revision": model.revision,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
        "fan_in_fan_out": any(_is_transposed(change.layer) for change in changes),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return modules


def _write_patch(
    changes: Sequence[_Change], adapter: Adapter, model: EditableModel, folder: Path, rank: int | None
) -> list[ExportedModule]:
    tensors, modules = {}, []
    for change in changes:
        factors = change.factors
        if factors is not None and sum(factor.numel() for factor in factors) < change.total.numel():
            # The transpose of left @ rightᵀ is right @ leftᵀ.
            left, right = reversed(factors) if _is_transposed(change.layer) else factors
            tensors[f"{change.parameter}.left"] = left.contiguous()
            tensors[f"{change.parameter}.right"] = right.T.contiguous()
        else:
            factors = None
            tensors[f"{change.parameter}.dense"] = _as_stored(change.layer, change.total)
        modules.append(ExportedModule(change.path, None if factors is None else factors[0].shape[1], 0.0))
    metadata = {
        "format": "pt",
        "errata_patch": "1",
        "errata_version": __version__,
        "base_model": adapter.base.model_id,
        "base_revision": adapter.base.revision or "",
        "base_fingerprint": adapter.base.fingerprint,
        "editor": adapter.editor,
        "edits": str(len(adapter.edits())),
        "apply": "parameter += left @ right, or parameter += dense; sum in float32 and round once",
    }
    save_file(tensors, folder / PATCH_FILE, metadata=metadata)
    return modules


_Writer = Callable[[Sequence[_Change], Adapter, EditableModel, Path, "int | None"], list[ExportedModule]]
_WRITERS: dict[str, _Writer] = {"merged": _write_merged, "lora": _write_lora, "patch": _write_patch}


_LOAD = {
    "merged": """from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained(".", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(".")
""",
    "lora": """from peft import PeftModel
{imports}

model = PeftModel.from_pretrained({base}, ".")
""",
    "patch": """import torch
from safetensors.torch import load_file
{imports}

model, patch = {base}, load_file("{file}")
with torch.no_grad():
    for name in sorted({{key.rpartition(".")[0] for key in patch}}):
        change = patch[name + ".dense"] if name + ".dense" in patch else patch[name + ".left"] @ patch[name + ".right"]
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.float() + change.to(parameter.device))
""",
}


def _read_me(form: str, modules: Sequence[ExportedModule], adapter: Adapter, model: EditableModel) -> str:
    """What the folder holds and how it is loaded, in the current directory."""
    auto = auto_class(model.model.config).__name__
    imports, base = f"from transformers import {auto}", f'{auto}.from_pretrained("{model.model_id}", dtype="auto")'
    if model.model_id in ATLAS_NAMES:  # comes with errata, and stands nowhere else
        imports, base = "from errata import EditableModel", f'EditableModel.load("{model.model_id}").model'
    rows = [f"| {m.module} | {'dense' if m.rank is None else m.rank} | {m.relative_error:.2g} |" for m in modules]
    lines = [
        f"# {len(adapter.edits())} edits of {adapter.base.model_id}",
        "",
        f"Written with the method `{adapter.editor}` of errata {__version__}, exported as `{form}`. Base model: "
        f"{adapter.base.model_id}, revision {adapter.base.revision or 'not recorded'}, fingerprint of its weights "
        f"{adapter.base.fingerprint}.",
        "",
        "| module | rank | relative error |",
        "|---|---|---|",
        *rows,
        "",
        "```python",
        _LOAD[form].format(auto=auto, imports=imports, base=base, file=PATCH_FILE).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"
