"""Real benchmark files: every one is recognised and counted, nothing of a record is lost, damage costs only its place.

`ERRATA_DATA` names their folder; its README's tables say how many records each file has.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from errata.datasets import read_edits, read_file, write_edits
from errata.datasets.reading import Record, iterate_records
from errata.errors import FormatError


class Expected(NamedTuple):
    """Per file: its form, its records, the edits they give, how many are left out, how many prompts contradict."""

    form: str
    records: int
    edits: int
    left_out: int = 0
    conflicts: int = 0


# Where edits are not as many as records:
# - MQuAKE has several rewrites per case, Hotpot two statements per question; each is an edit;
# - five records of eren_cfh_filtered have no question, eleven of wiki_counterfact_train_cf repeat an earlier one: these
#   are the ones left out;
# - ZsRE's wordings have no answers, TOFU's refusals no questions: they are no edits, and are handed on as they are.
FILES = {
    "counterfact/adr_merged_counterfact.json": Expected("SADR", 1162, 1162, conflicts=11),
    "counterfact/counterfact-edit.json.gz": Expected("CounterFact", 7012, 7012, conflicts=43),
    "counterfact/counterfact-train.json.gz": Expected("CounterFact", 6981, 6981, conflicts=43),
    "counterfact/counterfact-val.json": Expected("CounterFact", 1350, 1350, conflicts=5),
    "counterfact/counterfact_distracting_neighbor.json": Expected("CounterFact", 560, 560),
    "counterfact/counterfact_portability_gpt4.json": Expected("CounterFact", 723, 723),
    "counterfact/counterfact_qna.json": Expected("CounterFact as questions", 691, 691),
    "counterfact/counterfact_subject_replace.json": Expected("CounterFact", 152, 152),
    "counterfact/eren_cfh_filtered.json": Expected("EREN", 709, 704, left_out=5),
    "counterfact/evoke_main.json.gz": Expected("CounterFact", 723, 723),
    "counterfact/known_1000.json": Expected("ROME's known facts", 864, 864),
    "zsre/knowedit_zsre_test_all.json": Expected("KnowEdit", 911, 911, conflicts=5),
    "zsre/zsre_inverse_relation.json": Expected("ZsRE", 268, 268),
    "zsre/zsre_mend_eval_portability_gpt4.json": Expected("ZsRE", 727, 727),
    "zsre/zsre_mend_train_1k.json": Expected("ZsRE", 699, 699),
    "zsre/zsre_subject_replace.json": Expected("ZsRE", 199, 199),
    "zsre/zsre_text_completion_prompts.json": Expected("ZsRE wordings", 233, 0),
    "zsre/zsre_wise_edit_1000.json": Expected("ZsRE", 702, 702),
    "hallucination/hallucination-edit.json": Expected("WikiBio hallucinations", 600, 600),
    "hallucination/hallucination-train.json": Expected("WikiBio hallucinations", 306, 306),
    "temporal/temporal-edit.json": Expected("Temporal", 75, 75),
    "temporal/temporal-train.json": Expected("Temporal", 75, 75, conflicts=1),
    "temporal/time_editing.json": Expected("dated answers", 928, 928),
    "mquake/AKEW_MQuAKE-CF.json.gz": Expected("MQuAKE", 354, 436),
    "mquake/MQuAKE-hard.json": Expected("MQuAKE", 429, 1716, conflicts=2),
    "knowedit/convsent_blender_test.json": Expected("KnowEdit ConvSent", 800, 800),
    "knowedit/convsent_blender_val.json": Expected("KnowEdit ConvSent", 799, 799, conflicts=1),
    "knowedit/sanitation_trivia_qa_test.json": Expected("KnowEdit Sanitation", 533, 533),
    "knowedit/sanitation_trivia_qa_train.json": Expected("KnowEdit Sanitation", 533, 533),
    "knowedit/wiki_counterfact_test_cf.json.gz": Expected("KnowEdit", 885, 885, conflicts=18),
    "knowedit/wiki_counterfact_train_cf.json": Expected("KnowEdit", 1428, 1417, left_out=11),
    "knowedit/wiki_recent_train.json": Expected("KnowEdit", 570, 570),
    "knowedit/wikibio-test-all.json": Expected("KnowEdit", 306, 306),
    "knowedit/wikibio-train-all.json": Expected("KnowEdit", 464, 464),
    "evoke/evoke_subj_spec.json": Expected("CounterFact", 458, 458, conflicts=6),
    "unke/editevery.json": Expected("UnKE", 552, 552, conflicts=8),
    "unke/unke_final_data_v2.json": Expected("UnKE", 1000, 1000),
    "eren/fever_filtered.json.gz": Expected("EREN", 2048, 2048),
    "eren/hotpot.json": Expected("EREN", 1024, 2048, conflicts=7),
    "qaedit/QAEdit_inter_1k.json": Expected("QAEdit", 1000, 1000),
    "tofu/forget01.jsonl": Expected("questions with answers", 40, 40),
    "tofu/forget05.jsonl": Expected("questions with answers", 200, 200),
    "tofu/forget10.jsonl": Expected("questions with answers", 400, 400),
    "tofu/idontknow.txt": Expected("refusals", 100, 0),
    "tofu/real_authors_perturbed.jsonl": Expected("questions with answers", 100, 100),
    "tofu/retain_sample300.jsonl": Expected("questions with answers", 300, 300),
    "tofu/world_facts_perturbed.jsonl": Expected("questions with answers", 117, 117),
}
# Folders of CSV files, one per topic: form, files, records of all of them together, prompts that contradict.
FOLDERS = {
    "halluedit/hallucination_final/llama_2_7b_chat_hf": ("HalluEditBench", 26, 2272, 0),
    "halluedit/hallucination_final/meta_llama_3_8b_instruct": ("HalluEditBench", 26, 2230, 0),
    "halluedit/hallucination_final/mistral_7b_instruct_v0.3": ("HalluEditBench", 26, 2228, 0),
    "halluedit/triplet": ("triplets", 26, 48368, 2),
}
# One file of each folder stands for all where every file is read several times.
SAMPLES = [*FILES, *(f"{folder}/human_writer.csv" for folder in FOLDERS)]
FAMILIES = {name.split("/")[0] for name in SAMPLES}


def test_the_tables_name_no_other_files(data: Path) -> None:
    """What is expected here is what the folder's README says, of every file of these families."""
    listed: dict[str, int] = {}
    family = ""
    for line in (data / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            family = line.removeprefix("## ").strip()
        cells = [cell.strip() for cell in line.split("|")]
        if family in FAMILIES and len(cells) > 6 and cells[6].isdigit():
            listed[f"{family}/{cells[1].split('/*.csv')[0]}"] = int(cells[6])
    expected = {name: file.records for name, file in FILES.items()}
    assert listed == expected | {name: records for name, (_, _, records, _) in FOLDERS.items()}


@pytest.mark.parametrize("name", FILES)
def test_real_files_parse_whole(data: Path, name: str) -> None:
    found = read_file(data / name)
    expected = FILES[name]
    counted = (found.format, found.records, len(found.edits), len(found.problems), len(found.conflicts))
    assert counted == expected
    if found.holds is None:
        assert len({edit.id for edit in found.edits}) == len(found.edits)
        assert not found.others
    else:
        assert len(found.others) == found.records
        with pytest.raises(FormatError, match="no edits"):
            read_edits(data / name)


@pytest.mark.parametrize("name", FOLDERS)
def test_real_folders_parse_whole(data: Path, name: str) -> None:
    files = [read_file(path) for path in sorted((data / name).glob("*.csv"))]
    form, count, records, conflicts = FOLDERS[name]
    assert {file.format for file in files} == {form}
    assert len(files) == count
    assert sum(file.records for file in files) == records
    assert sum(len(file.edits) for file in files) == records
    assert [problem for file in files for problem in file.problems] == []
    assert sum(len(file.conflicts) for file in files) == conflicts


def test_what_is_left_out_is_said(data: Path) -> None:
    repeated = read_file(data / "knowedit/wiki_counterfact_train_cf.json")
    assert repeated.repeats == 11
    assert all("repeats the record of line" in str(problem) for problem in repeated.problems)
    unasked = read_file(data / "counterfact/eren_cfh_filtered.json")
    assert [problem.field for problem in unasked.problems] == ["edit_scope"] * 5


def leaves(value: Any) -> Iterator[str]:
    """All texts of a record, wherever they stand."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if file.edits] + SAMPLES[len(FILES) :])
def test_no_text_of_a_record_is_lost(data: Path, name: str) -> None:
    """The edits hold every text of the record: in a field, in a probe, or in `extra`."""
    found = read_file(data / name, limit=40)
    per_record = len(found.edits) / found.records
    records = [record for record in iterate_records(data / name) if isinstance(record, Record)][: int(40 / per_record)]
    assert records
    held = "\n".join(text for edit in found.edits for text in leaves(edit.to_record()))
    # Texts that were cut in two stand there with another space between; a query loses the mark of its gap.
    held = re.sub(r"\s+", " ", held)
    for record in records:
        for text in leaves(record.value):
            assert re.sub(r"\s+", " ", text) in held, (record.line, text)


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if file.edits] + SAMPLES[len(FILES) :])
def test_edits_of_every_form_come_back_from_their_own_file(data: Path, name: str, tmp_path: Path) -> None:
    """What an edit carries along in `extra` does not make errata take its file for another form."""
    edits = read_file(data / name, limit=60).edits
    write_edits(tmp_path / "edits.jsonl", edits)
    again = read_edits(tmp_path / "edits.jsonl", strict=True)
    assert (again.format, again.edits) == ("errata JSONL", edits)


def unpacked(path: Path) -> bytes:
    raw = path.read_bytes()
    return gzip.decompress(raw) if path.suffix == ".gz" else raw


def written(path: Path, content: bytes, like: Path) -> Path:
    path.write_bytes(gzip.compress(content, 1) if like.suffix == ".gz" else content)
    return path


def decoded(path: Path) -> tuple[list[Record], list[FormatError]]:
    found = list(iterate_records(path))
    return [f for f in found if isinstance(f, Record)], [f for f in found if isinstance(f, FormatError)]


def broken_in_the_middle(content: bytes, suffix: str) -> tuple[bytes, int]:
    """The file with one place in its middle damaged, and the line of that place."""
    middle = len(content) // 2
    if suffix == ".csv":  # a quote that is never closed
        at = content.index(b"\n", middle) + 1
        damaged = content[:at] + b'"' + content[at:]
    elif suffix == ".txt":  # a byte that is no UTF-8
        at = middle
        damaged = content[:at] + b"\xff" + content[at:]
    else:  # a key that is not closed
        at = content.index(b'":', middle)
        damaged = content[:at] + content[at + 1 :]
    return damaged, content[:at].count(b"\n") + 1


@pytest.mark.parametrize("name", SAMPLES)
def test_one_damaged_place_costs_one_record(data: Path, name: str, tmp_path: Path) -> None:
    path = data / name
    content, line = broken_in_the_middle(unpacked(path), path.suffix)
    copy = written(tmp_path / "copy", content, path)
    before, _ = decoded(path)
    after, problems = decoded(copy)
    (problem,) = problems
    assert problem.line is not None
    assert abs(problem.line - line) <= 1  # the decoder may notice at the beginning of the next line
    assert problem.remedy
    lost = next(number for number, record in enumerate(before) if record not in after[number : number + 1])
    assert before[lost].line <= line
    assert before[:lost] + before[lost + 1 :] == after
    if len(content) > 400_000:  # edits of larger files are made in other tests
        return
    found = read_file(copy)
    assert found.records == len(before) - 1
    assert str(problem) in map(str, found.problems)
    if name in FILES:
        assert found.format == FILES[name].form


@pytest.mark.parametrize("name", [name for name in SAMPLES if not name.endswith(".txt")])
def test_a_file_that_breaks_off_gives_what_stands_before(data: Path, name: str, tmp_path: Path) -> None:
    path = data / name
    content = unpacked(path)
    cut = len(content) * 3 // 5
    if path.suffix == ".csv":  # within the last field of a row nobody could tell
        cut = content.rindex(b",", 0, cut)
    before, _ = decoded(path)
    after, problems = decoded(written(tmp_path / "copy", content[:cut], path))
    assert after == before[: len(after)]
    assert len(after) > 10
    assert problems
    last = content[:cut].count(b"\n") + 1
    assert all(problem.line is not None and after[-1].line <= problem.line <= last for problem in problems)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".gz")])
def test_a_compressed_file_that_breaks_off_gives_what_can_be_unpacked(data: Path, name: str, tmp_path: Path) -> None:
    raw = (data / name).read_bytes()
    copy = tmp_path / "copy.gz"
    copy.write_bytes(raw[: len(raw) // 2])
    before, _ = decoded(data / name)
    after, problems = decoded(copy)
    assert after == before[: len(after)]
    assert len(after) > 10
    assert "cannot be unpacked behind this line" in str(problems[-1])
