"""SERAC's memories: who answers in the base model's place once a prompt is in the scope of an edit.

They stand beside the final norm, whose output is all that the vocabulary head reads: at every place that says what
comes next, from the last token of the prompt on, they put a state of their own there. So the base's own head turns it
into logits, wherever it is asked, and the base model's states go on untouched below: rows and places that are left
alone get what the base gives, bit for bit.

* `StoredAnswer` says the edit's target, token by token, for as long as what has been said is its beginning; then the
  base model goes on. Nothing is trained.
* `Counterfactual` has a small language model read the edit, the prompt and what has been said of the answer, and takes
  every state of the answer from it (`adapters.counterfactual`).

What has been said is kept with the KV cache, as routes are. Knows nothing of how an edit is found.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from errata.adapters.base import random_rotation
from errata.adapters.counterfactual import CounterfactualNetwork
from errata.adapters.memories import Memory, Selection
from errata.errors import ConfigError, SequenceError
from errata.model import EditableModel
from errata.model.sequences import ForwardPass
from errata.routing import Route, Router

__all__ = ["AnswerMemory", "Counterfactual", "StoredAnswer"]

_NO_TOKEN = -1


class AnswerMemory(Memory):
    """A memory of one text per edit, as tokens.

    Attributes:
        texts: per entry, the tokens that an answer is made from.
    """

    def __init__(self) -> None:
        self.texts: list[tuple[int, ...]] = []

    def bind(self, model: EditableModel) -> None:
        """Take from the model that it acts on what is not its own."""
        return

    @abc.abstractmethod
    def answer(
        self, ids: Tensor, answering: Tensor, outputs: Tensor, selection: Selection, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The states of an answer.

        Args:
            ids: [rows, read], all tokens of the sequences so far, -1 on padding; answering: [rows, read], True on those
                that were said behind the prompt.
            outputs: [rows, columns, d], what stands at the last `columns` of them; places: [rows, columns], True where
                the next token of an answer is said.

        Returns:
            States [rows, columns, d], and where they take the place of the outputs, [rows, columns].
        """

    def select(self, route: Route, router: Router, device: torch.device) -> Selection:
        """Which rows have an entry [rows], kept on the CPU where asking costs nothing; its text, padded with -1."""
        hit = route.entry >= 0
        chosen = [self.texts[entry] if entry >= 0 else () for entry in route.entry.tolist()]
        texts = torch.full((len(chosen), max(map(len, chosen), default=0)), _NO_TOKEN, dtype=torch.long)
        for row, text in enumerate(chosen):
            texts[row, : len(text)] = torch.tensor(text, dtype=torch.long)
        return hit, texts.to(device)

    def read(self, inputs: Tensor, outputs: Tensor, selection: Selection, forward_pass: ForwardPass) -> Tensor:
        ids, prompt = self._so_far(forward_pass)
        hit = selection[0]
        if not bool(hit.any()):
            return outputs
        device = outputs.device
        ahead = prompt.long().flip(1).cumsum(1).flip(1)
        said = (ids != _NO_TOKEN) & (ahead == 0)
        places = forward_pass.answering & hit.to(forward_pass.real.device).unsqueeze(1)
        states, speaks = self.answer(ids.to(device), said.to(device), outputs, selection, places.to(device))
        return torch.where(speaks.unsqueeze(2), states.to(outputs), outputs)

    def _so_far(self, forward_pass: ForwardPass) -> tuple[Tensor, Tensor]:
        """All tokens of the sequences, [rows, read], -1 on padding, and where their prompts stand, [rows, read]."""
        if forward_pass.ids is None:
            raise SequenceError(
                "an answer goes on from the tokens said so far, and this pass was given embeddings; pass input_ids"
            )
        store = forward_pass.store
        ids, prompt = torch.where(forward_pass.real, forward_pass.ids, _NO_TOKEN), forward_pass.prompt
        before = store.decided.get(self)
        if before is not None and forward_pass.past:
            # What was taken out of the cache again (assisted generation) was not said.
            earlier = [store.expanded(part, len(ids))[:, : forward_pass.past].to(ids.device) for part in before]
            ids, prompt = torch.cat([earlier[0], ids], dim=1), torch.cat([earlier[1], prompt], dim=1)
        store.decided[self] = (ids, prompt)
        return ids, prompt

    def forget(self, entries: Sequence[int]) -> str | None:
        for number in sorted(entries, reverse=True):
            del self.texts[number]
        return None

    def clear(self) -> None:
        self.texts = []

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tokens = [token for text in self.texts for token in text]
        lengths = [len(text) for text in self.texts]
        return {
            "tokens": torch.tensor(tokens, dtype=torch.long),
            "lengths": torch.tensor(lengths, dtype=torch.long),
        }, {}

    def _load_texts(self, tensors: Mapping[str, Tensor]) -> None:
        parts = torch.split(tensors["tokens"], tensors["lengths"].tolist())
        self.texts = [tuple(part.tolist()) for part in parts]


class StoredAnswer(AnswerMemory):
    """Says the stored target itself.

    Args:
        width: d, numbers in a state.

    Attributes:
        texts: per entry, the tokens of its target.
        states: per token of any target, a state that the base's head reads as that token, [d].
    """

    kind: ClassVar[str] = "stored answer"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.states: dict[int, Tensor] = {}

    def append(self, target: Sequence[int], states: Mapping[int, Tensor]) -> None:
        """Add an edit's target, and states that say its tokens; those that are known already stay as they are."""
        self.texts.append(tuple(target))
        self.states |= {token: states[token].detach().cpu().float() for token in target if token not in self.states}

    def select(self, route: Route, router: Router, device: torch.device) -> Selection:
        """Besides, the states of each text, [rows, tokens, d]."""
        hit, texts = super().select(route, router, device)
        states = torch.zeros(*texts.shape, self.width)
        for row, column in (texts >= 0).nonzero().tolist():
            states[row, column] = self.states[int(texts[row, column])]
        return hit, texts, states.to(device)

    def answer(
        self, ids: Tensor, answering: Tensor, outputs: Tensor, selection: Selection, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, target, states = selection
        columns = outputs.shape[1]
        said = answering.long().cumsum(1)
        is_next = target.gather(1, (said - 1).clamp(0, target.shape[1] - 1)) == ids
        strayed = (answering & ~(is_next & (said <= target.shape[1]))).cumsum(1) > 0
        said, strayed = said[:, -columns:], strayed[:, -columns:]
        speaks = places & ~strayed & (said < (target >= 0).sum(1, keepdim=True))
        rows = torch.arange(len(states), device=states.device).unsqueeze(1)
        return states[rows, said.clamp(max=target.shape[1] - 1)], speaks

    def forget(self, entries: Sequence[int]) -> str | None:
        super().forget(entries)
        needed = {token for text in self.texts for token in text}
        self.states = {token: state for token, state in self.states.items() if token in needed}
        return None

    def clear(self) -> None:
        super().clear()
        self.states = {}

    def norm(self) -> float:
        """Of the states of all targets."""
        return math.sqrt(sum(float(self.states[token].square().sum()) for text in self.texts for token in text))

    def with_random_content(self, generator: torch.Generator) -> StoredAnswer:
        noise = StoredAnswer(self.width)
        rotation = random_rotation(self.width, generator)
        noise.texts = list(self.texts)
        noise.states = {token: rotation @ state for token, state in self.states.items()}
        return noise

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, settings = super().state()
        table = torch.stack([*self.states.values()]) if self.states else torch.zeros(0, self.width)
        tensors |= {"spoken": torch.tensor([*self.states], dtype=torch.long), "states": table}
        return tensors, {**settings, "width": self.width}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        memory = cls(settings["width"])
        memory._load_texts(tensors)
        memory.states = dict(zip(tensors["spoken"].tolist(), tensors["states"], strict=True))
        return memory


class Counterfactual(AnswerMemory):
    """Has a small language model answer, given the edit.

    It reads a row anew for every token: the edit's prompt, a separator, its target, a separator, the row's prompt, what
    has been said. It has no cache of its own; it is small, and edits are short.

    Args:
        network: the model; separator: the token between the parts.

    Attributes:
        texts: per entry, the tokens of its prompt and its target, a separator between them and behind.
    """

    kind: ClassVar[str] = "counterfactual"

    def __init__(self, network: CounterfactualNetwork, separator: int) -> None:
        super().__init__()
        self.network, self.separator = network.eval().requires_grad_(False), separator
        self._embedding: Any = None

    def bind(self, model: EditableModel) -> None:
        self._embedding = model.model.get_input_embeddings()
        self.network.to(model.device)

    def append(self, prompt: Sequence[int], target: Sequence[int]) -> None:
        """Add an edit."""
        self.texts.append((*prompt, self.separator, *target, self.separator))

    @torch.no_grad()
    def answer(
        self, ids: Tensor, answering: Tensor, outputs: Tensor, selection: Selection, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self._embedding is None:
            raise ConfigError("the counterfactual model reads by the base's word embeddings; attach its adapter first")
        texts, columns = selection[1], outputs.shape[1]
        rows = places.any(dim=1).nonzero().squeeze(1).tolist()
        states = torch.zeros(outputs.shape, device=outputs.device)
        if not rows:
            return states, places
        read = [[*_real(texts[row].tolist()), *_real(ids[row].tolist())] for row in rows]
        found = self.network(self._embedding, read).to(outputs.device)
        for number, row in enumerate(rows):
            # The last real tokens of the row stand at the end of what was read, one after another.
            here = ids[row, -columns:] >= 0
            count = int(here.sum())
            states[row, here] = found[number, len(read[number]) - count : len(read[number])]
        return states, places

    def norm(self) -> float:
        """Of what turns words that are pointed at into the base's states; zero while no edit is stored."""
        return float(self.network.copied.weight.norm()) if self.texts else 0.0

    def with_random_content(self, generator: torch.Generator) -> Counterfactual:
        noise = Counterfactual(self.network.rotated(generator), self.separator)
        noise.texts = list(self.texts)
        return noise

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, settings = super().state()
        tensors |= {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        return tensors, {**settings, "separator": self.separator, "shape": self.network.shape.to_record()}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        network = CounterfactualNetwork.from_tensors(
            settings["shape"], {n.removeprefix("network."): t for n, t in tensors.items() if n.startswith("network.")}
        )
        memory = cls(network, settings["separator"])
        memory._load_texts(tensors)
        return memory


def _real(tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token != _NO_TOKEN]
