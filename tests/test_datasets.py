"""Readers: recognised by content, counted, and damaged files reported without losing anything."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from errata.datasets import read_edits, write_edits
from errata.edit import Edit
from errata.errors import FormatError

FLAT = {
    "case_id": 3,
    "prompt": "The mother tongue of Ann is",
    "target_new": "English",
    "subject": "Ann",
    "ground_truth": "French",
    "rephrase_prompt": "Ann speaks",
    "locality_prompt": "Bob speaks",
    "locality_ground_truth": "Dutch",
}
FULL = {
    "case_id": 9,
    "requested_rewrite": {
        "prompt": "{} {{comes}} from",
        "relation_id": "P19",
        "target_new": {"str": "Paris", "id": "Q90"},
        "target_true": {"str": "London", "id": "Q84"},
        "subject": "Ann {x}",
    },
    "paraphrase_prompts": ["Ann {x} is native to"],
    "neighborhood_prompts": ["Bob is from", "Eve is from"],
    "portability": {"Recalled Relation": "r", "New Question": "Where?", "New Answer": "France"},
}
ZSRE = {
    "subject": "X",
    "src": "When was X made?",
    "pred": "2011",
    "rephrase": "X was made when?",
    "alt": "2006",
    "answers": ["1998"],
    "loc": "nq question: who sang it",
    "loc_ans": "Eve",
    "cond": "c",
}

WIKIBIO = {
    "prompt": "This is a Wikipedia passage about ann x. Ann X (born 1969) is a singer.",
    "target_new": "She was the first from Michigan.",
    "subject": "ann x",
    "locality_prompt": "Looking for an antique map, historica",
    "locality_ground_truth": "l print or plan?",
}
TEMPORAL = {
    "prompt": "SpaceX is",
    "target_new": "a private company.",
    "subject": "SpaceX is",
    "ood_rephrase": "SpaceX, officially\nknown as Space Exploration.",
    "locality_prompt": "Fantasia Coverage",
    "locality_ground_truth": "",
}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_each_form_is_recognised_by_its_content(tmp_path: Path) -> None:
    forms = {
        "CounterFact": [FLAT, FULL],
        "ZsRE": [ZSRE],
        "errata JSONL": [{"prompt": "p", "target": "t"}],
        "WikiBio hallucinations": [WIKIBIO],
        "Temporal": [TEMPORAL],
    }
    for name, records in forms.items():
        for number, record in enumerate(records):
            other = record | {"case_id": 4, "subject": "Eve"}
            as_list = write(tmp_path / f"{number}.txt", json.dumps([record, other]))
            as_lines = write(tmp_path / f"{number}.data", f"{json.dumps(record)}\n\n{json.dumps(other)}\n")
            packed = tmp_path / f"{number}.anything"
            packed.write_bytes(gzip.compress(json.dumps([record]).encode()))
            assert [read_edits(p).format for p in (as_list, as_lines, packed)] == [name] * 3
            assert len(read_edits(as_lines).edits) == 2


def test_the_fields_of_counterfact_land_where_they_belong(tmp_path: Path) -> None:
    flat, full = (read_edits(write(tmp_path / "x.json", json.dumps([r]))).edits[0] for r in (FLAT, FULL))
    assert (flat.id, flat.target, flat.rephrases, flat.locality[0].answer) == (
        "counterfact-3",
        "English",
        ("Ann speaks",),
        "Dutch",
    )
    assert full.prompt == "Ann {x} {{comes}} from"
    assert (full.subject, full.target, full.ground_truth) == ("Ann {x}", "Paris", "London")
    assert [(p.prompt, p.answer) for p in full.locality] == [("Bob is from", "London"), ("Eve is from", "London")]
    assert (full.portability[0].prompt, full.portability[0].answer) == ("Where?", "France")


def test_the_fields_of_zsre_follow_the_protocol_of_wise(tmp_path: Path) -> None:
    edit = read_edits(write(tmp_path / "x.json", json.dumps([ZSRE]))).edits[0]
    assert (edit.prompt, edit.target, edit.ground_truth) == ("When was X made?", "2006", "1998")
    assert edit.locality[0].prompt == "nq question: who sang it"
    assert edit.extra["pred"] == "2011"


def test_the_fields_of_wises_long_texts_land_where_they_belong(tmp_path: Path) -> None:
    bio, temporal = (read_edits(write(tmp_path / "x.json", json.dumps([r]))).edits[0] for r in (WIKIBIO, TEMPORAL))
    assert (bio.prompt, bio.target, bio.subject) == (WIKIBIO["prompt"], WIKIBIO["target_new"], "ann x")
    assert (bio.locality[0].answer, bio.locality[0].kind, bio.rephrases) == ("l print or plan?", "unrelated", ())
    assert (temporal.prompt, temporal.target, temporal.locality[0].answer) == ("SpaceX is", "a private company.", None)
    (probe,) = temporal.portability
    assert (probe.prompt, probe.answer) == ("SpaceX, officially", "known as Space Exploration.")
    assert probe.kind == "out_of_distribution"
    short = write(tmp_path / "short.json", json.dumps([TEMPORAL | {"ood_rephrase": "SpaceX grows"}]))
    with pytest.raises(FormatError, match=r"ood_rephrase.*no more words than the prompt"):
        read_edits(short)


LINES = [
    '{"prompt": "a", "target": "b"}',
    '{"prompt": "a"}',
    "not json",
    "[1]",
    '{"prompt": "c", "target": "d", "extra key": 1}',
]


def test_bad_lines_are_left_out_with_line_field_and_remedy(tmp_path: Path) -> None:
    found = read_edits(write(tmp_path / "x.jsonl", "\n".join(LINES)))
    assert [edit.prompt for edit in found.edits] == ["a", "c"]
    assert [(problem.line, problem.field) for problem in found.problems] == [(2, "target"), (3, None), (4, None)]
    assert all(problem.remedy and str(tmp_path) in str(problem) for problem in found.problems)


def test_strict_stops_at_the_first_bad_line(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"x\.jsonl:2: field 'target'"):
        read_edits(write(tmp_path / "x.jsonl", "\n".join(LINES)), strict=True)


def test_a_list_that_breaks_off_gives_what_stands_before(tmp_path: Path) -> None:
    text = json.dumps([FLAT | {"case_id": number} for number in range(3)], indent=1)
    found = read_edits(write(tmp_path / "x.json", text[: text.rindex("case_id")]))
    assert len(found.edits) == 2
    assert len(found.problems) == 1
    assert found.problems[0].line is not None
    assert found.problems[0].line > 10


# A sound header, and a stream that is none.
BROKEN_GZIP = gzip.compress(b"x", mtime=0)[:10] + b"\xff" * 20


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"[]", "holds no edits"),
        (b'{"foo": 1}', r"found \['foo'\].*errata JSONL \(prompt, target\)"),
        (b'[{"question": 1}]', "no known form"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        (b"\x1f\x8bxx", "cannot be read"),
        (BROKEN_GZIP, "cannot be read"),
    ],
)
def test_files_that_hold_nothing_say_why(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=words):
        read_edits(path)


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        read_edits(tmp_path / "nothing.jsonl")


LINE_ENDS_OF_OTHERS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_line_breaks_outside_strings_end_a_line(tmp_path: Path, end: str) -> None:
    edits = [Edit(prompt=LINE_ENDS_OF_OTHERS, target="t"), Edit(prompt="q", target="u")]
    path = tmp_path / "x.jsonl"
    write_edits(path, edits)
    path.write_bytes(path.read_bytes().replace(b"\n", end.encode()) + b"broken" + end.encode())
    found = read_edits(path)
    assert found.edits == edits
    assert [problem.line for problem in found.problems] == [3]


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ('{"prompt": "p \\ud83d", "target": "t"}', "prompt"),
        ('{"prompt": "p", "target": "t", "note": ["\\uDE00"]}', "note"),
        ('"\\ud83d"', None),
        ("1" * 5000, None),
        ("[" * 100_000, None),
    ],
    ids=["prompt", "unknown key", "bare string", "endless number", "endless nesting"],
)
def test_a_line_that_no_file_or_tokenizer_can_hold_is_one_bad_line(
    tmp_path: Path, record: str, field: str | None
) -> None:
    good = ['{"prompt": "a", "target": "\\ud83d\\ude00"}', '{"prompt": "c", "target": "d"}']
    found = read_edits(write(tmp_path / "x.jsonl", "\n".join((good[0], record, good[1]))))
    assert [edit.target for edit in found.edits] == ["\U0001f600", "d"]
    assert [(problem.line, problem.field) for problem in found.problems] == [(2, field)]
    if record.startswith("{"):
        as_list = read_edits(write(tmp_path / "x.json", f"[{good[0]},\n{record},\n{good[1]}]"))
        assert [(p.line, p.field) for p in as_list.problems] == [(2, field)]
        assert len(as_list.edits) == 2


def test_every_edit_of_a_file_has_an_id_of_its_own(tmp_path: Path) -> None:
    records = [
        {"id": "a", "prompt": "p", "target": "t"},
        {"id": "a", "prompt": "p", "target": "u"},
        {"prompt": "q", "target": "t", "rephrases": ["r"]},
        {"prompt": "q", "target": "t", "rephrases": ["s"]},
        {"prompt": "q", "target": "t", "rephrases": ["r"]},
        {"prompt": "q", "target": "t", "rephrases": ["s"]},
        {"prompt": "q", "target": "t"},
        {"id": "a", "prompt": "p", "target": "t"},
    ]
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, records)))
    found = read_edits(path)
    derived = Edit(prompt="q", target="t").id
    assert [edit.id for edit in found.edits] == ["a", derived, f"{derived}-2", f"{derived}-3"]
    assert [edit.rephrases for edit in found.edits] == [(), ("r",), ("s",), ()]
    assert [(problem.line, problem.field) for problem in found.problems] == [(2, "id"), (5, None), (6, None), (8, None)]
    assert "names another edit, that of line 1; give each edit its own id" in str(found.problems[0])
    assert "repeats the record of line 3" in str(found.problems[1])
    with pytest.raises(FormatError, match=r"x\.jsonl:2: field 'id'"):
        read_edits(path, strict=True)
    write_edits(tmp_path / "again.jsonl", found.edits)
    assert read_edits(tmp_path / "again.jsonl", strict=True).edits == found.edits


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    edits = [Edit(prompt="p", target="t"), Edit(prompt="q", target="ü", rephrases=("r",))]
    assert write_edits(path, edits) == 2
    assert read_edits(path).edits == edits

    def breaks() -> object:
        yield edits[0]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_edits(path, breaks())  # type: ignore[arg-type]
    assert read_edits(path).edits == edits


@pytest.mark.parametrize(
    ("name", "form", "count"),
    [
        ("counterfact/counterfact-edit.json.gz", "CounterFact", 7012),
        ("counterfact/counterfact-val.json", "CounterFact", 1350),
        ("counterfact/counterfact_portability_gpt4.json", "CounterFact", 723),
        ("counterfact/evoke_main.json.gz", "CounterFact", 723),
        ("hallucination/hallucination-edit.json", "WikiBio hallucinations", 600),
        ("hallucination/hallucination-train.json", "WikiBio hallucinations", 306),
        ("temporal/temporal-edit.json", "Temporal", 75),
        ("zsre/zsre_mend_eval_portability_gpt4.json", "ZsRE", 727),
        ("zsre/zsre_mend_train_1k.json", "ZsRE", 699),
        ("zsre/zsre_wise_edit_1000.json", "ZsRE", 702),
    ],
)
def test_real_files_parse_whole(data: Path, name: str, form: str, count: int) -> None:
    found = read_edits(data / name)
    assert (found.format, len(found.edits), found.problems) == (form, count, [])
