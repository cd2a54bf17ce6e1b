"""The files of the local tasks as lm-evaluation-harness wants them, and how what a model writes is scored.

The harness finds `documents` and the scores by name from the YAML files beside them. A file is read whole before
anything is asked: a damaged record is an error, never an item less, for scores are only comparable over the same items.
Files may be gzipped. HumanEval is not among them: its answers are programs, which would have to be run.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from errata.datasets.fields import required, texts
from errata.datasets.reading import iterate_records, text_of
from errata.edit import FieldProblem
from errata.errors import ConfigError, FormatError
from errata.evaluation.metrics import answers_exactly, best_answer

__all__ = ["LOCAL_TASKS", "documents", "score_line", "score_name", "score_number", "tasks_in"]

Document = dict[str, Any]

_PREFIX = "local_"
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|\.\d+")
_OPTION = re.compile(r"(\([A-Z]\)) ?(.*)")
_BBH_TWO_ANSWERS = {
    "boolean_expressions": ["False", "True"],
    "sports_understanding": ["no", "yes"],
    "web_of_lies": ["No", "Yes"],
}
_BBH_OPTIONS = (
    "causal_judgement", "date_understanding", "disambiguation_qa", "formal_fallacies", "geometric_shapes", "hyperbaton",
    "logical_deduction_five_objects", "logical_deduction_seven_objects", "logical_deduction_three_objects",
    "movie_recommendation", "navigate", "penguins_in_a_table", "reasoning_about_colored_objects", "ruin_names",
    "salient_translation_error_detection", "snarks", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects",
)  # fmt: skip
_BBH_WRITTEN = ("dyck_languages", "multistep_arithmetic_two", "object_counting", "word_sorting")
_MGSM_LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")


class _Benchmark(NamedTuple):
    """Where a task's items stand.

    Attributes:
        read: a file's items; test: the files, whose items take turns, so that the first N of a task are of all of them.
        train: the file that examples in front of a question are taken from, if not from the other test items.
        beside: a file that `read` looks for beside a test file.
    """

    read: Callable[[Path], list[Document]]
    test: tuple[str, ...]
    train: str | None = None
    beside: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.test, *(name for name in (self.train, self.beside) if name is not None))


def _made(path: Path, line: int | None, where: str, make: Callable[[dict[str, Any]], Document], value: Any) -> Document:
    """One item; an error names the file, its line, and the field with what stands around it."""
    try:
        if not isinstance(value, dict):
            raise FieldProblem(None, f"expected an object, found {type(value).__name__}", "copy the file again")
        return make(value)
    except FieldProblem as problem:
        field = f"{where}{problem.field or ''}".rstrip(".") or None
        raise FormatError(str(path), line, field, problem.problem, problem.remedy) from problem


def _text(path: Path) -> str:
    text, damage = text_of(path)
    if damage is not None:
        raise damage
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise FormatError(str(path), line, None, "is not UTF-8 text", "save the file as UTF-8") from error
    return text


def _each_record(make: Callable[[dict[str, Any]], Document]) -> Callable[[Path], list[Document]]:
    """A reader of JSONL and of JSON lists."""

    def read(path: Path) -> list[Document]:
        found = []
        for record in iterate_records(path):
            if isinstance(record, FormatError):
                raise record
            found.append(_made(path, record.line, "", make, record.value))
        return found

    return read


def _examples(path: Path, make: Callable[[dict[str, Any]], Document]) -> list[Document]:
    """The items of an object that holds them in a list under `examples`, as BIG-bench's files do."""
    try:
        whole = json.loads(_text(path))
    except json.JSONDecodeError as error:
        problem = f"is not JSON ({error.msg} at column {error.colno})"
        raise FormatError(
            str(path), error.lineno, None, problem, "correct this place or copy the file again"
        ) from error
    examples = _made(path, None, "", lambda value: {"all": required(value, "examples", list)}, whole)["all"]
    return [_made(path, None, f"examples.{number}.", make, value) for number, value in enumerate(examples)]


def _place(record: dict[str, Any], field: str, known: Sequence[Any]) -> int:
    """Which of the known values a field has."""
    value = required(record, field, object)
    if value not in known:
        expected = ", ".join(repr(one) for one in known)
        raise FieldProblem(field, f"expected one of {expected}, found {value!r}", "copy the file again")
    return known.index(value)


def _number_in(text: str) -> float | None:
    """The number that a text comes to: behind "####" if that is written (GSM8K), else the last one."""
    found = _NUMBER.findall(text.rpartition("####")[2])
    return float(found[-1].replace(",", "")) if found else None


def _plain(number: float) -> str:
    return str(int(number)) if number.is_integer() else str(number)


def _sum(question: str, value: Any, field: str, worked: str | None = None) -> Document:
    """A question whose answer is a number; shown in examples as it was worked out, if it was."""
    number = _number_in(str(value))
    if number is None:
        raise FieldProblem(field, f"expected a number, found {value!r}", "copy the file again")
    return {"question": question.strip(), "answer": worked or _plain(number), "number": number}


def _gsm8k(record: dict[str, Any]) -> Document:
    answer = required(record, "answer", str)
    if "####" not in answer:
        raise FieldProblem("answer", "has no '####' in front of its result", "copy the file again")
    return _sum(required(record, "question", str), answer, "answer", worked=answer)


def _svamp(record: dict[str, Any]) -> Document:
    body, question = required(record, "Body", str).strip(), required(record, "Question", str)
    # Many a body is the first half of the question: "If there is a discount of 25 dollars on each pack".
    return _sum(f"{body}{'' if body.endswith('.') else ','} {question}", required(record, "Answer", object), "Answer")


def _word_problem(record: dict[str, Any]) -> Document:
    solutions = required(record, "lSolutions", list)
    if len(solutions) != 1:
        raise FieldProblem("lSolutions", f"expected one solution, found {len(solutions)}", "copy the file again")
    return _sum(required(record, "sQuestion", str), solutions[0], "lSolutions")


def _mgsm(path: Path) -> list[Document]:
    """Lines of question, tab, answer."""
    found = []
    for line, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        question, tab, answer = text.rpartition("\t")
        if not tab:
            raise FormatError(str(path), line, None, "has no tab", "write the question, a tab and the answer")
        found.append(_made(path, line, "", lambda own: _sum(own["question"], own["answer"], "answer"), {
            "question": question, "answer": answer,
        }))  # fmt: skip
    return found


def _aqua(record: dict[str, Any]) -> Document:
    options = texts(record, "options")
    for number, option in enumerate(options):
        if not option.startswith(f"{'ABCDE'[number : number + 1]})"):
            raise FieldProblem(f"options.{number}", f"expected 'A)' to 'E)', found {option!r}", "copy the file again")
    gold = _place(record, "correct", "ABCDE"[: len(options)])
    return {
        "question": required(record, "question", str),
        "options": [option[2:].strip() for option in options],
        "gold": gold,
    }


def _mmlu(record: dict[str, Any]) -> Document:
    options = texts(record, "choices")
    return {
        "question": required(record, "question", str).strip(),
        "options": options,
        "gold": _place(record, "answer", range(len(options))),
    }


def _commonsense_qa(record: dict[str, Any]) -> Document:
    question = required(record, "question", dict)
    choices = required(question, "choices", list, "question.")
    found = []
    for number, choice in enumerate(choices):
        where = f"question.choices.{number}."
        if not isinstance(choice, dict):
            raise FieldProblem(where[:-1], f"expected object, found {type(choice).__name__}", "copy the file again")
        found.append([required(choice, field, str, where) for field in ("label", "text")])
    return {
        "question": required(question, "stem", str, "question."),
        "options": [text for _, text in found],
        "gold": _place(record, "answerKey", [label for label, _ in found]),
    }


def _strategy_qa(path: Path) -> list[Document]:
    def make(record: dict[str, Any]) -> Document:
        scores = required(record, "target_scores", dict)
        if sorted(scores) != ["No", "Yes"] or sorted(scores.values()) != [0, 1]:
            raise FieldProblem(
                "target_scores", f"expected 0 and 1 for Yes and No, found {scores}", "copy the file again"
            )
        return {"question": required(record, "input", str), "gold": scores["Yes"]}

    return _examples(path, make)


def _piqa(path: Path) -> list[Document]:
    """Goals with two solutions; which is right stands in a file of its own."""
    found = _each_record(lambda record: {name: required(record, name, str) for name in ("goal", "sol1", "sol2")})(path)
    place = _file(path.parent, _PIQA_LABELS)
    labels = _text(place).split()
    for line, label in enumerate(labels, start=1):
        if label not in ("0", "1"):
            raise FormatError(str(place), line, None, f"expected 0 or 1, found {label!r}", "copy the file again")
    if len(labels) != len(found):
        raise FormatError(
            str(place), None, None, f"has {len(labels)} labels for {len(found)} goals", "copy both files again"
        )
    return [
        {"goal": one["goal"], "choices": [one["sol1"], one["sol2"]], "gold": int(label)}
        for one, label in zip(found, labels, strict=True)
    ]


def _boolq(record: dict[str, Any]) -> Document:
    question, passage = (required(record, field, str) for field in ("question", "passage"))
    return {"question": question, "passage": passage, "gold": _place(record, "answer", [False, True])}


def _labelled(*fields: str, labels: Sequence[Any] = (0, 1)) -> Callable[[Path], list[Document]]:
    """A reader of sentences with a label, as GLUE has them."""
    return _each_record(
        lambda record: (
            {field: required(record, field, str).strip() for field in fields}
            | {"gold": _place(record, "label", labels)}
        )
    )


def _mutual(record: dict[str, Any]) -> Document:
    options = texts(record, "options")
    gold = _place(record, "answers", "ABCD"[: len(options)])
    return {"article": required(record, "article", str), "choices": options, "gold": gold}


def _lambada(record: dict[str, Any]) -> Document:
    text = required(record, "text", str).rstrip()
    words = text.rsplit(maxsplit=1)
    if len(words) < 2:
        raise FieldProblem("text", f"expected several words, found {text!r}", "copy the file again")
    # The word with the white space in front of it, which now and then is a line break.
    return {"beginning": words[0], "last": text[len(words[0]) :]}


def _natural_questions(record: dict[str, Any]) -> Document:
    answers = texts(record, "answer")
    if not answers:
        raise FieldProblem("answer", "names no answer", "copy the file again")
    return {"question": required(record, "question", str), "answer": answers[0], "answers": answers}


def _bbh(path: Path) -> list[Document]:
    """Items whose answer is one of those that the item lists, or one of two in the whole file.

    Left out are the three items of the published files whose right option was itself cut into several at its commas.
    """
    two = _BBH_TWO_ANSWERS.get(path.name.partition(".")[0])

    def make(record: dict[str, Any]) -> Document:
        prompt = required(record, "input", str)
        choices, contents = (two, []) if two is not None else _options_of(prompt)
        target = required(record, "target", str)
        places = itertools.combinations(range(len(contents) + 1), 2)
        if target in (", ".join(contents[begin:end]) for begin, end in places if end - begin > 1):
            return {}
        return {"prompt": prompt, "choices": choices, "gold": _place(record, "target", choices)}

    return [document for document in _examples(path, make) if document]


def _options_of(prompt: str) -> tuple[list[str], list[str]]:
    """What may be answered to a prompt that ends with its options, and what each of these stands for."""
    _, _, listed = prompt.rpartition("Options:\n")
    found = [_OPTION.match(line) for line in listed.split("\n")]
    labelled = [(one[1], one[2]) for one in found if one is not None]
    if labelled:
        return [label for label, _ in labelled], [content for _, content in labelled]
    return [line.removeprefix("- ").strip() for line in listed.split("\n")], []


def _bbh_written(path: Path) -> list[Document]:
    return _examples(path, lambda record: {
        "prompt": required(record, "input", str), "answer": required(record, "target", str),
    })  # fmt: skip


_PIQA_LABELS = "piqa_valid-labels.lst"
_BENCHMARKS = {
    "gsm8k": _Benchmark(_each_record(_gsm8k), ("gsm8k_test.jsonl",), train="gsm8k_train.jsonl"),
    "svamp": _Benchmark(_each_record(_svamp), ("svamp.json",)),
    "addsub": _Benchmark(_each_record(_word_problem), ("addsub.json",)),
    "multiarith": _Benchmark(_each_record(_word_problem), ("multiarith.json",)),
    "singleeq": _Benchmark(_each_record(_word_problem), ("singleeq.json",)),
    "mgsm": _Benchmark(_mgsm, tuple(f"mgsm/mgsm_{language}.tsv" for language in _MGSM_LANGUAGES)),
    "aqua": _Benchmark(_each_record(_aqua), ("aqua_test.jsonl",)),
    "mmlu": _Benchmark(_each_record(_mmlu), ("mmlu.json",)),
    "commonsenseqa": _Benchmark(
        _each_record(_commonsense_qa), ("commonsenseqa_dev.jsonl",), train="commonsenseqa_train.jsonl"
    ),
    "strategyqa": _Benchmark(_strategy_qa, ("strategyqa.json",)),
    "piqa": _Benchmark(_piqa, ("piqa_valid.jsonl",), beside=_PIQA_LABELS),
    "boolq": _Benchmark(_each_record(_boolq), ("boolq_ClosedDomainQA.jsonl",)),
    "nq": _Benchmark(_each_record(_natural_questions), ("nq_OpenDomainQA.jsonl",)),
    "lambada": _Benchmark(_each_record(_lambada), ("lambada_test.jsonl",)),
    "mutual": _Benchmark(_each_record(_mutual), ("dialogue.json",)),
    "nli": _Benchmark(_labelled("sentence1", "sentence2", labels=("entailment", "not_entailment")), ("nli.json",)),
    "rte": _Benchmark(_labelled("sentence1", "sentence2"), ("rte.json",)),
    "mrpc": _Benchmark(_labelled("sentence1", "sentence2"), ("mrpc.json",)),
    "sst2": _Benchmark(_labelled("sentence"), ("sst2.json",)),
    "cola": _Benchmark(_labelled("sentence"), ("cola.json",)),
    "bbh": _Benchmark(_bbh, tuple(f"bbh/{name}.json" for name in (*_BBH_TWO_ANSWERS, *_BBH_OPTIONS))),
    "bbh_written": _Benchmark(_bbh_written, tuple(f"bbh/{name}.json" for name in _BBH_WRITTEN)),
}
LOCAL_TASKS = tuple(_PREFIX + name for name in _BENCHMARKS)


def _file(folder: Path, name: str) -> Path:
    """A file of a folder, or its gzipped form; where neither is there, the plain one."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    return zipped if zipped.exists() and not plain.exists() else plain


def tasks_in(folder: Path) -> tuple[str, ...]:
    """The tasks all of whose files are in a folder.

    Raises:
        ConfigError: there are none.
    """
    found = tuple(
        _PREFIX + name
        for name, benchmark in _BENCHMARKS.items()
        if all(_file(folder, file).exists() for file in benchmark.files)
    )
    if not found:
        raise ConfigError(f"{folder} holds the files of no local task; docs/damage.md lists which files they read")
    return found


def documents(benchmark: str, folder: str | Path | None = None, **_: Any) -> dict[str, Any]:
    """The items of a benchmark as data sets: "test", and "train" where examples have a file of their own.

    Args:
        benchmark: a local task's name, with or without "local_".
        folder: where its files are; the harness passes it on from its `metadata`.

    Raises:
        ConfigError: no folder, or a file is not in it.
        FormatError: a file cannot be read or holds no items; a record does not fit.
    """
    name = benchmark.removeprefix(_PREFIX)
    found = _BENCHMARKS[name]
    if folder is None:
        files = ", ".join(found.files[:3]) + (" and others" if len(found.files) > 3 else "")
        raise ConfigError(f"{_PREFIX}{name} reads {files}: give the folder they are in, --data FOLDER")
    for file in found.files:
        if not _file(Path(folder), file).exists():
            raise ConfigError(
                f"{_PREFIX}{name} reads {file} (or {file}.gz), which is not in {folder}; give the folder that holds it "
                "(--data FOLDER), or leave the task out"
            )
    from datasets import Dataset

    splits = {"test": found.test} | ({"train": (found.train,)} if found.train is not None else {})
    read = {split: [_items(found, _file(Path(folder), file)) for file in files] for split, files in splits.items()}
    in_turn = {
        split: [item for row in itertools.zip_longest(*items) for item in row if item is not None]
        for split, items in read.items()
    }
    return {split: Dataset.from_list(items) for split, items in in_turn.items()}


def _items(benchmark: _Benchmark, path: Path) -> list[Document]:
    items = benchmark.read(path)
    if not items:
        raise FormatError(str(path), None, None, "holds no items", "copy the file again")
    return items


def score_number(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the number that was written is the right one, to two decimals."""
    said = _number_in(results[0])
    return {"exact_match": float(said is not None and abs(said - document["number"]) < 0.005)}


def score_name(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where one of the right names is the answer, as edits are measured (`answers_exactly`)."""
    return {"exact_match": best_answer(answers_exactly, results[0], document["answers"])}


def score_line(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where what was written is the answer, character by character but for spaces around it."""
    return {"exact_match": float(results[0].strip() == document["answer"])}
