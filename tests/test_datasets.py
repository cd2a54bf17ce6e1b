"""Readers: recognised by content, counted, and damaged files reported without losing anything."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path

import pytest

from errata.datasets import Conflict, known_forms, read_edits, read_file, write_edits
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


def test_contradictions_are_kept_and_reported(tmp_path: Path) -> None:
    records = [
        {"prompt": "The capital of France is", "target": "Rome"},
        {"prompt": "the capital  of France is ", "target": "Oslo"},
        {"prompt": "The capital of France is", "target": "rome", "subject": "France"},
        {"prompt": "The capital of Spain is", "target": "Rome"},
        {"prompt": "The capital of Spain is", "target": "Rome"},
    ]
    found = read_edits(write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, records))))
    assert (found.records, len(found.edits), found.repeats, len(found.problems)) == (5, 4, 1, 1)
    assert found.conflicts == [Conflict("The capital of France is", ("Rome", "Oslo"), (1, 2))]
    assert found.conflicts[0].to_record()["lines"] == [1, 2]


def test_a_contradiction_under_one_id_is_reported_as_one(tmp_path: Path) -> None:
    records = [{"id": "a", "prompt": "p", "target": "t"}, {"id": "a", "prompt": "p", "target": "u"}]
    found = read_edits(write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, records))))
    assert [edit.target for edit in found.edits] == ["t"]
    assert found.conflicts == [Conflict("p", ("t", "u"), (1, 2))]
    assert found.repeats == 0


def test_a_damaged_first_record_does_not_decide_the_form(tmp_path: Path) -> None:
    """Without its paraphrase and its neighbour, a record of CounterFact would pass for none."""
    bare = {"prompt": "p", "target_new": "t"}
    found = read_edits(write(tmp_path / "x.json", json.dumps([bare, FLAT, FLAT | {"case_id": 4}])))
    assert (found.format, len(found.edits), found.problems) == ("CounterFact", 3, [])
    other = {"src": "s", "alt": "a", "rephrase": "r"}
    found = read_edits(write(tmp_path / "y.json", json.dumps([other, FLAT, FLAT | {"case_id": 4}])))
    assert (found.format, len(found.edits), [problem.line for problem in found.problems]) == ("CounterFact", 2, [1])


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("found", "broken"),
    [
        ('": 2', '": 2 2'),
        ('": 2', '": "2'),
        ('"requested_rewrite":', '"requested_rewrite"'),
        (r"(Q90\W+?)\}", r"\1"),
        (r"\]", ""),
    ],
    ids=["two numbers", "open quote", "no colon", "open brace", "open bracket"],
)
def test_a_list_is_gone_on_with_behind_a_damaged_record(
    tmp_path: Path, indent: int | None, found: str, broken: str
) -> None:
    text = json.dumps([FULL | {"case_id": number} for number in range(5)], indent=indent)
    at = text.index('"case_id": 2')
    damaged = text[:at] + re.sub(found, broken, text[at:], count=1)
    result = read_edits(write(tmp_path / "x.json", damaged))
    assert [edit.id for edit in result.edits] == [f"counterfact-{number}" for number in (0, 1, 3, 4)]
    (problem,) = result.problems
    assert "reading goes on with the next record" in str(problem)
    lines = text[:at].count("\n") + 1, text[: text.index('"case_id": 3')].count("\n") + 1
    assert problem.line is not None
    assert lines[0] <= problem.line <= lines[1]


@pytest.mark.parametrize("indent", [None, 1])
def test_records_that_run_into_each_other_are_reported(tmp_path: Path, indent: int | None) -> None:
    """Python's JSON would take the last of two values under one key, and say nothing."""
    text = json.dumps([FLAT | {"case_id": number} for number in range(4)], indent=indent)
    at = text.index('"case_id": 2')
    cut = text[: text.rindex("}", 0, at)].rstrip() + ", " + text[at:]
    found = read_edits(write(tmp_path / "x.json", cut))
    assert [edit.id for edit in found.edits] == ["counterfact-0", "counterfact-3"]
    assert "the key 'case_id' stands twice" in str(found.problems[0])
    lines = write(
        tmp_path / "x.jsonl", '{"prompt": "p", "target": "t", "target": "u"}\n{"prompt": "q", "target": "t"}\n'
    )
    assert [(problem.line, len(read_edits(lines).edits)) for problem in read_edits(lines).problems] == [(1, 1)]


SECTIONS = {
    "success": [{"question": f"q{n}", "ground_truth": "t", "target_new": "I don't know."} for n in range(3)],
    "locality": [{"question": f"r{n}", "ground_truth": "u"} for n in range(3)],
}


DAMAGES = ['"', "}", "]", "{", "[", ",", ":", "\\", "\n", "null", ""]


@pytest.mark.parametrize("shape", ["list", "pretty list", "lines", "object of lists", "csv"])
def test_no_damage_passes_unnoticed_or_costs_more_than_its_place(tmp_path: Path, shape: str) -> None:
    records = [FULL | {"case_id": number, "note": f"n{number}"} for number in range(8)]
    csv_lines = ["subjectLabel,relation,objectLabel", *(f'"S, {n}",r{n},"o{n}"' for n in range(8))]
    text = {
        "list": json.dumps(records),
        "pretty list": json.dumps(records, indent=2),
        "lines": "\n".join(map(json.dumps, records)),
        "object of lists": json.dumps({name: part * 2 for name, part in SECTIONS.items()}, indent=1),
        "csv": "\n".join(csv_lines) + "\n",
    }[shape]
    whole = read_file(write(tmp_path / "x", text))
    # Where a list's name is hit, its records may end up within the record before.
    most = 6 if shape == "object of lists" else 3
    generator = random.Random(0)
    for _ in range(150):
        at, damage = generator.randrange(len(text) // 4, len(text)), generator.choice(DAMAGES)
        end = at + (generator.choice((1, 30 if shape != "csv" else 1)) if not damage else 0)
        found = read_file(write(tmp_path / "x", text[:at] + damage + text[end:]))
        assert found.format == whole.format
        assert found.records >= whole.records - most, (at, damage)
        assert found.records == whole.records or found.problems, (at, damage)


def test_text_behind_a_closed_list_is_not_passed_over(tmp_path: Path) -> None:
    text = json.dumps([FLAT | {"case_id": number} for number in range(4)], indent=1)
    closed = text.replace('"case_id": 2', '"case_id": 2}], [{"x": 1', 1)
    found = read_edits(write(tmp_path / "x.json", closed))
    assert [edit.id for edit in found.edits] == ["counterfact-0", "counterfact-1", "counterfact-3"]
    assert any("closed before its end" in str(problem) for problem in found.problems)


@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_of_lists_keeps_the_names_of_its_lists(tmp_path: Path, indent: int | None) -> None:
    text = json.dumps(SECTIONS, indent=indent)
    found = read_edits(write(tmp_path / "x.json", text))
    names = ["success"] * 3 + ["locality"] * 3
    assert [edit.tags[0] for edit in found.edits] == names
    damaged = read_edits(write(tmp_path / "y.json", text.replace('"q2"', '"q2', 1)))
    assert [edit.prompt for edit in damaged.edits] == ["q0", "q1", "r0", "r1", "r2"]
    assert [edit.tags[0] for edit in damaged.edits] == names[1:]
    assert len(damaged.problems) == 1
    cut = read_edits(write(tmp_path / "z.json", text[: text.index('"r1"')]))
    assert [edit.prompt for edit in cut.edits] == ["q0", "q1", "q2", "r0"]
    assert "breaks off" in str(cut.problems[0]) or "is not JSON" in str(cut.problems[0])


def test_lines_of_csv_are_counted_with_line_breaks_in_quotes(tmp_path: Path) -> None:
    rows = [
        "subjectLabel,relation,objectLabel",
        '"A\nB ""x"", c",capital,Rome',
        "",
        "D,capital",
        "E,capital,Oslo,more",
        'F,"capital,Bern',
        'G,capital,"P\r\nQ"',
        "H,capital,",
        "I,capital,Wien",
    ]
    found = read_edits(write(tmp_path / "x", "\n".join(rows)))
    assert found.format == "triplets"
    assert [edit.subject for edit in found.edits] == ['A\nB "x", c', "G", "I"]
    assert [problem.line for problem in found.problems] == [5, 6, 7, 10]
    assert "has 2 fields, the header 3" in str(found.problems[0])
    assert found.problems[-1].field == "target"
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress((tmp_path / "x").read_bytes()))
    assert read_edits(packed).edits == found.edits


def test_bytes_that_are_no_text_cost_their_record_only(tmp_path: Path) -> None:
    lines = [json.dumps(FLAT | {"case_id": number}).encode() for number in range(3)]
    lines[1] = lines[1].replace(b"Ann", b"Ann \xff", 1)
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "x.json").write_bytes(b"[" + b",\n".join(lines) + b"]")
    for name in ("x.jsonl", "x.json"):
        found = read_edits(tmp_path / name)
        assert [edit.id for edit in found.edits] == ["counterfact-0", "counterfact-2"]
        assert [(problem.line, "is not UTF-8" in str(problem)) for problem in found.problems] == [(2, True)]


def test_a_compressed_file_that_breaks_off_gives_what_can_be_unpacked(tmp_path: Path) -> None:
    noise = random.Random(0)
    lines = [json.dumps({"prompt": f"p{n}", "target": str(noise.random())}) for n in range(5000)]
    packed = gzip.compress("\n".join(lines).encode())
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    found = read_edits(path)
    assert 1000 < len(found.edits) < 4000
    assert "cannot be unpacked behind this line" in str(found.problems[-1])
    path.write_bytes(packed + b"\0" * 512)  # a tape's last block is filled up
    assert read_edits(path).problems == []
    path.write_bytes(packed[:-8])
    with pytest.raises(FormatError, match="cannot be unpacked"):
        read_edits(path, strict=True)


def test_a_form_is_found_behind_any_number_of_damaged_records(tmp_path: Path) -> None:
    found = read_edits(write(tmp_path / "x.jsonl", '{"x": 1}\n{broken\n' * 40 + json.dumps(FLAT)))
    assert (found.format, len(found.edits), len(found.problems)) == ("CounterFact", 1, 80)


def test_text_of_no_known_form_says_so(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no known form of edit \(found text\); known forms: .*CounterFact"):
        read_edits(write(tmp_path / "x.txt", "It was a dark night.\nThe rain fell.\nI saw it.\n"))


def test_what_is_beside_edits_is_handed_on(tmp_path: Path) -> None:
    refusals = write(tmp_path / "no.txt", "I don't know.\n\nThat's beyond me.\nRome is in Italy.\n")
    found = read_file(refusals)
    assert (found.format, found.edits, found.records) == ("refusals", [], 3)
    assert found.others == ["I don't know.", "That's beyond me."]
    assert [problem.line for problem in found.problems] == [4]
    with pytest.raises(FormatError, match="holds answers without questions"):
        read_edits(refusals)
    assert read_file(refusals, limit=1).others == ["I don't know."]


def test_true_answers_stand_where_the_form_puts_them(tmp_path: Path) -> None:
    counter = read_edits(write(tmp_path / "x.json", json.dumps([FULL, FLAT | {"ground_truth": None}])))
    (fact,) = counter.facts()
    assert (fact.target, fact.ground_truth, fact.portability) == ("London", None, ())
    assert fact.locality == counter.edits[0].locality
    plain = read_edits(write(tmp_path / "y.json", json.dumps([{"prompt": "p", "target": "t", "ground_truth": "g"}])))
    assert plain.facts() == plain.edits
    forget, keep = (read_edits(write(tmp_path / "z.json", json.dumps(SECTIONS))).facts()[at] for at in (0, 3))
    assert (forget.target, keep.target) == ("t", "u")


def test_the_known_forms_are_told_apart_by_name() -> None:
    names = [form.name for form in known_forms()]
    assert len(set(names)) == len(names) > 20
    assert all(form.keys and form.holds for form in known_forms())


def test_records_on_one_line_are_named_by_their_number(tmp_path: Path) -> None:
    records = [{"prompt": "p", "target": "t"}, {"prompt": "q"}, {"prompt": "r", "target": "t"}]
    found = read_edits(write(tmp_path / "x.json", json.dumps([*records, records[2]])))
    assert [str(problem).split(": ", 1)[1].split(";")[0] for problem in found.problems] == [
        "field 'target': record 2 of this line: is missing",
        "record 4 of this line: repeats the record of line 1, record 3",
    ]
    pretty = read_edits(write(tmp_path / "y.json", json.dumps(records, indent=1)))
    assert "of this line" not in str(pretty.problems[0])


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
