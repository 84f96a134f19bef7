import pytest
from hypothesis import given
from hypothesis import strategies as st

from paragraph_ocr.errors import UserError
from paragraph_ocr.validation import compose
from paragraph_ocr.vocabulary import Vocabulary, found_characters, listed

IAM = compose([]).vocabulary.characters


def test_the_default_has_the_84_tokens_of_the_lab_in_their_order():
    tokens = Vocabulary(IAM).tokens
    assert len(tokens) == 84
    assert tokens[:5] == ("<B>", "<S>", "<E>", "<P>", "0")
    assert tokens[-1] == "\n"


@given(st.text(alphabet=IAM, max_size=50))
def test_text_comes_back_from_its_tokens(text):
    vocabulary = Vocabulary(IAM)
    ids = vocabulary.encode(text)
    assert (ids[0], ids[-1]) == (vocabulary.start, vocabulary.end)
    assert vocabulary.decode(ids) == text
    assert vocabulary.decode([*ids, vocabulary.pad, 7, 8]) == text


def test_unknown_characters_are_all_named_with_their_counts_and_the_remedy():
    with pytest.raises(UserError, match=r"'é' \(U\+00E9\) x2, '€' .* x1.*Add them") as refusal:
        Vocabulary(IAM).require(["café", "né", "5 €"])
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="U\\+00E9"):
        Vocabulary(IAM).encode("é")


def test_a_character_stands_once():
    with pytest.raises(ValueError):
        Vocabulary("aba")
    with pytest.raises(ValueError):
        Vocabulary(["ab"])


def test_text_is_folded_and_cleared_only_on_request():
    text = "\u201ce\u0301t\u00e9\u201d \u2013 5 \u20ac"
    assert Vocabulary("a").prepare(text) == "\u201c\u00e9t\u00e9\u201d \u2013 5 \u20ac"
    assert Vocabulary("a", fold=True).prepare(text) == '"\u00e9t\u00e9" - 5 \u20ac'
    assert Vocabulary(IAM, fold=True, unknown="drop").prepare(text) == '"t" - 5 '


def test_unknown_characters_are_replaced_by_one_that_the_vocabulary_has():
    vocabulary = Vocabulary("abc?_", unknown="replace", replacement="_")
    assert vocabulary.prepare("a\u20acb\u00e9") == "a_b_"
    assert Vocabulary("abc?", unknown="replace").prepare("axb") == "a?b"
    vocabulary.require([vocabulary.prepare("\u20ac")])
    with pytest.raises(ValueError, match="replacement"):
        Vocabulary("abc", unknown="replace", replacement="_")
    Vocabulary("abc", replacement="_")  # of no effect, and so no mistake


def test_characters_are_found_composed_sorted_and_once():
    texts = ["be\u0301a", "\u201cb\u00e9\u201d\n"]
    assert found_characters(texts, fold=False) == "\nab\u00e9\u201c\u201d"
    assert found_characters(texts, fold=True) == '\n"ab\u00e9'


def test_characters_that_are_dropped_or_replaced_are_listed_with_counts():
    counts = Vocabulary("ab").unknown(["aéb", "é€"])
    assert listed(counts) == "'é' (U+00E9) x2, '€' (U+20AC) x1"
    assert listed(Vocabulary("a").unknown([chr(200 + i) for i in range(25)])).endswith("and 5 more")
