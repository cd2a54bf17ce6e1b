"""One state of a model, asked everything that "Navigating the Dual Facets" (2402.11122) looks at.

Six capabilities, item by item; language modelling by domain; questions behind examples, true and shuffled; how far
weights have moved, or how often a memory acts where it should not. No edit is about any of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from errata.adapters import Adapter
from errata.atlas.capabilities import CAPABILITIES, Item, recital
from errata.atlas.examine import examine_item
from errata.datasets.builtin import held_out_texts
from errata.evaluation.damage import firing_share
from errata.evaluation.metrics import answers_exactly, bootstrap_mean, finite_or_none
from errata.model import EditableModel
from errata.progress import Progress

__all__ = ["SIZES", "Ask", "examine", "gains", "summary"]

_SHOTS = (1, 4)  # beside none
_TAUGHT = ("professional", "multilingual", "code")  # of which examples are put in front of questions
_ITEMS = 200  # of each capability; as many recitals
_FEW = 60  # of each capability, where examples stand in front
_SPARE = 4  # tokens that a model may write beyond the longest right answer, so that one that goes on is not cut right
SIZES = [_ITEMS, _FEW, _SPARE, *_SHOTS]  # what a finished state depends on beside the model

Ask = Callable[[str, str], str]
"""(capability, question) to the prompt that a model is given: itself, or in the model's chat template."""


def _room(model: EditableModel, answers: Sequence[str]) -> int:
    """Tokens to generate: a model that has collapsed writes as many as it may."""
    return _SPARE + max(len(model.tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers)


def _right(model: EditableModel, prompts: Sequence[str], items: Sequence[Item]) -> str:
    """Per item whether the answer is right, as ones and zeros."""
    said = model.generate(list(prompts), max_new_tokens=_room(model, [item.answer for item in items]))
    lines = [text.strip().partition("\n")[0] for text in said]
    return "".join(str(int(examine_item(line, item))) for line, item in zip(lines, items, strict=True))


def _with_examples(items: Sequence[Item], drawn: Sequence[Sequence[Item]], shuffled: bool) -> list[str]:
    """Every question behind its examples; shuffled, each example has the answer of the one before it."""
    prompts = []
    for item, examples in zip(items, drawn, strict=True):
        answers = [example.answer for example in examples]
        if shuffled:
            answers = [answers[-1], *answers[:-1]]
        gaps = ["" if example.prompt.endswith("\n") else " " for example in examples]
        told = "".join(f"{e.prompt}{gap}{a}\n" for e, gap, a in zip(examples, gaps, answers, strict=True))
        prompts.append(told + item.prompt)
    return prompts


def _behind_examples(model: EditableModel, ask: Ask, progress: Progress) -> dict[str, str]:
    """Questions of three capabilities behind examples of the same, per number of examples."""
    found = {}
    for count in _SHOTS:
        for shuffled in (False, True)[: 1 + (count > 1)]:  # a single example has no other's answer
            bits = ""
            for name in _TAUGHT:
                items = CAPABILITIES[name].test[:_FEW]
                rng = random.Random(f"examples {name} {count}")
                drawn = [[CAPABILITIES[name].draw(rng) for _ in range(count)] for _ in items]
                prompts = [ask(name, prompt) for prompt in _with_examples(items, drawn, shuffled)]
                bits += _right(model, prompts, items)
                progress.advance(note=f"{count} example{'s' * (count > 1)}")
            found[f"shots_{count}{'_shuffled' * shuffled}"] = bits
    return found


def examine(model: EditableModel, adapter: Adapter | None, ask: Ask, progress: Progress) -> dict[str, Any]:
    """Everything that is asked of one state.

    Args:
        adapter: what is attached to the model, None for the unedited one.
    """
    domains = {
        "prose": held_out_texts(120),
        **{
            name: [f"{item.prompt} {item.answer}" for item in CAPABILITIES[name].test[:_ITEMS]]
            for name in ("multilingual", "reading")
        },
    }
    progress.start("capabilities", len(CAPABILITIES) + 3 * len(_TAUGHT))
    right = {}
    for name, task in CAPABILITIES.items():
        items = task.test[:_ITEMS]
        right[name] = _right(model, [ask(name, item.prompt) for item in items], items)
        progress.advance(note=name)
    shots = {"shots_0": "".join(right[name][:_FEW] for name in _TAUGHT), **_behind_examples(model, ask, progress)}
    rng = random.Random("recitals")
    sayings = [recital(rng) for _ in range(_ITEMS)]
    room = _room(model, [one.answer for one in sayings])
    said = model.generate([one.prompt for one in sayings], max_new_tokens=room)
    recited = "".join(str(int(answers_exactly(text, one.answer))) for text, one in zip(said, sayings, strict=True))
    changes = [] if adapter is None else adapter.layer_changes(model)
    similar = [change.similarity for change in changes if change.similarity is not None]
    unrelated = [ask(name, item.prompt) for name, task in CAPABILITIES.items() for item in task.test[:30]]
    return {
        "right": right,
        "shots": shots,
        "recited": recited,
        "perplexity": {domain: finite_or_none(model.perplexity(texts)) for domain, texts in domains.items()},
        "divergence": 1 - min(similar) if similar else None,
        "fires": None if adapter is None or adapter.changes_weights else firing_share(adapter, unrelated),
        "layers": [dict(vars(change)) for change in changes],
    }


def _share(bits: str) -> float:
    return bits.count("1") / len(bits)


def gains(base: Mapping[str, Any], now: Mapping[str, Any]) -> list[int]:
    """Per item of all capabilities 1 where it is answered now and was not before, -1 the other way round, else 0."""
    before, after = "".join(base["right"].values()), "".join(now["right"].values())
    return [int(b) - int(a) for a, b in zip(before, after, strict=True)]


def summary(base: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """A state as a row shows it, its accuracy compared item by item with that of the model before it was edited."""
    change = bootstrap_mean(gains(base, now))
    return {
        "change": change.value,
        "change_interval": [change.low, change.high],
        **{name: _share(bits) for name, bits in now["right"].items()},
        **{name: _share(bits) for name, bits in now["shots"].items()},
        "recital": _share(now["recited"]),
        **{f"perplexity_{domain}": value for domain, value in now["perplexity"].items()},
        "divergence": now["divergence"],
        "fires": now["fires"],
        "layers": now["layers"],
    }
