"""Does an answer hold when it is doubted? A model is asked again and again, each time with all that was said before.

HalluEditBench's robustness (2410.16251): accuracy after up to ten turns in which a user doubts the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from errata.model import EditableModel
from errata.progress import NO_PROGRESS, Progress

__all__ = ["DOUBT", "challenged", "shown_at"]

DOUBT = "Are you sure? Think again."


def shown_at(prompt: str, said: Sequence[str], turn: int, doubt: str = DOUBT) -> str:
    """What a model is given at a turn: the prompt, and for every turn before it the answer, the doubt, the prompt.

    Args:
        said: the answers of the turns before, at least.
    """
    shown = prompt
    for answer in said[:turn]:
        shown = f"{shown}{answer.rstrip()} {doubt} {prompt}"
    return shown


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
    answers: list[list[str]] = [[] for _ in prompts]
    progress.start("asking whether it is sure", 1 + turns)
    for turn in range(1 + turns):
        shown = [shown_at(prompt, own, turn, doubt) for prompt, own in zip(prompts, answers, strict=True)]
        said = model.generate(shown, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
        for own, text in zip(answers, said, strict=True):
            own.append(text)
        progress.advance()
    return answers
