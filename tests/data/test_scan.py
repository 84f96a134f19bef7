"""Scans of every kind become the same ink."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from paragraph_ocr.data import scan
from paragraph_ocr.data.scan import MAX_PIXELS, fit, ink, read_grey, read_page, read_scan
from paragraph_ocr.errors import UserError


@pytest.fixture(scope="module")
def strokes():
    """Return a page of thin dark strokes on white: uint8 grey, 0 is black."""
    page = np.full((240, 320), 255, np.uint8)
    for row in range(30, 220, 40):
        cv2.putText(page, "dear sir, yours", (15, row), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 20, 2)
    return page


def same(one, other):
    """Return the share of pixels on which both agree whether there is ink."""
    return float(np.mean((one > 128) == (other > 128)))


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def kinds(page):
    """Yield a name and the page as an image of another kind."""
    grey = Image.fromarray(page)
    clear = Image.merge("RGBA", [Image.new("L", grey.size, 0)] * 3 + [Image.fromarray(255 - page)])
    yield "grey.png", grey
    yield "rgb.jpg", grey.convert("RGB")
    yield "palette.png", grey.convert("P")
    yield "two_levels.tif", grey.convert("1")
    yield "cmyk.tif", grey.convert("CMYK")
    yield "transparent.png", clear  # black ink on nothing
    yield "wide.png", Image.fromarray(page.astype(np.uint16) * 257)
    yield "web.webp", grey.convert("RGB")
    yield "dark_ground.png", Image.fromarray(255 - page)


@pytest.mark.parametrize("index", range(9))
def test_every_kind_of_image_gives_the_same_ink(strokes, tmp_path, index):
    name, image = list(kinds(strokes))[index]
    page = read_scan(saved(tmp_path, image, name))
    assert page.dtype == np.uint8
    assert page.shape == strokes.shape
    assert same(page, 255 - strokes) > 0.97
    assert np.median(page) == 0


def test_the_cameras_orientation_is_obeyed(strokes, tmp_path):
    turned = Image.fromarray(strokes).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    page = read_scan(saved(tmp_path, turned, "photo.jpg", exif=exif, quality=95))
    assert same(page, 255 - strokes) > 0.97


def test_uneven_paper_and_what_shows_through_are_taken_out(strokes):
    shade = np.linspace(0.45, 1.0, strokes.shape[1])[None, :]
    behind = np.roll(255 - strokes, 20, axis=0)[:, ::-1] * 0.12
    photo = np.clip((strokes - behind) * shade, 0, 255).astype(np.uint8)
    assert same(ink(photo), 255 - strokes) > 0.97
    assert float(np.mean(ink(photo)[strokes == 255] > 60)) < 0.01


def woven(shape, deviation, *, threads_px=6.0):
    """Return how much darker than its mean each pixel of woven paper is: threads across and down."""
    generator = np.random.default_rng(0)
    across, down = (
        cv2.GaussianBlur(generator.normal(size=shape), (0, 0), sigmaX=wide, sigmaY=high)
        for wide, high in ((threads_px, 0.7), (0.7, threads_px))
    )
    threads = across / across.std() + down / down.std()
    return np.clip(deviation * threads / threads.std(), -0.1, 0.9)


@pytest.mark.parametrize("deviation", [0.1, 0.2, 0.25])
def test_the_grain_of_woven_paper_is_taken_out_and_strokes_stay(strokes, deviation):
    page = ink((0.88 * strokes * (1 - woven(strokes.shape, deviation))).astype(np.uint8))
    assert float(np.mean(page[strokes == 255] > 64)) < 0.02
    assert float(np.mean(page[strokes == 20] > 64)) > 0.95


def test_a_blank_page_is_blank():
    noise = np.random.default_rng(0).normal(230, 2, (100, 100)).astype(np.uint8)
    assert float(np.mean(ink(noise) > 30)) < 0.01


def slow_ink(grey):
    """Return what `ink` approximates: percentiles and shares of the paper in full precision."""
    low, middle, high = np.percentile(grey, (1, 50, 99))
    if high - low > 30 and middle < (low + high) / 2:
        grey = 255 - grey
    scale = min(1.0, 600 / max(grey.shape))
    smaller = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    coarse = cv2.resize(grey, smaller, interpolation=cv2.INTER_AREA)
    window = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (41, 41))
    paper = cv2.GaussianBlur(cv2.morphologyEx(coarse, cv2.MORPH_CLOSE, window), (0, 0), 10)
    paper = cv2.resize(paper, grey.shape[::-1], interpolation=cv2.INTER_LINEAR)
    dark = 1 - grey.astype(np.float32) / np.maximum(paper, 1)
    strokes, ground = max(float(np.percentile(dark, 99)), 0.15), np.median(dark)
    grain = (ground + 2.5 * 1.4826 * np.median(np.abs(dark - ground))) / strokes
    least = np.clip(grain, 0.25, 0.7)
    return (np.clip((dark / strokes - least) / (0.85 - least), 0, 1) * 255).astype(np.uint8)


def letter(seed, *, height=1200, width=900):
    """Return a photographed letter: grey, written by a pen of its own on uneven, grained paper."""
    generator = np.random.default_rng(seed)
    ink = np.zeros((height, width), np.uint8)
    size, thick = generator.uniform(0.8, 1.6) * width / 900, max(1, round(width / 450))
    for row in range(round(80 * size), height - 20, round(60 * size)):
        words = "".join(generator.choice([*"aebdghilmnoprstuy  "], size=30))
        cv2.putText(ink, words, (20, row), cv2.FONT_HERSHEY_SCRIPT_SIMPLEX, size, 255, thick)
    light = cv2.resize(
        generator.uniform(0.6, 1.0, size=(3, 3)), (width, height), interpolation=cv2.INTER_CUBIC
    )
    grain = generator.normal(0, 2, size=(height, width))
    share = generator.uniform(0.4, 0.8) * cv2.GaussianBlur(ink, (3, 3), 0) / 255
    return np.clip(235 * light * (1 - share) + grain, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(4))
def test_ink_is_that_of_full_precision(seed):
    grey = letter(seed)
    for page in (grey, 255 - grey, grey[:300], grey // 3):
        expected = slow_ink(page)
        assert expected.mean() > 5  # there is something to be compared
        assert np.abs(ink(page).astype(int) - expected).mean() < 0.6
    for page in (grey[:50, :60], grey[:2, :3], grey[:1, :1]):  # grain, as dark as may be
        assert np.abs(ink(page).astype(int) - slow_ink(page)).mean() < 4


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "colour.jpg"])
def test_a_page_is_that_of_the_whole_scan(tmp_path, name):
    for seed, (height, width) in enumerate([(3508, 2480), (1000, 2400), (576, 640), (200, 300)]):
        grey = letter(seed, height=height, width=width)
        image = Image.fromarray(grey)
        path = saved(tmp_path, image.convert("RGB") if "colour" in name else image, name)
        expected = fit(slow_ink(read_grey(path, where="")), height=576, width=640)
        page, own, _ = read_page(path, where="", height=576, width=640)
        assert own == (height, width)
        assert page.shape == expected.shape
        assert np.abs(page.astype(int) - expected).mean() < 1.5
        assert np.corrcoef(page.ravel(), expected.ravel())[0, 1] > 0.99


def test_a_large_jpeg_is_not_unpacked_whole(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.fromarray(letter(0, height=3600, width=2400)), "a.jpg")
    seen = []
    monkeypatch.setattr(scan, "ink", lambda grey: (seen.append(grey.shape), ink(grey))[1])
    grey = scan._grey
    monkeypatch.setattr(scan, "_grey", lambda image: (seen.append(image.size), grey(image))[1])
    read_page(path, where="", height=300, width=200)
    assert seen == [(600, 900), (900, 600)]


def test_a_turned_jpeg_that_comes_smaller_is_upright_and_knows_its_size(tmp_path):
    grey = letter(1, height=2400, width=1600)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(grey).transpose(Image.Transpose.ROTATE_90)
    path = saved(tmp_path, turned, "photo.jpg", exif=exif, quality=95)
    page, own, _ = read_page(path, where="", height=300, width=400)
    assert own == (2400, 1600)
    expected = fit(slow_ink(grey), height=300, width=400)
    assert page.shape == expected.shape == (300, 200)
    assert np.corrcoef(page.ravel(), expected.ravel())[0, 1] > 0.97


def test_an_image_of_the_callers_stays_as_it_is(tmp_path):
    path = saved(tmp_path, Image.fromarray(letter(0, height=2000, width=1600)), "a.jpg")
    with Image.open(path) as image:
        page, own, _ = read_page(image, where="", height=100, width=100)
        assert image.size == (1600, 2000) and own == (2000, 1600)
        assert page.shape == (100, 80)


@pytest.mark.parametrize("count", [1, 2, 3, 100, 10_001])
def test_percentiles_are_numpys(count):
    values = np.random.default_rng(count).integers(256, size=(1, count), dtype=np.uint8)
    expected = np.percentile(values, (1, 50, 99))
    np.testing.assert_allclose(scan._percentiles(values, 1, 50, 99), expected)


def test_a_large_page_is_scaled_whole_and_a_small_one_stays(strokes):
    large = np.zeros((1152, 1280), np.uint8)
    large[:4, :] = large[-4:, :] = large[:, :4] = large[:, -4:] = 255
    fitted = fit(large, height=576, width=640)
    assert fitted.shape == (576, 640)
    assert fitted[0].min() > 200 < fitted[-1].min()
    assert fitted[:, 0].min() > 200 < fitted[:, -1].min()
    assert fit(np.zeros((100, 2000), np.uint8), height=576, width=640).shape == (32, 640)
    assert fit(strokes, height=576, width=640) is strokes


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path):
    side = int(MAX_PIXELS**0.5) + 1000
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(UserError, match="claims"):
        read_scan(tmp_path / "bomb.png")


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\nhalf"])
def test_what_is_no_image_is_refused_by_name(tmp_path, content):
    (tmp_path / "page.png").write_bytes(content)
    with pytest.raises(UserError, match=r"page\.png") as refusal:
        read_scan(tmp_path / "page.png")
    assert "\n" not in str(refusal.value)


def test_half_a_file_is_refused(strokes, tmp_path):
    whole = saved(tmp_path, Image.fromarray(strokes), "page.png").read_bytes()
    (tmp_path / "page.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        read_scan(tmp_path / "page.png")
