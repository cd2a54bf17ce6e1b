"""What methods will take: said before, in parts that follow from shapes, and refused where it cannot fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from errata.edit import Edit
from errata.editors import editor, editor_class, editor_names
from errata.editors.memory import MemoryNeeded, MemoryPart
from errata.errors import ConfigError
from errata.testing import tiny_model

EDITS = [Edit(prompt="The capital of France", target="Rome", subject="France")]
WIDTH, HIDDEN = 96, 32


def sizes(needed: MemoryNeeded) -> dict[str, int]:
    return {part.what: part.size for part in needed.parts}


def test_second_moments_are_counted_for_every_layer() -> None:
    model = tiny_model("llama")
    one = sizes(editor("emmet", model, layers=(0,)).memory_needed(EDITS))
    two = sizes(editor("memit", model, layers=(0, 1)).memory_needed(EDITS))
    moments = "second moments of keys, with their factors"
    assert (one[moments], two[moments]) == (2 * 8 * WIDTH**2, 4 * 8 * WIDTH**2)
    assert one["making these"] == two["making these"] == 2 * 8 * WIDTH**2
    assert "null spaces" in sizes(editor("alphaedit", model, layers=(0,)).memory_needed(EDITS))


def test_the_residual_matrix_and_what_fine_tuning_holds_are_counted() -> None:
    model = tiny_model("llama")
    memoir = sizes(editor("memoir", model, relative_threshold=0.5).memory_needed(EDITS))
    assert memoir["the residual matrix"] == 4 * WIDTH * HIDDEN
    assert memoir["the second moment of stored keys"] == 4 * WIDTH**2
    tuned = sizes(editor("ft", model, layers=(0,)).memory_needed(EDITS))
    assert tuned["a change, its gradient and Adam's two moments"] == 4 * 4 * WIDTH * HIDDEN


@pytest.mark.parametrize("name", sorted(editor_names()))
def test_every_method_says_what_it_needs_and_more_for_more_edits(name: str) -> None:
    model = tiny_model("llama")
    settings: dict[str, Any] = {
        "memoryllm": {"network": "untrained"},
        "mend": {"network": "untrained"},
        "serac": {"encoder": "words", "threshold": 0.5},
    }.get(name, {})
    made = editor(name, model, **settings)
    many = [edit.model_copy(update={"id": str(n)}) for edit in EDITS for n in range(200)]
    few, more = made.memory_needed(EDITS), made.memory_needed(many)
    assert 0 < few.total <= more.total
    if name != "memoryllm":  # whose pool has one size, and which writes one edit at a time
        assert few.total < more.total
    assert few.words().startswith("needs about ")
    few.check()
    assert editor_class(name).name == name


def test_what_is_ready_is_not_counted_again() -> None:
    made = editor("emmet", tiny_model("llama"), layers=(0,), tokens_per_width=2.0)
    before = made.memory_needed(EDITS).total
    made.prepare()
    assert made.memory_needed(EDITS).total < before - 2 * 8 * WIDTH**2


def test_what_cannot_fit_is_refused_before_anything_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    made = editor("ft", tiny_model("llama"), steps=5, guard="off")
    monkeypatch.setattr("errata.editors.memory._free", lambda device, on_host: 1000)
    monkeypatch.setattr(made, "_prepare", lambda progress: pytest.fail("it was begun"))
    with pytest.raises(ConfigError, match=r"would take about .* of memory, and 1 kB are free; of that .*--force"):
        made.edit(EDITS)
    monkeypatch.undo()
    monkeypatch.setattr("errata.editors.memory._free", lambda device, on_host: 1000)
    assert len(made.edit(EDITS, force=True).applied) == 1


def test_a_device_and_the_host_are_asked_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {True: 500, False: 100}
    monkeypatch.setattr("errata.editors.memory._free", lambda device, on_host: free[on_host])
    parts = (MemoryPart("on it", 90), MemoryPart("beside it", 400, "do less", on_host=True))
    MemoryNeeded(parts, torch.device("cuda")).check()
    MemoryNeeded(parts, torch.device("cpu")).check()
    with pytest.raises(ConfigError, match=r"of memory, and .*400 bytes are beside it: do less"):
        MemoryNeeded((*parts, MemoryPart("more", 101, on_host=True)), torch.device("cuda")).check()
    with pytest.raises(ConfigError, match="of memory of cuda"):
        MemoryNeeded((*parts, MemoryPart("more", 11)), torch.device("cuda")).check()
    assert MemoryNeeded((MemoryPart("all", 2_300_000_000),), torch.device("cpu")).words() == (
        "needs about 2.3 GB beside the model: all 2.3 GB"
    )


def test_the_benchmark_measures_a_method(tmp_path: Path) -> None:
    from errata.benchmarks.methods import measure

    row = measure("ft", edits=1, blocks=1, hidden=64)
    assert row["method"] == "ft"
    assert min(row["edits_per_second"], row["vs_plain"], row["peak_mb"], row["estimate_mb"]) > 0
