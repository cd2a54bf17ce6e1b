"""Training a change of columns in the span of an edit's own activations, many edits at once.

A gradient step on columns S of a matrix is a sum of g_t z_tᵀ over the edit's places t, with z_t = x_t[S] known before
training begins. So the change never leaves the span of the z_t, and may be sought there:

    ΔW = B Q        B [outputs, r] is trained, Q [r, k] is fixed, r ≤ number of places

With Q = Λ^{-1/2} Uᵀ Z, where Z Zᵀ = U Λ Uᵀ, gradient descent on B is gradient descent on ΔW itself, at a fraction of
the numbers, and the edit's change is known as two thin factors.

Stored edits are spared by a metric: with C the second moment of their keys on the columns S and λ a ridge,

    Q = Λ^{-1/2} Uᵀ Z P,    P = (I + C/λ)^{-1},    Z P Zᵀ = U Λ Uᵀ

is gradient descent under the norm ‖ΔW P^{-1/2}‖, which counts what a change does to stored keys. It is the step of
recursive least squares, taken on the edit's loss instead of a given output. Λ is scaled to the trace it has without C,
so that a learning rate means the same whatever is stored.

Knows recordings and losses. Knows nothing of routers, nor how changes are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.errors import NumericsError
from errata.model.tail import Recording, Tail

__all__ = ["Descended", "Descent", "Space", "compressed", "descend"]

_NEGLIGIBLE = 1e-6  # share of the largest eigenvalue, or of a change's energy, that is rounding


@dataclass(frozen=True)
class Descent:
    """How a change is sought.

    Attributes:
        learning_rate, steps, clip_norm: of gradient descent; the norm is that of the whole gradient of an edit.
        stop_loss, stop_change: stop when the loss is at most the one and moved by at most the other.
        extra_label: count one answer token more than there are, as the published code does.
    """

    learning_rate: float
    steps: int
    clip_norm: float
    stop_loss: float
    stop_change: float
    extra_label: bool = False


@dataclass(frozen=True)
class Descended:
    """How far descent has come.

    Attributes:
        factors: B per layer, [edits, outputs, r] with columns of zeros beyond an edit's own rank.
        losses: [edits], before the last step; steps: [edits], taken; done: [edits].
    """

    factors: dict[int, Tensor]
    losses: Tensor
    steps: Tensor
    done: Tensor

    @property
    def waiting(self) -> Descended:
        """Of the edits that are not done."""
        on = ~self.done
        factors = {layer: own[on] for layer, own in self.factors.items()}
        return Descended(factors, self.losses[on], self.steps[on], self.done[on])


@dataclass(frozen=True)
class Space:
    """Where one edit's change in one layer is sought.

    Attributes:
        columns: [k], S; basis: [r, k], Q; start: [outputs, k], what stands in the columns.
        room: share of the edit's keys that stored keys do not span, in (0, 1].
    """

    columns: Tensor
    basis: Tensor
    start: Tensor
    room: float

    @classmethod
    def of(cls, keys: Tensor, columns: Tensor, start: Tensor, moment: Tensor | None, ridge: float) -> Space:
        """The span of `keys` [n, k] under the metric of the stored keys' `moment` [k, k], if there are any."""
        keys = keys.float()
        spared = keys.T
        if moment is not None:
            metric = torch.eye(len(columns)) + moment / ridge
            factor, failed = torch.linalg.cholesky_ex(metric)
            # Of many large keys, rounding may leave a moment that is not quite positive.
            spared = torch.linalg.solve(metric, spared) if failed else torch.cholesky_solve(spared, factor)
        gram = keys @ spared
        gram, energy = (gram + gram.T) / 2, keys.square().sum()
        room = float(gram.trace() / energy.clamp(min=torch.finfo(torch.float32).tiny))
        if not room > 0:
            raise NumericsError("the edit's activations vanish in its columns, so nothing can be written there")
        values, vectors = torch.linalg.eigh(gram)
        kept = values > _NEGLIGIBLE * values[-1]
        scale = room**-0.5  # to the trace without stored keys
        basis = (vectors[:, kept] * values[kept].rsqrt()).T @ spared.T * scale
        return cls(columns, basis, start, room)


class _LayerChange:
    """The changes of all edits in one layer, as `Tail.run` takes them.

    Args:
        spaces: per edit its space in this layer, None where it has none.
        owner: [rows], which edit each row trains; places: [rows, columns], where the memory acts.
        inputs: of the layer as recorded: for these, what does not change is computed once.
    """

    def __init__(self, spaces: Sequence[Space | None], owner: Tensor, places: Tensor, inputs: Tensor) -> None:
        known = [space for space in spaces if space is not None]
        rank, count = max(len(space.basis) for space in known), len(known[0].columns)
        outputs, device = len(known[0].start), inputs.device
        basis = torch.zeros(len(spaces), rank, count, device=device)
        start = torch.zeros(len(spaces), outputs, count, device=device)
        columns = torch.zeros(len(spaces), count, dtype=torch.long, device=device)
        for number, space in enumerate(spaces):
            if space is not None:
                basis[number, : len(space.basis)] = space.basis.to(device)
                start[number], columns[number] = space.start.to(device), space.columns.to(device)
        self.owner, self.places, self.inputs = owner.to(device), places.to(device), inputs
        self.basis, self.start, self.columns = basis[self.owner], start[self.owner], columns[self.owner]
        self.factors = torch.zeros(len(spaces), outputs, rank, device=device, requires_grad=True)
        with torch.no_grad():
            self.recorded = self._coordinates(inputs)

    def _coordinates(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Where the inputs lie in each row's space [rows, columns, r], and what is read there already."""
        marked = inputs.gather(2, self.columns.unsqueeze(1).expand(-1, inputs.shape[1], -1)).float()
        marked = marked * self.places.unsqueeze(2)
        return torch.bmm(marked, self.basis.mT), torch.bmm(marked, self.start.mT)

    def __call__(self, inputs: Tensor) -> Tensor:
        coordinates, read = self.recorded if inputs is self.inputs else self._coordinates(inputs)
        return (read + torch.bmm(coordinates, self.factors[self.owner].mT)).to(inputs.dtype)


def descend(
    tail: Tail,
    recording: Recording,
    spaces: Mapping[int, Sequence[Space | None]],
    owner: Tensor,
    places: Tensor,
    labels: tuple[Tensor, Tensor, Tensor],
    settings: Descent,
    begin: Descended | None = None,
    until: float = 1.0,
) -> Descended:
    """Gradient descent on all edits side by side, each on its own loss and each until it is done.

    The loss of an edit is the mean over its rows of the mean cross-entropy of the row's labels.

    Args:
        spaces: per layer, per edit; owner: [rows], the edit that each row of the recording belongs to.
        places: [rows, columns], True where the memory acts.
        labels: rows and columns whose prediction is asked for, and the tokens it should be, [n] each.
        begin: what to go on from; its steps count.
        until: come back once this share of the edits is done, so that the others can go on in a smaller batch.

    Raises:
        NumericsError: a loss is not finite.
    """
    edits = int(owner.max()) + 1
    changes = {
        layer: _LayerChange(own, owner, places, recording.inputs[layer])
        for layer, own in spaces.items()
        if any(space is not None for space in own)
    }
    rows, columns, wanted = labels
    owner, device = owner.to(rows.device), rows.device
    per_row = torch.bincount(rows, minlength=len(recording.batch.ids)).float() + settings.extra_label
    per_edit = torch.bincount(owner, minlength=edits).float()
    weight = 1.0 / (per_row[rows] * per_edit[owner[rows]])
    whose = owner[rows]
    before = torch.full((edits,), torch.inf, device=device)
    steps = torch.zeros(edits, dtype=torch.long, device=device)
    done = torch.zeros(edits, dtype=torch.bool, device=device)
    if begin is not None:
        before, steps = begin.losses.to(device), begin.steps.to(device)
        with torch.no_grad():
            for layer, change in changes.items():
                change.factors += begin.factors[layer].to(change.factors.device)[:, :, : change.factors.shape[2]]
    given: Mapping[int, Callable[[Tensor], Tensor]] = changes
    factors = [change.factors for change in changes.values()]
    for _ in range(settings.steps - int(steps.max())):
        logits = tail.run(recording, given, rows, columns)
        losses = F.cross_entropy(logits.float(), wanted.to(logits.device), reduction="none").to(device)
        loss = torch.zeros(edits, device=device).index_add(0, whose, losses * weight)
        now = loss.detach()
        if not bool(now.isfinite().all()):
            raise NumericsError("the edit's loss is not finite; lower the learning rate")
        done = done | ((now <= settings.stop_loss) & ((before - now).abs() <= settings.stop_change))
        if int(done.sum()) >= until * edits:
            break
        before = now
        gradients = torch.autograd.grad(loss.sum(), factors)
        with torch.no_grad():
            norms = sum(g.square().sum((1, 2)).to(device) for g in gradients) ** 0.5
            size = settings.learning_rate * (settings.clip_norm / (norms + 1e-6)).clamp(max=1.0) * ~done
            for factor, gradient in zip(factors, gradients, strict=True):
                factor -= size.to(factor.device)[:, None, None] * gradient
        steps = steps + ~done
    found = {layer: change.factors.detach().cpu() for layer, change in changes.items()}
    return Descended(found, before.cpu(), steps.cpu(), done.cpu())


def compressed(factors: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The change B Q [outputs, k] in as few terms as hold all of it but rounding, in bfloat16: [outputs, r], [r, k]."""
    across, triangle = torch.linalg.qr(basis.T)
    left, sizes, right = torch.linalg.svd(factors @ triangle.T, full_matrices=False)
    left_out = sizes.square().flip(0).cumsum(0).flip(0)  # energy from each term on
    kept = max(1, int((left_out > _NEGLIGIBLE * left_out[0]).sum()))
    root = sizes[:kept].sqrt()
    return (left[:, :kept] * root).bfloat16(), (root.unsqueeze(1) * (right[:kept] @ across.T)).bfloat16()
