"""Training atlas: deterministic, resumable after a kill, with a learning curve.

The run lives in one folder. `plan.json` says what it depends on; nothing found there is used under another plan.
`state.json` and `state-N.safetensors` (weights, optimiser moments) are replaced together by renaming, so a kill at any
moment leaves a usable state; `curve.jsonl` keeps a line for every report; the finished model is written beside them in
Hugging Face form.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from errata.atlas.corpus import batches, sample_texts
from errata.atlas.tokenizer import train_tokenizer
from errata.atlas.world import WORLD_VERSION, load_world
from errata.errors import ArtifactError, ConfigError
from errata.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["SIZES", "AtlasSize", "RunFolder", "TrainPlan", "draw_curve", "train_atlas", "versions"]


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
    """Of the source that is running; None where there is no git, or no repository."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return answer.stdout.strip() or None


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    import tokenizers
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def provenance(plan: TrainPlan, origin: Mapping[str, Any], seconds: float, tokens: int) -> dict[str, Any]:
    """Where a checkpoint comes from: command and source revision at the start, resumes, plan, versions, cost."""
    return {
        **origin,
        "plan": asdict(plan),
        "size": asdict(SIZES[plan.size]),
        "versions": versions(),
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


class RunFolder:
    """The folder of a training run: its plan and its state on disk, written so that a kill cannot damage them.

    Args:
        folder: is made if it does not exist.
        plan: all that the run depends on, as JSON.
        command: what to type to make the run again, for its provenance.

    Attributes:
        begun: whether what lies in the folder is of this run: `begin` was called, or a state was written.
        origin: command and source revision of the run's start, and of each resume the step, command and revision.

    Raises:
        ConfigError: the folder holds a run with another plan.
        ArtifactError: its plan or its state cannot be read.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any], command: str) -> None:
        self.folder, self.plan = folder, dict(plan)
        self.curve = folder / "curve.jsonl"
        # Taken now: of the code that is running, whatever is committed meanwhile.
        self._now = {"command": command, "git_revision": _git_revision()}
        self.origin: dict[str, Any] = {**self._now, "resumes": []}
        folder.mkdir(parents=True, exist_ok=True)
        found = [record for name in ("plan.json", "state.json") if (record := self._json(name)) is not None]
        for record in found:
            if record["plan"] != self.plan:
                raise ConfigError(f"{folder} holds a run with another plan ({record['plan']}); give another --out")
        self.begun = bool(found)

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            _ = record["plan"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(error) from error
        return record

    def _unreadable(self, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"the training state in {self.folder} cannot be read ({error}); give another --out, or delete plan.json "
            "and state.json there to begin again"
        )

    def begin(self) -> None:
        """Write the plan: from now on what lies in the folder counts as this run's."""
        self._replace("plan.json", {"plan": self.plan})

    def _replace(self, name: str, record: Mapping[str, Any]) -> None:
        draft = self.folder / f"{name}.new"
        draft.write_text(json.dumps(record), encoding="utf-8")
        os.replace(draft, self.folder / name)

    def read(self, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """The last state, its weights and moments put back in place; None when there is none yet."""
        state = self._json("state.json")
        if state is None:
            self.curve.unlink(missing_ok=True)
            return None
        try:
            tensors = load_file(self.folder / state["tensors"])
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(tensors[f"model.{name}"])
            for name, parameter in parameters.items():
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(state["step"])),
                    "exp_avg": tensors[f"mean.{name}"].clone(),
                    "exp_avg_sq": tensors[f"square.{name}"].clone(),
                }
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise self._unreadable(error) from error
        self.origin = {name: state.get(name, self.origin[name]) for name in self.origin}
        if state["step"] != state["total"]:
            self.origin["resumes"] = [*self.origin["resumes"], {"step": state["step"], **self._now}]
        kept = list(self.rows(state["step"]))
        draft = self.curve.with_suffix(".new")
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(draft, self.curve)
        return state

    def write(
        self, state: Mapping[str, Any], parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        """Replace the state: `step`, `total` and what else goes on from one to the next, weights and moments."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"mean.{name}"] = optimizer.state[parameter]["exp_avg"]
            tensors[f"square.{name}"] = optimizer.state[parameter]["exp_avg_sq"]
        file = f"state-{state['step']}.safetensors"
        save_file(tensors, self.folder / file)
        self._replace("state.json", {"plan": self.plan, **self.origin, **state, "tensors": file})
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != file:
                old.unlink()

    def note(self, row: dict[str, Any]) -> None:
        with open(self.curve, "a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")

    def rows(self, up_to: int) -> Iterator[dict[str, Any]]:
        """What was noted up to a step; a last line that a kill cut off is of a later one."""
        if self.curve.exists():
            for line in self.curve.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break
                if row["step"] <= up_to:
                    yield row


def _tokenizer(run: RunFolder, plan: TrainPlan) -> PreTrainedTokenizerFast:
    """The run's own tokenizer, made at its start. One that lies there without a plan may be of any run, or half."""
    from transformers import PreTrainedTokenizerFast

    if run.begun:
        loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(run.folder)
        return loaded
    world = load_world()
    names = [s.prompt + s.completion for f in world.facts for s in [*world.taught(f), *world.french(f)]]
    tokenizer = train_tokenizer([*sample_texts(plan.seed, 60_000), *names], plan.vocabulary)
    tokenizer.save_pretrained(run.folder)
    run.begin()
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
        command: what to type to make the run again, for the provenance.

    Returns:
        The provenance that was written to `provenance.json`.

    Raises:
        ConfigError: the folder holds a run with another plan; `minutes` is not more than 0.
        ArtifactError: the state in the folder is damaged.
    """
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"minutes must be more than 0, not {minutes:g}")
    run = RunFolder(out, asdict(plan), command)
    tokenizer = _tokenizer(run, plan)
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
    total = plan.steps if plan.steps is not None else (None if minutes else size.steps)
    step, tokens, spent = 0, 0, 0.0
    state = run.read(parameters, optimizer)
    if state is not None:
        step, tokens, spent, total = state["step"], state["tokens"], state["seconds"], state["total"]

    def save() -> None:
        run.write({"step": step, "tokens": tokens, "seconds": spent, "total": total}, parameters, optimizer)

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
    record = provenance(plan, run.origin, spent, tokens) | {"steps": step}
    model.eval()
    model.to(torch.bfloat16).save_pretrained(out)
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (out / "provenance.json").write_text(text, encoding="utf-8")
    draw_curve(list(run.rows(step)), f"atlas {plan.size}, seed {plan.seed}", out / "learning_curve.png")
    return record


def draw_curve(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Loss over steps as a picture, and what it is on edits that are held out, where that was asked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["loss"] for row in rows], color="#0072B2", linewidth=1, label="training")
    held_out = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#D55E00", linewidth=1, markersize=3, label="held out")
        axes.legend()
    axes.set(xlabel="step", ylabel="loss" if held_out else "training loss", yscale="log", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
