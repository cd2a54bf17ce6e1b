"""Does a memory that is rewritten a million times get worse at it? (MemoryLLM, 2402.04624, its test of integrity)

Several pools side by side read one text after the other, and are asked about the newest one again and again. If writing
upon what was written wore a pool out, fewer of these questions would be answered as it goes on: that is tested on the
line through all of them, and the size of the slots is watched on the way. The paper saw no decline in 650,000 updates.
"""

from __future__ import annotations

import functools
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errata.atlas.documents import Document, document
from errata.errors import ArtifactError, ConfigError
from errata.evaluation.figures import COLOURS, label_ends, styled_figure
from errata.evaluation.metrics import wilson_interval
from errata.evaluation.significance import trend
from errata.evaluation.tables import cell
from errata.studies.figures import INK, titled
from errata.studies.memory_pools import ANSWER_TOKENS, Pools, first_number, memory_arm
from errata.studies.result import StudyResult
from errata.studies.workbench import Arm, Workbench

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["integrity"]

_UPDATES = 1_000_000
_POOLS = 16
_QUESTIONS = 25_000  # on the way
_EVERY = 4  # updates of a pool from one question to the next, at least where there are enough
_CHECKPOINTS = 20
_WINDOW = 1000  # questions of the moving average
_BLOCK = 64  # rounds whose texts are made together
_SAVE_SECONDS = 180.0


def integrity(bench: Workbench) -> StudyResult:
    """A million updates of pools side by side, and a question about the newest text 25,000 times on the way."""
    arm = memory_arm(bench, _POOLS)
    count, pools = bench.count(_UPDATES, quick=400), bench.config(arm).batch_size
    rounds = count // pools
    if rounds < 3:
        raise ConfigError(f"--edits: give at least {3 * pools}, so that each of {pools} pools is updated three times")
    one = Pools(bench, arm, "", 0)
    every = max(1, min(_EVERY, rounds // 20), count // _QUESTIONS)
    parts = {"rounds": rounds, "every": every, "seed": bench.options.seed, "network": one.network.digest()}
    parts |= {"answer": ANSWER_TOKENS}
    bench.enter(arm)
    found = bench.row(arm, [], parts, functools.partial(_run, bench, arm, rounds, every, bench.place(arm, parts)))
    rows = _rows(found, pools, every)
    # A pool that is young holds few texts, so it is asked once it is as it stays.
    settled = min(round(3 * one.slots / one.new), rounds // 10)
    asked = [(every * (number + 1), hits) for number, hits in enumerate(found["hits"])]
    late = [(pools * place, hits / pools) for place, hits in asked if place > settled]
    line = trend([place for place, _ in late], [share for _, share in late])
    total = pools * len(late)
    mean = sum(share for _, share in late) / len(late)
    declines = line.p_decline < 0.05
    growth = rows[-1]["mean_norm"] / max(rows[0]["mean_norm"], 1e-12)
    sentence = (
        f"Over {pools * rounds:,} updates of {pools} pools ({rounds:,} each) {cell(mean)} of {total:,} questions about "
        f"the newest text are answered, and {'this declines' if declines else 'no decline is seen'}: from the first to "
        f"the last {100 * line.change:+.1f} points ({100 * line.low:+.1f} to {100 * line.high:+.1f}; p = {line.p:.2g} "
        f"if nothing changes, {line.p_decline:.2g} if nothing declines). Slots are {growth:.2f} times as large as at "
        f"{rows[0]['updates_per_pool']:,} updates, and {'all' if rows[-1]['finite'] == 1 else 'not all'} are finite."
    )
    bench.notes += [
        f"N = {one.slots}, K = {one.new}; texts of a round are of like length, and each pool reads every text once",
        "the line is that of least squares; p is the share of random orders of 100 blocks of the run that are as "
        "steep, the interval is over resampled blocks",
        f"left out of the line: the first {settled:,} updates of each pool, while it is young; a change of "
        f"{100 * line.detectable:.1f} points would have been found in four of five such runs",
        "norms: of the slots' states, a mean over pools and slots, then over layers; largest: of any slot",
    ]
    if found["refused"]:
        bench.notes.append(
            f"{found['refused']:,} updates gave numbers that are not finite; their pools stayed as they were"
        )
    layers = [name for name in rows[0] if name.startswith("norm_")]
    return bench.result(
        found=sentence,
        columns=(
            "updates",
            "updates_per_pool",
            "asked",
            "accuracy",
            "mean_norm",
            *(layers if len(layers) <= 12 else ()),
            "largest_norm",
            "finite",
        ),
        rows=rows,
        numbers={
            "updates": float(pools * rounds),
            "updates_per_pool": float(rounds),
            "pools": float(pools),
            "questions": float(total),
            "accuracy": mean,
            "change": line.change,
            "change_low": line.low,
            "change_high": line.high,
            "p": line.p,
            "p_decline": line.p_decline,
            "detectable": line.detectable,
            "refused": float(found["refused"]),
        },
        figure=_figure(rows, asked, late, line.change, pools, layers, sentence),
    )


def _rows(found: Mapping[str, Any], pools: int, every: int) -> list[dict[str, Any]]:
    """A row for each checkpoint, with the questions since the one before."""
    rows, before = [], 0
    for state in found["checkpoints"]:
        now = state["round"] // every
        hits, asked = sum(found["hits"][before:now]), pools * (now - before)
        row = {"updates": pools * state["round"], "updates_per_pool": state["round"], "asked": asked}
        row |= {"accuracy": hits / asked if asked else None}
        row |= {"accuracy_interval": list(wilson_interval(hits, asked)) if asked else None}
        norms = {f"norm_{layer}": norm for layer, norm in enumerate(state["norms"])}
        row |= {"mean_norm": sum(state["norms"]) / len(state["norms"]), **norms}
        rows.append({**row, "largest_norm": state["largest"], "finite": state["finite"]})
        before = now
    return rows


# --- the run ----------------------------------------------------------------------------------------------------------


class _Texts:
    """What each pool reads in each round: made in blocks, tokenised together, texts of like length in one round.

    Rounds of a block come in random order, so that no pool reads longer and longer texts.
    """

    def __init__(self, bench: Workbench, pools: Pools) -> None:
        self._pools, self._seed, self._first = pools, bench.options.seed, first_number(bench)
        self._block, self._rounds = -1, list[list[tuple[Document, list[int]]]]()

    def of_round(self, number: int) -> list[tuple[Document, list[int]]]:
        """For each pool a document and its token ids, the same for the same number."""
        block, place = divmod(number, _BLOCK)
        if block != self._block:
            self._block, self._rounds = block, self._made(block)
        return self._rounds[place]

    def _made(self, block: int) -> list[list[tuple[Document, list[int]]]]:
        size = len(self._pools.adapters)
        begin = self._first + block * _BLOCK * size
        told = [document(begin + number, part="test") for number in range(_BLOCK * size)]
        limit = self._pools.chunk_tokens
        ids = self._pools.tokens([one.text for one in told])
        pairs = sorted(zip(told, ids, strict=True), key=lambda pair: len(pair[1]))
        rng = random.Random(f"rounds {self._seed} {block}")
        rounds = []
        for at in range(0, len(pairs), size):
            own = [(one, its[:limit]) for one, its in pairs[at : at + size]]
            rng.shuffle(own)
            rounds.append(own)
        rng.shuffle(rounds)
        return rounds


class _State:
    """Where a run stands: its pools, what was answered and seen so far. Kept in one file, which is replaced whole.

    Attributes:
        round: updates of each pool so far; hits: per round that was asked, how many pools answered; checkpoints: what
            was seen of the slots; refused: updates that were not finite.
    """

    def __init__(self, folder: Path, pools: Pools) -> None:
        self.file, self.pools = folder / "state.safetensors", pools
        self.round = self.refused = 0
        self.hits: list[int] = []
        self.checkpoints: list[dict[str, Any]] = []

    def save(self) -> None:
        tensors: dict[str, Tensor] = {}
        records = []
        for number, adapter in enumerate(self.pools.adapters):
            own, record = adapter.pool.state()
            tensors |= {f"{number} {name}": tensor.contiguous() for name, tensor in own.items()}
            records.append(record)
        counts = {name: getattr(self, name) for name in ("round", "refused", "hits", "checkpoints")}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_suffix(".new")
        save_file(tensors, draft, metadata={"run": json.dumps({**counts, "pools": records})})
        os.replace(draft, self.file)

    def load(self) -> None:
        """Go on from what was saved, if anything was. Raises ArtifactError if it cannot be read."""
        if not self.file.exists():
            return
        try:
            with safe_open(self.file, framework="pt") as saved:
                record = json.loads(saved.metadata()["run"])
                for number, (adapter, own) in enumerate(zip(self.pools.adapters, record["pools"], strict=True)):
                    of_pool = f"{number} "
                    names = [name.removeprefix(of_pool) for name in saved.keys() if name.startswith(of_pool)]  # noqa: SIM118
                    adapter.pool.put_back({name: saved.get_tensor(f"{of_pool}{name}") for name in names}, own)
            for name in ("round", "refused", "hits", "checkpoints"):
                setattr(self, name, record[name])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ArtifactError(f"{self.file} cannot be read ({error}); delete it to begin again") from error

    def look(self) -> None:
        """Take a checkpoint: how large the slots are in each layer, and whether all are numbers."""
        states = torch.stack([adapter.pool.states for adapter in self.pools.adapters]).float()  # [pools, L, N, d]
        held = torch.stack([adapter.pool.born > 0 for adapter in self.pools.adapters]).to(states.device)
        norms = states.norm(dim=-1) * held
        self.checkpoints.append(
            {
                "round": self.round,
                "norms": (norms.sum(dim=(0, 2)) / held.sum(dim=(0, 2))).tolist(),
                "largest": float(norms.max()),
                "finite": float(states[held].isfinite().float().mean()),
            }
        )


def _run(bench: Workbench, arm: Arm, rounds: int, every: int, folder: Path) -> dict[str, Any]:
    """All rounds, or those that are still to be done."""
    pools = Pools(bench, arm, f"integrity {bench.options.seed}", bench.config(arm).batch_size)
    texts, state, size = _Texts(bench, pools), _State(folder, pools), len(pools.adapters)
    looks = {round(rounds * number / _CHECKPOINTS) for number in range(1, _CHECKPOINTS + 1)}
    with pools.attached():
        state.load()
        bench.progress.start(f"updates of {size} pools", rounds * size, state.round * size)
        began = saved = time.monotonic()
        first, recent = state.round, max(1, _WINDOW // size)
        while state.round < rounds:
            own = texts.of_round(state.round)
            state.refused += pools.update([(told.name, ids) for told, ids in own])
            state.round += 1
            if state.round % every == 0:
                asked = [one.questions[(len(state.hits) + n) % len(one.questions)] for n, (one, _) in enumerate(own)]
                state.hits.append(sum(map(sum, pools.ask([[one] for one in asked]))))
            if state.round in looks:
                state.look()
            now = time.monotonic()
            if now - saved >= _SAVE_SECONDS:
                state.save()
                saved = now
            last = state.hits[-recent:]
            speed = size * (state.round - first) / max(now - began, 1e-9)
            share = sum(last) / (size * len(last)) if last else 0.0
            bench.progress.advance(size, note=f"{speed:.0f} updates/s, of the last questions {share:.3f} right")
        state.save()
    return {name: getattr(state, name) for name in ("hits", "checkpoints", "refused")}


# --- the figure -------------------------------------------------------------------------------------------------------


def _figure(
    rows: Sequence[Mapping[str, Any]],
    asked: Sequence[tuple[int, int]],
    late: Sequence[tuple[int, float]],
    change: float,
    pools: int,
    layers: Sequence[str],
    title: str,
) -> Figure:
    figure, (share, norms) = styled_figure(9.0, 7.0, 2, 1)
    label = f"updates made, by {pools} pools together"
    window = max(1, min(_WINDOW // pools, len(asked) // 4))
    places = [pools * place for place, _ in asked][window - 1 :]
    hits = np.array([hit for _, hit in asked], dtype=np.float64)
    means = np.convolve(hits, np.ones(window), "valid") / (pools * window)
    edges = np.array([wilson_interval(min(mean, 1.0) * pools * window, pools * window) for mean in means])
    share.set(xlabel=label, ylabel="share of questions answered", ylim=(-0.03, 1.05))
    share.fill_between(places, edges[:, 0], edges[:, 1], color=COLOURS[0], alpha=0.13, linewidth=0)
    share.plot(places, means, color=COLOURS[0], linewidth=1.2)
    x, y = np.array([place for place, _ in late]), np.array([one for _, one in late])
    slope = change / (x[-1] - x[0])
    line = y.mean() + slope * (x[[0, -1]] - x.mean())
    share.plot(x[[0, -1]], line, "--", color=COLOURS[1], linewidth=1.6)
    share.set_title(
        f"about the newest text: moving average of {pools * window:,} questions with its 95 % interval, and the line "
        "through all", fontsize=9, loc="left", color=INK,
    )  # fmt: skip
    norms.set(xlabel=label, ylabel="mean norm of the slots")
    ends = []
    for number, layer in enumerate(layers):
        colour = COLOURS[number % len(COLOURS)]
        norms.plot([row["updates"] for row in rows], [row[layer] for row in rows], color=colour, linewidth=1.4)
        ends.append((rows[-1]["updates"], rows[-1][layer], f"layer {number}", colour))
    norms.set_ylim(0, 1.08 * max(row[layer] for row in rows for layer in layers))
    for axis in (share, norms):
        axis.set_xlim(0, 1.01 * rows[-1]["updates"])
        axis.xaxis.set_major_formatter("{x:,.0f}")
    label_ends(norms, ends)
    return titled(figure, title)
