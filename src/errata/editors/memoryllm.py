"""MemoryLLM: the model reads a text and rewrites a part of its own memory (ICML 2024, 2402.04624).

    for each block l:   [.. ; h_{l+1}] = block_l([b_l ; e_l ; h_l]),   e_l the K newest slots of θ_l
                        e'_l = the last K outputs;  only the text's own go on to block l+1                  (figure 1b)
                        θ_l ← [θ_l without K slots drawn at random ; e'_l]

One forward pass, no gradient. What is rewritten, and how it is read: `adapters.pool`. Of a text shorter than K tokens
the newest slots ask too, so that there are always K outputs. The first text of all finds no slots; if it is
shorter, what it is compressed into is repeated. Long texts are cut into chunks, of which each is an update.

An edit is injected as the statement that prompt and target make. How a model is trained: `editors.pool_training`.

With `long_term` what is dropped is stored, and each sequence reads what its prompt retrieves (M+, 2502.00592): see
`adapters.long_term`, and `editors.retriever_training` for what has to be trained for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from errata.adapters import PoolAdapter, RevertResult
from errata.adapters.pool import default_spacing, window_of
from errata.adapters.pool_network import PoolNetwork
from errata.edit import Edit
from errata.editors.base import EditorConfig, Written
from errata.editors.compression import Compression, Injected
from errata.editors.memory import MemoryPart, reading
from errata.editors.pool_texts import InventedTexts, TextData
from errata.editors.pool_training import PoolLearning, PoolTraining
from errata.editors.retriever_training import MemoryTraining, RetrieverLearning
from errata.editors.training import TrainedEditor, Trainee, find_trained, load_trained
from errata.errors import ConfigError, EditError
from errata.model import EditableModel
from errata.model.prefixed_attention import unprefixable
from errata.progress import NO_PROGRESS, Progress

__all__ = ["MemoryLLM", "MemoryLLMConfig"]

_UNTRAINED = "untrained"
_CHUNK = 512  # tokens of a text that the paper reads together


@dataclass(frozen=True, kw_only=True)
class MemoryLLMConfig(EditorConfig):
    """Settings of MemoryLLM.

    Attributes:
        network: folder of a network that `errata train memoryllm` wrote; None for the one that comes with errata for
            this model; "untrained" for the model as it is, which slots change without its knowing what they hold.
        slots: N, memory tokens per layer; new: K, how many of them an update drops and appends. None: those that the
            network was trained with (untrained: K a sixteenth of the model's width, N = 30 K).
        chunk_tokens: longest piece of a text that is read in one update. None: 512, or what the model's positions leave
            behind K slots.
        spacing: between the positions of neighbouring slots, in tokens. None: as the network was trained with, or less
            where so many slots would reach further than half of the positions that the model knows.
        long_term: M, slots of each layer that are kept after they were dropped, in the computer's own memory (M+). It
            needs a network with a retriever. 0 for none: MemoryLLM.
        retrieved: R, how many of them each sequence reads, per layer. None: as the retriever was trained.
    """

    adjustable: ClassVar[frozenset[str]] = EditorConfig.adjustable | {"chunk_tokens"}

    network: str | None = None
    slots: int | None = None
    new: int | None = None
    chunk_tokens: int | None = None
    spacing: float | None = None
    long_term: int = 0
    retrieved: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("slots", "new", "chunk_tokens", "retrieved"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if self.new is not None and self.slots is not None and self.new > self.slots:
            raise ConfigError(f"new={self.new} must be from 1 to slots={self.slots}: an update takes that many")
        if self.long_term < 0:
            raise ConfigError(f"long_term={self.long_term} must be at least 0, which is no store")
        if self.retrieved is not None and not self.long_term:
            raise ConfigError(f"retrieved={self.retrieved} needs a store to retrieve from; give long_term=M too")

    def to_record(self) -> dict[str, Any]:
        """Without a store nothing is said of it: adapters and rows of studies that know none stay what they are."""
        record = super().to_record()
        return record if self.long_term else {n: v for n, v in record.items() if n not in ("long_term", "retrieved")}

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        return {"source": "as the network was trained"}


class MemoryLLM(TrainedEditor[MemoryLLMConfig]):
    """Reads each edit as a statement, and rewrites a part of a pool of memory tokens with what it read."""

    name = "memoryllm"
    summary = (
        "a pool of memory tokens per layer, which the model rewrites as it reads a text; trained once per model, then "
        "no gradient"
    )
    paper = "MemoryLLM, ICML 2024 (2402.04624)"
    Config = MemoryLLMConfig
    Training = MemoryTraining
    adapter: PoolAdapter

    @classmethod
    def unsuitable(cls, model: EditableModel) -> str | None:
        return super().unsuitable(model) or unprefixable(model)

    @property
    def chunk_tokens(self) -> int:
        """Tokens that an update reads at most. Raises ConfigError where the model has no positions for them."""
        window, config, new = window_of(self.model), self.config, self.adapter.pool.new
        left = _CHUNK if window is None else window - new - 1
        chosen = min(_CHUNK, left) if config.chunk_tokens is None else config.chunk_tokens
        if chosen < 1 or (window is not None and chosen > left):
            raise ConfigError(
                f"{self.model.model_id} knows {window} positions, which are too few for new={new} slots with "
                f"chunk_tokens={config.chunk_tokens} behind them; give smaller ones"
            )
        return chosen

    @cached_property
    def _network(self) -> tuple[PoolNetwork, dict[str, Any]]:
        """The network, and what it was trained with: slots, new and spacing."""
        config = self.config
        if config.network == _UNTRAINED:
            new = config.new or max(1, self.model.anatomy.hidden_size // 16)
            slots = config.slots or 30 * new
            record = {"slots": slots, "new": new, "spacing": default_spacing(self.model, slots)}
            return PoolNetwork.untrained(self.model, new), record
        tensors, record = find_trained(self.name, self.model, config.network)
        return PoolNetwork.from_state(tensors).to(self.model.device), record

    def _new_adapter(self) -> PoolAdapter:
        config, (network, record) = self.config, self._network
        slots = config.slots or record["slots"]
        spacing = config.spacing
        if spacing is None:
            known = default_spacing(self.model, slots)
            spacing = record["spacing"] if slots == record["slots"] else min(record["spacing"], known)
        if config.long_term and network.retriever is None:
            raise ConfigError(
                f"long_term={config.long_term} needs a network with a retriever, and this one has none; train one: "
                f"errata train {self.name} --model {self.model.model_id} --set retriever_of="
                f"{config.network if config.network not in (None, _UNTRAINED) else 'NETWORK'} --out errata-retriever; "
                "then give network=errata-retriever"
            )
        return PoolAdapter.for_model(
            self.model,
            self.name,
            config.to_record(),
            slots=slots,
            new=config.new or record["new"],
            seed=config.seed,
            spacing=spacing,
            network=network,
            long_term=config.long_term,
            retrieved=record.get("retrieved") if config.retrieved is None else config.retrieved,
        )

    @classmethod
    def built_in_data(cls, config: PoolTraining) -> InventedTexts:
        return InventedTexts(config)

    @classmethod
    def data_of_edits(cls, edits: Sequence[Edit], source: str, config: PoolTraining) -> TextData:
        raise ConfigError("memoryllm is trained on texts, not on edits; give a file of paragraphs with --texts")

    @classmethod
    def data_of_texts(cls, texts: Sequence[str], source: str, config: PoolTraining) -> TextData:
        return TextData(texts, source, config)

    @classmethod
    def _trainee(cls, model: EditableModel, config: PoolTraining) -> Trainee:
        if isinstance(config, MemoryTraining) and config.retriever_of is not None:
            return RetrieverLearning(model, config)
        return PoolLearning(model, config)

    @classmethod
    def _stands_on(cls, model: EditableModel, config: PoolTraining) -> Mapping[str, Any]:
        folder = (config.retriever_of if isinstance(config, MemoryTraining) else None) or config.begin_with
        return {} if folder is None else {"network": load_trained(Path(folder), cls.name, model)[1]["digest"]}

    def _prepare(self, progress: Progress) -> None:
        self._compression = Compression(self.model)

    def _memory_to_prepare(self) -> list[MemoryPart]:
        numbers = self.model.layer_count * self.adapter.pool.slots * self.model.anatomy.hidden_size
        remedy = "give fewer slots"
        parts = [MemoryPart("keys and values of the slots, at most", 2 * numbers * self.model.dtype.itemsize, remedy)]
        if (store := self.adapter.pool.store) is not None:
            parts.append(MemoryPart("the long-term store", store.nbytes, "give a smaller long_term", on_host=True))
        return parts

    def _memory_to_write(self, edits: Sequence[Edit]) -> list[MemoryPart]:
        return [reading(self.model, self.chunk_tokens + self.adapter.pool.new)]

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        (edit,) = edits
        passage = self.model.passage(edit.prompt, edit.target)
        ids = passage.ids[int(passage.ids[0] == self.model.tokenizer.bos_token_id) :]
        if len(ids) > self.chunk_tokens:
            raise EditError(
                f"prompt and target are {len(ids)} tokens, more than an update reads (chunk_tokens="
                f"{self.chunk_tokens}); shorten them, or inject them as a text (errata inject)"
            )
        # An edit given again with another target keeps its id, so what it wrote before is told by its updates.
        held = [old for old in self.adapter.edits() if old.id == edit.id and old.target != edit.target]
        stale = self.adapter.pool.updates_of(edit.id) if held else []
        self._compression.inject([self.adapter], [(edit.id, ids)], self.chunk_tokens)
        if stale:
            self.adapter.forget(edit.id, stale)
        return Written((None,))

    def inject(self, texts: Mapping[str, str], progress: Progress = NO_PROGRESS) -> list[Injected]:
        """Put texts of any length into the pool, one after the other. They are no edits: only the pool holds them.

        Args:
            texts: by a name, under which `explain` knows them.

        Raises:
            EditError: a text without tokens, or of an edit's name; nothing is injected.
            NumericsError: a text that gives memory tokens that are not finite; those before it are injected.
        """
        self.prepare(progress)
        tokenised = {}
        for name, text in texts.items():
            tokenised[name] = self.model.tokenizer(text, add_special_tokens=False, padding=False)["input_ids"]
            if not tokenised[name]:
                raise EditError(f"text {name!r} is empty; leave it out")
            if self.adapter.holds(name):
                raise EditError(f"text {name!r} has the name of an edit that this pool holds; give it another one")
        progress.start(f"{self.name}: injecting", len(texts))
        done = []
        for name, ids in tokenised.items():
            done += self._compression.inject([self.adapter], [(name, ids)], self.chunk_tokens)
            self.adapter.documents += 1
            progress.advance(note=f"{self.adapter.pool.updates} updates")
        return done

    def revert_exactly(self, edit_ids: Sequence[str], progress: Progress = NO_PROGRESS) -> list[RevertResult]:
        """As `Editor.revert_exactly`. Raises EditError too where texts were injected, which it does not keep."""
        if self.adapter.documents:
            raise EditError(
                f"{self.adapter.documents} texts were injected into this pool whose wording it does not keep, so they "
                "cannot be written anew; take the edits out without --exact, or build the pool anew"
            )
        return super().revert_exactly(edit_ids, progress)
