"""The model that comes with the code reads, from a fresh clone, without training."""

import os
from pathlib import Path

import numpy as np
import pytest

from commands import run_command
from paragraph_ocr.data.fonts import load_faces
from paragraph_ocr.data.render import render
from paragraph_ocr.metrics import character_error_rate
from paragraph_ocr.reading import Recognizer
from paragraph_ocr.reading.checkpoint import DEFAULT
from paragraph_ocr.reading.examples import draw_examples

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 20_000_000


def test_the_released_model_is_small_and_tells_of_itself():
    folder = ROOT / DEFAULT
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MOST_BYTES
    card = (folder / "README.md").read_text()
    for section in ("## Data", "## Training", "## Figures", "## Limits"):
        assert section in card


def test_the_readme_s_first_reading_is_right(tmp_path):
    image = f"image={ROOT}/docs/images/page.png"
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = run_command("scripts/read.py", image, cwd=tmp_path, env=variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Dear friend, the garden has come\nback to life.")


def test_the_released_model_reads_pages_in_installed_faces():
    recognizer = Recognizer.load(DEFAULT, device="cpu")
    pages = draw_examples(recognizer.experiment, 4)
    assert pages
    read = [recognizer.read(page.image).text for page in pages]
    assert character_error_rate(read, [page.text for page in pages]) < 0.1


@pytest.mark.parametrize(
    ("face", "seed", "text"),
    [
        # on a whole page's canvas it goes on, and reads this line twice
        ("Kalam-Light", 30, "his earphones were full of the sounds of"),
        ("Zeyada", 9, "this suggested"),
        ("GreatVibes-Regular", 1, "one or two cups of tea, which she"),
    ],
)
def test_the_released_model_reads_a_single_line_once(face, seed, text):
    recognizer = Recognizer.load(DEFAULT, device="cpu")
    faces, _ = load_faces(None, characters="".join(recognizer.vocabulary.characters))
    (chosen,) = (one for one in faces if one.name == face)
    line = render(
        text.split(), chosen, height=96, width=640, min_lines=1, max_lines=1,
        generator=np.random.default_rng(seed),
    )  # fmt: skip
    assert character_error_rate([recognizer.read(255 - line.image).text], [text]) < 0.1
