"""Metrics over texts, rankings, sequences and pairs of methods, against answers worked out by hand."""

from __future__ import annotations

import math
from math import log

import numpy as np
import pytest

from errata.evaluation.lifelong import capability_drop, collapse_point, forgetting, locality_drift
from errata.evaluation.metrics import Score, answers_exactly, best_answer, contains, token_f1, wilson_interval
from errata.evaluation.preference import CounterFactScores, OverfittingScores, Preference, harmonic_mean
from errata.evaluation.significance import (
    cohen_kappa,
    compare_methods,
    holm,
    kolmogorov_smirnov,
    mcnemar,
    sign_flip_test,
)
from errata.evaluation.texts import consistency, fluency, ngram_entropy, words_of


@pytest.mark.parametrize(
    ("generated", "answer", "expected"),
    [
        (" Rome", "Rome", 1.0),
        (" in Rome, Italy", "Rome", 0.5),  # one of three words, all of one: 2 · 1 / (3 + 1)
        (" Rome Rome", "Rome", 2 / 3),  # a word counts as often as it is there
        (" New York", "York New", 1.0),  # without order
        (" Zürich", "zürich.", 1.0),
        (" Paris", "Rome", 0.0),
        (" Washington", "Washington D.C.", 2 / 3),  # the beginning of an answer: 2 · 1 / (1 + 2)
        (" Washington D.C.", "Washington", 2 / 3),
        (" São Tomé and the Príncipe", "Príncipe and São Tomé", 1.0),
        (" 東京都", "東京", 0.0),  # words are what stands between spaces
        ("", "Rome", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_f1(generated: str, answer: str, expected: float) -> None:
    assert token_f1(generated, answer) == pytest.approx(expected)


def test_the_best_of_several_right_answers_counts() -> None:
    names = ["United Kingdom", "UK", "U.K."]
    assert best_answer(answers_exactly, " the UK.", names) == 1.0
    assert best_answer(contains, " in the United Kingdom of old", names) == 1.0
    assert best_answer(token_f1, " United States", names) == 0.5
    assert best_answer(token_f1, " Rome", []) == 0.0


def test_entropy_of_ngrams() -> None:
    words = words_of("A b, a b")
    assert words == ["a", "b", ",", "a", "b"]
    # Pairs: (a b) twice, (b ,) and (, a) once each: 1/2 · 1 + 1/4 · 2 + 1/4 · 2 bits.
    assert ngram_entropy(words, 2) == pytest.approx(1.5)
    assert ngram_entropy(["a", "a", "a"], 2) == 0.0
    assert ngram_entropy(["a"], 2) == ngram_entropy([], 1) == 0.0


def test_fluency_weighs_pairs_and_triples() -> None:
    # "a b a b": pairs 2/3 and 1/3, triples 1/2 and 1/2.
    pairs, triples = log(3) / log(2) - 2 / 3, 1.0
    assert fluency("a b a b") == pytest.approx(100 * (2 / 3 * pairs + 4 / 3 * triples) / 2)
    assert fluency("no no no no no no") == 0.0
    assert fluency("") == 0.0


def test_consistency_weighs_rare_words() -> None:
    # Two documents: "rome" is in both (weight 1), "paris" in one (weight ln(3/2) + 1).
    weight = log(3 / 2) + 1
    assert consistency("Rome Rome Paris", ["Rome"]) == pytest.approx(2 / math.hypot(2, weight))
    assert consistency("Rome", ["Rome", "Rome"]) == pytest.approx(1.0)
    assert consistency("Rome", ["Paris"]) == 0.0
    assert consistency("", ["Rome"]) == consistency("Rome", []) == 0.0
    # Of three documents one names Paris and all name Rome: Rome counts for less than Paris.
    corpus = ["rome paris", "rome", "rome"]
    rare = log(4 / 2) + 1
    assert consistency("Rome Paris", ["Paris"], corpus) == pytest.approx(rare / math.hypot(1, rare))


def test_counterfact_scores() -> None:
    def of(new: float, true: float) -> Preference:
        return Preference(log(new), log(true))

    scores = CounterFactScores.of(
        [of(0.5, 0.25), of(0.1, 0.2)],
        [[of(0.5, 0.25), of(0.25, 0.5), of(0.75, 0.25)], []],  # the second edit has no other wording
        [[of(0.1, 0.3)], [of(0.4, 0.2), of(0.2, 0.2)]],  # a tie is for neither
    )
    assert scores.efficacy == 0.5
    assert scores.efficacy_magnitude == pytest.approx((0.25 - 0.1) / 2)
    assert scores.paraphrase == pytest.approx(2 / 3)
    assert scores.paraphrase_magnitude == pytest.approx((0.25 - 0.25 + 0.5) / 3)
    assert scores.neighbourhood == pytest.approx((1 + 0) / 2)  # per edit first
    assert scores.neighbourhood_magnitude == pytest.approx((0.2 + (-0.2 + 0) / 2) / 2)
    assert scores.score == pytest.approx(3 / (2 + 3 / 2 + 2))
    assert math.isnan(CounterFactScores.of([of(0.5, 0.25)], [[]], [[]]).score)


def test_a_property_that_is_lost_whole_takes_the_score_with_it() -> None:
    assert harmonic_mean([1.0, 1.0, 0.0]) == 0.0
    assert harmonic_mean([0.5, 1.0, 1.0]) == pytest.approx(0.75)
    assert harmonic_mean([]) == 0.0


def test_overfitting_scores() -> None:
    scores = OverfittingScores.of([0.5, 0.1], [0.2, 0.3], [0.1, 0.1])
    assert (scores.correct, scores.direct) == pytest.approx((0.3, 0.25))
    assert (scores.overfitting, scores.modified) == (0.5, 0.5)
    assert math.isnan(OverfittingScores.of([0.5], [0.2]).modified)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        OverfittingScores.of([0.5, 0.1], [0.2])


def test_forgetting_is_the_fall_from_the_best() -> None:
    # The first edit is lost at the end; the second took late and is there; the third was never asked before.
    assert forgetting([[1.0], [1.0, 0.0, None], [0.0, 1.0, 1.0]]) == pytest.approx(1 / 3)
    assert forgetting([[0.0], [0.0]]) == 0.0
    for nothing in ([], [[]], [[1.0, None]]):
        with pytest.raises(ValueError, match="asked at the last checkpoint"):
            forgetting(nothing)


def test_drift_is_locality_lost_per_hundred_edits() -> None:
    assert locality_drift([(0, 1.0), (100, 0.9), (200, 0.8)]) == pytest.approx(0.1)
    assert locality_drift([(0, 0.9), (50, 1.0)]) == pytest.approx(-0.2)
    assert locality_drift([(10, 1.0)]) == locality_drift([]) == 0.0


def test_what_a_capability_lost() -> None:
    assert capability_drop(0.8, 0.6) == pytest.approx(0.25)
    assert capability_drop(0.5, 0.6) == pytest.approx(-0.2)
    with pytest.raises(ValueError, match="cannot drop"):
        capability_drop(0.0, 0.0)


def test_where_a_model_collapses() -> None:
    assert collapse_point({10: 2.0, 20: 20.0, 30: 20.1, 40: 3.0}, base=2.0) == 30
    assert collapse_point({10: math.nan, 20: math.inf}, base=2.0) == 20
    assert collapse_point({10: 2.0, 30: 99.0}, {20: [0.9, 0.2], 25: [0.5, 0.5], 5: []}, base=2.0) == 20
    assert collapse_point({10: 2.0}, {10: [0.5]}, base=2.0) is None


def test_wilson_intervals() -> None:
    # Worked out from the formula; the same as published tables.
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178))
    assert wilson_interval(10, 10) == pytest.approx((0.7224672, 1.0))
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775328))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="11 successes of 10"):
        wilson_interval(11, 10)


def test_only_shares_of_edits_have_wilson_intervals() -> None:
    share = Score.of([1.0] * 8 + [0.0] * 2, [1.0] * 10, [0.5] * 10, [0.25] * 10)
    assert share.wilson == wilson_interval(8, 10)
    record = share.to_record()
    assert record["wilson_interval"] == [0.490162, 0.943318]
    assert (record["f1"], record["contains"], record["teacher_forced"]) == (0.25, 1.0, 0.5)
    # Two prompts an edit, one of them right: no longer a share of edits.
    assert Score.of([1.0, 0.5], [1.0, 0.5], [1.0, 0.5], [1.0, 0.5]).wilson is None
    assert Score.of([], [], [], []).to_record()["wilson_interval"] is None


def test_mcnemar_counts_what_the_methods_disagree_on() -> None:
    first, second = [True] * 8 + [False] + [True] * 50, [False] * 8 + [True] + [True] * 50
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar([True, False], [True, False]) == 1.0
    assert mcnemar([True], [False]) == 1.0


def test_kolmogorov_smirnov_counts_orders() -> None:
    # Of the C(4, 2) orders of two and two values, two have all of one sample before all of the other.
    assert kolmogorov_smirnov([1.0, 2.0], [3.0, 4.0]) == (1.0, 2 / 6)
    assert kolmogorov_smirnov([4.0, 5.0, 6.0], [1.0, 2.0, 3.0]) == (1.0, 2 / 20)
    assert kolmogorov_smirnov([1.0, 3.0], [2.0, 4.0]) == (0.5, 1.0)  # no order of two and two comes nearer
    assert kolmogorov_smirnov([1.0, 2.0, 2.0], [2.0, 1.0, 2.0]) == (0.0, 1.0)
    # At 1 all of the single value, none of three: as far apart as in 2 of 4 orders.
    assert kolmogorov_smirnov([1.0], [2.0, 3.0, 4.0]) == (1.0, 2 / 4)
    with pytest.raises(ValueError, match="one at least"):
        kolmogorov_smirnov([], [1.0])
    with pytest.raises(ValueError, match="give numbers"):
        kolmogorov_smirnov([math.nan], [1.0])


def test_kolmogorov_smirnov_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for n, m, shift in ((5, 8, 0.5), (42, 42, 0.0), (42, 42, 3.0), (42, 17, 0.3), (100, 60, 0.2)):
        for digits in (9, 0):  # without ties and with
            first, second = rng.normal(size=n).round(digits), (rng.normal(size=m) + shift).round(digits)
            expected = stats.ks_2samp(first, second, method="exact")
            distance, p = kolmogorov_smirnov(first, second)
            assert (distance, p) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue, rel=1e-9))
    first, second = rng.normal(size=600), rng.normal(size=700) + 0.1
    exact = stats.ks_2samp(first, second, method="exact").pvalue
    assert kolmogorov_smirnov(first, second)[1] == pytest.approx(exact, rel=0.1), "the limit"
    assert kolmogorov_smirnov(first, first) == (0.0, 1.0)


def test_kappa_is_agreement_beyond_chance() -> None:
    # 20 both yes, 15 both no, 5 and 10 apart: agree on 0.7, by chance on 0.6 · 0.5 + 0.4 · 0.5 = 0.5.
    first = [True] * 20 + [True] * 10 + [False] * 5 + [False] * 15
    second = [True] * 20 + [False] * 10 + [True] * 5 + [False] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa([True, False], [True, False]) == 1.0
    assert cohen_kappa([True, False], [False, True]) == -1.0
    assert math.isnan(cohen_kappa([True, True], [True, True]))
    assert math.isnan(cohen_kappa([], []))
    with pytest.raises(ValueError, match="shorter"):
        cohen_kappa([True, True], [True])


def test_sign_flips() -> None:
    assert sign_flip_test([1.0, 1.0, 1.0]) == pytest.approx(2 / 8)
    assert sign_flip_test([3.0, -1.0]) == 1.0  # ± 3 ± 1 is never nearer to 0 than 2
    assert sign_flip_test([0.0, 0.0]) == sign_flip_test([]) == 1.0
    assert sign_flip_test([0.1, 0.2, 0.3]) == pytest.approx(2 / 8)
    # Twenty equal differences: two of 2²⁰ patterns; of 10,000 random ones most likely none.
    assert sign_flip_test([1.0] * 20) < 0.001
    balanced = [1.0, -1.0] * 20
    assert sign_flip_test(balanced) == 1.0
    assert sign_flip_test(balanced) == sign_flip_test(balanced)


def test_holm_adjusts_for_the_number_of_comparisons() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_methods_are_compared_on_the_same_edits() -> None:
    scores = {"good": [1.0] * 30, "bad": [0.0] * 30, "twin": [1.0] * 30}
    better, same, worse = compare_methods(scores)
    assert (better.first, better.second, better.difference) == ("good", "bad", 1.0)
    assert better.adjusted_p == pytest.approx(3 * better.p)
    assert better.adjusted_p < 0.05
    assert (same.difference, same.p, same.adjusted_p) == (0.0, 1.0, 1.0)
    assert (worse.first, worse.difference) == ("bad", -1.0)
    assert better.to_record()["low"] == 1.0
    assert (better.p, better.test) == (mcnemar([True] * 30, [False] * 30), "mcnemar")
    (shares,) = compare_methods({"one": [1.0, 0.5, 0.5], "other": [0.5, 0.0, 0.0]})
    assert (shares.p, shares.test) == (2 / 8, "permutation")
    with pytest.raises(ValueError, match="longer"):
        compare_methods({"one": [1.0], "two": [1.0, 0.0]})
