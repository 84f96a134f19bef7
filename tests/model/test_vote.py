"""Views of a page, and the vote of what was read from each."""

import itertools
import math
import random

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from paragraph_ocr.model.generate import Greedy, Reading, generate
from paragraph_ocr.model.vote import View, Vote, voted

AS_IT_IS = View(1, 1, 0, 0)


def reading(text, confidence=0.9, sureness=-0.1):
    """Return a reading of letters as tokens, each as probable, the whole as sure for each token."""
    return Reading([ord(c) for c in text], [confidence] * len(text), sureness * (len(text) + 1))


def text_of(*readings, most=1000):
    return "".join(map(chr, voted(readings, most).tokens))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["cat", "cut", "cat"], "cat"),  # substituted
        (["cat", "ct", "cat"], "cat"),  # left out by one
        (["ct", "cat", "cat"], "cat"),  # left out by the one to which the others are aligned
        (["caat", "cat", "cat"], "cat"),  # written twice
        (["cats", "cat", "cats"], "cats"),
        (["", "a", "a"], "a"),
        (["a", "", ""], ""),
        (["xab", "ab", "ab"], "ab"),
        (["the end", "tke end", "the emd", "she end"], "the end"),  # each errs elsewhere
    ],
)
def test_most_readings_decide_character_by_character(texts, expected):
    assert text_of(*map(reading, texts)) == expected


def test_where_two_disagree_the_likelier_token_is_written():
    assert text_of(reading("cat", 0.6), reading("cut", 0.9)) == "cut"
    assert text_of(reading("cat", 0.9), reading("cut", 0.6)) == "cat"


def test_readings_that_are_less_sure_than_the_surest_count_less():
    unsure = [reading("cut", sureness=-0.6)] * 3
    assert text_of(reading("cat", sureness=-0.1), *unsure) == "cat"
    assert text_of(reading("cat", sureness=-0.6), *unsure) == "cut"


def test_confidence_is_that_of_the_readers_where_they_agree_and_falls_where_they_do_not():
    agreed = voted([reading("cat", 0.8), reading("cat", 0.8)], 10)
    assert agreed.confidences == pytest.approx([0.8] * 3)
    assert agreed.log_probability == pytest.approx(3 * math.log(0.8))
    apart = voted([reading("cat", 0.8), reading("cat", 0.8), reading("cut", 0.8)], 10)
    assert apart.confidences == pytest.approx([0.8, 0.8 * (2 / 3) ** (1 / 3), 0.8])


@given(st.text(alphabet="abc", max_size=12), st.integers(1, 5))
def test_one_reading_and_equal_readings_stay_as_they_are(text, count):
    one = reading(text, confidence=0.7)
    found = voted([one] * count, 100)
    assert found.tokens == one.tokens
    assert found.confidences == pytest.approx(one.confidences)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.text(alphabet="abc", max_size=8), st.floats(0.05, 1), st.floats(-1, -0.01)),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 10),
)
def test_whatever_is_read_probabilities_and_length_keep_their_bounds(rows, most):
    found = voted([reading(*row) for row in rows], most)
    assert len(found.tokens) == len(found.confidences) <= most
    assert all(0 < confidence <= 1 for confidence in found.confidences)
    written = {token for text, _, _ in rows for token in map(ord, text)}
    assert set(found.tokens) <= written


def test_the_vote_of_readers_that_err_independently_errs_less_than_any():
    generator, truth = random.Random(0), "it was the best of times it was the worst of times " * 4

    def misread():
        kept = []
        for character in truth:
            error = generator.random()
            if error < 0.03:
                kept.append(generator.choice("abcdef"))  # substituted
            elif error < 0.06:
                kept.append(character + generator.choice("abcdef"))  # inserted
            elif error >= 0.09:  # else left out
                kept.append(character)
        return "".join(kept)

    texts = [misread() for _ in range(5)]
    least = min(Levenshtein.distance(text, truth) for text in texts)
    assert Levenshtein.distance(text_of(*map(reading, texts)), truth) < least / 4


def page_with_ink(box, size=(40, 60)):
    """Return a page (1, 1, H, W) with a box (left, top, right, bottom) of ink."""
    page = torch.zeros(1, 1, *size, dtype=torch.uint8)
    left, top, right, bottom = box
    page[0, 0, top:bottom, left:right] = 200
    return page


def drawn(page, *views, canvas=(40, 60), sizes=None):
    return [view[0, 0] for view in Vote(views, canvas).drawn(page, sizes)]


def test_a_view_begins_at_the_margin_where_there_is_room():
    (view,) = drawn(page_with_ink((20, 15, 30, 25)), AS_IT_IS, canvas=(100, 200))
    ys, xs = (view > 100).nonzero(as_tuple=True)
    assert (int(xs.min()), int(ys.min())) == pytest.approx((6, 3), abs=1)  # 3% of 200 and 100
    size = int(xs.max() - xs.min()) + 1, int(ys.max() - ys.min()) + 1
    assert size == pytest.approx((10, 10), abs=1)
    assert view.dtype == torch.uint8


@pytest.mark.parametrize(
    "view",
    [View(1.3, 1, 0, 0), View(1, 0.7, 0, 0), View(1, 1, 20, 0), View(1, 1, -30, 0), View(1, 1, 0, 8),
     View(1.2, 0.9, 15, -5)],
)  # fmt: skip
def test_a_view_is_what_opencv_makes_of_the_page_leant_turned_and_stretched(view):
    page = page_with_ink((70, 90, 130, 110), (200, 300))
    page[0, 0, 40:90, 95:105] = 255
    lean, turn = math.tan(math.radians(view.lean_deg)), math.radians(view.turn_deg)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    linear = np.diag([view.width, view.height]) @ rotation @ np.array([[1, lean], [0, 1]])
    ys, xs = np.nonzero(page[0, 0].numpy())
    corners = [linear @ (x + dx, y + 0.5) for x, y in zip(xs, ys, strict=True) for dx in (0, 1)]
    begin = np.array([9.0, 6.0]) - np.min(corners, axis=0)  # 3% of the canvas
    shift = begin + linear @ (0.5, 0.5) - 0.5  # OpenCV counts from the middles of pixels
    expected = cv2.warpAffine(page[0, 0].numpy(), np.column_stack([linear, shift]), (300, 200))
    (found,) = drawn(page, view, canvas=(200, 300))
    assert np.abs(found.numpy().astype(int) - expected).mean() < 0.5 < expected.mean()


def test_what_would_leave_the_canvas_is_shrunk_as_a_whole():
    page = page_with_ink((10, 10, 290, 190), (200, 300))
    views = View(2, 2, 0, 0), View(1, 1, 40, 0), View(2, 0.5, 0, 45)
    for view in drawn(page, *views, canvas=(200, 300)):
        ys, xs = (view > 60).nonzero(as_tuple=True)
        assert xs.min() > 0 and xs.max() < 299 and ys.min() > 0 and ys.max() < 199
        filled = (xs.max() - xs.min() + 1) / 300, (ys.max() - ys.min() + 1) / 200
        assert max(filled) > 0.95, "it fills the canvas one way"


def test_each_page_of_a_batch_is_drawn_by_its_own_ink_and_what_lies_beyond_its_size_is_not():
    pages = torch.cat([page_with_ink((5, 5, 20, 12)), page_with_ink((30, 20, 50, 36))])
    sizes = torch.tensor([[40, 60], [38, 55]])
    alone = [drawn(page[None], View(1.2, 1, 10, 0))[0] for page in pages]
    pages[1, 0, 38:] = pages[1, 0, :, 55:] = 255
    (together,) = Vote((View(1.2, 1, 10, 0),), (40, 60)).drawn(pages, sizes)
    assert torch.equal(together[:, 0], torch.stack(alone))


def test_a_blank_page_stays_blank():
    pages = torch.cat([torch.zeros(1, 1, 40, 60, dtype=torch.uint8), page_with_ink((5, 5, 20, 12))])
    (view,) = Vote((View(1.15, 1, 24, 0),), (40, 60)).drawn(pages, None)
    assert view[0].max() == 0 and view[1].max() > 100


def test_views_are_the_same_under_autocast():
    page = torch.randint(0, 256, (2, 1, 96, 128), dtype=torch.uint8)
    vote = Vote((View(1, 1.15, 0, 0), View(1.15, 1, 24, 1.5)), (96, 128))
    expected = list(vote.drawn(page, None))
    with torch.autocast("cpu", torch.bfloat16):
        found = list(vote.drawn(page, None))
    assert all(map(torch.equal, found, expected))


def test_a_page_is_read_as_its_views_are_alone(make_recognizer, pages):
    recognizer = make_recognizer()
    canvas = tuple(pages.shape[2:])
    views = (View(1, 1, 6, 0), View(1.15, 1, -12, 0), View(0.9, 1.1, 0, 1))
    found = recognizer.read(pages, decoding=Vote(views, canvas), max_length=20)
    alone = [
        recognizer.read(view, decoding=Greedy(), max_length=20)
        for view in Vote(views, canvas).drawn(pages, None)
    ]
    for page, its in enumerate(zip(*alone, strict=True)):
        expected = voted(its, 19)
        assert found[page].tokens == expected.tokens
        assert found[page].confidences == pytest.approx(expected.confidences, abs=1e-5)
    pairs = itertools.combinations([[r.confidences for r in its] for its in alone], 2)
    assert all(one != other for one, other in pairs), "views should be read otherwise"


@pytest.mark.parametrize(
    ("enough", "count"),
    [
        (((2, 1.0),), 2),
        (((2, 1e-9),), 4),
        (((2, 1e-9), (3, 1.0)), 3),
        (((3, 1e-9),), 4),
        ((), 4),
    ],
)
def test_as_many_views_are_read_as_the_first_two_call_for(make_recognizer, pages, enough, count):
    recognizer = make_recognizer()
    canvas = tuple(pages.shape[2:])
    views = (View(1, 1, 6, 0), View(1.15, 1, -12, 0), View(0.9, 1.1, 0, 1), View(1, 1, 0, 2))
    vote = Vote(views, canvas, enough=enough)
    found = recognizer.read(pages, decoding=vote, max_length=20)
    expected = recognizer.read(pages, decoding=Vote(views[:count], canvas), max_length=20)
    assert [its.tokens for its in found] == [its.tokens for its in expected]


def test_readings_that_differ_more_need_more():
    vote = Vote((AS_IT_IS,) * 10, (40, 60), enough=((2, 0.1), (6, 0.3)))
    text = "abcdefghij"
    for wrong, needed in ((0, 2), (1, 2), (2, 6), (3, 6), (4, 10), (10, 10)):
        other = "z" * wrong + text[wrong:]
        readings = [reading(text), reading(other)]
        assert vote.needed(readings) == needed
        assert vote.needed([*readings, reading("")]) == needed  # whatever the others say
    assert [len(views) for views in vote.rounds] == [2, 4, 4]
    assert vote.needed([reading(""), reading("")]) == 2


def test_each_page_needs_as_many_readings_as_it_would_alone(make_recognizer, pages):
    recognizer = make_recognizer()
    canvas = tuple(pages.shape[2:])
    views = (View(1, 1, 6, 0), View(1.1, 1, -12, 0), View(0.9, 1.1, 0, 1))
    first = next(iter(Vote(views[:1], canvas).drawn(pages, None)))
    sureness = [
        its.log_probability for its in recognizer.read(first, decoding=Greedy(), max_length=20)
    ]
    between = (min(sureness) + max(sureness)) / 2

    class Choosy(Vote):
        def needed(self, readings):
            return 2 if readings[0].log_probability > between else 3

    vote = Choosy(views, canvas, enough=((2, 0.1),))
    seen = []
    read = recognizer._views_read(
        pages,
        None,
        vote,
        lambda m, mask, decoding: seen.append(len(m)) or recognizer_reads(recognizer, m),
    )
    assert [len(its) for its in read] == [2 if its > between else 3 for its in sureness]
    assert {*map(len, read)} == {2, 3}
    assert sum(seen) == sum(map(len, read))
    for page in range(len(pages)):
        (alone,) = recognizer.read(pages[page : page + 1], decoding=vote, max_length=20)
        assert vote.chosen(read[page], 19).tokens == alone.tokens


def recognizer_reads(recognizer, memory):
    return generate(
        recognizer.decoder,
        memory,
        None,
        special=recognizer.special,
        decoding=Greedy(),
        max_length=20,
    )


def test_one_view_is_read_once():
    assert Vote((AS_IT_IS,), (40, 60)).needed([reading("cat")]) == 1
