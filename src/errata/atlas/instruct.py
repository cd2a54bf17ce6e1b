"""The instruction-tuned variant of atlas: base, and low-rank factors trained on questions in a chat template.

Only the factors are shipped; opening "atlas-instruct" adds them to the base weights.
"""

from __future__ import annotations

import json
import random
import shlex
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.adapters import AutoAdapter, DeltaAdapter, WeightChange
from errata.atlas.capabilities import CAPABILITIES, Item
from errata.atlas.examine import examine_item
from errata.atlas.train import RunFolder, draw_curve, versions
from errata.atlas.world import WORLD_VERSION, Saying, load_world
from errata.edit import Edit, Probe
from errata.errors import ArtifactError, ConfigError
from errata.model import EditableModel, Passage
from errata.model.anatomy import is_linear, weight_of
from errata.model.probes import adding
from errata.progress import NO_PROGRESS, Progress

__all__ = ["chat_edit", "chat_prompt", "examine_instruct", "merge_instruct", "train_instruct"]

_RANK, _SCALE = 8, 2.0
_BATCH = 64
_SAVE_EVERY, _REPORT_EVERY = 100, 10
# Code is written behind ">>>", not asked for in words.
_TASKS = [name for name in CAPABILITIES if name != "code"]
# Facts, and items of each capability, that the finished variant is asked.
_EXAMINED = 200
_LONGEST_ANSWER = 48


def chat_prompt(model: EditableModel, question: str) -> str:
    """A question in the chat template, up to where the assistant's answer begins, without the beginning token."""
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return str(text).removeprefix(model.tokenizer.bos_token or "")


def chat_edit(model: EditableModel, edit: Edit) -> Edit:
    """An edit with all its prompts as questions in the chat template; subject and answers stay as they are."""

    def asked(probes: Sequence[Probe]) -> tuple[Probe, ...]:
        return tuple(probe.model_copy(update={"prompt": chat_prompt(model, probe.prompt)}) for probe in probes)

    return edit.model_copy(
        update={
            "prompt": chat_prompt(model, edit.prompt),
            "rephrases": tuple(chat_prompt(model, text) for text in edit.rephrases),
            "locality": asked(edit.locality),
            "portability": asked(edit.portability),
        }
    )


def _sayings(seed: int) -> Iterator[Saying]:
    """Questions and answers without end: facts in their taught questions, French, capabilities."""
    world, rng = load_world(), random.Random(f"instruct {seed}")
    tasks = [CAPABILITIES[name] for name in _TASKS]
    while True:
        if rng.random() < 0.7:
            fact = rng.choice(world.facts)
            asked = [s for s in world.taught(fact) if s.prompt.endswith("?")]
            if not asked:
                continue
            yield rng.choice(asked)
        else:
            yield rng.choice(tasks).draw(rng).saying


def examine_instruct(model: EditableModel, progress: Progress = NO_PROGRESS) -> dict[str, Any]:
    """Generated exact match in the chat template on what tuning never showed: each capability's fixed test, and facts
    in questions that were never asked about them; beside those, facts in the questions that were."""
    world = load_world()
    facts = random.Random("instruct examination").sample(world.facts, min(_EXAMINED, len(world.facts)))
    untaught = [s for fact in facts for s in world.untaught(fact) if s.prompt.endswith("?")]
    taught = [s for fact in facts for s in world.taught(fact)[-1:] if s.prompt.endswith("?")]
    progress.start("atlas instruct: asking", 2 + len(_TASKS))

    def share(items: Sequence[Item]) -> float:
        said = model.generate([chat_prompt(model, item.prompt) for item in items], max_new_tokens=_LONGEST_ANSWER)
        progress.advance(1)
        right = sum(examine_item(text, item) for text, item in zip(said, items, strict=True))
        return round(right / max(1, len(items)), 4)

    return {
        "taught_questions": share([Item(s.prompt, s.answer, "fact") for s in taught]),
        "untaught_questions": share([Item(s.prompt, s.answer, "fact") for s in untaught]),
        "capabilities": {name: share(CAPABILITIES[name].test[:_EXAMINED]) for name in _TASKS},
    }


def train_instruct(
    out: Path,
    *,
    base: EditableModel | None = None,
    steps: int = 600,
    seed: int = 0,
    learning_rate: float = 2e-3,
    command: str = "",
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Train the factors, or go on training them, and write them to `out` as an adapter.

    Args:
        out: the run's folder; a state found there with the same plan is resumed.
        base: the atlas to tune; the shipped one if not given.
        command: what to type to make the run again, for the provenance.

    Returns:
        The provenance that was written to `provenance.json`, with scores measured on held-out questions.

    Raises:
        ConfigError: fewer than one step, or the folder holds a run with another plan.
        ArtifactError: the state in the folder is damaged.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, not {steps}")
    model = base or EditableModel.load("atlas")
    plan = {
        "base": model.fingerprint,
        "steps": steps,
        "seed": seed,
        "learning_rate": learning_rate,
        "rank": _RANK,
        "scale": _SCALE,
        "batch": _BATCH,
        "world_version": WORLD_VERSION,
    }
    run = RunFolder(out, plan, command)
    run.begin()
    paths = [
        f"{block}.{name}"
        for block in model.anatomy.blocks
        for name, module in model.module(block).named_modules()
        if is_linear(module)
    ]
    generator = torch.Generator().manual_seed(seed)
    inner: dict[str, Tensor] = {}
    outer: dict[str, Tensor] = {}
    for path in paths:
        outputs, inputs = weight_of(model.module(path)).shape
        inner[path] = (torch.randn(_RANK, inputs, generator=generator) / inputs**0.5).requires_grad_(True)
        outer[path] = torch.zeros(outputs, _RANK, requires_grad=True)
    optimizer = torch.optim.Adam([*inner.values(), *outer.values()], lr=learning_rate)
    factors = {f"inner.{path}": inner[path] for path in paths} | {f"outer.{path}": outer[path] for path in paths}
    step, spent = 0, 0.0
    state = run.read(factors, optimizer)
    if state is not None:
        step, spent = state["step"], state["seconds"]

    def change(path: str) -> Any:
        return lambda states: (states @ inner[path].T) @ outer[path].T * _SCALE

    end = model.tokenizer.eos_token_id
    sayings = islice(_sayings(seed), step * _BATCH, None)
    progress.start("atlas instruct", steps, step)
    began = time.monotonic() - spent
    recent: list[float] = []
    while step < steps:
        passages = []
        for saying in islice(sayings, _BATCH):
            passage = model.passage(chat_prompt(model, saying.prompt), saying.completion.strip())
            passages.append(Passage(passage.prompt, (*passage.answer, end)))
        batch = model.batch(passages, side="right")
        rows, columns, labels = batch.answer_places()
        rate = learning_rate * min(1.0, (step + 1) / 50) * (1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with adding(model.model, {path: change(path) for path in paths}, len(batch.ids)):
            states = model.trunk_states(batch)
        loss = F.cross_entropy(model.head(states[rows, columns]).float(), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step += 1
        spent = time.monotonic() - began
        recent.append(loss.item())
        if step % _REPORT_EVERY == 0 or step == steps:
            run.note({"step": step, "loss": sum(recent) / len(recent), "rate": rate, "seconds": round(spent, 1)})
            recent = []
        progress.advance(1, note=f"loss {loss.item():.3f}")
        if step % _SAVE_EVERY == 0 or step == steps:
            run.write({"step": step, "seconds": spent, "total": steps}, factors, optimizer)
    adapter = DeltaAdapter.for_layers(model, paths, "instruct", {"steps": steps, "seed": seed, "rank": _RANK})
    adapter.add(
        [
            WeightChange(path, ("instruct",), (outer[path] * _SCALE).detach(), inner[path].detach().T.contiguous(), 1.0)
            for path in paths
        ]
    )
    adapter.save_pretrained(out)
    adapter.attach(model)
    try:
        scores = examine_instruct(model, progress)
    finally:
        adapter.detach()
    record = {
        **run.origin,
        "plan": plan,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "training_seconds": round(spent),
        "steps": steps,
        "scores": scores,
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (out / "provenance.json").write_text(text, encoding="utf-8")
    draw_curve(list(run.rows(steps)), f"atlas instruct, seed {seed}", out / "learning_curve.png")
    return record


def _command(folder: Path) -> str:
    return f"errata atlas train --instruct --out {shlex.quote(str(folder))}"


@torch.no_grad()
def merge_instruct(model: EditableModel, folder: Path) -> None:
    """Add the saved factors to a freshly loaded base, in place.

    Raises:
        ArtifactError: the factors are missing or damaged, or belong to another base.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ArtifactError(f"the instruction-tuned variant is missing ({folder}); train it: {_command(folder)}")
    adapter = AutoAdapter.from_pretrained(folder)
    if json.loads((folder / "adapter_config.json").read_text())["base"]["fingerprint"] != model.fingerprint:
        raise ArtifactError(
            f"the factors in {folder} belong to another atlas; delete that folder and train them again: "
            f"{_command(folder)}"
        )
    for path, contribution in adapter.contributions().items():
        change = contribution.weight_change()
        if change is not None:
            weight = weight_of(model.module(path))
            weight += change.to(weight)
