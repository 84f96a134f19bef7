"""Pages augmented one by one on a CPU, and that a strength means there what it means for a batch."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch

from paragraph_ocr.data.augment import Augment, Strengths, compressed
from paragraph_ocr.data.augment_page import augment_page, augment_with_letters

COUNT = 150

STRONG = {
    "rotation_deg": 3.0,
    "shear_deg": 12.0,
    "scale": 0.15,
    "perspective": 0.08,
    "translation_px": 12.0,
    "elastic_px": 3.0,
    "tremor_px": 1.0,
    "pen_px": 1.0,
    "blur_px": 1.0,
    "ink": 0.5,
    "paper": 0.3,
    "noise": 0.1,
    "coarse_px": 2.0,
}
MOVING = [name for name in STRONG if Strengths(**{name: 1.0}).move]


def each(page: np.ndarray, strengths: Strengths, count: int = COUNT) -> np.ndarray:
    """Return `count` augmentations of a page, one by one."""
    return np.stack(
        [augment_page(page, strengths, np.random.default_rng([7, i])) for i in range(count)]
    )


def together(page: np.ndarray, strengths: Strengths, count: int = COUNT) -> np.ndarray:
    """Return as many, as one batch."""
    torch.manual_seed(7)
    batch = torch.from_numpy(page).repeat(count, 1, 1, 1)
    return Augment(strengths)(batch)[:, 0].numpy()


def dots(height: int = 192, width: int = 256) -> np.ndarray:
    """Return a page with a blob every 32 px, far enough from the edges to stay on it."""
    page = np.zeros((height, width), np.uint8)
    page[32:-31:32, 48:-47:32] = 255
    page = cv2.GaussianBlur(page, (0, 0), 1.5)
    return cv2.convertScaleAbs(page, alpha=255 / page.max())


def displacements(pages: np.ndarray, page: np.ndarray) -> np.ndarray:
    """Return by how many pixels each dot moved, (pages, dots, xy): the ink of a dot about its centre."""
    moved = []
    for changed in pages:
        for y in range(32, page.shape[0] - 31, 32):
            for x in range(48, page.shape[1] - 47, 32):
                part = changed[y - 15 : y + 16, x - 15 : x + 16].astype(float)
                offsets = np.arange(-15, 16)
                total = part.sum()
                moved.append(((part.sum(0) @ offsets) / total, (part.sum(1) @ offsets) / total))
    return np.array(moved).reshape(len(pages), -1, 2)


def stripes() -> np.ndarray:
    page = np.zeros((128, 160), np.uint8)
    page[24:-24:12, 24:-24] = 255
    page[24:-24, 24:-24:16] = 255
    return cv2.dilate(page, np.ones((3, 3), np.uint8))


def deviation(pages: np.ndarray) -> np.ndarray:
    return pages.reshape(len(pages), -1).std(axis=1)


def sharpness(pages: np.ndarray) -> np.ndarray:
    return np.array([cv2.Laplacian(page, cv2.CV_64F).std() for page in pages])


def ink(pages: np.ndarray) -> np.ndarray:
    return pages.reshape(len(pages), -1).mean(axis=1)


def test_without_strengths_the_page_stays_as_it_is():
    page = stripes()
    assert augment_page(page, Strengths(), np.random.default_rng(0)) is page


def test_the_generator_decides_and_the_input_stays():
    page = stripes()
    given = page.copy()
    first, second, other = (
        augment_page(page, Strengths(**STRONG), np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(page, given)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert (first.shape, first.dtype) == (page.shape, np.uint8)


@pytest.mark.parametrize("name", STRONG)
def test_a_tiny_strength_changes_little_and_a_full_one_each_page_otherwise(name):
    page = stripes()
    little = each(page, Strengths(**{name: 1e-4}), 3)
    assert np.abs(little.astype(int) - page).max() <= 2
    much = each(page, Strengths(**{name: STRONG[name]}), 6)
    assert len({page.tobytes(), *(changed.tobytes() for changed in much)}) == 7


@pytest.mark.parametrize("augmented", [each, together])
def test_ink_never_leaves_the_page(augmented: Callable):
    frame = np.zeros((96, 160), np.uint8)
    frame[[4, 5, 6, -7, -6, -5], 5:-5] = 255
    frame[5:-5, [4, 5, 6, -7, -6, -5]] = 255
    moved = augmented(frame, Strengths(**{name: STRONG[name] for name in MOVING}))
    for edge in (moved[:, 0], moved[:, -1], moved[..., 0], moved[..., -1]):
        assert edge.max() == 0
    for middle in (moved[:, 48, :], moved[:, :, 80]):
        half = middle.shape[1] // 2
        assert (middle[:, :half].max(axis=1) > 60).all()
        assert (middle[:, half:].max(axis=1) > 60).all()


@pytest.mark.parametrize("name", MOVING)
def test_a_strength_moves_ink_as_far_on_either_device(name):
    page = dots()
    strengths = Strengths(**{name: {"shear_deg": 6.0, "scale": 0.06}.get(name, STRONG[name])})
    far = []
    for pages in (each(page, strengths), together(page, strengths)):
        squares = (displacements(pages, page) ** 2).sum(axis=2)
        far.append(np.sqrt(squares.mean()))
    assert far[0] > 0.15
    assert far[0] == pytest.approx(far[1], rel=0.15)


@pytest.mark.parametrize("name", ["elastic_px", "tremor_px"])
@pytest.mark.parametrize("augmented", [each, together])
def test_elastic_moves_reach_their_strength_and_no_more(augmented: Callable, name):
    page, strength = dots(), 4.0
    moved = np.abs(displacements(augmented(page, Strengths(**{name: strength})), page))
    assert 0.75 * strength < moved.max() < strength + 0.3
    assert abs(moved.mean(axis=(0, 1))).max() < strength / 4


def test_the_coarse_move_takes_neighbours_along_and_the_fine_one_does_not():
    page = dots()
    together_share = {}
    for name in ("elastic_px", "tremor_px"):
        moved = displacements(each(page, Strengths(**{name: 3.0})), page).reshape(COUNT, 5, 6, 2)
        across = (moved[:, :, 1:] * moved[:, :, :-1]).mean() / (moved**2).mean()
        together_share[name] = across
    assert together_share["elastic_px"] > 0.6
    assert together_share["tremor_px"] < 0.3


@pytest.mark.parametrize("augmented", [each, together])
def test_perspective_shows_one_edge_larger_by_its_strength(augmented: Callable):
    page = np.zeros((200, 200), np.uint8)
    page[40:160, [50, 149]] = 255
    page = cv2.dilate(page, np.ones((3, 3), np.uint8))
    ratios = []
    for changed in augmented(page, Strengths(perspective=0.1)):
        columns = [np.flatnonzero(half.max(axis=1) > 100) for half in np.hsplit(changed, 2)]
        left, right = (rows[-1] - rows[0] + 1 for rows in columns)
        ratios.append(left / right)
    # at half the distance to the edge the factors are 1 +- 0.05
    assert 1.06 < max(ratios) < 1.13
    assert 1 / 1.13 < min(ratios) < 1 / 1.06
    assert abs(np.mean(ratios) - 1) < 0.02


@pytest.mark.parametrize("augmented", [each, together])
def test_a_rotation_turns_either_way_alike(augmented: Callable):
    page = np.zeros((200, 200), np.uint8)
    page[99:102, 40:160] = 255
    turned = augmented(page, Strengths(rotation_deg=5.0)).astype(float)
    rows = np.arange(200)
    ends = [turned[:, :, x] @ rows / turned[:, :, x].sum(axis=1) for x in (60, 140)]
    degrees = np.degrees(np.arctan2(ends[1] - ends[0], 80))
    assert np.abs(degrees).max() <= 5.1
    assert np.std(degrees) == pytest.approx(5 / np.sqrt(3), rel=0.15)  # uniform
    assert abs(np.mean(degrees)) < 0.8


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("pen_px", ink),
        ("blur_px", sharpness),
        ("ink", ink),
        ("paper", ink),
        ("coarse_px", sharpness),
        ("noise", lambda pages: deviation(pages[:, :20, :])),
    ],
)
def test_a_strength_changes_grey_levels_as_much_on_either_device(name, measure):
    page = stripes() // 2 + 40 if name == "noise" else stripes()
    before = float(measure(page[None])[0])
    means, spreads = [], []
    for pages in (each(page, Strengths(**{name: STRONG[name]}), 300),
                  together(page, Strengths(**{name: STRONG[name]}), 300)):  # fmt: skip
        change = measure(pages) - before
        means.append(np.abs(change).mean())
        spreads.append(change.std())
    assert means[0] > 0.5
    assert means[0] == pytest.approx(means[1], rel=0.15)
    assert spreads[0] == pytest.approx(spreads[1], rel=0.15)


def test_strokes_stay_whatever_the_pen():
    page = stripes()
    left = ink(each(page, Strengths(pen_px=1.0)))
    assert left.min() > 0.3 * ink(page[None])[0]


def test_blank_pages_are_no_trouble():
    blank = np.zeros((40, 60), np.uint8)
    moving = Strengths(**{name: STRONG[name] for name in MOVING})
    assert not augment_page(blank, moving, np.random.default_rng(0)).any()


SOMETIMES = {
    "neighbours_px": 16.0,
    "rules": 0.8,
    "threshold": 0.5,
    "show_through": 0.6,
    "stains": 0.6,
    "specks": 0.02,
}


def letter() -> np.ndarray:
    """Return three lines of grey strokes, with room above and below."""
    page = np.zeros((160, 200), np.uint8)
    for line in range(3):
        for x in range(30, 170, 7):
            page[40 + 30 * line : 56 + 30 * line, x : x + 2 + line] = 70 + 20 * line + x % 90
    return page


@pytest.mark.parametrize("augmented", [each, together])
@pytest.mark.parametrize("name", SOMETIMES)
def test_what_only_some_scans_have_comes_on_some_pages(augmented: Callable, name):
    page = letter()
    pages = augmented(page, Strengths(**{name: SOMETIMES[name]}), 200)
    untouched = np.mean([np.array_equal(changed, page) for changed in pages])
    # two edges, each on half of the pages, and strips may lie between two lines
    wanted = 0.4 if name == "neighbours_px" else 0.5
    assert untouched == pytest.approx(wanted, abs=0.12)
    assert np.array_equal(augmented(page, Strengths(**{name: 1e-9}), 3)[0], page)


@pytest.mark.parametrize("quality", [3, 20, 50, 75, 95])
def test_compressing_a_batch_gives_what_a_jpeg_file_gives(quality):
    page = cv2.GaussianBlur(letter()[:, :197], (0, 0), 0.8)  # no whole number of blocks
    _, file = cv2.imencode(".jpg", 255 - page, [cv2.IMWRITE_JPEG_QUALITY, quality])
    wanted = 255 - cv2.imdecode(file, cv2.IMREAD_GRAYSCALE).astype(float)
    batch = torch.from_numpy(page)[None, None].float() / 255
    found = 255 * compressed(batch, torch.full((1, 1, 1, 1), float(quality)))[0, 0].clamp(0, 1)
    far = np.abs(found.numpy() - wanted)
    assert np.abs(page - wanted).max() > 2 * far.max() or quality == 95
    assert far.mean() < 0.4
    assert np.mean(far > 3) < 0.005  # a coefficient between two steps may go either way


@pytest.mark.parametrize("augmented", [each, together])
def test_half_of_the_pages_are_compressed_and_each_otherwise(augmented: Callable):
    page = letter()
    pages = augmented(page, Strengths(jpeg=0.95), 200)
    changed = [np.abs(its.astype(int) - page).mean() for its in pages if (its != page).any()]
    assert len(changed) / len(pages) == pytest.approx(0.5, abs=0.12)
    assert max(changed) > 3 * min(changed)
    weak = augmented(page, Strengths(jpeg=1e-3), 20)
    assert np.abs(weak.astype(int) - page).max() <= 2


def test_jpeg_changes_pages_as_much_on_either_device():
    page = letter()
    means = [
        np.abs(pages.astype(int) - page).mean()
        for pages in (
            each(page, Strengths(jpeg=0.95), 300),
            together(page, Strengths(jpeg=0.95), 300),
        )
    ]
    assert means[0] > 0.5
    assert means[0] == pytest.approx(means[1], rel=0.2)


@pytest.mark.parametrize("augmented", [each, together])
def test_neighbours_show_at_the_edges_and_leave_the_writing_alone(augmented: Callable):
    page = letter()
    pages = augmented(page, Strengths(neighbours_px=16.0), 200)
    inked = np.flatnonzero(page.any(axis=1))
    top, bottom = inked[0], inked[-1]
    assert (pages[:, top - 4 : bottom + 5] == page[top - 4 : bottom + 5]).all()
    assert not pages[:, 16 : top - 4].any() and not pages[:, bottom + 5 : -16].any()
    rows = {row.tobytes() for row in page}
    strips = [changed[place] for changed in pages for place in (0, -1) if changed[place].any()]
    assert len(strips) > 50
    assert {strip.tobytes() for strip in strips} <= rows, "parts of the page's own lines"
    crowded = page[top - 3 : bottom + 4]
    assert all(
        np.array_equal(changed, crowded)
        for changed in augmented(crowded, Strengths(neighbours_px=16.0), 20)
    )


@pytest.mark.parametrize("augmented", [each, together])
def test_ruled_lines_are_straight_alike_and_never_cover_darker_ink(augmented: Callable):
    page = letter()
    for changed in augmented(page, Strengths(rules=0.8), 60):
        assert (changed >= page).all() and changed.max() <= max(page.max(), 0.8 * 255)
        ruled = np.flatnonzero(changed[:, 0])
        if len(ruled):
            assert len({changed[row, 0] for row in ruled}) == 1
            assert len(np.unique(changed[ruled][:, :25])) == 1
            assert np.diff(ruled)[np.diff(ruled) > 2].min(initial=20) >= 18


@pytest.mark.parametrize("augmented", [each, together])
@pytest.mark.parametrize("name", ["show_through", "stains"])
def test_what_the_paper_shows_is_no_darker_than_asked_and_hides_no_ink(augmented: Callable, name):
    page = letter()
    pages = augmented(page, Strengths(**{name: 0.3}), 100)
    assert (pages >= page).all()
    assert (pages[:, page > 0.3 * 255] == page[page > 0.3 * 255]).all()
    added = pages[:, page == 0]
    assert 0.15 * 255 < added.max() <= 0.3 * 255 + 1


@pytest.mark.parametrize("augmented", [each, together])
def test_stains_have_soft_edges(augmented: Callable):
    blank = np.zeros((200, 240), np.uint8)
    pages = augmented(blank, Strengths(stains=1.0), 40).astype(int)
    assert pages.max() > 150
    assert max(np.abs(np.diff(pages, axis=axis)).max() for axis in (1, 2)) < 0.25 * 255


@pytest.mark.parametrize("augmented", [each, together])
def test_specks_are_small_apart_and_hide_no_ink(augmented: Callable):
    page = letter()
    pages = augmented(page, Strengths(specks=0.01), 100)
    assert (pages >= page).all()
    shares = [(changed != page).mean() for changed in pages]
    assert 0.004 < max(shares) < 0.012
    areas = [
        area
        for changed in augmented(np.zeros_like(page), Strengths(specks=0.01), 30)
        for *_, area in cv2.connectedComponentsWithStats((changed > 0).astype(np.uint8))[2][1:]
    ]
    assert np.mean(np.array(areas) <= 4) > 0.97
    assert 0.02 < np.mean(np.array(areas) >= 4) < 0.1


@pytest.mark.parametrize("augmented", [each, together])
def test_a_coarse_scan_keeps_ink_where_it_is_and_as_much_of_it(augmented: Callable):
    page = dots(191, 255)  # no whole number of coarse pixels
    pages = augmented(page, Strengths(coarse_px=3.0), 40)
    assert np.abs(displacements(pages, page)).max() < 0.6
    assert ink(pages) == pytest.approx(ink(page[None])[0], rel=0.06)
    broad = cv2.dilate(page, np.ones((7, 7), np.uint8))
    assert (pages[:, broad == 0] <= 3).all()


@pytest.mark.parametrize("augmented", [each, together])
def test_a_page_in_black_and_white_keeps_its_strokes(augmented: Callable):
    page = letter()
    pages = augmented(page, Strengths(threshold=1.0), 60)
    assert set(np.unique(pages)) == {0, 255}
    assert not pages[:, page == 0].any()
    assert (pages[:, page > 0.41 * page.max()] == 255).all()


@pytest.mark.parametrize("name", SOMETIMES)
def test_what_scans_have_adds_as_much_ink_on_either_device(name):
    page = letter()
    before = float(ink(page[None])[0])
    changes = [
        np.abs(ink(pages) - before).mean()
        for pages in (each(page, Strengths(**{name: SOMETIMES[name]}), 400),
                      together(page, Strengths(**{name: SOMETIMES[name]}), 400))
    ]  # fmt: skip
    assert changes[0] == pytest.approx(changes[1], rel=0.2)


def test_neighbours_keep_to_pages_that_are_smaller_than_their_canvas():
    torch.manual_seed(0)
    page = letter()
    canvas = np.zeros((220, 240), np.uint8)
    canvas[:160, :200] = page
    batch = torch.from_numpy(canvas).repeat(60, 1, 1, 1)
    sizes = torch.tensor([[160, 200]]).repeat(60, 1)
    changed = Augment(Strengths(neighbours_px=16.0))(batch, sizes)[:, 0].numpy()
    assert not changed[:, 160:].any() and not changed[:, :, 200:].any()
    assert changed[:, 150:160].any()


def test_places_of_letters_go_where_the_ink_goes():
    places = np.array([(40.0, 30.0), (100.0, 30.0), (160.0, 30.0), (40.0, 90.0), (np.nan, np.nan)])
    ys, xs = np.mgrid[:120, :200] + 0.5
    ink = [np.exp(-(np.square(xs - x) + np.square(ys - y)) / 8) for x, y in places[:-1]]
    page = (255 * np.max(ink, axis=0)).astype(np.uint8)
    strengths = Strengths(
        **{name: STRONG[name] for name in MOVING if name not in ("elastic_px", "tremor_px")}
    )
    farthest = 0.0
    for number in range(40):
        found, moved = augment_with_letters(
            page, places, strengths, np.random.default_rng([7, number])
        )
        assert (found == augment_page(page, strengths, np.random.default_rng([7, number]))).all()
        assert np.isnan(moved[-1]).all()
        for x, y in moved[:-1]:
            near = found * ((np.abs(xs - x) < 9) & (np.abs(ys - y) < 9))
            centre = np.average(xs, weights=near), np.average(ys, weights=near)
            assert max(abs(centre[0] - x), abs(centre[1] - y)) < 0.6
        farthest = max(farthest, np.nanmax(np.abs(moved - places)))
    assert farthest > 10, "or the test shows nothing"
