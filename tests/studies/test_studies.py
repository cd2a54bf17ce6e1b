"""Studies: rows that follow from runs, nothing made twice, errors before anything is run. Tiny random models."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata.cli.app import app
from errata.datasets import write_edits
from errata.edit import Edit
from errata.editors import Editor
from errata.errors import ArtifactError, ConfigError
from errata.evaluation.metrics import held_until
from errata.evaluation.significance import spearman, spearman_interval
from errata.evaluation.tables import cell
from errata.model import EditableModel
from errata.model.scoring import forced_answers
from errata.progress import NO_PROGRESS
from errata.studies import studies, study
from errata.studies.mirage import _usual
from errata.studies.result import StudyResult
from errata.studies.workbench import StudyOptions, Workbench
from errata.testing import byte_tokenizer, tiny_hf_model, tiny_model

PLACES = ("France", "Spain", "Ann", "Bob", "Emma", "Zed")
TARGETS = ("Rome", "Paris", "London", "Alice", "flute", "piano")
EDITS = [
    Edit(
        prompt=f"The capital of {place}",
        target=target,
        subject=place,
        rephrases=(f"{place} has",),
        locality=[{"prompt": f"The flute of {place}", "kind": "same_relation"}, {"prompt": f"Who was {place}"}],
    )
    for place, target in zip(PLACES, TARGETS, strict=True)
]
# Enough steps to take; a fixed threshold, so that nothing is calibrated.
MEMOIR = {"relative_threshold": 0.6, "steps": 25, "contexts": 1, "background": 4, "pooling": "mean"}
FT = {"steps": 60, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return tiny_model("llama")


@pytest.fixture
def run(model: EditableModel, tmp_path: Path) -> Callable[..., StudyResult]:
    """Run a study on the edits above, in one folder per study."""
    write_edits(tmp_path / "edits.jsonl", EDITS)

    def run(name: str, **options: Any) -> StudyResult:
        given = {
            "data": tmp_path / "edits.jsonl",
            "settings": {"memoir": MEMOIR},
            "quick": True,
            "folder": tmp_path / name,
            **options,
        }
        return study(name).run(model, StudyOptions(**given))

    return run


@pytest.fixture
def no_more_edits(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, any edit fails the test."""

    def forbid() -> None:
        def edited(*_: Any, **__: Any) -> None:
            raise AssertionError("an edit was made again")

        monkeypatch.setattr(Editor, "edit", edited)

    return forbid


# --- what there is --------------------------------------------------------------------------------------------------


def test_every_study_can_be_found_and_says_what_it_asks() -> None:
    import importlib

    names = [one.name for one in studies()]
    assert len(names) == len(set(names)) == 30
    for one in studies():
        module, _, function = one.target.partition(":")
        assert getattr(importlib.import_module(module), function).__doc__
        assert "?" in one.question
        assert "minute" in one.size
    with pytest.raises(ConfigError, match="Did you mean 'memoir-sanity'"):
        study("memoir-sanety")


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_study_leaves_its_files_and_makes_nothing_twice(
    run: Callable[..., StudyResult], no_more_edits: Callable[[], None], tmp_path: Path
) -> None:
    first = run("memoir-k-sweep", edits=3)
    assert [row["marked"] for row in first.rows] == [3, 14, 27, 55], "the paper's shares of 14,336, of 96 columns"
    assert [row["reliability_forced"] for row in first.rows[2:]] == [1.0, 1.0]
    folder = tmp_path / "memoir-k-sweep"
    written = {"report.html", "rows.jsonl", "result.json", "table.md", "table.tex", "figure.png", "runs"}
    assert {path.name for path in folder.iterdir()} == written
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"
    saved = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert saved["found"] == first.found
    assert saved["provenance"]["settings"]["512 of 14,336"]["marked"] == 3
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert first.found in table
    assert "MEMOIR (NeurIPS 2025)" in table
    rows_file = folder / "rows.jsonl"
    lines = rows_file.read_bytes()
    rows_file.write_bytes(lines[:-20])  # killed while the last row was written: its run is found finished
    no_more_edits()
    assert run("memoir-k-sweep", edits=3).rows == first.rows
    assert rows_file.read_bytes() == lines
    with pytest.raises(AssertionError, match="made again"):
        run("memoir-k-sweep", edits=3, settings={"memoir": {**MEMOIR, "steps": 26}})
    rows_file.write_bytes(b"{}\n" + lines)
    with pytest.raises(ArtifactError, match=r"rows\.jsonl:1 is damaged"):
        run("memoir-k-sweep", edits=3)


def test_sanity_says_where_every_prompt_goes(run: Callable[..., StudyResult]) -> None:
    found = run("memoir-sanity", edits=3)
    assert [(row["prompt"], row["target"]) for row in found.rows] == [(e.prompt, e.target) for e in EDITS[:3]]
    assert all(row["own_overlap"] == 1.0 and row["after"].startswith(row["target"]) for row in found.rows)
    assert not any(row["before"].startswith(row["target"]) for row in found.rows)
    chance, limit = found.numbers["chance"], found.numbers["threshold"]
    assert limit == pytest.approx(chance + 0.6 * (1 - chance))
    assert "prompts that should reach none fire" in found.found


def test_a_threshold_is_swept_without_editing_again(
    run: Callable[..., StudyResult], no_more_edits: Callable[[], None]
) -> None:
    run("memoir-threshold", edits=3)
    no_more_edits()
    found = run("memoir-threshold", edits=3)
    limits = [row["threshold"] for row in found.rows[:-1]]
    assert limits == sorted(limits)
    assert found.rows[-1]["which"] == "in force"
    assert found.rows[-1]["threshold"] == found.numbers["calibrated"] == found.numbers["threshold"]
    fired = [row["near_fired"] for row in found.rows[:-1]]
    assert fired == sorted(fired, reverse=True)
    assert (fired[0], fired[-1]) == (1.0, 0.0), "at chance level everything fires, near 1 nothing else does"
    assert found.rows[0]["locality"] < found.rows[-2]["locality"] == 1.0
    assert found.rows[-1]["reliability_forced"] == 1.0


def test_density_asks_the_newest_edit_of_each_prompt(run: Callable[..., StudyResult]) -> None:
    once, often = run("memoir-density").rows
    assert (once["edits"], once["prompts"], once["held"]) == (6, 6, 6)
    assert (often["edits"], often["prompts"], often["held"]) == (6, 2, 2), "later edits supersede earlier ones"
    assert (often["reliability_forced"], often["old_answers"]) == (1.0, 0.0)
    assert once["old_answers"] is None


def test_a_prompt_is_edited_again_round_by_round() -> None:
    from errata.studies.memoir import _edited_again

    again = _edited_again(EDITS, 2)
    assert [edit.prompt for edit in again] == [EDITS[0].prompt, EDITS[1].prompt] * 3
    assert len({edit.id for edit in again}) == 6
    for own in (again[::2], again[1::2]):
        assert len({edit.target for edit in own}) == 3
    assert [edit.target for edit in again[:2]] == ["Rome", "Paris"]
    with pytest.raises(ConfigError, match="too few different targets"):
        _edited_again([edit.model_copy(update={"target": "Rome"}) for edit in EDITS], 2)


def test_collisions_count_what_masks_share(run: Callable[..., StudyResult]) -> None:
    found = run("memoir-collisions")
    assert sum(row["edits"] for row in found.rows) == 5, "the last edit of six has no later one"
    for row in found.rows:
        assert row["lost"] == pytest.approx(row["at_once"] - row["final"])
        assert row["from"] <= row["largest_later_overlap"] <= row["to"] <= found.numbers["largest_overlap"] + 1e-6
    # Each column of the first mask is written by each of five later ones with the chance k/D at least.
    assert 0 < max(row["later_writes_per_column"] for row in found.rows) <= 5
    assert found.numbers["chance_overlap"] == pytest.approx(27 / 96)


def test_capacity_is_counted_in_parameters_of_the_memory(run: Callable[..., StudyResult]) -> None:
    found = run("memoir-long", edits=4)
    assert [row["edits"] for row in found.rows] == [2, 4]
    assert found.numbers["memory_parameters"] == 32 * 96
    held = held_until([(row["edits"], row["reliability"]) for row in found.rows], 0.9)
    assert (found.numbers["capacity_edits"], bool(found.numbers["is_full"])) == held
    assert found.rows[-1]["per_thousand_parameters"] == pytest.approx(4000 / (32 * 96))
    assert found.rows[-1]["edits_per_width"] == pytest.approx(4 / 96)


def test_single_edits_are_each_made_into_an_empty_adapter(
    run: Callable[..., StudyResult], no_more_edits: Callable[[], None]
) -> None:
    settings = {"ft": FT, "ft@short": {**FT, "steps": 1}}
    options = {"methods": ("ft", "ft@short"), "settings": settings, "edits": 3}
    found = run("single-edits", **options)
    rows = {row["method"]: row for row in found.rows}
    assert rows.keys() == {"ft", "ft@short"}
    assert rows["ft"]["reliability_forced"] == 1.0
    assert rows["ft@short"]["reliability_forced"] < 1.0
    assert {row["edits"] for row in found.rows} == {3}
    assert found.provenance["settings"]["ft@short"]["steps"] == 1
    no_more_edits()
    assert run("single-edits", **options).rows == found.rows


def test_the_gap_is_what_teacher_forcing_adds(run: Callable[..., StudyResult]) -> None:
    settings = {"ft": FT, "ft@short": {**FT, "steps": 12}}
    found = run("mirage", methods=("ft", "ft@short"), settings=settings, edits=4)
    for row in found.rows:
        for name in ("reliability", "generalization"):
            assert row[f"{name}_gap"] == pytest.approx(row[f"{name}_forced"] - row[name])
            assert row[name] <= row[f"{name}_contains"]
    mean = sum(row["reliability_gap"] for row in found.rows) / 2
    assert f"{mean:+.2f} of reliability" in found.found


def test_all_methods_that_can_be_run_are_compared_and_the_others_named(model: EditableModel, tmp_path: Path) -> None:
    bench = Workbench(study("mirage"), model, StudyOptions(folder=tmp_path), NO_PROGRESS)
    names = _usual(bench)
    assert not {"mend", "memoryllm"} & set(names)
    assert {"ft", "rome", "memoir", "wise", "grace"} <= set(names)
    for left_out in ("mend", "memoryllm"):
        assert any(
            note.startswith(f"{left_out} left out") and f"errata train {left_out}" in note for note in bench.notes
        )
    given = StudyOptions(folder=tmp_path, settings={"memoryllm": {"network": "somewhere"}})
    bench = Workbench(study("mirage"), model, given, NO_PROGRESS)
    assert "memoryllm" in _usual(bench), "where it is, the editor looks for itself"
    assert not any(note.startswith("memoryllm") for note in bench.notes)


def test_edits_are_shared_out_over_layers(run: Callable[..., StudyResult], no_more_edits: Callable[[], None]) -> None:
    settings = {"memoir": {**MEMOIR, "layer": 1}}
    found = run("memoir-layers", settings=settings)
    assert [(row["layers"], row["edits"]) for row in found.rows] == [
        (name, count) for name in ("one layer", "two, the roomier", "two, both") for count in (3, 6)
    ]
    held = [(row["layer_1"], row.get("layer_2")) for row in found.rows]
    assert held[:2] == [(3, None), (6, None)]
    for row in found.rows[2:4]:
        assert row["layer_1"] + row["layer_2"] == row["edits"], "each edit stands in one of them"
    assert held[4:] == [(3, 3), (6, 6)]
    assert found.rows[-1]["edits_per_width"] == pytest.approx(6 / 96)
    assert all(row["reliability_forced"] == 1.0 for row in found.rows)
    no_more_edits()
    assert run("memoir-layers", settings=settings).rows == found.rows


# --- routing, without edits -----------------------------------------------------------------------------------------


def test_signals_are_compared_without_training_anything(
    run: Callable[..., StudyResult],
    no_more_edits: Callable[[], None],
    model: EditableModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_more_edits()
    small = {"memoir": {"relative_threshold": 0.4}}  # nothing is calibrated
    found = run("memoir-routing", quick=False, settings=small)
    rows = {row["signal"]: row for row in found.rows}
    assert len(rows) == 7
    assert all(row["own_reached"] == 1.0 and row["entries"] == 6 for row in rows.values())
    drawn = rows["random mask"]
    assert (drawn["rephrases_reached"], drawn["rephrases_elsewhere"], drawn["false_fires"]) == (0.0, 0.0, 0.0)
    assert {row["fired_other"] for row in rows.values()} <= {number / 6 for number in range(7)}
    assert not model.adapters
    assert found.provenance["settings"]["last token, not centred"]["background"] == 0

    def calibrated(*_: Any, **__: Any) -> None:
        raise AssertionError("a signal was asked again")

    monkeypatch.setattr("errata.editors.Editor.prepare", calibrated)
    assert run("memoir-routing", quick=False, settings=small).rows == found.rows


def test_what_a_signal_does_is_counted_as_its_router_decides(
    run: Callable[..., StudyResult], model: EditableModel
) -> None:
    """The mean of a prompt's features, by hand: masks, overlaps, the nearest, against a threshold at 0.4 above chance."""
    import torch

    from errata.model.probes import capturing_inputs

    row = run("memoir-routing", settings={"memoir": {"relative_threshold": 0.4}}).rows[0]
    assert row["threshold"] == pytest.approx(27 / 96 + 0.4 * (1 - 27 / 96))
    path = model.anatomy.mlp_output[-1]

    def mean(text: str) -> torch.Tensor:
        batch = model.batch([model.passage(text)])
        with torch.no_grad(), capturing_inputs(model.model, [path], 1) as inputs:
            model.trunk_states(batch)
        return inputs[path][0].float().mean(0)

    from errata.datasets.builtin import background_prompts

    background = torch.stack([mean(text) for text in background_prompts(100, 0)]).mean(0)

    def mask(text: str) -> set[int]:
        return set((mean(text) - background).abs().topk(27).indices.tolist())

    stored = [mask(edit.prompt) for edit in EDITS]

    def nearest(text: str) -> tuple[float, int]:
        return max((len(mask(text) & one) / 27, -number) for number, one in enumerate(stored))

    fires = [(number, nearest(edit.rephrases[0])) for number, edit in enumerate(EDITS)]
    limit = row["threshold"]
    reached = [overlap >= limit and best == -number for number, (overlap, best) in fires]
    elsewhere = [overlap >= limit and best != -number for number, (overlap, best) in fires]
    near = [nearest(edit.locality[0].prompt)[0] >= limit for edit in EDITS]
    assert 0 < sum(near) + sum(reached) + sum(elsewhere) < 12, "some do and some do not"
    assert row["rephrases_reached"] == pytest.approx(sum(reached) / 6)
    assert row["rephrases_elsewhere"] == pytest.approx(sum(elsewhere) / 6)
    assert row["fired_same_relation"] == pytest.approx(sum(near) / 6)


def test_signals_need_rephrases_and_locality_prompts(run: Callable[..., StudyResult], tmp_path: Path) -> None:
    for missing in ("rephrases", "locality"):
        path = tmp_path / f"no-{missing}.jsonl"
        write_edits(path, [edit.model_copy(update={missing: ()}) for edit in EDITS])
        with pytest.raises(ConfigError, match="edits that have both"):
            run("memoir-routing", data=path, settings={})


def test_signals_are_compared_at_one_rate_of_false_fires() -> None:
    from errata.studies.signals import _reached_at_rate

    others = [number / 100 for number in range(100)]  # at 2 % the two highest may pass: 0.99 and 0.98
    wordings = [(0.975, True), (0.97, True), (1.0, False), (0.98, True)]
    assert _reached_at_rate(wordings, others, 0.02) == 0.5
    assert _reached_at_rate(wordings, others, 0.0) == 0.0
    assert _reached_at_rate(wordings, [0.5], 0.02) == 0.75


# --- reverting ------------------------------------------------------------------------------------------------------


def test_reverted_edits_are_gone_and_the_others_stay(
    run: Callable[..., StudyResult], no_more_edits: Callable[[], None]
) -> None:
    settings = {"memoir": {**MEMOIR, "relative_threshold": 0.95}, "ft": FT}
    found = run("revert", methods=("memoir", "ft"), settings=settings)
    memoir, ft = found.rows
    assert (memoir["method"], memoir["edits"], memoir["reverted"], memoir["others"]) == ("memoir", 6, 1, 5)
    assert (memoir["exact"], memoir["approximate"], memoir["inseparable"]) == (0, 1, 0)
    assert (memoir["as_unedited"], memoir["wordings_as_unedited"], memoir["another_fires"]) == (1.0, 1.0, 0.0)
    assert (memoir["still_target"], memoir["locality_before"], memoir["locality_after"]) == (0.0, 1.0, 1.0)
    assert memoir["points_lost"] == pytest.approx(100 * (memoir["others_before"] - memoir["others_after"]))
    assert memoir["points_low"] <= memoir["points_lost"] <= memoir["points_high"]
    assert ft["as_unedited"] == 0.0, "what later edits changed is left"
    assert "with memoir 1.00 of their prompts" in found.found
    no_more_edits()
    assert run("revert", methods=("memoir", "ft"), settings=settings).rows == found.rows


def test_edits_that_cannot_be_told_apart_are_counted(run: Callable[..., StudyResult]) -> None:
    (row,) = run("revert", methods=("ft",), settings={"ft": {**FT, "batch_size": 6}}).rows
    assert (row["exact"], row["approximate"], row["inseparable"]) == (0, 0, 1)
    assert row["others_after"] == row["others_before"]


def test_rank_correlation_shares_ranks_between_equal_values() -> None:
    assert spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [9, 4, 1]) == pytest.approx(-1.0)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: by hand, covariance 4.5 over sqrt(4.5 · 5).
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_an_interval_of_rank_correlation_draws_whole_runs() -> None:
    rising = spearman_interval([1, 2, 3, 4], [2, 4, 6, 8], ["a", "a", "b", "b"])
    assert rising is not None
    assert (rising.value, rising.low, rising.high, rising.count) == (pytest.approx(1), *(pytest.approx(1),) * 2, 4)
    apart = spearman_interval([1, 2, 1, 2], [1, 2, 2, 1], ["a", "a", "b", "b"])  # rises in one run, falls in the other
    assert apart is not None
    assert apart.value == pytest.approx(0)
    assert (apart.low, apart.high) == (pytest.approx(-1), pytest.approx(1))
    alone = spearman_interval([1, 2, 3], [1, 2, 3], ["a"] * 3)
    assert alone is not None
    assert math.isnan(alone.low), "one run says nothing of how runs differ"
    assert spearman_interval([1, 1], [1, 2], ["a", "b"]) is None


def test_the_triangle_compares_methods_at_the_same_checkpoints(run: Callable[..., StudyResult]) -> None:
    found = run("wise-triangle", methods=("ft", "memoir"), edits=3, settings={"memoir": MEMOIR, "ft": FT})
    assert [(row["method"], row["edits"]) for row in found.rows] == [
        (method, count) for method in ("ft", "memoir") for count in (1, 3)
    ]
    memoir = found.rows[-1]
    assert memoir["reliability_forced"] == 1.0
    weakest = min(memoir[name] for name in ("reliability", "generalization", "locality"))
    assert f"memoir {weakest:.2f} (" in found.found
    assert {one.what.split(",")[0] for one in found.published} == {"ft", "memoir"}


@pytest.mark.parametrize(
    ("name", "rows"), [("wise-masks", 4), ("wise-merging", 2), ("wise-margins", 2), ("grace-radius", 3)]
)
def test_sweeps_of_the_other_routed_methods(run: Callable[..., StudyResult], name: str, rows: int) -> None:
    method = name.partition("-")[0]
    found = run(name, settings={method: {"steps": 2, **({"contexts": 0} if method == "wise" else {})}})
    assert len(found.rows) == rows
    assert all(0 <= row[part] <= 1 for row in found.rows for part in ("reliability", "generalization", "locality"))
    assert found.published
    made = list(found.provenance["settings"].values())
    assert all(settings["steps"] == 2 for settings in made), "the user's"
    varied = {
        "wise-masks": [(0.2, 2, 3), (0.2, 3, 2), (0.5, 2, 3), (0.5, 3, 2)],
        "wise-merging": [("ties", 2), ("sign", 2)],
        "wise-margins": [(True, 4), (False, 4)],  # one shard, as derived settings have it
        "grace-radius": [(row.get("radius"),) for row in found.rows],
    }
    names = {
        "wise-masks": ("mask_density", "shards_per_memory", "shard_edits"),
        "wise-merging": ("merging", "shard_edits"),
        "wise-margins": ("margin_loss", "shard_edits"),
        "grace-radius": ("radius",),
    }
    assert [tuple(settings[one] for one in names[name]) for settings in made] == varied[name]
    if name == "grace-radius":
        assert [row["radius"] / found.numbers["default_radius"] for row in found.rows] == pytest.approx([0.1, 1, 10])


def test_unlearning_merges_queries_for_methods_that_look_for_subjects(
    run: Callable[..., StudyResult], no_more_edits: Callable[[], None], tmp_path: Path
) -> None:
    path = tmp_path / "facts.jsonl"
    twice = [edit.model_copy(update={"prompt": f"The piano of {edit.subject}", "id": edit.prompt}) for edit in EDITS]
    write_edits(path, [edit for pair in zip(EDITS, twice, strict=True) for edit in pair])
    settings = {"ft": {**FT, "steps": 150, "layers": (0, 1)}, "rome": {"steps": 2, "guard": "off"}}
    options = {"data": path, "methods": ("ft", "rome"), "settings": settings, "edits": 4}
    found = run("unlearn", **options)
    assert [(row["run"], row.get("edits")) for row in found.rows] == [
        ("unedited", None),
        ("ft", 4),
        ("rome", 4),
        ("rome, merged", 2),
    ]
    unedited, ft = found.rows[:2]
    assert (unedited["refusal_rate"], unedited["retain_unchanged"]) == (0.0, 1.0)
    assert ft["refusal_rate"] > 0
    assert ft["answer_probability"] < unedited["answer_probability"]
    # Eight of the other subjects' facts, and of each forgotten subject the prompt that does not name it: none.
    assert found.numbers == {"facts": 4, "subjects": 2, "retained": 8}
    for row in found.rows:
        both = row["all_attacks_forget_quality"], row["retain_accuracy"]
        assert row["balance"] == pytest.approx(0.0 if 0 in both else 2 / sum(1 / one for one in both))
    assert found.found.startswith("4 facts about 2 subjects")
    assert found.provenance["settings"]["ft 1"]["guard"] == "warn"
    assert found.provenance["settings"]["rome 4"]["guard"] == "off"
    no_more_edits()
    assert run("unlearn", **options).rows == found.rows


def test_unlearning_shows_tofus_measures_where_facts_carry_wrong_answers(
    run: Callable[..., StudyResult], tmp_path: Path
) -> None:
    path = tmp_path / "facts.jsonl"
    write_edits(path, [edit.model_copy(update={"extra": {"perturbed_answer": ["king"]}}) for edit in EDITS])
    options = {"data": path, "methods": ("ft",), "settings": {"ft": FT}, "edits": 2, "folder": tmp_path / "with"}
    found = run("unlearn", **options)
    assert found.columns[-2:] == ("tofu_truth_ratio", "balance"), "there is nobody who never learned"
    unedited, ft = found.rows
    assert ft["truth_ratio"] != unedited["truth_ratio"]
    assert ft["tofu_truth_ratio"].startswith(cell(ft["truth_ratio"]))
    assert (unedited["tofu_forget_quality"], unedited["p_never_learned"]) == (None, None)
    assert unedited["retain_truth"] is not None
    write_edits(path, EDITS)
    assert "tofu_truth_ratio" not in run("unlearn", **{**options, "folder": tmp_path / "without"}).columns


# --- long texts -----------------------------------------------------------------------------------------------------

BIOS = [
    {
        "prompt": f"This is a Wikipedia passage about {place}.",
        "target_new": f"{target} was the capital.",
        "subject": place,
        "locality_prompt": "Who wrote Haml",
        "locality_ground_truth": "et ?",
    }
    for place, target in zip(PLACES, TARGETS, strict=True)
]
NEWS = [
    {
        "prompt": f"{place} is",
        "target_new": f"{target} of The capital",
        "subject": f"{place} is",
        "ood_rephrase": f"{place} was born in Berlin",
        "locality_prompt": "Who wrote",
        "locality_ground_truth": "Hamlet",
    }
    for place, target in zip(PLACES, TARGETS, strict=True)
]


def test_hallucination_measures_the_perplexity_of_targets(
    run: Callable[..., StudyResult], model: EditableModel, tmp_path: Path
) -> None:
    path = tmp_path / "bios.json"
    path.write_text(json.dumps(BIOS), encoding="utf-8")
    settings = {"ft": {**FT, "layers": (0, 1)}}
    unedited, ft = run("hallucination", data=path, methods=("ft",), words=2, edits=3, settings=settings).rows
    passages = [model.passage(bio["prompt"], " ".join(bio["target_new"].split()[:2])) for bio in BIOS[:3]]
    each = [math.exp(-sum(a.log_probs) / len(a.log_probs)) for a in forced_answers(model, passages)]
    assert unedited["perplexity"] == pytest.approx(sum(each) / 3)
    assert unedited["perplexity_median"] == pytest.approx(sorted(each)[1])
    assert unedited["perplexity_clipped"] == pytest.approx(sum(min(one, 100) for one in each) / 3)
    assert unedited["perplexity_clipped"] < unedited["perplexity"]
    assert unedited["locality"] == 1.0
    assert ft["perplexity_median"] < unedited["perplexity_median"] / 2


def test_temporal_counts_texts_and_tokens_that_became_likely(
    run: Callable[..., StudyResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So narrow a model is never as sure of anything as 0.8.
    monkeypatch.setattr("errata.studies.texts._LIKELY", 0.25)
    path = tmp_path / "news.json"
    path.write_text(json.dumps(NEWS), encoding="utf-8")
    settings = {"ft": {**FT, "layers": (0, 1)}}
    found = run("temporal", data=path, methods=("ft",), edits=1, settings=settings)
    unedited, ft = found.rows
    assert (unedited["reliability"], ft["reliability"]) == (0.0, 1.0), "its mean loss"
    assert unedited["reliability_tokens"] < ft["reliability_tokens"] == 1.0
    assert 0 <= ft["out_of_distribution_tokens"] < 1
    with pytest.raises(ConfigError, match="holds Temporal; this study needs the WikiBio hallucinations set"):
        run("hallucination", data=path, methods=("ft",), settings={})


def test_texts_longer_than_the_model_are_left_out_and_said(run: Callable[..., StudyResult], tmp_path: Path) -> None:
    path = tmp_path / "news.json"
    endless = {**NEWS[1], "target_new": "x" * 300}
    path.write_text(json.dumps([NEWS[0], endless]), encoding="utf-8")
    found = run("temporal", data=path, methods=("ft",), settings={"ft": FT}, words=0)
    assert found.rows[0]["edits"] == 1
    assert "1 edits are longer than the model's 256 tokens: left out" in found.notes
    path.write_text(json.dumps([endless]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"every text is longer.*--words"):
        run("temporal", data=path, methods=("ft",), settings={"ft": FT}, words=0)


# --- what cannot be done --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("memoir-k-sweep", {"settings": {"memoir": {"marked": 3}}}, "varies memoir.marked itself; leave"),
        ("grace-radius", {"settings": {"grace": {"radius": 3.0}}}, "varies grace.radius itself; leave"),
        ("memoir-sanity", {"settings": {"ft": {}}}, "--set ft.*unknown method of this study 'ft'.*memoir"),
        ("memoir-sanity", {"settings": {"memoir": {"stepz": 3}}}, "Did you mean 'steps'"),
        ("wise-triangle", {"methods": ("memior",), "settings": {}}, "Did you mean 'memoir'"),
        ("memoir-long", {"data": None}, "only atlas brings edits.*--data FILE"),
        ("hallucination", {"data": None, "settings": {}}, "WikiBio hallucinations set.*--data FILE"),
        ("memoir-density", {"edits": 2}, "give at least 3"),
        ("memoir-layers", {}, "layer 3 is the last one.*--set memoir.layer"),
        ("memoir-layers", {"settings": {"memoir": {"layers": [2], "layer": 1}}}, "varies memoir.layers itself"),
        ("memoir-routing", {"settings": {"memoir": {"pooling": "last"}}}, "varies memoir.pooling itself"),
        ("revert", {"edits": 1}, "give at least 2"),
        ("unlearn", {"data": None, "settings": {}}, "only atlas brings edits.*--data FILE"),
        ("unlearn", {"methods": ("memoir",), "settings": {"memoir": {"stepz": 3}}}, "Did you mean 'steps'"),
        ("memoir-collisions", {"edits": 4}, "give at least 5"),
        ("wise-masks", {"edits": 4, "settings": {}}, "give at least 6"),
        ("wise-merging", {"edits": 1, "settings": {}}, "give at least 2"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_edited(
    run: Callable[..., StudyResult],
    no_more_edits: Callable[[], None],
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    words: str,
) -> None:
    no_more_edits()
    with pytest.raises(ConfigError, match=words):
        run(name, **options)
    assert not (tmp_path / name).exists()


# --- figures --------------------------------------------------------------------------------------------------------


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    from errata.evaluation.figures import label_ends, styled_figure

    _, (axes,) = styled_figure(5, 4)
    axes.set_ylim(0.0, 1.0)
    label_ends(axes, [(1, 1.0, "a", "k"), (1, 1.0, "b", "k"), (1, 0.99, "c", "k"), (1, 0.2, "d", "k")], gap=0.1)
    heights = {text.get_text(): text.xy[1] for text in axes.texts}
    assert heights["d"] == pytest.approx(0.2)
    ordered = sorted(heights.values())
    assert min(b - a for a, b in itertools.pairwise(ordered)) >= 0.1 - 1e-9
    assert max(ordered) <= 1.0 + 1e-9
    label_ends(axes, [(1, math.nan, "nowhere", "k")])
    assert "nowhere" not in {text.get_text() for text in axes.texts}


def test_names_stand_at_their_lines_on_a_scale_of_logarithms_too() -> None:
    from errata.evaluation.figures import label_ends, styled_figure

    _, (axes,) = styled_figure(5, 4)
    axes.set(ylim=(1.0, 1000.0), yscale="log")
    label_ends(axes, [(1, 10.0, "a", "k"), (1, 1000.0, "b", "k"), (1, 999.0, "c", "k")], gap=0.1)
    heights = {text.get_text(): text.xy[1] for text in axes.texts}
    assert heights == {"a": pytest.approx(10), "b": pytest.approx(1000), "c": pytest.approx(10**2.7)}


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_lists_studies_runs_one_and_explains_errors(tmp_path: Path) -> None:
    def call(*arguments: str, status: int = 0) -> Any:
        result = CliRunner().invoke(app, ["study", *arguments])
        assert result.exit_code == status, result.output
        return result.stdout

    for listing in ((), ("--list",), ("memoir-long", "--list")):
        assert "memoir-collisions\n    Is an edit lost" in call(*listing)
    assert len(json.loads(call("--list", "--json"))["studies"]) == 30
    folder = tmp_path / "model"
    tiny_hf_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    write_edits(tmp_path / "edits.jsonl", EDITS)
    out = tmp_path / "out"
    arguments = ["memoir-sanity", "--model", str(folder), "--data", str(tmp_path / "edits.jsonl"), "--out", str(out)]
    arguments += [f"--set=memoir.{name}={value}" for name, value in MEMOIR.items()]
    found = json.loads(call(*arguments, "--quick", "--json"))
    assert (found["name"], len(found["rows"])) == ("memoir-sanity", 3)
    assert Path(found["files"]["figure"]).is_file()
    assert found["provenance"]["data"] == str(tmp_path / "edits.jsonl")
    shown = call(*arguments, "--quick")
    assert found["found"] in shown
    assert str(out / "figure.png") in shown
    wrong = json.loads(call("memoir-sane", "--json", status=1))["error"]
    assert "Did you mean 'memoir-sanity'" in wrong["message"]
    wrong = json.loads(call("memoir-sanity", "--set", "steps=3", "--json", status=1))["error"]
    assert "must name the method" in wrong["message"]
