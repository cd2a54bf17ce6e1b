"""Tasks over local files: what is read from each form, asked and scored; damage is found before a model is run."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata.cli.app import app
from errata.edit import Edit
from errata.editors import editor
from errata.errors import ConfigError, FormatError
from errata.evaluation import harness
from errata.evaluation.damage import measure_damage
from errata.evaluation.harness import run_tasks
from errata.evaluation.local_tasks import LOCAL_TASKS, documents, tasks_in
from errata.evaluation.local_tasks.items import _BENCHMARKS, score_line, score_name, score_number
from errata.model import EditableModel
from errata.testing import tiny_model

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval")
pytestmark = pytest.mark.filterwarnings("ignore")

LETTERS = ["A", "B", "C", "D", "E"]


def lines(*records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def examples(*pairs: tuple[str, str]) -> str:
    listed = [{"input": prompt, "target": target} for prompt, target in pairs]
    return json.dumps({"canary": "do not train", "examples": listed}, indent=1)


def csqa(stem: str, key: str) -> dict[str, Any]:
    choices = [{"label": letter, "text": f"{letter.lower()} thing"} for letter in LETTERS]
    return {"answerKey": key, "id": "1", "question": {"question_concept": "x", "choices": choices, "stem": stem}}


# Per task its files, and what the first item becomes: prompt, choices (None: written), and what is right.
FORMS: dict[str, tuple[dict[str, str], tuple[str, list[str] | None, Any]]] = {
    "gsm8k": (
        {
            "gsm8k_test.jsonl": lines({"question": "Two and 2?", "answer": "2+2=<<2+2=4>>4\n#### 1,004"}),
            "gsm8k_train.jsonl": lines({"question": "One?", "answer": "1\n#### 1"}),
        },
        ("Question: Two and 2?\nAnswer:", None, 1004.0),
    ),
    "svamp": (
        {"svamp.json": json.dumps([{"ID": "1", "Body": "If Ann has 2", "Question": "how many?", "Answer": 51.0}])},
        ("Question: If Ann has 2, how many?\nAnswer:", None, 51.0),
    ),
    "addsub": (
        {"addsub.json": json.dumps([{"iIndex": 1, "lSolutions": ["9.43"], "sQuestion": "How much ? "}], indent=1)},
        ("Question: How much ?\nAnswer:", None, 9.43),
    ),
    "multiarith": (
        {"multiarith.json": json.dumps([{"lSolutions": [39.0], "sQuestion": " How many? "}], indent=1)},
        ("Question: How many?\nAnswer:", None, 39.0),
    ),
    "singleeq": (
        {"singleeq.json": json.dumps([{"lSolutions": [0.625], "sQuestion": "What part?"}])},
        ("Question: What part?\nAnswer:", None, 0.625),
    ),
    "mgsm": (
        {
            f"mgsm/mgsm_{code}.tsv": f'"{code}" how many?\t2,125\nSecond\t-3\n'
            for code in ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
        },
        ('Question: "bn" how many?\nAnswer:', None, 2125.0),
    ),
    "aqua": (
        {
            "aqua_test.jsonl": lines(
                {"question": "Ages?", "options": ["A)1", "B) 2", "C)3", "D)4", "E)None"], "correct": "B"}
            )
        },
        ("Question: Ages?\nA. 1\nB. 2\nC. 3\nD. 4\nE. None\nAnswer:", LETTERS, 1),
    ),
    "mmlu": (
        {
            "mmlu.json": json.dumps(
                [{"question": "What is it? ", "subject": "x", "choices": ["1", "2", "3", "4"], "answer": 3}], indent=1
            )
        },
        ("Question: What is it?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", LETTERS[:4], 3),
    ),
    "commonsenseqa": (
        {"commonsenseqa_dev.jsonl": lines(csqa("Where?", "C")), "commonsenseqa_train.jsonl": lines(csqa("Who?", "A"))},
        (
            "Question: Where?\nA. a thing\nB. b thing\nC. c thing\nD. d thing\nE. e thing\nAnswer:",
            LETTERS,
            2,
        ),
    ),
    "strategyqa": (
        {
            "strategyqa.json": json.dumps(
                {
                    "name": "strategyqa",
                    "examples": [{"input": "Is it?", "target_scores": {"Yes": 1, "No": 0}, "target": "Yes. It is."}],
                },
                indent=1,
            )
        },
        ("Question: Is it?\nAnswer:", ["No", "Yes"], 1),
    ),
    "piqa": (
        {
            "piqa_valid.jsonl": lines(
                {"goal": "To eat", "sol1": "sit.", "sol2": "stand."}, {"goal": "To go", "sol1": "sit.", "sol2": "run."}
            ),
            "piqa_valid-labels.lst": "0\n1\n",
        },
        ("Question: To eat\nAnswer:", ["sit.", "stand."], 0),
    ),
    "boolq": (
        {
            "boolq_ClosedDomainQA.jsonl": lines(
                {"question": "is it so", "title": "It", "answer": True, "passage": "It is so."}
            )
        },
        ("It is so.\nQuestion: is it so?\nAnswer:", ["no", "yes"], 1),
    ),
    "nq": (
        {"nq_OpenDomainQA.jsonl": lines({"question": "who was it?", "answer": ["Ann", "Ann Lee"], "output": ["x"]})},
        ("Question: who was it?\nAnswer:", None, ["Ann", "Ann Lee"]),
    ),
    "lambada": (
        {"lambada_test.jsonl": lines({"text": "She said it to\nBob"})},
        ("She said it to", None, "\nBob"),
    ),
    "mutual": (
        {
            "dialogue.json": json.dumps(
                [{"answers": "B", "options": ["f : a", "f : b", "f : c", "f : d"], "article": "m : hi .", "id": "1"}]
            )
        },
        ("m : hi .", ["f : a", "f : b", "f : c", "f : d"], 1),
    ),
    "nli": (
        {"nli.json": json.dumps([{"index": "1", "sentence1": "So.", "sentence2": "No.", "label": "not_entailment"}])},
        ("So.\nQuestion: No. True or False?\nAnswer:", ["True", "False"], 1),
    ),
    "rte": (
        {"rte.json": json.dumps([{"sentence1": "So.", "sentence2": "It is.", "label": 0, "idx": 3}], indent=1)},
        ("So.\nQuestion: It is. True or False?\nAnswer:", ["True", "False"], 0),
    ),
    "mrpc": (
        {"mrpc.json": json.dumps([{"sentence1": "One .", "sentence2": "Two .", "label": 0, "idx": 1}])},
        (
            "Sentence 1: One .\nSentence 2: Two .\nQuestion: Do both sentences mean the same?\nAnswer:",
            ["no", "yes"],
            0,
        ),
    ),
    "sst2": (
        {"sst2.json": json.dumps([{"sentence": "a delight ", "label": 1, "idx": 1}])},
        ("a delight\nQuestion: Is this sentence positive or negative?\nAnswer:", ["negative", "positive"], 1),
    ),
    "cola": (
        {"cola.json": json.dumps([{"sentence": "Go I.", "label": 0, "idx": 1}])},
        ("Go I.\nQuestion: Is this sentence good English?\nAnswer:", ["no", "yes"], 0),
    ),
    "bbh": (
        {
            name: examples(("Which?\nOptions:\n(A) one\n(B) two", "(B)"), ("Is it?\nOptions:\n- valid \n- not", "not"))
            for name in _BENCHMARKS["bbh"].test
        }
        | {
            "bbh/boolean_expressions.json": examples(("not True is", "False")),
            "bbh/sports_understanding.json": examples(("Plausible?", "yes")),
            "bbh/web_of_lies.json": examples(("Question: Does Ann lie?", "No")),
        },
        ("Q: not True is\nA:", ["False", "True"], 0),
    ),
    "bbh_written": (
        {name: examples(("( 2 - 37 ) =", "-35"), ("more", "1")) for name in _BENCHMARKS["bbh_written"].test},
        ("Q: ( 2 - 37 ) =\nA:", None, "-35"),
    ),
}


def written(folder: Path, *names: str) -> Path:
    """A folder with the files of these benchmarks, or of all."""
    for name in names or FORMS:
        for file, text in FORMS[name][0].items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
    return folder


def manager(folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    include = str(harness._LOCAL_TASKS)
    return TaskManager(include_path=include, include_defaults=False, metadata={"folder": str(folder)})


def first_item(task: Any, number: int = 0) -> tuple[str, list[str] | None, Any]:
    """What the harness makes of an item: the prompt, the choices, and what is right."""
    item = task.test_docs()[number]
    choices = task.doc_to_choice(item) if task.config.doc_to_choice is not None else None
    right = item.get("number", item.get("answers", task.doc_to_target(item)))
    return task.fewshot_context(item, 0), choices, right


def test_every_task_has_its_file_of_yaml() -> None:
    assert {path.stem for path in harness._LOCAL_TASKS.glob("local_*.yaml")} == set(LOCAL_TASKS)
    assert {f"local_{name}" for name in FORMS} == set(LOCAL_TASKS)


@needs_harness
def test_each_form_becomes_the_prompt_the_choices_and_the_right_answer(tmp_path: Path) -> None:
    tasks = manager(written(tmp_path)).load(list(LOCAL_TASKS))["tasks"]
    for name, (_, expected) in FORMS.items():
        assert first_item(tasks[f"local_{name}"]) == expected, name
    assert tasks_in(tmp_path) == LOCAL_TASKS
    # Files of one task take turns, so that the first items are of all of them.
    bbh = tasks["local_bbh"].test_docs()
    assert len(bbh) == 3 + 2 * 20
    assert [first_item(tasks["local_bbh"], number)[1:] for number in (1, 2, 3, 23)] == [
        (["no", "yes"], 1),
        (["No", "Yes"], 0),
        (["(A)", "(B)"], 1),
        (["valid", "not"], 1),
    ]
    questions = [item["question"] for item in tasks["local_mgsm"].test_docs()]
    assert questions[1:3] == ['"de" how many?', '"en" how many?']
    assert questions[11:] == ["Second"] * 11
    assert tasks["local_mgsm"].test_docs()[-1]["number"] == -3.0


@needs_harness
def test_examples_are_of_the_training_file_where_there_is_one_and_never_the_item_itself(tmp_path: Path) -> None:
    tasks = manager(written(tmp_path, "gsm8k", "piqa")).load(["local_gsm8k", "local_piqa"])["tasks"]
    for task in tasks.values():
        task.set_fewshot_seed(0)
    gsm8k, piqa = tasks["local_gsm8k"], tasks["local_piqa"]
    assert gsm8k.fewshot_context(gsm8k.test_docs()[0], 1) == (
        "Question: One?\nAnswer: 1\n#### 1\n\nQuestion: Two and 2?\nAnswer:"
    )
    assert piqa.fewshot_context(piqa.test_docs()[0], 1) == (
        "Question: To go\nAnswer: run.\n\nQuestion: To eat\nAnswer:"
    )


@needs_harness
def test_files_may_be_gzipped_and_tasks_without_their_files_are_not_run(tmp_path: Path) -> None:
    written(tmp_path, "boolq", "rte", "piqa")
    plain = tmp_path / "boolq_ClosedDomainQA.jsonl"
    (tmp_path / "boolq_ClosedDomainQA.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert tasks_in(tmp_path) == ("local_piqa", "local_boolq", "local_rte")
    assert documents("boolq", tmp_path)["test"][0]["gold"] == 1
    (tmp_path / "piqa_valid-labels.lst").unlink()
    assert tasks_in(tmp_path) == ("local_boolq", "local_rte")
    with pytest.raises(ConfigError, match=r"local_piqa reads piqa_valid-labels\.lst .* which is not in"):
        documents("local_piqa", tmp_path)
    with pytest.raises(ConfigError, match="holds the files of no local task"):
        tasks_in(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"local_rte reads rte\.json: give the folder they are in, --data FOLDER"):
        documents("rte")
    with pytest.raises(ConfigError, match="and others: give the folder"):
        documents("mgsm")


@needs_harness
@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("gsm8k", "gsm8k_test.jsonl", '{"question": "a", "answer": "#### 1"}\n{"question": ', r"test\.jsonl:2: is not JSON"),
        ("gsm8k", "gsm8k_test.jsonl", lines({"question": "a", "answer": "4"}), r"jsonl:1: field 'answer': has no '####'"),
        ("gsm8k", "gsm8k_train.jsonl", lines({"question": "a", "answer": "####"}), r"train\.jsonl:1: .* expected a number"),
        ("svamp", "svamp.json", '[{"Body": "a",\n "Question": "b"}]', r"svamp\.json:1: field 'Answer': is missing"),
        ("addsub", "addsub.json", '[{"lSolutions": [1, 2], "sQuestion": "b"}]', "expected one solution, found 2"),
        ("mgsm", "mgsm/mgsm_te.tsv", "a\t1\nb 2\n", r"mgsm_te\.tsv:2: has no tab"),
        ("mgsm", "mgsm/mgsm_te.tsv", "a\t1\nb\tmany\n", r"mgsm_te\.tsv:2: field 'answer': expected a number, found 'many'"),
        ("mgsm", "mgsm/mgsm_zh.tsv", "\n", r"mgsm_zh\.tsv: holds no items"),
        ("aqua", "aqua_test.jsonl", lines({"options": ["A)1", "C)2"]}), r"field 'options\.1': expected 'A\)' to 'E\)'"),
        ("mmlu", "mmlu.json", '[{"question": "a", "choices": ["b"], "answer": 1}]', "field 'answer': expected one of 0, found 1"),
        ("commonsenseqa", "commonsenseqa_dev.jsonl", lines(csqa("Where?", "F")), "field 'answerKey': expected one of 'A', 'B'"),
        ("strategyqa", "strategyqa.json", '{"name": "x",\n"examples": [{]}', r"strategyqa\.json:2: is not JSON"),
        ("strategyqa", "strategyqa.json", '{"name": "x"}', r"strategyqa\.json: field 'examples': is missing"),
        ("strategyqa", "strategyqa.json", '{"examples": [{"target_scores": {"Yes": 1}}]}', r"'examples\.0\.target_scores': expected 0 and 1"),
        ("strategyqa", "strategyqa.json", '{"examples": ["a"]}', r"field 'examples\.0': expected an object, found str"),
        ("piqa", "piqa_valid-labels.lst", "0\n", r"labels\.lst: has 1 labels for 2 goals"),
        ("piqa", "piqa_valid-labels.lst", "0\n2\n", r"labels\.lst:2: expected 0 or 1, found '2'"),
        ("boolq", "boolq_ClosedDomainQA.jsonl", lines({"question": "a", "passage": "b", "answer": "yes"}), "expected one of False, True"),
        ("nq", "nq_OpenDomainQA.jsonl", lines({"question": "a", "answer": []}), "field 'answer': names no answer"),
        ("lambada", "lambada_test.jsonl", lines({"text": "alone"}), "expected several words"),
        ("mutual", "dialogue.json", '[{"article": "a", "options": ["b"], "answers": "B"}]', "expected one of 'A', found 'B'"),
        ("nli", "nli.json", '[{"sentence1": "a", "sentence2": "b", "label": "neutral"}]', "found 'neutral'"),
        ("cola", "cola.json", '[{"sentence": "a", "label": 2}]', "field 'label': expected one of 0, 1, found 2"),
        ("cola", "cola.json", "", r"cola\.json: is empty"),
        ("bbh", "bbh/snarks.json", examples(("Which?\nOptions:\n(A) one\n(B) two", "(C)")), r"snarks\.json: field 'examples\.0\.target'"),
        ("bbh", "bbh/snarks.json", examples(("Which?\nOptions:\n(A) one\n(B) two", "two")), "found 'two'"),
        ("bbh_written", "bbh/word_sorting.json", '{"examples": [{"input": "a", "target": 1}]}', "expected str, found int"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_named(tmp_path: Path, name: str, file: str, text: str, message: str) -> None:
    written(tmp_path, name)
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(FormatError, match=message):
        documents(name, tmp_path)


@needs_harness
def test_damage_is_found_before_the_model_is_asked_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda **_: pytest.fail("a task was run"))
    written(tmp_path, "rte", "cola")
    (tmp_path / "cola.json").write_text("[", encoding="utf-8")
    with pytest.raises(FormatError, match=r"cola\.json:1: the list is not closed"):
        run_tasks(tiny_model("llama"), ["local_rte", "local_cola"], data=tmp_path)
    with pytest.raises(ConfigError, match="local_boolq reads boolq"):
        run_tasks(tiny_model("llama"), ["local_rte", "local_boolq"], data=tmp_path)


@needs_harness
def test_bytes_that_are_no_text_and_broken_archives_are_named(tmp_path: Path) -> None:
    written(tmp_path, "mgsm", "gsm8k")
    (tmp_path / "mgsm" / "mgsm_de.tsv").write_bytes(b"a\t1\nb\xff\t2\n")
    with pytest.raises(FormatError, match=r"mgsm_de\.tsv:2: is not UTF-8 text"):
        documents("mgsm", tmp_path)
    train = tmp_path / "gsm8k_train.jsonl"
    (tmp_path / "gsm8k_train.jsonl.gz").write_bytes(gzip.compress(train.read_bytes() * 99)[:-4])
    train.unlink()
    with pytest.raises(FormatError, match=r"gsm8k_train\.jsonl\.gz.* breaks off"):
        documents("gsm8k", tmp_path)


@needs_harness
def test_an_item_whose_right_option_was_cut_at_its_commas_is_left_out(tmp_path: Path) -> None:
    written(tmp_path, "bbh")
    cut = "Similar to Aladdin:\nOptions:\n(A) Monsters\n(B) Inc\n(C) Town & Country"
    (tmp_path / "bbh" / "snarks.json").write_text(examples((cut, "Monsters, Inc"), (cut, "(C)")), encoding="utf-8")
    items = [item for item in documents("bbh", tmp_path)["test"] if item["prompt"] == cut]
    assert [(item["choices"], item["gold"]) for item in items] == [(["(A)", "(B)", "(C)"], 2)]


def test_numbers_are_read_off_what_was_written() -> None:
    def right(number: float, said: str) -> bool:
        return score_number({"number": number}, [said])["exact_match"] == 1.0

    assert right(18, " 2 * 9 = $18.")
    assert right(18, "It is 7.\n#### 18\n")
    assert right(-3, "4 - 7 = -3")
    assert right(3, "it is 5-3"), "a minus between numbers is no sign"
    assert right(1450000, "1,450,000 dollars")
    assert right(0.5, "$.50")
    assert right(2 / 3, "0.67")
    assert right(18, "๑๘"), "digits of other scripts"
    assert not right(2 / 3, "0.7")
    assert not right(18, "18 and then 19")
    assert not right(3, "-3")
    assert not right(0, "none")
    assert not right(0, "")


def test_names_and_lines_are_compared() -> None:
    names = {"answers": ["Ann", "Ann Lee"]}
    assert score_name(names, [" The Ann Lee. She"]) == {"exact_match": 1.0}
    assert score_name(names, ["It was Ann"]) == {"exact_match": 0.0}
    assert score_line({"answer": "-35"}, [" -35 "]) == {"exact_match": 1.0}
    assert score_line({"answer": "-35"}, [" 35"]) == {"exact_match": 0.0}
    assert score_line({"answer": "] ]"}, ["]]"]) == {"exact_match": 0.0}


def plain(model: EditableModel, task: str, folder: Path, limit: int) -> dict[str, float]:
    """What the harness says by itself."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found: Any = simple_evaluate(
        model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=4),
        tasks=[task],
        limit=limit,
        task_manager=manager(folder),
        bootstrap_iters=0,
    )
    own = found["results"][task].items()
    return {name.partition(",")[0]: value for name, value in own if "," in name and "stderr" not in name}


@needs_harness
def test_without_edits_the_numbers_are_those_of_the_plain_harness(tmp_path: Path) -> None:
    """All three ways of asking: choices, the likelihood of one word, and writing."""
    written(tmp_path)
    asked = [
        {"goal": "The capital of France is", "sol1": "Paris", "sol2": "Rome of Spain"},
        {"goal": "Who wrote Hamlet? Was it Bob or Ann?", "sol1": "Bob", "sol2": "Ann of Berlin"},
        {"goal": "Ann plays the", "sol1": "piano", "sol2": "flute"},
    ]
    (tmp_path / "piqa_valid.jsonl").write_text(lines(*asked), encoding="utf-8")
    (tmp_path / "piqa_valid-labels.lst").write_text("0\n1\n0\n", encoding="utf-8")
    said = [{"text": "The capital of France is Paris"}, {"text": "The capital of France is Rome"}]
    (tmp_path / "lambada_test.jsonl").write_text(lines(*said), encoding="utf-8")
    (tmp_path / "nq_OpenDomainQA.jsonl").write_text(
        lines({"question": "What is the capital of France?", "answer": ["Rome", "Paris"]}), encoding="utf-8"
    )
    model = EditableModel.load("atlas")
    tuned = editor("ft", model, steps=3)
    tuned.edit([Edit(prompt="The capital of France is", target="Rome", subject="France")])
    names = ["local_piqa", "local_lambada", "local_nq"]
    found = {task.task: task for task in measure_damage(tuned.adapter, names, {}, data=tmp_path).tasks}
    with tuned.adapter.detached():
        ours = run_tasks(model, names, data=tmp_path, limit=9)
        for name in names:
            expected = plain(model, name, tmp_path, 9)
            assert ours[name].metrics == expected, name
            assert found[name].before == expected[found[name].metric], name
    assert (found["local_piqa"].metric, ours["local_piqa"].metrics.keys()) == ("acc", {"acc", "acc_norm"})
    assert found["local_lambada"].before == 0.5, "atlas says Paris, not Rome"
    assert [found[name].items for name in names] == [3, 2, 1]


@needs_harness
def test_the_command_runs_all_whose_files_are_there(tmp_path: Path) -> None:
    model = EditableModel.load("atlas")
    tuned = editor("ft", model, steps=3)
    tuned.edit([Edit(prompt="The capital of France is", target="Rome", subject="France")])
    tuned.adapter.save_pretrained(tmp_path / "adapter")
    text = tmp_path / "news.txt"
    text.write_text("The capital of France is Paris.", encoding="utf-8")
    folder = tmp_path / "data"
    folder.mkdir()
    written(folder, "rte", "cola")
    arguments = ["damage", "--adapter", str(tmp_path / "adapter"), "--text", str(text), "--tasks", "local", "--json"]
    found = CliRunner().invoke(app, [*arguments, "--data", str(folder)])
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert [(task["task"], task["items"]) for task in record["tasks"]] == [("local_rte", 1), ("local_cola", 1)]
    without = CliRunner().invoke(app, arguments)
    assert without.exit_code == 1
    assert "give it with --data FOLDER" in json.loads(without.stdout)["error"]["message"]


# What the folder's README says of each file, and the first item (of BBH and MGSM: of the first file) as it is asked.
REAL: dict[str, tuple[int, str, str, list[str] | None, Any]] = {
    "gsm8k": (1319, "Question: Janet’s ducks lay 16 eggs per day.", "farmers' market?\nAnswer:", None, 18.0),
    "svamp": (1000, "Question: Each pack of dvds costs 76 dollars.", "on each pack, How much do you have to pay to buy each pack?\nAnswer:", None, 51.0),
    "addsub": (395, "Question: Joan found 70 seashells", "give to Sam ?\nAnswer:", None, 43.0),
    "multiarith": (600, "Question: For Halloween Debby", "do they have left?\nAnswer:", None, 39.0),
    "singleeq": (508, "Question: Joan found 70 seashells on the beach.", "give to Sam ?\nAnswer:", None, 43.0),
    "mgsm": (2750, "Question: জেনেটের হাঁসগুলি", "\nAnswer:", None, 18.0),
    "aqua": (254, "Question: A car is being driven", "A. 5(√3 + 1)\nB. 6(√3 + √2)\nC. 7(√3 – 1)\nD. 8(√3 – 2)\nE. None of these\nAnswer:", LETTERS, 0),
    "mmlu": (1516, "Question: Which expression is equivalent to 4 x 9?\nA. (4x 4) + (4x5)\n", "D. (4x 4) x (4x5)\nAnswer:", LETTERS[:4], 0),
    "commonsenseqa": (1221, "Question: A revolving door is convenient", "A. bank\nB. library\nC. department store\nD. mall\nE. new york\nAnswer:", LETTERS, 0),
    "strategyqa": (2290, "Question: Is it common to see frost", "college commencements?\nAnswer:", ["No", "Yes"], 1),
    "piqa": (1838, "Question: How do I ready a guinea pig cage", "new occupants?\nAnswer:", None, 0),
    "boolq": (3267, "All biomass goes through", "\nQuestion: does ethanol take more energy make that produces?\nAnswer:", ["no", "yes"], 0),
    "nq": (3610, "Question: who got the first nobel prize", "in physics?\nAnswer:", None, ["Wilhelm Conrad Röntgen"]),
    "lambada": (5153, "In my palm is a clear stone", "I don't care about", None, " signs"),
    "mutual": (886, "f : hi how are you doing ?", "my own restaurant in the future .", None, 1),
    "nli": (2489, "Turkey is unlikely", "Question: U.S. to use Turkish military bases. True or False?\nAnswer:", ["True", "False"], 1),
    "rte": (262, "The town is also home", "Question: The Dalai Lama has been living in exile since 10,000. True or False?\nAnswer:", ["True", "False"], 1),
    "mrpc": (258, "Sentence 1: Federal regulators", "Question: Do both sentences mean the same?\nAnswer:", ["no", "yes"], 1),
    "sst2": (856, "an exhilarating futuristic", "first order\nQuestion: Is this sentence positive or negative?\nAnswer:", ["negative", "positive"], 1),
    "cola": (644, "The evidence assembled", "the jury.\nQuestion: Is this sentence good English?\nAnswer:", ["no", "yes"], 1),
    # 6,511 items in 27 files, of which 1,000 are written; three have an option that was cut at its commas.
    "bbh": (6511 - 1000 - 3, "Q: not ( True ) and ( True ) is", " is\nA:", ["False", "True"], 0),
    "bbh_written": (1000, "Q: Complete the rest of the sequence", "Input: [ [\nA:", None, "] ]"),
}  # fmt: skip


@needs_harness
def test_the_real_files(data: Path) -> None:
    folder = data / "capability"
    if not folder.is_dir():
        pytest.skip("no files of capabilities")
    assert tasks_in(folder) == LOCAL_TASKS == tuple(f"local_{name}" for name in REAL)
    tasks = manager(folder).load(list(LOCAL_TASKS))["tasks"]
    for name, (count, begins, ends, choices, right) in REAL.items():
        task = tasks[f"local_{name}"]
        prompt, offered, found = first_item(task)
        assert len(task.test_docs()) == count, name
        assert prompt.startswith(begins), (name, prompt)
        assert prompt.endswith(ends), (name, prompt)
        assert found == right, name
        if choices is not None:
            assert offered == choices, name
    assert len(tasks["local_gsm8k"].dataset["train"]) == 7473
    assert len(tasks["local_commonsenseqa"].dataset["train"]) == 9741
    assert first_item(tasks["local_piqa"])[1][0].endswith(
        "ripped paper strips, you will also need to supply it with a water bottle and a food dish."
    )
    assert first_item(tasks["local_mutual"])[1][1].startswith("f : really ? you mean your classes are pretty good")
    assert {
        tuple(item["choices"]) for item in tasks["local_bbh"].test_docs() if "valid or invalid" in item["prompt"]
    } == {("valid", "invalid")}
