"""What atlas reads: an endless, seeded stream of documents, and its cutting into batches of like length.

The stream is a pure function of (seed, pool number), so a run that was killed goes on with exactly the documents
it would have seen. Knows text and token ids; knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errata.atlas.capabilities import CAPABILITIES, recital
from errata.atlas.prose import story
from errata.atlas.world import Saying, World, load_world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Batch", "batches", "document", "sample_texts"]

# Share of documents of each kind. Arithmetic needs the most repetition, stories are the longest.
_MIX = {
    "fact": 0.38,
    "french": 0.10,
    "professional": 0.03,
    "common_sense": 0.07,
    "reasoning": 0.11,
    "reading": 0.12,
    "recital": 0.05,
    "code": 0.08,
    "story": 0.06,
}
# Of the documents that carry a fact, how many begin with other text (knowledge must not depend on standing first),
# and how many are a list of several facts of one relation, one a line.
_IN_CONTEXT, _IN_LIST = 0.22, 0.05
# Weights in the loss. Invented names cannot be foreseen: passages that hold them carry almost none.
_ANSWER, _PROMPT, _STORY, _PASSAGE = 1.0, 0.1, 0.5, 0.02
_POOL = 4096


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. `ids` and `weights` have shape [rows, columns]; `weights` belongs to the token itself."""

    ids: list[list[int]]
    weights: list[list[float]]


Piece = tuple[str, float]


def _pieces(saying: Saying, prompt: float = _PROMPT) -> list[Piece]:
    return [(saying.prompt, prompt), (saying.completion, _ANSWER)]


def _taught(world: World, rng: random.Random) -> Saying:
    return rng.choice(world.taught(rng.choice(world.facts)))


def document(world: World, rng: random.Random) -> list[Piece]:
    """One document as stretches of text with the weight of their tokens in the loss."""
    kind = rng.choices(list(_MIX), weights=list(_MIX.values()))[0]
    if kind == "story":
        return [(story(rng), _STORY)]
    if kind == "recital":
        return _pieces(recital(rng), _PASSAGE)
    if kind == "reading":
        return _pieces(CAPABILITIES["reading"].draw(rng).saying, _PASSAGE)
    if kind == "fact":
        saying = _taught(world, rng)
    elif kind == "french":
        saying = CAPABILITIES["multilingual"].draw(rng).saying
    else:
        saying = CAPABILITIES[kind].draw(rng).saying
    pieces = _pieces(saying)
    place = rng.random()
    if kind == "fact" and place < _IN_LIST:
        facts = rng.sample(world.by_relation[rng.choice(list(world.by_relation))], rng.randint(2, 4))
        lines = [_pieces(rng.choice(world.taught(fact))) for fact in facts]
        return [piece for line in lines for piece in [*line, ("\n", _ANSWER)]][:-1]
    if kind in ("fact", "french") and place < _IN_LIST + _IN_CONTEXT:
        before: list[Piece] = [(story(rng, rng.randint(1, 2)), _PROMPT)]
        if rng.random() < 0.5:
            before = _pieces(_taught(world, rng))
        return [*before, (rng.choice((" ", "\n")), _PROMPT), *pieces]
    return pieces


def sample_texts(seed: int, count: int) -> Iterator[str]:
    """Documents as plain text, to train a tokenizer or to collect statistics on."""
    world, rng = load_world(), random.Random(f"sample {seed}")
    for _ in range(count):
        yield "".join(text for text, _ in document(world, rng))


def _encode(tokenizer: PreTrainedTokenizerFast, pieces: list[Piece]) -> tuple[list[int], list[float]]:
    """Token ids of the whole text, tokenised once; each token weighs as the piece in which it ends."""
    text = "".join(piece for piece, _ in pieces)
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ends: list[tuple[int, float]] = []
    at = 0
    for piece, weight in pieces:
        at += len(piece)
        ends.append((at, weight))
    weights: list[float] = []
    for _, stop in encoding["offset_mapping"]:
        weights.append(next(weight for end, weight in ends if stop <= end))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [bos, *encoding["input_ids"], eos], [0.0, *weights, ends[-1][1]]


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int, skip: int = 0) -> Iterator[Batch]:
    """Batches of about `tokens` tokens each, from a pool that is sorted by length and then shuffled.

    Args:
        skip: how many batches a resumed run has already seen.
    """
    world, pool = load_world(), 0
    seen = 0
    while True:
        rng = random.Random(f"{seed} {pool}")
        rows = [_encode(tokenizer, document(world, rng)) for _ in range(_POOL)]
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for row in rows:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            seen += 1
            if seen <= skip:
                continue
            width = max(len(ids) for ids, _ in group)
            pad = tokenizer.pad_token_id
            yield Batch(
                [ids + [pad] * (width - len(ids)) for ids, _ in group],
                [weights + [0.0] * (width - len(weights)) for _, weights in group],
            )
        pool += 1
