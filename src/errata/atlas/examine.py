"""What an atlas knows, measured: facts in taught and untaught wordings, six capabilities, prose."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from errata.atlas.capabilities import CAPABILITIES, Item, chance_level
from errata.atlas.prose import held_out_prose
from errata.atlas.world import Fact, Saying, load_world
from errata.evaluation.metrics import answers_exactly, bootstrap_mean
from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress

__all__ = ["examine_capabilities", "examine_knowledge", "scorecard"]

# Worked-out answers (sums column by column, two hops) are the longest that atlas gives.
_LONGEST_ANSWER = 48


def _right(model: EditableModel, sayings: Sequence[Saying], progress: Progress) -> list[float]:
    right: list[float] = []
    for start in range(0, len(sayings), 2048):
        part = sayings[start : start + 2048]
        said = model.generate([s.prompt for s in part], max_new_tokens=16, batch_tokens=16384)
        right += [float(answers_exactly(text, s.answer)) for text, s in zip(said, part, strict=True)]
        progress.advance(len(part))
    return right


def examine_knowledge(
    model: EditableModel, *, facts: Sequence[Fact] | None = None, progress: Progress = NO_PROGRESS
) -> dict[str, Any]:
    """Generated exact match on facts: their taught wordings, the wordings never shown for them, and by relation."""
    world = load_world()
    facts = world.facts if facts is None else facts
    taught = [(fact, saying) for fact in facts for saying in world.taught(fact)]
    untaught = [(fact, saying) for fact in facts for saying in world.untaught(fact)]
    progress.start("atlas: asking for facts", len(taught) + len(untaught))
    right_taught = _right(model, [s for _, s in taught], progress)
    right_untaught = _right(model, [s for _, s in untaught], progress)
    by_relation: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: {"taught": [], "untaught": []})
    for name, pairs, right in (("taught", taught, right_taught), ("untaught", untaught, right_untaught)):
        for (fact, _), hit in zip(pairs, right, strict=True):
            by_relation[fact.relation][name].append(hit)

    def share(values: list[float]) -> float:
        return round(sum(values) / len(values), 4)

    return {
        "facts": len(facts),
        "subjects": len({fact.subject for fact in facts}),
        "relations": {r: {name: share(hits) for name, hits in both.items()} for r, both in sorted(by_relation.items())},
        "taught": share(right_taught),
        "untaught": share(right_untaught),
    }


def examine_item(said: str, item: Item) -> bool:
    """Whether an answer to a capability item is right; of worked-out answers, the result counts."""
    return answers_exactly(item.result_of(said.strip()), item.result)


def examine_capabilities(model: EditableModel, *, progress: Progress = NO_PROGRESS) -> dict[str, Any]:
    """Generated exact match on every capability's fixed test, beside what the best constant guess earns."""
    scores: dict[str, Any] = {}
    progress.start("atlas: capabilities", len(CAPABILITIES))
    for name, task in CAPABILITIES.items():
        said = model.generate([item.prompt for item in task.test], max_new_tokens=_LONGEST_ANSWER)
        right = [float(examine_item(text, item)) for text, item in zip(said, task.test, strict=True)]
        measure = bootstrap_mean(right)
        scores[name] = {
            "accuracy": round(measure.value, 4),
            "interval": [round(measure.low, 4), round(measure.high, 4)],
            "chance": round(chance_level(task.test), 4),
            "items": len(task.test),
        }
        progress.advance(1)
    return scores


def scorecard(model: EditableModel, *, progress: Progress = NO_PROGRESS) -> dict[str, Any]:
    """Everything `errata atlas info` prints: facts, capabilities, perplexity of held-out prose."""
    return {
        **examine_knowledge(model, progress=progress),
        "capabilities": examine_capabilities(model, progress=progress),
        "prose_perplexity": round(model.perplexity(held_out_prose()), 4),
    }
