"""WISE's side memories: sparse changes of one linear layer's weight, each answering the prompts it was edited for.

An edit is written into the *current shard*: a change Δ of the weight that lives in a random part of its entries. A
full shard is put aside and answers like any other memory; several of them are merged into one. Which memory answers
a prompt, if any, is decided once, while the prompt is read, see `routing.activation`; what it adds is Δ x, at every
position of the sequence. The base weight is never copied: all that is kept are changes.

A memory keeps the changes of its shards and merges them when it is made, also when it is loaded. So a shard can be
taken out of it again, exactly, as long as the shard was not merged for good into one that grows for ever (WISE-Merge,
from the second merge on).

Knows nothing of how changes are trained.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from errata.adapters.base import Adapter, BaseIdentity, Explanation, LayerChange, RevertResult, random_rotation
from errata.adapters.merging import MergeRule, merge
from errata.errors import EditError, ModelError, SequenceError
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.model.edited_linear import Contribution, EditedLinear
from errata.model.probes import capturing_inputs
from errata.model.scoring import READ_TOKENS, length_batches
from errata.model.sequences import ForwardPass
from errata.routing import Route, pack, unpack
from errata.routing.activation import (
    SAME_KEY,
    Activation,
    Score,
    Scored,
    blocked,
    choose,
    effects,
    key_distances,
    last_tokens,
)

__all__ = [
    "Choice",
    "RevertHow",
    "Shard",
    "SideLayer",
    "SideMemory",
    "SideSettings",
    "WiseAdapter",
    "base_layer",
    "mlp_activation",
    "seeded",
]

Choice = Literal["nearest", "activation"]
RevertHow = Literal["tombstone", "drop_shard"]

_KEPT_WEIGHT = 0.6  # of what was merged before, where one memory takes up all shards
_LONG = 100  # tokens from which the published code takes the largest score instead of the mean


def seeded(*names: object) -> torch.Generator:
    """A generator that follows from names and numbers."""
    digest = hashlib.blake2b(" ".join(map(str, names)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


def base_layer(model: EditableModel, path: str) -> nn.Module:
    """The linear layer itself, whatever is attached to it."""
    layer = model.module(path)
    return layer.base if isinstance(layer, EditedLinear) else layer


def mlp_activation(model: EditableModel, path: str) -> Activation:
    """The nonlinearity of the MLP whose output projection is at `path`: beside it, or in its block (OPT).

    It is known by what it does: no parameters, each number by itself, not linear.

    Raises:
        ModelError: there is none, or there are several that differ.
    """
    block = next(b for b in model.anatomy.blocks if path.startswith(b + "."))
    holder, found = path.rpartition(".")[0], dict[str, nn.Module]()
    for place in (holder, block):
        found = found or {repr(module): module for module in model.module(place).modules() if _is_activation(module)}
    if len(found) != 1:
        seen = "none" if not found else f"several ({', '.join(found)})"
        raise ModelError(
            f"one nonlinearity was expected in the MLP {holder!r}, found {seen}; side memories can be scored without: "
            "score='linear'"
        )
    (module,) = found.values()
    return module


def _is_activation(module: nn.Module) -> bool:
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()) or list(module.children()):
        return False
    taken = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    if len(taken) != 1 or isinstance(module, (nn.modules.dropout._DropoutNd, nn.Identity)):
        return False
    probe = torch.linspace(-3.0, 3.0, 7)
    try:
        together, apart = module(probe), torch.cat([module(number) for number in torch.split(probe, 1)])
    except Exception:  # whatever it is, it takes no plain tensor
        return False
    if not isinstance(together, Tensor) or together.shape != probe.shape:
        return False
    # Vectors and single numbers may take different kernels (GELU differs by 1e-5).
    return torch.allclose(together, apart, atol=1e-3) and not torch.allclose(together, together[-1] / 3.0 * probe)


@dataclass(frozen=True)
class SideSettings:
    """How memories answer and merge; all of it is explained in `WiseConfig`."""

    mode: Literal["merge", "retrieve"] = "merge"
    shards_per_memory: int = 2
    merging: MergeRule = "ties"
    trim_density: float = 0.53
    activation_ratio: float = 0.88
    score: Score = "activated"
    choice: Choice = "nearest"
    compat: Literal["fixed", "reference"] = "fixed"
    seed: int = 0


@dataclass(eq=False)
class Shard:
    """Edits that were written into one change of the weight, one after the other.

    Attributes:
        numbers: of the shards in it: its own, which its mask is drawn from, or several that were merged for good.
        delta: [outputs, D] float32.
        threshold: ε, the smallest score of its edits under this change alone.
        written: edits written into it, those included that are no longer held.
        owners, keys: the edits it holds, and [edits, D] bfloat16 the layer's input at each one's last prompt token.
    """

    numbers: tuple[int, ...]
    delta: Tensor
    threshold: float = math.inf
    written: int = 0
    owners: list[str] = field(default_factory=list)
    keys: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bfloat16))


class SideMemory:
    """One change of the weight that can answer: that of one shard, or of several merged.

    Attributes:
        number: what running sequences know it by; shards: what it was made of; delta: [outputs, D] float32.
        threshold: ε, the smallest score of its edits; that of its shards where nothing else is given.
    """

    def __init__(
        self, number: int, shards: Sequence[Shard], settings: SideSettings, threshold: float | None = None
    ) -> None:
        self.number, self.shards = number, list(shards)
        self.threshold = min(shard.threshold for shard in shards) if threshold is None else threshold
        count = len(self.shards)
        weights = [1.0 / count] * count
        if count > 1 and len(self.shards[0].numbers) > 1:
            weights = [_KEPT_WEIGHT] + [(1.0 - _KEPT_WEIGHT) / (count - 1)] * (count - 1)
        changes = [shard.delta for shard in self.shards]
        generator = seeded("merge", settings.seed, number)
        self.delta = merge(settings.merging, changes, weights, density=settings.trim_density, generator=generator)
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def owners(self) -> list[str]:
        return [owner for shard in self.shards for owner in shard.owners]

    @property
    def keys(self) -> Tensor:
        return torch.cat([shard.keys for shard in self.shards])

    def delta_like(self, like: Tensor) -> Tensor:
        """The change on the device and in the precision of a tensor; made once."""
        key = (like.device, like.dtype)
        if key not in self._copies:
            self._copies = {key: self.delta.to(device=like.device, dtype=like.dtype)}
        return self._copies[key]


class SideLayer(Contribution):
    """The memories of one layer, as they act in a forward pass.

    Attributes:
        settings: how they answer and merge.
        memories: those of full shards, merged or not; current: that of the shard that is being written, if any.
        buried, radii: tombstones, [t, D] bfloat16, and how far each reaches, [t].
        next_shard, next_memory: numbers not given yet.
        rotation: turns what is read, for the random control; routing is not touched.
        base, activation: of the model it is attached to.
    """

    def __init__(self, settings: SideSettings) -> None:
        self.settings = settings
        self.rotation: Tensor | None = None
        self.base: nn.Module | None = None
        self.activation: Activation | None = None
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        self.memories: list[SideMemory] = []
        self.current: SideMemory | None = None
        self.buried = torch.empty(0, 0, dtype=torch.bfloat16)
        self.radii = torch.empty(0)
        self.next_shard = self.next_memory = 0

    @property
    def answering(self) -> list[SideMemory]:
        """All memories, the current one last."""
        return self.memories if self.current is None else [*self.memories, self.current]

    def memory(self, shards: Sequence[Shard]) -> SideMemory:
        """A new memory of these shards."""
        self.next_memory += 1
        return SideMemory(self.next_memory - 1, shards, self.settings)

    # --- a forward pass -------------------------------------------------------------------------------------------

    def change_output(self, inputs: Tensor, outputs: Tensor, forward_pass: ForwardPass) -> Tensor:
        store = forward_pass.store
        if not store.frozen:
            gathered = self.gather(inputs, forward_pass.prompt, store.gathered.get(self))
            store.gathered[self] = gathered
            store.decided[self] = self.decide(gathered).entry
        numbers = store.decided.get(self)
        if numbers is None:  # attached after these prompts were read: they go on as they began
            return outputs
        return self.read(inputs, outputs, store.expanded(numbers, inputs.shape[0]))

    def read(self, inputs: Tensor, outputs: Tensor, numbers: Tensor) -> Tensor:
        """Outputs with the change of each row's memory, numbers [rows] on the CPU; bit for bit the same where -1."""
        for memory in self.answering:
            rows = (numbers == memory.number).nonzero().squeeze(1).to(inputs.device)
            if not len(rows):
                continue
            change = inputs[rows] @ memory.delta_like(inputs).T
            if self.rotation is not None:
                change = change @ self.rotation.to(change).T
            outputs = outputs.index_add(0, rows, change.to(outputs.dtype))
        return outputs

    def gather(self, inputs: Tensor, prompt: Tensor, before: Scored | None = None) -> Scored:
        """Add this pass's prompt tokens, inputs [rows, columns, D] where prompt [rows, columns], to what was read.

        Raises:
            SequenceError: memories have come or gone since an earlier pass over the same prompts.
        """
        memories = self.answering
        numbers = tuple(memory.number for memory in memories)
        prompt = prompt.to(inputs.device)
        last = last_tokens(inputs, prompt, None if before is None else before.last)
        base_outputs = None
        if self.activation is not None and memories:
            assert self.base is not None
            base_outputs = self.base(inputs)
        scores = inputs.new_zeros((*prompt.shape, len(memories)), dtype=torch.float32)
        for column, memory in enumerate(memories):
            scores[:, :, column] = effects(inputs, memory.delta_like(inputs), base_outputs, self.activation)
        scores = scores.masked_fill(~prompt.unsqueeze(2), 0.0)  # whatever stands on padding
        now = Scored(scores.sum(1), scores.amax(1), prompt.sum(1), last, numbers)
        if before is None:
            return now
        if before.memories != numbers:
            raise SequenceError("edits were made while a prompt was being read in parts; read it again from its start")
        return Scored(
            before.sums + now.sums, before.peaks.maximum(now.peaks), before.counts + now.counts, last, numbers
        )

    def decide(self, gathered: Scored) -> Route:
        """Numbers of memories for the sequences whose prompts were gathered; scores are given in units of ε."""
        memories = {memory.number: memory for memory in self.answering}
        rows, numbers = len(gathered.last), torch.tensor(gathered.memories, dtype=torch.long)
        ratio = torch.full((rows,), self.settings.activation_ratio)
        nobody, zero = torch.full((rows,), -1, dtype=torch.long), torch.zeros(rows)
        if not memories:
            return Route(entry=nobody, nearest=nobody, score=zero, threshold=ratio, second=nobody, second_score=zero)
        reference = self.settings.compat == "reference"
        scores = gathered.means()
        if reference:
            scores = torch.where(gathered.counts.unsqueeze(1) > _LONG, gathered.peaks, scores)
        scores = scores.cpu()
        for column, number in enumerate(gathered.memories if len(self.buried) else ()):
            hidden = blocked(gathered.last, memories[number].keys, self.buried, self.radii)
            scores[:, column].masked_fill_(hidden.cpu(), 0.0)
        epsilons = torch.tensor([memories[number].threshold for number in gathered.memories])
        preference = None
        if self.settings.choice == "nearest" and len(memories) > 1:
            distances = [key_distances(gathered.last, memories[n].keys).amin(dim=1) for n in gathered.memories]
            preference = -torch.stack(distances, dim=1).cpu()
        growing = reference and self.current is not None
        chosen = choose(scores, self.settings.activation_ratio * epsilons, preference=preference, growing=growing)
        relative = scores / epsilons
        order = relative.argsort(dim=1, descending=True, stable=True)
        first = torch.where(chosen >= 0, chosen, order[:, 0])
        second, second_score = nobody, zero
        if len(memories) > 1:
            second = torch.where(order[:, 0] == first, order[:, 1], order[:, 0])
            second_score = relative.gather(1, second.unsqueeze(1)).squeeze(1)
        return Route(
            entry=torch.where(chosen >= 0, numbers[chosen], -1),
            nearest=numbers[first],
            score=relative.gather(1, first.unsqueeze(1)).squeeze(1),
            threshold=ratio,
            second=torch.where(second >= 0, numbers[second], -1),
            second_score=second_score,
        )

    # --- content --------------------------------------------------------------------------------------------------

    def shards(self) -> list[tuple[SideMemory, Shard]]:
        return [(memory, shard) for memory in self.answering for shard in memory.shards]

    def find(self, edit_id: str) -> tuple[SideMemory, Shard]:
        """Where an edit was written. Raises EditError if nowhere."""
        for memory, shard in self.shards():
            if edit_id in shard.owners:
                return memory, shard
        raise EditError(f"no side memory holds the edit {edit_id!r}")

    def begin(self, rows: int, width: int) -> Shard:
        """The shard that the next edit is written into: the current one, or a new one that is not yet part of this."""
        if self.current is not None:
            return self.current.shards[0]
        threshold = math.inf
        if self.settings.compat == "reference" and self.settings.mode == "merge":
            threshold = min((memory.threshold for memory in self.memories), default=math.inf)  # one ε for all
        keys = torch.empty(0, width, dtype=torch.bfloat16)
        return Shard((self.next_shard,), torch.zeros(rows, width), threshold, keys=keys)

    def write(self, shard: Shard) -> None:
        """Make a shard the current one; its number is given, should it be new."""
        self.next_shard = max(self.next_shard, shard.numbers[0] + 1)
        self.current = self.memory([shard])

    def finish(self) -> SideMemory | None:
        """Put the current shard aside, and merge those that wait when there are enough of them.

        They are merged into a new memory, or in mode "merge" into the one that has taken up all shards before; it is
        returned, for its threshold to be measured.
        """
        assert self.current is not None
        self.memories.append(self.current)
        self.current = None
        waiting = [memory for memory in self.memories if len(memory.shards) == 1 and len(memory.shards[0].numbers) == 1]
        if self.settings.shards_per_memory < 2 or len(waiting) < self.settings.shards_per_memory:
            return None
        others = [memory for memory in self.memories if memory not in waiting]
        shards = [memory.shards[0] for memory in waiting]
        if self.settings.mode == "merge":
            shards, others = [*map(_for_good, others), *shards], []
        self.memories = [*others, self.memory(shards)]
        return self.memories[-1]

    def replace(self, memory: SideMemory, shards: Sequence[Shard]) -> None:
        """Make a memory of other shards; it goes when there are none."""
        made = [self.memory(shards)] if shards else []
        if memory is self.current:
            self.current = made[0] if made else None
        else:
            at = self.memories.index(memory)
            self.memories[at : at + 1] = made

    def strike(self, edit_id: str) -> tuple[Tensor, Shard]:
        """Take an edit off its shard's list; a shard that holds none goes. Returns its key [D] and the shard."""
        memory, shard = self.find(edit_id)
        at = shard.owners.index(edit_id)
        key = shard.keys[at]
        del shard.owners[at]
        shard.keys = torch.cat([shard.keys[:at], shard.keys[at + 1 :]])
        if not shard.owners:
            self.replace(memory, [other for other in memory.shards if other is not shard])
        return key, shard

    def bury(self, key: Tensor) -> None:
        """Put a tombstone at a key [D]. It reaches as far as the nearest edit that is held and is of another prompt."""
        held = torch.cat([memory.keys for memory in self.answering])
        same = SAME_KEY * float(key.float().norm())
        distances = key_distances(key[None], held)[0]
        radius = distances[distances > same].amin() if bool((distances > same).any()) else torch.tensor(math.inf)
        if len(self.buried):
            elsewhere = key_distances(key[None], self.buried)[0] > same
            self.buried, self.radii = self.buried[elsewhere], self.radii[elsewhere]
        self.buried = torch.cat([self.buried.view(-1, len(key)), key[None]])
        self.radii = torch.cat([self.radii, radius[None]])


def _for_good(memory: SideMemory) -> Shard:
    """A memory as one shard, whose ingredients are no longer kept."""
    numbers = tuple(number for shard in memory.shards for number in shard.numbers)
    written = sum(shard.written for shard in memory.shards)
    return Shard(numbers, memory.delta, memory.threshold, written, memory.owners, memory.keys)


class WiseAdapter(Adapter):
    """Side memories beside one linear layer of the base model.

    Attributes:
        path: the layer; layer: its memories, as they act.
        notes: what the editor keeps for going on later (prefixes, margins), as JSON.
    """

    adapter_type: ClassVar[str] = "wise"

    def __init__(
        self,
        base: BaseIdentity,
        editor: str = "",
        editor_config: Mapping[str, Any] | None = None,
        *,
        path: str = "",
        settings: SideSettings | None = None,
    ) -> None:
        super().__init__(base, editor, editor_config)
        self.path = path
        self.layer = SideLayer(settings or SideSettings())
        self.notes: dict[str, Any] = {}

    def contributions(self) -> Mapping[str, Contribution]:
        return {self.path: self.layer}

    def attach(self, model: EditableModel, name: str | None = None) -> None:
        """Let the adapter act on a model.

        Raises:
            BaseMismatchError: the adapter was made for other weights.
            ConfigError: it is attached already, or the name is taken.
            ModelError: the score needs the MLP's nonlinearity, and it cannot be found.
        """
        super().attach(model, name)
        try:
            self._bind(model)
        except ModelError:
            self.detach()
            raise

    def detach(self) -> None:
        super().detach()
        self.layer.base = self.layer.activation = None

    def _bind(self, model: EditableModel) -> None:
        self.layer.base = base_layer(model, self.path)
        if self.layer.settings.score == "activated":
            self.layer.activation = mlp_activation(model, self.path)

    # --- content --------------------------------------------------------------------------------------------------

    def write(self, edit_id: str, delta: Tensor, threshold: float, key: Tensor) -> None:
        """Write an edit into the current shard.

        Args:
            delta: the shard's change with the edit in it, [outputs, D]; threshold: the shard's ε under it.
            key: the layer's input at the prompt's last token, [D].
        """
        layer = self.layer
        shard = layer.begin(*delta.shape)
        if any(edit_id in other.owners for _, other in layer.shards()):  # the same edit given again
            self._take_out(edit_id, unless_in=shard)
        owners, keys = [*shard.owners, edit_id], torch.cat([shard.keys, key[None].to(torch.bfloat16).cpu()])
        layer.write(Shard(shard.numbers, delta, threshold, shard.written + 1, owners, keys))
        self.memory_version += 1

    def _take_out(self, edit_id: str, unless_in: Shard) -> None:
        """An edit is no longer held; unless its place is written anew, a tombstone keeps its prompt from it."""
        key, shard = self.layer.strike(edit_id)
        if shard.owners and shard is not unless_in:
            self.layer.bury(key)

    def _supersede(self, old_id: str, new_id: str) -> None:
        _, shard = self.layer.find(new_id)
        self._take_out(old_id, unless_in=shard)
        self.memory_version += 1

    def revert(self, edit_id: str, how: RevertHow = "tombstone") -> RevertResult:
        """Take one edit out.

        Args:
            how: "tombstone" keeps its prompt, and what is nearer to it than to any other edit, from being answered by
                a memory; what it wrote stays. "drop_shard" drops its whole shard, exactly, with all edits in it.
                (`Wise.revert` also trains the shard again without it.) An edit that is alone in its shard goes
                exactly either way.

        Raises:
            EditError: the adapter does not hold this edit, or its shard was merged for good.
        """
        if how == "drop_shard" and self.holds(edit_id):
            return self._drop_shard(edit_id)
        return super().revert(edit_id)

    def _revert(self, edit_id: str) -> RevertResult:
        key, shard = self.layer.strike(edit_id)
        if not self.layer.answering:
            self.layer.clear()
            return RevertResult(edit_id, "exact", "it was the only edit; nothing is left in memory")
        if not shard.owners:
            return RevertResult(edit_id, "exact", "it was the last edit of its shard, which is dropped")
        self.layer.bury(key)
        reason = (
            "a tombstone keeps its prompt, and prompts nearer to it than to any edit still held, from being answered "
            f"by a side memory; what it wrote stays in a shard that {len(shard.owners)} other edits share"
        )
        return RevertResult(edit_id, "approximate", reason)

    def _drop_shard(self, edit_id: str) -> RevertResult:
        memory, shard = self.own_shard(edit_id)
        others = [owner for owner in shard.owners if owner != edit_id]
        self.layer.replace(memory, [other for other in memory.shards if other is not shard])
        for owner in shard.owners:
            self._edits.pop(owner)
        if not self.layer.answering:
            self.layer.clear()
        self.memory_version += 1
        gone = f", and {len(others)} other edits with it: {', '.join(others)}" if others else ""
        return RevertResult(edit_id, "exact", f"its shard is dropped{gone}")

    def replace_shard(self, edit_id: str, shard: Shard) -> None:
        """Put a shard in the place of an edit's own, trained without this edit, which is struck off the list."""
        memory, old = self.own_shard(edit_id)
        self.layer.replace(memory, [shard if other is old else other for other in memory.shards])
        self._edits.pop(edit_id)
        self.memory_version += 1

    def own_shard(self, edit_id: str) -> tuple[SideMemory, Shard]:
        """An edit's shard and the memory it is part of. Raises EditError where it was merged for good."""
        memory, shard = self.layer.find(edit_id)
        if len(shard.numbers) > 1:
            raise EditError(
                f"the shard of {edit_id!r} was merged for good with {len(shard.numbers) - 1} others, so it can neither "
                "be dropped nor trained again; revert it by a tombstone, or edit in mode='retrieve'"
            )
        return memory, shard

    # --- looking --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def explain(self, prompts: Sequence[str], model: EditableModel | None = None) -> list[Explanation]:
        """Scores are in units of ε, the smallest score of the memory's own edits; the edit named is the nearest."""
        model = model or self.model
        found: dict[int, Explanation] = {}
        with self._bound(model):
            passages = [model.passage(prompt) for prompt in prompts]
            for indices in length_batches([len(p.ids) for p in passages], READ_TOKENS):
                batch = model.batch([passages[i] for i in indices], side="right")
                with (
                    capturing_inputs(model.model, [self.path], len(indices)) as inputs,
                    model.sequences.narrowed(indices, len(prompts)),
                ):
                    model.trunk_states(batch)
                gathered = self.layer.gather(inputs[self.path], batch.mask.bool())
                for index, explanation in zip(indices, self._explained(gathered), strict=True):
                    found[index] = dataclasses.replace(explanation, prompt=prompts[index])
        return [found[index] for index in range(len(prompts))]

    def _explained(self, gathered: Scored) -> Iterator[Explanation]:
        route = self.layer.decide(gathered)
        memories = {memory.number: memory for memory in self.layer.answering}

        def nearest(row: int, number: Tensor) -> str | None:
            memory = memories.get(int(number))
            if memory is None:
                return None
            return memory.owners[int(key_distances(gathered.last[row : row + 1], memory.keys).argmin())]

        for row in range(len(route.entry)):
            second = nearest(row, route.second[row])
            yield Explanation(
                "",
                nearest(row, route.nearest[row]),
                float(route.score[row]),
                float(route.threshold[row]),
                bool(route.entry[row] >= 0),
                second,
                None if second is None else float(route.second_score[row]),
            )

    @contextmanager
    def _bound(self, model: EditableModel) -> Iterator[None]:
        """With a model's base layer and nonlinearity at hand, also while attached to none."""
        before = self.layer.base, self.layer.activation
        self._bind(model)
        try:
            yield
        finally:
            self.layer.base, self.layer.activation = before

    def layer_changes(self, model: EditableModel) -> list[LayerChange]:
        """One layer; a prompt meets one of its memories, so the norm given is the largest."""
        base = float(weight_of(base_layer(model, self.path)).float().norm())
        norm = max((float(memory.delta.norm()) for memory in self.layer.answering), default=0.0)
        entries = sum(len(memory.owners) for memory in self.layer.answering)
        return [LayerChange(self.path, norm, norm / base if base else 0.0, entries)]

    def with_random_content(self, generator: torch.Generator) -> WiseAdapter:
        adapter = WiseAdapter(self.base, self.editor, self.editor_config, path=self.path, settings=self.layer.settings)
        tensors, state = self._state()
        adapter._load_state(tensors, state)
        if self.layer.answering:
            adapter.layer.rotation = random_rotation(self.layer.answering[0].delta.shape[0], generator)
        return adapter

    # --- saving ---------------------------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        layer = self.layer
        tensors: dict[str, Tensor] = {}
        if layer.rotation is not None:
            tensors["rotation"] = layer.rotation
        if len(layer.buried):
            tensors |= {"buried": layer.buried, "radii": layer.radii}
        memories = []
        for memory in layer.answering:
            shards = []
            for shard in memory.shards:
                name = "-".join(map(str, shard.numbers))
                # One bit per entry, and the entries that are not zero.
                marks = shard.delta != 0
                tensors[f"{name}.marks"], tensors[f"{name}.values"] = pack(marks), shard.delta[marks]
                tensors[f"{name}.keys"] = shard.keys
                about = {"numbers": list(shard.numbers), "written": shard.written, "owners": shard.owners}
                shards.append({**about, "threshold": shard.threshold})
            memories.append({"number": memory.number, "threshold": memory.threshold, "shards": shards})
        state = {
            "path": self.path,
            "settings": dataclasses.asdict(layer.settings),
            "memories": memories,
            "growing": layer.current is not None,
            "next_shard": layer.next_shard,
            "next_memory": layer.next_memory,
            "notes": self.notes,
        }
        return tensors, state

    def _load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.path, self.notes = state["path"], dict(state["notes"])
        self.layer = layer = SideLayer(SideSettings(**state["settings"]))
        layer.rotation = tensors.get("rotation")
        for record in state["memories"]:
            shards = []
            for about in record["shards"]:
                name = "-".join(map(str, about["numbers"]))
                keys = tensors[f"{name}.keys"]
                marks = unpack(tensors[f"{name}.marks"], keys.shape[1])
                delta = torch.zeros(marks.shape)
                delta[marks] = tensors[f"{name}.values"]
                numbers, owners = tuple(about["numbers"]), list(about["owners"])
                shards.append(Shard(numbers, delta, about["threshold"], about["written"], owners, keys))
            layer.memories.append(SideMemory(record["number"], shards, layer.settings, record["threshold"]))
        if state["growing"]:
            layer.current = layer.memories.pop()
        layer.next_shard, layer.next_memory = state["next_shard"], state["next_memory"]
        if "buried" in tensors:
            layer.buried, layer.radii = tensors["buried"], tensors["radii"]
