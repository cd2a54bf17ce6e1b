"""Does a memory answer out of a text that is longer than the model's window? (MemoryLLM, 2402.04624)

One document stands somewhere among others. A pool reads them piece by piece and is asked when all of it has gone by.
The base model is shown the end of the text, as much as its positions leave, in front of the question; so is the model
with the network's changes of weight, which may have learned more about reading than the base ever did.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from errata.adapters.pool import window_of
from errata.atlas.documents import Document, document
from errata.evaluation.figures import COLOURS, label_ends, styled_figure, ticks
from errata.evaluation.tables import cell
from errata.model import EditableModel
from errata.studies.figures import INK, lines, titled
from errata.studies.memory_pools import (
    ANSWER_TOKENS,
    Pools,
    answered,
    first_number,
    groups,
    joined,
    memory_arm,
    right_answers,
)
from errata.studies.result import StudyResult
from errata.studies.workbench import Arm, Workbench

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["context", "last_tokens"]

_LENGTHS = (128, 256, 512, 1024, 2048)
_ANYWHERE, *_THIRDS = ("anywhere", "first third", "middle third", "last third")
_SEGMENTS, _FACTS = 2, 6  # of a document: two sentence groups of three, as the network is trained with
_ONE_IN = 2  # of a document's facts are asked about, from both groups
_WAYS = {
    "memory": "read into the memory",
    "last_tokens": "its end in the prompt",
    "last_tokens_changed": "its end, with changed weights",
    "alone": "no text",
}


@dataclass(frozen=True)
class _Context:
    """Documents that follow each other, and which of them is asked about."""

    documents: tuple[Document, ...]
    place: int

    @property
    def asked(self) -> Document:
        return self.documents[self.place]

    @property
    def text(self) -> str:
        return " ".join(one.text for one in self.documents)

    @property
    def segments(self) -> list[tuple[int, str]]:
        """What is read in one update each, and the place of its document."""
        return [(place, segment) for place, one in enumerate(self.documents) for segment in one.segments]


def context(bench: Workbench) -> StudyResult:
    """Contexts of 128 to 2,048 tokens: read into a pool piece by piece, or put in front of the question as they fit."""
    arm = memory_arm(bench)
    network, size = Pools(bench, arm, "", 0).network.digest(), bench.config(arm).batch_size
    count = bench.count(60, quick=3)
    window = window_of(bench.model)
    bench.enter(arm)
    rows = []
    for length in _LENGTHS[:2] if bench.options.quick else _LENGTHS:
        rows_of = []
        for group in groups(count, size):
            parts = {"context": [group.start, group.stop], "length": length, "network": network}
            make = functools.partial(_read, bench, arm, group, length)
            rows_of.append(bench.row(arm, [], {**parts, "seed": bench.options.seed, "answer": ANSWER_TOKENS}, make))
        found = joined(rows_of)
        for third, place in enumerate((_ANYWHERE, *_THIRDS), start=-1):
            own = [number for number in range(count) if third in (-1, number % len(_THIRDS))]
            if own:
                rows.append({"length": length, "place": place, **_summary(found, own)})
    overall = [row for row in rows if row["place"] == _ANYWHERE]
    ahead = [f"{row['length']:,}" for row in overall if _is_ahead(row)]
    longest = overall[-1]
    sentence = (
        f"Out of {longest['length']:,} tokens, {longest['updates']:.0f} updates, the memory answers "
        f"{cell(longest['memory'])} of {longest['questions']} questions; with the end of the text in the prompt it is "
        f"{cell(longest['last_tokens'])}, with the network's changes of weight {cell(longest['last_tokens_changed'])}, "
        f"without any text {cell(longest['alone'])}. The memory is ahead of both for certain "
        f"{'at ' + ', '.join(ahead) + ' tokens' if ahead else 'at no length'}."
    )
    bench.notes += [
        f"the context is a document of {_FACTS} facts, half of which are asked about, among others of as many; the "
        f"memory begins empty and reads each in {_SEGMENTS} pieces of whole sentences, an update each",
        f"last tokens: the base model, with as much of the end of the context in front of the question as its "
        f"{window or 'unlimited'} positions leave; whole: the share of contexts that fit there whole",
        "last tokens changed: the same prompts, with the changes of weight that the network was trained to have for a "
        "pool; it was not trained to read prompts",
        "ahead: memory minus last tokens, with an interval over documents; share of slots: of all slots of the pool, "
        "those of the document that is asked about",
        "contexts are dealt out to the thirds in turn; of fewer than three documents thirds are no different places",
    ]
    return bench.result(
        found=sentence,
        columns=(
            "length",
            "place",
            *_WAYS,
            "ahead",
            "ahead_of_changed",
            "whole",
            "tokens",
            "updates",
            "share_of_slots",
            "documents",
            "questions",
        ),
        rows=rows,
        figure=_figure(rows, window, sentence),
    )


def _is_ahead(row: Mapping[str, Any]) -> bool:
    """Whether the memory answers more than either model with the end of the text, beyond both intervals."""
    return all((row[f"{column}_interval"][0] or 0) > 0 for column in ("ahead", "ahead_of_changed"))


def _summary(found: Mapping[str, Any], own: Sequence[int]) -> dict[str, Any]:
    """Of some of the contexts."""
    row: dict[str, Any] = {"documents": len(own), "questions": sum(len(found["memory"][number]) for number in own)}
    for way in _WAYS:
        row |= answered(way, [found[way][number] for number in own])
    for way, column in (("last_tokens", "ahead"), ("last_tokens_changed", "ahead_of_changed")):
        pairs = [zip(found["memory"][number], found[way][number], strict=True) for number in own]
        row |= answered(column, [[ours - theirs for ours, theirs in pair] for pair in pairs])
    for name in ("whole", "tokens", "updates", "share_of_slots"):
        row[name] = float(sum(found[name][number] for number in own) / len(own))
    return row


def _document(number: int) -> Document:
    return document(number, part="test", facts=_FACTS, segments=_SEGMENTS)


def _context(bench: Workbench, pools: Pools, number: int, length: int) -> _Context:
    """Context `number` of at most so many tokens, or one document; what is asked about stands in third number % 3."""
    asked = _document(first_number(bench) + number)
    others: list[Document] = []
    total = len(pools.tokens([asked.text])[0])
    for another in itertools.count(first_number(bench) + 10_000 * (number + 1)):
        one = _document(another)
        if one.name == asked.name:
            continue
        total += len(pools.tokens([one.text])[0])
        if total > length:
            break
        others.append(one)
    drawn = random.Random(f"context {bench.options.seed} {length} {number}").random()
    place = int((number % len(_THIRDS) + drawn) / len(_THIRDS) * (len(others) + 1))
    return _Context((*others[:place], asked, *others[place:]), place)


def last_tokens(model: EditableModel, text: str, prompts: Sequence[str]) -> str:
    """The end of a text, as much of it as fits in front of any of these prompts with room for an answer behind."""
    window = window_of(model)

    def fits(kept: str) -> bool:
        longest = max(len(model.passage(f"{kept} {prompt}" if kept else prompt).ids) for prompt in prompts)
        return window is None or longest + ANSWER_TOKENS <= window

    if window is None or fits(text):
        return text
    ids: list[int] = model.tokenizer(text, add_special_tokens=False, padding=False)["input_ids"]
    shortest = min(len(model.passage(prompt).ids) for prompt in prompts)
    for count in range(min(len(ids), window - ANSWER_TOKENS - shortest), 0, -1):
        kept = str(model.tokenizer.decode(ids[-count:])).strip()
        if fits(kept):
            return kept
    return ""


def _read(bench: Workbench, arm: Arm, group: Sequence[int], length: int) -> dict[str, Any]:
    """A group of contexts, each read into a pool of its own, and put in front of its questions."""
    pools = Pools(bench, arm, f"context {bench.options.seed} {length} {group[0]}", len(group))
    contexts = [_context(bench, pools, number, length) for number in group]
    texts, questions = [one.text for one in contexts], [one.asked.questions[::_ONE_IN] for one in contexts]
    segments = [one.segments for one in contexts]
    title = f"{length:,} tokens, contexts {group[0] + 1} to {group[-1] + 1}: pieces read"
    bench.progress.start(title, sum(map(len, segments)))
    written: list[list[int]] = [[] for _ in contexts]
    with pools.attached():
        for step in range(max(map(len, segments))):
            going = [own[step] if step < len(own) else None for own in segments]
            made = pools.read([None if one is None else one[1] for one in going])
            for one, updates, own, whole in zip(going, made, written, contexts, strict=True):
                if one is not None and one[0] == whole.place:
                    own += updates
            bench.progress.advance(sum(one is not None for one in going))
        memory = pools.ask(questions)
    kept = [
        last_tokens(bench.model, text, [one.prompt for one in own]) for text, own in zip(texts, questions, strict=True)
    ]
    alone, truncated = (right_answers(bench.model, questions, own) for own in (None, kept))
    with pools.network.acting(bench.model):
        changed = right_answers(bench.model, questions, kept)
    return {
        "memory": memory,
        "last_tokens": truncated,
        "last_tokens_changed": changed,
        "alone": alone,
        "whole": [float(text == own) for text, own in zip(texts, kept, strict=True)],
        "tokens": [len(ids) for ids in pools.tokens(texts)],
        "updates": [adapter.pool.updates for adapter in pools.adapters],
        "share_of_slots": [there / pools.slots for there in pools.slots_of(written)],
    }


def _figure(rows: Sequence[Mapping[str, Any]], window: int | None, title: str) -> Figure:
    figure, axes = styled_figure(14.5, 4.1, 1, 1 + len(_THIRDS))
    styles = list(zip(_WAYS, (COLOURS[0], COLOURS[1], COLOURS[3], "#8c8c8c"), "os^D", strict=True))
    for axis, place in zip(axes, (_ANYWHERE, *_THIRDS), strict=True):
        own = [row for row in rows if row["place"] == place]
        axis.set(xlabel="tokens of the text", xscale="log", ylim=(-0.03, 1.05))
        where = "anywhere" if place == _ANYWHERE else f"in the {place}"
        axis.set_title(f"asked about a document {where}", fontsize=9.5)
        if not own:
            continue
        ends = [(*lines(axis, own, "length", way, colour, mark), _WAYS[way], colour) for way, colour, mark in styles]
        ticks(axis, [row["length"] for row in own])
        if window is not None and own[0]["length"] < window < own[-1]["length"]:
            axis.axvline(window, color=INK, linestyle=":", linewidth=0.9)
        if axis is axes[-1]:
            label_ends(axis, ends)
    axes[0].set_ylabel("share of questions answered")
    if window is not None:
        figure.supxlabel(f"dotted: the model's {window} positions", fontsize=8.5)
    return titled(figure, title)
