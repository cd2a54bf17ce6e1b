"""A small network that turns the raw gradient of an edit into a better change of weight (MEND, 2110.11309).

The gradient of a loss with respect to a linear layer's weight is a sum over tokens, Σ g uᵀ, with u the layer's input
at the token and g the gradient with respect to its output. The network takes each pair (u, g), each normalised, and
gives another (ũ, g̃); the changed weight is

    W̃ = W − α Σ g̃ ũᵀ

with a learned α per matrix. It never sees a whole matrix, and its output has the rank of its input: at most the number
of tokens. Matrices of the same shape share a network and differ by a scale and an offset per layer of it.

At its start the network is the identity: then a change is one step of gradient descent along normalised gradients.

What differs from the published code: W − α, not W + α, so that the start is a step down; α is exp of what is learned,
so that it keeps its sign and a learning rate means the same for every model.

Knows rows of numbers. Knows nothing of edits, nor of how it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errata.editors.ultraedit import RunningStatistics

__all__ = ["FactoredUpdate", "GradientNetwork", "GradientRows", "per_row_change"]


@dataclass(frozen=True)
class GradientRows:
    """What the gradient of one matrix is made of: Σ g uᵀ over tokens.

    Attributes:
        inputs: u, [tokens, inputs]; gradients: g, [tokens, outputs]; float32.
        owner: [tokens], ascending, which edit of the batch each token belongs to.
    """

    inputs: Tensor
    gradients: Tensor
    owner: Tensor


@dataclass(frozen=True)
class FactoredUpdate:
    """A change of one matrix per edit: left[owner == edit]ᵀ @ right[owner == edit].

    Attributes:
        left: −α g̃, [tokens, outputs]; right: ũ, [tokens, inputs]; owner: [tokens], ascending.
    """

    left: Tensor
    right: Tensor
    owner: Tensor

    def of(self, edit: int) -> tuple[Tensor, Tensor]:
        """Factors of one edit's change: [outputs, rank] and [inputs, rank]."""
        own = self.owner == edit
        return self.left[own].T, self.right[own].T


def per_row_change(update: FactoredUpdate, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """From a layer's inputs [n, columns, inputs] to what is added to its outputs, when row i of the batch is answered
    with the change of edit rows[i] alone; no weight is copied."""
    edits = int(torch.cat([update.owner, rows.to(update.owner)]).max()) + 1
    counts = torch.bincount(update.owner, minlength=edits)
    place = torch.arange(len(update.owner), device=counts.device) - (counts.cumsum(0) - counts)[update.owner]
    shape = (edits, int(counts.max()))

    def padded(factor: Tensor) -> Tensor:
        return factor.new_zeros(*shape, factor.shape[1]).index_put((update.owner, place), factor)[rows]

    left, right = padded(update.left), padded(update.right)
    return lambda inputs: torch.bmm(torch.bmm(inputs.to(right), right.mT), left)


class _FactoredLayer(nn.Module):
    """x + act(s (U V x + b) + o), with s and o of the matrix that a row comes from; act is max(·, 0) or nothing."""

    def __init__(self, width: int, rank: int, matrices: int, rectified: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.rectified = rectified
        self.inner = nn.Parameter(torch.randn(rank, width, generator=generator) / width**0.5)
        self.outer = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(matrices, width))
        self.offset = nn.Parameter(torch.zeros(matrices, width))

    def forward(self, rows: Tensor, matrix: Tensor) -> Tensor:
        found = (rows @ self.inner.T) @ self.outer.T + self.bias
        found = found * self.scale[matrix] + self.offset[matrix]
        # Not relu: its gradient at 0, where everything starts, is 0, and nothing would ever be learned.
        return rows + (found.clamp(min=0) if self.rectified else found)


class _ShapeNetwork(nn.Module):
    """The network of all matrices of one shape, and the statistics by which their rows (u, g) are normalised."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int, rank: int, matrices: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))
        self.layers = nn.ModuleList(
            _FactoredLayer(width, rank, matrices, rectified, generator) for rectified in (True, False)
        )

    @property
    def statistics(self) -> RunningStatistics:
        return RunningStatistics(int(self.count), self.mean, self.squares)

    def observe(self, rows: Tensor) -> None:
        found = self.statistics.merged(rows)
        self.count.fill_(found.count)
        self.mean.copy_(found.mean)
        self.squares.copy_(found.squares)

    def forward(self, rows: Tensor, matrix: Tensor) -> Tensor:
        # Before anything was observed, rows are left as they are.
        rows = self.statistics.normalised(rows).float() if self.count > 0 else rows
        for layer in self.layers:
            rows = layer(rows, matrix)
        return rows


class GradientNetwork(nn.Module):
    """From the gradients of several matrices to changes of them.

    Args:
        shapes: [outputs, inputs] of each matrix, by module path.
        rank: of the factors of the network's layers.
        generator: of the initial weights; by default a new one with seed 0.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], rank: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.shapes, self.rank = dict(shapes), rank
        self.groups: dict[tuple[int, int], list[str]] = {}
        for path, shape in self.shapes.items():
            self.groups.setdefault(shape, []).append(path)
        generator = generator or torch.Generator().manual_seed(0)
        self.networks = nn.ModuleList(
            _ShapeNetwork(sum(shape), rank, len(paths), generator) for shape, paths in self.groups.items()
        )
        self.log_steps = nn.Parameter(torch.zeros(len(self.shapes)))

    @torch.no_grad()
    def set_steps(self, steps: Mapping[str, float]) -> None:
        """Set α of each matrix."""
        self.log_steps.copy_(torch.tensor([steps[path] for path in self.shapes]).log())

    def _rows(self, paths: Sequence[str], rows: Mapping[str, GradientRows]) -> tuple[Tensor, Tensor]:
        """Rows (u, g) of several matrices below one another, and which matrix each comes from."""
        device = self.log_steps.device
        both = [torch.cat([rows[path].inputs, rows[path].gradients], dim=1).to(device) for path in paths]
        sizes = torch.tensor([len(own) for own in both], device=device)
        return torch.cat(both), torch.arange(len(paths), device=device).repeat_interleave(sizes)

    @torch.no_grad()
    def observe(self, rows: Mapping[str, GradientRows]) -> None:
        """Take rows into the statistics by which rows are normalised."""
        for paths, network in zip(self.groups.values(), self.networks, strict=True):
            assert isinstance(network, _ShapeNetwork)
            found, _ = self._rows(paths, rows)
            if len(found):
                network.observe(found)

    def forward(self, rows: Mapping[str, GradientRows]) -> dict[str, FactoredUpdate]:
        """The change of each matrix, for each edit that the rows belong to."""
        updates: dict[str, FactoredUpdate] = {}
        steps = dict(zip(self.shapes, self.log_steps.exp(), strict=True))
        for paths, network in zip(self.groups.values(), self.networks, strict=True):
            found = network(*self._rows(paths, rows)).split([len(rows[path].owner) for path in paths])
            for path, own in zip(paths, found, strict=True):
                right, left = own.split([rows[path].inputs.shape[1], rows[path].gradients.shape[1]], dim=1)
                updates[path] = FactoredUpdate(-steps[path] * left, right, rows[path].owner.to(own.device))
        return updates
