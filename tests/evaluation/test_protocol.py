"""Examinations and sequential runs: nothing leaks, all past edits are asked, runs resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from errata.edit import Edit, Probe
from errata.editors import EditOutcome
from errata.editors.ft import FineTune
from errata.errors import ConfigError
from errata.evaluation import Comparison, Examination, run_sequence
from errata.evaluation.controls import no_op_control, no_op_edits, random_control
from errata.evaluation.report import RunReport, write_report
from errata.model import EditableModel
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
    original = EditableModel.generate

    def spy(self: EditableModel, prompts: list[str], **kwargs: Any) -> list[str]:
        asked.extend((prompt, kwargs["max_new_tokens"]) for prompt in prompts)
        return original(self, prompts, **kwargs)

    monkeypatch.setattr(EditableModel, "generate", spy)
    examination(model).ask()
    everything = {e.prompt for e in EDITS} | {t for e in EDITS for t in e.rephrases}
    everything |= {p.prompt for e in EDITS for p in (*e.locality, *e.portability)}
    assert {prompt for prompt, _ in asked} == everything
    assert {tokens for _, tokens in asked} == {5}


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


def test_forgetting_is_what_was_right_and_is_not_any_more() -> None:
    """A later edit of the same prompt makes the first one wrong: immediate and final differ."""
    model = tiny_model("llama")
    edits = [edit("The capital of France", "Rome"), Edit(id="b", prompt="The capital of France", target="Berlin")]
    exam = Examination(model, edits, max_new_tokens=1)
    exam.ask_base()
    ((checkpoint, _),) = run_sequence(FineTune(model, learning_rate=1e-2, steps=100), exam, [2])
    assert checkpoint.immediate == 1.0
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
    control = no_op_control(FineTune(model, **FT), exam, TEXTS)
    assert control.name == "no-op (ft)"
    assert type(model.module(model.anatomy.mlp_output[2])).__name__ == "Linear"


def test_random_content_is_asked_and_taken_off_again() -> None:
    model = tiny_model("llama")
    exam = examination(model)
    editor = FineTune(model, **FT)
    editor.edit(EDITS)
    mine = exam.ask().to_record()
    control = random_control(editor.adapter, exam, TEXTS)
    assert control.result.to_record() != mine
    assert exam.ask().to_record() == mine


def compare(folder: Path, checkpoints: list[int], **more: Any) -> list[dict[str, Any]]:
    settings = {"ft": FT, "memoir": {"steps": 20, "contexts": 1, "relative_threshold": 0.5}}
    methods = more.pop("methods", ["ft", "memoir"])
    comparison = Comparison(
        tiny_model("llama"),
        methods,
        EDITS,
        checkpoints,
        folder,
        texts=TEXTS,
        settings=settings,
        max_new_tokens=5,
        **more,
    )
    return comparison.chosen(list(comparison.run()))


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def test_a_comparison_has_every_method_and_baseline_and_a_figure(tmp_path: Path) -> None:
    rows = compare(tmp_path, [1, 3])
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
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_finished_rows_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = compare(tmp_path, [1, 3])

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("an edit was made again")

    monkeypatch.setattr(FineTune, "_write", forbidden)
    assert compare(tmp_path, [1, 3]) == rows


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
    with pytest.raises(ConfigError, match="at least one checkpoint"):
        Comparison(tiny_model("llama"), ["ft"], EDITS, [], tmp_path)


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
