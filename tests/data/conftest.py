from dataclasses import replace

import pytest

from paragraph_ocr.data.fake import FakeCorpus
from paragraph_ocr.data.synthetic import SyntheticCorpus
from paragraph_ocr.vocabulary import Vocabulary

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz !\"#&'()*+,-./:;?\n"


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary(CHARACTERS)


@pytest.fixture(scope="session")
def notes() -> SyntheticCorpus:
    """What conf/datamodule/synthetic_notes.yaml describes, with fewer paragraphs."""
    return SyntheticCorpus(
        name="notes",
        height=160,
        width=448,
        min_lines=3,
        max_lines=6,
        min_characters=100,
        mean_characters=150,
        max_characters=250,
        num_train=200,
        num_val=20,
        num_test=20,
        fonts=None,
        texts=None,
        random_share=0.25,
        characters=CHARACTERS,
        seed=0,
    )


@pytest.fixture(scope="session")
def few_notes(notes) -> SyntheticCorpus:
    return replace(notes, num_train=24, num_val=4, num_test=4)


@pytest.fixture(scope="session")
def noise() -> FakeCorpus:
    return FakeCorpus(
        name="fake",
        height=32,
        width=48,
        min_lines=1,
        max_lines=2,
        min_characters=4,
        mean_characters=20,
        max_characters=40,
        num_train=23,
        num_val=6,
        num_test=6,
        characters=CHARACTERS,
        seed=0,
    )
