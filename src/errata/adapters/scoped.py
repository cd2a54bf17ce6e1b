"""SERAC's adapter: the base model answers, unless a prompt is in the scope of a stored edit.

Beside the final norm stand a `ScopeRouter` and a memory that answers in the base's place. Both need something of the
model that they are attached to: its tokenizer to read prompts with, its word embeddings. Nothing of an edit is shared
with another, so taking one out is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.adapters.answers import AnswerMemory, Counterfactual, StoredAnswer
from errata.adapters.memories import Memory
from errata.adapters.routed import RoutedAdapter
from errata.adapters.sentences import encoder_for
from errata.errors import ArtifactError
from errata.model import EditableModel
from errata.routing import Router, ScopeRouter

__all__ = ["ScopedAdapter"]


class ScopedAdapter(RoutedAdapter):
    """A `ScopeRouter` with a memory of one text per edit."""

    adapter_type: ClassVar[str] = "scoped"
    routers: ClassVar[dict[str, type[Router]]] = {ScopeRouter.kind: ScopeRouter}
    memories: ClassVar[dict[str, type[Memory]]] = {
        StoredAnswer.kind: StoredAnswer,
        Counterfactual.kind: Counterfactual,
    }

    @property
    def router(self) -> ScopeRouter:
        router = self.layer.router
        assert isinstance(router, ScopeRouter)
        return router

    @property
    def memory(self) -> AnswerMemory:
        memory = self.layer.memory
        assert isinstance(memory, AnswerMemory)
        return memory

    def attach(self, model: EditableModel, name: str | None = None) -> None:
        """See `Adapter.attach`.

        Raises:
            ConfigError: the sentence encoder is not installed.
            ArtifactError: it is not the one that the stored embeddings were made with.
        """
        super().attach(model, name)
        try:
            self._bind(model)
        except BaseException:
            self.detach()
            raise

    def store(self, edit_id: str, embedding: Tensor) -> None:
        """Enter an edit, in place of what is stored under its id; its text is to be appended to the memory.

        Args:
            embedding: [D], see `ScopeRouter.embedded`.
        """
        if self.holds(edit_id):
            self._forget(edit_id)
        self.router.append(edit_id, embedding)
        self.memory_version += 1

    def _bind(self, model: EditableModel) -> None:
        """Read prompts as this model's tokenizer writes them, and take from it what the memory needs."""
        router, tokenizer = self.router, model.tokenizer
        encoder = encoder_for(router.encoder, model)
        if encoder.digest != router.digest:
            raise ArtifactError(
                f"the edits of this adapter were embedded by another encoder than {router.encoder!r} is now; put that "
                "one back, or apply the edits anew"
            )
        router.embed = lambda prompts: encoder.embed(
            [str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip() for ids in prompts]
        )
        self.memory.bind(model)

    @torch.no_grad()
    def gathered(self, prompts: Sequence[str], model: EditableModel) -> Iterator[tuple[list[int], Any]]:
        """As for every routed adapter; the base model need not run, for the prompts alone decide."""
        self._bind(model)
        if prompts:
            batch = model.batch([model.passage(prompt) for prompt in prompts], side="right")
            yield list(range(len(prompts))), self.router.gather(batch.ids, batch.mask.bool(), ids=batch.ids)
