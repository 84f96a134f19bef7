"""scripts/explain.py and its page: every picture, on a trained model and on one that is not."""

import base64
import importlib.util
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paragraph_ocr import arguments
from paragraph_ocr.errors import UserError
from paragraph_ocr.reading import Recognizer
from paragraph_ocr.reading.explain_page import Plate, explain_image, page

ROOT = Path(__file__).parents[2]
LINE_READER = ROOT / "tests" / "line_reader"
PICTURES = {
    "attention.gif", "attention.png", "attention_average.png", "attention_heads.png", "attention_path.png",
    "causal_mask.png", "circuits.png", "embeddings.png", "entropy.png", "features.png", "logit_lens.png",
    "positions.png", "readings.png",
}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("explain_script", ROOT / "scripts" / "explain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reader():
    return Recognizer.load(LINE_READER, device="cpu")


@pytest.fixture
def type_in(script, monkeypatch, tmp_path):
    """Return a function that runs the script with what is typed and returns its exit status."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["explain.py", *words, f"folder={tmp_path / 'made'}"])
        return arguments.run(script.Options, script.explain, about="")

    return run


def embedded(html):
    """Return the bytes of the pictures in a page."""
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', html)
    return [base64.b64decode(text) for text in found]


def test_a_trained_model_is_explained_with_all_pictures_on_one_page(type_in, tmp_path):
    # by patterns, as the README types them
    folder = f"{LINE_READER.parent}/line_read*"
    assert type_in(f"checkpoint={folder}", f"image={folder}/pag*.png") == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    html = written.pop("explain.html").decode()
    assert set(written) == PICTURES
    assert sorted(embedded(html)) == sorted(written.values())
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert "<pre>when shall we\nthree meet\nagain</pre>" in html  # the truth, from beside the image
    with Image.open(tmp_path / "made" / "attention.gif") as animation:
        assert animation.n_frames == len("when shall we\nthree meet\nagain") + 1  # and the end


def test_a_model_that_nobody_trained_is_explained_without_a_text(type_in, tmp_path):
    # a page smaller than the canvas, and no .txt beside it
    shutil.copy(LINE_READER / "page.png", tmp_path / "alone.png")
    assert type_in("model=tiny", f"image={tmp_path / 'alone.png'}") == 0
    html = (tmp_path / "made" / "explain.html").read_text()
    assert len(embedded(html)) == len(PICTURES)
    assert "true text of this image was not given" in html
    assert "untrained" in html


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the released model, is not here"),
        (["model=tiny", "checkpoint=x"], "exclude each other"),
        (["model=tinny"], "tiny"),
        (["model=line_cnn"], "model=line_cnn has no attention to explain"),
        (["model=tiny", "text=nowhere.txt"], "text=nowhere.txt cannot be read"),
        (["checkpoint=nowhere"], "checkpoint=nowhere"),
    ],
)
@pytest.mark.usefixtures("no_release")
def test_a_mistake_is_one_line(type_in, capsys, tmp_path, words, said):
    assert type_in(f"image={LINE_READER / 'page.png'}", *words) == 2
    told = capsys.readouterr().err.strip()
    assert said in told
    assert "\n" not in told
    assert not (tmp_path / "made").exists()


def test_the_page_escapes_what_a_model_writes(reader):
    told = explain_image(reader, LINE_READER / "page.png")
    made = [Plate("a.png", "<heading>", "<script>alert(1)</script>", b"")]
    html = page(told, made, title="<b>&title</b>")
    assert "<script>" not in html and "<heading>" not in html and "<b>" not in html


def test_a_text_longer_than_the_model_writes_is_refused(reader):
    with pytest.raises(
        UserError, match=r"^text: 63 characters are more than the model's 62\. Pass"
    ):
        explain_image(reader, LINE_READER / "page.png", text="a" * 63)
    told = explain_image(reader, LINE_READER / "page.png", text="a" * 62)
    assert len(told.targets) == 63


def test_the_animation_follows_the_attention(reader):
    from paragraph_ocr.reading import explain_figures as draw

    told = explain_image(reader, LINE_READER / "page.png", text="when shall we\nthree meet\nagain")
    frames = draw.animate(told.page, told.told.looks(), told.targets, cell_px=told.told.cell_px)
    assert len(frames) == len(told.targets)
    scale = frames[0].width / told.page.shape[1]
    for frame, looks in zip(frames, told.told.looks(), strict=True):
        pixels = np.asarray(frame.convert("RGB")).astype(int)[: round(told.page.shape[0] * scale)]
        rows, columns = np.nonzero(pixels[..., 0] - pixels[..., 2] > 100)  # orange
        row, column = np.unravel_index(int(looks.argmax()), looks.shape)
        height, width = told.told.cell_px
        assert row * height * scale <= np.median(rows) < (row + 1) * height * scale + height * scale
        assert abs(np.median(columns) / scale - (column + 0.5) * width) < 2 * width


def test_a_figure_is_a_png_of_modest_size(reader):
    from paragraph_ocr.reading import explain_figures as draw

    told = explain_image(reader, LINE_READER / "page.png")
    data = draw.png(draw.attention_path(told.told, ["x"] * 700))
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.width <= 2400


def test_a_short_text_is_explained_on_the_canvas_that_it_is_read_on(reader, monkeypatch):
    height, width = reader.canvas
    image = np.full((height, width), 255, np.uint8)
    image[2 : height // 4, 4 : width - 4 : 3] = 0
    whole = explain_image(reader, image)
    assert whole.canvas.shape == (height, width)
    monkeypatch.setattr(reader, "heights", [height // 2])
    lower = explain_image(reader, image)
    assert lower.canvas.shape == (height // 2, width)
    assert lower.size[0] <= height // 2
    assert np.array_equal(lower.canvas, whole.canvas[: height // 2])
