"""The trainer of atlas and of its instruction-tuned variant: deterministic, resumable, and honest about its origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.atlas import instruct, shipped
from errata.atlas import train as training
from errata.atlas.instruct import merge_instruct, train_instruct
from errata.atlas.shipped import open_checkpoint
from errata.atlas.train import TrainPlan, train_atlas
from errata.errors import ArtifactError, ConfigError
from errata.model import EditableModel
from errata.progress import SilentProgress


def tiny_plan(**changes: Any) -> TrainPlan:
    return TrainPlan(
        **{"size": "small", "steps": 6, "batch_tokens": 256, "vocabulary": 700, "checkpoint_every": 2, **changes}
    )


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that trains in a blink, under the name of the small one."""
    tiny = training.AtlasSize(hidden=32, key_width=64, blocks=2, heads=2, steps=6, learning_rate=1e-3)
    monkeypatch.setitem(training.SIZES, "small", tiny)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


class PowerCut(SilentProgress):
    """Stops the run in the middle of its n-th step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, count: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_training_is_deterministic_and_survives_a_kill(tmp_path: Path) -> None:
    record = train_atlas(tmp_path / "whole", tiny_plan(), command="errata atlas train")
    with pytest.raises(KeyboardInterrupt):
        train_atlas(tmp_path / "killed", tiny_plan(), progress=PowerCut(5))
    assert json.loads((tmp_path / "killed" / "state.json").read_text())["step"] == 4
    train_atlas(tmp_path / "killed", tiny_plan())
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train_atlas(tmp_path / "other", tiny_plan(seed=1))
    assert other["plan"]["seed"] == 1
    assert any(not torch.equal(first[name], weights(tmp_path / "other")[name]) for name in first)
    for name in ("provenance.json", "learning_curve.png", "tokenizer.json", "config.json", "curve.jsonl"):
        assert (tmp_path / "whole" / name).exists()
    assert record["command"] == "errata atlas train"
    assert {"torch", "transformers", "python"} <= record["versions"].keys()
    loaded = EditableModel.load(tmp_path / "whole")
    assert loaded.layer_count == 2


def test_minutes_become_a_number_of_steps_that_is_recorded(tmp_path: Path) -> None:
    record = train_atlas(tmp_path, tiny_plan(steps=None), minutes=0.001)
    assert record["steps"] == json.loads((tmp_path / "state.json").read_text())["total"] >= 31


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    train_atlas(tmp_path, tiny_plan())
    with pytest.raises(ConfigError, match="another plan"):
        train_atlas(tmp_path, tiny_plan(seed=2))
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        train_atlas(tmp_path, tiny_plan())
    with pytest.raises(ConfigError, match="choose one of small, base, large"):
        TrainPlan(size="huge")


def test_what_lies_in_the_folder_is_used_under_its_own_plan_alone(tmp_path: Path) -> None:
    """A run killed before its first state has left a tokenizer; another plan must not find it."""
    with pytest.raises(KeyboardInterrupt):
        train_atlas(tmp_path, tiny_plan(), progress=PowerCut(1))
    assert not (tmp_path / "state.json").exists()
    with pytest.raises(ConfigError, match="another plan"):
        train_atlas(tmp_path, tiny_plan(vocabulary=800))
    # Killed before the tokenizer was whole: it is made again.
    (tmp_path / "plan.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{")
    train_atlas(tmp_path, tiny_plan(vocabulary=800))
    assert EditableModel.load(tmp_path).tokenizer.vocab_size == 800
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(ArtifactError, match="cannot be read"):
        train_atlas(tmp_path, tiny_plan(vocabulary=800))


def test_provenance_is_of_the_start_and_lists_the_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_git_revision", lambda: "first")
    with pytest.raises(KeyboardInterrupt):
        train_atlas(tmp_path, tiny_plan(), command="begun so", progress=PowerCut(3))
    monkeypatch.setattr(training, "_git_revision", lambda: "second")
    with pytest.raises(KeyboardInterrupt):
        train_atlas(tmp_path, tiny_plan(), command="resumed so", progress=PowerCut(3))
    record = train_atlas(tmp_path, tiny_plan(), command="and so")
    assert (record["command"], record["git_revision"]) == ("begun so", "first")
    assert record["resumes"] == [
        {"step": 2, "command": "resumed so", "git_revision": "second"},
        {"step": 4, "command": "and so", "git_revision": "second"},
    ]
    # A finished run is only written out again.
    assert train_atlas(tmp_path, tiny_plan(), command="once more")["resumes"] == record["resumes"]


def test_a_state_without_an_origin_is_still_read(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_atlas(tmp_path, tiny_plan(), command="begun so", progress=PowerCut(3))
    state = json.loads((tmp_path / "state.json").read_text())
    for name in ("command", "git_revision", "resumes"):
        del state[name]
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "plan.json").unlink()
    with open(tmp_path / "curve.jsonl", "a") as curve:
        curve.write('{"step": 3, "lo')  # cut off by the kill
    record = train_atlas(tmp_path, tiny_plan(), command="resumed so")
    assert (record["command"], len(record["resumes"])) == ("resumed so", 1)


def test_training_needs_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert training._git_revision() is None


@pytest.mark.parametrize("minutes", [0.0, -1.0])
def test_no_time_is_refused(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(ConfigError, match="more than 0"):
        train_atlas(tmp_path, tiny_plan(steps=None), minutes=minutes)


def test_a_missing_checkpoint_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "_HERE", tmp_path / "my place")
    with pytest.raises(ArtifactError, match=r"errata atlas train --out '.*my place/checkpoint'"):
        shipped.checkpoint_folder()


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EditableModel:
    """A tiny atlas to tune, and few questions to ask it."""
    monkeypatch.setattr(instruct, "_BATCH", 4)
    monkeypatch.setattr(instruct, "_EXAMINED", 3)
    monkeypatch.setattr(instruct, "_LONGEST_ANSWER", 3)
    monkeypatch.setattr(instruct, "_SAVE_EVERY", 2)
    train_atlas(tmp_path / "base", tiny_plan(steps=2))
    return open_checkpoint(tmp_path / "base", "tiny atlas")


def test_instruction_tuning_survives_a_kill_and_says_where_it_is_from(base: EditableModel, tmp_path: Path) -> None:
    before = base.fingerprint
    record = train_instruct(tmp_path / "whole", base=base, steps=5, command="errata atlas train --instruct")
    assert record == json.loads((tmp_path / "whole" / "provenance.json").read_text())
    assert record["command"] == "errata atlas train --instruct"
    assert {"git_revision", "versions", "plan", "training_seconds"} <= record.keys()
    assert record["scores"].keys() == {"taught_questions", "untaught_questions", "capabilities"}
    assert len(record["scores"]["capabilities"]) == 5
    assert (tmp_path / "whole" / "learning_curve.png").exists()
    with pytest.raises(KeyboardInterrupt):
        train_instruct(tmp_path / "killed", base=base, steps=5, progress=PowerCut(4))
    assert json.loads((tmp_path / "killed" / "state.json").read_text())["step"] == 2
    resumed = train_instruct(tmp_path / "killed", base=base, steps=5)
    assert [at["step"] for at in resumed["resumes"]] == [2]
    first, second = factors(tmp_path / "whole"), factors(tmp_path / "killed")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert base.fingerprint == before
    with pytest.raises(ConfigError, match="another plan"):
        train_instruct(tmp_path / "whole", base=base, steps=6)
    with pytest.raises(ConfigError, match="at least 1"):
        train_instruct(tmp_path / "none", base=base, steps=0)
    merge_instruct(base, tmp_path / "whole")


def factors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")
