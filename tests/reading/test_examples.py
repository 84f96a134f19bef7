"""Pages to try a model on fit what it can read."""

import numpy as np
import pytest

from paragraph_ocr.reading.examples import draw_examples
from paragraph_ocr.validation import compose, validate


@pytest.mark.parametrize(
    "typed",
    [
        ["datamodule=synthetic_notes"],
        ["datamodule=synthetic_lines"],
        ["datamodule=folder", "datamodule.root=tests"],
        [
            "datamodule=folder",
            "datamodule.root=tests",
            "datamodule.height=64",
            "datamodule.width=160",
        ],
        ["datamodule=folder", "datamodule.root=tests", "datamodule.max_length=10"],
        ["vocabulary.characters='abcdefghijklmnop '", "datamodule=synthetic_lines"],
    ],
)
def test_examples_have_the_canvas_the_length_and_the_letters_of_the_model(typed):
    experiment = validate(compose(typed))
    data = experiment.datamodule
    pages = draw_examples(experiment, 3)
    assert len({page.text for page in pages}) == 3
    for page in pages:
        assert page.image.size == (data.width, data.height)
        assert (np.asarray(page.image) < 128).sum() > 20
        assert 0 < len(page.text) <= data.max_length - 2
        assert set(page.text) <= set(experiment.vocabulary.characters)
    again = draw_examples(experiment, 3)
    assert [page.png() for page in again] == [page.png() for page in pages]


def test_a_model_that_spells_no_words_has_no_examples():
    assert draw_examples(validate(compose(["vocabulary.characters='0123456789'"])), 3) == []
