"""Documents to remember: the same for the same number, about nobody real, apart by part, answered where they say."""

from __future__ import annotations

import collections
import re
import statistics
import subprocess
import sys

import pytest

from errata.atlas.corpus import sample_texts
from errata.atlas.documents import _KINDS, _OWN_OF_EVENTS, _OWN_OF_PEOPLE, Document, _relations, document, documents
from errata.atlas.relations import RELATIONS
from errata.atlas.shipped import checkpoint_folder
from errata.atlas.world import load_world
from errata.errors import ConfigError

WORLD = load_world()
PARTS = ("training", "validation", "test")
WORD = re.compile(r"[^\W\d_]+")


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Document]]:
    return {part: documents(1000, part=part) for part in PARTS}


def is_event(one: Document) -> bool:
    return one.name.split()[1] in _KINDS


def test_a_document_follows_from_its_number_alone(drawn: dict[str, list[Document]]) -> None:
    for part in PARTS:
        assert documents(20, part=part, start=70) == drawn[part][70:90]
        assert [document(number, part=part) for number in (999, 0)] == [drawn[part][999], drawn[part][0]]
    assert documents(0) == []
    code = "from errata.atlas.documents import document; print(document(123456, part='test', segments=2))"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert elsewhere.strip() == repr(document(123456, part="test", segments=2))


def test_documents_of_one_part_differ_and_no_name_of_it_is_in_another(drawn: dict[str, list[Document]]) -> None:
    names = {part: {one.name for one in ones} for part, ones in drawn.items()}
    # An event bears a last name in front, a person behind.
    last = {part: {one.name.split()[not is_event(one)] for one in ones} for part, ones in drawn.items()}
    for part in PARTS:
        assert len(names[part]) == 1000
        for other in PARTS:
            assert part == other or not (names[part] & names[other] or last[part] & last[other])


def test_names_are_all_dealt_out_before_one_comes_again() -> None:
    assert len({one.name for one in documents(15_000, part="test", facts=1)}) == 15_000


def test_no_subject_is_real(drawn: dict[str, list[Document]]) -> None:
    real = {name.casefold() for fact in WORLD.facts for name in (fact.subject, fact.object)}
    words = {word for name in real for word in name.split()}
    for ones in drawn.values():
        assert sum(is_event(one) for one in ones) == 200
        for one in ones:
            assert one.name.casefold() not in real
            assert set(one.name.removesuffix(one.name.split()[1] if is_event(one) else "").casefold().split()) <= words
    # Which place of a block of five has the event is no fixed one.
    assert {number % 5 for number, one in enumerate(drawn["test"]) if is_event(one)} == set(range(5))


def test_each_sentence_tells_a_fact_that_its_question_asks_in_other_words(drawn: dict[str, list[Document]]) -> None:
    asked = 0
    for one in (one for ones in drawn.values() for one in ones):
        relations = _relations()[is_event(one)]
        assert [question.fact for question in one.questions] == list(range(len(one.sentences)))
        assert len({question.answer for question in one.questions}) == len(one.questions)
        told = set()
        for sentence, question in zip(one.sentences, one.questions, strict=True):
            assert one.name in sentence
            assert one.name in question.prompt
            assert not set(question.answer.split()) & set(one.name.split())
            assert sentence.endswith(question.saying.completion)
            statement = sentence.removesuffix(question.saying.completion).replace(one.name, "{}")
            form = question.prompt.replace(one.name, "{}")
            (relation,) = (r for r in relations if statement in r.statements)
            assert form in relation.phrasings
            assert form != statement
            assert question.answer in relation.objects
            told.add(relation)
            asked += form.endswith("?")
        assert len(told) == len(one.sentences), "every relation at most once"
        assert len(told) in (2, 3)
    total = sum(len(one.questions) for ones in drawn.values() for one in ones)
    assert 0.35 < asked / total < 0.5, "statements to complete and questions, both"


def test_a_prompt_asks_for_one_relation_only_and_for_various_answers() -> None:
    for half in _relations():
        forms = [form for relation in half for form in relation.phrasings]
        assert len(forms) == len(set(forms))
        assert all(form.count("{}") == 1 for form in forms)
        assert all(len(relation.statements) >= 5 and len(relation.objects) >= 10 for relation in half)
        assert not any("." in answer for relation in half for answer in relation.objects), "a full stop ends a sentence"
    own = [relation for relation, _ in (*_OWN_OF_PEOPLE, *_OWN_OF_EVENTS)]
    assert not {relation.name for relation in own} & set(RELATIONS)


def test_every_answer_comes_up_about_equally_often() -> None:
    (colours,) = (objects for relation, objects in _OWN_OF_EVENTS if relation.name == "colour")
    events = [one for one in documents(4000, facts=12) if is_event(one)]
    said = collections.Counter(q.answer for one in events for q in one.questions if q.answer in colours)
    assert said.total() == len(events) == 800
    assert min(said[colour] for colour in colours) > 40
    assert max(said.values()) < 120


def test_segments_divide_the_same_sentences() -> None:
    for number in range(200):
        whole = document(number, facts=11)
        assert len(whole.segments) == 1
        for segments in (2, 5, 11):
            cut = document(number, facts=11, segments=segments)
            assert len(cut.segments) == segments
            assert (cut.name, cut.text, cut.questions) == (whole.name, whole.text, whole.questions)
            sizes = [len(segment.removesuffix(".").split(". ")) for segment in cut.segments]
            assert sum(sizes) == 11
            assert max(sizes) - min(sizes) <= 1
            assert all(segment.endswith(".") for segment in cut.segments)
        few = document(number, facts=4)
        assert few.sentences == whole.sentences[:4]
        assert few.questions == whole.questions[:4]
        assert 4 <= len(document(number, segments=2).sentences) <= 6
        assert len(document(number, segments=12).sentences) == 12


def test_documents_alike_tell_the_same_things_of_other_subjects() -> None:
    """So that a name, and nothing else, says which of them a question is about."""
    people, events = _relations()

    def told(one: Document) -> list[int]:
        relations = events if is_event(one) else people
        asked = [question.prompt.replace(one.name, "{}") for question in one.questions]
        return [next(n for n, own in enumerate(relations) if form in own.phrasings) for form in asked]

    for block in range(20):
        group = documents(6, start=6 * block, facts=3, alike=6)
        for kind in (True, False):
            assert len({tuple(told(one)) for one in group if is_event(one) == kind}) <= 1
        assert [one.name for one in group] == [one.name for one in documents(6, start=6 * block)]
    apart = [tuple(told(one)) for one in documents(60, facts=3, alike=6)]
    assert len(set(apart)) > 8, "each block draws its own"


@pytest.mark.parametrize(
    ("number", "arguments", "message"),
    [
        (0, {"alike": 0}, r"alike=0 must be at least 1"),
        (0, {"part": "tests"}, r"unknown part of the documents 'tests'.*Did you mean 'test'"),
        (0, {"facts": 0}, r"cannot have 0 facts; ask for 1 to 12"),
        (0, {"facts": 13}, r"cannot have 13 facts; ask for 1 to 12"),
        (0, {"segments": 0}, r"cannot have 0 segments; ask for 1 to 12"),
        (0, {"segments": 13}, r"cannot have 13 segments; ask for 1 to 12"),
        (0, {"facts": 3, "segments": 4}, r"3 facts cannot have 4 segments; ask for 1 to 3"),
        (-1, {}, r"no document -1; they are numbered from 0"),
    ],
)
def test_what_cannot_be_made_is_refused(number: int, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        document(number, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        documents(1, start=number, **arguments)  # type: ignore[arg-type]


def test_fewer_than_no_documents_are_refused() -> None:
    with pytest.raises(ConfigError, match="ask for 0 or more"):
        documents(-1)


def test_they_are_written_in_words_that_atlas_has_read(drawn: dict[str, list[Document]]) -> None:
    read = [text for fact in WORLD.facts for text in (fact.subject, fact.object)]
    read += [form for relation in RELATIONS.values() for form in relation.phrasings]
    read += sample_texts(0, 10_000)
    everything = "\n".join(read)
    words = {word.casefold() for word in WORD.findall(everything)}
    characters = set(everything)  # the braces of the phrasings among them
    said = [one.text for ones in drawn.values() for one in ones]
    said += [question.prompt for ones in drawn.values() for one in ones for question in one.questions]
    said += [form for half in _relations() for relation in half for form in relation.phrasings]
    for text in said:
        assert set(text) <= characters
        assert not {word.casefold() for word in WORD.findall(text)} - words, text


def test_they_are_short_for_atlas_and_so_are_the_answers(drawn: dict[str, list[Document]]) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint_folder())

    def lengths(texts: list[str]) -> list[int]:
        encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert [tokenizer.decode(ids) for ids in encoded] == texts, "every character is known"
        return [len(ids) for ids in encoded]

    tokens = lengths([one.text for one in drawn["test"]])
    assert max(tokens) < 50
    assert 24 < statistics.mean(tokens) < 29
    assert sum(17 <= count <= 36 for count in tokens) / len(tokens) > 0.88
    answers = lengths([" " + question.answer for one in drawn["test"] for question in one.questions])
    assert answers.count(1) / len(answers) > 0.88
