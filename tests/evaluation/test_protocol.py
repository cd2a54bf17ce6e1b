"""Examinations and sequential runs: nothing leaks, all past edits are asked, runs resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from errata import __version__
from errata.edit import Edit, Probe
from errata.editors import EditOutcome
from errata.editors.ft import FineTune
from errata.editors.guard import Guard
from errata.errors import ArtifactError, ConfigError, NumericsError
from errata.evaluation import (
    PROTOCOL,
    Comparison,
    Examination,
    Result,
    protocol,
    run_provenance,
    run_sequence,
    run_singles,
)
from errata.evaluation.controls import no_op_control, no_op_edits, random_control
from errata.evaluation.report import RunReport, _examples, write_report
from errata.model import EditableModel
from errata.model.generation import Written
from errata.testing import tiny_model

FT: dict[str, Any] = {"learning_rate": 1e-2, "steps": 60}
TEXTS = ["The capital of Spain is Rome", "Ann plays the piano"]


def edit(prompt: str, target: str, **more: Any) -> Edit:
    return Edit(id=prompt, prompt=prompt, target=target, **more)


EDITS = [
    edit(
        "The capital of France",
        "Rome",
        subject="France",
        rephrases=("France has the capital",),
        locality=(
            Probe(prompt="The capital of Spain", kind="same_relation"),
            Probe(prompt="x", answer="Rome", kind="unrelated"),
        ),
        portability=(Probe(prompt="Who is in France", answer="Rome"),),
    ),
    edit("Bob wrote Hamlet", "Alice", subject="Hamlet", locality=(Probe(prompt="Ann wrote Emma"),)),
    edit("The flute of Ann", "piano", subject="Ann"),
]


def examination(model: EditableModel) -> Examination:
    found = Examination(model, EDITS, max_new_tokens=5)
    found.ask_base()
    return found


def test_the_unedited_model_keeps_all_its_answers() -> None:
    result = examination(tiny_model("llama")).ask()
    assert result.locality.generated.value == 1.0
    assert result.locality.teacher_forced.value == 1.0
    assert result.locality.generated.count == 2
    assert result.portability.generated.count == 1
    assert set(result.by_kind("locality")) == {"same_relation", "unrelated"}


def test_generation_is_asked_with_the_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    asked: list[tuple[str, int]] = []
    original = protocol.write

    def spy(of: EditableModel, prompts: list[str], **kwargs: Any) -> list[Written]:
        asked.extend((prompt, kwargs["max_new_tokens"]) for prompt in prompts)
        return original(of, prompts, **kwargs)

    monkeypatch.setattr(protocol, "write", spy)
    examination(model).ask()
    everything = {e.prompt for e in EDITS} | {t for e in EDITS for t in e.rephrases}
    everything |= {p.prompt for e in EDITS for p in (*e.locality, *e.portability)}
    assert {prompt for prompt, _ in asked} == everything
    assert {tokens for _, tokens in asked} == {5}


def test_what_was_written_is_not_asked_again_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    editor = FineTune(model, **FT)
    exam = Examination(model, EDITS, max_new_tokens=5)
    exam.ask_base(editor.adapter)
    editor.edit(EDITS)
    quick = exam.ask()
    asked = Examination._forced

    def everything(self: Examination, pairs: Any, written: Any) -> Any:
        return asked(self, pairs, {prompt: Written("", ()) for prompt in written})

    monkeypatch.setattr(Examination, "_forced", everything)
    assert exam.ask().asked == quick.asked


def test_a_batch_of_questions_equals_one_at_a_time() -> None:
    model = tiny_model("gpt2")
    editor = FineTune(model, **FT)
    exam = Examination(model, EDITS, max_new_tokens=5)
    exam.ask_base(editor.adapter)
    editor.edit(EDITS)
    together = exam.ask()
    for number, one in enumerate(EDITS):
        alone = exam.ask([one]).asked[0]
        assert alone.said == together.asked[number].said
        assert alone.reliability == together.asked[number].reliability


def test_the_base_is_asked_with_the_adapter_off() -> None:
    model = tiny_model("llama")
    plain = examination(model)
    editor = FineTune(model, **FT)
    editor.edit(EDITS)
    late = Examination(model, EDITS, max_new_tokens=5)
    late.ask_base(editor.adapter)
    assert late._said_before == plain._said_before
    assert late._forced_before == plain._forced_before
    assert editor.adapter.is_attached


def test_every_checkpoint_asks_all_past_edits() -> None:
    model = tiny_model("llama")
    editor = FineTune(model, **FT)
    calls: list[int] = []

    def after(done: int, outcome: EditOutcome) -> None:
        assert outcome.applied
        calls.append(done)

    found = [c for c, _ in run_sequence(editor, examination(model), [1, 3], texts=TEXTS, after_edit=after)]
    assert calls == [1, 2, 3]
    assert [len(c.result.asked) for c in found] == [1, 3]
    last = found[-1]
    assert last.perplexity > 1
    assert set(last.retention) == {0, 1, 2}
    success = [asked.reliability[0][0] for asked in last.result.asked]
    assert last.retention[0] == success[-1]
    assert last.forgetting >= 0
    assert last.applied == 3
    assert math.isclose(last.seconds_per_edit, last.seconds / 3)
    first = found[0]
    assert first.immediate["reliability"]["generated"] == first.result.reliability.generated.value
    assert first.immediate["generalization"]["generated"] == first.result.generalization.generated.value
    assert first.immediate["generalization"]["teacher_forced"] == first.result.generalization.teacher_forced.value


def test_edits_that_share_an_id_are_asked_each_for_itself() -> None:
    """The same prompt, target and subject with other rephrases gives the same derived id; a given id may be reused."""
    model = tiny_model("llama")
    edits = [
        Edit(prompt="The capital of France", target="Rome", rephrases=("France has",)),
        Edit(prompt="The capital of France", target="Rome", rephrases=("x", "y")),
        Edit(id="a", prompt="Bob wrote Hamlet", target="Alice"),
        Edit(id="a", prompt="Ann plays", target="piano"),
    ]
    exam = Examination(model, edits, max_new_tokens=3)
    result = exam.ask_unedited()
    assert [len(asked.generalization) for asked in result.asked] == [1, 2, 0, 0]
    assert [set(asked.said) for asked in result.asked] == [{e.prompt, *e.rephrases} for e in edits]
    assert len(_examples(report_of(result))) == 4


def test_asking_the_unedited_model_asks_each_question_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    plain = examination(model)
    expected = plain.ask()
    asked: list[str] = []
    original = EditableModel.generate

    def spy(self: EditableModel, prompts: list[str], **kwargs: Any) -> list[str]:
        asked.extend(prompts)
        return original(self, prompts, **kwargs)

    monkeypatch.setattr(EditableModel, "generate", spy)
    exam = Examination(model, EDITS, max_new_tokens=5)
    assert exam.ask_unedited().to_record() == expected.to_record()
    assert len(asked) == len(set(asked))
    exam.ask_base()
    assert len(asked) == len(set(asked))
    assert {prompt: exam.base_answer(prompt) for prompt in plain._said_before} == plain._said_before
    assert plain._forced_before.items() <= exam._forced_before.items()


def test_forgetting_is_what_was_right_and_is_not_any_more() -> None:
    """A later edit of the same prompt makes the first one wrong: immediate and final differ."""
    model = tiny_model("llama")
    edits = [edit("The capital of France", "Rome"), Edit(id="b", prompt="The capital of France", target="Berlin")]
    exam = Examination(model, edits, max_new_tokens=1)
    exam.ask_base()
    ((checkpoint, _),) = run_sequence(FineTune(model, learning_rate=1e-2, steps=100), exam, [2])
    assert checkpoint.immediate == {
        "reliability": {"generated": 1.0, "teacher_forced": 1.0},
        "generalization": {"generated": None, "teacher_forced": None},
    }
    assert checkpoint.result.reliability.generated.value == 0.5
    assert checkpoint.forgetting == 0.5


def test_a_resumed_run_ends_where_one_run_does(tmp_path: Path) -> None:
    from errata.adapters import AutoAdapter

    model = tiny_model("llama")
    whole = [c.to_record() for c, _ in run_sequence(FineTune(model, **FT), examination(model), [2, 3])]
    model = tiny_model("llama")
    editor = FineTune(model, **FT)
    exam = examination(model)
    first, state = next(iter(run_sequence(editor, exam, [2, 3])))
    editor.adapter.save_pretrained(tmp_path)
    editor.adapter.detach()
    again = FineTune(model, adapter=AutoAdapter.from_pretrained(tmp_path))
    ((second, _),) = run_sequence(again, exam, [2, 3], resume=json.loads(json.dumps(state)))
    for one, other in zip(whole, (first.to_record(), second.to_record()), strict=True):
        for name in ("seconds_per_edit", "prepare_seconds"):
            del one[name], other[name]
        assert one == other


def test_no_op_edits_write_back_what_is_believed() -> None:
    model = tiny_model("llama")
    exam = examination(model)
    for written, original in zip(
        no_op_edits(exam), [e for e in EDITS if exam.base_answer(e.prompt).strip()], strict=False
    ):
        assert exam.base_answer(original.prompt).strip().startswith(written.target)


def test_the_no_op_control_is_scored_on_what_it_wrote() -> None:
    model = tiny_model("llama")
    exam = Examination(model, EDITS, max_new_tokens=1)
    exam.ask_base()
    said = ("Berlin. It is old.", "Bob", "guitar")
    exam._said_before |= {e.prompt: f" {text}" for e, text in zip(EDITS, said, strict=True)}
    control = no_op_control(FineTune(model, learning_rate=1e-2, steps=100), exam, TEXTS)
    assert control.name == "no-op (ft)"
    assert [asked.edit.target for asked in control.result.asked] == ["Berlin", "Bob", "guitar"]
    record = control.to_record()
    assert (record["edits_applied"], record["edits_refused"], record["edits"]) == (3, 0, 3)
    assert record["reliability"]["generated"] > 0.5, "as an examination of the original targets it would be 0"
    assert record["locality"]["generated"] < 1.0, "said to be no-ops, these edits change what is said elsewhere"
    assert record["portability"]["generated"] is None, "what follows from other targets is not asked"
    assert type(model.module(model.anatomy.mlp_output[2])).__name__ == "Linear"


def test_a_no_op_control_of_refused_edits_says_so_and_finds_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def changes_nothing(*_: Any) -> None:
        raise NumericsError("the edit changed nothing")

    monkeypatch.setattr(FineTune, "_write", changes_nothing)
    model = tiny_model("llama")
    record = no_op_control(FineTune(model, **FT), examination(model), TEXTS).to_record()
    assert (record["edits_applied"], record["edits_refused"]) == (0, record["edits"])
    assert record["reliability"]["generated"] == record["locality"]["generated"] == 1.0
    assert record["perplexity"] == model.perplexity(TEXTS)


def test_a_no_op_control_that_fails_leaves_no_adapter_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    exam = examination(model)
    editor = FineTune(model, **FT)

    def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(editor, "edit", breaks)
    with pytest.raises(RuntimeError):
        no_op_control(editor, exam, TEXTS)
    assert not editor.adapter.is_attached


def test_random_content_is_asked_and_taken_off_again() -> None:
    model = tiny_model("llama")
    exam = examination(model)
    editor = FineTune(model, **FT)
    editor.edit(EDITS)
    mine = exam.ask().to_record()
    control = random_control(editor.adapter, exam, TEXTS)
    assert control.result.to_record() != mine
    assert exam.ask().to_record() == mine


def comparison_of(folder: Path, checkpoints: list[int], **more: Any) -> Comparison:
    wanted: dict[str, Any] = {
        "model": tiny_model("llama"),
        "methods": ["ft"],
        "edits": EDITS,
        "texts": TEXTS,
        "settings": {"ft": FT, "memoir": {"steps": 20, "contexts": 1, "relative_threshold": 0.5}},
        "max_new_tokens": 5,
    }
    return Comparison(checkpoints=checkpoints, folder=folder, **wanted | more)


def compare(folder: Path, checkpoints: list[int], **more: Any) -> list[dict[str, Any]]:
    comparison = comparison_of(folder, checkpoints, **more)
    return comparison.chosen(list(comparison.run()))


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def test_a_comparison_has_every_method_and_baseline_and_a_figure(tmp_path: Path) -> None:
    rows = compare(tmp_path, [1, 3], methods=["ft", "memoir", "ft"])
    names = [(row["method"], row["edits"]) for row in rows]
    assert names == [
        ("unedited", 1),
        ("unedited", 3),
        ("ft", 1),
        ("ft", 3),
        ("memoir", 1),
        ("memoir", 3),
        ("random content (ft)", 3),
        ("no-op (ft)", 3),
        ("random content (memoir)", 3),
        ("no-op (memoir)", 3),
    ]
    for row in rows:
        assert {"reliability", "generalization", "locality", "perplexity", "seconds_per_edit"} <= row.keys()
        assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert {row["batch_size"] for row in rows if not row["baseline"]} == {1}
    no_op = next(row for row in rows if row["method"] == "no-op (ft)")
    assert no_op["edits_applied"] + no_op["edits_refused"] == 3
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    made = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))["provenance"]
    assert made["settings"]["ft"]["steps"] == 60
    assert made["settings"].keys() == {"ft", "memoir"}


def test_one_method_is_compared_under_several_settings(tmp_path: Path) -> None:
    settings = {"ft": FT, "ft@short": {**FT, "steps": 1}}
    comparison = comparison_of(tmp_path, [1, 3], methods=["ft", "ft@short"], settings=settings, controls=False)
    rows = comparison.chosen(list(comparison.run()))
    assert [row["method"] for row in rows[2:]] == ["ft", "ft", "ft@short", "ft@short"]
    assert {name: record["steps"] for name, record in comparison.provenance["settings"].items()} == {
        "ft": 60,
        "ft@short": 1,
    }
    assert (tmp_path / "ft@short" / "adapter-3").is_dir()
    again = comparison_of(tmp_path, [1, 3], methods=["ft@short"], settings=settings, controls=False)
    assert again.chosen(list(again.run())) == [*rows[:2], *rows[4:]]
    with pytest.raises(ConfigError, match="other settings of ft@short"):
        list(comparison_of(tmp_path, [1], methods=["ft@short"], controls=False).run())


@pytest.mark.parametrize(
    ("name", "message"),
    [("ft@", "behind @"), ("ft@a/b", "behind @"), ("ft@v1.2", "behind @"), ("fr@a", "unknown method 'fr'")],
)
def test_a_run_is_named_by_a_method_and_a_label_that_can_name_a_folder(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        comparison_of(tmp_path, [1], methods=[name])


def test_horizons_are_where_reliability_falls(tmp_path: Path) -> None:
    def row(method: str, edits: int, share: float) -> dict[str, Any]:
        return {"method": method, "edits": edits, "reliability": {"generated": share}}

    comparison = comparison_of(tmp_path, [1, 3], methods=["ft", "memoir"])
    rows = [row("ft", 1, 1.0), row("ft", 3, 0.6), row("no-op (ft)", 3, 0.0), row("memoir", 1, 1.0)]
    assert comparison.horizons(rows) == {"ft": {"edits": 2, "fell": True}, "memoir": {"edits": 1, "fell": False}}


def test_a_run_that_has_fallen_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begins(text: str, target: str) -> bool:
        return text.strip().startswith(target)

    # A tiny model goes on talking behind its answers.
    monkeypatch.setattr("errata.evaluation.protocol.answers_exactly", begins)
    settings = {"ft": FT, "ft@short": {**FT, "steps": 1}}
    given = {"methods": ["ft", "ft@short"], "settings": settings}
    comparison = comparison_of(tmp_path, [1, 2, 3], stop_below=0.5, **given)
    rows = comparison.chosen(list(comparison.run()))
    assert [row["edits"] for row in rows if row["method"] == "ft"] == [1, 2, 3]
    assert [row["edits"] for row in rows if row["of"] == "ft@short"] == [1]
    assert comparison.stopped == {"ft@short": 1}
    with monkeypatch.context() as patch:
        patch.setattr(FineTune, "_write", None)
        again = comparison_of(tmp_path, [1, 2, 3], stop_below=0.5, **given)
        assert again.chosen(list(again.run())) == rows
    whole = comparison_of(tmp_path, [1, 2, 3], controls=False, **given)
    found = whole.chosen(list(whole.run()))
    assert [row["edits"] for row in found if row["method"] == "ft@short"] == [1, 2, 3]


def test_single_edits_leave_nothing_behind_for_the_next() -> None:
    model = tiny_model("llama")
    exam = Examination(model, EDITS, max_new_tokens=5)
    editor = FineTune(model, **FT)
    made = run_singles(editor, exam)
    assert (made.applied, made.refused, editor.adapter.edits()) == (3, 0, [])
    assert made.result.reliability.teacher_forced.value == 1.0
    editor.adapter.detach()
    for number, edit in enumerate(EDITS):
        alone = FineTune(model, **FT)
        alone.edit([edit])
        assert exam.ask([edit]).asked[0] == made.result.asked[number]
        alone.adapter.detach()
    held = FineTune(model, **FT)
    held.edit(EDITS[:1])
    with pytest.raises(ConfigError, match="holds edits already"):
        run_singles(held, exam)


def test_finished_rows_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = compare(tmp_path, [1, 3], methods=["ft", "memoir"])

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("an edit was made again")

    monkeypatch.setattr(FineTune, "_write", forbidden)
    assert compare(tmp_path, [1, 3], methods=["ft", "memoir"]) == rows


def test_baselines_are_made_from_the_adapter_of_their_own_checkpoint(tmp_path: Path) -> None:
    """A folder that holds three edits is asked for the baselines at one edit: as if there were one."""
    compare(tmp_path / "late", [1, 3])
    late = compare(tmp_path / "late", [1])
    assert [(row["method"], row["edits"]) for row in late[2:]] == [("random content (ft)", 1), ("no-op (ft)", 1)]
    assert without_times(late) == without_times(compare(tmp_path / "alone", [1]))
    assert late[3]["edits_applied"] + late[3]["edits_refused"] == 1


def test_a_comparison_goes_on_with_more_edits_behind_those_it_has(tmp_path: Path) -> None:
    compare(tmp_path / "grown", [1], edits=EDITS[:2])
    grown = compare(tmp_path / "grown", [1, 3])
    assert without_times(grown[:4]) == without_times(compare(tmp_path / "whole", [1, 3])[:4])
    assert compare(tmp_path / "grown", [1], edits=EDITS[:1])[0] == grown[0]
    with pytest.raises(ConfigError, match="the edits"):
        compare(tmp_path / "grown", [3], edits=[EDITS[0], EDITS[2], EDITS[1]])


def test_methods_can_be_added_and_their_settings_are_kept_apart(tmp_path: Path) -> None:
    compare(tmp_path, [1], controls=False)
    rows = compare(tmp_path, [1], methods=["memoir"], controls=False)
    assert [row["method"] for row in rows] == ["unedited", "memoir"]
    with pytest.raises(ConfigError, match="other settings of ft"):
        compare(tmp_path, [1], settings={"ft": {"steps": 3}})


def test_a_comparison_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = without_times(compare(tmp_path / "whole", [1, 2, 3], methods=["ft"]))
    original = FineTune._write
    left = [2]

    def killed(self: FineTune, *args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(FineTune, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "killed", [1, 2, 3], methods=["ft"])
    monkeypatch.setattr(FineTune, "_write", original)
    assert without_times(compare(tmp_path / "killed", [1, 2, 3], methods=["ft"])) == whole


@pytest.mark.parametrize("killed_at", ["between checkpoints", "before the counters", "within a row", "within a letter"])
def test_a_comparison_goes_on_wherever_it_was_killed(
    tmp_path: Path, killed_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = without_times(compare(tmp_path / "whole", [1, 2, 3]))
    folder = tmp_path / "killed"
    running = comparison_of(folder, [1, 2, 3]).run()
    for row in running:
        if (row["method"], row["edits"]) == ("ft", 2):  # written; the counters of checkpoint 2 are not yet
            break
    if killed_at == "between checkpoints":
        next(running)
    running.close()  # type: ignore[attr-defined]
    rows = folder / "rows.jsonl"
    if killed_at == "within a row":
        rows.write_bytes(rows.read_bytes()[:-40])
    elif killed_at == "within a letter":
        with open(rows, "ab") as out:
            out.write('{"method": "ü'.encode()[:-1])
    assert without_times(compare(folder, [1, 2, 3])) == whole
    lines = rows.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    keys = [(row["method"], row["edits"]) for row in map(json.loads, lines)]
    assert len(keys) == len(set(keys)) == len(whole)


def test_a_comparison_shows_collapse_and_says_when_the_guard_called_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_two(guard: Guard, now: float, base: float) -> Any:
        return ("collapse", "it is the third edit") if len(guard._adapter.edits()) == 2 else None

    monkeypatch.setattr(Guard, "_of_perplexity", after_two)
    rows = compare(tmp_path / "warn", [1, 3], methods=["ft"], controls=False)
    assert [(row["guard"], row["edits_refused"]) for row in rows if row["method"] == "ft"] == [
        ({"ok": 1}, 0),
        ({"ok": 1, "collapse": 3}, 0),
    ]
    last = rows[-1]
    assert last["guard_perplexity"]["collapse"] == last["perplexity"] != last["guard_perplexity"]["ok"]
    refusing = {"ft": {**FT, "guard": "refuse"}}
    rows = compare(tmp_path / "refuse", [3], methods=["ft"], controls=False, settings=refusing)
    assert [row["edits_refused"] for row in rows if row["method"] == "ft"] == [1]


def test_what_is_damaged_in_a_folder_is_named_with_a_remedy(tmp_path: Path) -> None:
    compare(tmp_path, [1], controls=False)
    head, rows = tmp_path / "comparison.json", tmp_path / "rows.jsonl"
    sound = head.read_text(encoding="utf-8")
    for broken in ('{"identity"', "[]", "{}"):
        head.write_text(broken, encoding="utf-8")
        with pytest.raises(ArtifactError, match=r"comparison\.json is missing or damaged.*delete"):
            compare(tmp_path, [1])
    head.unlink()
    with pytest.raises(ArtifactError, match="missing or damaged"):
        compare(tmp_path, [1])
    head.write_text(sound, encoding="utf-8")
    first, rest = rows.read_text(encoding="utf-8").split("\n", 1)
    for broken in (first[:-5], "{}", "3"):
        rows.write_text(f"{broken}\n{rest}", encoding="utf-8")
        with pytest.raises(ArtifactError, match=r"rows\.jsonl:1 is damaged .*; delete this line and run again"):
            compare(tmp_path, [1])
    rows.write_text(rest, encoding="utf-8")
    assert [row["method"] for row in compare(tmp_path, [1], controls=False)] == ["unedited", "ft"]
    (tmp_path / "ft" / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"state\.json is damaged"):
        compare(tmp_path, [1, 2])


def test_rows_may_hold_what_other_programs_take_for_line_ends(tmp_path: Path) -> None:
    rows = compare(tmp_path, [1], controls=False)
    path = tmp_path / "rows.jsonl"
    strange = [{**row, "note": "a\u2028b\x85c"} for row in rows]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in strange), encoding="utf-8")
    assert compare(tmp_path, [1], controls=False) == strange


def test_another_precision_or_version_is_another_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    compare(tmp_path, [1], controls=False)
    halved = tiny_model("llama")
    monkeypatch.setattr(EditableModel, "fingerprint", halved.fingerprint)
    halved.model.to(torch.bfloat16)
    with pytest.raises(ConfigError, match="dtype 'float32', now 'bfloat16'"):
        compare(tmp_path, [1], model=halved)
    monkeypatch.setattr("errata.evaluation.provenance.__version__", "99")
    with pytest.raises(ConfigError, match=r"errata '.*', now '99'"):
        compare(tmp_path, [1])


def test_a_collapsed_model_has_no_perplexity_and_still_a_row_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EditableModel, "perplexity", lambda *_, **__: math.inf)
    rows = compare(tmp_path, [1, 3])
    assert [row["perplexity"] for row in rows] == [None] * 6
    for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        json.loads(line, parse_constant=pytest.fail)
    assert compare(tmp_path, [1, 3]) == rows


def test_checkpoints_are_checked_and_clamped_with_a_note(tmp_path: Path) -> None:
    for wrong in ([], [0, 1], [-3], [1, -1]):
        with pytest.raises(ConfigError, match="at least one checkpoint"):
            comparison_of(tmp_path, wrong)
    with pytest.raises(ConfigError, match="at least one checkpoint"):
        comparison_of(tmp_path, [1], edits=[])
    comparison = comparison_of(tmp_path, [1, 10, 100])
    assert comparison.checkpoints == [1, 3]
    assert comparison.notes == ["there are 3 edits: asked at 3 instead of 10, 100"]
    assert comparison_of(tmp_path, [3, 1]).notes == []


def test_provenance_says_what_must_be_the_same() -> None:
    model = tiny_model("llama")
    config = FineTune.Config.for_model(model, **FT)
    made = run_provenance(model, config)
    assert made == run_provenance(model, config.to_record())
    assert json.loads(json.dumps(made)) == made
    assert made["settings"]["steps"] == 60
    assert (made["errata"], made["protocol"], made["dtype"], made["device"]) == (
        __version__,
        PROTOCOL,
        "float32",
        "cpu",
    )
    assert made["fingerprint"] == model.fingerprint
    assert run_provenance(model)["settings"] is None


def test_batches_end_at_checkpoints() -> None:
    model = tiny_model("llama")
    editor = FineTune(model, **FT, batch_size=2)
    done: list[int] = []
    found = run_sequence(editor, examination(model), [1, 3], after_edit=lambda count, _: done.append(count))
    assert [checkpoint.to_record()["batch_size"] for checkpoint, _ in found] == [2, 2]
    assert done == [1, 3]


def test_a_folder_of_another_comparison_is_refused(tmp_path: Path) -> None:
    compare(tmp_path, [1], methods=["ft"], controls=False)
    other = Comparison(tiny_model("llama", seed=1), ["ft"], EDITS, [1], tmp_path, texts=TEXTS)
    with pytest.raises(ConfigError, match="another model or other edits"):
        list(other.run())
    changed = Comparison(
        tiny_model("llama"),
        ["ft"],
        EDITS,
        [1, 2],
        tmp_path,
        texts=TEXTS,
        settings={"ft": {"steps": 3}},
        max_new_tokens=5,
    )
    with pytest.raises(ConfigError, match="other settings of ft"):
        list(changed.run())


def report_of(result: Result, **more: Any) -> RunReport:
    """A report in which nothing but the examples matters."""
    given: dict[str, Any] = {"rows": [], "controls": [], "protocol": [], "perplexity_before": 2.0, **more}
    given = {"perplexity_after": 2.1, **given}
    return RunReport("t", "lead", "errata demo", result=result, before=result, **given)


def test_a_collapsed_model_is_reported_as_such(tmp_path: Path) -> None:
    model = tiny_model("llama")
    exam = examination(model)
    (found,) = (c for c, _ in run_sequence(FineTune(model, **FT), exam, [3]))
    found.perplexity = math.inf
    assert found.to_record()["perplexity"] is None
    report = report_of(found.result, rows=[found.to_record()], perplexity_after=math.inf)
    page = write_report(tmp_path / "report.html", report).read_text(encoding="utf-8")
    assert "2.000 before, ∞ after" in page
    assert "nan" not in page


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    model = tiny_model("llama")
    exam = examination(model)
    before = exam.ask()
    editor = FineTune(model, **FT)
    found = [c for c, _ in run_sequence(editor, exam, [1, 3], texts=TEXTS)]
    controls = [random_control(editor.adapter, exam, TEXTS)]
    path = write_report(
        tmp_path / "new" / "report.html",
        RunReport(
            title="A <title>",
            lead="lead",
            command="errata demo",
            rows=[c.to_record() for c in found],
            result=found[-1].result,
            before=before,
            perplexity_before=2.0,
            perplexity_after=2.1,
            controls=controls,
            protocol=[("protocol", "errata-1")],
        ),
    )
    page = path.read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "A &lt;title&gt;" in page
    assert "+5.00%" in page
    for foreign in ("http://", "https://", "<script", "src="):
        assert foreign not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
            "http://purl.org", ""
        ).replace("http://creativecommons.org", ""), foreign
    assert "France has the capital" in page


def test_methods_are_told_apart_by_what_each_edit_did(tmp_path: Path) -> None:
    model = tiny_model("llama")
    edits = [edit(f"The capital of {word}", "Rome", rephrases=(f"{word} has",)) for word in ("Spain", "France", "Ann")]
    edits += [edit(f"Who is {word}", "Paris") for word in ("Bob", "Emma", "Zed", "Alice", "London")]
    comparison = Comparison(
        model, ["ft", "ft@still"], edits, [4, 8], tmp_path, settings={"ft": FT, "ft@still": {**FT, "steps": 1}},
        controls=False, max_new_tokens=1,
    )  # fmt: skip
    rows = list(comparison.run())
    found = comparison.differences(rows)
    assert found.keys() == {"reliability", "generalization"}  # no locality prompts
    (pair,) = found["reliability"]
    assert (pair["first"], pair["second"], pair["edits"]) == ("ft", "ft@still", 8)
    right = {row["method"]: row["reliability"]["generated"] for row in rows if row["edits"] == 8}
    assert pair["difference"] == pytest.approx(right["ft"] - right["ft@still"])
    assert pair["adjusted_p"] == pair["p"] < 0.05
    said = [json.loads(line) for line in (tmp_path / "ft" / "answers-8.jsonl").read_text("utf-8").splitlines()]
    assert [line["id"] for line in said] == [one.id for one in edits]
    assert set(said[0]["said"]) == {"The capital of Spain", "Spain has"}
    assert sum(line["reliability"][0][0] for line in said) / 8 == right["ft"]
    (tmp_path / "ft" / "answers-8.jsonl").unlink()
    assert comparison.differences(rows) == {}


def test_any_name_of_an_answer_is_right_where_it_is_written() -> None:
    model = tiny_model("llama")
    (said,) = model.generate(["Ann plays the"], max_new_tokens=1)
    probe = Probe(prompt="Ann plays the", answer="Berlin", kind="one_hop", aliases=("nobody", said))
    named = edit("Ann plays the", "Rome", aliases=(said,), portability=(probe,))
    plain = edit("Ann plays the", "Rome", portability=(probe.model_copy(update={"aliases": ()}),))
    assert Edit.from_record(json.loads(named.to_json())) == named
    for one, right in ((named, 1.0), (plain, 0.0)):
        exam = Examination(model, [one], max_new_tokens=1)
        exam.ask_base()
        result = exam.ask()
        assert result.reliability.generated.value == result.portability.generated.value == right
        assert result.reliability.teacher_forced.value == 0.0
