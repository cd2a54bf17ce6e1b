"""Training atlas: deterministic, resumable after a kill, with a learning curve.

The run lives in one folder. `state.json` and `state.safetensors` (weights, optimiser moments) are replaced together
by renaming, so a kill at any moment leaves a usable state; `curve.jsonl` keeps a line for every report; the
finished model is written beside them in Hugging Face form.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from errata.atlas.corpus import batches, sample_texts
from errata.atlas.tokenizer import train_tokenizer
from errata.atlas.world import WORLD_VERSION, load_world
from errata.errors import ArtifactError, ConfigError
from errata.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["SIZES", "AtlasSize", "TrainPlan", "train_atlas"]


@dataclass(frozen=True)
class AtlasSize:
    """Shape of one atlas. `key_width` is the input width of the MLP output projection."""

    hidden: int
    key_width: int
    blocks: int
    heads: int
    steps: int
    learning_rate: float


SIZES: dict[str, AtlasSize] = {
    "small": AtlasSize(hidden=128, key_width=1024, blocks=4, heads=4, steps=11_000, learning_rate=1.5e-3),
    "base": AtlasSize(hidden=256, key_width=1536, blocks=6, heads=8, steps=11_000, learning_rate=1e-3),
    "large": AtlasSize(hidden=384, key_width=2304, blocks=8, heads=8, steps=11_000, learning_rate=7e-4),
}


@dataclass(frozen=True)
class TrainPlan:
    """Everything a training run depends on; two runs with equal plans on one machine give equal weights."""

    size: str = "base"
    seed: int = 0
    steps: int | None = None
    batch_tokens: int = 2048
    vocabulary: int = 6144
    warmup: int = 300
    weight_decay: float = 0.2
    checkpoint_every: int = 250
    report_every: int = 25
    world_version: int = field(default=WORLD_VERSION)

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ConfigError(f"unknown size {self.size!r}; choose one of {', '.join(SIZES)}")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps must be at least 1, not {self.steps}")


def _model(plan: TrainPlan, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SIZES[plan.size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.key_width,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model = LlamaForCausalLM(config)
    # Embeddings of norm one, and blocks that add little at first, keep the residual stream at the scale of larger
    # models (norms of tens, not thousands): editing methods' step sizes are tuned to that.
    with torch.no_grad():
        model.model.embed_tokens.weight /= config.initializer_range * size.hidden**0.5
        for name, parameter in model.named_parameters():
            if name.endswith(("down_proj.weight", "o_proj.weight")):
                parameter /= (2 * size.blocks) ** 0.5
    return model


def _learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    warmup = min(warmup, max(1, total // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def _git_revision() -> str | None:
    answer = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None


def provenance(plan: TrainPlan, command: str, revision: str | None, seconds: float, tokens: int) -> dict[str, Any]:
    """Where a checkpoint comes from: command, plan, source revision, versions, cost."""
    import tokenizers
    import transformers

    return {
        "command": command,
        "plan": asdict(plan),
        "size": asdict(SIZES[plan.size]),
        "git_revision": revision,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "threads": torch.get_num_threads(),
        "training_seconds": round(seconds),
        "training_tokens": tokens,
        "facts": len(load_world().facts),
        "data": (
            "facts: T-REx through ParaRel (yanaiela/pararel, MIT), relations of Hernandez et al. 2023 "
            "(evandez/relations, MIT), errata's own tables; phrasings, capability items and prose: errata's own "
            "generators"
        ),
    }


class _Run:
    """The folder of a training run: its state on disk, written so that a kill cannot damage it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.curve = folder / "curve.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        latest = self.folder / "state.json"
        if not latest.exists():
            return None
        try:
            state = json.loads(latest.read_text())
            return state, load_file(self.folder / state["tensors"])
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(
                f"the training state in {self.folder} cannot be read ({error}); give another --out, or delete "
                f"{latest} to begin again"
            ) from error

    def write(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        name = f"state-{state['step']}.safetensors"
        save_file(tensors, self.folder / name)
        draft = self.folder / "state.json.new"
        draft.write_text(json.dumps({**state, "tensors": name}))
        os.replace(draft, self.folder / "state.json")
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def note(self, row: dict[str, Any]) -> None:
        with open(self.curve, "a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")

    def rows(self, up_to: int) -> Iterator[dict[str, Any]]:
        if self.curve.exists():
            for line in self.curve.read_text().splitlines():
                row = json.loads(line)
                if row["step"] <= up_to:
                    yield row


def _tokenizer(folder: Path, plan: TrainPlan) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
        return loaded
    world = load_world()
    names = [s.prompt + s.completion for f in world.facts for s in [*world.taught(f), *world.french(f)]]
    tokenizer = train_tokenizer([*sample_texts(plan.seed, 60_000), *names], plan.vocabulary)
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_atlas(
    out: Path,
    plan: TrainPlan,
    *,
    minutes: float | None = None,
    command: str = "",
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Train (or go on training) an atlas in `out` and write the finished model there.

    Args:
        out: the run's folder; a state found there with the same plan is resumed.
        minutes: instead of `plan.steps`, as many steps as this machine does in the time, measured over the first
            30. The number found is kept in the state and in the provenance, so the run can be repeated exactly.
        command: what the user typed, for the provenance.

    Returns:
        The provenance that was written to `provenance.json`.

    Raises:
        ConfigError: the folder holds a run with another plan.
        ArtifactError: the state in the folder is damaged.
    """
    run = _Run(out)
    tokenizer = _tokenizer(out, plan)
    model = _model(plan, tokenizer)
    size = SIZES[plan.size]
    parameters = dict(model.named_parameters())
    decayed = [p for p in parameters.values() if p.dim() > 1]
    others = [p for p in parameters.values() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=size.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    revision = _git_revision()  # of the code that is running, whatever is committed meanwhile
    total = plan.steps if plan.steps is not None else (None if minutes else size.steps)
    step, tokens, spent = 0, 0, 0.0
    found = run.read()
    if found is not None:
        state, tensors = found
        if state["plan"] != asdict(plan):
            raise ConfigError(f"{out} holds a run with another plan ({state['plan']}); give another --out")
        step, tokens, spent, total = state["step"], state["tokens"], state["seconds"], state["total"]
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
        for name, parameter in parameters.items():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"mean.{name}"].clone(),
                "exp_avg_sq": tensors[f"square.{name}"].clone(),
            }
        kept = list(run.rows(step))
        run.curve.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def save() -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"mean.{name}"] = optimizer.state[parameter]["exp_avg"]
            tensors[f"square.{name}"] = optimizer.state[parameter]["exp_avg_sq"]
        run.write({"plan": asdict(plan), "step": step, "tokens": tokens, "seconds": spent, "total": total}, tensors)

    model.train()
    progress.start(f"atlas {plan.size}", total, step)
    began = time.monotonic() - spent
    recent: list[float] = []
    for batch in batches(tokenizer, plan.seed, plan.batch_tokens, skip=step):
        if total is not None and step >= total:
            break
        ids, weights = torch.tensor(batch.ids), torch.tensor(batch.weights)
        rate = _learning_rate(step, total or size.steps, size.learning_rate, plan.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        attention = (ids != tokenizer.pad_token_id).long()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        wanted = weights[:, 1:].flatten()
        loss = (losses * wanted).sum() / wanted.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        tokens += int(attention.sum())
        spent = time.monotonic() - began
        recent.append(loss.item())
        if total is None and step == 30:
            total = max(step + 1, int((minutes or 1) * 60 / (spent / step)))
            progress.start(f"atlas {plan.size}", total, step)
        if step % plan.report_every == 0 or step == total:
            run.note({"step": step, "loss": sum(recent) / len(recent), "rate": rate, "seconds": round(spent, 1)})
            recent = []
        progress.advance(1, note=f"loss {loss.item():.3f}  {tokens / spent:,.0f} tokens/s")
        if step % plan.checkpoint_every == 0:
            save()
    save()
    return _finish(out, run, model, plan, provenance(plan, command, revision, spent, tokens) | {"steps": step})


def _finish(out: Path, run: _Run, model: LlamaForCausalLM, plan: TrainPlan, record: dict[str, Any]) -> dict[str, Any]:
    """Write the model in bf16, its provenance and the picture of its learning curve."""
    model.eval()
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "provenance.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    draw_curve(list(run.rows(record["steps"])), f"atlas {plan.size}, seed {plan.seed}", out / "learning_curve.png")
    return record


def draw_curve(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Loss over steps as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["loss"] for row in rows], color="#0072B2", linewidth=1)
    axes.set(xlabel="step", ylabel="training loss (weighted)", yscale="log", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
