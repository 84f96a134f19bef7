"""Words that a page's readings most likely mean."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from paragraph_ocr.errors import UserError
from paragraph_ocr.model.generate import Reading
from paragraph_ocr.model.lexicon import Lexicon, lexicon

TOKENS = (
    "<B>",
    "<S>",
    "<E>",
    "<P>",
    *"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,-'0123456789\n",
)
COUNTS = {
    "the": 60_000, "following": 900, "university": 800, "quick": 300, "fox": 90, "for": 9_000,
    "fur": 40, "request": 500, "isn't": 400, "house": 2_000, "horse": 1_900, "naïve": 300,
    "informed": 300, "information": 900,
}  # fmt: skip
WORDS = Lexicon(COUNTS, TOKENS)


def reading(text, confidence=0.7):
    """Return a reading of a text, `confidence` of each letter or of all."""
    tokens = [TOKENS.index(letter) for letter in text]
    each = [confidence] * len(text) if isinstance(confidence, float) else confidence
    return Reading(tokens, each, math.fsum(map(math.log, each)))


def corrected(*texts, confidence=0.7, most=1000, words=WORDS):
    """Return the text that comes of the first of some readings, all of which count as much."""
    readings = [reading(text, confidence) for text in texts]
    return words.corrected(readings[0], readings, [1.0] * len(readings), most)


def text_of(its):
    return "".join(TOKENS[token] for token in its.tokens)


@pytest.mark.parametrize(
    ("read", "meant"),
    [
        ("tbe quick fox", "the quick fox"),
        ("Tbe fallowing reguest.", "The following request."),
        ("UNIVESTY", "UNIVERSITY"),
        ("'folloving'", "'following'"),
        ("ism't it", "isn't it"),
        ("tne", "the"),
    ],
)
def test_what_is_no_word_is_taken_for_a_likely_one_in_its_own_case(read, meant):
    assert text_of(corrected(read, confidence=0.4)) == meant


@pytest.mark.parametrize(
    "read",
    [
        "the house",
        "horse's",  # known without its ending
        "xq",  # short
        "t8e fo0x 3rd",  # with figures
        "the informa-\ntian of",  # of a word that a line's end divides, neither half
        "Zbigniew Brzezinski",  # nothing is near
        "",
        ".,- '",
    ],
)
def test_words_names_and_parts_of_words_stand(read):
    its = corrected(read)
    assert text_of(its) == read
    assert its == reading(read)


def test_a_name_of_which_the_model_is_sure_stands():
    assert text_of(corrected("Foz", confidence=0.5)) == "For"
    assert text_of(corrected("Foz", confidence=0.99999)) == "Foz"


def test_what_other_readings_have_decides_between_words_that_are_as_near():
    assert text_of(corrected("hoqse", "hovse", "house")) == "house"
    assert text_of(corrected("hoqse", "hocse", "horse")) == "horse"
    # though none of them is it, and their letters stand in other places
    assert text_of(corrected("a folowng b", "a foolowimg b", "a fallawirg b")) == "a following b"


def test_an_unsure_letter_is_the_one_that_was_misread():
    unsure_at_the_end = [0.99, 0.99, 0.99, 0.99, 0.3]
    assert text_of(corrected("houst", confidence=unsure_at_the_end)) == "house"
    words = Lexicon({"moat": 100, "most": 100}, TOKENS)
    assert text_of(corrected("moet", confidence=[0.99, 0.99, 0.5, 0.99], words=words)) in (
        "moat",
        "most",
    )
    assert text_of(corrected("noat", confidence=[0.5, 0.99, 0.99, 0.99], words=words)) == "moat"


def test_a_commoner_word_is_likelier():
    common = Lexicon({"fur": 40, "far": 40_000}, TOKENS)
    rare = Lexicon({"fur": 40_000, "far": 40}, TOKENS)
    assert text_of(corrected("fer", words=common)) == "far"
    assert text_of(corrected("fer", words=rare)) == "fur"


def test_a_word_that_the_model_cannot_write_is_not_written():
    assert text_of(corrected("naive")) == "naive"


def test_tokens_and_confidences_go_together_and_keep_to_the_length():
    its = corrected("a folowng univesty", confidence=0.4, most=14)
    assert text_of(its) == "a following un"
    assert len(its.confidences) == 14
    assert all(0 < confidence <= 1 for confidence in its.confidences)
    assert its.log_probability == pytest.approx(sum(map(math.log, its.confidences)))
    assert its.confidences[0] == 0.4  # of what stands


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("fohursewtq -.\n"), max_size=40), st.floats(0.3, 0.9999))
def test_nothing_but_unknown_words_is_changed(text, confidence):
    found = text_of(corrected(text, confidence=confidence))
    signs = [c for c in text if not c.isalpha()]
    assert [c for c in found if not c.isalpha()] == signs
    split = str.maketrans("-.\n", "   ")
    for before, after in zip(
        text.translate(split).split(), found.translate(split).split(), strict=True
    ):
        assert before == after or (before not in COUNTS and after in COUNTS)


@settings(max_examples=40, deadline=None)
@given(st.text(st.sampled_from("aeinorst"), min_size=3, max_size=11))
def test_words_near_are_found_as_by_looking_at_each(letters):
    words = lexicon("en", TOKENS)
    most = 1 if len(letters) <= 4 else 2 if len(letters) <= 8 else 3
    expected = {w for w in words._costs if Levenshtein.distance(w, letters) <= most}
    assert {*words._near(letters)} == expected


def test_a_language_that_is_not_there_is_the_users_to_mend():
    with pytest.raises(UserError, match=r"decoding\.lexicon=xx is no language .* en, "):
        lexicon("xx", TOKENS)
