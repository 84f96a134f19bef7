"""Reading: alone or in batches, from every kind of image, and what is refused."""

import itertools
import os
import shutil
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from pages import note, scans
from PIL import Image
from safetensors.torch import load_file, save_file

from paragraph_ocr.data.scan import MAX_PIXELS
from paragraph_ocr.errors import UserError
from paragraph_ocr.model.vote import View, Vote
from paragraph_ocr.reading import Recognizer, Refusal, Transcript, read
from paragraph_ocr.reading.checkpoint import DEFAULT, find_checkpoint
from paragraph_ocr.reading.page import prepare
from paragraph_ocr.reading.transcript import Character, bands, split_lines

HEAVY = ("pytorch_lightning", "hydra", "mlflow", "optuna", "torchmetrics")


def test_reading_needs_no_framework_of_training(run_folder, images):
    code = (
        "import sys\nfrom paragraph_ocr.reading import Recognizer\n"
        f"print(Recognizer.load({str(run_folder)!r}).read({str(scans(images)[0])!r}).text)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"
    assert len(shown.stdout) > 10


def test_a_batch_reads_as_one_by_one(recognizer, images):
    paths = scans(images)
    alone = [recognizer.read(path) for path in paths]
    together = list(recognizer.read_all(paths, batch_size=5))
    assert len({one.text for one in alone}) > 6  # what is read depends on the page
    for one, other in zip(alone, together, strict=True):
        assert other.source == str(other.source) == one.source
        assert (other.text, other.lines, other.size) == (one.text, one.lines, one.size) or (
            other.text == one.text and [a.box for a in other.lines] == [b.box for b in one.lines]
        )
        confidences = [c.confidence for c in one.characters]
        assert [c.confidence for c in other.characters] == pytest.approx(confidences, abs=1e-4)
        assert other.log_probability == pytest.approx(one.log_probability, abs=1e-3)


@pytest.mark.parametrize("vote", [False, True])
def test_each_page_is_read_on_the_lowest_canvas_that_holds_its_ink(recognizer, monkeypatch, vote):
    height, width = recognizer.canvas
    low, middle = height // 4, height // 2
    pages = torch.zeros(5, 1, height, width, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    for page, end in zip(pages, (low - 4, height - 1, low - 1, 0, middle - 4), strict=True):
        page[0, :end] = 255 * (torch.rand(end, width, generator=generator) < 0.1)
    wanted = [low, height, middle, low, middle]
    seen: list[tuple[int, ...]] = []

    def read(images, sizes=None, **others):
        seen.append(tuple(images.shape))
        assert sizes is None or (sizes <= torch.tensor(images.shape[2:])).all()
        if vote:
            assert others["decoding"].canvas == tuple(images.shape[2:])
        return model_read(images, sizes, **others)

    model_read = recognizer.model.read
    monkeypatch.setattr(recognizer.model, "read", read)
    if vote:
        views = (View(1, 1, 0, 0), View(0.9, 1, 0, 0))
        monkeypatch.setattr(recognizer, "decoding", Vote(views, recognizer.canvas))
    monkeypatch.setattr(recognizer, "heights", [low, middle, height, 2 * height])
    together = recognizer.readings(pages)
    assert sorted(shape[2] for shape in seen for _ in range(shape[0])) == sorted(wanted)
    sizes = torch.tensor([[height, width]] * 5)
    for page, reading in enumerate(together):
        seen.clear()
        (alone,) = recognizer.readings(pages[page : page + 1], sizes[page : page + 1])
        assert seen == [(1, 1, wanted[page], width)]
        assert alone.tokens == reading.tokens
    monkeypatch.setattr(recognizer, "heights", [])
    seen.clear()
    recognizer.readings(pages)
    assert seen == [tuple(pages.shape)]


@pytest.mark.parametrize("normalise", [False, True])
def test_a_page_is_the_one_that_the_folder_data_module_stores(
    recognizer, images, tmp_path, monkeypatch, normalise
):
    from paragraph_ocr.data.folder import FolderCorpus
    from paragraph_ocr.data.store import Store

    monkeypatch.setattr(recognizer, "normalise", normalise)
    settings = {"name": "folder", "folder": images, "height": 64, "width": 160}
    path = FolderCorpus(**settings, normalise=normalise).prepare(tmp_path, num_workers=0)
    assert path != FolderCorpus(**settings, normalise=not normalise).prepare(
        tmp_path, num_workers=0
    )
    store = Store(path)
    assert len(store) == 12
    for row, source in enumerate(store.sources):
        canvas, size = recognizer.page(images / source)
        assert np.array_equal(canvas[0].numpy(), store.image(row))
        assert size == tuple(store.sizes[row])


@pytest.mark.parametrize("normalise", [False, True])
def test_a_transcript_holds_together(recognizer, images, monkeypatch, normalise):
    monkeypatch.setattr(recognizer, "normalise", normalise)
    for path in scans(images):
        transcript = recognizer.read(path)
        assert "\n".join(line.text for line in transcript.lines) == transcript.text
        assert "".join(one.character for one in transcript.characters) == transcript.text
        assert all(0 < one.confidence <= 1 for one in transcript.characters)
        assert 0 < transcript.confidence <= 1
        assert transcript.log_probability <= 0
        with Image.open(path) as image:
            assert transcript.size == image.size[::-1]
        for line in transcript.lines:
            left, top, right, bottom = line.box
            assert 0 <= left < right <= transcript.size[1]
            assert 0 <= top < bottom <= transcript.size[0]


def test_an_image_reads_the_same_however_it_comes(recognizer, images):
    path = scans(images)[1]
    with Image.open(path) as opened:
        array = np.asarray(opened)
        texts = {recognizer.read(given).text for given in (path, str(path), opened, array)}
        assert opened.fp is not None or opened.im is not None  # the caller's image stays open
    colours = np.stack([array] * 3, axis=2)
    assert {recognizer.read(colours).text, *texts} == {recognizer.read(path).text}


def test_a_photo_on_its_side_is_read_upright(recognizer, images, tmp_path):
    with Image.open(scans(images)[1]) as upright:
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter turn to the right puts it upright
        upright.rotate(90, expand=True).save(tmp_path / "side.png", exif=exif)
        turned = recognizer.read(tmp_path / "side.png")
        assert turned.text == recognizer.read(upright).text
        assert turned.size == upright.size[::-1]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5), float),
        np.zeros((4, 5, 2), np.uint8),
        np.zeros((0, 5), np.uint8),
        np.zeros((3, 4, 5, 3), np.uint8),
    ],
)
def test_an_array_that_is_no_image_is_refused(recognizer, array):
    with pytest.raises(UserError, match="Give uint8"):
        recognizer.read(array)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (3, 3)])
def test_the_smallest_images_are_read(recognizer, shape, monkeypatch, normalise):
    monkeypatch.setattr(recognizer, "normalise", normalise)
    for grey in (np.full(shape, 200, np.uint8), np.indices(shape).sum(axis=0) % 9 * 30):
        assert isinstance(recognizer.read(grey.astype(np.uint8)), Transcript)


def test_lines_lie_on_the_image_where_they_were_read_also_of_a_page_that_was_turned(recognizer):
    words = "first line\nsecond one\nand a third"
    level = np.full((400, 600), 235, np.uint8)
    level[100:230, 120:420] = note(words, height=130)
    turn = cv2.getRotationMatrix2D((300, 200), -4, 1)
    image = cv2.warpAffine(level, turn, (600, 400), borderValue=235)
    page = prepare(image, (160, 256), normalise=True)
    lines = split_lines(
        [Character(one, 1.0) for one in words], page.page, size=(400, 600), to_image=page.to_source
    )
    for number, line in enumerate(lines):
        left, top, right, bottom = line.box
        alone = np.full((400, 600), 235, np.uint8)
        alone[100:230, 120:420] = note("\n" * number + words.split("\n")[number], height=130)
        ys, xs = np.nonzero(cv2.warpAffine(alone, turn, (600, 400), borderValue=235) < 128)
        assert np.abs([left - xs.min(), right - xs.max() - 1]).max() <= 6
        assert abs((top + bottom) / 2 - (ys.min() + ys.max()) / 2) <= 8
        assert top <= ys.mean() <= bottom


def spoil(folder):
    """Put files that are no images into a folder; return their paths."""
    (folder / "text.png").write_text("this is no image")
    (folder / "empty.jpg").write_bytes(b"")
    whole = folder / "whole.png"
    Image.fromarray(note("cut off")).save(whole)
    (folder / "cut.png").write_bytes(whole.read_bytes()[:200])
    header = bytearray(whole.read_bytes())
    header[16:24] = (400_000).to_bytes(4, "big") + (400_000).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(header)
    (folder / "folder.png").mkdir()
    whole.unlink()
    return [folder / f"{n}.{s}" for n, s in [("text", "png"), ("empty", "jpg"), ("cut", "png"),
            ("bomb", "png"), ("folder", "png"), ("missing", "png")]]  # fmt: skip


def test_bad_images_are_refused_in_one_line_and_stop_nothing(recognizer, images, tmp_path):
    bad, good = spoil(tmp_path), scans(images)
    mixed = [path for pair in itertools.zip_longest(good, bad) for path in pair if path]
    results = list(recognizer.read_all(mixed, batch_size=4))
    assert len(results) == len(mixed)
    for path, result in zip(mixed, results, strict=True):
        assert result.source == str(path)
        assert isinstance(result, Refusal if path in bad else Transcript)
        if isinstance(result, Refusal):
            assert str(path) in result.reason
            assert "\n" not in result.reason


def test_one_bad_image_alone_is_an_error(recognizer, tmp_path):
    for path in spoil(tmp_path):
        with pytest.raises(UserError, match=path.name):
            recognizer.read(path)


def test_damaged_files_of_every_format_are_refused_or_read(recognizer, tmp_path):
    generator = np.random.default_rng(0)
    page = Image.fromarray(note("some words"))
    kinds = ("a.png", "a.jpg", "a.tif", "a.webp")
    paths = []
    for name in kinds:
        page.save(tmp_path / name)
        whole = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        for number in range(12):
            torn = whole.copy()
            if number % 3:  # the header matters most
                places = generator.integers(0, 80 if number % 2 else len(torn), 6)
                torn[places] = generator.integers(0, 256, 6)
            else:
                torn = torn[: generator.integers(1, len(torn))]
            paths.append(tmp_path / f"{number}_{name}")
            paths[-1].write_bytes(torn.tobytes())
    results = list(recognizer.read_all(paths))
    assert len(results) == 48
    assert 12 < sum(isinstance(result, Refusal) for result in results) < 48


def test_too_large_an_image_is_refused_before_it_is_decoded(recognizer):
    side = int(MAX_PIXELS**0.5) + 10
    with pytest.raises(UserError, match="Scale it down"):
        recognizer.read(Image.new("1", (side, side)))


def test_images_are_taken_two_batches_ahead_and_no_more(recognizer, images):
    taken = 0

    def endless():
        nonlocal taken
        for path in itertools.cycle(scans(images)):
            taken += 1
            yield path

    reading = recognizer.read_all(endless(), batch_size=3)
    for number in range(1, 25):
        next(reading)
        assert taken <= number + 2 * 3 + 3
    reading.close()


def test_the_next_two_batches_are_prepared_while_the_model_reads(recognizer, images, monkeypatch):
    prepared, seen = [], 0
    prepare, readings = read.prepare, recognizer.readings

    def counted(image, canvas, **how):
        page = prepare(image, canvas, **how)
        prepared.append(image)
        return page

    def slow(pages, sizes):
        nonlocal seen
        seen += len(pages)
        ready = min(seen + 2 * 2, 12)
        for _ in range(3000):  # 30 s, if nobody prepares them
            if len(prepared) >= ready:
                return readings(pages, sizes)
            time.sleep(0.01)
        raise AssertionError(f"{len(prepared)} prepared, and {ready} could be")

    monkeypatch.setattr(read, "prepare", counted)
    monkeypatch.setattr(recognizer, "readings", slow)
    assert len([*recognizer.read_all(scans(images), batch_size=2)]) == 12


def test_no_images_are_no_readings(recognizer):
    assert list(recognizer.read_all([])) == []


def test_the_lines_of_a_page_lie_where_its_ink_is():
    page = 255 - note("first line\nsecond\nand a third", height=130)
    page[page < 60] = 0
    boxes = bands(page, 3)
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert top - 6 <= 40 + 34 * number - 8 <= bottom  # the middle of the small letters
        assert bottom - top < 45
        assert left in range(8, 20) and right in range(90, 260)
    assert [a[3] for a in boxes[:-1]] == [b[1] for b in boxes[1:]]
    assert np.flatnonzero(page.any(axis=1))[0] == boxes[0][1]


@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_there_are_as_many_bands_as_lines_even_on_blank_paper(count):
    for page in (np.zeros((64, 160), np.uint8), np.full((5, 9), 255, np.uint8)):
        boxes = bands(page, count)
        assert len(boxes) == count
        assert all(box[0] < box[2] and box[1] < box[3] for box in boxes)


def test_weights_beside_a_config_are_a_checkpoint(run_folder, images, tmp_path):
    (tmp_path / "config.yaml").write_bytes((run_folder / "config.yaml").read_bytes())
    weights = load_file(run_folder / "best.safetensors")
    save_file(
        {name: torch.zeros_like(one) for name, one in weights.items()},
        tmp_path / "last.safetensors",
    )
    blank = Recognizer.load(tmp_path / "last.safetensors", device="cpu")
    whole = Recognizer.load(run_folder, device="cpu")
    assert blank.read(scans(images)[0]).text != whole.read(scans(images)[0]).text
    assert not whole.model.training
    assert whole.canvas == (64, 160)


def test_a_pattern_means_the_newest_run_that_it_matches(run_folder, tmp_path):
    for age, name in enumerate(("new_run", "old_run", "older_run")):
        (tmp_path / name).mkdir()
        for file in ("config.yaml", "best.safetensors"):
            (tmp_path / name / file).write_bytes((run_folder / file).read_bytes())
        os.utime(tmp_path / name / "config.yaml", (1e9 - age, 1e9 - age))
    (tmp_path / "no_run").mkdir()
    assert find_checkpoint(f"{tmp_path}/*_run").weights.parent == tmp_path / "new_run"
    assert find_checkpoint(f"{tmp_path}/old*").weights.parent == tmp_path / "old_run"
    with pytest.raises(UserError, match="no run folder"):
        find_checkpoint(f"{tmp_path}/no*")


def test_a_released_model_is_found_from_anywhere_but_one_in_the_working_directory_goes_first(
    released, no_release, tmp_path
):
    for named in ("paragraphs", DEFAULT):
        assert find_checkpoint(named).config.parent == no_release / "paragraphs"
    with pytest.raises(UserError, match="Pass checkpoint=paragraphs"):
        find_checkpoint("models/paragraph")
    shutil.copytree(no_release, tmp_path / "models")
    assert find_checkpoint(DEFAULT).config.resolve().is_relative_to(tmp_path / "models")


def test_a_run_without_its_first_weights_can_be_read(make_run, images):
    import yaml

    folder = make_run(steps=0)
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["model"]["weights"] = "/nowhere/best.safetensors"
    tree["model"]["encoder"]["pretrained"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    assert isinstance(Recognizer.load(folder).read(scans(images)[0]), Transcript)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=line_cnn"],
        [
            "model=line_cnn",
            "model.loss=ctc",
            "model.window_stride_px=2",
            "datamodule.max_length=30",
        ],
        ["decoding=beam", "decoding.beam_width=2"],
    ],
)
def test_every_kind_of_model_and_decoding_reads(make_run, images, overrides):
    recognizer = Recognizer.load(make_run(*overrides, steps=0), device="cpu")
    paths = scans(images)[:3]
    for path, together in zip(paths, recognizer.read_all(paths), strict=True):
        assert isinstance(together, Transcript)
        assert together.text == recognizer.read(path).text
        assert len(together.text) <= recognizer.max_length


@pytest.mark.usefixtures("no_release")
def test_what_is_no_checkpoint_is_refused_with_what_to_type(run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "config_only").mkdir()
    (tmp_path / "config_only" / "config.yaml").write_bytes(
        (run_folder / "config.yaml").read_bytes()
    )
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_bytes((run_folder / "config.yaml").read_bytes())
    (tmp_path / "damaged" / "best.safetensors").write_bytes(b"x" * 50)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_bytes((run_folder / "config.yaml").read_bytes())
    save_file({"a": torch.zeros(1)}, tmp_path / "other" / "best.safetensors")
    cases = {
        "nowhere": "none so far.*Pass checkpoint=outputs/runs",
        DEFAULT: "not here. Train one with python train.py experiment=ten_minutes",
        "empty": "holds no config.yaml",
        "config_only": "holds no best.safetensors",
        "damaged": "damaged or belongs to another model",
        "other": "damaged or belongs to another model",
        "0123456789abcdef0123456789abcdef": "mlflow.db does not exist",
    }
    for path, said in cases.items():
        with pytest.raises(UserError, match=said) as refused:
            Recognizer.load(path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("device", ["gpu", "tpu", "cuda:99", "meta", ""])
def test_a_device_that_is_not_here_is_refused(run_folder, device):
    with pytest.raises(UserError, match="Pass device=auto"):
        Recognizer.load(run_folder, device=device)
