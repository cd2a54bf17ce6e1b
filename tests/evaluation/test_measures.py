"""What stands beside the four properties: F1, grouped probes, drift and collapse of runs. Worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from errata.datasets import read_edits
from errata.edit import Edit, Probe
from errata.evaluation import Comparison, Examination, Result
from errata.evaluation.metrics import token_f1
from errata.evaluation.protocol import AskedEdit
from errata.testing import tiny_model


def probes(*names: tuple[str, str | None, str | None]) -> tuple[Probe, ...]:
    return tuple(
        Probe(prompt=f"question {number}", answer="x", kind=kind, group=group, aliases=())
        for number, (_, kind, group) in enumerate(names)
    )


def asked(portability: tuple[Probe, ...], *exact: float) -> AskedEdit:
    edit = Edit(prompt="p", target="t", portability=portability)
    # contains is right everywhere, teacher-forced 0.5 where exact is right, F1 a quarter of exact
    return AskedEdit(edit, [(1, 1, 1, 1)], [], [], [(e, 1.0, e / 2, e / 4) for e in exact], {})


def test_any_wording_and_the_mean_over_wordings() -> None:
    three = [("", "multi_hop", "a")] * 3
    result = Result(
        [
            asked(probes(*three), 0.0, 1.0, 0.0),
            asked(probes(*three), 0.0, 0.0, 0.0),
            asked(probes(*three, ("", "one_hop", None)), 1.0, 1.0, 0.0, 1.0),
            asked(probes(("", "one_hop", None)), 0.0),
            asked(()),
        ]
    )
    record = result.to_record()
    kinds, any_of = record["portability_by_kind"], record["portability_any_of"]
    assert kinds.keys() == {"multi_hop", "one_hop"}
    assert kinds["multi_hop"]["generated"] == pytest.approx((1 / 3 + 0 + 2 / 3) / 3, abs=1e-6)
    assert (kinds["one_hop"]["generated"], kinds["one_hop"]["edits"]) == (0.5, 2)
    assert any_of.keys() == {"multi_hop"}
    best = any_of["multi_hop"]
    assert (best["generated"], best["contains"], best["edits"]) == (pytest.approx(2 / 3, abs=1e-6), 1.0, 3)
    assert (best["teacher_forced"], best["f1"]) == (pytest.approx(1 / 3, abs=1e-6), pytest.approx(1 / 6, abs=1e-6))
    assert best["wilson_interval"] is not None, "a case is answered or not"
    assert kinds["multi_hop"]["wilson_interval"] is None
    # Over all portability prompts: per edit first, without any-of.
    assert record["portability"]["generated"] == pytest.approx((1 / 3 + 0 + 3 / 4 + 0) / 4, abs=1e-6)


def test_a_probe_alone_in_its_group_and_two_questions_of_one_edit() -> None:
    alone = asked(probes(("", "multi_hop", "a")), 1.0)
    assert Result([alone]).any_of("portability") == {}
    pairs = probes(("", "hop", "a"), ("", "hop", "a"), ("", "hop", "b"), ("", "hop", "b"))
    (found,) = Result([asked(pairs, 0.0, 1.0, 0.0, 0.0)]).any_of("portability").values()
    assert found.generated.value == 0.5, "of two questions one is answered"


def test_wordings_of_a_multi_hop_question_are_grouped(data: Path) -> None:
    edits = read_edits(data / "mquake" / "MQuAKE-hard.json", limit=20).edits
    groups = [[probe for probe in edit.portability if probe.group] for edit in edits]
    assert {len(own) for own in groups} == {0, 3}
    assert all(probe.kind == "multi_hop" for own in groups for probe in own)
    asking = Examination(tiny_model("llama"), edits[:6], max_new_tokens=2)
    record = asking.ask_unedited().to_record()
    assert record["portability_any_of"]["multi_hop"]["edits"] == sum(bool(own) for own in groups[:6])


def test_f1_of_answers_and_of_what_stayed() -> None:
    model = tiny_model("llama")
    (said,) = model.generate(["Ann plays the"], max_new_tokens=6)
    edit = Edit(
        prompt="Ann plays the", target=f"{said} nothing", aliases=("elsewhere",), locality=(Probe(prompt="Bob"),)
    )
    exam = Examination(model, [edit], max_new_tokens=6)
    (found,) = exam.ask_unedited().asked
    assert found.reliability[0][3] == token_f1(said, f"{said} nothing") > 0
    assert found.reliability[0][0] == 0.0
    assert found.locality == [(1.0, 1.0, 1.0, 1.0)]
    assert exam.ask().to_record()["reliability"]["f1"] == pytest.approx(found.reliability[0][3], abs=1e-6)


def row(method: str, edits: int, locality: float | None, perplexity: float | None) -> dict[str, Any]:
    return {"method": method, "edits": edits, "locality": {"generated": locality}, "perplexity": perplexity}


def test_drift_and_collapse_are_read_off_the_rows(tmp_path: Path) -> None:
    edits = [Edit(prompt=f"p{n}", target="t") for n in range(3)]

    def comparison(**more: Any) -> Comparison:
        return Comparison(tiny_model("llama"), ["ft", "rome", "memoir"], edits, [1, 3], tmp_path, **more)

    rows = [
        row("unedited", 1, 1.0, 2.0),
        row("unedited", 3, 1.0, 2.0),
        row("ft", 1, 1.0, 2.0),
        row("ft", 3, 0.9, 21.0),
        row("rome", 1, 0.5, None),
        row("memoir", 1, None, 20.0),
        row("memoir", 3, None, 20.0),
        row("no-op (ft)", 3, 0.0, 99.0),
    ]
    assert comparison().drifts(rows) == {"ft": pytest.approx(5.0)}
    found = comparison(texts=["x"])
    assert found.collapses(rows) == {"ft": 3, "rome": 1, "memoir": None}
    assert comparison().collapses(rows) == {}, "without text nothing is known of perplexity"
    assert found.collapses([row("unedited", 1, 1.0, None), *rows[2:]]) == {}
    assert found.collapses(rows[:4]) == {"ft": 3}
    called = {"guard": {"ok": 1, "collapse": 2}, "guard_perplexity": {"ok": 2.0, "collapse": 3.0}}
    silent: dict[str, Any] = {"guard": {"ok": 1}, "guard_perplexity": {}}
    guarded = [*rows[:2], rows[2] | silent, rows[3] | called, rows[4] | called | {"guard_perplexity": {}}]
    assert found.guard_calls(guarded) == {
        "ft": {"edits": 2, "perplexity": 1.5},
        "rome": {"edits": 2, "perplexity": None},
    }


def in_case(case: int | None, exact: float, hops: tuple[float, ...] = (), edited: int = 1, **more: Any) -> AskedEdit:
    """An edit of a case; with hops, its last one, of whose chain the first hops are edited."""
    chain = [{"question": f"hop {number}", "answer": "x", "answer_alias": []} for number in range(len(hops))]
    stays = tuple(Probe(prompt=hop["question"], answer="x", kind="single_hop") for hop in chain[edited:])
    extra = {"case_id": case} | ({"new_single_hops": chain} if hops else {}) | more
    edit = Edit(prompt="p", target="t", locality=stays, extra=extra)
    marks = [(hop, 1.0, hop / 2, hop / 4) for hop in hops]
    return AskedEdit(edit, [(exact, 1.0, exact / 2, 0.0)], [], [(1, 1, 1, 1)] * len(stays), [], {}, marks)


def test_a_case_is_as_good_as_its_worst_hop_and_its_worst_edit() -> None:
    result = Result(
        [
            in_case(1, 1.0),
            in_case(1, 1.0, (1.0, 1.0, 0.0), edited=2),  # every edit, not every hop
            in_case(2, 0.0),
            in_case(2, 1.0, (1.0, 1.0), edited=2),  # every hop, not every edit
            in_case(3, 1.0, (1.0, 1.0)),  # one edit, and all is right
            in_case(4, 0.0, (0.0,)),
        ]
    )
    record = result.to_record()["cases"]
    hops, edits = record["hop_wise"], record["instance_wise"]
    assert (hops["generated"], hops["contains"], hops["edits"]) == (0.5, 1.0, 4)
    assert (hops["teacher_forced"], hops["f1"]) == (0.25, 0.125)
    assert (edits["generated"], edits["contains"], edits["teacher_forced"], edits["edits"]) == (0.5, 1.0, 0.25, 4)
    assert edits["wilson_interval"] is not None, "a case is right or wrong"


def test_a_case_counts_only_where_all_of_it_was_asked() -> None:
    assert Result([asked(()), in_case(1, 1.0), in_case(1, 1.0)]).to_record()["cases"] == {}, "no chain"
    # An edit of the case is missing: its edits cannot all be right, its hops may.
    (name,) = Result([in_case(1, 1.0, (1.0, 1.0), edited=2)]).cases()
    assert name == "hop_wise"
    # Edits without the number of their case cannot be put together.
    assert Result([in_case(None, 1.0), in_case(None, 1.0, (1.0, 1.0), edited=2)]).cases().keys() == {"hop_wise"}
    assert Result([in_case(None, 1.0, (1.0,), edited=0)]).cases().keys() == {"hop_wise"}
    # A hop was not asked.
    unasked = in_case(1, 1.0, (1.0,))
    unasked.hops.clear()
    assert Result([unasked]).cases().keys() == {"instance_wise"}
    # The same number in a file that is read again begins a new case.
    assert Result([in_case(1, 1.0, (1.0,)), in_case(1, 0.0, (1.0,))]).cases()["instance_wise"].generated.value == 0.5
    damaged = in_case(1, 1.0, (1.0,), new_single_hops=[{"question": "hop 0"}])
    assert Result([damaged]).cases() == {}


def test_hops_are_asked_as_questions_and_right_by_any_of_their_names() -> None:
    model = tiny_model("llama")
    (edited, other) = model.generate(["Where is Ann from?", "Who rules Paris?"], max_new_tokens=4)
    hops = [
        {"question": "Where is Ann from?", "answer": "Rome", "answer_alias": [edited]},
        {"question": "Who rules Paris?", "answer": other, "answer_alias": []},
    ]

    def examined(*chain: dict[str, Any]) -> list[Any]:
        edit = Edit(
            prompt="Ann is from",
            target="Rome",
            rephrases=("Where is Ann from?",),
            locality=(Probe(prompt="Who rules Paris?", answer=other, kind="single_hop"),),
            extra={"case_id": 1, "new_single_hops": list(chain)},
        )
        (found,) = Examination(model, [edit], max_new_tokens=4).ask_unedited().asked
        return found.hops

    assert [marks[0] for marks in examined(*hops)] == [1.0, 1.0]
    assert [marks[0] for marks in examined(hops[0] | {"answer_alias": []}, hops[1])] == [0.0, 1.0]
    assert examined(*hops, {"question": "Never asked?", "answer": "x"}) == []


def test_real_cases_carry_their_hops(data: Path) -> None:
    edits = read_edits(data / "mquake" / "AKEW_MQuAKE-CF.json.gz", limit=12).edits
    record = Examination(tiny_model("llama"), edits, max_new_tokens=2).ask_unedited().to_record()["cases"]
    cases = sum(bool(edit.portability) for edit in edits)
    assert 0 < cases < len(edits)
    assert (record["hop_wise"]["edits"], record["instance_wise"]["edits"]) == (cases, cases)
