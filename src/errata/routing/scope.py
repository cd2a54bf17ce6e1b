"""SERAC's router: a prompt is in the scope of the stored edit that its meaning is nearest to, if it is near enough.

    s_i = cos(B e(x_i), B e(q)),   i = argmax s_i answers if s_i ≥ τ          (SERAC, 2206.06520, its "embedding" form)

with e a sentence encoder, x_i the prompt of edit i and q the prompt that is asked. B makes all directions alike in
which the wordings of one question differ (`within_class_view`): what other words for the same question change counts
less than what another question changes. The published classifier learns its encoder instead, embeds the edit's prompt
together with its target, and compares exp(−‖e(x_i y_i) − e(q)‖²) with 1/2. Embeddings of edits are stored, never made
again, and searched by an index (`routing.directions`). docs/methods/serac.md has what each of these is worth.

Knows token ids and directions. The encoder is given (`embed`): it belongs to no router.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from errata.errors import ConfigError, EditError, SequenceError
from errata.routing.base import Route, Router
from errata.routing.directions import DirectionStore

__all__ = ["Embed", "ScopeRouter", "within_class_view"]

Embed = Callable[[Sequence[Sequence[int]]], Tensor]
"""From prompts as token ids to their embeddings, [prompts, D]."""

_NO_TOKEN = -1


def within_class_view(embeddings: Tensor, classes: Tensor, shrinkage: float = 0.1) -> Tensor:
    """B = (S + λ·tr(S)/D·I)^(−1/2), S the covariance within classes (WCCN; Hatch, Kajarekar and Stolcke 2006).

    Args:
        embeddings: [n, D]; classes: [n], the class of each, from 0 on; several of a class are needed.
        shrinkage: λ.

    Returns:
        [D, D] float32, symmetric.
    """
    rows = embeddings.double()
    counts = torch.bincount(classes).double().clamp(min=1)
    sums = torch.zeros(len(counts), rows.shape[1], dtype=torch.float64).index_add(0, classes, rows)
    apart = rows - (sums / counts.unsqueeze(1))[classes]
    within = apart.T @ apart / len(apart)
    values, vectors = torch.linalg.eigh(within)
    floor = shrinkage * float(values.mean())
    view: Tensor = (vectors * (values.clamp(min=0) + floor).rsqrt()) @ vectors.T
    return view.float()


class ScopeRouter(Router):
    """Decides by the meaning of whole prompts; one entry per edit, in order.

    Args:
        width: D, numbers in an embedding.
        threshold: τ, the least cosine that fires.
        encoder, digest: which encoder the stored embeddings are of, and a fingerprint of it.
        view: B, [D, D]; None for the embeddings as they are.

    Attributes:
        embed: the encoder at work; must be set before a prompt is decided on.
    """

    kind: ClassVar[str] = "scope"

    def __init__(self, width: int, threshold: float, encoder: str, digest: str, view: Tensor | None = None) -> None:
        self.width, self.threshold, self.encoder, self.digest = width, threshold, encoder, digest
        self.view = view
        self.owners: list[str] = []
        self.store = DirectionStore(width)
        self.embed: Embed | None = None

    # --- deciding -----------------------------------------------------------------------------------------------------

    def gather(self, inputs: Tensor, prompt: Tensor, before: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """The tokens of the prompt so far, [rows, read], -1 where none stands. `inputs` are not looked at.

        Raises:
            SequenceError: the pass was given embeddings, which nothing can be read from.
        """
        if ids is None:
            raise SequenceError(
                "a scope is decided by what a prompt says, and this pass was given embeddings instead of token ids; "
                "pass input_ids, or detach the adapter"
            )
        here = torch.where(prompt.to(ids.device), ids, _NO_TOKEN).cpu()
        return here if before is None else torch.cat([before, here], dim=1)

    def embedded(self, gathered: Tensor) -> Tensor:
        """What each prompt is recognised by, [rows, D]: its embedding through the view. Equal ones are read once."""
        if self.embed is None:
            raise ConfigError("this router has no encoder yet; attach its adapter to a model, or pass the model")
        prompts = [tuple(token for token in row if token != _NO_TOKEN) for row in gathered.tolist()]
        different = list(dict.fromkeys(prompts))
        found = self.embed(different)
        if self.view is not None:
            found = found @ self.view
        return found[torch.tensor([different.index(prompt) for prompt in prompts], dtype=torch.long)]

    def decide(self, gathered: Tensor) -> Route:
        rows = len(gathered)
        numbers = torch.full((rows, 2), -1, dtype=torch.long)
        scores = torch.zeros(rows, 2)
        if len(self):
            found, which = self.store.nearest(self.embedded(gathered), count=2)
            numbers[:, : which.shape[1]], scores[:, : found.shape[1]] = which, found
        threshold = torch.full((rows,), self.threshold)
        nearest, score = numbers[:, 0], scores[:, 0]
        return Route(
            entry=torch.where((score >= threshold) & (nearest >= 0), nearest, -1),
            nearest=nearest,
            score=score,
            threshold=threshold,
            second=numbers[:, 1],
            second_score=scores[:, 1],
        )

    # --- entries ------------------------------------------------------------------------------------------------------

    def append(self, owner: str, embedding: Tensor) -> None:
        """Store an edit by what its prompt is recognised by, [D]."""
        self.store.append(embedding)
        self.owners.append(owner)

    def remove(self, owner: str) -> list[int]:
        if owner not in self.owners:
            raise EditError(f"no embedding is stored for edit {owner!r}")
        number = self.owners.index(owner)
        self.store.remove(number)
        del self.owners[number]
        return [number]

    # --- saving -------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        settings = {
            "width": self.width,
            "threshold": self.threshold,
            "encoder": self.encoder,
            "digest": self.digest,
            "owners": self.owners,
        }
        tensors = {"embeddings": self.store.table}
        return (tensors if self.view is None else {**tensors, "view": self.view}), settings

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        made = {name: settings[name] for name in ("width", "threshold", "encoder", "digest")}
        router = cls(**made, view=tensors.get("view"))
        router.owners = list(settings["owners"])
        router.store.load(tensors["embeddings"])
        return router
