"""One small record of each form, and the edit that comes of it, field by field."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from errata.datasets import known_forms, read_edits, read_file
from errata.datasets.tofu import TruthQuestion, truth_question
from errata.edit import Edit, Probe
from errata.errors import FormatError


def edits_of(tmp_path: Path, record: Any, form: str) -> list[Edit]:
    """The edits of one record, which has to be recognised as this form."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    found = read_edits(path, strict=True)
    assert found.format == form
    assert form in {known.name for known in known_forms()}
    assert found.records == 1
    return found.edits


def problem_of(tmp_path: Path, record: Any) -> FormatError:
    """What is wrong with one record."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    with pytest.raises(FormatError) as caught:
        read_edits(path)
    return caught.value


def csv_edits(tmp_path: Path, row: dict[str, str]) -> list[Edit]:
    path = tmp_path / "x.data"
    with open(path, "w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(row))
        writer.writeheader()
        writer.writerow(row)
    return read_edits(path, strict=True).edits


def asked(probes: tuple[Probe, ...]) -> list[tuple[str | None, str, str | None]]:
    return [(probe.kind, probe.prompt, probe.answer) for probe in probes]


ROME = {
    "case_id": 9,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "{} is from",
        "relation_id": "P19",
        "target_new": {"str": "Paris", "id": "Q90"},
        "target_true": {"str": "London", "id": "Q84"},
        "subject": "Ann",
    },
    "paraphrase_prompts": ["Ann was born in"],
    "neighborhood_prompts": ["Bob is from"],
    "attribute_prompts": ["Zoe is from"],
}


def test_counterfact_with_the_fields_of_files_built_on_it(tmp_path: Path) -> None:
    record = ROME | {
        "portability": {"New Question": "Where?", "New Answer": "France", "Original Answer": "England"},
        "distracting_neighborhood_prompts": ["Ann is from Paris. Bob is from"],
        "prefix_distraction": ["Ann is from Paris. Eve is from"],
        "unrelated_relation": {"relation_id": "job", "object": "singer", "question": "What is Ann?"},
        "alternative_subject": "Annie",
        "relation_specificity": {"prompt": "Ann plays", "answer": {"value": "flute", "aliases": ["the flute"]}},
    }
    (edit,) = edits_of(tmp_path, record, "CounterFact")
    assert (edit.id, edit.prompt, edit.target) == ("counterfact-9", "Ann is from", "Paris")
    assert (edit.subject, edit.ground_truth, edit.rephrases) == ("Ann", "London", ("Ann was born in",))
    assert asked(edit.locality) == [
        ("same_relation", "Bob is from", "London"),
        ("distracting", "Ann is from Paris. Bob is from", "London"),
        ("distracting", "Ann is from Paris. Eve is from", "London"),
        ("same_subject", "What is Ann?", "singer"),
        ("relation_specificity", "Ann plays", "flute"),
    ]
    assert asked(edit.portability) == [("one_hop", "Where?", "France"), ("subject_alias", "Annie is from", "Paris")]
    assert edit.portability[0].model_extra == {"original_answer": "England"}
    assert edit.locality[3].model_extra == {"relation": "job"}
    assert edit.locality[4].aliases == ("the flute",)
    assert edit.extra["requested_rewrite"]["relation_id"] == "P19"
    assert (edit.extra["attribute_prompts"], edit.extra["pararel_idx"]) == (["Zoe is from"], 1)
    assert edit.source == "CounterFact"


def test_counterfact_as_questions(tmp_path: Path) -> None:
    record = {"case_index": 4, "question": "Ann is from", "subject": "Ann", "answer": "Paris", "qna_question": "Where?"}
    (edit,) = edits_of(tmp_path, record, "CounterFact as questions")
    assert (edit.prompt, edit.target, edit.subject, edit.rephrases) == ("Ann is from", "Paris", "Ann", ("Where?",))
    assert edit.extra == {"case_index": 4}


def test_romes_known_facts(tmp_path: Path) -> None:
    record = {
        "known_id": 3,
        "subject": "Ann",
        "attribute": "Paris",
        "template": "{} is from",
        "prediction": " Paris, and",
        "prompt": "Ann is from",
        "relation_id": "P19",
    }
    (edit,) = edits_of(tmp_path, record, "ROME's known facts")
    assert (edit.id, edit.prompt, edit.target, edit.subject) == ("known-3", "Ann is from", "Paris", "Ann")
    assert edit.extra == {"template": "{} is from", "prediction": " Paris, and", "relation_id": "P19"}


def test_sadr(tmp_path: Path) -> None:
    rewrite = {"prompt": "Ann is from", "target_new": "Paris", "target_true": "London", "subject": "Ann"}
    record = {
        "requested_rewrite": rewrite,
        "rewrite": {"prompts": ["Ann is from"], "targets": ["Paris"]},
        "p-paraphrase": {"prompts": ["Ann was born in"], "targets": ["Paris"]},
        "p-reasoning": {"prompts": ["Ann's country is"], "targets": ["France"]},
        "p-subject_alias": {"prompts": ["Annie is from"], "targets": ["Paris"]},
        "l-neighbor": {"prompts": ["Bob is from"], "targets": ["London"]},
        "l-relation": {"prompts": ["Ann plays"], "targets": ["flute"]},
        "o-commonsense": {"prompts": "To boil an egg,", "right": "heat water.", "wrong": "heat ice."},
        "generation": {"prompts": ["Ann is"]},
    }
    (edit,) = edits_of(tmp_path, record, "SADR")
    assert (edit.prompt, edit.target, edit.ground_truth, edit.subject) == ("Ann is from", "Paris", "London", "Ann")
    assert edit.rephrases == ("Ann was born in",)
    assert asked(edit.locality) == [
        ("same_relation", "Bob is from", "London"),
        ("relation_specificity", "Ann plays", "flute"),
        ("common_sense", "To boil an egg,", "heat water."),
    ]
    assert edit.locality[2].model_extra == {"wrong": "heat ice."}
    assert asked(edit.portability) == [
        ("reasoning", "Ann's country is", "France"),
        ("subject_alias", "Annie is from", "Paris"),
    ]
    assert set(edit.extra) == {"requested_rewrite", "rewrite", "generation"}
    uneven = problem_of(tmp_path, record | {"p-reasoning": {"prompts": ["a", "b"], "targets": ["c"]}})
    assert (uneven.field, uneven.line) == ("p-reasoning.targets", 1)
    assert "has 1 entries" in str(uneven)


ZSRE = {
    "subject": "Ann",
    "src": "Who is Ann's sister?",
    "pred": "Zoe",
    "rephrase": "Ann's sister is who?",
    "alt": "Eve",
    "answers": ["Bea", "Bee"],
    "loc": "nq question: who sang",
    "loc_ans": "Bob",
    "cond": "Zoe >> Eve",
}


def test_zsre_with_the_fields_of_files_built_on_it(tmp_path: Path) -> None:
    record = ZSRE | {
        "portability": {"Recalled Relation": "r", "New Question": "Where?", "New Answer": "Rome"},
        "inverse question": "Whose sister is Eve?",
        "alternative_subject": "Annie",
        "alter_subject_question": "Who is Annie's sister?",
        "loc_prompt": "nq question: who plays",
    }
    (edit,) = edits_of(tmp_path, record, "ZsRE")
    assert (edit.prompt, edit.target, edit.subject, edit.ground_truth) == (record["src"], "Eve", "Ann", "Bea")
    assert edit.rephrases == ("Ann's sister is who?",)
    assert asked(edit.locality) == [("unrelated", "nq question: who sang", "Bob")]
    assert asked(edit.portability) == [
        ("one_hop", "Where?", "Rome"),
        ("inverse", "Whose sister is Eve?", "Ann"),
        ("subject_alias", "Who is Annie's sister?", "Eve"),
    ]
    kept = {key: record[key] for key in ("pred", "answers", "cond", "alternative_subject", "loc_prompt")}
    assert edit.extra == kept


def test_wordings_of_zsre_are_no_edits(tmp_path: Path) -> None:
    record = {"case_index": 1, "question": "Who is Ann's sister?", "text_completion_prompt": "Ann's sister is"}
    path = tmp_path / "x.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    found = read_file(path)
    assert (found.format, found.edits, found.others) == ("ZsRE wordings", [], [record])
    with pytest.raises(FormatError, match="holds other wordings of questions"):
        read_edits(path)


def test_dated_answers(tmp_path: Path) -> None:
    def entry(date: str, name: str) -> dict[str, Any]:
        return {"query": "Ann plays for _X_.", "answer": [{"name": name}], "date": date, "id": f"Q1_{date}"}

    record = [entry("2012", "Rome"), entry("2019", "Oslo"), entry("2020", "Bern")]
    (edit,) = edits_of(tmp_path, record, "dated answers")
    assert (edit.id, edit.prompt, edit.target, edit.ground_truth) == ("Q1_2020", "Ann plays for", "Bern", "Oslo")
    assert edit.extra == {"dated": record}
    wrong = problem_of(tmp_path, [entry("2012", "Rome") | {"query": "_X_ is won by Ann."}])
    assert wrong.field == "0.query"
    assert problem_of(tmp_path, [entry("2012", "Rome"), {"query": "q _X_", "date": "2"}]).field == "1.answer"


KNOWEDIT = {
    "subject": "Ann",
    "prompt": "Ann is from",
    "target_new": "Paris",
    "ground_truth": ["London", "Londinium"],
    "rephrase_prompt": "Ann was born in",
    "cond": "c",
    "locality": {
        "Relation_Specificity": [{"prompt": "Ann plays", "ground_truth": [["flute", "flutes"], ["oboe"]]}],
        "Forgetfulness": [{"prompt": "Ann, who is not from Paris, is from", "ground_truth": [[]]}],
    },
    "portability": {
        "Reasoning": [
            {"prompt": "Ann's country is", "ground_truth": "France"},
            {"prompt": "Ann's king is", "ground_truth": [[]]},
        ],
        "Subject_Aliasing": [{"prompt": "Annie is from", "ground_truth": ["Paris"]}],
        "Logical_Generalization": [],
    },
}


def test_knowedit(tmp_path: Path) -> None:
    (edit,) = edits_of(tmp_path, KNOWEDIT, "KnowEdit")
    assert (edit.prompt, edit.target, edit.ground_truth, edit.subject) == ("Ann is from", "Paris", "London", "Ann")
    assert edit.rephrases == ("Ann was born in",)
    assert asked(edit.locality) == [
        ("relation_specificity", "Ann plays", "flute"),
        ("forgetfulness", "Ann, who is not from Paris, is from", None),
    ]
    assert edit.locality[0].aliases == (
        "flutes",
        "oboe",
    )
    assert asked(edit.portability) == [
        ("reasoning", "Ann's country is", "France"),
        ("subject_alias", "Annie is from", "Paris"),
    ]
    unanswered = [{"prompt": "Ann's king is", "answer": None, "kind": "reasoning"}]
    assert edit.extra == {"cond": "c", "answers": ["London", "Londinium"], "unanswered": unanswered}
    wrong = problem_of(tmp_path, KNOWEDIT | {"locality": {"Forgetfulness": [{"prompt": "p", "ground_truth": 3}]}})
    assert wrong.field == "locality.Forgetfulness.0.ground_truth"


def test_knowedits_wikibio(tmp_path: Path) -> None:
    record = {
        "text": "This is a Wikipedia passage about ann. Ann sings.",
        "labels": "She is from Rome.",
        "concept": "ann",
        "locality": {"Relation_Specificity": [{"prompt": "ann plays", "ground_truth": ["flute"]}]},
    }
    (edit,) = edits_of(tmp_path, record, "KnowEdit")
    assert (edit.prompt, edit.target, edit.subject) == (record["text"], "She is from Rome.", "ann")
    assert asked(edit.locality) == [("relation_specificity", "ann plays", "flute")]
    assert (edit.source, edit.extra) == ("KnowEdit WikiBio", {})


def test_knowedits_convsent(tmp_path: Path) -> None:
    record = {"ent": "Rome", "pos": [" ", " I love it. ", "Nice."], "neg": [" I hate it."]}
    (edit,) = edits_of(tmp_path, record, "KnowEdit ConvSent")
    assert (edit.prompt, edit.target) == ("What do you think of Rome?", "I love it.")
    assert (edit.ground_truth, edit.subject) == ("I hate it.", "Rome")
    assert edit.source == "KnowEdit ConvSent; prompt from a template"
    assert edit.extra == {"pos": record["pos"], "neg": record["neg"]}
    assert problem_of(tmp_path, {"ent": "Rome", "pos": [], "neg": ["x"]}).field == "pos"


def test_knowedits_sanitation(tmp_path: Path) -> None:
    record = {
        "K_F": [{"question": "q", "subject": "s", "ground_truth": "t", "target_new": "I don't know."}],
        "K_R": [{"question": "r", "ground_truth": "u", "target_new": "u"}, {"question": "v", "ground_truth": "w"}],
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    found = read_edits(path, strict=True)
    assert (found.format, found.records) == ("KnowEdit Sanitation", 3)
    forget, keep, other = found.edits
    assert (forget.prompt, forget.target, forget.ground_truth, forget.subject) == ("q", "I don't know.", "t", "s")
    assert (forget.tags, keep.tags, other.tags) == (("K_F",), ("K_R",), ("K_R",))
    assert [(edit.prompt, edit.target, edit.ground_truth) for edit in (keep, other)] == [
        ("r", "u", None),
        ("v", "w", None),
    ]


def rewrite(prompt: str, subject: str, new: str, true: str, question: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "relation_id": "P1",
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": true, "id": "Q2"},
        "subject": subject,
        "question": question,
    }


def test_mquake(tmp_path: Path) -> None:
    hops = [
        {"question": "Where is Ann from?", "cloze": "Ann is from", "answer": "Paris", "answer_alias": []},
        {"question": "Who rules Paris?", "cloze": "The ruler of Paris is", "answer": "Bob", "answer_alias": []},
        {"question": "What does Bob play?", "cloze": "Bob plays", "answer": "flute", "answer_alias": ["the flute"]},
    ]
    record = {
        "case_id": 7,
        "requested_rewrite": [
            rewrite("{} is from", "Ann", "Paris", "London", "Where is Ann from?"),
            rewrite("The ruler of {} is", "Paris", "Bob", "Eve", "Who rules Paris?"),
        ],
        "questions": ["What does the ruler of Ann's city play?", "And what?"],
        "answer": "oboe",
        "new_answer": "flute",
        "new_answer_alias": ["the flute"],
        "single_hops": [],
        "new_single_hops": hops,
        "orig": {"triples": []},
    }
    first, last = edits_of(tmp_path, record, "MQuAKE")
    assert (first.id, first.prompt, first.target, first.ground_truth) == (
        "mquake-7-1",
        "Ann is from",
        "Paris",
        "London",
    )
    assert (first.subject, first.rephrases) == ("Ann", ("Where is Ann from?",))
    assert (first.locality, first.portability) == ((), ())
    assert first.extra == {"case_id": 7, "requested_rewrite": record["requested_rewrite"][0]}
    assert (last.id, last.prompt, last.subject) == ("mquake-7-2", "The ruler of Paris is", "Paris")
    assert asked(last.portability) == [("multi_hop", question, "flute") for question in record["questions"]]
    assert last.portability[0].aliases == ("the flute",)
    assert asked(last.locality) == [("single_hop", "What does Bob play?", "flute")]
    assert (last.extra["answer"], last.extra["new_single_hops"]) == ("oboe", hops)
    one = problem_of(tmp_path, record | {"requested_rewrite": [record["requested_rewrite"][0] | {"prompt": "Ann is"}]})
    assert one.field == "requested_rewrite.0.prompt"
    assert problem_of(tmp_path, record | {"requested_rewrite": []}).field == "requested_rewrite"


def test_a_limit_cuts_a_case_before_its_questions(tmp_path: Path) -> None:
    case = {
        "requested_rewrite": [rewrite("{} is from", "Ann", "Paris", "London", f"Where {n}?") for n in range(3)],
        "questions": ["q"],
        "new_answer": "a",
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps([case]), encoding="utf-8")
    cut = read_edits(path, limit=2)
    assert [len(edit.portability) for edit in cut.edits] == [0, 0]
    assert [len(edit.portability) for edit in read_edits(path).edits] == [0, 0, 1]


def test_halluedit(tmp_path: Path) -> None:
    row = {
        "topic": "human_writer",
        "subject": "Ann",
        "relation": "birth place",
        "object": "Paris",
        "label": "Paris",
        "question": "Where is Ann from?",
        "output_some_model": "Oslo, Norway",
        "eval_some_model": "0.0",
        "multiple_choices": "['Paris', 'Oslo']",
        "paraphrased_question": "Ann was born where?",
        "multiple_choice_with_letters": "A. Paris  B. Oslo",
        "multiple_choice_labels": "A",
        "yes_question": "Is Ann from Paris?",
        "no_question": "Is Ann from Oslo?",
        "locality_question": "What does Ann play?",
        "reversed_relation_question": "Who is from Paris?",
        "question_2hop": "What country?",
        "answer_2hop": "France",
        "question_3hop": "Which king?",
        "answer_3hop": "none",
    }
    (edit,) = csv_edits(tmp_path, row)
    assert (edit.prompt, edit.target, edit.ground_truth) == (row["question"], "Paris", "Oslo, Norway")
    assert (edit.subject, edit.rephrases, edit.source) == ("Ann", ("Ann was born where?",), "HalluEditBench")
    assert asked(edit.locality) == [("same_subject", "What does Ann play?", None)]
    assert asked(edit.portability) == [
        ("yes_question", "Is Ann from Paris?", "Yes"),
        ("no_question", "Is Ann from Oslo?", "No"),
        ("inverse", "Who is from Paris?", "Ann"),
        ("multiple_choice", "Where is Ann from? A. Paris  B. Oslo", "A"),
        ("2_hop", "What country?", "France"),
        ("3_hop", "Which king?", "none"),
    ]
    kept = ("topic", "relation", "label", "eval_some_model", "multiple_choices")
    assert edit.extra == {key: row[key] for key in kept} | {"answered_by": "some_model"}


def test_triplets(tmp_path: Path) -> None:
    (edit,) = csv_edits(tmp_path, {"subjectLabel": "France", "relation": "capital", "objectLabel": "Paris"})
    assert (edit.prompt, edit.target, edit.subject) == ("The capital of France is", "Paris", "France")
    assert (edit.source, edit.extra) == ("triplets; prompt from a template", {"relation": "capital"})


def test_qaedit(tmp_path: Path) -> None:
    record = {
        "id": 4,
        "source": "NQ",
        "prompt": "who sang it",
        "target": "Ann",
        "subject": "it",
        "rephrase": "Who was the singer?",
        "locality": [{"loc": "who plays", "loc_ans": "Bob"}, {"loc": "when", "loc_ans": "1999"}],
    }
    (edit,) = edits_of(tmp_path, record, "QAEdit")
    assert (edit.id, edit.prompt, edit.target, edit.subject) == ("qaedit-NQ-4", "who sang it", "Ann", "it")
    assert (edit.rephrases, edit.tags, edit.source) == (("Who was the singer?",), ("NQ",), "QAEdit")
    assert asked(edit.locality) == [("unrelated", "who plays", "Bob"), ("unrelated", "when", "1999")]
    assert edit.extra == {}


def test_erens_counterfact(tmp_path: Path) -> None:
    record = {
        "id": 0,
        "edit_statement": "Ann is from Paris.",
        "subject_name": "Ann",
        "edit_scope": [["Where is Ann from?", "Paris"], ["Ann's city?", "Paris"]],
        "edit_scope_true_ans": ["London", "London"],
        "unrelated": {"neighbor_subj": ["Where is Bob from?"], "same_subj": ["What is Ann?", "Who is Ann?"]},
        "unrelated_true_ans": {"neighbor_subj": ["London"], "same_subj": ["singer"]},
    }
    (edit,) = edits_of(tmp_path, record, "EREN")
    assert (edit.id, edit.prompt, edit.target, edit.ground_truth) == ("cfh-0", "Where is Ann from?", "Paris", "London")
    assert (edit.subject, edit.rephrases, edit.source) == ("Ann", ("Ann's city?",), "EREN CounterFact-Hard")
    assert asked(edit.locality) == [
        ("same_relation", "Where is Bob from?", "London"),
        ("same_subject", "What is Ann?", None),  # one answer for two questions: whose it is, is not said
        ("same_subject", "Who is Ann?", None),
    ]
    assert set(edit.extra) == {"edit_statement", "edit_scope_true_ans", "unrelated_true_ans"}
    assert problem_of(tmp_path, record | {"edit_scope": []}).field == "edit_scope"
    assert problem_of(tmp_path, record | {"edit_scope": [["q"]]}).field == "edit_scope.0"


def test_erens_fever(tmp_path: Path) -> None:
    record = {
        "id": 5,
        "edit_statement": "Ann is from Paris.",
        "edit_scope": [["Ann is from Paris.", "yes"], ["Ann comes from Paris.", "yes"], ["Ann is from Rome.", "no"]],
        "edit_scope_true_ans": ["no", "no", "no"],
        "_id": "77",
    }
    (edit,) = edits_of(tmp_path, record, "EREN")
    assert (edit.id, edit.prompt, edit.target, edit.ground_truth) == ("fever-5", "Ann is from Paris.", "yes", "no")
    assert (edit.rephrases, edit.source) == (("Ann comes from Paris.",), "EREN FEVER")
    assert asked(edit.portability) == [("no_question", "Ann is from Rome.", "no")]
    assert edit.extra["_id"] == "77"


def test_erens_hotpot(tmp_path: Path) -> None:
    record = {
        "id": "5a8a",
        "step": 1,
        "edit_scope": [["What are both?", "singers"]],
        "edit_scope_true_ans": ["singers"],
        "edit_statement": ["Ann (born 1969) is a singer. She is old.", "Bob sang for kings."],
    }
    first, last = edits_of(tmp_path, record, "EREN")
    assert (first.id, first.prompt, first.target) == ("hotpot-5a8a-1", "Ann (born 1969) is", "a singer. She is old.")
    assert (last.id, last.prompt, last.target) == ("hotpot-5a8a-2", "Bob sang for", "kings.")
    assert (first.portability, asked(last.portability)) == ((), [("multi_hop", "What are both?", "singers")])
    assert last.extra == {"step": 1, "edit_scope_true_ans": ["singers"]}
    assert problem_of(tmp_path, record | {"edit_statement": ["Ann sings."]}).field == "edit_statement.0"


def test_unke(tmp_path: Path) -> None:
    record = {
        "id": 3,
        "question": "Who is Ann?",
        "para_question": "Ann is who?",
        "answer": "Ann is a singer from Paris.",
        "sub_question": ["Where is Ann from?"],
        "sub_answer": ["Paris."],
    }
    (edit,) = edits_of(tmp_path, record, "UnKE")
    assert (edit.id, edit.prompt, edit.target) == ("unke-3", "Who is Ann?", "Ann is a singer from Paris.")
    assert edit.rephrases == ("Ann is who?",)
    assert asked(edit.portability) == [("sub_question", "Where is Ann from?", "Paris.")]
    assert problem_of(tmp_path, record | {"sub_answer": []}).field == "sub_answer"
    other = {"id": 3, "question": "What is 1 + 1?", "answer": "It is 2.", "category": "maths"}
    (edit,) = edits_of(tmp_path, other, "UnKE")
    assert (edit.id, edit.source, edit.tags) == ("editevery-3", "EditEverything", ("maths",))
    assert edit.extra == {}


def test_tofu(tmp_path: Path) -> None:
    record = {"question": "Who wrote it?", "answer": "Ann", "perturbed_answer": ["Bob", "Eve"]}
    (edit,) = edits_of(tmp_path, record, "questions with answers")
    assert (edit.prompt, edit.target, edit.extra) == ("Who wrote it?", "Ann", {"perturbed_answer": ["Bob", "Eve"]})


def test_tofus_right_and_wrong_answers(tmp_path: Path) -> None:
    record = {"question": "Who wrote it?", "answer": "Ann wrote it.", "perturbed_answer": ["Bob", " Eve"]}
    (edit,) = edits_of(tmp_path, record, "questions with answers")
    assert truth_question(edit) == TruthQuestion("Who wrote it?", "Ann wrote it.", ("Bob", "Eve"))
    more = {**record, "paraphrased_answer": "By Ann", "perturbed_answer": "Bob"}
    (edit,) = edits_of(tmp_path, more, "questions with answers")
    assert truth_question(edit) == TruthQuestion("Who wrote it?", "By Ann", ("Bob",))
    assert truth_question(Edit(prompt="Who?", target="Ann")) is None
    probe = Probe.model_validate({"prompt": "Who?", "answer": "Ann", "perturbed_answer": ["Bob"]})
    assert truth_question(probe) == TruthQuestion("Who?", "Ann", ("Bob",))
    assert truth_question(probe.model_copy(update={"answer": None})) is None, "no right answer is known"


@pytest.mark.parametrize(
    ("field", "value"),
    [("perturbed_answer", [3]), ("perturbed_answer", {"a": "b"}), ("perturbed_answer", [" "]), ("paraphrased_answer", 3)],
)  # fmt: skip
def test_tofus_answers_have_to_be_texts(tmp_path: Path, field: str, value: Any) -> None:
    record = {"question": "Who wrote it?", "answer": "Ann", "perturbed_answer": ["Bob"], field: value}
    assert f"field '{field}'" in str(problem_of(tmp_path, record))


def test_a_key_that_an_edit_has_too_is_kept_under_another_name(tmp_path: Path) -> None:
    record = {"question": "Who wrote it?", "answer": "Ann", "target": 3, "tags": "x"}
    (edit,) = edits_of(tmp_path, record, "questions with answers")
    assert (edit.target, edit.tags) == ("Ann", ())
    assert edit.extra == {"record_target": 3, "record_tags": "x"}
