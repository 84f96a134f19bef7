"""What is counted of a store, and a report that escapes all of it and needs nothing else."""

from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from paragraph_ocr.data.paragraph import Paragraph
from paragraph_ocr.data.store import Store, StoreWriter, pack
from paragraph_ocr.data.survey import rare_characters, report, survey
from paragraph_ocr.vocabulary import Vocabulary

PARAGRAPHS = [
    ("ab\ncd", "train", "Ann", (20, 30)),
    ("<b>a & b</b>", "train", "Ann", (10, 30)),
    ("aaa\u20ac", "train", "Bo", (20, 40)),
    ("dd", "val", "", (20, 30)),
]


@pytest.fixture
def store(tmp_path) -> Store:
    with StoreWriter(tmp_path / "small.h5", fingerprint="x") as writer:
        for text, split, name, size in PARAGRAPHS:
            writer.add(
                pack(Paragraph(np.zeros(size, np.uint8), text, split, "", name), canvas=(32, 64))
            )
    return Store(tmp_path / "small.h5")


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary("abcd<>/& \n?", unknown="replace")


def test_figures_are_those_of_the_texts_as_the_model_writes_them(store, vocabulary):
    splits = survey(store, vocabulary)
    train = splits["train"]
    assert (train.paragraphs, train.lines, train.writers) == (3, 4, 2)
    assert train.lengths.tolist() == [5, 12, 4]
    assert train.characters["a"] == 5
    assert train.characters["?"] == 1  # the euro, replaced
    assert train.figures()["height (px)"] == "10 to 20, 17 in the mean"
    assert splits["val"].figures()["writers"] == "not known"
    assert splits["test"].paragraphs == 0
    assert splits["test"].figures()["characters a paragraph"] == "-"


def test_rare_characters_are_those_that_training_hardly_has(store, vocabulary):
    splits = survey(store, vocabulary)
    assert rare_characters(splits, fewer_than=2)[:2] == ["\n", "&"]
    assert "a" not in rare_characters(splits, fewer_than=5)
    only_val = rare_characters(splits, fewer_than=1)
    assert only_val == []
    splits["val"].characters["z"] = 3
    assert rare_characters(splits, fewer_than=1) == ["z"]


class Reader(HTMLParser):
    """Keeps what a browser would make elements of, and what it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        self.addresses += [v for k, v in attributes if k in ("src", "href") and v]

    def handle_data(self, data):
        self.text += data


def test_a_report_escapes_what_it_is_given_and_fetches_nothing(store, vocabulary):
    evil = "<script>alert('x')</script>$title"
    page = report(
        evil,
        survey(store, vocabulary),
        notes=[evil],
        pictures=[(f'{evil}" onerror="x', Image.new("L", (4, 4), 255))],
    )
    read = Reader(page)
    assert "script" not in read.tags
    assert read.text.count(evil) == 4  # title, heading, note, heading of the picture
    assert [a[:22] for a in read.addresses] == ["data:image/png;base64,"]
    assert "onerror" not in read.attributes
    assert "http:" not in page
    assert "https:" not in page
    assert "default-src 'none'" in page


def test_a_report_shows_every_character_with_its_counts(store, vocabulary):
    read = Reader(report("t", survey(store, vocabulary)))
    assert read.tags.count("tr") == 1 + 8 + 1 + len("abcd<>/& \n?")
    assert "newline" in read.text
    assert "space" in read.text
    assert read.tags.count("rect") > 3
