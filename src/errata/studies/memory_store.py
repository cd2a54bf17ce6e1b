"""Does a memory that keeps what it drops, and retrieves it by the question, remember for longer? (M+, 2502.00592)

The same pools are asked in two ways after more and more other texts: out of the pool alone, which is MemoryLLM, and
with what each question retrieves from the long-term store beside it. What is written is the same, so answers differ by
what is read. N/K other texts leave about 1/e of a text's slots in a pool: the horizon that multiples are counted in.

What the retriever is worth is told apart from what the model makes of it: of the text's slots that lie in the store,
`recall` is the share that its questions retrieve, `chance` what as many slots drawn at random would hold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from errata.atlas.documents import Question, document
from errata.errors import ConfigError
from errata.evaluation.figures import COLOURS, label_ends, styled_figure, ticks
from errata.evaluation.tables import cell
from errata.studies.figures import INK, lines, titled
from errata.studies.memory_pools import (
    ANSWER_TOKENS,
    Pools,
    answered,
    first_number,
    groups,
    joined,
    memory_arm,
    other_documents,
    right_answers,
    updates_to_fill,
)
from errata.studies.result import Published, StudyResult, SubTable
from errata.studies.workbench import Arm, Workbench, measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["long_term", "retrieval"]

_HORIZONS = (0, 1, 2, 3, 4, 5)
_STORED = 8  # pools, unless long_term says otherwise: more than is dropped in all
_SHORT, _LONG = "memoryllm", "long_term"
_WAYS = {_SHORT: "the pool alone (MemoryLLM)", _LONG: "with the long-term store (M+)"}
_GREY = "#8c8c8c"
_PUBLISHED = {  # tokens that were read since, in thousands, up to which answers were still found
    "MemoryLLM-8B": {"thousand tokens": 20.0},
    "M+": {"thousand tokens": 160.0},
}


def long_term(bench: Workbench) -> StudyResult:
    """Ask about a text right after it was read and after one to five times N/K others, with the store and without."""
    one = Pools(bench, memory_arm(bench, long_term=1), "", 0)  # says what the network lacks, if it lacks anything
    arm = memory_arm(bench, long_term=_STORED * one.slots)
    config = bench.config(arm)
    if not getattr(config, _LONG):
        raise ConfigError(
            "this study compares a memory with a long-term store and without; leave memoryllm.long_term out"
        )
    count, horizon = bench.count(128, quick=4), math.ceil(one.slots / one.new)
    multiples = _HORIZONS[:2] if bench.options.quick else _HORIZONS
    bench.enter(arm)
    rows_of = []
    for group in groups(count, config.batch_size):
        numbers = [first_number(bench) + place for place in group]
        parts = {"store": numbers, "multiples": multiples, "network": one.network.digest(), "answer": ANSWER_TOKENS}
        make = functools.partial(_kept, bench, arm, numbers, [many * horizon for many in multiples])
        rows_of.append(bench.row(arm, [], parts, make))
    found = joined(rows_of)
    rows = []
    for many in multiples:
        at = str(many * horizon)
        row: dict[str, Any] = {"horizons": many, "after": many * horizon}
        right = {way: found["right"][way][at] for way in _WAYS}
        for way, own in right.items():
            row |= answered(way, own)
        pairs = [zip(right[_LONG][place], right[_SHORT][place], strict=True) for place in range(count)]
        row |= answered("gain", [[ours - theirs for ours, theirs in pair] for pair in pairs])
        for name in ("recall", "chance"):
            row |= measured(name, [value for value in found[name][at] if value is not None])
        left, stored = ([float(value) for value in found[name][at]] for name in ("left", "stored"))
        rows.append({**row, "slots_left": sum(left) / count, "slots_stored": sum(stored) / count, "documents": count})
    questions = sum(map(len, found["base"]))
    beside = [{"what": f"{what}, without the text", **answered("accuracy", found["without"][way])}
              for way, what in _WAYS.items()]  # fmt: skip
    beside.append({"what": "no memory, no text", **answered("accuracy", found["base"])})
    without = {way: row["accuracy"] for way, row in zip(_WAYS, beside, strict=False)}
    last = rows[-1]
    ahead = [str(row["horizons"]) for row in rows if (row["gain_interval"][0] or 0) > 0]
    sentence = (
        f"After {last['after']} other texts, {last['horizons']} times N/K, {cell(last[_LONG])} of {questions} "
        f"questions are answered with the store and {cell(last[_SHORT])} without ({cell(without[_LONG])} and "
        f"{cell(without[_SHORT])} where the text was never read). The retriever finds {cell(last['recall'])} of the "
        f"text's stored slots, {cell(last['chance'])} by chance. The store is ahead for certain "
        f"{'at ' + ', '.join(ahead) + ' N/K' if ahead else 'at no point'}."
    )
    bench.notes += [
        f"N = {one.slots} slots per layer, K = {one.new} per update, M = {found['long_term']} stored, R = "
        f"{found['retrieved']} retrieved; both ways ask the same pools, each of which had read {found['filled']} other "
        "texts before its document came; each later text is one update",
        "gain: with the store minus without, its interval over documents",
        "recall: of the document's slots in the store, the share that a question retrieves, over questions and layers; "
        "chance: R of the slots that a layer stores, drawn at random; none at 0, where nothing of it is stored",
        "slots left, slots stored: shares of the slots that the document wrote, in the pool and in the store",
    ]
    return bench.result(
        found=sentence,
        columns=(
            "horizons",
            "after",
            _SHORT,
            _LONG,
            "gain",
            "recall",
            "chance",
            "slots_left",
            "slots_stored",
            "documents",
        ),
        rows=rows,
        tables=[SubTable("The same questions otherwise", ("what", "accuracy"), beside)],
        numbers={f"without_{way}": value for way, value in without.items()},
        figure=_figure(rows, without, sentence),
        published=[Published(what, values, "M+ (2502.00592), abstract") for what, values in _PUBLISHED.items()],
    )


def retrieval(
    pools: Pools, updates: Sequence[Sequence[int]], questions: Sequence[Sequence[Question]]
) -> list[tuple[float | None, float | None]]:
    """Per pool, of the stored slots that these updates of its own wrote the share that its questions retrieve, and the
    share that as many slots drawn at random would hold; None where it stores none of them."""
    found: list[tuple[float | None, float | None]] = []
    for adapter, own, asked in zip(pools.adapters, updates, questions, strict=True):
        there, store = adapter.pool.stored_of(own), adapter.pool.store
        if store is None or not int(there.sum()):
            found.append((None, None))
            continue
        mine = torch.tensor(list(own))
        hits = [
            int(torch.isin(born, mine).sum())
            for layers in adapter.retrieve([one.prompt for one in asked], pools.model)
            for born in layers
        ]
        drawn = (there * adapter.retrieved / store.counts.clamp(min=adapter.retrieved)).sum()
        total = int(there.sum())
        found.append((sum(hits) / len(asked) / total, float(drawn) / total))
    return found


def _kept(bench: Workbench, arm: Arm, numbers: Sequence[int], times: Sequence[int]) -> dict[str, Any]:
    """A group of documents, each in a pool of its own."""
    documents = [document(one, part="test") for one in numbers]
    questions = [one.questions for one in documents]
    first = numbers[0] - first_number(bench)
    pools = Pools(bench, arm, f"long-term {bench.options.seed} {first}", len(documents))
    ways = {_SHORT: pools.without_store(), _LONG: pools}
    streams = [other_documents(bench, first + place, one.name) for place, one in enumerate(documents)]
    filled = updates_to_fill(bench, pools)
    title = f"documents {first + 1} to {first + len(numbers)}: texts read"
    bench.progress.start(title, (filled + 1 + max(times)) * len(documents))

    def read(own: Sequence[str], chunks: int | None) -> list[list[int]]:
        made = pools.read(own, chunks=chunks)
        bench.progress.advance(len(own))
        return made

    def ask() -> dict[str, list[list[int]]]:
        found = {}
        for way, own in ways.items():
            with own.attached():
                found[way] = own.ask(questions)
        return found

    right: dict[str, dict[str, list[list[int]]]] = {way: {} for way in _WAYS}
    shares: dict[str, dict[str, list[float | None]]] = {name: {} for name in ("recall", "chance", "left", "stored")}
    for _ in range(filled):
        read([next(stream).text for stream in streams], 1)
    without = ask()
    updates = read([one.text for one in documents], None)
    written = [pools.new * len(own) for own in updates]
    for after in range(max(times) + 1):
        if after:
            read([next(stream).text for stream in streams], 1)
        if after not in times:
            continue
        at = str(after)
        for way, own in ask().items():
            right[way][at] = own
        found = retrieval(pools, updates, questions)
        shares["recall"][at], shares["chance"][at] = [one for one, _ in found], [other for _, other in found]
        shares["left"][at] = [there / many for there, many in zip(pools.slots_of(updates), written, strict=True)]
        stored = [adapter.pool.stored_of(own) for adapter, own in zip(pools.adapters, updates, strict=True)]
        shares["stored"][at] = [float(own.float().mean()) / many for own, many in zip(stored, written, strict=True)]
    store, retrieved = pools.adapters[0].pool.store, pools.adapters[0].retrieved
    assert store is not None
    sizes = {"filled": filled, "long_term": store.slots, "retrieved": retrieved}
    return {**sizes, "right": right, "without": without, "base": right_answers(bench.model, questions), **shares}


def _figure(rows: Sequence[Mapping[str, Any]], without: Mapping[str, float], title: str) -> Figure:
    figure, (share, slots) = styled_figure(11.6, 4.4, 1, 2)
    times = [row["horizons"] for row in rows]
    for axis in (share, slots):
        axis.set(xlabel="other texts read since, in N/K", ylim=(-0.03, 1.05))
    share.set(ylabel="share of questions answered")
    ends = [
        (*lines(share, rows, "horizons", _LONG, COLOURS[0], "o"), "with the store", COLOURS[0]),
        (*lines(share, rows, "horizons", _SHORT, COLOURS[1], "s"), "the pool alone", COLOURS[1]),
    ]
    for way, name, colour in ((_LONG, "text never read, store", INK), (_SHORT, "text never read, pool", _GREY)):
        share.axhline(without[way], color=colour, linestyle=":", linewidth=1.1)
        ends.append((max(times), without[way], name, colour))
    slots.set(ylabel="share of the text's slots")
    below = [
        (*lines(slots, rows, "horizons", "recall", COLOURS[0], "o"), "of those stored, retrieved", COLOURS[0]),
        (*lines(slots, rows, "horizons", "chance", COLOURS[2], "D"), "at random", COLOURS[2]),
        (*lines(slots, rows, "horizons", "slots_left", COLOURS[1], "s"), "still in the pool", COLOURS[1]),
    ]
    for axis, names in ((share, ends), (slots, below)):
        ticks(axis, times, [str(one) for one in times])
        label_ends(axis, names)
    return titled(figure, title)
