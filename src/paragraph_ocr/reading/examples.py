"""A few pages to try a model on, drawn on the spot in the faces that come with the package."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from paragraph_ocr.config import Experiment, GeneratedData
from paragraph_ocr.data.synthetic import SyntheticCorpus
from paragraph_ocr.errors import UserError

_SEED = 20_221  # any; the same pages each time
_LINE_PX = 34  # of a line on a canvas whose lines nobody has counted
_CHARACTER_PX = 17


@dataclass(frozen=True, slots=True)
class Example:
    """A page, dark on white, and what it says."""

    image: Image.Image
    text: str

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG")
        return buffer.getvalue()


def draw_examples(experiment: Experiment, count: int) -> list[Example]:
    """Return pages of the size and the length that the model has learnt; none where it cannot write words.

    Texts are of the test split: no rendered data module trains on them.
    """
    data, characters = experiment.datamodule, experiment.vocabulary.characters
    assert characters is not None
    if isinstance(data, GeneratedData):
        lines, most = (data.min_lines, data.max_lines), data.max_characters
        least, mean = data.min_characters, data.mean_characters
    else:
        lines = (1, max(1, data.height // _LINE_PX))
        room = lines[1] * data.width // _CHARACTER_PX
        most = max(4, min(data.max_length - 2, room))
        least, mean = max(2, most // 3), max(3, most * 2 // 3)
    if "\n" not in characters:
        lines = (1, 1)
    try:
        make = SyntheticCorpus(
            name="examples",
            height=data.height,
            width=data.width,
            min_lines=lines[0],
            max_lines=lines[1],
            min_characters=least,
            mean_characters=mean,
            max_characters=most,
            num_train=1,
            num_val=1,
            num_test=count,
            characters=characters,
            seed=_SEED,
            fonts=None,
            texts=None,
            random_share=0.0,
        ).maker()
        pages = [make(np.random.default_rng([_SEED, index]), "test") for index in range(count)]
    except UserError:
        return []
    return [Example(Image.fromarray(255 - page.image), page.text) for page in pages]
