"""HalluEditBench's five dimensions, EVOKE's overfitting, and what edits leave of abilities. Tiny random models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.atlas.capabilities import CAPABILITIES, Item
from errata.datasets import read_edits, write_edits
from errata.edit import Edit, Probe
from errata.editors import Editor
from errata.errors import ConfigError
from errata.evaluation import Result
from errata.evaluation.challenge import DOUBT, challenged
from errata.evaluation.protocol import AskedEdit
from errata.evaluation.rankings import rank_answers
from errata.model import EditableModel
from errata.progress import NO_PROGRESS
from errata.studies import abilities, dual_facets, facets, halluedit, study
from errata.studies.result import StudyResult
from errata.studies.workbench import StudyOptions, Workbench
from errata.testing import byte_tokenizer, tiny_hf_model, tiny_model

FT = {"steps": 60, "learning_rate": 0.01}
EDITS = [
    Edit(
        prompt=f"The capital of {place}",
        target=target,
        ground_truth="Berlin",
        subject=place,
        rephrases=(f"{place} has",),
        locality=[
            {"prompt": f"The flute of {place}", "kind": "same_relation", "answer": "Hamlet"},
            {"prompt": f"Who was {place}", "kind": "same_subject", "answer": target},
        ],
        portability=[{"prompt": f"In {place}", "kind": "two_hop", "answer": "Emma"}],
    )
    for place, target in zip(("France", "Spain", "Ann", "Bob"), ("Rome", "Paris", "London", "Alice"), strict=True)
]


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return tiny_model("llama")


@pytest.fixture
def run(model: EditableModel, tmp_path: Path) -> Callable[..., StudyResult]:
    write_edits(tmp_path / "edits.jsonl", EDITS)

    def run(name: str, **options: Any) -> StudyResult:
        given = {
            "data": tmp_path / "edits.jsonl",
            "methods": ("ft", "ft@still"),
            "settings": {"ft": FT, "ft@still": {**FT, "steps": 1}},
            "quick": True,
            "folder": tmp_path / name,
            **options,
        }
        return study(name).run(model, StudyOptions(**given))

    return run


@pytest.fixture
def no_more_edits(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def edited(*_: Any, **__: Any) -> None:
            raise AssertionError("an edit was made again")

        monkeypatch.setattr(Editor, "edit", edited)

    return forbid


# --- doubt ----------------------------------------------------------------------------------------------------------


def test_every_turn_shows_what_was_said_before(monkeypatch: pytest.MonkeyPatch, model: EditableModel) -> None:
    asked: list[list[str]] = []

    def say(self: EditableModel, prompts: list[str], **_: Any) -> list[str]:
        asked.append(list(prompts))
        return [f" {prompt[-1]}{len(asked)}. " for prompt in prompts]

    monkeypatch.setattr(EditableModel, "generate", say)
    found = challenged(model, ["Ann a", "Bob b"], turns=2, doubt="Sure?")
    assert found == [[" a1. ", " a2. ", " a3. "], [" b1. ", " b2. ", " b3. "]]
    assert [texts[1] for texts in asked] == ["Bob b", "Bob b b1. Sure? Bob b", "Bob b b1. Sure? Bob b b2. Sure? Bob b"]


def test_whether_the_own_edit_still_fires_is_asked_of_routers_alone(
    run: Callable[..., StudyResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    memoir = {"relative_threshold": 0.6, "steps": 25, "contexts": 1, "background": 4, "pooling": "mean"}
    found = run("halluedit", edits=2, methods=("ft", "memoir"), settings={"ft": FT, "memoir": memoir})
    alike, routed = found.rows
    assert alike["own_edit_fires"] is None
    assert 0 <= routed["own_edit_fires"] <= 1
    adapter = type("Router", (), {"explain": lambda _, texts: [_Fired("Rome" in text) for text in texts]})()
    said = [["Rome. ", "x"], ["Paris.", "x"], ["Rome", "x"], ["x", "x"]]
    edits = [edit.model_copy(update={"id": "own"}) for edit in EDITS]
    assert halluedit._still_fires(adapter, edits, said, 1) == 0.5
    edits[0] = edits[0].model_copy(update={"id": "other"})
    assert halluedit._still_fires(adapter, edits, said, 1) == 0.25
    assert halluedit._still_fires(adapter, edits, said, 0) == 0.0


class _Fired:
    edit_id = "own"

    def __init__(self, fires: bool) -> None:
        self.fires = fires


def test_doubts_in_a_batch_equal_one_at_a_time(model: EditableModel) -> None:
    prompts = ["The capital of France", "Ann"]
    together = challenged(model, prompts, turns=2, max_new_tokens=3)
    assert together == [challenged(model, [prompt], turns=2, max_new_tokens=3)[0] for prompt in prompts]
    assert together[0][0] == model.generate(prompts[:1], max_new_tokens=3)[0]
    shown = f"Ann{together[1][0].rstrip()} {DOUBT} Ann"
    assert together[1][1] == model.generate([shown], max_new_tokens=3)[0]


# --- five dimensions ------------------------------------------------------------------------------------------------


def test_the_dimensions_by_hand() -> None:
    kinds = ("yes_question", "inverse", "2_hop", "3_hop")
    edit = Edit(prompt="p", target="t", portability=tuple(Probe(prompt=kind, answer="x", kind=kind) for kind in kinds))
    marks = [(float(exact), 1.0, 0.0, 0.0) for exact in (1, 0, 1, 0)]
    one = AskedEdit(edit, [], [(1.0, 1.0, 1.0, 1.0)], [(1, 1, 1, 1), (0, 0, 0, 0)], marks, {})
    other = AskedEdit(Edit(prompt="q", target="t"), [], [(0.0, 0.0, 0.0, 0.0)], [], [], {})
    found = halluedit._dimensions(Result([one, other]))
    assert found["generalization"] == pytest.approx((2 / 3 + 0) / 2), "the rephrase, yes, and the inverse"
    assert (found["portability"], found["portability_contains"]) == (0.5, 1.0)
    assert found["locality"] == 0.5
    assert halluedit._dimensions(Result([other]))["portability"] is None
    doubted = halluedit._doubted([[True, True, False], [True, False, False]])
    assert (doubted["efficacy"], doubted["robustness"]) == (1.0, 0.25)
    assert (doubted["turn_1"], doubted["turn_2"]) == (0.5, 0.0)


def test_only_wrong_answers_are_edited_and_the_rest_is_kept(
    run: Callable[..., StudyResult],
    model: EditableModel,
    no_more_edits: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    generate = EditableModel.generate

    def knows(self: EditableModel, prompts: list[str], **more: Any) -> list[str]:
        said = generate(self, prompts, **more)
        return [" Rome." if p == "The capital of France" else s for p, s in zip(prompts, said, strict=True)]

    monkeypatch.setattr(EditableModel, "generate", knows)
    first = run("halluedit", edits=2)
    assert [row["method"] for row in first.rows] == ["ft", "ft@still"]
    assert all(row["edits"] == 2 for row in first.rows)
    assert "of 4 facts asked, 1 were known; 2 of the others are edited" in first.notes
    for row in first.rows:
        assert {"efficacy", "generalization", "portability", "locality", "robustness", "turn_1", "turn_2"} <= row.keys()
        assert row["robustness"] == pytest.approx((row["turn_1"] + row["turn_2"]) / 2)
    no_more_edits()
    assert run("halluedit", edits=2).rows == first.rows
    with pytest.raises(AssertionError, match="made again"):
        run("halluedit", edits=3)


def test_a_model_that_knows_everything_has_nothing_to_correct(
    run: Callable[..., StudyResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {edit.prompt: edit.target for edit in EDITS}
    monkeypatch.setattr(EditableModel, "generate", lambda _, prompts, **__: [f" {answers[p]}." for p in prompts])
    with pytest.raises(ConfigError, match="answers all 4 facts rightly"):
        run("halluedit")


def test_atlas_brings_people_it_has_never_heard_of(
    tmp_path: Path, model: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "model_id", "atlas")
    bench = Workbench(study("halluedit"), model, StudyOptions(folder=tmp_path), NO_PROGRESS)
    candidates, known = halluedit._of_atlas(bench, 20)
    assert len(candidates) == 40
    assert all("invented" in edit.tags and edit.ground_truth is None for edit in candidates)
    assert len(known) == 20


def test_the_benchmarks_own_file_is_read(
    data: Path, run: Callable[..., StudyResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = next(iter(sorted((data / "halluedit").rglob("*llama*/*.csv*"))))
    assert read_edits(file, limit=2).format == "HalluEditBench"
    found = run("halluedit", data=file, edits=1, methods=("ft",), settings={"ft": {"steps": 1}})
    assert found.rows[0]["edits"] == 1


# --- overfitting ----------------------------------------------------------------------------------------------------


def test_overfitting_of_single_edits(
    run: Callable[..., StudyResult], no_more_edits: Callable[[], None], model: EditableModel
) -> None:
    first = run("evoke", edits=3)
    methods = [name for name, _ in itertools.groupby(row["method"] for row in first.rows)]
    assert methods == ["unedited", "ft", "ft@still"]
    kinds = {row["kind"] for row in first.rows}
    assert kinds == {"same_relation", "two_hop", "distracting"}, "same_subject's answer is the target itself"
    assert {row["edits"] for row in first.rows} == {3}
    unedited = {row["kind"]: row for row in first.rows if row["method"] == "unedited"}
    one_by_one = [rank_answers(model, [edit]).overfitting["two_hop"] for edit in EDITS[:3]]
    for name in ("correct", "direct", "overfitting", "modified"):
        expected = sum(getattr(scores, name) for scores in one_by_one) / 3
        assert unedited["two_hop"][name] == pytest.approx(expected, rel=1e-4)
    after = next(row for row in first.rows if row["method"] == "ft" and row["kind"] == "two_hop")
    assert after["direct"] > unedited["two_hop"]["direct"], "the target is likelier everywhere after this edit"
    no_more_edits()
    assert run("evoke", edits=3).rows == first.rows


def test_of_atlas_those_edits_are_taken_of_which_something_else_is_known(
    model: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.studies.evoke import _edits

    monkeypatch.setattr(model, "model_id", "atlas")
    bench = Workbench(study("evoke"), model, StudyOptions(folder=tmp_path), NO_PROGRESS)
    found = _edits(bench, 20)
    assert len(found) == 20
    kinds = [{probe.kind for probe in (*edit.locality, *edit.portability)} for edit in found]
    assert all(own & {"two_hop", "same_subject"} for own in kinds)
    assert not any("second_language" in own for own in kinds)


def test_distraction_is_asked_behind_the_edits_own_sentence(model: EditableModel, tmp_path: Path) -> None:
    from errata.studies.evoke import _asked

    bench = Workbench(study("evoke"), model, StudyOptions(folder=tmp_path), NO_PROGRESS)
    (found,) = _asked(bench, EDITS[:1])
    assert found.locality[:2] == EDITS[0].locality
    assert (found.locality[2].prompt, found.locality[2].answer, found.locality[2].kind) == (
        "The capital of France Rome. The flute of France",
        "Hamlet",
        "distracting",
    )
    assert _asked(bench, [found]) == [found], "a file that has such probes is left as it is"


def test_edits_without_other_answers_are_named(run: Callable[..., StudyResult], tmp_path: Path) -> None:
    write_edits(tmp_path / "bare.jsonl", [Edit(prompt="Ann", target="Rome", ground_truth="Paris")])
    with pytest.raises(ConfigError, match="has an answer that is not the target"):
        run("evoke", data=tmp_path / "bare.jsonl")
    write_edits(tmp_path / "bare.jsonl", [Edit(prompt="Ann", target="Rome")])
    with pytest.raises(ConfigError, match="ground_truth"):
        run("evoke", data=tmp_path / "bare.jsonl")


# --- abilities ------------------------------------------------------------------------------------------------------


def test_abilities_are_asked_at_every_checkpoint(
    run: Callable[..., StudyResult], no_more_edits: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def examined(model: EditableModel, **_: Any) -> dict[str, Any]:
        # Half of one ability is lost with each edit that is held, the other ability stays.
        held = sum(len(adapter.edits()) for adapter in model.adapters.values())
        return {"code": {"accuracy": 0.8 / 2**held}, "reading": {"accuracy": 0.2}}

    monkeypatch.setattr(abilities, "examine_capabilities", examined)
    monkeypatch.setattr(abilities, "_CHECKPOINTS", (1, 2, 3))
    first = run("should-we-edit", edits=3, methods=("ft",), settings={"ft": FT})
    assert [(row["method"], row["edits"]) for row in first.rows] == [("unedited", 0), ("ft", 1), ("ft", 2), ("ft", 3)]
    assert [row["code"] for row in first.rows] == pytest.approx([0.8, 0.4, 0.2, 0.1])
    assert [row["kept"] for row in first.rows] == pytest.approx([1.0, 0.6, 0.4, 0.3])
    assert [row["mean_drop"] for row in first.rows] == pytest.approx([0.0, 0.25, 0.375, 0.4375])
    # From 1.0 at none to 0.6 at one edit: 0.9 after a quarter of an edit, which is none.
    assert first.numbers["survived_ft"] == 0
    assert "ft keeps 0.30 of them" in first.found
    assert first.published[0].values["MMLU"] == 0.4516
    no_more_edits()
    monkeypatch.setattr(abilities, "examine_capabilities", None)
    assert run("should-we-edit", edits=3, methods=("ft",), settings={"ft": FT}).rows == first.rows


def test_a_model_without_abilities_has_none_to_lose(
    run: Callable[..., StudyResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abilities, "examine_capabilities", lambda *_, **__: {"code": {"accuracy": 0.0}})
    with pytest.raises(ConfigError, match="none of atlas's capabilities"):
        run("should-we-edit")


# --- dual facets ----------------------------------------------------------------------------------------------------


def state(bits: str, **more: Any) -> dict[str, Any]:
    return {
        "right": dict.fromkeys(CAPABILITIES, bits),
        "shots": dict.fromkeys(("shots_0", "shots_1", "shots_4", "shots_4_shuffled"), bits),
        "recited": bits,
        "perplexity": {"prose": 2.0},
        "divergence": None,
        "fires": None,
        "layers": [],
        **more,
    }


def losing(model: EditableModel, adapter: Any, ask: Any, progress: Any) -> dict[str, Any]:
    """Each edit that is held costs one of four items of every capability, and moves a weight further."""
    held = 0 if adapter is None else len(adapter.edits())
    layers = [{"module": "layers.0.down", "similarity": 1 - held / 10}] if held else []
    bits = "0" * held + "1" * (4 - held)
    return state(bits, divergence=held / 10 if held else None, perplexity={"prose": 2.0 + held}, layers=layers)


def test_every_state_is_compared_with_the_unedited_model_item_by_item(
    run: Callable[..., StudyResult], no_more_edits: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facets, "examine", losing)
    monkeypatch.setattr(dual_facets, "_CHECKPOINTS", (1, 2, 3))
    settings = {"ft": FT, "ft@still": {**FT, "steps": 1}}
    first = run("dual-facets", edits=3, methods=("ft", "ft@still"), settings=settings)
    own = [row for row in first.rows if row["method"] in ("unedited", "ft")]
    assert [(row["method"], row["edits"]) for row in own] == [("unedited", 0), ("ft", 1), ("ft", 2), ("ft", 3)]
    assert [row["change"] for row in own] == [0.0, -0.25, -0.5, -0.75]
    assert [row["code"] for row in own] == [1.0, 0.75, 0.5, 0.25]
    assert own[0]["change_interval"] == [0.0, 0.0]
    assert "ft -0.75" in first.found
    (claims,) = first.tables
    told = {one["claim"]: one for one in claims.rows}
    lost = told["Methods that change weights lose capabilities within tens of edits"]
    assert lost["holds here"] == "yes"
    assert lost["measured"].startswith("ft from 1 edits, -0.75 (")
    assert told["Weights that have moved further have lost more"]["holds here"] == "yes"
    assert (
        "-1.00 (-1.00 to -1.00) over 6 edited models of 2 runs"
        in (told["Weights that have moved further have lost more"]["measured"])
    )
    assert told["So has what is read from the prompt (a recital)"]["holds here"] == "yes"
    assert not any("GRACE" in claim for claim in told)
    assert {Path(file).name for file in first.files.values()} >= {"report.html", "table.tex", "result.json"}
    page = Path(first.files["page"]).read_text(encoding="utf-8")
    assert page.count("<svg") == 3, "the panels, retention by age, the map of layers"
    assert "The capital of France … Berlin → Rome" in page
    no_more_edits()
    monkeypatch.setattr(facets, "examine", int)  # raises TypeError where it is called
    again = run("dual-facets", edits=3, methods=("ft", "ft@still"), settings=settings)
    assert again.rows == first.rows
    assert again.tables == first.tables


def test_mitigations_are_compared_with_the_run_without_them(
    run: Callable[..., StudyResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def examined(model: EditableModel, adapter: Any, ask: Any, progress: Any) -> dict[str, Any]:
        if adapter is None:
            return state("1111")
        moved = [{"module": "layers.1.down", "similarity": 0.9}]
        if adapter.editor == "memit":  # a batch of both edits spares one item of the two that single edits cost
            return state("0111" if adapter.editor_config["batch_size"] == 2 else "0011", divergence=0.1, layers=moved)
        deep = adapter.editor_config["layer"] > 0
        return state("0001" if deep else "0011", divergence=0.2, layers=moved)

    monkeypatch.setattr(facets, "examine", examined)
    tiny_hf_model("llama", seed=3).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    quick = {"steps": 1, "contexts": 0, "use_statistics": False}
    settings = {"rome@reference": {**quick, "layer": 0}, "memit": {"batch_size": 1, "steps": 1, "contexts": 0}}
    found = run(
        "dual-facets", methods=("rome@reference", "memit"), settings=settings, beside=(str(tmp_path / "other"),)
    )
    told = {(one["claim"], one["measured"].partition(" -")[0]): one for one in found.tables[0].rows}
    batches = told["Larger batches lose less", "memit, batches of 2"]
    assert batches["holds here"] == "yes"
    assert "difference +0.25" in batches["measured"]
    deep = {one["holds here"] for (claim, _), one in told.items() if claim.startswith("Editing deeper than layer 0")}
    assert deep == {"the other way round"}
    elsewhere = told["The larger other loses less", "memit on other"]
    assert elsewhere["holds here"] == "no difference to be seen"
    assert "unedited on other" in {row["method"] for row in found.rows}
    assert found.provenance["beside"].keys() == {str(tmp_path / "other")}
    assert found.provenance["settings"]["memit on other"]["batch_size"] == 1


def test_a_model_that_can_nothing_has_nothing_to_lose(
    run: Callable[..., StudyResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facets, "examine", lambda *_: state("000"))
    with pytest.raises(ConfigError, match="none of atlas's capabilities"):
        run("dual-facets", methods=("ft",), settings={"ft": FT})


def test_shuffled_examples_carry_each_others_answers() -> None:
    examples = [Item(f"q{number}?", f"a{number}", "") for number in (1, 2, 3)]
    code = Item(">>> print(1)\n", "1", "")
    asked = Item("q?", "a", "")
    assert facets._with_examples([asked], [examples], False) == ["q1? a1\nq2? a2\nq3? a3\nq?"]
    assert facets._with_examples([asked], [examples], True) == ["q1? a3\nq2? a1\nq3? a2\nq?"]
    assert facets._with_examples([asked], [[code]], False) == [">>> print(1)\n1\nq?"]


def test_a_state_counts_what_is_right(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facets, "_ITEMS", 4)
    monkeypatch.setattr(facets, "_FEW", 2)
    monkeypatch.setattr(facets, "held_out_texts", lambda count: ["Ann plays the flute"])
    asked: list[str] = []

    def generate(prompts: Any, **_: Any) -> list[str]:
        asked.extend(prompts)
        known = {item.prompt: item.answer for task in CAPABILITIES.values() for item in task.test}
        return [f" {known.get(prompt.removeprefix('code: '), '?')}\nmore" for prompt in prompts]

    monkeypatch.setattr(model, "generate", generate)
    found = facets.examine(model, None, lambda name, text: f"{name}: {text}" * (name == "code") or text, NO_PROGRESS)
    assert found["right"] == dict.fromkeys(CAPABILITIES, "1111")
    assert found["shots"]["shots_0"] == "1" * 6
    assert found["shots"]["shots_4_shuffled"] == "0" * 6
    assert found["recited"] == "0000"
    assert found["fires"] is None
    assert found["divergence"] is None
    assert any(prompt.startswith("code: ") for prompt in asked)
