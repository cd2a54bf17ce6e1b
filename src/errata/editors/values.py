"""Finding v*: what one layer would have to put out at the subject for the model to say the target.

Shared by ROME and its kin (ROME, 2202.05262, equation 4; MEMIT, 2210.07229, equation 16). A vector δ is added at the
subject's last token, in every context at once, and is optimised so that the target becomes likely while what the model
thinks the subject *is* stays:

    L(δ) = mean_j [ −(1/T) Σ_t log p(y_t | context_j + prompt, δ) ] + kl · KL(p_δ ‖ p_0) + wd · ‖δ‖ / ‖v_0‖²

with p the next-token distribution at the subject's last token of "{subject} is a".

Many edits are sought side by side, each with Adam of its own, until it is done, and then leaves the batch: the result
is that of one by one. Nothing that cannot change is run twice: neither the blocks below the layer (`Tail`), nor what
stands before the subject's last token (`AnswerTail`), nor the vocabulary where nothing is to be predicted.

Knows recordings and losses. Knows nothing of keys' statistics, nor of what is made of δ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.edit import Edit
from errata.errors import NumericsError, SpanError
from errata.model import EditableModel
from errata.model.answer_tail import AnswerTail
from errata.model.scoring import length_batches
from errata.model.tail import Recording
from errata.model.tokens import Passage

__all__ = ["TargetValue", "ValueSettings", "find_target_value", "find_target_values"]


@dataclass(frozen=True)
class ValueSettings:
    """Adam steps and their bounds.

    Attributes:
        clamp: largest ‖δ‖ as a multiple of ‖v_0‖; stop_loss: enough is enough.
        acts_on: δ is added to the output of the layer's MLP output projection, or to the residual stream that leaves
            its block, as MEMIT has it. Where a block adds the former to the latter as it is, they differ in v_0 alone.
        batch_tokens: padded tokens that are run side by side; more edits than that are sought in several batches.
    """

    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 4.0
    kl_factor: float = 0.0625
    stop_loss: float = 0.05
    acts_on: Literal["mlp", "residual"] = "mlp"
    batch_tokens: int = 1024


@dataclass(frozen=True)
class TargetValue:
    """The result for one edit; keys and values are those of the subject's last token.

    Attributes:
        delta: δ, [hidden]; initial: v_0, what stands on the bare prompt where δ is added, [hidden].
        keys: the inputs of the layer's MLP output projection in each context, [contexts, key width], the bare prompt
            first.
        outputs: its present outputs in each context, [contexts, hidden].
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
    """Optimise δ for one edit; see `find_target_values`."""
    return find_target_values(model, layer, [edit], contexts, settings, full_forward=full_forward)[0]


def find_target_values(
    model: EditableModel,
    layer: int,
    edits: Sequence[Edit],
    contexts: Sequence[str],
    settings: ValueSettings,
    *,
    full_forward: bool = False,
) -> list[TargetValue]:
    """Optimise δ for each edit, as if it were the only one.

    Args:
        contexts: texts to put in front of the prompts; the bare prompt is always used too, first.
        full_forward: run whole forward passes (slow; for comparison).

    Raises:
        SpanError: a subject is missing or does not occur in its prompt.
        NumericsError: a loss is not finite.
    """
    tail = AnswerTail(model, layer, residual=settings.acts_on == "residual", full=full_forward)
    posed = [_Posed.of(model, edit, contexts) for edit in edits]
    sizes = [one.tokens(from_subject=not full_forward) for one in posed]
    found: dict[int, TargetValue] = {}
    for numbers in length_batches(sizes, settings.batch_tokens):
        found |= zip(numbers, _search(tail, [posed[number] for number in numbers], settings), strict=True)
    return [found[number] for number in range(len(posed))]


@dataclass(frozen=True)
class _Posed:
    """What one edit is sought with.

    Attributes:
        passages: its prompts with the target behind them, the bare one first, and last what its subject is; without
            what bears on nothing, the target's last token and what follows the subject there.
        targets: the target's tokens in each prompt.
        subjects: position of the subject's last token in each passage.
    """

    edit_id: str
    passages: tuple[Passage, ...]
    targets: tuple[tuple[int, ...], ...]
    subjects: tuple[int, ...]

    @classmethod
    def of(cls, model: EditableModel, edit: Edit, contexts: Sequence[str]) -> _Posed:
        if edit.subject is None:
            raise SpanError(f"edit {edit.id!r} has no subject; add the field 'subject', spelled as in the prompt")
        prompts = [edit.prompt, *(f"{context} {edit.prompt}" for context in contexts)]
        spans = [model.subject_span(prompt, edit.subject) for prompt in prompts]
        essence = model.subject_span(f"{edit.subject} is a", edit.subject)
        whole = [model.passage(prompt, edit.target) for prompt in prompts]
        passages = [Passage(passage.prompt, passage.answer[:-1]) for passage in whole]
        passages.append(Passage(essence.ids[: essence.last + 1], ()))
        subjects = (*(span.last for span in spans), essence.last)
        return cls(edit.id, tuple(passages), tuple(passage.answer for passage in whole), subjects)

    def tokens(self, *, from_subject: bool) -> int:
        """Padded tokens of its rows, all of them or those from the subject's last one on."""
        starts = self.subjects if from_subject else (0,) * len(self.subjects)
        longest = max(len(passage.ids) - start for passage, start in zip(self.passages, starts, strict=True))
        return longest * len(self.passages)


@dataclass(frozen=True)
class _Recorded:
    """The rows of some edits, recorded; each edit has the same number of them.

    Attributes:
        subjects: [edits, rows], the columns of the subjects' last tokens.
    """

    tail: AnswerTail
    posed: tuple[_Posed, ...]
    recording: Recording
    subjects: Tensor

    @classmethod
    def of(cls, tail: AnswerTail, posed: Sequence[_Posed]) -> _Recorded:
        passages = [passage for one in posed for passage in one.passages]
        positions = torch.tensor([one.subjects for one in posed])
        recording = tail.record(tail.model.batch(passages, side="right"), positions.flatten())
        batch = recording.batch
        there = batch.mask.bool() & (batch.positions == positions.flatten().to(batch.ids.device).unsqueeze(1))
        return cls(tail, tuple(posed), recording, there.long().argmax(dim=1).view(positions.shape))

    def of_edits(self, kept: Tensor) -> _Recorded:
        """The rows of some of the edits, kept [edits] bool."""
        posed = tuple(one for one, stays in zip(self.posed, kept.tolist(), strict=True) if stays)
        kept = kept.to(self.subjects.device)
        recording = self.tail.narrowed(self.recording, kept.repeat_interleave(self.subjects.shape[1]))
        if recording is None:
            return self.of(self.tail, posed)
        return _Recorded(self.tail, posed, recording, self.subjects[kept])

    def at_subjects(self, states: Tensor) -> Tensor:
        """What stands at the subjects' last tokens in the contexts, [edits, contexts, width], at least in float32."""
        columns = self.subjects.to(states.device)
        rows = torch.arange(columns.numel(), device=states.device).view(columns.shape)
        return _precise(states[rows, columns][:, :-1])

    def predicted(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """With δ [edits, hidden], per edit: the mean loss over its contexts [edits], and what its subject is, as
        log-probabilities [edits, vocabulary]."""
        rows_each = self.subjects.shape[1]

        def change(states: Tensor) -> Tensor:
            # δ at the subject of every row, zero elsewhere.
            columns = self.subjects.flatten().to(states.device)
            places = (torch.arange(len(columns), device=states.device), columns)
            zeros = torch.zeros(*states.shape[:2], delta.shape[1], dtype=delta.dtype, device=states.device)
            return zeros.index_put(places, delta.to(states.device).repeat_interleave(rows_each, dim=0))

        rows, columns = self.recording.batch.saying_places()
        logits = _precise(self.tail.run(self.recording, change, rows, columns))
        rows = rows.to(logits.device)
        is_essence = rows % rows_each == rows_each - 1  # its one place is the subject's last token
        rows, wanted = rows[~is_essence], [token for one in self.posed for own in one.targets for token in own]
        losses = F.cross_entropy(logits[~is_essence], torch.tensor(wanted, device=logits.device), reduction="none")
        weights = 1 / (torch.bincount(rows).to(losses) * (rows_each - 1))
        likely = losses.new_zeros(len(delta)).index_add(0, rows // rows_each, losses * weights[rows])
        return likely.to(delta.device), logits[is_essence].log_softmax(-1).to(delta.device)


def _precise(values: Tensor) -> Tensor:
    """The same in float32, or in what it is if that is finer."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _Adam:
    """Adam (1412.6980) on rows of which some may leave; they all began together, so that they count the same steps."""

    def __init__(self, values: Tensor, learning_rate: float) -> None:
        self.learning_rate, self.count = learning_rate, 0
        self.first, self.second = torch.zeros_like(values), torch.zeros_like(values)

    def step(self, values: Tensor, gradient: Tensor) -> Tensor:
        """The values after one step; both [rows, width]."""
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient.square()
        mean = self.first / (1 - 0.9**self.count)
        spread = (self.second / (1 - 0.999**self.count)).sqrt()
        return values - self.learning_rate * mean / (spread + 1e-8)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows [rows] bool."""
        self.first, self.second = self.first[rows], self.second[rows]


def _search(tail: AnswerTail, posed: Sequence[_Posed], settings: ValueSettings) -> list[TargetValue]:
    recorded = _Recorded.of(tail, posed)
    recording = recorded.recording
    keys, outputs = recorded.at_subjects(recording.inputs[tail.first]), recorded.at_subjects(recording.outputs)
    initial = (recorded.at_subjects(recording.leaving) if tail.residual else outputs)[:, 0]
    deltas, losses = torch.zeros_like(initial), torch.zeros_like(initial[:, 0])
    steps = torch.zeros(len(posed), dtype=torch.long)
    # Of the edits that go on, in the order of `active`: which they are, what they were, and how they move.
    active = torch.arange(len(posed), device=initial.device)
    sizes = initial.norm(dim=1).clamp(min=1e-12)
    adam = _Adam(deltas, settings.learning_rate)
    essences: Tensor | None = None
    for step in range(settings.steps):
        delta = deltas[active].requires_grad_()
        likely, now = recorded.predicted(delta)
        essences = now.detach() if essences is None else essences
        drift = F.kl_div(essences, now, log_target=True, reduction="none").sum(1)
        loss = likely + settings.kl_factor * drift + settings.weight_decay * delta.norm(dim=1) / sizes.square()
        losses[active], steps[active.cpu()] = loss.detach(), step
        if not bool(loss.isfinite().all()):
            lost = ", ".join(repr(posed[number].edit_id) for number in active[~loss.isfinite()].tolist())
            raise NumericsError(f"the target value of edit {lost} diverged; lower the learning rate or the clamp")
        on = loss.detach() >= settings.stop_loss
        if step == settings.steps - 1 or not bool(on.any()):
            break
        (gradient,) = torch.autograd.grad(loss.sum(), delta)
        moved = adam.step(delta.detach(), gradient)
        moved = moved * (settings.clamp * sizes / moved.norm(dim=1).clamp(min=1e-12)).clamp(max=1.0).unsqueeze(1)
        active, sizes, essences = active[on], sizes[on], essences[on]
        deltas[active] = moved[on]
        if not bool(on.all()):
            adam.keep(on)
            recorded = recorded.of_edits(on)
    return [
        TargetValue(deltas[n], initial[n], keys[n], outputs[n], int(steps[n]), float(losses[n]))
        for n in range(len(posed))
    ]
