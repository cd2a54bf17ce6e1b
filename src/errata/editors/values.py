"""Finding v*: what one layer would have to put out at the subject for the model to say the target.

Shared by ROME and its kin (ROME, 2202.05262, equation 4). A vector δ is added to the MLP output projection's output
at the subject's last token, in every context at once, and is optimised so that the target becomes likely while what
the model thinks the subject *is* stays:

    L(δ) = mean_j [ −(1/T) Σ_t log p(y_t | context_j + prompt, δ) ] + kl · KL(p_δ ‖ p_0) + wd · ‖δ‖ / ‖v_0‖²

with p the next-token distribution at the subject's last token of "{subject} is a". Blocks below the layer never
move, so they run once (`Tail`), and only label positions meet the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.edit import Edit
from errata.errors import NumericsError, SpanError
from errata.model import EditableModel
from errata.model.tail import Tail
from errata.model.tokens import Passage

__all__ = ["TargetValue", "ValueSettings", "find_target_value"]


@dataclass(frozen=True)
class ValueSettings:
    """Adam steps and their bounds. `clamp`: largest ‖δ‖ as a multiple of ‖v_0‖; `stop_loss`: enough is enough."""

    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 4.0
    kl_factor: float = 0.0625
    stop_loss: float = 0.05


@dataclass(frozen=True)
class TargetValue:
    """The result for one edit; keys and values are those of the subject's last token.

    Attributes:
        delta: δ, [hidden]; initial: v_0, the layer's output on the bare prompt, [hidden].
        keys: the layer's input in each context, [contexts, key width], the bare prompt first.
        outputs: the layer's present output in each context, [contexts, hidden].
        steps: optimisation steps taken; loss: at the last one.
    """

    delta: Tensor
    initial: Tensor
    keys: Tensor
    outputs: Tensor
    steps: int
    loss: float


def find_target_value(
    model: EditableModel,
    layer: int,
    edit: Edit,
    contexts: Sequence[str],
    settings: ValueSettings,
    *,
    full_forward: bool = False,
) -> TargetValue:
    """Optimise δ for one edit.

    Args:
        contexts: texts to put in front of the prompt; the bare prompt is always used too, first.

    Raises:
        SpanError: the subject is missing or does not occur in the prompt.
        NumericsError: the loss is not finite.
    """
    if edit.subject is None:
        raise SpanError(f"edit {edit.id!r} has no subject; add the field 'subject', spelled as in the prompt")
    prompts = [edit.prompt, *(f"{context} {edit.prompt}" for context in contexts)]
    passages = [model.passage(prompt, edit.target) for prompt in prompts]
    essence = f"{edit.subject} is a"
    spans = [model.subject_span(text, edit.subject).last for text in (*prompts, essence)]
    batch = model.batch([*passages, Passage(model.passage(essence).ids, ())], side="right")
    rows, columns, labels = batch.answer_places()
    subject_rows = torch.arange(len(spans), device=batch.ids.device)
    subject_columns = torch.tensor(spans, device=batch.ids.device) + batch.starts
    tail = Tail(model, layer, full=full_forward)
    recording = tail.record(batch)
    here = recording.outputs.device  # the layer's own, which need not be that of the token ids
    places = (subject_rows.to(here), subject_columns.to(here))
    keys = recording.inputs[layer][places][: len(prompts)].float()
    outputs = recording.outputs[places][: len(prompts)].float()
    initial = outputs[0]
    size = float(initial.norm())

    delta = torch.zeros_like(initial, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.learning_rate)
    shape = (*recording.outputs.shape[:2], initial.shape[0])

    def change(inputs: Tensor) -> Tensor:
        # δ at the subject of every row, zero elsewhere.
        return torch.zeros(shape, device=inputs.device).index_put(places, delta.expand(len(spans), -1))

    all_rows = torch.cat([rows, subject_rows[-1:]])
    all_columns = torch.cat([columns, subject_columns[-1:]])
    tokens_per_row = torch.bincount(rows, minlength=len(prompts)).clamp(min=1)
    first_log_probs: Tensor | None = None
    taken, loss_value = 0, float("nan")
    for step in range(settings.steps):
        logits = tail.run(recording, change, all_rows, all_columns).float()
        log_probs = logits.log_softmax(-1)
        losses = F.nll_loss(log_probs[:-1], labels.to(log_probs.device), reduction="none")
        per_row = torch.zeros(len(prompts), device=losses.device).index_add(0, rows.to(losses.device), losses)
        likely = (per_row / tokens_per_row.to(losses.device)).mean()
        essence_now = log_probs[-1]
        if first_log_probs is None:
            first_log_probs = essence_now.detach()
        drift = F.kl_div(first_log_probs, essence_now, log_target=True, reduction="sum")
        decay = settings.weight_decay * delta.norm() / max(size, 1e-12) ** 2
        loss = likely + settings.kl_factor * drift + decay.to(likely.device)
        loss_value = loss.item()
        if not torch.isfinite(loss):
            raise NumericsError(f"the target value of edit {edit.id!r} diverged; lower the learning rate or the clamp")
        if loss_value < settings.stop_loss or step == settings.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        taken += 1
        with torch.no_grad():
            bound = settings.clamp * size
            size_now = delta.norm().item()
            if size_now > bound:
                delta.mul_(bound / size_now)
    return TargetValue(delta.detach(), initial, keys, outputs, taken, loss_value)
