"""What MEMOIR's router is prepared with: a background mean, a pooling, and thresholds that suit the model.

Thresholds are calibrated on built-in questions. Other wordings of a question must reach it; the same question about
somebody else, and other questions about the same subject, must not. What is found belongs to the base model and is
kept for the next adapter.

Knows questions and masks. Knows nothing of how edits are written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errata.datasets.builtin import background_prompts, paraphrase_sets
from errata.model import EditableModel
from errata.model.tokens import Passage
from errata.routing import MaskStore
from errata.routing.tophash import Pooling

__all__ = ["Found", "Preparation", "Questions", "calibrate"]

_QUESTIONS = 200  # that calibration asks


@dataclass(frozen=True)
class Questions:
    """What a router is prepared with, as tokens.

    Attributes:
        background: unrelated prompts; prompts: questions as edits would ask them.
        paraphrases, beside: other wordings of them, and other questions about their subjects; `reworded` [paraphrases]
            and `about` [beside] say which question each belongs to.
        neighbours: the same questions about other subjects.
    """

    background: list[Passage]
    prompts: list[Passage]
    paraphrases: list[Passage]
    reworded: Tensor
    neighbours: list[Passage]
    beside: list[Passage]
    about: Tensor

    @classmethod
    def ask(cls, model: EditableModel, background: int, seed: int, *, calibrating: bool) -> Questions:
        sets = paraphrase_sets(_QUESTIONS, seed) if calibrating else []
        return cls(
            [model.passage(text) for text in (background_prompts(background, seed) if background else [])],
            [model.passage(one.prompt) for one in sets],
            [model.passage(text) for one in sets for text in one.paraphrases],
            torch.tensor([number for number, one in enumerate(sets) for _ in one.paraphrases], dtype=torch.long),
            [model.passage(text) for one in sets for text in one.neighbours],
            [model.passage(text) for one in sets for text in one.beside],
            torch.tensor([number for number, one in enumerate(sets) for _ in one.beside], dtype=torch.long),
        )

    def _parts(self) -> tuple[list[Passage], ...]:
        return self.background, self.prompts, self.paraphrases, self.neighbours, self.beside

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts())

    def digest(self) -> str:
        """Of the tokens, and so of the texts and of the tokenizer."""
        parts = [[passage.ids for passage in part] for part in self._parts()]
        text = json.dumps([parts, self.reworded.tolist(), self.about.tolist()])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Found:
    """Thresholds for a router and what they do, as shares of the questions.

    Attributes:
        threshold: for entries of which nothing but a mask is known; named, unnamed: for those whose words the prompt
            has, and has not.
    """

    threshold: float
    named: float
    unnamed: float
    record: dict[str, Any]


def _just_above(scores: Tensor, share: float, least: float) -> float:
    """The smallest threshold that at most this share of the scores reaches, in whole marks; `least` if all may."""
    ranked = scores.sort(descending=True).values
    allowed = int(share * len(ranked))
    return float(ranked[allowed]) if allowed < len(ranked) else least


def _equal_errors(right: Tensor, wrong: Tensor) -> float:
    """The smallest of the scores above which no larger share of the wrong ones lies than of the right ones below."""
    tried = torch.cat([right, wrong]).sort().values
    missed = (right.unsqueeze(0) <= tried.unsqueeze(1)).float().mean(1)
    fired = (wrong.unsqueeze(0) > tried.unsqueeze(1)).float().mean(1)
    return float(tried[int((missed >= fired).long().argmax())])


def calibrate(
    store: MaskStore,
    questions: Questions,
    paraphrases: Tensor,
    neighbours: Tensor,
    beside: Tensor,
    false_fires: float,
    subjects: bool,
) -> Found:
    """The smallest thresholds at which few enough of the questions fire that must not.

    * `threshold`: the share `false_fires` of the neighbours, whichever stored question they come closest to.
    * `unnamed`: none of the neighbours, for they say that they mean somebody else.
    * `named`: where as large a share of a question's other wordings misses it as of the other questions about its
      subject reaches it (equal error rate).

    Args:
        store: masks of the questions as edits would store them.
        paraphrases, neighbours, beside: masks [n, D] of the other questions, see `Questions`.
        subjects: whether prompts will be asked for an edit's words; what is reached is counted accordingly.
    """
    chance, mark = store.marked / store.width, 0.5 / store.marked
    near = store.nearest(neighbours)[0][:, 0]
    threshold = _just_above(near, false_fires, chance) + mark
    unnamed = float(near.max()) + mark
    # A question that names a subject is compared with what is stored about that subject alone.
    own = store.overlaps(beside).gather(1, questions.about.unsqueeze(1)).squeeze(1)
    right = store.overlaps(paraphrases).gather(1, questions.reworded.unsqueeze(1)).squeeze(1)
    named = min(unnamed, _equal_errors(right, own) + mark) if len(own) else threshold
    scores, numbers = store.nearest(paraphrases)
    alone = float(((scores[:, 0] >= threshold) & (numbers[:, 0] == questions.reworded)).float().mean())
    record = {
        "questions": len(store),
        "paraphrases_reached": alone,
        "neighbours_fired": float((near >= threshold).float().mean()),
        "relative_threshold": (threshold - chance) / (1 - chance),
    }
    if subjects:
        record |= {
            "paraphrases_reached": float((right >= named).float().mean()),
            "paraphrases_reached_without_subjects": alone,
            "neighbours_fired": float((near >= unnamed).float().mean()),
            "neighbours_fired_without_subjects": record["neighbours_fired"],
            "same_subject_fired": float((own >= named).float().mean()) if len(own) else 0.0,
        }
    return Found(threshold, named, unnamed, record)


@dataclass(frozen=True)
class Preparation:
    """What `prepare` finds for one model and one configuration; kept, since it costs thousands of prompts to make.

    `background` is [D]; `record` says how thresholds and pooling were found.
    """

    background: Tensor
    contexts: list[str]
    pooling: Pooling
    threshold: float
    named: float | None
    unnamed: float | None
    record: dict[str, Any]

    @classmethod
    def read(cls, place: Path) -> Preparation | None:
        """What is kept there; None if nothing is, or nothing that can be read."""
        try:
            with safe_open(place, framework="pt") as file:
                return cls(file.get_tensor("background"), **json.loads(file.metadata()["made"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def write(self, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_suffix(f".{os.getpid()}.new")  # two processes may prepare at once
        names: Sequence[str] = ("contexts", "pooling", "threshold", "named", "unnamed", "record")
        made = {name: getattr(self, name) for name in names}
        save_file({"background": self.background.contiguous()}, draft, metadata={"made": json.dumps(made)})
        os.replace(draft, place)
