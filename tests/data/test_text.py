"""Text to render: what is drawn, from which documents, in which characters."""

import numpy as np
import pytest

from paragraph_ocr.data.text import (
    LONGEST_WORD,
    Document,
    Passages,
    folder,
    normalise,
    shakespeare,
    split_documents,
)
from paragraph_ocr.errors import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ '\"-.,\n"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("\u201cIt\u2019s\u201d", '"It\'s"'),
        ("one\u2014two", "one - two"),
        ("\ufb01ne caf\u00e9", "fine cafe"),
        ("cafe\u0301", "cafe"),
        ("a\u00a0b\n\n c", "a b c"),
        ("wait\u2026", "wait..."),
        ("a\u2603b \u2603 c", "ab c"),
    ],
)
def test_text_is_folded_to_the_characters_that_the_model_knows(written, read):
    assert normalise(written, LETTERS) == read


def test_a_letter_that_the_vocabulary_knows_keeps_its_accent():
    assert normalise("cafe\u0301", LETTERS + "\u00e9") == "caf\u00e9"


def test_plays_hold_speech_and_no_stage_directions():
    hamlet = next(play for play in shakespeare() if play.name == "hamlet.md")
    assert hamlet.text.split()[:2] == ["Who's", "there?"]
    assert "BERNARDO" not in hamlet.text
    assert "Enter" not in hamlet.text.split("Long live the king")[1][:2000]


def test_no_document_serves_two_splits():
    documents = [Document(f"{n}.txt", f"{chr(97 + n)} " * 50) for n in range(20)]
    splits = split_documents(documents, LETTERS)
    letters = [set(words) for words in splits.values()]
    assert len(set.union(*letters)) == 20 == sum(map(len, letters))
    assert [len(found) for found in letters] == [16, 2, 2]


def test_the_order_of_documents_does_not_change_the_splits():
    documents = [Document(f"{n}.txt", f"{chr(97 + n)} " * 50) for n in range(20)]
    assert split_documents(documents, LETTERS) == split_documents(documents[::-1], LETTERS)


def test_a_single_document_is_cut_into_parts_that_do_not_overlap():
    words = [f"{a}{b}" for a in "abcdefghij" for b in "abcdefghijklmnopqrst"]
    splits = split_documents([Document("one.txt", " ".join(words))], LETTERS)
    assert splits["train"] + splits["val"] + splits["test"] == words
    assert len(splits["val"]) == len(splits["test"]) == 20


def test_too_little_text_is_the_users_to_mend():
    with pytest.raises(UserError, match=r"datamodule.texts leaves 2 words for"):
        split_documents([Document("one.txt", "a few words")], LETTERS)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\xff"])
def test_a_folder_without_text_is_the_users_to_mend(tmp_path, content):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"^datamodule.texts=.*Pass datamodule.texts="):
        folder(tmp_path)


@pytest.fixture(scope="module")
def passages(notes) -> Passages:
    return Passages(None, characters=notes.characters, random_share=0.25)


def test_passages_have_about_the_wanted_length_and_never_leave_the_bounds(passages):
    generator = np.random.default_rng(0)
    errors = []
    for _ in range(2000):
        length = int(generator.integers(20, 61))
        text = " ".join(passages.draw(generator, "train", length=length, minimum=20, maximum=60))
        assert 20 <= len(text) <= 60
        errors.append(len(text) - length)
    assert abs(np.mean(errors)) < 1


def test_passages_are_written_in_the_vocabulary_and_use_all_of_it(passages, notes):
    generator = np.random.default_rng(0)
    drawn = [
        passages.draw(generator, split, length=400, minimum=100, maximum=680)
        for split in ("train", "val", "test")
        for _ in range(300)
    ]
    assert {c for words in drawn for word in words for c in word} == {*notes.characters} - {
        " ",
        "\n",
    }
    assert max(len(word) for words in drawn for word in words) <= LONGEST_WORD


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_random_words_is_as_promised(tmp_path, share):
    # real text here is one word, and no random word is just that
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("Zyzzogeton " * 100 + "x " * 10)
    passages = Passages(tmp_path, characters=LETTERS, random_share=share)
    generator = np.random.default_rng(0)
    words = [
        word
        for _ in range(100)
        for word in passages.draw(generator, "train", length=600, minimum=100, maximum=680)
    ]
    real = np.mean([word in ("Zyzzogeton", "x") for word in words])
    # some random words are words of the text out of place
    assert 1 - share - 0.06 < real <= 1 - share * 0.4 + 0.06


def test_validation_and_test_can_do_without_random_words(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("Zyzzogeton " * 100)
    passages = Passages(tmp_path, characters=LETTERS, random_share=0.5, test_random_share=0.0)
    generator = np.random.default_rng(0)
    kinds = {
        split: {*passages.draw(generator, split, length=600, minimum=100, maximum=680)}
        for split in ("train", "val", "test")
    }
    assert all("Zyzzogeton".startswith(word) for word in kinds["val"] | kinds["test"])
    assert len(kinds["train"]) > 3
