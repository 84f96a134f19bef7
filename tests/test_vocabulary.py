import pytest
from hypothesis import given
from hypothesis import strategies as st

from paragraph_ocr.errors import UserError
from paragraph_ocr.validation import compose
from paragraph_ocr.vocabulary import Vocabulary

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
