"""Asks a model which of two answers it finds likelier, for the edits of a set: CounterFact's scores.

See `errata.evaluation.preference` for what is made of it, and why it never stands alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from errata.edit import Edit
from errata.errors import ConfigError
from errata.evaluation.preference import CounterFactScores, Preference
from errata.model import EditableModel
from errata.model.scoring import forced_answers
from errata.progress import NO_PROGRESS, Progress

__all__ = ["rank_answers"]


def rank_answers(
    model: EditableModel, edits: Sequence[Edit], *, batch_tokens: int = 4096, progress: Progress = NO_PROGRESS
) -> CounterFactScores:
    """The new answer against the old one, behind the prompt, its other wordings, and its neighbours' prompts.

    Neighbours are locality prompts about the same relation that come with an answer; behind them, that one is the old
    answer. Edits whose old answer is not known are left out.

    Raises:
        ConfigError: no edit names its old answer.
    """
    known = [edit for edit in edits if edit.ground_truth]
    if not known:
        raise ConfigError("rankings compare the new answer with the old one: give edits with a ground_truth")

    def beside(edit: Edit) -> list[tuple[str, str]]:
        return [(p.prompt, p.answer) for p in edit.locality if p.kind == "same_relation" and p.answer]

    asked: dict[tuple[str, str], float] = {}
    for edit in known:
        for prompt in (edit.prompt, *edit.rephrases):
            asked |= {(prompt, edit.target): 0.0, (prompt, edit.ground_truth or ""): 0.0}
        for prompt, answer in beside(edit):
            asked |= {(prompt, edit.target): 0.0, (prompt, answer): 0.0}
    pairs = sorted(asked)
    progress.start("ranking answers", len(pairs))
    for start in range(0, len(pairs), 2048):
        part = pairs[start : start + 2048]
        answers = forced_answers(model, [model.passage(*pair) for pair in part], batch_tokens=batch_tokens)
        for pair, found in zip(part, answers, strict=True):
            asked[pair] = sum(found.log_probs) / len(found.log_probs)
        progress.advance(len(part))

    def preference(prompt: str, new: str, true: str) -> Preference:
        return Preference(asked[prompt, new], asked[prompt, true])

    return CounterFactScores.of(
        [preference(edit.prompt, edit.target, edit.ground_truth or "") for edit in known],
        [[preference(text, edit.target, edit.ground_truth or "") for text in edit.rephrases] for edit in known],
        [[preference(prompt, edit.target, answer) for prompt, answer in beside(edit)] for edit in known],
    )
