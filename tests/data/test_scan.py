"""Scans of every kind become the same ink."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from paragraph_ocr.data.scan import MAX_PIXELS, fit, ink, read_scan
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


def test_a_blank_page_is_blank():
    noise = np.random.default_rng(0).normal(230, 2, (100, 100)).astype(np.uint8)
    assert float(np.mean(ink(noise) > 30)) < 0.01


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
