"""Letters as a hand forms them: bent alike each time and at each size, with nothing lost."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from paragraph_ocr.data import fonts
from paragraph_ocr.data.fonts import Face, Glyph
from paragraph_ocr.data.forms import Bent, Forms
from paragraph_ocr.data.strokes import Measures

X_HEIGHT = 0.4  # em, about that of every face


@pytest.fixture(scope="module")
def face() -> Face:
    return Face(fonts.find_faces(None)[0])


def hand(deviation: float, seed: int = 0) -> Forms:
    return Forms(deviation, np.random.default_rng(seed))


def letters(face: Face, forms: Forms, size_px: int = 64) -> Bent:
    return Bent(face.glyphs(size_px), X_HEIGHT * size_px, forms)


def on_sheet(glyph: Glyph, size_px: int) -> np.ndarray:
    """Return the letter where it stands on a square of two em."""
    sheet = np.zeros((2 * size_px, 2 * size_px), np.uint8)
    top, left = glyph.top + 3 * size_px // 2, glyph.left + size_px // 2
    sheet[top : top + glyph.ink.shape[0], left : left + glyph.ink.shape[1]] = glyph.ink
    return sheet


def alike(first: np.ndarray, second: np.ndarray) -> float:
    """Return how two drawings correlate, of a size and a little blurred."""
    both = [
        cv2.GaussianBlur(cv2.resize(ink, (64, 64), interpolation=cv2.INTER_AREA), (0, 0), 1.0)
        for ink in (first, second)
    ]
    return float(np.corrcoef(both[0].ravel(), both[1].ravel())[0, 1])


def test_a_hand_forms_a_letter_alike_each_time_and_at_each_size(face):
    found = []
    for seed in range(4):
        forms = hand(0.15, seed)
        large, small = letters(face, forms, 128), letters(face, forms, 48)
        for character in "aegkQ7":
            again = letters(face, forms, 128)[character]
            assert np.array_equal(again.ink, large[character].ink)
            shapes = on_sheet(large[character], 128), on_sheet(small[character], 48)
            found.append(alike(*shapes))
    assert np.median(found) > 0.98
    assert min(found) > 0.8  # a hole of so many pixels is a little wider or narrower


def test_hands_differ_from_the_face_the_more_the_farther_they_bend(face):
    def likeness(deviation: float) -> float:
        plain = face.glyphs(64)
        return float(
            np.mean(
                [
                    alike(
                        on_sheet(plain[character], 64),
                        on_sheet(letters(face, hand(deviation, seed))[character], 64),
                    )
                    for character in "aegk"
                    for seed in range(6)
                ]
            )
        )

    slightly, much = likeness(0.05), likeness(0.2)
    assert 0.8 < slightly < 0.99
    assert much < slightly - 0.1


def test_no_ink_is_lost_and_none_touches_what_is_cut(face):
    plain = face.glyphs(64)
    for seed in range(8):
        bent = letters(face, hand(0.2, seed))
        for character in "lgW.":
            glyph = bent[character]
            share = glyph.ink.sum() / plain[character].ink.sum()
            assert 0.4 < share < 3  # bending widens some strokes and narrows others
            edges = glyph.ink[0].any(), glyph.ink[-1].any(), glyph.ink[:, 0].any()
            assert all(edges) and glyph.ink[:, -1].any()  # cut to the ink, and no closer
            assert glyph.advance == plain[character].advance


def test_ends_go_where_the_ink_at_them_goes():
    x_height_px = 40.0
    for seed in range(6):
        forms = hand(0.1, seed)
        ink = np.zeros((81, 81), np.uint8)
        cv2.circle(ink, (40, 40), 5, 255, -1)
        dot = forms.bent(Glyph(ink, 0, -60, 50.0), "o", x_height_px)
        rows, columns = np.nonzero(dot.ink > 127)
        middle = np.array([columns.mean() + dot.left, rows.mean() + dot.top]) + 0.5
        end = np.array([[[40.5, -19.5]]]) / x_height_px
        expected = forms.ends("o", end)[0, 0] * x_height_px
        assert np.abs(middle - expected).max() < 2.0
        assert np.abs(expected - end[0, 0] * x_height_px).max() > 0.2


def test_small_holes_of_some_letters_are_closed_and_large_ones_stay():
    x_height_px = 80.0
    ring = np.zeros((120, 120), np.uint8)
    cv2.circle(ring, (60, 60), 12, 255, 6)  # the hole is 18 px wide, 0.22 heights of x
    wide = np.zeros((120, 120), np.uint8)
    cv2.circle(wide, (60, 60), 40, 255, 6)
    forms = hand(0.0)

    def has_hole(ink: np.ndarray, character: str) -> bool:
        glyph = forms.bent(Glyph(ink, 0, -100, 120.0), character, x_height_px)
        paper, _ = cv2.connectedComponents((np.pad(glyph.ink, 1) < 128).astype(np.uint8))
        return paper - 1 == 2

    small = [has_hole(ring, chr(code)) for code in range(33, 127)]
    assert 0.9 < np.mean(small) < 1  # of the widest tenth of a third
    assert all(has_hole(wide, chr(code)) for code in range(33, 127))


def test_a_face_whose_x_has_no_height_is_bent_like_others():
    class Odd(Face):
        def glyphs(self, size_px, weight=None):
            ink = np.full((size_px // 4, size_px // 4), 255, np.uint8)
            return dict.fromkeys("nx", Glyph(ink, 0, 0, size_px / 3))  # below the line

    odd = Odd(Path("odd.ttf"))
    x_height = Measures(odd, None).x_height
    assert x_height > 0
    forms = hand(0.2)
    glyph = Bent(odd.glyphs(64), x_height * 64, forms)["x"]
    assert glyph.ink.any()
    assert np.isfinite(forms.ends("x", np.ones((1, 2, 2)) / x_height)).all()
