"""Augmentation: off is off, every page its own, and never ink off the page."""

import numpy as np
import pytest
import torch

from paragraph_ocr.data.augment import Augment, Strengths
from paragraph_ocr.data.contact_sheet import contact_sheet

STRONG = {
    "rotation_deg": 3.0,
    "shear_deg": 12.0,
    "scale": 0.15,
    "perspective": 0.08,
    "translation_px": 12.0,
    "elastic_px": 3.0,
    "tremor_px": 1.0,
    "pen_px": 1.5,
    "blur_px": 1.5,
    "ink": 0.5,
    "paper": 0.3,
    "noise": 0.1,
    "coarse_px": 2.0,
}
GEOMETRY = (
    "rotation_deg",
    "shear_deg",
    "scale",
    "perspective",
    "translation_px",
    "elastic_px",
    "tremor_px",
)


def bars(count: int, height: int = 96, width: int = 160) -> torch.Tensor:
    """Return `count` copies of a page with strokes three pixels broad."""
    page = torch.zeros(height, width, dtype=torch.uint8)
    page[20:-20:12, 30:-30] = 255
    page[20:-20, 30:-30:16] = 255
    broad = torch.nn.functional.max_pool2d(page[None, None].float(), 3, 1, 1)
    return broad.to(torch.uint8).repeat(count, 1, 1, 1)


def test_without_strengths_every_page_stays_as_it_is():
    images = torch.randint(0, 256, (3, 1, 40, 60), dtype=torch.uint8)
    assert torch.equal(Augment(Strengths())(images), images)


@pytest.mark.parametrize("name", STRONG)
def test_each_strength_alone_changes_pages_and_each_page_otherwise(name):
    torch.manual_seed(0)
    images = bars(6)
    given = images.clone()
    changed = Augment(Strengths(**{name: STRONG[name]}))(images)
    assert torch.equal(images, given)
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    pages = [page.numpy().tobytes() for page in changed]
    assert len({images[0].numpy().tobytes(), *pages}) == 7


def test_torchs_seed_decides_what_is_drawn():
    images = bars(4)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(Augment(Strengths(**STRONG))(images))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("tiny", [1e-4])
def test_small_strengths_change_little(tiny):
    torch.manual_seed(0)
    images = bars(4)
    changed = Augment(Strengths(**dict.fromkeys(STRONG, tiny)))(images)
    assert (changed.int() - images.int()).abs().max() <= 2


def test_ink_never_leaves_the_page():
    torch.manual_seed(0)
    frame = torch.zeros(64, 1, 96, 160, dtype=torch.uint8)
    frame[:, :, [4, 5, 6, -7, -6, -5], 5:-5] = 255
    frame[:, :, 5:-5, [4, 5, 6, -7, -6, -5]] = 255
    moved = Augment(Strengths(**{name: STRONG[name] for name in GEOMETRY}))(frame)
    for edge in (moved[..., 0, :], moved[..., -1, :], moved[..., 0], moved[..., -1]):
        assert edge.max() == 0
    # all four sides are still there: a line through the middle crosses two of them
    for middle in (moved[:, 0, 48, :], moved[:, 0, :, 80]):
        half = middle.shape[1] // 2
        assert (middle[:, :half].amax(dim=1) > 60).all()
        assert (middle[:, half:].amax(dim=1) > 60).all()


def test_ink_stays_on_a_page_that_is_smaller_than_its_canvas():
    torch.manual_seed(0)
    page = bars(1, 64, 96)[0]
    canvas = torch.zeros(48, 1, 96, 160, dtype=torch.uint8)
    canvas[:, :, :64, :96] = page
    sizes = torch.tensor([[64, 96]] * 48)
    strengths = Strengths(**{name: STRONG[name] for name in GEOMETRY})
    moved = Augment(strengths)(canvas, sizes)
    assert moved[:, :, 64:].max() == 0
    assert moved[..., 96:].max() == 0
    # turned about its own centre: as if there were no canvas
    torch.manual_seed(1)
    alone = Augment(Strengths(rotation_deg=3.0))(page.repeat(4, 1, 1, 1))
    torch.manual_seed(1)
    among = Augment(Strengths(rotation_deg=3.0))(canvas[:4], sizes[:4])
    assert (alone.int() - among[:, :, :64, :96].int()).abs().max() <= 1


def test_a_shift_moves_ink_by_no_more_than_was_asked():
    torch.manual_seed(0)
    dot = torch.zeros(200, 1, 64, 64, dtype=torch.uint8)
    dot[:, :, 31:34, 31:34] = 255
    moved = Augment(Strengths(translation_px=6.0))(dot)[:, 0].float()
    places = torch.arange(64.0)
    weight = moved.sum(dim=(1, 2))
    for axis in (1, 2):
        centre = (moved.sum(dim=3 - axis) * places).sum(dim=1) / weight - 32
        assert centre.abs().max() <= 6.1
        assert centre.max() > 4
        assert centre.min() < -4
        assert abs(centre.mean()) < 1


def test_a_rotation_turns_either_way_by_no_more_than_was_asked():
    torch.manual_seed(0)
    line = torch.zeros(100, 1, 200, 200, dtype=torch.uint8)
    line[:, :, 99:102, 40:160] = 255
    turned = Augment(Strengths(rotation_deg=5.0))(line)[:, 0].float()
    places = torch.arange(200.0)
    ends = [
        (turned[:, :, x].mul(places).sum(dim=1) / turned[:, :, x].sum(dim=1)) for x in (60, 140)
    ]
    degrees = torch.atan2(ends[1] - ends[0], torch.tensor(80.0)).rad2deg()
    assert degrees.abs().max() <= 5.1
    assert degrees.max() > 4
    assert degrees.min() < -4


def test_the_pen_grows_and_shrinks_but_strokes_stay():
    torch.manual_seed(0)
    images = bars(40)
    ink = Augment(Strengths(pen_px=1.0))(images).float().mean(dim=(1, 2, 3))
    before = images.float().mean(dim=(1, 2, 3))[0]
    assert ink.max() > 1.1 * before
    assert ink.min() < 0.9 * before
    assert ink.min() > 0.3 * before


def test_the_back_of_a_sheet_is_the_page_before_in_the_batch_mirrored():
    torch.manual_seed(0)
    pages = torch.zeros(32, 1, 40, 80, dtype=torch.uint8)
    pages[::2, :, 10:30, 10:14] = 255  # on a page 60 wide, its mirror lies at 46 to 49
    sizes = torch.tensor([[40, 60]] * 32)
    shown = Augment(Strengths(show_through=0.5))(pages, sizes)
    assert torch.equal(shown[::2], pages[::2])
    backs = shown[1::2]
    assert 20 < backs[..., 46:50].max() <= 0.5 * 255
    assert not backs[..., :42].any() and not backs[..., 54:].any()


def test_blank_pages_are_no_trouble():
    torch.manual_seed(0)
    blank = torch.zeros(2, 1, 40, 60, dtype=torch.uint8)
    geometry = {name: STRONG[name] for name in GEOMETRY}
    assert torch.equal(Augment(Strengths(**geometry))(blank), blank)


def test_a_contact_sheet_shows_every_page_above_its_text():
    images = [np.full((20, 30), 255, np.uint8), np.full((10, 50), 255, np.uint8)] * 2
    sheet = np.asarray(contact_sheet(images[:3], ["one", "two\nlines", "three"], columns=2))
    assert (sheet == 0).sum() == 2 * 20 * 30 + 10 * 50  # ink is black, text and frames are grey
    blank = np.asarray(contact_sheet(images[:3], ["", "", ""], columns=2))
    assert (blank < 255).sum() < (sheet < 255).sum()


@pytest.mark.parametrize(("images", "texts", "columns"), [(0, 0, 1), (2, 1, 1), (1, 1, 0)])
def test_a_contact_sheet_of_nothing_is_the_callers_bug(images, texts, columns):
    page = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError):
        contact_sheet([page] * images, ["a"] * texts, columns=columns)


def specks(places: np.ndarray, height: int = 120, width: int = 200) -> np.ndarray:
    """Return a page with round ink about these places (n, 2) of x and y in pixels."""
    ys, xs = np.mgrid[:height, :width] + 0.5
    far = np.square(places[:, 0, None, None] - xs) + np.square(places[:, 1, None, None] - ys)
    return (255 * np.exp(-far / 8).max(axis=0)).astype(np.uint8)


def centres(page: np.ndarray, near: np.ndarray, reach: int = 9) -> np.ndarray:
    """Return the centre of the ink around each place."""
    ys, xs = np.mgrid[: page.shape[0], : page.shape[1]] + 0.5
    found = []
    for x, y in near:
        weights = page * ((np.abs(xs - x) < reach) & (np.abs(ys - y) < reach))
        found.append((np.average(xs, weights=weights), np.average(ys, weights=weights)))
    return np.array(found)


PLACES = np.array([(40.0, 30.0), (100.0, 30.0), (160.0, 30.0), (40.0, 90.0), (100.0, 60.0)])


@pytest.mark.parametrize("size", [None, (120, 200)])
def test_places_of_letters_go_where_the_ink_goes(size):
    """On a page alone, and on one in the corner of a larger canvas."""
    torch.manual_seed(0)
    moving = {name: STRONG[name] for name in GEOMETRY if name not in ("elastic_px", "tremor_px")}
    page = specks(PLACES)
    canvas = np.zeros((120, 200) if size is None else (152, 264), np.uint8)
    canvas[: page.shape[0], : page.shape[1]] = page
    images = torch.from_numpy(canvas).repeat(40, 1, 1, 1)
    sizes = None if size is None else torch.tensor([size] * 40)
    letters = torch.tensor(PLACES, dtype=torch.float32).repeat(40, 1, 1)
    letters = torch.cat([letters, torch.full((40, 1, 2), torch.nan)], dim=1)
    pages, moved = Augment(Strengths(**moving)).with_letters(images, letters, sizes)
    assert moved[:, -1].isnan().all()
    for page, places in zip(pages[:, 0].numpy(), moved[:, :-1].numpy(), strict=True):
        assert np.abs(centres(page, places) - places).max() < 0.6
    assert float((moved - letters)[:, :-1].abs().max()) > 10, "or the test shows nothing"
    unmoved, same = Augment(Strengths(noise=0.1)).with_letters(images, letters, sizes)
    assert torch.equal(same[:, :-1], letters[:, :-1]) and not torch.equal(unmoved, images)
