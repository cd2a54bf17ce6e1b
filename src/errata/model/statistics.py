"""Second moments of keys: C = E[k kᵀ] over ordinary text, for any set of layers in one pass.

A key is the input of a layer's MLP output projection at one token. ROME, MEMIT and their kin need C to leave
ordinary keys alone. References hide what C costs (a hundred thousand articles, one pass per layer); here one pass
serves all layers, the token budget is a multiple of the key width (2506.04226: a fraction of a percent of the usual
amount is enough), and the result is kept under a fingerprint of everything it depends on.

The first token of each text is left out: it acts as an attention sink whose key is an outlier.

The eigenvectors of C, of which AlphaEdit needs those that ordinary keys hardly use, are computed when first asked for
and kept beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from errata.errors import ArtifactError, NumericsError
from errata.model.probes import capturing_inputs, probing
from errata.model.tokens import Passage
from errata.paths import cache_folder
from errata.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from errata.model.editable import EditableModel

__all__ = ["KeyStatistics", "NullSpace", "StatisticsPlan", "key_statistics"]

_FORMAT = 2
_TOKENS_FOR_A_NULL_SPACE = 10  # per dimension


class _Enough(Exception):
    """The last block that is of interest has run."""


@dataclass(frozen=True)
class StatisticsPlan:
    """What the statistics are made from.

    Attributes:
        tokens_per_width: token budget as a multiple of the key width (ours; about one is needed for a full rank).
        max_length: tokens per text; longer texts are cut.
        shrinkage: C becomes C + shrinkage · tr(C)/width · I before it is factored.
        batch_tokens: padded tokens per forward pass.
        autocast: run the forward in bfloat16; sums are float32 per batch and float64 in total either way.
        checkpoint_batches: batches between two saved states.
    """

    tokens_per_width: float = 20.0
    max_length: int = 512
    shrinkage: float = 1e-3
    batch_tokens: int = 4096
    autocast: bool = True
    checkpoint_batches: int = 50


@dataclass(frozen=True)
class NullSpace:
    """The directions that ordinary keys hardly use: eigenvectors of C with small eigenvalues.

    Attributes:
        basis: [width, any], float64: the space's own orthonormal directions, or the others where those are fewer.
        inside: whether `basis` are the space's own.
        rank: dimension of the space; share: of the squared norm of ordinary keys, what lies in it.
    """

    basis: Tensor
    inside: bool
    rank: int
    share: float

    def project(self, keys: Tensor) -> Tensor:
        """P keys for keys [width, n]."""
        part = self.basis @ (self.basis.T @ keys.to(self.basis))
        return part if self.inside else keys.to(self.basis) - part


@dataclass(frozen=True)
class KeyStatistics:
    """Second moment of one layer's keys.

    Attributes:
        layer: the block's number.
        second_moment: C, [width, width], float64, uncentred, before shrinkage.
        mean: E[k], [width], float64.
        cholesky: lower factor of the shrunk C, float64.
        tokens: how many keys went in.
        file: where they are kept, if anywhere; their eigenvectors are kept beside them.
    """

    layer: int
    second_moment: Tensor
    mean: Tensor
    cholesky: Tensor
    tokens: int
    file: Path | None = None

    @classmethod
    def of(cls, layer: int, second_moment: Tensor, mean: Tensor, tokens: int, shrinkage: float) -> KeyStatistics:
        """From moments [width, width] and [width], float64."""
        width = len(mean)
        shrunk = second_moment + shrinkage * second_moment.diagonal().mean() * torch.eye(width, dtype=torch.float64)
        return cls(layer, second_moment, mean, torch.linalg.cholesky(shrunk), tokens)

    def solve(self, keys: Tensor) -> Tensor:
        """C⁻¹ keys for keys [width, n], by two triangular solves."""
        # cholesky_solve would copy the factor first, which takes longer than both solves.
        half = torch.linalg.solve_triangular(self.cholesky, keys.to(self.cholesky), upper=False)
        solved: Tensor = torch.linalg.solve_triangular(self.cholesky.mT, half, upper=True)
        return solved

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of C in ascending order, [width], and eigenvectors as columns, [width, width]; float64."""
        kept = None if self.file is None else self.file.with_suffix(".spectrum.safetensors")
        if kept is None or not kept.exists():
            values, vectors = torch.linalg.eigh(self.second_moment)
            if kept is not None:
                _write(kept, {"values": values, "vectors": vectors}, {"format": str(_FORMAT)})
            return values, vectors
        try:
            tensors = load_file(kept)
            return tensors["values"], tensors["vectors"]
        except (OSError, KeyError, SafetensorError) as error:
            raise ArtifactError(
                f"the eigenvectors in {kept} cannot be read ({error}); delete the file to make them again"
            ) from error

    def null_space(self, threshold: float, *, relative: bool) -> NullSpace:
        """What ordinary keys hardly use.

        Args:
            threshold: the largest eigenvalue of C that counts as none; `relative`: the largest share of the trace of C
                that the space may hold instead, which means the same whatever the scale of the keys.

        Raises:
            NumericsError: too few tokens went into C, so that most of what they do not span would only be what was not
                read; or no direction, or every one, is below the threshold.
        """
        width = len(self.mean)
        if self.tokens < _TOKENS_FOR_A_NULL_SPACE * width:
            raise NumericsError(
                f"layer {self.layer}: {self.tokens} keys of width {width} are too few to tell what ordinary keys do "
                f"not use; read at least {_TOKENS_FOR_A_NULL_SPACE} tokens per dimension "
                f"({_TOKENS_FOR_A_NULL_SPACE * width:,}): raise tokens_per_width, or give a larger corpus"
            )
        values, vectors = self.spectrum()
        shares = values.cumsum(0) / values.sum()
        rank = int((shares <= threshold).sum() if relative else (values < threshold).sum())
        if not 0 < rank < width:
            raise NumericsError(
                f"layer {self.layer}: {'no' if rank == 0 else 'every'} direction of the keys is below the threshold of "
                f"the null space, {threshold:g} ({'relative' if relative else 'absolute'}); the eigenvalues go from "
                f"{float(values[0]):.2g} to {float(values[-1]):.2g}, the median is {float(values[width // 2]):.2g}"
            )
        inside = 2 * rank <= width
        # A copy, so that the other eigenvectors need not stay.
        basis = (vectors[:, :rank] if inside else vectors[:, rank:]).clone()
        return NullSpace(basis, inside, rank, float(shares[rank - 1]))


def _corpus_digest(texts: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _names(model: EditableModel, layers: Sequence[int], texts: Sequence[str], plan: StatisticsPlan) -> dict[int, str]:
    """Per layer, the name under which its statistics are kept: everything they depend on, hashed."""
    corpus = _corpus_digest(texts)
    names = {}
    for layer in layers:
        parts: dict[str, Any] = {
            "format": _FORMAT,
            "weights": model.fingerprint,
            "layer": layer,
            "corpus": corpus,
            "tokens_per_width": plan.tokens_per_width,
            "max_length": plan.max_length,
            "shrinkage": plan.shrinkage,
            # Decides which texts are read before the budget is met, and what a saved state has already read.
            "batch_tokens": plan.batch_tokens,
            "autocast": plan.autocast,
            "dtype": str(model.dtype),
        }
        names[layer] = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
    return names


def _read(path: Path, layer: int) -> KeyStatistics:
    try:
        with safe_open(path, framework="pt") as file:
            tokens = int(file.metadata()["tokens"])
            return KeyStatistics(
                layer,
                file.get_tensor("second_moment"),
                file.get_tensor("mean"),
                file.get_tensor("cholesky"),
                tokens,
                path,
            )
    except Exception as error:
        raise ArtifactError(
            f"the key statistics in {path} cannot be read ({error}); delete the file to make them again"
        ) from error


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    draft = path.with_suffix(".new")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft, metadata=metadata)
    os.replace(draft, path)


def _batches(model: EditableModel, texts: Iterable[str], plan: StatisticsPlan) -> Iterator[list[Passage]]:
    """Texts in their order, in batches of about `batch_tokens` padded tokens."""
    rows: list[Passage] = []
    width = 0
    for text in texts:
        ids = model.passage(text).ids[: plan.max_length]
        if len(ids) < 2:
            continue
        if rows and (len(rows) + 1) * max(width, len(ids)) > plan.batch_tokens:
            yield rows
            rows, width = [], 0
        rows.append(Passage(ids, ()))
        width = max(width, len(ids))
    if rows:
        yield rows


def key_statistics(
    model: EditableModel,
    layers: Sequence[int],
    texts: Sequence[str],
    plan: StatisticsPlan | None = None,
    *,
    folder: Path | None = None,
    progress: Progress = NO_PROGRESS,
) -> dict[int, KeyStatistics]:
    """Second moments of the keys of several layers, from one pass over texts.

    The keys are the base model's, whatever is attached to it. What is found in `folder` under the right fingerprint is
    not computed again; an interrupted pass goes on where its last saved state left it.

    Args:
        layers: block numbers.
        texts: the corpus; if it runs out before the token budget, what it has is used.
        folder: where statistics are kept; defaults to errata's cache.

    Raises:
        NumericsError: fewer keys than the key width, so that C would be singular whatever the model.
        ArtifactError: a kept file is damaged.
    """
    plan = plan or StatisticsPlan()
    folder = folder or cache_folder("statistics")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = sorted({model.anatomy.layer(layer) for layer in layers})
    names = _names(model, wanted, texts, plan)
    done = {layer: _read(path, layer) for layer in wanted if (path := folder / f"{names[layer]}.safetensors").exists()}
    missing = [layer for layer in wanted if layer not in done]
    if missing:
        with model.bare():
            done |= _collect(model, missing, texts, plan, folder, names, progress)
    return {layer: done[layer] for layer in wanted}


@torch.no_grad()
def _collect(
    model: EditableModel,
    layers: list[int],
    texts: Sequence[str],
    plan: StatisticsPlan,
    folder: Path,
    names: dict[int, str],
    progress: Progress,
) -> dict[int, KeyStatistics]:
    widths = {layer: model.anatomy.key_width[layer] for layer in layers}
    budget = int(plan.tokens_per_width * max(widths.values()))
    together = hashlib.blake2b("-".join(names[layer] for layer in layers).encode(), digest_size=16).hexdigest()
    state_path = folder / f"partial-{together}.safetensors"
    sums = {layer: torch.zeros(widths[layer], widths[layer], dtype=torch.float64) for layer in layers}
    means = {layer: torch.zeros(widths[layer], dtype=torch.float64) for layer in layers}
    count, batch_number, skip = 0, 0, 0
    if state_path.exists():
        try:
            tensors = load_file(state_path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"the half-made key statistics in {state_path} cannot be read ({error}); delete the file to begin again"
            ) from error
        sums = {layer: tensors[f"sum.{layer}"] for layer in layers}
        means = {layer: tensors[f"mean.{layer}"] for layer in layers}
        count, skip = int(tensors["count"]), int(tensors["batches"])

    paths = {layer: model.anatomy.mlp_output[layer] for layer in layers}

    def enough(*_: Any) -> None:
        raise _Enough

    above = model.anatomy.blocks[max(layers) + 1 : max(layers) + 2]
    progress.start(f"key statistics of {len(layers)} layer{'s' * (len(layers) > 1)}", budget, count)
    for rows in _batches(model, texts, plan):
        batch_number += 1
        if batch_number <= skip:
            continue
        if count >= budget:
            break
        batch = model.batch(rows, side="right")
        autocast = plan.autocast and model.dtype == torch.float32
        half = torch.autocast(model.device.type, torch.bfloat16, enabled=autocast)
        with (
            capturing_inputs(model.model, paths.values(), len(rows)) as inputs,
            probing(model.model, before=dict.fromkeys(above, enough)),
            suppress(_Enough),
            half,
        ):
            model.trunk_states(batch)
        ordinary = batch.mask.bool() & (batch.positions > 0)
        for layer in layers:
            found_keys = inputs[paths[layer]]
            keys = found_keys[ordinary.to(found_keys.device)].float()
            sums[layer] += (keys.T @ keys).double().cpu()
            means[layer] += keys.sum(0).double().cpu()
        found = int(ordinary.sum())
        count += found
        progress.advance(found)
        if batch_number % plan.checkpoint_batches == 0:
            tensors = {f"sum.{layer}": sums[layer] for layer in layers} | {
                f"mean.{layer}": means[layer] for layer in layers
            }
            tensors |= {"count": torch.tensor(count), "batches": torch.tensor(batch_number)}
            _write(state_path, tensors, {})

    results = {}
    for layer in layers:
        width = widths[layer]
        if count < width:
            raise NumericsError(
                f"the corpus gave {count} keys for a key width of {width}: fewer than one per dimension. Give more "
                f"text (about {int(plan.tokens_per_width * width):,} tokens)"
            )
        statistics = KeyStatistics.of(layer, sums[layer] / count, means[layer] / count, count, plan.shrinkage)
        path = folder / f"{names[layer]}.safetensors"
        tensors = {
            "second_moment": statistics.second_moment,
            "mean": statistics.mean,
            "cholesky": statistics.cholesky,
        }
        _write(path, tensors, {"tokens": str(count), "format": str(_FORMAT)})
        results[layer] = replace(statistics, file=path)
    state_path.unlink(missing_ok=True)
    return results
