"""What editors share whose edits are found by the distance of their keys (`routing.distance`): GRACE and its kin.

Each edit has a key, the edited layer's input at the end of its prompt, and a content of its own, trained through the
tail of the model on its target alone. The first radius of a ball depends on the model's activations and on its layer;
it is measured in `prepare()`.
"""

from __future__ import annotations

import abc
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.adapters import BaseIdentity, KeyedAdapter, RoutedLayer
from errata.adapters.codebook import EntryMemory
from errata.datasets.builtin import paraphrase_sets
from errata.edit import Edit
from errata.editors.base import Editor, EditorConfig, Written
from errata.editors.layers import scaled_layer
from errata.editors.memory import MemoryPart, reading
from errata.errors import ConfigError, NumericsError
from errata.model import EditableModel
from errata.model.anatomy import output_width
from errata.model.scoring import READ_TOKENS
from errata.model.tail import Recording, Tail
from errata.model.tokens import Passage
from errata.progress import Progress
from errata.routing import DistanceRouter, KeyStore
from errata.routing.distance import Compat, Label

__all__ = ["KeyedConfig", "KeyedEditor", "calibrate_radius"]

_QUESTIONS = 200  # that calibration asks


@dataclass(frozen=True, kw_only=True)
class KeyedConfig(EditorConfig):
    """Settings of editors whose edits are found by distance.

    Attributes:
        layer: block beside whose MLP output projection the edits stand.
        learning_rate, steps: of Adam, started anew for each edit.
        stop_loss: no further step once the loss is at most this; None to take every step.
        radius: ε_init, the radius of a ball at first; None calibrates it.
        false_fires: share of neighbouring questions that calibration lets fire.
        expand: let a ball grow to reach a prompt of its own answer outside, as published; else that founds a ball too.
        full_forward: train through whole forward passes instead of the tail (slow; for comparison).
    """

    layer: int = 27
    learning_rate: float = 1.0
    steps: int = 50
    stop_loss: float | None = 0.01
    radius: float | None = None
    false_fires: float = 0.02
    expand: bool = False
    full_forward: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.learning_rate <= 0:
            raise ConfigError(
                f"editing needs at least one step and a positive learning rate, not {self.steps} and "
                f"{self.learning_rate}"
            )
        if self.radius is not None and not (self.radius > 0 and math.isfinite(self.radius)):
            raise ConfigError(f"radius must be a positive number, or left out to be calibrated, not {self.radius}")

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        return {"layer": scaled_layer(model, 27, 32), "source": "GRACE for Llama, depth scaled to this model"}


K = TypeVar("K", bound=KeyedConfig)


class KeyedEditor(Editor[K]):
    """Keeps one key and one content per edit."""

    @abc.abstractmethod
    def _new_memory(self, outputs: int, width: int) -> EntryMemory:
        """An empty memory for a layer of D = `width` inputs."""

    @abc.abstractmethod
    def _start(self, recording: Recording, replaced: Tensor, generator: torch.Generator) -> Tensor:
        """The content that training begins with, [width of the memory's rows].

        Args:
            recording: the edit's prompt with its target as one row.
            replaced: [outputs], the layer's output at the end of the prompt.
        """

    @abc.abstractmethod
    def _change(self, recording: Recording, content: Tensor) -> Callable[[Tensor], Tensor]:
        """What a content adds to the layer's output, as `Tail.run` takes it: a function of the layer's inputs."""

    def _agreement(self, passage: Passage) -> Label:
        """What two edits must have in common to share a ball: the tokens of their targets."""
        return passage.answer

    @property
    def _rules(self) -> Compat:
        return "fixed"

    @property
    def _layer(self) -> int:
        return self.model.anatomy.layer(self.config.layer)

    @property
    def _keyed(self) -> KeyedAdapter:
        assert isinstance(self.adapter, KeyedAdapter)
        return self.adapter

    def _new_adapter(self) -> KeyedAdapter:
        model, config = self.model, self.config
        path, width = model.anatomy.mlp_output[self._layer], model.anatomy.key_width[self._layer]
        router = DistanceRouter(width, config.radius or 0.0, self._rules, expand=config.expand)
        layer = RoutedLayer(router, self._new_memory(output_width(model.module(path)), width))
        return KeyedAdapter(BaseIdentity.of(model), self.name, config.to_record(), path=path, layer=layer)

    def _memory_to_prepare(self) -> list[MemoryPart]:
        return [reading(self.model, READ_TOKENS)]

    def _memory_to_write(self, edits: Sequence[Edit]) -> list[MemoryPart]:
        anatomy = self.model.anatomy
        kept = 4 * len(edits) * (anatomy.key_width[self._layer] + self._keyed.memory.contents.width)
        return [
            self._backward_pass(edits, self.model.layer_count - self._layer),
            MemoryPart("keys and contents of these edits", kept, "write fewer edits", on_host=True),
        ]

    # --- once per base model ----------------------------------------------------------------------------------------

    def _prepare(self, progress: Progress) -> None:
        adapter = self._keyed
        if self.config.radius is not None or "calibration" in adapter.notes:
            return
        sets = paraphrase_sets(_QUESTIONS, self.config.seed)
        texts = [one.prompt for one in sets]
        texts += [text for one in sets for text in one.paraphrases]
        texts += [text for one in sets for text in one.neighbours]
        owners = torch.tensor([owner for owner, one in enumerate(sets) for _ in one.paraphrases])
        progress.start(f"{self.name}: reading questions", len(texts))
        keys = torch.empty(len(texts), adapter.router.width)
        with self.model.bare():  # all of it belongs to the base model, whatever is attached to it
            for indices, gathered in adapter.gathered(texts, self.model):
                keys[indices] = gathered.cpu()
                progress.advance(len(indices))
        own, others, near = keys.tensor_split([len(sets), len(sets) + len(owners)])
        radius, record = calibrate_radius(own, others, owners, near, self.config.false_fires)
        adapter.router.radius = radius
        adapter.notes["calibration"] = record

    # --- per edit ---------------------------------------------------------------------------------------------------

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        (edit,) = edits
        model, adapter = self.model, self._keyed
        passage = model.passage(edit.prompt, edit.target)
        label, end = self._agreement(passage), len(passage.prompt) - 1
        with adapter.detached():  # the edit is trained on its own content alone, whatever its prompt would meet
            tail = Tail(model, self._layer, full=self.config.full_forward)
            recording = tail.record(model.batch([passage], side="right"))
            key, replaced = recording.inputs[self._layer][0, end].float(), recording.outputs[0, end].float()
            joined = adapter.router.joins(key, label)
            if joined is None:
                # Seeded by the edit, so that its content does not depend on which others there are.
                digest = hashlib.blake2b(f"{self.config.seed} {edit.id}".encode(), digest_size=7).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
                start = self._start(recording, replaced, generator)
            else:
                start = adapter.memory.contents.table[joined]
            content, steps = self._train(tail, recording, start)
        displaced = adapter.store(edit.id, key, label, content, replaced)
        return Written((steps,), (displaced,))

    def _train(self, tail: Tail, recording: Recording, start: Tensor) -> tuple[Tensor, int]:
        """Adam on one content until the target is said; returns it and the steps taken."""
        config = self.config
        content = start.to(recording.outputs.device, torch.float32).clone().requires_grad_(True)
        rows, columns, labels = recording.batch.answer_places()
        change = self._change(recording, content)
        optimizer = torch.optim.Adam([content], lr=config.learning_rate)
        stop = config.stop_loss if self._rules == "fixed" else None  # the reference takes every step
        taken = 0
        for _ in range(config.steps):
            logits = tail.run(recording, change, rows, columns)
            loss = F.cross_entropy(logits.float(), labels.to(logits.device))
            if not loss.isfinite():
                raise NumericsError("the edit's loss is not finite; lower the learning rate")
            if stop is not None and loss.item() <= stop:
                break
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            taken += 1
        found = content.detach().cpu()
        if not bool(torch.isfinite(found).all()):
            raise NumericsError("the edit's content is not finite (NaN or infinity); lower the learning rate")
        return found, taken


def calibrate_radius(
    stored: Tensor, paraphrases: Tensor, owners: Tensor, neighbours: Tensor, false_fires: float
) -> tuple[float, dict[str, Any]]:
    """The largest radius at which at most the share `false_fires` of neighbouring questions lie in any stored ball.

    Args:
        stored: [n, D] keys as edits would store them; paraphrases: [p, D], each belonging to stored key `owners` [p];
            neighbours: [q, D] keys of questions that belong to none.

    Returns:
        The radius, and a record of what it does on these questions: share of paraphrases that lie in their own ball,
        share of neighbours that lie in any, and the radius over the stored keys' mean norm.

    Raises:
        NumericsError: a neighbour is no further away than rounding, so that no radius tells them apart.
    """
    shelf = KeyStore(stored.shape[1])
    shelf.load(stored, torch.zeros(len(stored)))
    near = shelf.nearest(neighbours)[0][:, 0].sort().values
    allowed = int(false_fires * len(near))
    # Just below the nearest neighbour that must not fire any more.
    radius = math.nextafter(float(near[min(allowed, len(near) - 1)]), 0.0)
    if radius <= 0.0:
        raise NumericsError(
            "different questions give the same input of the layer, so no radius tells them apart; choose another layer"
        )
    distances, numbers = shelf.nearest(paraphrases)
    reached = (distances[:, 0] <= radius) & (numbers[:, 0] == owners)
    record = {
        "radius": radius,
        "questions": len(stored),
        "paraphrases_reached": float(reached.float().mean()),
        "neighbours_fired": float((near <= radius).float().mean()),
        "radius_over_norm": radius / float(stored.norm(dim=1).mean()),
    }
    return radius, record
