"""The numbers of a report: those of the metrics module, and intervals and tests as SciPy has them."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from paragraph_ocr.metrics import ReadingErrors
from paragraph_ocr.reading.evaluation import RATES, Evaluation, Read, compare


def read(pairs, *, confidence=0.9, writers=None):
    """Return (reading, truth) pairs as paragraphs that were read."""
    return [
        Read(
            row,
            f"page {row}",
            writers[row] if writers else "",
            truth,
            reading,
            (confidence,) * len(reading),
        )
        for row, (reading, truth) in enumerate(pairs)
    ]


def scribbled(count, *, share, seed=0):
    """Return pairs whose readings have about that share of characters wrong."""
    generator = random.Random(seed)
    pairs = []
    for _ in range(count):
        truth = "".join(generator.choice("abcde \n") for _ in range(generator.randrange(5, 60)))
        reading = ""
        for character in truth:
            fate = generator.random()
            if fate < share / 3:
                continue
            reading += "x" if fate < 2 * share / 3 else character
            reading += "y" if fate > 1 - share / 3 else ""
        pairs.append((reading, truth))
    return pairs


@pytest.mark.parametrize(
    "pairs",
    [
        scribbled(60, share=0.3),
        scribbled(5, share=0.0),
        [("", "abc"), ("abc", "")],
        [("x", "")],
        [("", "")],
        [("a  b", "a b"), ("a\nb", "a b")],
    ],
)
def test_rates_are_those_of_the_metrics_module(pairs):
    measured = ReadingErrors()
    measured.update([reading for reading, _ in pairs], [truth for _, truth in pairs])
    rates = Evaluation(read(pairs), resamples=50).rates
    for name, value in measured.compute().items():
        assert rates[name].value == value
    for estimate in rates.values():
        assert estimate.low <= estimate.value <= estimate.high or math.isinf(estimate.value)


def test_the_mean_of_paragraphs_lets_a_short_note_weigh_as_a_page():
    evaluation = Evaluation(read([("y", "x"), ("a" * 99, "a" * 99)]), resamples=10)
    assert evaluation.rates["cer"].value == pytest.approx(0.01)
    assert evaluation.rates["cer_mean"].value == pytest.approx(0.5)


def test_intervals_agree_with_scipys_bootstrap():
    evaluation = Evaluation(read(scribbled(80, share=0.3)), resamples=4000)
    errors, characters = evaluation.counts["character_errors"], evaluation.counts["characters"]

    def pooled(errors, characters, axis=-1):
        return errors.sum(axis=axis) / characters.sum(axis=axis)

    reference = stats.bootstrap(
        (errors, characters),
        pooled,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
        random_state=1,
    ).confidence_interval
    width = reference.high - reference.low
    assert evaluation.rates["cer"].low == pytest.approx(reference.low, abs=0.1 * width)
    assert evaluation.rates["cer"].high == pytest.approx(reference.high, abs=0.1 * width)


def test_the_paired_test_agrees_with_scipys_permutation_test():
    better, worse = scribbled(40, share=0.27), scribbled(40, share=0.33)
    pairs = [(reading, truth) for (reading, _), (_, truth) in zip(worse, better, strict=True)]
    a, b = (Evaluation(read(pairs), resamples=50) for pairs in (better, pairs))
    reference = stats.permutation_test(
        (a.counts["character_errors"], b.counts["character_errors"]),
        lambda x, y, axis=-1: (x - y).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
        random_state=1,
    ).pvalue
    compared = compare(a, b)
    assert compared.p_value == pytest.approx(reference, abs=0.02)
    assert compared.better + compared.worse <= 40


def test_a_model_differs_from_itself_by_nothing():
    evaluation = Evaluation(read(scribbled(30, share=0.2)), resamples=100)
    compared = compare(evaluation, evaluation)
    assert compared.p_value == 1.0
    assert all(tuple(difference) == (0, 0, 0) for difference in compared.differences.values())
    assert (compared.better, compared.worse) == (0, 0)


def test_a_clear_difference_is_found():
    truths = [truth for _, truth in scribbled(60, share=0)]
    right = Evaluation(read([(truth, truth) for truth in truths]), resamples=200)
    wrong = Evaluation(read([(truth[1:], truth) for truth in truths]), resamples=200)
    compared = compare(right, wrong)
    assert compared.p_value < 0.001
    assert compared.differences["cer"].high < 0 < compared.differences["exact"].low
    assert (compared.better, compared.worse) == (60, 0)


def test_other_paragraphs_are_not_compared():
    with pytest.raises(ValueError):
        compare(Evaluation(read([("a", "a")])), Evaluation(read([("a", "b")])))


def test_the_kinds_of_errors_add_up_to_the_character_errors():
    evaluation = Evaluation(read(scribbled(50, share=0.4)), resamples=10)
    assert sum(evaluation.kinds.values()) == evaluation.counts["character_errors"].sum()


def test_confusions_say_what_was_true_and_what_was_written():
    evaluation = Evaluation(read([("cat", "hat"), ("ct", "cat"), ("caat", "cat")]), resamples=10)
    assert evaluation.edits == {("h", "c"): 1, ("a", ""): 1, ("", "a"): 1}
    assert evaluation.kinds == {"substitutions": 1, "insertions": 1, "deletions": 1}
    assert evaluation.occurrences["a"] == 3


def test_groups_hold_each_paragraph_once_in_order():
    pairs = [("a\nb", "a\nb"), ("c", "d"), ("e" * 30, "e" * 30), ("f" * 900, "f" * 900)]
    evaluation = Evaluation(read(pairs, writers=["ann", "bob", "ann", "ann"]), resamples=10)
    lines, lengths = evaluation.groups("lines"), evaluation.groups("length")
    assert {name: count for name, (count, _) in lines.items()} == {"1 line": 3, "2 lines": 1}
    assert [*lengths] == ["up to 25 characters", "26 to 50 characters", "over 800 characters"]
    writers = evaluation.groups("writer")
    assert writers["bob"][1]["cer"].value == 1.0
    assert writers["ann"][1]["cer"].value == 0.0


def test_there_are_no_groups_of_unknown_writers():
    assert Evaluation(read([("a", "a")])).groups("writer") == {}


def test_confidence_is_compared_with_being_right():
    sure = read([("aaaa", "aaab")], confidence=0.75)
    calibration = Evaluation(sure, resamples=10).calibration
    assert [(b.count, b.confidence, b.right) for b in calibration.bins] == [(4, 0.75, 0.75)]
    assert calibration.error == 0
    bragging = Evaluation(read([("ab", "xy")], confidence=1.0), resamples=10).calibration
    assert bragging.error == 1


def test_looking_through_the_least_confident_finds_their_errors():
    doubtful = read([("xx", "ab")], confidence=0.2)
    certain = read([("cd", "cd"), ("ef", "ef"), ("gx", "gh")], confidence=0.9)
    evaluation = Evaluation(doubtful + certain, resamples=10)
    assert evaluation.review(0.25) == (pytest.approx(2 / 3), pytest.approx(1 / 6))
    assert evaluation.review(0.0) == (0, pytest.approx(3 / 8))


def test_worst_and_best_are_by_rate():
    evaluation = Evaluation(read([("ab", "ab"), ("b", "a"), ("abcd", "abcx")]), resamples=10)
    assert [one.row for one in evaluation.worst(2)] == [1, 2]
    assert [one.row for one in evaluation.best(2)] == [0, 2]


def test_a_large_split_does_not_need_large_memory():
    import tracemalloc

    evaluation = Evaluation(read([("ab", "ac")] * 10_000), resamples=600)
    counts = evaluation.counts
    tracemalloc.start()
    evaluation.rates  # noqa: B018
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400e6  # 600 resamples of all counts at once are 480 MB
    assert set(RATES) == set(evaluation.rates)
    assert len(counts["characters"]) == 10_000
    assert np.isfinite(counts["own_cer"]).all()
