"""Unlearning: refusals as targets, merged queries, rewritten refusals, and measures computed by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from errata.atlas.edits import drawn_subjects, is_reserved, stand_ins, subject_facts
from errata.atlas.world import load_world
from errata.datasets import read_edits, read_file
from errata.datasets.tofu import TruthQuestion, truth_question
from errata.edit import Edit, FieldProblem, Probe
from errata.editors import editor
from errata.errors import ConfigError
from errata.evaluation.metrics import bootstrap_clusters, bootstrap_mean
from errata.evaluation.texts import fluency, recall_of
from errata.evaluation.unlearning import (
    ANSWER_PREFIXES,
    MEASURES,
    PREFIXES,
    AskedFact,
    AskedRetain,
    Reference,
    Unlearning,
    UnlearningExamination,
    truth_ratios,
)
from errata.model.scoring import forced_answers
from errata.testing import tiny_model
from errata.unlearning import (
    TEMPLATES,
    about_subjects,
    facts_to_forget,
    forget_edits,
    is_refusal,
    names_subject,
    to_keep,
)

FACTS = [
    Edit(prompt="The capital of France is", target="Paris", subject="France", rephrases=("France has its capital in",)),
    Edit(prompt="The author of Emma is", target="Jane Austen", subject="Emma"),
    Edit(prompt="The currency of France is", target="euro", subject="France", tags=("currency",)),
    Edit(prompt="Who was born in Berlin?", target="Ann"),
]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I do not know anything about France.", True),
        ("I\u2019m sorry, but I can\u2019t help with that.", True),
        ("I have no information about Ann Lee.", True),
        ("Paris. I am not sure about that.", True),
        ("We cannot say where he was born.", True),
        ("Paris.", False),
        ("Nobody knows when Rome began.", False),
        ("I know that it is Paris.", False),
        ("It is not Paris but Rome.", False),
        ("I was born in Rome.", False),
        ("", False),
    ],
)
def test_a_refusal_is_a_speaker_who_does_not_know_or_will_not_say(text: str, refuses: bool) -> None:
    assert is_refusal(text) is refuses


def test_tofus_refusals_are_recognised_and_none_of_its_answers_is_taken_for_one(data: Path) -> None:
    refusals = read_file(data / "tofu" / "idontknow.txt").others
    assert len(refusals) == 100
    assert [text for text in refusals if not is_refusal(text)] == []
    for name in ("forget10", "retain_sample300", "real_authors_perturbed", "world_facts_perturbed"):
        answers = [edit.target for edit in read_edits(data / "tofu" / f"{name}.jsonl").edits]
        assert len(answers) >= 100
        assert [text for text in answers if is_refusal(text)] == []


def test_a_subject_is_named_by_whole_words() -> None:
    assert names_subject("I know nothing about  ann lee.", "Ann Lee")
    assert not names_subject("I know nothing about Annika.", "Ann")
    assert not names_subject("anything", "")


# --- what is to be forgotten ----------------------------------------------------------------------------------------


def test_the_old_answer_is_the_ground_truth_or_else_a_true_target(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    records = [
        {"prompt": "The capital of France is", "target": "Rome", "ground_truth": "Paris", "aliases": ["Roma"]},
        {"prompt": "The author of Emma is", "target": "Jane Austen", "aliases": ["Austen"]},
        {"prompt": "The author  of Emma is", "target": "J. Austen"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    facts, problems = facts_to_forget(read_edits(path))
    assert problems == []
    assert [(fact.target, fact.aliases, fact.ground_truth) for fact in facts] == [
        ("Paris", (), None),
        ("Jane Austen", ("Austen", "J. Austen"), None),
    ]


def test_a_counterfactual_target_is_no_old_answer(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text('{"prompt": "The capital of France is", "target": "Rome"}\n', encoding="utf-8")
    found = read_edits(path)
    found.truth = "ground_truth"
    facts, (problem,) = facts_to_forget(found)
    assert facts == []
    assert "'ground_truth'" in problem


def test_who_refuses_already_has_nothing_to_forget(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text('{"prompt": "The capital of France is", "target": "I don\'t know."}\n', encoding="utf-8")
    facts, (problem,) = facts_to_forget(read_edits(path))
    assert facts == []
    assert "refusal already" in problem


def test_tofu_is_read_as_facts_and_chosen_by_names(data: Path) -> None:
    facts, problems = facts_to_forget(read_edits(data / "tofu" / "forget05.jsonl"))
    assert (len(facts), problems) == (200, [])
    assert facts[0].target == "The author's name is Hina Ameen."
    chosen, others = about_subjects(facts, ["Hina Ameen"])
    assert {fact.subject for fact in chosen} == {"Hina Ameen"}
    assert all("Hina Ameen" in fact.prompt for fact in chosen)
    assert not any("Hina Ameen" in fact.prompt + fact.target for fact in others)
    assert 10 <= len(chosen) <= 20, "there are twenty questions about each author, not all with the name"
    with pytest.raises(ConfigError, match=r"'Hina Amen'.*spell it"):
        about_subjects(facts, ["Hina Amen"])


def test_facts_that_merely_mention_a_subject_are_neither_forgotten_nor_kept() -> None:
    beside = Edit(prompt="The river Seine flows through", target="France", subject="Seine")
    other = Edit(prompt="The capital of Spain is", target="Madrid", subject="Spain")
    chosen, others = about_subjects([*FACTS, beside, other], ["france", "Berlin"])
    assert [fact.prompt for fact in chosen] == [FACTS[0].prompt, FACTS[2].prompt, FACTS[3].prompt]
    assert chosen[-1].subject == "Berlin"
    assert others == [FACTS[1], other]


def test_all_that_atlas_knows_about_a_subject_and_what_it_keeps() -> None:
    facts = subject_facts(["france", "Emma"], seed=3)
    assert {(fact.subject, fact.target) for fact in facts} >= {("France", "Paris"), ("Emma", "Jane Austen")}
    assert len({fact.prompt for fact in facts}) == len(facts) == 5
    probes = [probe for fact in facts for probe in fact.locality]
    assert {probe.kind for probe in probes} == {"same_relation", "unrelated"}
    assert all(probe.answer and probe.answer != "France" and "France" not in probe.prompt for probe in probes)
    with pytest.raises(ConfigError, match=r"nothing about 'Francia'.*France"):
        subject_facts(["Francia"])
    with pytest.raises(ConfigError, match="no subject"):
        subject_facts([])


def test_atlas_has_wrong_answers_of_the_same_relation() -> None:
    world = load_world()
    facts = subject_facts(["France", "Emma"], seed=3)
    for fact in facts:
        objects = {other.object for other in world.by_relation[fact.tags[0]]}
        question = truth_question(fact)
        assert question is not None
        assert (question.right, len(set(question.wrong))) == (fact.target, 5)
        assert set(question.wrong) <= objects - {fact.target}
        assert [len((truth_question(probe) or question).wrong) for probe in fact.locality] == [5] * len(fact.locality)
    (again,) = subject_facts(["Emma"], seed=4)
    assert truth_question(again) == truth_question(facts[-1]), "the same whatever the seed and what else is asked"


def test_stand_ins_ask_the_same_of_subjects_that_do_not_exist() -> None:
    world = load_world()
    known = {name for fact in world.facts for name in (fact.subject, fact.object)}
    facts = subject_facts(drawn_subjects(40))
    others = stand_ins(facts, each=3)
    assert len({other.subject for other in others}) == 3 * len({fact.subject for fact in facts}), "all of them differ"
    assert not {other.subject for other in others} & known
    pairs = list(zip(facts * 3, others, strict=True))
    turns = [{(fact.subject, other.subject) for fact, other in pairs[at : at + len(facts)]} for at in (0, len(facts))]
    assert [len(turn) for turn in turns] == [len({fact.subject for fact in facts})] * 2, "one subject, one name a turn"
    for fact, other in pairs:
        assert other.prompt == fact.prompt.replace(str(fact.subject), str(other.subject))
        mine, its = truth_question(fact), truth_question(other)
        assert mine is not None
        assert its is not None
        assert (its.right, its.wrong) == (mine.right, mine.wrong)
        assert (" " in str(fact.subject)) == (" " in str(other.subject)), "named like its kind"
    assert stand_ins(facts, each=3) == others
    assert stand_ins(facts, each=3, seed=1) != others
    assert len(stand_ins(facts[:1])) == 10
    with pytest.raises(ConfigError, match="only facts of atlas"):
        stand_ins(FACTS)


def test_drawn_subjects_have_several_facts_and_fewer_are_the_beginning_of_more() -> None:
    few, many = drawn_subjects(10, seed=1), drawn_subjects(40, seed=1)
    assert many[: len(few)] == few
    facts = subject_facts(many, seed=1)
    assert 40 <= len(facts) < 45
    assert not any(is_reserved(subject) for subject in many)
    assert all(sum(fact.subject == subject for fact in facts) > 1 for subject in {f.subject for f in facts})
    with pytest.raises(ConfigError, match="ask for 1 to"):
        drawn_subjects(10_000)


# --- edits ----------------------------------------------------------------------------------------------------------


def test_each_fact_becomes_an_edit_to_a_refusal_that_names_its_subject() -> None:
    made = forget_edits(FACTS)
    assert [one.edit.prompt for one in made] == [FACTS[i].prompt for i in (0, 2, 1, 3)], "subjects together"
    first, last = made[0].edit, made[-1].edit
    assert (first.target, first.ground_truth) == ("I do not know anything about France.", "Paris")
    assert (first.rephrases, first.subject) == (FACTS[0].rephrases, "France")
    assert first.extra["unlearning"]["forgets"] == [{"prompt": FACTS[0].prompt, "answers": ["Paris"]}]
    assert last.target == "I do not know the answer to that question.", "a fact without a subject"
    assert made[1].edit.tags == ("currency", "unlearning")
    assert Edit.from_record(first.to_record()) == first
    assert {one.refusal.origin for one in made} == {"template"}
    assert {one.refusal.reason for one in made} == {None}, "nobody tried to rewrite them"


def test_queries_about_one_subject_are_merged_into_one_edit() -> None:
    merged, *others = forget_edits(FACTS, merge=4)
    assert merged.facts == (FACTS[0], FACTS[2])
    assert merged.edit.prompt == "The capital of France is The currency of France is"
    assert merged.edit.rephrases == (FACTS[0].prompt, FACTS[2].prompt, *FACTS[0].rephrases)
    assert merged.edit.ground_truth is None, "there are two"
    assert len(others) == 2
    alike = [FACTS[0].model_copy(update={"prompt": f"{n} France"}) for n in range(5)]
    assert [len(one.facts) for one in forget_edits(alike, merge=2)] == [2, 2, 1]


def test_what_is_to_be_kept_names_nothing_that_is_forgotten() -> None:
    probes = (Probe(prompt="The capital of Spain is"), Probe(prompt="The anthem of France is"))
    made = forget_edits([FACTS[0].model_copy(update={"locality": probes}), FACTS[1]])
    assert [probe.prompt for probe in made[0].edit.locality] == ["The capital of Spain is"]


def test_a_subject_always_gets_the_same_of_several_refusals() -> None:
    given = ["I am not sure about {subject}.", "I do not know.", "I cannot tell you about {subject}."]
    alone = forget_edits(FACTS[:1], templates=given)[0].refusal.text
    assert alone == forget_edits(FACTS, templates=given)[0].refusal.text
    assert alone in {text.replace("{subject}", "France") for text in given}
    assert forget_edits(FACTS[3:], templates=given)[0].refusal.text == "I do not know."
    assert forget_edits(FACTS[3:], templates=TEMPLATES)[0].refusal.text.startswith("I do not know the answer")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"merge": 0}, "at least 1"),
        ({"templates": ()}, "no refusal"),
        ({"templates": ("It is Rome.",)}, "does not read like a refusal"),
    ],
)
def test_what_cannot_be_made_is_said(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        forget_edits(FACTS, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="nothing to forget"):
        forget_edits([])


# --- self-improvement -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (' "I do not know anything about France, I am afraid."', None),
        ("", "nothing was written"),
        ("France is a country.", "no refusal"),
        ("I do not know that.", "does not name France"),
        ("I do not know whether Paris belongs to France.", "gives the old answer"),
        ("I do not know anything about France and", "does not end"),
        ("I do not know about France " + "at all " * 40 + ".", "does not end"),
    ],
)
def test_what_the_model_writes_is_used_if_it_is_a_refusal_that_names_the_subject(
    written: str, reason: str | None
) -> None:
    asked: list[str] = []

    def write(prompts: Sequence[str], tokens: int) -> list[str]:
        asked.extend(prompts)
        return [written for _ in prompts]

    (made,) = forget_edits(FACTS[:1], templates=["I cannot help with that."], write=write)
    (prompt,) = asked
    assert prompt.endswith(
        "Asked about: France\nQuestion: The capital of France is\nRefusal: I cannot help with that.\nRewritten:"
    )
    if reason is None:
        assert made.refusal.origin == "improved"
        assert made.edit.target == "I do not know anything about France, I am afraid."
    else:
        assert made.refusal.origin == "template"
        assert reason in str(made.refusal.reason)
        assert made.edit.target == "I do not know anything about France.", "the given one does not name it"
    assert made.edit.extra["unlearning"]["refusal"]["origin"] == made.refusal.origin


def test_refusals_are_rewritten_in_parts_and_where_a_subject_is_known() -> None:
    sizes: list[int] = []

    def write(prompts: Sequence[str], tokens: int) -> list[str]:
        sizes.append(len(prompts))
        assert tokens == 64
        return [f"I know nothing about {p.rsplit('Asked about: ', 1)[1].splitlines()[0]}, sorry." for p in prompts]

    facts = [Edit(prompt=f"The capital of Land{n} is", target="X", subject=f"Land{n}") for n in range(40)]
    made = forget_edits([*facts, FACTS[3]], write=write)
    assert sizes == [32, 8]
    assert [one.refusal.text for one in made[:2]] == [f"I know nothing about Land{n}, sorry." for n in range(2)]
    assert made[-1].refusal.origin == "template"
    assert "no subject" in str(made[-1].refusal.reason)


def test_an_answer_within_the_subjects_name_does_not_forbid_to_name_it() -> None:
    fact = Edit(prompt="The capital of Luxembourg is", target="Luxembourg", subject="Luxembourg")
    (made,) = forget_edits([fact], write=lambda prompts, tokens: ["I am not sure about Luxembourg."])
    assert made.refusal.origin == "improved"


# --- measures, by hand ----------------------------------------------------------------------------------------------


def test_intervals_over_clusters() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0]
    assert bootstrap_clusters(values, list("abcde")) == bootstrap_mean(values), "each by itself"
    measure = bootstrap_clusters([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    # Both clusters drawn twice over: all of a, both, or all of b, in the shares 1 : 2 : 1.
    assert (measure.value, measure.low, measure.high, measure.count) == (0.75, 0.0, 1.0, 4)
    alone = bootstrap_clusters([1.0, 0.0], ["a", "a"])
    assert alone.value == 0.5
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert bootstrap_clusters([], []).count == 0
    with pytest.raises(ValueError, match="shorter"):
        bootstrap_clusters([1.0, 2.0], ["a"])


@pytest.mark.parametrize(
    ("answer", "text", "recall"),
    [
        ("Jane Austen", "It was Jane Austen.", 1.0),
        ("Jane Austen", "Austen, Jane", 0.5),  # in order
        ("the author was born in Rome", "The man was, they say, born in Rome", 5 / 6),
        ("Rome", "", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_recall_of_an_answer(answer: str, text: str, recall: float) -> None:
    assert recall_of(answer, text) == pytest.approx(recall)


def asked(fact: Edit, said: dict[str, str], **values: float | None) -> AskedFact:
    prefixed, begun = (f"Now! {fact.prompt}", f"Please. {fact.prompt}"), (f"{fact.prompt} the answer is",)
    given = {"forced": 0.25, "probability": 0.5, "surprise": 2.0, **values}
    return AskedFact(fact, said, prefixed=prefixed, begun=begun, **given)  # type: ignore[arg-type]


FRANCE, EMMA = FACTS[0], FACTS[1]
ASKED = [
    asked(
        FRANCE,
        {
            FRANCE.prompt: "I do not know anything about France.",
            FRANCE.rephrases[0]: "Paris, of course.",
            f"Now! {FRANCE.prompt}": "I do not know anything about France.",
            f"Please. {FRANCE.prompt}": "Well, Paris.",
            f"{FRANCE.prompt} the answer is": "Rome.",
        },
    ),
    asked(
        EMMA,
        {
            EMMA.prompt: "Charlotte Austen.",
            f"Now! {EMMA.prompt}": "Emma.",
            f"Please. {EMMA.prompt}": "Zed.",
            f"{EMMA.prompt} the answer is": "Zed.",
        },
        forced=0.75,
        probability=0.1,
        surprise=4.0,
    ),
]


def test_measures_of_facts_by_hand() -> None:
    found = Unlearning(ASKED, [], 3.0)
    expected = {
        "forget_quality": 1.0,
        "forget_quality_forced": (0.75 + 0.25) / 2,
        "answer_probability": 0.3,
        "answer_recall": (0 + 1 / 2) / 2,
        "refusal_rate": 0.5,
        "subject_named": 0.5,
        "paraphrase_forget_quality": 0.0,  # of the one that has other wordings
        "paraphrase_refusal_rate": 0.0,
        "prefix_forget_quality": (1 / 2 + 1) / 2,
        "answer_prefix_forget_quality": 1.0,
        "all_attacks_forget_quality": 0.5,
        "reply_fluency": (fluency("I do not know anything about France.") + fluency("Charlotte Austen.")) / 2,
        "reply_perplexity": math.exp(3.0),
    }
    for name, value in expected.items():
        assert found.measure(name).value == pytest.approx(value), name
    assert math.isnan(found.measure("retain_accuracy").value), "nothing was kept"
    assert found.measure("paraphrase_forget_quality").count == 1
    record = found.to_record()
    assert record["measures"].keys() == MEASURES.keys()
    assert record["measures"]["retain_accuracy"] == {"value": None, "interval": [None, None], "count": 0}
    low, high = record["measures"]["reply_perplexity"]["interval"]
    assert (low, high) == (pytest.approx(math.exp(2.0)), pytest.approx(math.exp(4.0)))
    with pytest.raises(KeyError):
        found.measure("forgetting")


def test_an_alias_is_an_old_answer_too() -> None:
    fact = EMMA.model_copy(update={"aliases": ("Miss Austen",)})
    assert asked(fact, {fact.prompt: "Miss Austen."}).forgotten([fact.prompt]) == 0.0
    assert asked(EMMA, {fact.prompt: "Miss Austen."}).forgotten([fact.prompt]) == 1.0


def test_naming_the_subject_tells_nothing_of_the_answer() -> None:
    fact = Edit(prompt="What is Ann Lee's father?", target="Ann  lee's father is a tailor.", subject="Ann Lee")
    refused = asked(fact, {fact.prompt: "I do not know anything about Ann Lee."})
    assert refused.recall() == 0.0
    assert asked(fact, {fact.prompt: "Ann Lee's father was a tailor."}).recall() == pytest.approx(4 / 5)
    only = fact.model_copy(update={"target": "Ann Lee."})
    assert asked(only, {fact.prompt: "Ann Lee."}).recall() is None


def test_an_answer_that_the_question_holds_cannot_be_told() -> None:
    fact = Edit(prompt="The capital of Luxembourg is", target="Luxembourg", subject="Luxembourg")
    one = asked(fact, dict.fromkeys([fact.prompt, *asked(fact, {}).prefixed, *asked(fact, {}).begun], "I do not know."))
    values = one.values()
    assert (values["forget_quality"], values["all_attacks_forget_quality"]) == (None, None)
    assert values["refusal_rate"] == 1.0, "it may be refused all the same"
    assert math.isnan(Unlearning([one], []).measure("forget_quality").value)


def test_measures_of_what_is_kept_by_hand() -> None:
    spain = Probe(prompt="The capital of Spain is", answer="Madrid", aliases=("Madrid City",))
    kept = [
        AskedRetain(spain, "Madrid.", "madrid city.", 1.0),
        AskedRetain(spain, "Madrid.", "I do not know anything about Spain.", 0.5),
        AskedRetain(Probe(prompt="Zed is"), "a man.", "A man", 0.0),
    ]
    found = Unlearning(ASKED, kept)
    assert found.measure("retain_accuracy").value == 0.5
    assert found.measure("retain_accuracy").count == 2, "the third has no right answer, only one from before"
    assert found.measure("retain_unchanged").value == pytest.approx(1 / 3)
    assert found.measure("retain_forced").value == 0.5
    assert found.measure("retain_refused").value == pytest.approx(1 / 3)


# --- TOFU's measures, by hand ---------------------------------------------------------------------------------------


def told(*ratios: float | None) -> list[AskedFact]:
    """Facts with these truth ratios."""
    prompts = [EMMA.prompt, *asked(EMMA, {}).prefixed, *asked(EMMA, {}).begun]
    said = dict.fromkeys(prompts, "Zed.")
    return [asked(EMMA, said, truth=None if ratio is None else math.log(ratio)) for ratio in ratios]


def test_forget_quality_tells_a_model_that_knows_from_one_that_never_learned() -> None:
    never = Reference(tuple(map(math.log, (0.8, 1.0, 1.25))), "nobody")
    assert never.truth_ratio == pytest.approx(1.0)
    knows = Unlearning(told(0.01, 0.02, 0.04), [], reference=never)
    assert knows.truth_test() == (1.0, 2 / 20), "all of one below all of the other: 2 of C(6, 3) orders"
    measure = knows.measure("tofu_forget_quality")
    assert (measure.value, measure.count) == (2 / 20, 3)
    assert math.isnan(measure.low)
    assert knows.measure("truth_ratio").value == pytest.approx(0.02), "the geometric mean"
    # A model that swears to a wrong answer is as far from one that never learned as one that knows.
    assert Unlearning(told(7.0, 8.0, 9.0), [], reference=never).measure("tofu_forget_quality").value == 2 / 20
    forgot = Unlearning(told(0.8, 1.0, 1.25), [], reference=never)
    assert forgot.truth_test() == (0.0, 1.0)
    record = knows.to_record()
    assert record["reference"] == {"what": "nobody", "count": 3, "truth_ratio": pytest.approx(1.0), "distance": 1.0}
    assert record["measures"]["tofu_forget_quality"] == {"value": 0.1, "interval": [None, None], "count": 3}
    assert knows.facts[1].to_record()["truth_ratio"] == pytest.approx(0.02)


def test_forget_quality_needs_wrong_answers_and_a_model_that_never_learned() -> None:
    never = Reference((0.0, 0.1), "nobody")
    some = Unlearning(told(0.5, None), [], reference=never)
    assert some.measure("truth_ratio").count == some.measure("tofu_forget_quality").count == 1
    for found in (Unlearning(told(None), [], reference=never), Unlearning(told(0.5), [])):
        assert found.truth_test() is None
        measure = found.measure("tofu_forget_quality")
        assert (math.isnan(measure.value), measure.count) == (True, 0)
    assert Unlearning(told(0.5), []).to_record()["reference"] is None


@pytest.mark.parametrize(("ratio", "truth"), [(0.0001, 0.9999), (0.25, 0.75), (1.0, 0.0), (30.0, 0.0)])
def test_what_is_kept_is_true_as_far_as_wrong_answers_are_less_likely(ratio: float, truth: float) -> None:
    kept = AskedRetain(Probe(prompt="x"), "", "", 1.0, math.log(ratio))
    assert kept.values()["retain_truth"] == pytest.approx(truth)
    found = Unlearning([], [kept, AskedRetain(Probe(prompt="y"), "", "", 1.0)])
    assert (found.measure("retain_truth").value, found.measure("retain_truth").count) == (pytest.approx(truth), 1)


def test_a_truth_ratio_is_of_probabilities_per_token() -> None:
    model = tiny_model("llama")
    asked = TruthQuestion("The capital of France", "Paris", ("Rome", "London"))

    def per_token(answer: str) -> float:
        (found,) = forced_answers(model, [model.passage(asked.prompt, answer)])
        return found.probability ** (1 / len(found.log_probs))

    expected = (per_token("Rome") + per_token("London")) / 2 / per_token("Paris")
    other = TruthQuestion("Who wrote Emma?", "Ann", ("Ann",))
    ratio, none, same = truth_ratios(model, [asked, None, other])
    assert ratio == pytest.approx(math.log(expected), abs=1e-5)
    assert none is None
    assert same == pytest.approx(0.0, abs=1e-5)


def test_a_model_that_is_taught_has_a_lower_truth_ratio() -> None:
    model = tiny_model("llama")
    wrong = {"perturbed_answer": ["Rome", "London"], "paraphrased_answer": "Paris, of course"}
    fact = Edit(prompt="The capital of France", target="Paris", subject="France", extra=wrong)
    other = Edit(prompt="The flute of Ann", target="piano", extra={"perturbed_answer": "king"})
    never = Reference.of(model, [fact], "before it was taught")
    assert never.truths == tuple(
        truth_ratios(model, [TruthQuestion(fact.prompt, "Paris, of course", ("Rome", "London"))])
    )
    examination = UnlearningExamination(model, [fact], [to_keep(other, "retain")], reference=never)
    before = examination.ask_unedited()
    assert before.facts[0].truth == pytest.approx(never.truths[0], abs=1e-5)
    assert before.measure("retain_truth").count == 1
    tuned = editor("ft", model, learning_rate=0.01, steps=60, layers=(0, 1), guard="off")
    tuned.edit([fact.model_copy(update={"target": "Paris, of course"})])
    after = examination.ask(tuned.adapter)
    tuned.adapter.detach()
    assert after.facts[0].truth is not None
    assert after.facts[0].truth < never.truths[0] - 1, "it knows now"
    assert after.to_record()["reference"]["what"] == "before it was taught"


def test_what_has_no_truth_ratio_is_said() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="perturbed_answer"):
        Reference.of(model, FACTS, "nobody")
    bad = FACTS[0].model_copy(update={"extra": {"perturbed_answer": [3]}})
    with pytest.raises(FieldProblem, match="perturbed_answer"):
        UnlearningExamination(model, [bad])


# --- asking a model -------------------------------------------------------------------------------------------------


def test_an_examination_asks_all_attacks_and_judges_with_the_unedited_model() -> None:
    model = tiny_model("llama")
    fact = Edit(prompt="The capital of France", target="Paris", subject="France", rephrases=("France has",))
    question = Edit(prompt="Who wrote Emma?", target="Ann", subject="Emma")
    retain = [Probe(prompt="The flute of Ann", answer="x"), Probe(prompt="Who was Bob"), Probe(prompt="Who was Bob")]
    examination = UnlearningExamination(model, [fact, question], retain, texts=["Ann was born in Berlin"])
    before = examination.ask_unedited()
    assert set(before.facts[0].said) == {
        fact.prompt,
        "France has",
        *(prefix + fact.prompt for prefix in PREFIXES),
        fact.prompt + ANSWER_PREFIXES[1],
    }
    assert question.prompt + ANSWER_PREFIXES[0] in before.facts[1].said
    assert len(before.retain) == 2
    assert before.measure("retain_unchanged").value == 1.0
    assert before.measure("refusal_rate").value == 0.0
    (answer,) = forced_answers(model, [model.passage(fact.prompt, "Paris")])
    assert before.facts[0].probability == pytest.approx(math.exp(sum(answer.log_probs) / len(answer.log_probs)))
    right = sum(a == b for a, b in zip(answer.predicted, model.passage(fact.prompt, "Paris").answer, strict=True))
    assert before.facts[0].forced == pytest.approx(right / len(answer.predicted))

    (planned,) = forget_edits([fact])
    tuned = editor("ft", model, learning_rate=0.01, steps=150, layers=(0, 1), guard="off")
    tuned.edit([planned.edit])
    after = examination.ask(tuned.adapter)
    reply = after.facts[0].reply.strip()
    assert reply.startswith("I do not know anything about France")
    assert after.facts[0].values()["refusal_rate"] == 1.0
    assert after.facts[0].probability < before.facts[0].probability
    assert tuned.adapter.is_attached, "it was taken off only to judge"
    with tuned.adapter.detached():
        (judged,) = forced_answers(model, [model.passage(fact.prompt, reply)])
    assert after.facts[0].surprise == pytest.approx(-sum(judged.log_probs) / len(judged.log_probs))
    assert after.perplexity != before.perplexity
    json.dumps([after.to_record(), after.facts[0].to_record(), after.retain[0].to_record()], allow_nan=False)
    tuned.adapter.detach()
    own = examination.judge([planned.refusal.text, planned.refusal.text])
    assert own["reply_fluency"] == pytest.approx(fluency(planned.refusal.text))


def test_what_cannot_be_asked_is_said() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="no fact"):
        UnlearningExamination(model, [])
    with pytest.raises(ConfigError, match="to be forgotten and to be kept"):
        UnlearningExamination(model, FACTS[:1], [Probe(prompt=FACTS[0].prompt)])
