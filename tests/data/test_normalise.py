"""A page comes to look like a rendered one, and nothing that was written is lost."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from paragraph_ocr.data.folder import FolderCorpus
from paragraph_ocr.data.normalise import (
    PITCH_PX,
    letters_px,
    normalise_page,
    pitch_px,
    slope_deg,
    without_dust,
)
from paragraph_ocr.data.store import Store

CANVAS = (576, 640)


@pytest.fixture(scope="module")
def rendered(notes):
    """Return a function that draws pages of so many lines."""

    def draw(count, *, lines):
        corpus = replace(
            notes, height=CANVAS[0], width=CANVAS[1], min_lines=lines, max_lines=lines, jitter=0.5,
            min_characters=24 * lines, mean_characters=30 * lines, max_characters=36 * lines,
        )  # fmt: skip
        make = corpus.maker()
        return [make(np.random.default_rng([lines, n]), "train").image for n in range(count)]

    return draw


def turned(page, degrees, *, spare=1.2):
    """Return the page on larger paper, its lines falling by so much more; and the map (2, 3) to it."""
    height, width = (round(side * spare) for side in page.shape)
    centre = (page.shape[1] / 2, page.shape[0] / 2)
    matrix = cv2.getRotationMatrix2D(centre, -degrees, 1)
    matrix[:, 2] += (width / 2 - centre[0], height / 2 - centre[1])
    return cv2.warpAffine(page, matrix, (width, height)), matrix


def scaled(page, factor):
    kind = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(page, None, fx=factor, fy=factor, interpolation=kind)


@pytest.mark.parametrize("lines", [1, 2, 5, 12])
def test_a_turn_is_found_and_undone(rendered, lines):
    for page, degrees in zip(rendered(6, lines=lines), (-3.5, -2, -1, 1, 2, 3.5), strict=True):
        crooked, _ = turned(page, degrees)
        assert slope_deg(crooked) - slope_deg(page) == pytest.approx(degrees, abs=0.4)
        level, _ = normalise_page(crooked, height=CANVAS[0], width=CANVAS[1])
        assert abs(slope_deg(level)) <= 0.5


@pytest.mark.parametrize("lines", [1, 2, 5, 12])
def test_a_pitch_follows_the_scale(rendered, lines):
    for page in rendered(4, lines=lines):
        pitch = pitch_px(page, slope=slope_deg(page))
        for factor in (0.6, 2, 3):
            other = scaled(page, factor)
            found = pitch_px(other, slope=slope_deg(other))
            assert found == pytest.approx(factor * pitch, rel=0.1)


def test_a_pitch_is_the_distance_of_baselines():
    for pitch in (30, 45, 70):
        page = np.zeros((60 + 6 * pitch, 500), np.uint8)
        for line in range(6):
            place = (20, 40 + line * pitch)
            cv2.putText(page, "sir, the gods help", place, cv2.FONT_HERSHEY_SIMPLEX, 0.8, 255, 2)
        assert pitch_px(page) == pytest.approx(pitch, rel=0.05)
        assert slope_deg(page) == pytest.approx(0, abs=0.2)


def test_few_rendered_pages_have_a_greater_pitch(notes):
    page = {"height": 576, "width": 640, "min_lines": 3, "max_lines": 12}
    length = {"min_characters": 60, "mean_characters": 350, "max_characters": 680}
    make = replace(notes, **page, **length).maker()  # synthetic_paragraphs
    pages = [make(np.random.default_rng(index), "train").image for index in range(80)]
    pitches = np.array([pitch_px(page, slope=slope_deg(page)) for page in pages])
    assert 0.88 <= (pitches <= PITCH_PX).mean() <= 0.99


@pytest.mark.parametrize("lines", [2, 5, 12])
def test_small_and_large_writing_comes_to_one_pitch_or_fills_the_canvas(rendered, lines):
    for page in rendered(4, lines=lines):
        for factor in (0.3, 1, 3):
            found, _ = normalise_page(scaled(page, factor), height=CANVAS[0], width=CANVAS[1])
            pitch = pitch_px(found, slope=slope_deg(found))
            assert pitch <= 1.1 * PITCH_PX
            assert pitch >= 0.9 * PITCH_PX or fills(found)


def fills(page):
    """Return whether the ink reaches from one edge to the other, but for the margins."""
    return any(np.ptp(np.nonzero(page > 64)[axis]) > 0.9 * page.shape[axis] for axis in (0, 1))


def printed(rows, *, columns=(20,) * 9):
    """Return a page of lines at these rows and columns in letters of one size."""
    page = np.zeros((rows[-1] + 40, 700), np.uint8)
    for row, column in zip(rows, columns, strict=False):
        place = (column, row)
        cv2.putText(page, "glad, my joyful", place, cv2.FONT_HERSHEY_SIMPLEX, 0.9, 255, 2)
    return page


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ((40, 200, 360, 520), (20,) * 4),  # far apart
        ((40, 125, 180, 330), (300, 20, 90, 200)),  # a date, a greeting, a signature
        ((40, 400), (20, 250)),
    ],
)
def test_letters_of_lines_far_apart_are_not_made_small(rows, columns):
    close, _ = normalise_page(printed((40, 84, 128, 172)), height=576, width=640)
    page = printed(rows, columns=columns)
    assert letters_px(page) == pytest.approx(letters_px(printed((40, 84))), rel=0.1)
    found, _ = normalise_page(page, height=576, width=640)
    assert letters_px(found) > 0.6 * letters_px(close) or fills(found)


def test_no_ink_is_lost_nor_leaves_the_canvas(rendered):
    for lines in (1, 4, 12):
        for page, degrees in zip(rendered(4, lines=lines), (-5, -1, 0, 4), strict=True):
            for factor in (0.5, 1, 2.5):
                given, _ = turned(scaled(page, factor), degrees, spare=1.7)
                found, back = normalise_page(given, height=CANVAS[0], width=CANVAS[1])
                assert found.shape == CANVAS
                area = abs(np.linalg.det(back[:, :2]))
                # cubic interpolation sharpens what is enlarged
                assert 0.98 < found.sum() * area / given.sum() < 1.06
                rim = np.concatenate([found[0], found[-1], found[:, 0], found[:, -1]])
                assert rim.max() < 64


def test_every_spot_of_a_page_is_found_again_on_the_image(rendered):
    page = rendered(1, lines=5)[0]
    given, _ = turned(scaled(page, 1.5), 3)
    found, back = normalise_page(given, height=CANVAS[0], width=CANVAS[1])
    middles = back.copy()  # from the middle of a pixel to the middle of another
    middles[:, 2] += back[:, :2] @ (0.5, 0.5) - 0.5
    drawn = cv2.warpAffine(
        cv2.GaussianBlur(given, (0, 0), 1), middles, CANVAS[::-1], flags=cv2.WARP_INVERSE_MAP
    )
    assert np.corrcoef(drawn.ravel(), found.ravel())[0, 1] > 0.93
    for shift in ((3, 0), (0, 3)):
        aside = np.roll(drawn, shift, axis=(0, 1))
        assert np.corrcoef(aside.ravel(), found.ravel())[0, 1] < 0.75


def test_a_page_made_so_stays_as_it_is(rendered):
    for page in [*rendered(4, lines=9), *rendered(4, lines=3)]:
        found, back = normalise_page(page, height=CANVAS[0], width=CANVAS[1])
        if abs(slope_deg(page)) < 0.5:  # a level page is only scaled and moved
            assert np.abs(back[[0, 1], [1, 0]]).max() == 0
            assert back[0, 0] == pytest.approx(back[1, 1], rel=0.01)
        _, again = normalise_page(found, height=CANVAS[0], width=CANVAS[1])
        assert np.allclose(again[:, :2], np.eye(2), atol=0.02)
        assert np.abs(again[:, 2]).max() <= 3


def test_dust_goes_where_there_is_much_of_it_and_dots_stay(rendered):
    generator = np.random.default_rng(0)
    for page in [printed((40, 90, 140)), *(scaled(p, 2) for p in rendered(4, lines=5))]:
        assert without_dust(page) is page
        dusty = page.copy()
        free = cv2.dilate(page, np.ones((15, 15), np.uint8)) == 0
        ys, xs = np.nonzero(free[:-1, :-1])
        chosen = generator.choice(len(ys), size=page.size // 1500, replace=False)
        few = chosen[:5]
        dusty[ys[few], xs[few]] = 255
        assert without_dust(dusty) is dusty
        dusty[ys[chosen], xs[chosen]] = 255
        cleaned = without_dust(dusty)
        near = cv2.dilate(page, np.ones((3, 3), np.uint8)) > 0
        assert (cleaned == page)[~near].all()
        # dots of the writing may go with it, and broken strokes
        assert cleaned.sum() > 0.97 * page.sum()


def test_blank_paper_dust_and_a_stroke_are_taken_as_they_come():
    blank = np.zeros((90, 70), np.uint8)
    dusty = blank.copy()
    dusty[::30, ::30] = 255
    for page in (blank, dusty):
        assert slope_deg(page) == 0
        assert pitch_px(page) is None
    found, back = normalise_page(blank, height=64, width=96)
    assert found.shape == (64, 96) and not found.any()
    assert np.allclose(back[:, :2], np.eye(2) * 90 / 64, rtol=0.05)
    for shape in ((1, 1), (1, 300), (300, 1), (2, 3)):
        found, _ = normalise_page(np.full(shape, 255, np.uint8), height=64, width=96)
        assert found.any()


def cut_out(*, below=0, text="dull hay, kind laws"):
    """Return a page of two lines, and of another above and below as much as a crop leaves of them."""
    page = np.zeros((260, 420), np.uint8)
    for row in (60, 110, 160, 210):
        line = text if row in (110, 160) else "summer was over now"
        cv2.putText(page, line, (20, row), cv2.FONT_HERSHEY_SIMPLEX, 0.9, 255, 2)
    return page[60 - 8 : 210 - 12 + below]


def test_strips_of_neighbouring_lines_are_taken_out():
    page = cut_out()
    assert page[0].any() and page[-1].any()
    found, _ = normalise_page(page, height=128, width=448)
    rows = np.flatnonzero(found.max(axis=1) > 64)
    wanted, _ = normalise_page(page[14:-8], height=128, width=448)
    assert np.abs(rows[[0, -1]] - np.flatnonzero(wanted.max(axis=1) > 64)[[0, -1]]).max() <= 1
    assert found.sum() == pytest.approx(wanted.sum(), rel=0.01)


def test_what_may_be_text_at_an_edge_stays():
    lone = "in rain"  # the dots of an i at the upper edge
    page = cut_out(text=lone)
    top = np.flatnonzero(page[20:].any(axis=1))[0] + 20
    for given in (page[top:-8], cut_out(below=12)[14:]):  # dots; half a line
        assert given[0].any() or given[-1].any()
        found, back = normalise_page(given, height=128, width=448)
        area = abs(np.linalg.det(back[:, :2]))
        assert found.sum() * area == pytest.approx(given.sum(), rel=0.03)


def test_a_region_of_a_scan_is_normalised_as_a_page_is(tmp_path, rendered):
    page = 255 - turned(rendered(1, lines=5)[0], 2)[0]
    height, width = page.shape
    corners = f"0,0 {width},0 {width},{height} 0,{height}"
    cv2.imwrite(str(tmp_path / "a.png"), page)
    (tmp_path / "a.xml").write_text(
        '<PcGts xmlns="http://schema.primaresearch.org/PAGE/gts/pagecontent/2019-07-15">'
        f'<Page imageFilename="a.png" imageWidth="{width}" imageHeight="{height}">'
        f'<TextRegion id="r"><Coords points="{corners}"/><TextEquiv><Unicode>a</Unicode>'
        "</TextEquiv></TextRegion></Page></PcGts>"
    )
    whole = tmp_path / "whole"
    whole.mkdir()
    cv2.imwrite(str(whole / "a.png"), page)
    (whole / "a.txt").write_text("a")
    settings = {"name": "mine", "height": 576, "width": 640, "split": "test", "normalise": True}
    region = FolderCorpus(folder=tmp_path, **settings).prepare(tmp_path / "stores", num_workers=0)
    file = FolderCorpus(folder=whole, **settings).prepare(tmp_path / "stores", num_workers=0)
    one, other = Store(region).image(0), Store(file).image(0)
    assert np.abs(one.astype(int) - other).mean() < 1
