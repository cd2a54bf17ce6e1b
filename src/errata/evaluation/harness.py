"""lm-evaluation-harness on a live model, edited or not: any of its tasks, atlas's own, and those of local files.

The harness pads on the right and passes no attention mask when it scores answers, and does not say where a prompt ends;
a routed adapter would decide on padding, or on the answer. So log-likelihoods are scored by errata, which announces
both. Nothing is cached: a cache would not know that the model has been edited. Needs the extra `eval`.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.errors import ConfigError
from errata.evaluation.local_tasks import LOCAL_TASKS, documents
from errata.model import EditableModel, Passage
from errata.model.scoring import forced_answers
from errata.progress import NO_PROGRESS, Progress

__all__ = ["ATLAS_TASKS", "TaskScore", "harness_model", "run_tasks"]

_OWN_TASKS = Path(__file__).parents[1] / "atlas" / "tasks"
_LOCAL_TASKS = Path(__file__).parent / "local_tasks"
ATLAS_TASKS = tuple(sorted(path.stem for path in _OWN_TASKS.glob("atlas_*.yaml")))


@dataclass(frozen=True)
class TaskScore:
    """What a task says of a model.

    Attributes:
        metrics: everything the harness reports, by metric.
        metric: the task's first metric; items: its value for every item, in the task's order.
        version: of the task.
    """

    metrics: dict[str, float]
    metric: str
    items: tuple[float, ...]
    version: str


def _installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks are run by lm-evaluation-harness, which is not installed: pip install 'errata[eval]'")


def harness_model(model: EditableModel, batch_size: int = 16) -> Any:
    """The model as the harness calls it, with whatever is attached to it.

    Raises:
        ConfigError: the harness is not installed, or does not take such a model.
    """
    _installed()
    if model.is_encoder_decoder:
        raise ConfigError(f"{model.model_id} is an encoder-decoder; tasks are run on decoders only")
    from lm_eval.models.huggingface import HFLM

    class Live(HFLM):  # type: ignore[misc]
        """Scores answers with prompts announced and padding masked."""

        def _loglikelihood_tokens(
            self,
            requests: list[tuple[tuple[str, str], list[int], list[int]]],
            disable_tqdm: bool = False,
            override_bs: int | None = None,
        ) -> list[tuple[float, bool]]:
            passages = []
            for _, context, answer in requests:
                room = max(1, self.max_length + 1 - len(answer))  # the last token of an answer is predicted, not read
                passages.append(Passage(tuple(context[-room:]), tuple(answer)))
            found = forced_answers(model, passages)
            return [
                (sum(one.log_probs), one.predicted == passage.answer)
                for one, passage in zip(found, passages, strict=True)
            ]

    return Live(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size)


def run_tasks(
    model: EditableModel,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    data: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 16,
    progress: Progress = NO_PROGRESS,
) -> dict[str, TaskScore]:
    """Run tasks of the harness, those of atlas, those of local files and those of a folder on a model as it is now.

    Args:
        include: a folder of task files (YAML) of your own.
        data: the folder of the files that local tasks read.
        limit: only the first items of each task.
        shots: examples in front of every question, instead of the task's own number.

    Raises:
        ConfigError: the harness is not installed; a task does not exist, holds others, or lacks a file.
        FormatError: the file of a local task is damaged. The model has not been asked anything yet.
    """
    live = harness_model(model, batch_size)
    for task in tasks:  # all of them before the first is run: a damaged file shall not cost the others' time
        if task in LOCAL_TASKS:
            documents(task, data)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [str(folder) for folder in (_OWN_TASKS, _LOCAL_TASKS, include) if folder is not None]
    manager = TaskManager(include_path=folders, metadata=None if data is None else {"folder": str(data)})
    for task in tasks:
        if task not in manager.all_tasks:
            raise ConfigError(
                f"there is no task {task!r}; atlas's are {', '.join(ATLAS_TASKS)}, those of local files "
                f"{', '.join(LOCAL_TASKS)}; the harness lists its own with lm-eval ls tasks, and --include takes a "
                "folder of task files"
            )
    scores = {}
    progress.start("running tasks", len(tasks))
    for task in tasks:
        found = simple_evaluate(
            model=live, tasks=[task], num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=0
        )
        scores[task] = _score(task, found)
        progress.advance(note=task)
    return scores


def _score(task: str, found: Any) -> TaskScore:
    samples = found["samples"].get(task)
    if samples is None:
        raise ConfigError(f"{task} holds other tasks; name these one by one: {', '.join(found['samples'])}")
    metrics = {
        name.partition(",")[0]: float(value)
        for name, value in found["results"][task].items()
        if isinstance(value, int | float) and "stderr" not in name and "," in name
    }
    first = next((name for name in samples[0]["metrics"] if name in metrics), None) if samples else None
    if first is None:
        raise ConfigError(f"{task} has no metric that is counted per item; take another task")
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    return TaskScore(
        metrics, first, tuple(float(sample[first]) for sample in ordered), str(found["versions"].get(task))
    )
