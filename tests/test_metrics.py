import jiwer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paragraph_ocr.metrics import ReadingErrors, character_error_rate, word_error_rate

PAIRS = st.lists(
    st.tuples(st.text("ab c\n", max_size=12), st.text("ab c\n", min_size=1, max_size=12)),
    min_size=1,
    max_size=6,
)


@given(PAIRS)
def test_the_pooled_character_error_rate_is_jiwers(pairs):
    readings, truths = zip(*pairs, strict=True)
    plain = jiwer.Compose([jiwer.ReduceToListOfListOfChars()])
    expected = jiwer.cer(
        list(truths), list(readings), reference_transform=plain, hypothesis_transform=plain
    )
    assert character_error_rate(readings, truths) == pytest.approx(expected)


@given(PAIRS)
def test_the_pooled_word_error_rate_is_jiwers_once_newlines_part_words(pairs):
    readings, truths = zip(*pairs, strict=True)
    truths = [truth.replace("\n", " ") + " x" for truth in truths]
    split = jiwer.Compose(
        [jiwer.RemoveMultipleSpaces(), jiwer.Strip(), jiwer.ReduceToListOfListOfWords()]
    )
    expected = jiwer.wer(
        truths,
        [reading.replace("\n", " ") for reading in readings],
        reference_transform=split,
        hypothesis_transform=split,
    )
    assert word_error_rate(readings, truths) == pytest.approx(expected)


def test_a_short_note_does_not_outvote_a_long_page():
    assert character_error_rate(["x", "a" * 99], ["y", "a" * 99]) == pytest.approx(1 / 100)


def test_case_punctuation_and_newlines_count_and_white_space_can_be_collapsed():
    errors = ReadingErrors()
    errors.update(["Ab c", "x"], ["ab\nc", "x"])
    rates = errors.compute()
    assert rates["cer"] == pytest.approx(2 / 5)
    assert rates["cer_collapsed"] == pytest.approx(1 / 5)
    assert rates["wer"] == pytest.approx(1 / 3)
    assert rates["exact"] == pytest.approx(1 / 2)


@given(PAIRS)
def test_batches_of_any_size_give_the_same_rates(pairs):
    whole, parts = ReadingErrors(), ReadingErrors()
    whole.update(*zip(*pairs, strict=True))
    for reading, truth in pairs:
        parts.update([reading], [truth])
    assert whole.compute() == parts.compute()


def test_empty_texts_have_a_rate():
    assert character_error_rate([""], [""]) == 0
    assert character_error_rate(["a"], [""]) == float("inf")
