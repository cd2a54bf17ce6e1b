"""From the residual stream to logits, at chosen places only.

Some families do more than one matrix product here (Gemma caps its logits, Cohere and Granite scale them). What is
done is read from the configuration and **checked against the model's own logits** the first time; a model that
does something else is refused instead of being measured wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from errata.errors import TailError

if TYPE_CHECKING:
    from errata.model.editable import EditableModel

__all__ = ["checked_head"]


def checked_head(model: EditableModel) -> Callable[[Tensor], Tensor]:
    """A function from `EditableModel.answer_states`, [..., hidden], to logits, [..., vocabulary].

    Raises:
        TailError: the head does something that is not understood.
    """
    head = model.module(model.anatomy.head)
    config = model.model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    times = getattr(config, "logit_scale", None)
    divided = getattr(config, "logits_scaling", None)

    def logits_of(states: Tensor) -> Tensor:
        logits: Tensor = head(states.to(next(head.parameters()).device))
        if times is not None:
            logits = logits * times
        if divided is not None:
            logits = logits / divided
        return logits if cap is None else cap * torch.tanh(logits / cap)

    with torch.no_grad():
        batch = model.batch([model.passage("The quick brown fox", "jumps")], side="right")
        expected = model.forward(batch).logits.float()
        states = model.answer_states(batch)
        got = logits_of(states).float().to(expected.device)
        error = float((expected - got).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not error < max(1e-2, 4 * torch.finfo(states.dtype).eps):
        raise TailError(
            f"the logits of {type(model.model).__name__} are not its head applied to its last hidden state (relative "
            f"difference {error:.1e}); this head is not understood"
        )
    return logits_of
