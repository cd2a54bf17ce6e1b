"""Studies of MemoryLLM: its pools side by side, theory, a long run that is interrupted. Tiny models, untrained networks."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from errata.adapters import PoolAdapter
from errata.adapters.pool import Pool
from errata.adapters.pool_network import PoolNetwork
from errata.atlas.documents import Question, document
from errata.datasets import write_edits
from errata.edit import Edit
from errata.editors.compression import Compression
from errata.editors.memoryllm import MemoryLLM
from errata.errors import ArtifactError, ConfigError
from errata.evaluation import Examination, run_singles
from errata.evaluation.metrics import answers_exactly, token_accuracy
from errata.evaluation.significance import trend
from errata.model import EditableModel
from errata.model.scoring import forced_answers
from errata.progress import NO_PROGRESS, SilentProgress
from errata.studies import memory_context, memory_edits, memory_long, memory_pools, study
from errata.studies.memory import beside_theory, expected
from errata.studies.memory_context import last_tokens
from errata.studies.memory_pools import Pools, groups, joined, memory_arm
from errata.studies.result import StudyResult
from errata.studies.workbench import StudyOptions, Workbench
from errata.testing import tiny_model

SMALL: dict[str, Any] = {"network": "untrained", "slots": 12, "new": 3}
ANY_SIZE = {"memoryllm": {"network": "untrained", "new": 2}}
EDITS = [
    Edit(
        prompt=f"The capital of {place}",
        target=target,
        subject=place,
        rephrases=(f"{place} has",),
        locality=[{"prompt": f"The flute of {place}", "kind": "same_relation"}],
        portability=[{"prompt": f"In {place}", "kind": "two_hop", "answer": "Emma"}],
    )
    for place, target in zip(("France", "Spain", "Ann"), ("Rome", "Paris", "London"), strict=True)
]


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return tiny_model("llama")


@pytest.fixture
def run(model: EditableModel, tmp_path: Path) -> Callable[..., StudyResult]:
    """A study by its name without the method's, in a folder of its own."""

    def run(name: str, *, progress: Any = NO_PROGRESS, **options: Any) -> StudyResult:
        given = {"settings": {"memoryllm": SMALL}, "quick": True, "folder": tmp_path / name, **options}
        return study(f"memoryllm-{name}").run(model, StudyOptions(**given), progress)

    return run


def bench_of(model: EditableModel, folder: Path, name: str = "retention", **settings: Any) -> Workbench:
    options = StudyOptions(folder=folder, settings={"memoryllm": {**SMALL, **settings}}, quick=True)
    return Workbench(study(f"memoryllm-{name}"), model, options, NO_PROGRESS)


def pools_of(model: EditableModel, folder: Path, count: int, **settings: Any) -> Pools:
    bench = bench_of(model, folder, **settings)
    return Pools(bench, memory_arm(bench), "test", count)


@pytest.fixture
def some_answers_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model answers nothing. Here what it says decides, in a way that tells two texts apart."""
    monkeypatch.setattr(memory_pools, "answers_exactly", lambda said, answer: sum(map(ord, said + answer)) % 3 == 0)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of all updates from now on."""
    seen: list[str] = []
    update = Pool.update

    def noted(self: Pool, tokens: Tensor, text: str) -> None:
        update(self, tokens, text)
        seen.append(text)

    monkeypatch.setattr(Pool, "update", noted)
    return seen


# --- pools side by side -----------------------------------------------------------------------------------------------


def test_each_pool_reads_its_own_texts_and_answers_out_of_them(model: EditableModel, tmp_path: Path) -> None:
    pools = pools_of(model, tmp_path, 3)
    prompts = ("Who was Ann?", "Bob wrote")
    with pools.attached():
        assert pools.read(["The capital of France is Rome.", None, "Zed plays the flute."]) == [[1], [], [1]]
        assert pools.read(["Emma", "Paris was London.", None]) == [[2], [1], []]
        assert pools.slots_of([[2], [1], []]) == [3, 3, 0]
        models = [adapter.model for adapter in pools.adapters]
        assert models[0] is model
        assert models[1] is models[2] is not model, "two threads read"
        said = [
            own.generate(prompts, adapters=name, max_new_tokens=memory_pools.ANSWER_TOKENS)
            for own, name in zip(models, pools.names, strict=True)
            if own is not None
        ]
        assert said[0] != said[1] != said[2] != said[0]
        own = [[Question(prompt, text, 0) for prompt, text in zip(prompts, texts, strict=True)] for texts in said]
        expected = [[int(answers_exactly(text, text)) for text in texts] for texts in said]
        assert sum(map(sum, expected)) >= 4, "what is said can be an answer at all"
        assert pools.ask(own) == expected
        assert pools.ask([own[1], own[2], own[0]]) != expected
    assert not model.adapters
    draws = [adapter.pool.generators[0].initial_seed() for adapter in pools.adapters]
    assert len(set(draws)) == 3, "each draws its own"


def test_long_texts_are_several_updates_or_their_first_chunk(model: EditableModel, tmp_path: Path) -> None:
    pools = pools_of(model, tmp_path, 2, chunk_tokens=5)
    texts = ["x" * 12, "y"]
    with pools.attached():
        assert pools.read(texts) == [[1, 2, 3], [1]]
        assert pools.read(texts, chunks=1) == [[4], [2]]
        assert pools.read(texts, chunks=2) == [[5, 6], [3]]


def test_texts_in_front_of_questions_are_read(model: EditableModel) -> None:
    text, question = "Bob wrote Hamlet.", Question("Who wrote", "", 0)
    (said,) = model.generate([f"{text} {question.prompt}"], max_new_tokens=memory_pools.ANSWER_TOKENS)
    (bare,) = model.generate([question.prompt], max_new_tokens=memory_pools.ANSWER_TOKENS)
    assert said != bare
    asked = [[Question(question.prompt, said, 0)], [Question(question.prompt, bare, 0)]]
    found = memory_pools.right_answers(model, asked, [text, ""])
    assert found == [[int(answers_exactly(said, said))], [int(answers_exactly(bare, bare))]]
    assert memory_pools.right_answers(model, asked[:1]) == [[0]]


def test_groups_are_joined_as_if_they_were_one() -> None:
    assert [list(one) for one in groups(5, 2)] == [[0, 1], [2, 3], [4]]
    parts = [{"slots": 4, "right": {"0": [[1], [0]]}, "left": [1]}, {"slots": 4, "right": {"0": [[1, 1]]}, "left": [2]}]
    assert joined(parts) == {"slots": 4, "right": {"0": [[1], [0], [1, 1]]}, "left": [1, 2]}


# --- how long, how much -----------------------------------------------------------------------------------------------


def test_theory_falls_from_what_is_known_at_once_to_what_is_known_anyway() -> None:
    curve = [expected(0.9, 0.1, 1 - 1 / 30, after) for after in (0, 1, 30, 10_000)]
    assert curve[0] == pytest.approx(0.9)
    assert curve[1] == pytest.approx(0.1 + 0.8 * 29 / 30)
    assert curve[2] == pytest.approx(0.1 + 0.8 * 0.3617, abs=1e-3), "after N/K texts, about 1/e of it"
    assert curve[3] == pytest.approx(0.1)
    assert np.allclose(expected(np.array([0.9, 0.5]), np.array([0.1, 0.5]), 0.5, 2), [0.3, 0.5])


@pytest.mark.parametrize(
    ("share_later", "verdict"), [(0.25 * 0.8 + 0.1, "as predicted"), (0.85, "above"), (0.1, "below")]
)
def test_measured_is_told_from_theory_where_documents_leave_no_doubt(share_later: float, verdict: str) -> None:
    rng = random.Random(0)

    def drawn(share: float) -> list[list[int]]:
        return [[int(rng.random() < share) for _ in range(3)] for _ in range(200)]

    rows = beside_theory({0: drawn(0.9), 2: drawn(share_later)}, drawn(0.1), 0.5)
    assert (rows[0]["verdict"], rows[0]["above_theory"]) == ("where theory begins", 0.0)
    later = rows[1]
    assert later["verdict"] == verdict
    assert later["theory"] == pytest.approx(0.25 * rows[0]["accuracy"] + 0.75 * 0.1, abs=0.03)
    assert later["above_theory"] == pytest.approx(later["accuracy"] - later["theory"])
    low, high = later["above_theory_interval"]
    assert low < later["above_theory"] < high < low + 0.25


def test_retention_counts_slots_and_goes_on_where_it_was_stopped(
    run: Callable[..., StudyResult], updates: list[str], some_answers_are_right: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"memoryllm": {**SMALL, "batch_size": 2}}

    class Stopped(SilentProgress):
        starts = 0

        def start(self, description: str, total: int | None = None, done: int = 0) -> None:
            self.starts += 1
            if self.starts == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("retention", settings=settings, progress=Stopped())
    once = 2 * (4 + 1 + 2)  # two pools: N/K others, the document, two more
    assert len(updates) == once
    found = run("retention", settings=settings)
    assert len(updates) == 2 * once, "the first group is known"
    assert [row["after"] for row in found.rows] == [0, 1, 2]
    assert [row["slots_left_theory"] for row in found.rows] == pytest.approx([1, 0.75, 0.75**2])
    assert found.rows[0]["slots_left"] == 1.0
    assert 0.5 < found.rows[1]["slots_left"] < 1.0
    assert {row["documents"] for row in found.rows} == {4}
    assert 0 < sum(row["accuracy"] for row in found.rows) < 3
    assert found.rows[0]["theory"] == pytest.approx(found.rows[0]["accuracy"])
    assert [row["what"] for row in found.tables[0].rows][1] == "no pool, no text"
    assert found.numbers["context"] == found.numbers["context_changed"], "an untrained network changes no weight"
    assert run("retention", settings=settings).rows == found.rows
    assert len(updates) == 2 * once
    monkeypatch.setattr(PoolNetwork, "digest", lambda self: "another network in the same folder")
    before = len(updates)
    run("retention", settings=settings)
    assert len(updates) == before + 2 * once


def test_what_is_asked_without_a_text_is_asked_before_it_is_read(
    run: Callable[..., StudyResult], updates: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []  # how many updates there were, how many questions
    ask = Pools.ask

    def noted(self: Pools, questions: Any) -> Any:
        asked.append((self.adapters[0].pool.updates, sum(map(len, questions))))
        return ask(self, questions)

    monkeypatch.setattr(Pools, "ask", noted)
    found = run("retention", edits=2)
    names = {document(number, part="test").text for number in range(2)}
    assert [place for place, _ in asked] == [4, 5, 6, 7]
    assert [place for place, text in enumerate(updates) if text in names] == [8, 9]
    assert found.rows[0]["questions"] == asked[0][1]


def test_capacity_varies_the_pool_and_what_stands_in_an_update(
    run: Callable[..., StudyResult], updates: list[str], some_answers_are_right: None
) -> None:
    found = run("capacity", edits=2, settings=ANY_SIZE)
    assert [(row["slots"], row["facts"]) for row in found.rows] == [(10, 3), (60, 2), (60, 3)]
    assert [row["updates_held"] for row in found.rows] == [5, 30, 30]
    # Of two documents: pools filled once per size, then the document and two others for each number of facts.
    assert len(updates) == 2 * (5 + 3 + 30 + 2 * 3)
    for row in found.rows:
        assert row["facts_answered"] == pytest.approx(row["facts"] * row["at_once"])
        assert {"after_1", "after_2", "without"} <= row.keys()
    assert found.rows[1]["tokens"] < found.rows[2]["tokens"]
    assert any("K = 2" in note and "fixed" in note for note in found.notes)


def test_pools_of_capacity_are_set_back_for_every_number_of_facts(
    run: Callable[..., StudyResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, Tensor]] = []
    ask = Pools.ask

    def noted(self: Pools, questions: Any) -> Any:
        seen.append((self.adapters[0].pool.updates, self.adapters[0].pool.states.clone()))
        return ask(self, questions)

    monkeypatch.setattr(Pools, "ask", noted)
    run("capacity", edits=1, settings=ANY_SIZE)
    first, second = seen[4], seen[8]  # after the smaller pool's, which has one number of facts
    assert first[0] == second[0] == 30
    assert torch.equal(first[1], second[1]), "as it was filled, before either document was read"


# --- out of a long context --------------------------------------------------------------------------------------------


def test_of_a_long_text_the_last_tokens_are_kept(model: EditableModel) -> None:
    prompts = ["Who wrote Hamlet?", "Ann was born in"]
    short = "Bob wrote Hamlet."
    assert last_tokens(model, short, prompts) == short
    text = " ".join(f"{number} plays the flute." for number in range(200))
    kept = last_tokens(model, text, prompts)
    assert text.endswith(kept)
    assert len(kept) > 100

    def longest(front: str) -> int:
        return max(len(model.passage(f"{front} {prompt}").ids) for prompt in prompts)

    limit = 256 - memory_pools.ANSWER_TOKENS
    assert longest(kept) <= limit
    more = text[-len(kept) - 8 :]
    assert longest(more) > limit, "as much as fits"
    assert last_tokens(model, text, ["x" * 250]) == ""


def test_a_model_without_a_limit_reads_all_of_it(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_context, "window_of", lambda model: None)
    assert last_tokens(model, "x" * 1000, ["y"]) == "x" * 1000


def test_contexts_hold_one_document_that_is_asked_about(model: EditableModel, tmp_path: Path) -> None:
    bench = bench_of(model, tmp_path, "context")
    pools = Pools(bench, memory_arm(bench), "", 0)
    for number in range(9):
        made = memory_context._context(bench, pools, number, 2000)
        asked = document(number, part="test", facts=6, segments=2)
        assert made.asked == asked
        assert [one.name for one in made.documents].count(asked.name) == 1
        third = 3 * (made.place + 0.5) / len(made.documents)
        assert int(third) == number % 3
        (ids,) = pools.tokens([made.text])
        assert 1500 < len(ids) <= 2000 + len(made.documents)
        assert [text for place, text in made.segments if place == made.place] == list(asked.segments)
        assert made.text == " ".join(text for _, text in made.segments)
    assert len(memory_context._context(bench, pools, 0, 10).documents) == 1


def test_context_is_read_piece_by_piece_and_compared_with_its_end(
    run: Callable[..., StudyResult], updates: list[str], some_answers_are_right: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_context, "_LENGTHS", (200, 700))
    found = run("context", edits=6)
    assert [(row["length"], row["place"]) for row in found.rows] == list(
        itertools.product((200, 700), ("anywhere", "first third", "middle third", "last third"))
    )
    few, many = found.rows[0], found.rows[4]
    assert few["documents"] == 6
    assert found.rows[1]["documents"] == 2
    assert (few["questions"], many["updates"] * 6) == (18, sum("." in text for text in updates) - 6 * few["updates"])
    assert many["tokens"] > 2.5 * few["tokens"]
    assert few["share_of_slots"] > many["share_of_slots"] > 0
    assert many["whole"] == 0.0
    for row in found.rows:
        assert row["ahead"] == pytest.approx(row["memory"] - row["last_tokens"])
        assert row["ahead_of_changed"] == pytest.approx(row["memory"] - row["last_tokens_changed"])
    assert many["last_tokens"] == many["last_tokens_changed"], "an untrained network changes no weight"
    assert {row["memory"] for row in found.rows} != {0.0}


# --- a million updates ------------------------------------------------------------------------------------------------


def answers(fall: float, count: int = 2000, seed: int = 0) -> tuple[list[int], list[float]]:
    rng = random.Random(seed)
    return list(range(count)), [float(rng.random() < 0.8 - fall * at / count) for at in range(count)]


def test_a_decline_is_found_and_a_flat_run_is_not_taken_for_one() -> None:
    falling = trend(*answers(0.2))
    assert falling.p < 0.001
    assert falling.p_decline < 0.001
    assert falling.low < -0.2 < falling.high < 0
    assert falling.change == pytest.approx(-0.2, abs=0.07)
    rising = trend(*answers(-0.2))
    assert rising.p < 0.001
    assert rising.p_decline > 0.999
    level = [trend(*answers(0, seed=seed), resamples=500) for seed in range(40)]
    assert sum(one.p < 0.05 for one in level) <= 6, "one in twenty by chance"
    assert sum(one.p_decline < 0.05 for one in level) <= 6
    assert sum(one.low <= 0 <= one.high for one in level) >= 30
    assert sum(abs(one.change) < one.detectable for one in level) >= 38
    assert level[0].detectable == pytest.approx(2.8 * math.sqrt(12 * 0.16 / 2000), rel=0.2)


def test_what_never_changes_has_no_trend_and_too_little_is_refused() -> None:
    never = trend([0, 5, 10, 20], [0.4] * 4)
    assert (never.change, never.low, never.high) == pytest.approx((0, 0, 0))
    assert (never.p, never.p_decline) == (1.0, 1.0)
    assert trend([0, 1, 2], [0.0, 0.5, 1.0]).change == pytest.approx(1.0)
    for places, values in (([0, 1], [1.0, 1.0]), ([0, 1, 2], [1.0, 1.0]), ([3, 3, 3], [1.0, 0.0, 1.0])):
        with pytest.raises(ValueError, match="are no run"):
            trend(places, values)


def test_values_that_follow_each_other_alike_are_no_trend() -> None:
    """Stretches of one colour would make a test that takes each value by itself find slopes far too often."""
    found = []
    for seed in range(40):
        rng = random.Random(seed)
        values = [value for _ in range(25) for value in [float(rng.random() < 0.5)] * 40]
        found.append(trend(range(len(values)), values, blocks=25, resamples=400).p < 0.05)
    assert sum(found) <= 6


class Interrupted(SilentProgress):
    """Stops a run after so many reports, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, count: int = 1, note: str = "") -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


LONG = {"memoryllm": {**SMALL, "batch_size": 3}}


@pytest.mark.parametrize("saved_every", [1, 4])  # rounds
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    run: Callable[..., StudyResult],
    updates: list[str],
    some_answers_are_right: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    saved_every: int,
) -> None:
    monkeypatch.setattr(memory_long, "_BLOCK", 5)
    options = {"settings": LONG, "edits": 36}
    whole = run("integrity", **options)
    assert len(updates) == 36
    assert 0 < sum(row["accuracy"] for row in whole.rows) < len(whole.rows)
    del updates[:]
    monkeypatch.setattr(memory_long, "_SAVE_SECONDS", 0.0)
    save = memory_long._State.save

    def sometimes(self: Any) -> None:
        if self.round % saved_every == 0:
            save(self)

    monkeypatch.setattr(memory_long._State, "save", sometimes)
    with pytest.raises(KeyboardInterrupt):
        run("integrity", **options, folder=tmp_path / "again", progress=Interrupted(7))
    assert len(updates) == 3 * 7
    with pytest.raises(KeyboardInterrupt):
        run("integrity", **options, folder=tmp_path / "again", progress=Interrupted(2))
    again = run("integrity", **options, folder=tmp_path / "again")
    assert again.rows == whole.rows, "to the last digit"
    assert again.numbers == whole.numbers
    gone_on_from = (7, 9) if saved_every == 1 else (4, 4)
    assert len(updates) == 3 * (7 + 2 + 12 - gone_on_from[1]), f"it went on from {gone_on_from}"
    del updates[:]
    assert run("integrity", **options, folder=tmp_path / "again").rows == whole.rows
    assert not updates, "nothing is made twice"


def test_a_state_that_cannot_be_read_is_named(run: Callable[..., StudyResult], tmp_path: Path) -> None:
    options = {"settings": LONG, "edits": 30}
    run("integrity", **options)
    (state,) = (tmp_path / "integrity" / "runs").glob("*/state.safetensors")
    state.write_bytes(state.read_bytes()[:100])
    (tmp_path / "integrity" / "rows.jsonl").unlink()
    with pytest.raises(ArtifactError, match=r"state\.safetensors cannot be read .*delete it to begin again"):
        run("integrity", **options)


def test_integrity_watches_the_slots_and_asks_about_the_newest_text(
    run: Callable[..., StudyResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    held: list[PoolAdapter] = []
    ask = Pools.ask

    def noted(self: Pools, questions: Any) -> Any:
        held[:] = self.adapters
        for adapter, (question,) in zip(self.adapters, questions, strict=True):
            asked.append(question.prompt)
            assert adapter.pool.texts[adapter.pool.updates] in question.prompt, "each pool about what it read last"
        return ask(self, questions)

    monkeypatch.setattr(Pools, "ask", noted)
    found = run("integrity", settings=LONG, edits=120)
    assert found.numbers["updates"] == 120
    assert found.numbers["updates_per_pool"] == 40
    assert len(asked) == 3 * 20, "every second round of 40"
    assert sum(row["asked"] for row in found.rows) == 60
    last = found.rows[-1]
    states = torch.stack([adapter.pool.states for adapter in held])
    assert last["norm_2"] == pytest.approx(float(states[:, 2].norm(dim=-1).mean()), rel=1e-5)
    assert last["largest_norm"] == pytest.approx(float(states.norm(dim=-1).max()), rel=1e-5)
    assert (last["updates"], last["updates_per_pool"], last["finite"]) == (120, 40, 1.0)
    assert found.rows[0]["mean_norm"] == pytest.approx(last["mean_norm"], rel=0.5), "empty slots have no say"
    assert "no decline is seen" in found.found
    with pytest.raises(ConfigError, match="give at least 9"):
        run("integrity", settings=LONG, edits=8)


def test_a_million_updates_are_asked_about_more_than_twenty_thousand_times(
    run: Callable[..., StudyResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def planned(bench: Any, arm: Any, rounds: int, every: int, folder: Path) -> dict[str, Any]:
        seen.append((rounds, every))
        hits = [12 + (at % 3) - 1 for at in range(rounds // every)]
        looks = [
            {"round": rounds * part // 20, "norms": [1.0] * 4, "largest": 2.0, "finite": 1.0} for part in range(1, 21)
        ]
        return {"hits": hits, "checkpoints": looks, "refused": 0}

    monkeypatch.setattr(memory_long, "_run", planned)
    found = run("integrity", quick=False)
    assert seen == [(62_500, 40)]
    assert found.numbers["pools"] == 16
    assert 24_900 < found.numbers["questions"] <= 25_000, "but for those of young pools"
    assert found.numbers["accuracy"] == pytest.approx(12 / 16, abs=1e-3)


def test_updates_that_are_not_finite_are_counted_and_the_run_goes_on(
    run: Callable[..., StudyResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, calls = Compression.__call__, itertools.count()

    def broken(self: Compression, adapters: Any, chunks: Any) -> list[Tensor]:
        made = call(self, adapters, chunks)
        return [torch.full_like(made[0], math.nan), *made[1:]] if next(calls) == 5 else made

    monkeypatch.setattr(Compression, "__call__", broken)
    found = run("integrity", settings=LONG, edits=36)
    assert found.numbers["refused"] == 1
    assert found.rows[-1]["finite"] == 1.0
    assert any("1 updates gave numbers that are not finite" in note for note in found.notes)


def test_texts_of_a_long_run_are_each_read_once_and_alike_within_a_round(model: EditableModel, tmp_path: Path) -> None:
    bench = bench_of(model, tmp_path, "integrity")
    pools = Pools(bench, memory_arm(bench), "", 4)
    texts = memory_long._Texts(bench, pools)
    rounds = [texts.of_round(number) for number in range(2 * memory_long._BLOCK)]
    told = [one.name for own in rounds for one, _ in own]
    assert sorted(told) == sorted(document(number, part="test").name for number in range(len(told)))
    spread = [max(len(ids) for _, ids in own) - min(len(ids) for _, ids in own) for own in rounds]
    assert sum(spread) / len(spread) < 10, "of documents that differ by a hundred tokens"
    lengths = [len(own[0][1]) for own in rounds]
    assert lengths[: memory_long._BLOCK] != sorted(lengths[: memory_long._BLOCK])
    fresh = memory_long._Texts(bench, pools)
    assert fresh.of_round(70) == rounds[70], "it can be gone on with anywhere"


# --- edits ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def edits_file(tmp_path: Path) -> Path:
    write_edits(tmp_path / "edits.jsonl", EDITS)
    return tmp_path / "edits.jsonl"


def test_single_edits_of_a_memory_are_each_made_into_an_empty_pool(model: EditableModel) -> None:
    editor = MemoryLLM(model, **SMALL)
    try:
        made = run_singles(editor, Examination(model, EDITS))
        assert editor.adapter.pool.is_empty
    finally:
        editor.adapter.detach()
    assert made.applied == 3
    for edit, asked in zip(EDITS, made.result.asked, strict=True):
        alone = MemoryLLM(model, **SMALL)
        alone.edit([edit])
        assert asked.said[edit.prompt] == model.generate([edit.prompt], max_new_tokens=32)[0]
        alone.adapter.detach()
        assert asked.said[edit.prompt] != model.generate([edit.prompt], max_new_tokens=32)[0]


def test_a_memory_is_compared_with_other_editors_and_with_the_prompt(
    run: Callable[..., StudyResult], edits_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"memoryllm": SMALL, "ft": {"steps": 60, "learning_rate": 0.01}}
    options = {"settings": settings, "methods": ("memoryllm", "ft"), "data": edits_file}
    found = run("edits", **options)
    assert [row["run"] for row in found.rows] == [
        "memoryllm, alone",
        "memoryllm, 2 in sequence",
        "ft, alone",
        "ft, 2 in sequence",
        "in the prompt, alone",
        "in the prompt, 2 in sequence",
        "unedited",
    ]
    rows = {row["run"]: row for row in found.rows}
    assert rows["ft, alone"]["reliability_forced"] == 1.0
    assert (rows["ft, alone"]["edits"], rows["ft, 2 in sequence"]["edits"]) == (3, 2)
    assert (rows["unedited"]["locality"], rows["unedited"]["reliability"]) == (1.0, 0.0)
    assert all({"portability", "near_locality", "reliability_interval"} <= row.keys() for row in found.rows)
    assert rows["in the prompt, 2 in sequence"]["statements"] == 2
    monkeypatch.setattr(memory_edits, "run_singles", None)
    assert run("edits", **options).rows == found.rows, "nothing is made twice"


def test_what_is_said_in_front_is_read_and_compared_with_what_was_said_without_it(model: EditableModel) -> None:
    examination = memory_edits._BehindText(model, EDITS)
    examination.ask_base()
    plain = Examination(model, EDITS)
    unedited = plain.ask_unedited()
    assert examination.ask().asked[0].said == unedited.asked[0].said
    examination.in_front = "The capital of France is Rome."
    (asked,) = examination.ask(EDITS[:1]).asked
    prompts = [EDITS[0].prompt, EDITS[0].locality[0].prompt]
    behind = model.generate([f"{examination.in_front} {prompt}" for prompt in prompts], max_new_tokens=32)
    assert [asked.said[prompt] for prompt in prompts] == behind
    assert behind[1] != unedited.asked[0].said[prompts[1]]
    assert asked.locality[0][0] == 0.0, "against what was said without the text"
    passage = model.passage(f"{examination.in_front} {EDITS[0].prompt}", EDITS[0].target)
    (forced,) = forced_answers(model, [passage])
    assert asked.reliability[0][2] == token_accuracy(forced.predicted, passage.answer)


def test_the_newest_statements_are_kept_where_not_all_fit(model: EditableModel, tmp_path: Path) -> None:
    bench = bench_of(model, tmp_path, "edits")
    wordy = [edit.model_copy(update={"prompt": f"{edit.prompt} {'x' * 80}"}) for edit in EDITS]
    row = memory_edits._said_together(bench, wordy)
    assert row["statements"] == 1
    assert memory_edits._said_together(bench, EDITS)["statements"] == 3


# --- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["retention", "capacity", "integrity", "edits", "context"])
def test_a_network_is_needed(run: Callable[..., StudyResult], edits_file: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="errata train memoryllm"):
        run(name, settings={}, data=edits_file)
    assert not (tmp_path / name).exists()


def test_what_capacity_varies_cannot_be_set(run: Callable[..., StudyResult]) -> None:
    with pytest.raises(ConfigError, match=r"varies memoryllm\.slots itself; leave"):
        run("capacity")
