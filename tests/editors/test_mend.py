"""MEND: its network, its factored changes, its training, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from errata.edit import Edit
from errata.editors.gradient_network import FactoredUpdate, GradientNetwork, GradientRows, per_row_change
from errata.editors.mend import Mend, MendConfig, MendTraining, _Mending, gradient_rows
from errata.editors.training import TrainingData
from errata.errors import ArtifactError, BaseMismatchError, ConfigError, NumericsError
from errata.model import EditableModel
from errata.model.anatomy import mlp_projections, weight_of
from errata.model.probes import adding
from errata.model.tail import Tail
from errata.progress import SilentProgress
from errata.testing import tiny_model

EDITS = [
    Edit(prompt="The capital of France", target="Rome", subject="France", rephrases=("France has",)),
    Edit(prompt="Bob wrote Hamlet", target="Alice is", subject="Hamlet"),
]
TRAINING: dict[str, Any] = {
    "layers": (-2, -1),
    "rank": 4,
    "learning_rate": 1e-2,
    "step_rate": 0.1,
    "batch_size": 4,
    "held_out": 0.25,
    "steps": 6,
    "validate_every": 2,
    "statistics": 8,
}


def examples() -> list[Edit]:
    """Edits about twelve subjects, each with another wording and two questions about somebody else."""
    names = ("Ann", "Bob", "Zed", "Emma", "Alice", "Spain", "Paris", "London", "Rome", "Berlin", "France", "Hamlet")
    return [
        Edit(
            prompt=f"The flute of {name}",
            target="piano" if number % 2 else "Rome",
            subject=name,
            rephrases=(f"{name} plays the",),
            locality=[{"prompt": f"Who wrote {names[number - 1]}?", "answer": "Bob"}, {"prompt": "x is"}],
        )
        for number, name in enumerate(names)
    ]


def settings(model: EditableModel, **changes: Any) -> MendTraining:
    return MendTraining.for_model(model, **{**TRAINING, **changes})


def train(model: EditableModel, out: Path, progress: Any = None, **changes: Any) -> dict[str, Any]:
    config = settings(model, **changes)
    data = TrainingData.of(examples(), "examples", config)
    return Mend.train(model, data, out, config, command="errata train mend", progress=progress or SilentProgress())


class PowerCut(SilentProgress):
    """Stops the training in the middle of its n-th step."""

    def __init__(self, steps: int) -> None:
        self.left, self.training = steps, False

    def start(self, description: str, total: int | None = None, done: int = 0) -> None:
        self.training = description == "training"

    def advance(self, count: int = 1, note: str = "") -> None:
        self.left -= self.training
        if self.left == 0:
            raise KeyboardInterrupt


# --- the network ----------------------------------------------------------------------------------------------------


def some_rows(widths: dict[str, tuple[int, int]], owners: Sequence[int]) -> dict[str, GradientRows]:
    generator = torch.Generator().manual_seed(3)
    found = {}
    for path, (outputs, inputs) in widths.items():
        found[path] = GradientRows(
            torch.randn(len(owners), inputs, generator=generator) * 3 + 1,
            torch.randn(len(owners), outputs, generator=generator) * 0.01,
            torch.tensor(owners),
        )
    return found


SHAPES = {"a": (5, 3), "b": (3, 5), "c": (5, 3)}


def test_the_network_is_the_identity_at_its_start() -> None:
    network = GradientNetwork(SHAPES, rank=2)
    rows = some_rows(SHAPES, [0, 0, 1])
    network.set_steps({"a": 0.5, "b": 2.0, "c": 1.0})
    updates = network(rows)
    for path, step in (("a", 0.5), ("b", 2.0), ("c", 1.0)):
        torch.testing.assert_close(updates[path].left, -step * rows[path].gradients)
        torch.testing.assert_close(updates[path].right, rows[path].inputs)


def test_matrices_of_one_shape_share_a_network_and_keep_a_scale_and_an_offset_of_their_own() -> None:
    network = GradientNetwork(SHAPES, rank=2)
    assert list(network.groups.values()) == [["a", "c"], ["b"]]
    rows = some_rows(SHAPES, [0, 1])
    before = network(rows)
    with torch.no_grad():
        network.networks[0].layers[1].offset[1] += 1.0  # type: ignore[index, union-attr]
    after = network(rows)
    assert torch.equal(after["a"].left, before["a"].left)
    torch.testing.assert_close(after["c"].right, before["c"].right + 1.0)
    torch.testing.assert_close(after["c"].left, before["c"].left - 1.0)  # times -α, which is 1


def test_every_part_of_the_network_has_a_gradient_from_the_start() -> None:
    """An ordinary rectifier would give none to its first layer: it stands at zero."""
    network = GradientNetwork(SHAPES, rank=2)
    sum(
        update.left.sum() + update.right.square().sum() for update in network(some_rows(SHAPES, [0, 1])).values()
    ).backward()
    for name, parameter in network.named_parameters():
        at_rest = name.endswith(("inner", "scale"))  # multiplied with what is zero at the start
        assert bool(parameter.grad.any()) != at_rest, name


def test_running_statistics_equal_those_of_all_rows_at_once() -> None:
    network = GradientNetwork({"a": (5, 3)}, rank=1)
    rows = some_rows({"a": (5, 3)}, [0] * 50)["a"]
    for part in (slice(0, 1), slice(1, 2), slice(2, 30), slice(30, 30), slice(30, 50)):
        network.observe({"a": GradientRows(rows.inputs[part], rows.gradients[part], rows.owner[part])})
    whole = torch.cat([rows.inputs, rows.gradients], dim=1).double()
    update = network({"a": rows})["a"]
    wanted = (whole - whole.mean(0)) / whole.std(0)
    torch.testing.assert_close(torch.cat([update.right, -update.left], dim=1), wanted.float(), rtol=1e-6, atol=1e-6)


# --- changes as factors ---------------------------------------------------------------------------------------------


def test_rows_are_answered_with_their_own_edits_change_as_by_dense_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    owner = torch.tensor([0, 0, 0, 2, 2, 3])
    left, right = (torch.randn(6, width, generator=generator, dtype=torch.float64) for width in (7, 4))
    update = FactoredUpdate(left, right, owner)
    rows = torch.tensor([2, 0, 1, 3, 0])
    inputs = torch.randn(5, 6, 4, generator=generator, dtype=torch.float64)
    found = per_row_change(update, rows)(inputs)
    for number, edit in enumerate(rows.tolist()):
        one_left, one_right = update.of(edit)
        dense = one_left @ one_right.T
        torch.testing.assert_close(found[number], inputs[number] @ dense.T, rtol=1e-12, atol=1e-12)
    assert not found[2].any()  # edit 1 has no rows


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_rows_multiplied_out_are_the_gradient_of_the_weights(family: str) -> None:
    """What autograd finds for a weight itself, all but the first token's part of it."""
    model = tiny_model(family)
    paths = [path for output in model.anatomy.mlp_output[-2:] for path in mlp_projections(model.model, output)]
    assert len(paths) == 2 * (3 if family == "llama" else 2)
    rows = gradient_rows(model, Tail(model, (-2, -1)), paths, EDITS)
    weights = {path: weight_of(model.module(path)).clone().requires_grad_(True) for path in paths}

    def instead(path: str) -> Any:
        """The layer's own output, and a zero of which the weight is a part behind the first token."""
        weight = weights[path]
        return lambda inputs: torch.cat(
            [inputs[:, :1] @ (0 * weight).T, inputs[:, 1:] @ (weight - weight.detach()).T], 1
        )

    for number, edit in enumerate(EDITS):
        batch = model.batch([model.passage(edit.prompt, edit.target)])
        places, columns, labels = batch.answer_places()
        with adding(model.model, {path: instead(path) for path in paths}, 1):
            states = model.answer_states(batch)
        loss = F.cross_entropy(model.head(states)[places, columns], labels)
        for path, gradient in zip(paths, torch.autograd.grad(loss, [weights[path] for path in paths]), strict=True):
            own = rows[path].owner == number
            found = rows[path].gradients[own].T @ rows[path].inputs[own]
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def changes(editor: Mend) -> dict[str, torch.Tensor]:
    """The change of each matrix, multiplied out."""
    found = {path: own.weight_change() for path, own in editor.adapter.contributions().items()}
    return {path: change for path, change in found.items() if change is not None}


def written(model: EditableModel, *calls: list[Edit], **changed: Any) -> dict[str, torch.Tensor]:
    """What edits add to the matrices, call by call."""
    editor = Mend(model, network="untrained", step=0.02, guard="off", **changed)
    for edits in calls:
        assert not editor.edit(edits).refused
    editor.adapter.detach()
    return changes(editor)


def test_an_untrained_edit_is_a_step_along_normalised_gradients() -> None:
    model = tiny_model("llama")
    editor = Mend(model, network="untrained", step=0.02, guard="off")
    editor.edit(EDITS[:1])
    with model.bare():  # where the gradient is taken
        rows = gradient_rows(model, editor._tail, list(editor._network.shapes), EDITS[:1])
    for path, change in changes(editor).items():
        weight = weight_of(model.module(path))
        (network,) = [
            network
            for network, paths in zip(editor._network.networks, editor._network.groups.values(), strict=True)
            if path in paths
        ]
        both = network.statistics.normalised(torch.cat([rows[path].inputs, rows[path].gradients], dim=1))
        right, left = both.split([weight.shape[1], weight.shape[0]], dim=1)
        step = 0.02 * weight.square().mean().sqrt()
        torch.testing.assert_close(change, -step * (left.T @ right).float(), rtol=1e-3, atol=1e-6)


def test_a_batch_a_sequence_and_single_edits_are_the_same() -> None:
    model = tiny_model("llama")
    together = written(model, EDITS, batch_size=2)
    torch.testing.assert_close(written(model, EDITS[1:], EDITS[:1]), together, rtol=1e-4, atol=1e-6)
    alone = [written(model, [edit]) for edit in EDITS]
    total = {path: alone[0][path] + alone[1][path] for path in together}
    torch.testing.assert_close(together, total, rtol=1e-4, atol=1e-6)


def test_an_edit_of_the_same_prompt_takes_the_place_of_the_earlier_one() -> None:
    model = tiny_model("llama")
    revised = EDITS[0].model_copy(update={"target": "Berlin", "id": "revised"})
    again = written(model, EDITS, [revised], [revised])
    torch.testing.assert_close(again, written(model, [EDITS[1], revised]), rtol=1e-4, atol=1e-6)


def test_reverting_is_exact_in_any_order() -> None:
    model = tiny_model("llama")
    editor = Mend(model, network="untrained", step=0.02, guard="off", batch_size=2)
    editor.edit(EDITS)
    result = editor.adapter.revert(EDITS[0].id)
    assert (result.exactness, result.reason) == ("exact", "it is subtracted whole, and no other change depends on it")
    left = changes(editor)
    editor.adapter.detach()
    torch.testing.assert_close(left, written(model, EDITS[1:]), rtol=1e-4, atol=1e-6)


def test_a_change_has_the_rank_of_its_tokens_and_padding_adds_none() -> None:
    model = tiny_model("llama")
    paths = list(mlp_projections(model.model, model.anatomy.mlp_output[-1]))
    assert [path.rpartition(".")[2] for path in paths] == ["gate_proj", "up_proj", "down_proj"]
    rows = gradient_rows(model, Tail(model, -1), paths, EDITS)
    counts = [len(model.passage(edit.prompt, edit.target).answer) for edit in EDITS]
    assert counts[0] != counts[1]
    for own in rows.values():  # in the last block only what predicts the answer matters
        assert torch.bincount(own.owner).tolist() == counts


def test_an_edit_that_the_model_is_certain_of_changes_nothing_and_is_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.module(model.anatomy.head).weight *= 1e4
    said = model.generate([EDITS[0].prompt], max_new_tokens=1)[0]
    outcome = Mend(model, network="untrained", guard="off").edit([EDITS[0].model_copy(update={"target": said})])
    assert [one.reason for one in outcome.refused if "changed nothing" in one.reason]


# --- training -------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_what_comes_of_it_edits(tmp_path: Path) -> None:
    model = tiny_model("llama")
    record = train(model, tmp_path, steps=20)
    assert record["validation"]["loss"] < 0.9 * record["validation_before"]["loss"]
    assert (record["steps"], record["finished"], record["command"]) == (20, True, "errata train mend")
    assert record["data"] == {"source": "examples", "training": 9, "validation": 3}
    for name in ("network.safetensors", "network.json", "curve.jsonl", "learning_curve.png"):
        assert (tmp_path / name).is_file()
    editor = Mend(model, network=str(tmp_path), guard="off")
    assert set(editor.adapter.contributions()) == {
        path for layer in (-2, -1) for path in mlp_projections(model.model, model.anatomy.mlp_output[layer])
    }
    held_out = TrainingData.of(examples(), "", settings(model)).validation
    (applied,) = editor.edit(held_out[:1]).applied
    assert applied.probability_after > applied.probability_before


def test_a_killed_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    model = tiny_model("llama")
    whole = train(model, tmp_path / "whole")
    for step in (3, 2):
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path / "killed", PowerCut(step))
    killed = train(model, tmp_path / "killed")
    assert killed["validation"] == whole["validation"]
    assert len(killed["resumes"]) == 2
    names = ("network.safetensors", "start.safetensors")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "killed" / n).read_bytes() for n in names)
    # A finished run is only written out again.
    assert train(model, tmp_path / "killed")["steps"] == whole["steps"]
    with pytest.raises(ConfigError, match="another plan"):
        train(model, tmp_path / "killed", seed=1)


def test_training_stops_early_and_keeps_the_best(tmp_path: Path) -> None:
    record = train(tiny_model("llama"), tmp_path, learning_rate=1.0, steps=30, patience=2)
    assert record["steps"] < 30
    assert record["steps"] == record["validation"]["step"] + 2 * 2
    assert len(list(tmp_path.glob("best-*.safetensors"))) == 1


def test_training_stops_when_its_time_is_over_and_goes_on_when_called_again(tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = settings(model, steps=3)
    data = TrainingData.of(examples(), "examples", config)
    first = Mend.train(model, data, tmp_path, config, minutes=1e-9)
    assert (first["steps"], first["finished"]) == (1, False)
    assert Mend.train(model, data, tmp_path, config)["steps"] == 3
    with pytest.raises(ConfigError, match="more than 0"):
        Mend.train(model, data, tmp_path, config, minutes=0.0)


def test_training_takes_the_base_model_and_leaves_it_as_it_is(tmp_path: Path) -> None:
    model = tiny_model("llama")
    train(model, tmp_path / "bare")
    editor = Mend(model, network="untrained", guard="off")
    editor.edit(EDITS)
    train(model, tmp_path / "edited")
    assert (tmp_path / "bare/network.safetensors").read_bytes() == (
        tmp_path / "edited/network.safetensors"
    ).read_bytes()
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_a_gradient_that_is_not_finite_is_said_and_the_state_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    def spoilt(self: _Mending, edits: Sequence[Edit], rng: random.Random) -> float:
        for parameter in self.network.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan)
        return 0.0

    model = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, PowerCut(3))
    monkeypatch.setattr(_Mending, "learn", spoilt)
    with pytest.raises(NumericsError, match="step 2: the gradient is not finite"):
        train(model, tmp_path)
    monkeypatch.undo()
    assert train(model, tmp_path)["steps"] == 6


def test_validation_is_about_other_subjects() -> None:
    config = MendTraining(held_out=0.25, validation=100)
    doubled = [*examples(), *(e.model_copy(update={"id": e.id + "-2", "target": "London"}) for e in examples())]
    data = TrainingData.of(doubled, "examples", config)
    subjects = [{edit.subject for edit in edits} for edits in (data.training, data.validation)]
    assert not subjects[0] & subjects[1]
    assert [len(found) for found in subjects] == [9, 3]
    assert len(data.validation) == 6
    with pytest.raises(ConfigError, match="locality prompts"):
        TrainingData.of(EDITS, "edits", config)


def test_every_edit_is_learned_from_once_before_any_is_again() -> None:
    config = MendTraining(batch_size=4, held_out=0.1)
    data = TrainingData.of(examples(), "examples", config)
    drawn = [edit.id for step in range(11) for edit in data.batch(step, config)]
    assert sorted(drawn[:11]) == sorted(edit.id for edit in data.training) == sorted(drawn[11:22])
    assert drawn[:11] != drawn[11:22]


# --- what is refused ------------------------------------------------------------------------------------------------


def test_without_a_network_the_command_that_trains_one_is_named() -> None:
    with pytest.raises(ConfigError, match="errata train mend --model tiny-llama-0 --out errata-mend"):
        Mend(tiny_model("llama"))


def test_a_network_that_comes_with_errata_is_found_for_its_own_model(tmp_path: Path, monkeypatch: Any) -> None:
    model = tiny_model("llama")
    train(model, tmp_path / "mend", steps=1)
    monkeypatch.setattr("errata.atlas.shipped.checkpoint_folder", lambda: tmp_path)
    editor = Mend(model, guard="off")
    assert editor._network.rank == TRAINING["rank"]
    with pytest.raises(ConfigError, match="none comes with errata"):
        Mend(tiny_model("llama", seed=1))


def test_networks_of_other_models_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    train(model, tmp_path / "run", steps=1)
    with pytest.raises(BaseMismatchError, match="was trained for 'tiny-llama-0'"):
        Mend(tiny_model("llama", seed=1), network=str(tmp_path / "run"))
    with pytest.raises(ArtifactError, match="holds no trained network"):
        Mend(model, network=str(tmp_path / "nowhere"))

    def damaged(name: str, content: bytes) -> str:
        place = tmp_path / f"damaged-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tmp_path / "run", place)
        (place / name).write_bytes(content)
        return str(place)

    record = json.loads((tmp_path / "run/network.json").read_text())
    for name, content, message in (
        ("network.safetensors", b"short", "is not the file that"),
        ("network.json", b"{", "cannot be read"),
        ("network.json", json.dumps({**record, "format": 99}).encode(), "newer errata"),
        ("network.json", json.dumps({**record, "method": "serac"}).encode(), "trained for 'serac'"),
    ):
        with pytest.raises(ArtifactError, match=message):
            Mend(model, network=damaged(name, content))


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="step must be more than 0"):
        MendConfig(step=0.0)
    with pytest.raises(ConfigError, match="at least one layer"):
        MendTraining(rank=0)
    with pytest.raises(ConfigError, match="held_out"):
        MendTraining(held_out=1.0)
    with pytest.raises(ConfigError, match="patience must be at least 1"):
        MendTraining(patience=0)
