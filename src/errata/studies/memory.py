"""For how long does a pool of memory tokens answer for a text while others come in, and how much does it hold?

MemoryLLM (2402.04624) lets one expect that answers are forgotten as slots are dropped: each later text leaves 1 − K/N
of them. `retention` asks about a text after more and more others, and draws that curve beside what is measured.
`capacity` varies the size of the pool, and how many facts share the slots of one update.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from errata.atlas.documents import document
from errata.evaluation.figures import COLOURS, label_ends, styled_figure, ticks
from errata.evaluation.tables import cell
from errata.studies.figures import INK, lines, titled
from errata.studies.memory_pools import (
    ANSWER_TOKENS,
    METHOD,
    Pools,
    Right,
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
from errata.studies.workbench import Arm, Workbench

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["beside_theory", "capacity", "expected", "retention"]

_GREY = "#8c8c8c"
Numbers = np.ndarray[Any, np.dtype[np.float64]]
Share = TypeVar("Share", float, Numbers)


# --- how long ---------------------------------------------------------------------------------------------------------

_TIMES = (0, 1, 2, 5, 10, 20, 30, 40, 60)
_SOURCE = "MemoryLLM (2402.04624); the README of its code for the 8B model"
_PUBLISHED = {  # accuracy right after a text was read, and after so many others
    "MemoryLLM-7B, NaturalQA": {"at once": 0.46},
    "MemoryLLM-7B, SQuAD": {"at once": 0.39},
    "MemoryLLM-8B, NaturalQA, from a plot": {"at once": 0.57, "after 5": 0.42, "after 20": 0.30, "after 60": 0.15},
}
_OTHERWISE = {
    "without": "a pool of other texts, without this one",
    "base": "no pool, no text",
    "context": "no pool, the text in front of the question",
    "context_changed": "the same, with the network's changes of weight",
}


def expected(at_once: Share, without: Share, survival: float, after: float) -> Share:
    """Accuracy after so many other texts, if it falls as slots do: (a₁ − a_b)(1 − K/N)^t + a_b (2402.04624).

    The paper counts the text's own update too, so its exponent is t − 1.

    Args:
        at_once: a₁, right after the text was read; without: a_b, where it was never read; survival: 1 − K/N.
    """
    return (at_once - without) * float(survival**after) + without


def beside_theory(
    right: Mapping[int, Right], without: Right, survival: float, *, resamples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """Per number of later texts: accuracy, what theory expects, and whether they differ.

    Theory begins at what was measured at 0 and ends at what was measured without the text, so both are drawn anew in
    each resample of documents, and it is the difference that has an interval.

    Args:
        right: by number of later texts, 0 among them; survival: 1 − K/N.
    """
    counts = np.array([len(own) for own in without], dtype=np.float64)
    hits = {after: np.array([sum(own) for own in found], dtype=np.float64) for after, found in right.items()}
    floor = np.array([sum(own) for own in without], dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(counts), size=(resamples, len(counts)))
    every = np.arange(len(counts))[None]

    def above(after: int, picks: np.ndarray[Any, Any]) -> Numbers:
        """Per row of documents, measured minus theory."""
        total = counts[picks].sum(axis=1)
        now, first, never = (of[picks].sum(axis=1) / total for of in (hits[after], hits[0], floor))
        return np.asarray(now - expected(first, never, survival, after))

    rows = []
    for after, found in right.items():
        difference = float(above(after, every)[0])
        low, high = (float(edge) for edge in np.percentile(above(after, drawn), [2.5, 97.5]))
        verdict = "above" if low > 0 else "below" if high < 0 else "as predicted"
        row = {"after": after, **answered("accuracy", found)}
        row |= {"theory": row["accuracy"] - difference, "above_theory": difference}
        row |= {"above_theory_interval": [low, high], "verdict": verdict if after else "where theory begins"}
        rows.append(row)
    return rows


def retention(bench: Workbench) -> StudyResult:
    """Ask about a text right after it was read and after up to sixty others, beside what the paper's theory expects."""
    arm = memory_arm(bench)
    network, size = Pools(bench, arm, "", 0).network.digest(), bench.config(arm).batch_size
    count = bench.count(128, quick=4)
    times = (0, 1, 2) if bench.options.quick else _TIMES
    bench.enter(arm)
    rows_of = []
    for group in groups(count, size):
        numbers = [first_number(bench) + place for place in group]
        parts = {"retention": numbers, "times": times, "network": network, "answer": ANSWER_TOKENS}
        rows_of.append(bench.row(arm, [], parts, functools.partial(_kept, bench, arm, numbers, times)))
    found = joined(rows_of)
    survival = 1 - found["new"] / found["slots"]
    rows = beside_theory({after: found["right"][str(after)] for after in times}, found["without"], survival)
    questions = sum(map(len, found["without"]))
    for row in rows:
        left = found["left"][str(row["after"])]
        row |= {"slots_left": sum(left) / len(left), "slots_left_theory": survival ** row["after"]}
        row |= {"documents": count, "questions": questions}
    beside = [{"what": what, **answered("accuracy", found[name])} for name, what in _OTHERWISE.items()]
    numbers_of = {name: row["accuracy"] for name, row in zip(_OTHERWISE, beside, strict=True)}
    verdicts = [row["verdict"] for row in rows[1:]]
    told = ", ".join(f"{name} at {verdicts.count(name)}" for name in dict.fromkeys(verdicts))
    sentence = (
        f"{cell(rows[0]['accuracy'])} of {questions} questions are answered right after their text was read and "
        f"{cell(rows[-1]['accuracy'])} after {rows[-1]['after']} others, where theory expects "
        f"{cell(rows[-1]['theory'])} ({cell(numbers_of['without'])} without the text, {cell(numbers_of['context'])} "
        f"with it in the prompt). Of {len(verdicts)} points measured accuracy is {told}."
    )
    bench.notes += [
        f"N = {found['slots']} slots per layer, K = {found['new']} per update; each document came into a pool that "
        f"had read {found['filled']} other texts, and each later text is one update",
        "theory: (a_1 − a_b)(1 − K/N)^t + a_b, with a_1 measured right after the text was read and a_b in the same "
        "pool before it was read; above theory is measured minus theory, its interval over documents",
        "slots left: of those that the text wrote, a mean over layers and pools",
    ]
    return bench.result(
        found=sentence,
        columns=("after", "accuracy", "theory", "above_theory", "verdict", "slots_left", "slots_left_theory",
                 "documents", "questions"),
        rows=rows,
        tables=[SubTable("The same questions otherwise", ("what", "accuracy"), beside)],
        numbers={"survival": survival, **numbers_of},
        figure=_retention_figure(rows, numbers_of, survival, sentence),
        published=[Published(what, values, _SOURCE) for what, values in _PUBLISHED.items()],
    )  # fmt: skip


def _kept(bench: Workbench, arm: Arm, numbers: Sequence[int], times: Sequence[int]) -> dict[str, Any]:
    """A group of documents, each in a pool of its own."""
    documents = [document(one, part="test") for one in numbers]
    texts, questions = [one.text for one in documents], [one.questions for one in documents]
    first = numbers[0] - first_number(bench)
    pools = Pools(bench, arm, f"retention {bench.options.seed} {first}", len(documents))
    streams = [other_documents(bench, first + place, one.name) for place, one in enumerate(documents)]
    filled = updates_to_fill(bench, pools)
    title = f"documents {first + 1} to {first + len(numbers)}: texts read"
    bench.progress.start(title, (filled + 1 + max(times)) * len(documents))

    def read(own: Sequence[str], chunks: int | None) -> list[list[int]]:
        made = pools.read(own, chunks=chunks)
        bench.progress.advance(len(own))
        return made

    right, left = {}, {}
    with pools.attached():
        for _ in range(filled):
            read([next(stream).text for stream in streams], 1)
        without = pools.ask(questions)
        updates = read(texts, None)
        for after in range(max(times) + 1):
            if after:
                read([next(stream).text for stream in streams], 1)
            if after in times:
                right[str(after)] = pools.ask(questions)
                slots = zip(pools.slots_of(updates), updates, strict=True)
                left[str(after)] = [there / (pools.new * len(own)) for there, own in slots]
    base, in_context = (right_answers(bench.model, questions, own) for own in (None, texts))
    with pools.network.acting(bench.model):
        changed = right_answers(bench.model, questions, texts)
    return {
        "slots": pools.slots,
        "new": pools.new,
        "filled": filled,
        "right": right,
        "left": left,
        "without": without,
        "base": base,
        "context": in_context,
        "context_changed": changed,
    }


def _retention_figure(
    rows: Sequence[Mapping[str, Any]], beside: Mapping[str, float], survival: float, title: str
) -> Figure:
    figure, (share, slots) = styled_figure(11.6, 4.4, 1, 2)
    times = [row["after"] for row in rows]
    smooth = np.linspace(0, max(times), 100)
    theory = [expected(rows[0]["accuracy"], beside["without"], survival, float(after)) for after in smooth]
    share.set(xlabel="other texts read since", ylabel="share of questions answered", ylim=(-0.03, 1.05))
    share.plot(smooth, theory, "--", color=COLOURS[1], linewidth=1.5)
    ends = [
        (*lines(share, rows, "after", "accuracy", COLOURS[0], "o"), "out of the memory", COLOURS[0]),
        (max(times), theory[-1], "as theory expects", COLOURS[1]),
    ]
    for name, label, colour, dashes in (
        ("context", "text in the prompt", COLOURS[2], "-."),
        ("without", "text never read", _GREY, ":"),
        ("base", "no memory", INK, ":"),
    ):
        share.axhline(beside[name], color=colour, linestyle=dashes, linewidth=1.1)
        ends.append((max(times), beside[name], label, colour))
    label_ends(share, ends)
    shown = [str(one) if not one or one >= max(times) / 15 else "" for one in times]  # names that would overlap are not
    for axis in (share, slots):
        ticks(axis, times, shown)
    slots.set(xlabel="other texts read since", ylabel="share of the text's slots still there", ylim=(-0.03, 1.05))
    slots.plot(times, [row["slots_left"] for row in rows], "o", color=COLOURS[0], markersize=5)
    slots.plot(smooth, survival**smooth, "--", color=COLOURS[1], linewidth=1.5)
    counted = (max(times), rows[-1]["slots_left"], "counted", COLOURS[0])
    label_ends(slots, [counted, (max(times), survival ** max(times), "(1 − K/N)^t", COLOURS[1])])
    return titled(figure, title)


# --- how much ---------------------------------------------------------------------------------------------------------

_MULTIPLES = (5, 10, 20, 30, 60)  # N / K
_FACTS = (2, 3, 4, 6, 8, 12)
_USUAL_FACTS = 3
_LATER = (0, 10, 20)


def capacity(bench: Workbench) -> StudyResult:
    """Pools of several sizes, and documents of more and more facts, asked at once and after ten and twenty others."""
    usual = memory_arm(bench)
    one, together, quick = Pools(bench, usual, "", 0), bench.config(usual).batch_size, bench.options.quick
    facts = (2, _USUAL_FACTS) if quick else _FACTS
    later = (0, 1, 2) if quick else _LATER
    count = bench.count(64, quick=4)
    sizes = sorted({one.slots, *(many * one.new for many in (_MULTIPLES[:1] if quick else _MULTIPLES))})
    values = {str(slots): {"slots": slots} for slots in sizes}
    rows = []
    for arm, slots in zip(bench.arms(METHOD, "slots", values, {"batch_size": together}), sizes, strict=True):
        bench.enter(arm)
        told = facts if slots == one.slots else (_USUAL_FACTS,)
        rows_of = []
        for group in groups(count, together):
            numbers = [first_number(bench) + place for place in group]
            parts = {"capacity": numbers, "facts": told, "later": later, "network": one.network.digest()}
            make = functools.partial(_held, bench, arm, numbers, told, later)
            rows_of.append(bench.row(arm, [], {**parts, "answer": ANSWER_TOKENS}, make))
        found = joined(rows_of)
        for many in told:
            own = found[str(many)]
            row: dict[str, Any] = {"slots": slots, "updates_held": slots / one.new, "facts": many, "documents": count}
            row["tokens"] = sum(own["tokens"]) / count
            for after in later:
                row |= answered(f"after_{after}" if after else "at_once", own["right"][str(after)])
            rows.append({**row, **answered("without", own["without"]), "facts_answered": many * row["at_once"]})
    by_size = [row for row in rows if row["facts"] == _USUAL_FACTS]
    by_facts = [row for row in rows if row["slots"] == one.slots]
    columns = ["at_once", *(f"after_{after}" for after in later[1:]), "without"]
    small, large, few, most = by_size[0], by_size[-1], by_facts[0], by_facts[-1]
    sentence = (
        f"After {later[-1]} other texts a pool of {large['updates_held']:g} updates answers "
        f"{cell(large[columns[-2]])} of the questions and one of {small['updates_held']:g} {cell(small[columns[-2]])}; "
        f"at once {cell(large['at_once'])} and {cell(small['at_once'])}. {one.new} slots per layer answer at once for "
        f"{cell(few['at_once'])} of {few['facts']} facts and for {cell(most['at_once'])} of {most['facts']}."
    )
    bench.notes += [
        f"K = {one.new}, the slots that an update writes, is fixed by the trained network; how densely they are filled "
        "is varied by the facts of a document, which is one update as far as the model's positions allow it",
        f"the network is trained for N = {one.slots}; slots of larger pools stand closer where the model's positions "
        "ask for it",
        f"size is varied with {_USUAL_FACTS} facts, facts with N = {one.slots}; fewer facts are the first of more",
        "without: asked in the same pools before they read the text; facts answered: per document, at once",
    ]
    return bench.result(
        found=sentence,
        columns=("slots", "updates_held", "facts", "tokens", *columns, "facts_answered", "documents"),
        rows=rows,
        numbers={"slots_per_update": float(one.new)},
        figure=_capacity_figure(by_size, by_facts, columns, one.new, sentence),
    )


def _held(
    bench: Workbench, arm: Arm, numbers: Sequence[int], facts: Sequence[int], later: Sequence[int]
) -> dict[str, Any]:
    """A group of documents, each in a pool of its own that is filled once and set back for every number of facts."""
    told = {many: [document(one, part="test", facts=many) for one in numbers] for many in facts}
    first = numbers[0] - first_number(bench)
    pools = Pools(bench, arm, f"capacity {bench.options.seed} {first}", len(numbers))
    names = [one.name for one in told[facts[0]]]
    streams = [other_documents(bench, first + place, name) for place, name in enumerate(names)]
    filled = updates_to_fill(bench, pools)
    title = f"{pools.slots} slots, documents {first + 1} to {first + len(numbers)}: texts read"
    bench.progress.start(title, (filled + len(facts) * (1 + max(later))) * len(numbers))
    found: dict[str, Any] = {}
    with pools.attached():
        for _ in range(filled):
            pools.read([next(stream).text for stream in streams], chunks=1)
            bench.progress.advance(len(numbers))
        set_back = [adapter.snapshot() for adapter in pools.adapters]
        next_ones = [[next(stream).text for stream in streams] for _ in range(max(later))]
        for many, documents in told.items():
            for restore in set_back:
                restore()
            questions, right = [one.questions for one in documents], {}
            without = pools.ask(questions)
            pools.read([one.text for one in documents])
            for after in range(max(later) + 1):
                if after:
                    pools.read(next_ones[after - 1], chunks=1)
                if after in later:
                    right[str(after)] = pools.ask(questions)
                bench.progress.advance(len(numbers))
            tokens = [len(ids) for ids in pools.tokens([one.text for one in documents])]
            found[str(many)] = {"right": right, "without": without, "tokens": tokens}
    return found


def _capacity_figure(
    by_size: Sequence[Mapping[str, Any]],
    by_facts: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    new: int,
    title: str,
) -> Figure:
    figure, (sizes, facts) = styled_figure(11.6, 4.2, 1, 2)
    sizes.set(xlabel="size of the pool, in updates that it has room for (N / K)", xscale="log")
    sizes.set_title(f"documents of {_USUAL_FACTS} facts", fontsize=10)
    facts.set(xlabel=f"facts of the document, in {new} slots per layer")
    facts.set_title(f"a pool of {by_facts[0]['updates_held']:g} updates", fontsize=10)
    for axis, rows, x in ((sizes, by_size, "updates_held"), (facts, by_facts, "facts")):
        axis.set(ylabel="share of questions answered", ylim=(-0.03, 1.05))
        _draw_columns(axis, rows, x, columns)
        ticks(axis, [row[x] for row in rows])
    return titled(figure, title)


def _draw_columns(axis: Axes, rows: Sequence[Mapping[str, Any]], x: str, columns: Sequence[str]) -> None:
    """A line for each column; the last one, of what is answered without the text, in grey."""
    ends = []
    for place, (column, marker) in enumerate(zip(columns, "osDv", strict=False)):
        is_last = place + 1 == len(columns)
        colour = _GREY if is_last else COLOURS[place]
        name = "text never read" if is_last else column.replace("_", " ")
        ends.append((*lines(axis, rows, x, column, colour, marker), name, colour))
    label_ends(axis, ends)
