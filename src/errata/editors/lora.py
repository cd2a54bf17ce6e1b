"""LoRA: low-rank factors beside attention or MLP projections, trained on the target by peft's own layers.

A plain LoRA (Hu et al. 2022, 2106.09685): W + (α / r) B A with B = 0 at first, cross-entropy on the target tokens, the
prompt masked, until the loss is below `stop_loss`. peft's layers stand in the model only while a batch is trained; the
factors stay, as a change of weight beside the base model, so each batch can be subtracted and all of it detached.

What we do differently from EasyEdit's `lora`: it is AdaLoRA there by default, whose ranks are never allocated, one
adapter is trained on for all edits, dropout makes each of them random, and it does not stop.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from errata.adapters import DeltaAdapter, WeightChange
from errata.edit import Edit
from errata.editors.base import Editor, EditorConfig, Written
from errata.editors.layers import shape_key
from errata.editors.losses import target_loss
from errata.editors.memory import MemoryPart
from errata.errors import ConfigError
from errata.model import EditableModel
from errata.model.anatomy import is_linear
from errata.model.edited_linear import EditedLinear
from errata.progress import Progress

__all__ = ["Lora", "LoraConfig"]

_ADAPTER = "errata"
_PUBLISHED: dict[tuple[str, int, int], dict[str, Any]] = {
    ("llama", 32, 4096): {"source": "EasyEdit LoRA for Llama, without dropout"},
    ("mistral", 32, 4096): {"source": "EasyEdit LoRA for Mistral, without dropout"},
    ("gpt2", 48, 1600): {"steps": 30, "source": "EasyEdit LoRA for GPT-2 XL, without dropout"},
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig(EditorConfig):
    """Settings of LoRA.

    Attributes:
        targets: "attention" are the projections that peft chooses for this architecture (queries and values, or the
            fused one), or all that read the residual stream where it knows none; "mlp" the MLP output projections.
        layers: blocks; none given means all.
        rank: r; alpha: α.
        learning_rate, steps, weight_decay: of Adam, started anew for each batch.
        stop_loss: no further step once the loss is below this.
    """

    targets: Literal["attention", "mlp"] = "attention"
    layers: tuple[int, ...] = ()
    rank: int = 8
    alpha: int = 32
    learning_rate: float = 5e-3
    steps: int = 70
    weight_decay: float = 0.0
    stop_loss: float = 1e-2

    adjustable: ClassVar[frozenset[str]] = EditorConfig.adjustable | {"alpha", "rank"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.learning_rate <= 0 or self.rank < 1 or self.alpha <= 0:
            raise ConfigError("lora needs at least one step, rank 1, and a positive alpha and learning rate")

    @classmethod
    def published(cls, model: EditableModel) -> dict[str, Any] | None:
        return _PUBLISHED.get(shape_key(model))

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        return {
            "targets": "mlp",
            "learning_rate": 1e-3,
            "source": "EasyEdit LoRA for Llama, on MLP output projections and more gently: docs/methods/lora.md",
        }


class Lora(Editor[LoraConfig]):
    """Fine-tunes low-rank factors of many projections on each edit's target."""

    name = "lora"
    summary = "fine-tune low-rank factors beside attention or MLP projections (needs peft)"
    paper = "LoRA, 2106.09685; as an editor, EasyEdit, 2308.07269"
    Config = LoraConfig
    edits_encoders = True
    writes_jointly = True

    @classmethod
    def unsuitable(cls, model: EditableModel) -> str | None:
        if importlib.util.find_spec("peft") is None:
            return "its layers are those of peft, which is not installed: pip install 'errata[peft]'"
        return super().unsuitable(model)

    def _new_adapter(self) -> DeltaAdapter:
        paths = _targets(self.model, self.config)
        return DeltaAdapter.for_layers(self.model, paths, self.name, self.config.to_record())

    def _memory_to_write(self, edits: Sequence[Edit]) -> list[MemoryPart]:
        batches = -(-len(edits) // self.config.batch_size)
        return [self._backward_pass(edits, self.model.layer_count), *self._memory_of_changes(batches, self.config.rank)]

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        model, config = self.model, self.config
        assert isinstance(self.adapter, DeltaAdapter)
        batch = model.batch([model.passage(edit.prompt, edit.target) for edit in edits], side="right")
        rows, columns, labels = batch.answer_places()
        head = model.head
        # What the adapter holds decides what its next batch begins with, whenever it is written.
        seed = config.seed + self.adapter.memory_version
        taken = 0
        with _lora_layers(model, list(self.adapter.contributions()), config, seed) as layers:
            factors = [weight for layer in layers.values() for weight in (layer.inner, layer.outer)]
            optimizer = torch.optim.Adam(factors, lr=config.learning_rate, weight_decay=config.weight_decay)
            for _ in range(config.steps):
                states = model.answer_states(batch)
                logits = head(states[rows.to(states.device), columns.to(states.device)])
                loss = target_loss(logits, labels, rows, len(edits))
                if loss.item() < config.stop_loss:
                    break
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                taken += 1
        ids = tuple(edit.id for edit in edits)
        changes = [
            WeightChange(path, ids, (layer.scaling * layer.outer).detach().cpu(), layer.inner.detach().cpu().T.clone())
            for path, layer in layers.items()
        ]
        self.adapter.add(self.adapter.measured(changes, [edit.prompt for edit in edits], model))
        return Written((taken,) * len(edits))


def _targets(model: EditableModel, config: LoraConfig) -> list[str]:
    """Paths of the projections to be changed."""
    anatomy = model.anatomy
    layers = sorted({anatomy.layer(layer) for layer in config.layers or range(model.layer_count)})
    if config.targets == "mlp":
        return [anatomy.mlp_output[layer] for layer in layers]
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICES

    chosen = CHOICES.get(model.model.config.get_text_config().model_type, ())
    found = []
    for layer in layers:
        attention = anatomy.attention_output[layer].rpartition(".")[0]
        reading = [
            (name, f"{attention}.{name}")
            for name, module in model.module(attention).named_modules()
            if is_linear(module) and f"{attention}.{name}" != anatomy.attention_output[layer]
        ]
        found += [path for name, path in reading if name in chosen] or [path for _, path in reading]
    return found


@dataclass(frozen=True)
class _LoraLayer:
    """What is trained of one of peft's layers.

    Attributes:
        inner: A, [r, inputs]; outer: B, [outputs, r]; scaling: α / r.
    """

    inner: Tensor
    outer: Tensor
    scaling: float


@contextmanager
def _lora_layers(
    model: EditableModel, paths: Sequence[str], config: LoraConfig, seed: int
) -> Iterator[dict[str, _LoraLayer]]:
    """A context in which peft's layers stand around the named ones; then the model is what it was, module by module."""
    import peft

    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=list(paths))
    # An adapter of errata covers each of them, so that is what peft finds there.
    settings._register_custom_module({EditedLinear: peft.tuners.lora.Linear})
    whole = model.model
    before = {path: model.module(path) for path in paths}
    trained = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():  # peft warns of every type of layer that is not one of its own
                warnings.filterwarnings("ignore", "Unsupported layer type")
                peft.inject_adapter_in_model(settings, whole, _ADAPTER)
            found = {path: _layer(model.module(path)) for path in paths}
            yield found
        finally:
            for path, module in before.items():
                parent, _, name = path.rpartition(".")
                setattr(model.module(parent), name, module)
            for parameter in trained:
                parameter.requires_grad_(True)
            if hasattr(whole, "peft_config"):
                del whole.peft_config


def _layer(module: nn.Module) -> _LoraLayer:
    parts: Any = module
    for part in (parts.lora_A[_ADAPTER], parts.lora_B[_ADAPTER]):
        part.float()  # in half precision, steps of Adam are lost
    return _LoraLayer(parts.lora_A[_ADAPTER].weight, parts.lora_B[_ADAPTER].weight, parts.scaling[_ADAPTER])
