"""Finding the stored mask that a prompt overlaps most, among up to a million: exact search against the index.

MEMOIR's shapes on Llama-3-8B: D = 14,336 features, k = 4,096 of them marked. A million real prompts of such a model
cannot be had here, so masks are made up, like real ones in what a search depends on (`SyntheticMasks`): how popular
features are, how much prompts of one relation share, and how much a prompt shares with its own paraphrase. Those
overlaps were measured on atlas (`measure_overlaps` measures them again) and stand below as quantiles.

Recall counts queries that fire: whose nearest mask overlaps by `THRESHOLD` or more. It is the share of them for which
the index gives the very mask that comparing all of them gives. Below the threshold both must stay silent.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from errata.atlas.edits import world_edits
from errata.edit import Edit
from errata.editors.memoir import Memoir
from errata.evaluation.figures import COLOURS, styled_figure
from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress
from errata.routing import MaskStore, TopHashRouter, pack, unpack
from errata.routing.index import SHARPEST, SharpestIndex
from errata.routing.tophash import Pooling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Prompts", "SyntheticMasks", "fill_store", "measure_overlaps", "run"]

WIDTH, MARKED = 14_336, 4_096
THRESHOLD = 0.618  # what MEMOIR calibrates on atlas, at 3% of neighbouring questions firing
_SIZES = (1_000, 10_000, 15_000, 100_000, 1_000_000)
_QUERIES = {"paraphrase (atlas)": 1000, "paraphrase (CounterFact)": 400, "hard negative": 200, "unrelated": 100}
_TIMED = 20  # exact searches that are timed one by one
_LIFECYCLE = 2_000  # appends and removals that are timed

_SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# measure_overlaps() and measure_overlaps(read_edits("counterfact-edit.json", limit=1000).edits, "mean"), as quantiles
# at _SHARES. Last-token pooling, which MEMOIR's calibration chooses on atlas, is blind to CounterFact's paraphrases,
# which end in other words than the prompt; they are taken under mean pooling, the paper's.
_MEASURED = {
    "paraphrase (atlas)": (0.465, 0.574, 0.686, 0.752, 0.814, 0.893, 0.929),
    "paraphrase (CounterFact)": (0.337, 0.364, 0.417, 0.485, 0.588, 0.715, 0.809),
    "unrelated": (0.278, 0.292, 0.312, 0.326, 0.342, 0.367, 0.394),
    "same relation": (0.296, 0.314, 0.342, 0.364, 0.394, 0.474, 0.547),
}


@dataclass(frozen=True)
class Prompts:
    """Made-up prompts, as the places in one long row of random numbers where their parts begin; all [n].

    Attributes:
        relation, wording, own: where the three parts begin that are added up to a prompt's features.
        weight: share of the wording in the variance.
    """

    relation: NDArray[np.int64]
    wording: NDArray[np.int64]
    own: NDArray[np.int64]
    weight: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, which: slice | NDArray[np.int64]) -> Prompts:
        return Prompts(self.relation[which], self.wording[which], self.own[which], self.weight[which])


class SyntheticMasks:
    """Prompts' features by a few parameters, fitted to the quantiles in `_MEASURED`, to popularity and to sharpness.

        a = s ⊙ (√r·R + √w·W + √(1−r−w)·O),    every element of R, W and O heavy-tailed: g·exp(t·h), g and h normal

    s, one number per feature and the same for all prompts, makes some features popular (lognormal). R is shared by
    prompts of a relation, W by those of a wording within it, O belongs to one prompt; w varies from prompt to prompt.
    Wordings are as uneven as relations are in real sets: the i-th has a share of 1/(i + 20). A paraphrase is
    c·a + √(1−c²)·a', with a' another prompt of another relation, and c such that the overlap is the one asked for.

    Args:
        generator: of everything that is drawn.
        width, marked: D and k.
    """

    scale, tail, relation_share, wording_share = 0.33, 0.65, 0.1, (0.1, 0.6)
    wordings, per_relation = 5_000, 5

    def __init__(self, generator: np.random.Generator, width: int = WIDTH, marked: int = MARKED) -> None:
        self.width, self.marked, self._generator = width, marked, generator
        numbers = 1 << 24

        def normal(size: int) -> NDArray[np.float32]:
            return generator.standard_normal(size, dtype=np.float32)

        self._scale = np.exp(self.scale * normal(width))
        self._numbers = normal(numbers) * np.exp(self.tail * normal(numbers))
        self._places = numbers - width
        self._wording_at = generator.integers(self._places, size=self.wordings)
        self._relation_at = generator.integers(self._places, size=self.wordings // self.per_relation)
        # The relations of the most common wordings are as random as those of the others.
        self._relation_of = generator.permutation(self.wordings) // self.per_relation
        self._kept = np.sin(np.linspace(0.0, 1.5, 16))  # c, and the overlap of a paraphrase that it gives
        pairs = self.prompts(48)
        self._overlap = np.array([self._overlap_at(pairs, float(kept)) for kept in self._kept])

    def prompts(self, count: int) -> Prompts:
        """Draw prompts as a store would hold them."""
        shares = 1.0 / (np.arange(self.wordings) + 20)
        return self._asking(self._generator.choice(self.wordings, count, p=shares / shares.sum()))

    def unrelated(self, count: int) -> Prompts:
        """Draw prompts of relations that no stored one has."""
        drawn, place = self._asking(np.zeros(count, dtype=np.int64)), self._generator.integers
        return Prompts(place(self._places, size=count), place(self._places, size=count), drawn.own, drawn.weight)

    def hard_negatives(self, stored: Prompts) -> Prompts:
        """Of each prompt, one with the same relation and wording about another subject."""
        drawn = self._asking(np.zeros(len(stored), dtype=np.int64))
        return Prompts(stored.relation, stored.wording, drawn.own, stored.weight)

    def _asking(self, wordings: NDArray[np.int64]) -> Prompts:
        own = self._generator.integers(self._places, size=len(wordings))
        weight = self._generator.uniform(*self.wording_share, len(wordings)).astype(np.float32)
        return Prompts(self._relation_at[self._relation_of[wordings]], self._wording_at[wordings], own, weight)

    def features(self, prompts: Prompts) -> NDArray[np.float32]:
        """[n, D]."""
        found = np.empty((len(prompts), self.width), dtype=np.float32)
        part = np.empty(self.width, dtype=np.float32)
        left = np.sqrt(1 - self.relation_share - prompts.weight)
        factors = (np.full_like(left, self.relation_share**0.5), np.sqrt(prompts.weight), left)
        parts = (prompts.relation, prompts.wording, prompts.own)
        for number, row in enumerate(found):
            row[:] = 0
            for starts, factor in zip(parts, factors, strict=True):
                start = starts[number]
                np.multiply(self._numbers[start : start + self.width], factor[number], out=part)
                row += part
        found *= self._scale
        return found

    def paraphrases(self, prompts: Prompts, overlaps: NDArray[np.float64]) -> NDArray[np.float32]:
        """Features [n, D] of paraphrases that share about these parts of the masks of their prompts."""
        return self._mixed(self.features(prompts), np.interp(overlaps, self._overlap, self._kept)[:, None])

    def _overlap_at(self, prompts: Prompts, kept: float) -> float:
        mine = self.features(prompts)
        masks, others = self.hash(mine)[0], self.hash(self._mixed(mine, np.full((len(prompts), 1), kept)))[0]
        return float(np.bitwise_count(masks & others).sum() / (len(prompts) * self.marked))

    def _mixed(self, features: NDArray[np.float32], kept: NDArray[np.float64]) -> NDArray[np.float32]:
        """Features [n, D] with the part c [n, 1] of them kept, and prompts of other relations for the rest."""
        other = self.features(self.unrelated(len(features)))
        mixed: NDArray[np.float32] = (
            kept.astype(np.float32) * features + np.sqrt(1 - kept**2).astype(np.float32) * other
        )
        return mixed

    def hash(self, features: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        """TopHash: packed masks [n, D/8] and the sharpest features [n, SHARPEST]."""
        sizes = np.abs(features)
        bounds = np.partition(sizes, (self.width - self.marked, self.width - SHARPEST), axis=1)
        least, sharp = bounds[:, self.width - self.marked], bounds[:, self.width - SHARPEST]
        masks = sizes > least[:, None]
        sharpest = np.empty((len(features), SHARPEST), dtype=np.uint16)
        for row, values in enumerate(sizes):
            at_bound = np.flatnonzero(values == least[row])  # one, and rarely several, of which the first are marked
            masks[row, at_bound[: self.marked - np.count_nonzero(masks[row])]] = True
            sharpest[row] = np.flatnonzero(values >= sharp[row])[:SHARPEST]
        return np.packbits(masks, axis=1), sharpest


@torch.no_grad()
def measure_overlaps(edits: Sequence[Edit] | None = None, pooling: Pooling = "last") -> dict[str, list[float]]:
    """Quantiles (1, 5, 25, 50, 75, 95, 99%) of mask overlap on atlas: own paraphrases, others, same relation.

    Args:
        edits: a thousand of atlas's world by default.
        pooling: of the router, see `TopHashRouter`.
    """
    model, edits = EditableModel.load("atlas"), world_edits(1000) if edits is None else edits
    editor = Memoir(model, relative_threshold=0.5, pooling=pooling)
    editor.prepare()
    editor.adapter.detach()
    router = editor.adapter.router  # type: ignore[attr-defined]
    assert isinstance(router, TopHashRouter)

    def masks(texts: list[str]) -> Tensor:
        found = torch.empty(len(texts), router.width, dtype=torch.bool)
        for indices, gathered in editor.adapter.gathered(texts, model):  # type: ignore[attr-defined]
            found[indices] = router.hash(router.features(gathered))
        return found

    stored = masks([edit.prompt for edit in edits])
    owners = torch.tensor([number for number, edit in enumerate(edits) for _ in edit.rephrases[:2]])
    others = masks([text for edit in edits for text in edit.rephrases[:2]])
    store = MaskStore(router.width, router.marked)
    store.load(pack(stored))
    among_stored, own = store.overlaps(stored), store.overlaps(others)[torch.arange(len(owners)), owners]
    relation = np.array([edit.tags[0] if edit.tags else "" for edit in edits])
    same = torch.from_numpy((relation[:, None] == relation[None]) & (relation != "")[None])
    different = ~same & ~torch.eye(len(edits), dtype=torch.bool)
    same.fill_diagonal_(False)

    def quantiles(values: Tensor) -> list[float]:
        return [round(float(q), 3) for q in np.quantile(values.numpy(), _SHARES)] if len(values) else []

    return {
        "paraphrase": quantiles(own),
        "unrelated": quantiles(among_stored[different]),
        "same relation": quantiles(among_stored[same]),
    }


@dataclass(frozen=True)
class _Queries:
    """Masks [q, D] and sharpest features [q, SHARPEST] of one kind of query."""

    kind: str
    masks: Tensor
    sharpest: Tensor


def fill_store(made: SyntheticMasks, prompts: Prompts, progress: Progress) -> tuple[Tensor, Tensor]:
    """Packed masks [n, D/8] and sharpest features [n, SHARPEST], made by as many threads as there are processors."""
    packed = torch.empty(len(prompts), made.width // 8, dtype=torch.uint8)
    sharpest = torch.empty(len(prompts), SHARPEST, dtype=torch.uint16)

    def fill(start: int) -> int:
        part = slice(start, start + 64)
        masks, sharp = made.hash(made.features(prompts[part]))
        packed[part], sharpest[part] = torch.from_numpy(masks), torch.from_numpy(sharp)
        return len(masks)

    progress.start("making masks", len(prompts))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(fill, range(0, len(prompts), 64)):
            progress.advance(done)
    return packed, sharpest


def _ask(made: SyntheticMasks, kind: str, stored: Prompts, rng: np.random.Generator) -> _Queries:
    """Queries of one kind about stored prompts."""
    chosen = stored[rng.integers(len(stored), size=_QUERIES[kind])]
    if kind == "unrelated":
        features = made.features(made.unrelated(len(chosen)))
    elif kind == "hard negative":
        features = made.features(made.hard_negatives(chosen))
    else:
        features = made.paraphrases(chosen, np.interp(rng.random(len(chosen)), _SHARES, _MEASURED[kind]))
    packed, sharpest = made.hash(features)
    return _Queries(kind, unpack(torch.from_numpy(packed), WIDTH), torch.from_numpy(sharpest))


def _seconds(call: Callable[[int], Any], count: int) -> list[float]:
    """Processor time of each of so many calls, which other programs on the machine do not add to."""
    taken = []
    for number in range(count):
        began = time.thread_time()
        call(number)
        taken.append(time.thread_time() - began)
    return taken


def _exactly(store: MaskStore, queries: _Queries, progress: Progress) -> tuple[Tensor, Tensor]:
    """The nearest of all stored masks, by as many threads as there are processors: overlaps [q] and numbers [q]."""

    def nearest(masks: Tensor) -> tuple[Tensor, Tensor]:
        return store.nearest(masks)

    progress.start(f"bench routing: comparing all of {len(store):,}", len(queries.masks))
    found = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in pool.map(nearest, torch.tensor_split(queries.masks, -(-len(queries.masks) // 20))):
            found.append(part)
            progress.advance(len(part[0]))
    return torch.cat([shares[:, 0] for shares, _ in found]), torch.cat([numbers[:, 0] for _, numbers in found])


def _row(store: MaskStore, index: SharpestIndex, queries: _Queries, build: float, progress: Progress) -> dict[str, Any]:
    """One size, one kind of query."""
    found: list[tuple[Tensor, Tensor]] = []

    def propose(number: int) -> None:
        one = slice(number, number + 1)
        found.append(store.nearest(queries.masks[one], 2, among=index.candidates(queries.sharpest[one])))

    with_index = _seconds(propose, len(queries.masks))
    by_scan = _seconds(lambda n: store.nearest(queries.masks[n : n + 1], 2), min(_TIMED, len(queries.masks)))
    exact_shares, exact_numbers = _exactly(store, queries, progress)
    shares, numbers = (torch.cat([pair[i][:, 0] for pair in found]) for i in (0, 1))
    fires, right = exact_shares >= THRESHOLD, numbers == exact_numbers
    return {
        "entries": len(store),
        "queries": queries.kind,
        "count": len(right),
        "exact_ms": 1e3 * statistics.median(by_scan),
        "index_ms": 1e3 * statistics.median(with_index),
        "fire": int(fires.sum()),
        "fire_through_index": int((shares >= THRESHOLD).sum()),
        "recall": float(right[fires].float().mean()) if bool(fires.any()) else None,
        "recall_from_0.5": _share(right, exact_shares >= 0.5),
        "build_s": build,
        "bytes_per_entry": (store.nbytes + index.nbytes) / len(store),
    }


def _share(right: Tensor, which: Tensor) -> float | None:
    return float(right[which].float().mean()) if bool(which.any()) else None


def _dense_ms(entries: int, masks: Tensor) -> float:
    """What a float matrix product over all masks takes, from as many as are given."""
    matrix, query = masks.float(), masks[0].float()
    return 1e3 * statistics.median(_seconds(lambda _: matrix @ query, 5)) * entries / len(masks)


def _lifecycle(store: MaskStore, index: SharpestIndex, extra: _Queries) -> dict[str, Any]:
    """Saving, loading memory-mapped, growing and shrinking, at the largest size."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "router.safetensors"
        saving = _seconds(lambda _: save_file({"masks": store.packed, "sharpest": index.sharpest}, place), 1)[0]
        size = place.stat().st_size

        def load() -> tuple[MaskStore, SharpestIndex]:
            tensors = load_file(place)
            new = MaskStore(store.width, store.marked), SharpestIndex(index.width, index.count)
            new[0].load(tensors["masks"])
            new[1].load(tensors["sharpest"])
            return new

        began = time.thread_time()
        mapped, lists = load()
        loading = time.thread_time() - began
        one = extra.masks[:1], extra.sharpest[:1]
        first = _seconds(lambda _: mapped.nearest(one[0], 2, among=lists.candidates(one[1])), 1)[0]

        def append(number: int) -> None:
            row = number % len(extra.masks)
            mapped.append(extra.masks[row])
            lists.append(extra.sharpest[row])

        before = len(mapped)
        appending = statistics.mean(_seconds(append, _LIFECYCLE))

        def remove(number: int) -> None:
            victim = (number * 7919) % (before // 2)
            mapped.remove(victim)
            lists.remove(victim)

        removing = statistics.mean(_seconds(remove, _LIFECYCLE))
    return {
        "entries": before,
        "saved_bytes_per_entry": size / before,
        "save_s": saving,
        "load_mapped_s": loading,
        "first_query_after_load_s": first,
        "appends_per_s": 1 / appending,
        "removals_per_s": 1 / removing,
    }


def _figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Latency and recall over the number of entries."""
    figure, (latency, recall) = styled_figure(9.0, 3.6, 1, 2)
    for number, kind in enumerate(_QUERIES):
        own = [row for row in rows if row["queries"] == kind]
        sizes, colour = [row["entries"] for row in own], COLOURS[number]
        latency.plot(sizes, [row["index_ms"] for row in own], "o-", color=colour, label=f"index, {kind}")
        if number == 0:
            latency.plot(sizes, [row["exact_ms"] for row in own], "s--", color=COLOURS[6], label="all masks compared")
        if "paraphrase" in kind:
            recall.plot(sizes, [row["recall"] for row in own], "o-", color=colour, label=f"{kind}, overlap ≥ τ")
            lower = [row["recall_from_0.5"] for row in own]
            recall.plot(sizes, lower, "^:", color=colour, label=f"{kind}, overlap ≥ 0.5")
    latency.set(xscale="log", yscale="log", xlabel="stored entries", ylabel="milliseconds per query")
    latency.set_title("finding the nearest mask, one thread", fontsize=10)
    recall.set(xscale="log", xlabel="stored entries", ylabel="share of queries", ylim=(0.9, 1.005))
    recall.set_title("the index finds what comparing all finds", fontsize=10)
    for axes in (latency, recall):
        axes.legend(fontsize=7, frameon=False)
    return figure


def run(progress: Progress = NO_PROGRESS, sizes: Sequence[int] = _SIZES) -> dict[str, Any]:
    """Ratios: of latencies at the largest size, exact over index; recall there; the index's latency there over 10k.

    Args:
        sizes: entries to measure at, ascending. Memory is about 2.2 KB for each of the largest.
    """
    rng = np.random.default_rng(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made = SyntheticMasks(rng)
        prompts = made.prompts(sizes[-1])
        packed, sharpest = fill_store(made, prompts, progress)
        rows: list[dict[str, Any]] = []
        for size in sizes:
            store, index = MaskStore(WIDTH, MARKED), SharpestIndex(WIDTH)
            store.load(packed[:size])
            index.load(sharpest[:size])
            asked = [_ask(made, kind, prompts[:size], rng) for kind in _QUERIES]
            began = time.thread_time()
            index.candidates(asked[0].sharpest[:1])  # the first one makes the lists
            build = time.thread_time() - began
            rows += [_row(store, index, queries, build, progress) for queries in asked]
        lifecycle = _lifecycle(store, index, asked[0])
        lifecycle["dense_float_ms"] = _dense_ms(sizes[-1], unpack(packed[:2000], WIDTH))
    finally:
        torch.set_num_threads(threads)

    def at(size: int, *kinds: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["entries"] == size and (row["queries"] in kinds or not kinds)]

    paraphrases = [kind for kind in _QUERIES if "paraphrase" in kind]
    largest = at(sizes[-1])
    index_ms = statistics.mean(row["index_ms"] for row in largest)
    beside = statistics.mean(row["index_ms"] for row in at(10_000 if 10_000 in sizes else sizes[0]))
    fired = [(row["recall"], row["fire"]) for row in at(sizes[-1], *paraphrases) if row["fire"]]
    ratios = {
        "routing_1m_vs_dense": statistics.mean(row["exact_ms"] for row in largest) / index_ms,
        "routing_recall_1m": sum(recall * fire for recall, fire in fired) / max(1, sum(fire for _, fire in fired)),
        "routing_1m_vs_10k": index_ms / beside,
    }
    return {"ratios": ratios, "rows": [*rows, lifecycle], "figure": _figure(rows)}
