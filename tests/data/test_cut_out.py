"""Paragraphs cut out of a page: whole lines in the text, parts of their neighbours on the image."""

from dataclasses import replace

import numpy as np
import pytest

from paragraph_ocr.data.cut_out import cut_out
from paragraph_ocr.data.fonts import load_faces
from paragraph_ocr.data.render import Drawing, render

CANVAS = {"height": 300, "width": 448, "min_lines": 5, "max_lines": 7}
WORDS = [
    "gypsy",
    "flying",
    "happily",
    "among",
    "clumsy",
    "queens;",
    "deeply",
    "fond",
    "of",
    "jumping",
]


@pytest.fixture(scope="module")
def drawings(notes):
    faces, _ = load_faces(None, characters=notes.characters)
    return [
        render(WORDS, face, **CANVAS, generator=np.random.default_rng(place), **hand)
        for place, face in enumerate(faces)
        for hand in (
            {},
            {"jitter": 1.0, "joined": 1.0, "line_slope_deg": 1.5, "baseline_wave": 0.2},
        )
    ]


@pytest.fixture(scope="module")
def pairs(drawings):
    """Each drawing with several that are cut out of it."""
    return [
        (drawing, cut_out(drawing, np.random.default_rng([place, seed])))
        for place, drawing in enumerate(drawings)
        for seed in range(8)
    ]


def test_what_is_left_are_whole_lines_that_follow_on_each_other(pairs):
    left_out = set()
    for whole, cut in pairs:
        count = len(cut.lines)
        firsts = [at for at in range(3) if whole.lines[at : at + count] == cut.lines]
        assert firsts and count >= len(whole.lines) - 2
        assert len(cut.boxes) == count
        assert len(cut.letters) == len("".join(cut.text.split()))
        left_out.add((firsts[0], len(whole.lines) - count - firsts[0]))
    assert left_out == {(0, 0), (1, 0), (0, 1), (1, 1)}


def test_the_drawing_that_is_cut_stays_as_it_is(drawings):
    before = [(d.image.copy(), d.boxes.copy(), d.letters.copy()) for d in drawings]
    for seed, drawing in enumerate(drawings):
        cut_out(drawing, np.random.default_rng(seed))
    for drawing, (image, boxes, letters) in zip(drawings, before, strict=True):
        assert np.array_equal(drawing.image, image)
        assert np.array_equal(drawing.boxes, boxes)
        assert np.array_equal(drawing.letters, letters)


def rows_of(image):
    inked = np.flatnonzero(image.any(axis=1))
    return int(inked[0]), int(inked[-1]) + 1


def moved(whole: Drawing, cut: Drawing) -> int:
    """Return by how many rows the kept lines have moved up, from letters that no edge comes near."""
    start = len("".join("".join(whole.lines[: whole.lines.index(cut.lines[0])]).split()))
    middle = len("".join(cut.lines[0].split()))  # of the second line that is kept
    return int(whole.letters[start + middle, 3] - cut.letters[middle, 3])


def test_ink_is_cut_at_a_level_edge_and_what_is_left_begins_where_the_drawing_did(pairs):
    for whole, cut in pairs:
        up = moved(whole, cut)
        first, last = rows_of(cut.image)
        begin = rows_of(whole.image)[0]
        assert begin <= first  # the row of the edge itself may be without ink
        assert np.array_equal(cut.image[first:last], whole.image[first + up : last + up])
        assert not whole.image[:begin].any()


def test_edges_go_through_other_lines_or_own_heads_and_tails_or_between(pairs):
    shown = np.zeros(3, int)
    for whole, cut in pairs:
        up, (_, last) = moved(whole, cut), rows_of(cut.image)
        fewer = cut.lines[-1] != whole.lines[-1]
        kept = len("".join(cut.lines[-1].split()))
        foot = np.median(cut.letters[-kept:, 3])  # of small letters, with some room
        if fewer:
            # less than a line is left below the ones that are kept
            after = whole.boxes[whole.lines.index(cut.lines[-1]) + 1]
            assert last + up < after[3]
        else:
            assert last >= foot - 6  # no small letter has been cut
        shown += [fewer, not fewer and last + up < rows_of(whole.image)[1], not fewer]
    assert (shown > len(pairs) * np.array([0.3, 0.05, 0.3])).all()


def test_letters_boxes_hold_the_ink_of_their_letters(pairs):
    for _, cut in pairs:
        height = len(cut.image)
        assert (cut.letters[:, 1] >= 0).all() and (cut.letters[:, 3] <= height).all()
        inked = [
            cut.image[top:bottom, max(0, left) : right].any()
            for left, top, right, bottom in cut.letters
        ]
        assert np.mean(inked) > 0.98  # an edge may take a stop or a quotation mark


def test_two_lines_are_never_left_out(notes):
    faces, _ = load_faces(None, characters=notes.characters)
    drawing = render(
        ["one", "two"], faces[0], height=96, width=200, min_lines=2, max_lines=2,
        generator=np.random.default_rng(0),
    )  # fmt: skip
    for seed in range(32):
        assert cut_out(drawing, np.random.default_rng(seed)).lines == drawing.lines


def test_a_drawing_without_ink_stays_as_it_is(drawings):
    blank = replace(drawings[0], image=np.zeros_like(drawings[0].image))
    assert cut_out(blank, np.random.default_rng(0)) is blank


def test_lines_that_run_into_each_other_are_no_trouble(drawings):
    # a deep tail of the first line and a high head of the last: their edges have passed each other
    letters = drawings[0].letters.copy()
    letters[0, 3], letters[-1, 1] = CANVAS["height"], 0
    crossed = replace(drawings[0], letters=letters)
    for seed in range(100):
        cut = cut_out(crossed, np.random.default_rng(seed))
        assert cut.image.shape == crossed.image.shape
        assert (cut.letters[:, 1] <= cut.letters[:, 3]).all()
