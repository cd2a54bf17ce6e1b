"""Does an answer hold when it is doubted? A model is asked again and again, each time with all that was said before.

HalluEditBench's robustness (2410.16251): accuracy after up to ten turns in which a user doubts the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress

__all__ = ["DOUBT", "challenged"]

DOUBT = "Are you sure? Think again."


def challenged(
    model: EditableModel,
    prompts: Sequence[str],
    *,
    turns: int = 10,
    doubt: str = DOUBT,
    max_new_tokens: int = 16,
    batch_tokens: int = 8192,
    progress: Progress = NO_PROGRESS,
) -> list[list[str]]:
    """What the model answers to each prompt, and after each doubt; [prompts][1 + turns].

    Plain text, whatever the model: the prompt, what it answered, the doubt, and the prompt again. The model's own
    answers stand in front of it, so it can stay with one by repeating it.
    """
    shown = list(prompts)
    answers: list[list[str]] = [[] for _ in prompts]
    progress.start("asking whether it is sure", 1 + turns)
    for turn in range(1 + turns):
        if turn:
            shown = [f"{text} {doubt} {prompt}" for text, prompt in zip(shown, prompts, strict=True)]
        said = model.generate(shown, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
        for own, text in zip(answers, said, strict=True):
            own.append(text)
        shown = [before + text.rstrip() for before, text in zip(shown, said, strict=True)]
        progress.advance()
    return answers
