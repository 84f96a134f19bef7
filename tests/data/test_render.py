"""Rendered paragraphs: all the ink on the canvas, and exactly the words asked for."""

import itertools

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from paragraph_ocr.data import strokes
from paragraph_ocr.data.fonts import find_faces, load_faces
from paragraph_ocr.data.mixed_face import MixedFace, drawn_mix
from paragraph_ocr.data.render import render
from paragraph_ocr.data.strokes import Bars, measures
from paragraph_ocr.data.text import Passages
from paragraph_ocr.errors import UserError

CANVASES = {
    "line": {"height": 48, "width": 512, "min_lines": 1, "max_lines": 1},
    "note": {"height": 160, "width": 448, "min_lines": 3, "max_lines": 6},
    "page": {"height": 576, "width": 640, "min_lines": 1, "max_lines": 12},
}
LENGTHS = {"line": (20, 50), "note": (100, 250), "page": (40, 680)}


@pytest.fixture(scope="module")
def faces(notes):
    found = load_faces(None, characters=notes.characters)
    return found[0] if isinstance(found, tuple) else found


CARELESS = {"jitter": 1.0, "pressure": 0.5}
OLD = {"jitter": 0.5, "joined": 1.0, "word_slant_deg": 5.0, "baseline_wave": 0.5}
LETTER = {**CARELESS, "uneven_lines": 1.0}
WIDE = {**OLD, "stretch": 0.4}
LOOSE = {
    "reach": 0.4, "spread": 0.3, "lean_deg": 40.0, "line_slope_deg": 2.0, "forms": 0.15,
    "long_bars": 2.0, "underlined": 0.5,
}  # fmt: skip
MISTAKEN = {**CARELESS, **OLD, "joined": 0.5, "crossed_out": 1.0}


@pytest.fixture(scope="module")
def drawn(notes, faces):
    """For each canvas: words and drawing, every face several times, short and long, in several hands."""
    hands = [{}, CARELESS, OLD, {}, LETTER, WIDE, {**LETTER, **WIDE, **LOOSE}]
    drawn = draw_all(notes, faces, hands)
    mixed = [drawn_mix(face, faces, notes.characters, np.random.default_rng(7)) for face in faces]
    for name, more in draw_all(notes, mixed, hands).items():
        drawn[name] += more
    return drawn


@pytest.fixture(scope="module")
def letters_alone(notes, faces):
    """The same by hands that add no strokes to their letters."""
    return draw_all(notes, faces, [{}, CARELESS, {**LETTER, "stretch": 0.4, "forms": 0.15}])


@pytest.fixture(scope="module")
def mistaken(notes, faces):
    """The same by hands that cross out words."""
    return draw_all(notes, faces, [MISTAKEN, {**MISTAKEN, **LOOSE}, MISTAKEN])


def draw_all(notes, faces, hands):
    passages = Passages(None, characters=notes.characters, random_share=0.25)
    made = {name: [] for name in CANVASES}
    for name, number in itertools.product(CANVASES, range(len(hands))):
        low, high = LENGTHS[name]
        for place, face in enumerate(faces):
            generator = np.random.default_rng([number, place])
            length = [low, (low + high) // 2, high][number % 3]
            words = passages.draw(generator, "train", length=length, minimum=low, maximum=high)
            drawing = render(words, face, **CANVASES[name], **hands[number], generator=generator)
            made[name].append((words, drawing))
    return made


@pytest.mark.parametrize("name", CANVASES)
def test_ink_never_touches_the_border(drawn, mistaken, name):
    for _, drawing in drawn[name] + mistaken[name]:
        edges = (drawing.image[0], drawing.image[-1], drawing.image[:, 0], drawing.image[:, -1])
        assert not any(edge.any() for edge in edges)


@pytest.mark.parametrize("name", CANVASES)
def test_the_transcription_is_the_words_in_order_on_the_promised_number_of_lines(
    drawn, mistaken, name
):
    for words, drawing in drawn[name] + mistaken[name]:
        assert drawing.text.split() == words
        assert all(line == line.strip() and line for line in drawing.lines)
        assert CANVASES[name]["min_lines"] <= len(drawing.lines) <= CANVASES[name]["max_lines"]


@pytest.mark.parametrize("name", CANVASES)
def test_every_line_has_a_box_with_ink_and_no_ink_is_outside_the_boxes(drawn, mistaken, name):
    for _, drawing in drawn[name] + mistaken[name]:
        outside = drawing.image.copy()
        assert len(drawing.boxes) == len(drawing.lines)
        for left, top, right, bottom in drawing.boxes:
            part = np.s_[max(0, top) : bottom, max(0, left) : right]
            assert drawing.image[part].any()
            outside[part] = 0
        assert not outside.any()


@pytest.mark.parametrize("name", CANVASES)
def test_every_letter_has_a_box_with_ink_inside_that_of_its_line(drawn, name):
    for _, drawing in drawn[name]:
        lines = ["".join(line.split()) for line in drawing.lines]
        assert len(drawing.letters) == sum(map(len, lines))
        of_line = np.repeat(np.arange(len(lines)), [len(line) for line in lines])
        for (left, top, right, bottom), box in zip(
            drawing.letters, drawing.boxes[of_line], strict=True
        ):
            part = np.s_[max(0, top) : bottom, max(0, left) : right]
            assert drawing.image[part].any()
            assert (box[:2] <= (left, top)).all() and (box[2:] >= (right, bottom)).all()


@pytest.mark.parametrize("name", CANVASES)
def test_without_strokes_no_ink_is_outside_the_letters_boxes(letters_alone, name):
    for _, drawing in letters_alone[name]:
        assert not elsewhere(drawing)


def elsewhere(drawing):
    """Return the share of the ink that is in no letter's box."""
    image = drawing.image.copy()
    for left, top, right, bottom in drawing.letters:
        image[max(0, top) : bottom, max(0, left) : right] = 0
    return (image > 60).sum() / (drawing.image > 60).sum()


def test_letters_boxes_stand_in_the_order_of_the_text(faces):
    drawing = render(
        ["mm", "ii", "mm"], faces[0], height=64, width=400, min_lines=1, max_lines=1,
        generator=np.random.default_rng(3),
    )  # fmt: skip
    lefts, widths = drawing.letters[:, 0], drawing.letters[:, 2] - drawing.letters[:, 0]
    assert (np.diff(lefts) > 0).all()
    assert widths[2:4].max() < widths[[0, 1, 4, 5]].min()


def test_lines_come_from_top_to_bottom(drawn):
    for _, drawing in drawn["page"]:
        middles = (drawing.boxes[:, 1] + drawing.boxes[:, 3]) / 2
        assert (np.diff(middles) > 0).all()


def test_pages_are_images_of_ink_on_clean_paper(drawn):
    for _, drawing in drawn["page"]:
        assert drawing.image.dtype == np.uint8
        assert drawing.image.shape == (576, 640)
        assert drawing.image.max() > 100
        assert 0.005 < (drawing.image > 0).mean() < 0.5


def test_every_word_leaves_its_ink(faces, notes):
    # twice the words, about twice the ink, at one size of letters and pen
    def ink(words, seed):
        drawing = render(
            words, faces[2], height=400, width=600, min_lines=len(words), max_lines=len(words),
            generator=np.random.default_rng(seed),
        )  # fmt: skip
        return [(drawing.image[t:b, max(0, le) : r] > 0).sum() for le, t, r, b in drawing.boxes]

    for seed in range(5):
        assert min(ink(["hand"] * 4, seed)) > 0.5 * max(ink(["hand"] * 4, seed))


def test_the_same_generator_draws_the_same_page(faces):
    first, second = (
        render(["to", "be"] * 9, faces[0], **CANVASES["note"], generator=np.random.default_rng(7))
        for _ in range(2)
    )
    assert (first.image == second.image).all()
    assert first.lines == second.lines


def test_what_joins_and_waves_draw_at_random_moves_no_other_draw(faces):
    def drawn(**hand):
        generator = np.random.default_rng(7)
        words = ["to", "be"] * 9
        drawing = render(words, faces[2], **CANVASES["note"], **hand, generator=generator)
        return drawing, generator.random()

    plain, after = drawn()
    off, after_off = drawn(joined=0.0, word_slant_deg=0.0, crossed_out=0.0, uneven_lines=0.0)
    assert (plain.image == off.image).all() and after == after_off
    old, after_old = drawn(joined=0.5, baseline_wave=0.3)
    assert old.lines == plain.lines and after == after_old


def test_with_jitter_no_two_letters_are_alike(faces):
    def letters(jitter):
        drawing = render(
            ["oooo"] * 3,
            faces[2],
            **CANVASES["note"],
            jitter=jitter,
            generator=np.random.default_rng(1),
        )
        return {(right - left, bottom - top) for left, top, right, bottom in drawing.letters}

    assert len(letters(1.0)) > 2 * len(letters(0.0))


def test_pressure_takes_ink_away_and_adds_none_elsewhere(faces):
    plain, pressed = (
        render(
            ["summer"] * 9, faces[2], **CANVASES["note"], pressure=pressure,
            generator=np.random.default_rng(1),
        ).image.astype(int)
        for pressure in (0.0, 0.8)
    )  # fmt: skip
    assert (pressed > plain).sum() <= 0.01 * (plain > 0).sum()
    assert 0.2 * plain.sum() < pressed.sum() < 0.9 * plain.sum()


def test_strokes_join_the_letters_of_a_word_and_only_lower_case_ones(faces):
    def parts(word, joined):
        drawing = render(
            [word] * 6, faces[2], **CANVASES["note"], joined=joined,
            generator=np.random.default_rng(1),
        )  # fmt: skip
        return cv2.connectedComponents((drawing.image > 60).astype(np.uint8))[0] - 1

    assert parts("cannon", 0.0) == 36
    assert parts("cannon", 1.0) == 6
    assert 6 < parts("cannon", 0.5) < 36
    assert parts("CUNNO,", 1.0) == parts("CUNNO,", 0.0)


def test_words_that_are_crossed_out_are_on_the_page_and_not_in_its_text(mistaken, faces):
    for _, drawing in itertools.chain.from_iterable(mistaken.values()):
        assert len(drawing.letters) == len("".join(drawing.text.split()))

    def drawing(crossed_out):
        return render(
            ["cannon"] * 9, faces[2], **CANVASES["note"], crossed_out=crossed_out,
            generator=np.random.default_rng(1),
        )  # fmt: skip

    assert elsewhere(drawing(0.0)) == 0
    assert elsewhere(drawing(1.0)) > 0.05


def test_a_word_leans_as_a_whole_and_otherwise_than_the_next(faces):
    def widths(slant):
        drawing = render(
            ["llll"] * 8, faces[2], height=300, width=600, min_lines=1, max_lines=1,
            word_slant_deg=slant, generator=np.random.default_rng(1),
        )  # fmt: skip
        return (drawing.letters[:, 2] - drawing.letters[:, 0]).reshape(8, 4)

    assert np.ptp(widths(10.0), axis=1).max() <= 1
    assert np.ptp(widths(10.0)) > 2 * np.ptp(widths(0.0))


def test_a_baseline_drifts_smoothly_beside_the_slope_of_the_page(faces):
    def off_level(wave, seed):
        drawing = render(
            ["xxxxxxxx"] * 6, faces[2], height=300, width=1200, min_lines=1, max_lines=1,
            baseline_wave=wave, generator=np.random.default_rng(seed),
        )  # fmt: skip
        places, heights = drawing.letters[:, 0], drawing.letters[:, 3]
        return heights - np.polyval(np.polyfit(places, heights, 1), places)

    drifting = [off_level(1.0, seed) for seed in range(24)]
    assert np.std(drifting) > 3 * np.std([off_level(0.0, seed) for seed in range(24)])
    assert np.std(np.diff(drifting)) < 0.5 * np.std(drifting)


def test_uneven_lines_stand_far_apart_and_at_uneven_distances_and_places(faces):
    def page(uneven, seed):
        return render(
            ["cannon"] * 40, faces[2], height=576, width=640, min_lines=3, max_lines=12,
            uneven_lines=uneven, generator=np.random.default_rng(seed),
        )  # fmt: skip

    def measured(uneven):
        far, spread, begins = [], [], []
        for seed in range(12):
            drawing = page(uneven, seed)
            words = drawing.letters.reshape(-1, 6, 4)
            firsts = np.cumsum([0, *(len(line.split()) for line in drawing.lines[:-1])])
            distances = np.diff(words[firsts, 0, 3])
            far.append(np.median(distances) / np.median(np.ptp(words[:, :, [1, 3]], axis=(1, 2))))
            spread.append(np.std(distances) / np.mean(distances))
            begins.append(np.std(words[firsts, 0, 0]))
        return np.mean(far), np.mean(spread), np.mean(begins)

    even, uneven = measured(0.0), measured(1.0)
    assert uneven[0] > 1.3 * even[0]
    assert uneven[1] > 2 * even[1]
    assert uneven[2] > 2 * even[2]


@pytest.mark.parametrize("num_words", [20, 50, 90])
def test_uneven_lines_make_no_text_illegibly_small(faces, num_words):
    def width_px(uneven, seed):
        drawing = render(
            ["cannon"] * num_words, faces[seed % len(faces)], height=576, width=640, min_lines=3,
            max_lines=12, uneven_lines=uneven, generator=np.random.default_rng(seed),
        )  # fmt: skip
        words = drawing.letters.reshape(-1, 6, 4)
        return np.median(words[:, -1, 2] - words[:, 0, 0]) / 6

    even, uneven = (np.array([width_px(share, seed) for seed in range(24)]) for share in (0.0, 1.0))
    assert (uneven > 0.75 * np.minimum(even, 11)).all()
    assert num_words > 50 or (uneven < 0.9 * even).any(), "who writes little spreads it"


def test_faces_that_are_held_out_are_not_trained_on(few_notes, tmp_path):
    from dataclasses import replace

    from paragraph_ocr.data.store import Store

    held = ("Zeyada", "Kalam-Light")
    corpus = replace(few_notes, held_out=held)
    store = Store(corpus.prepare(tmp_path, num_workers=0))
    of = {s: {store.writers[row] for row in store.rows(s)} for s in ("train", "val", "test")}
    assert of["val"] | of["test"] <= set(held)
    assert not of["train"] & set(held)
    with pytest.raises(UserError, match="Zeyada"):
        replace(few_notes, held_out=("Zeyad",)).prepare(tmp_path, num_workers=0)
    everyone = tuple(face.name for face in load_faces(None, characters=corpus.characters)[0])
    with pytest.raises(UserError, match="no face to train on"):
        replace(few_notes, held_out=everyone).prepare(tmp_path, num_workers=0)


def test_fewer_words_than_lines_give_a_line_a_word(faces):
    drawing = render(
        ["yes", "no"], faces[0], **CANVASES["note"], generator=np.random.default_rng(0)
    )
    assert drawing.lines == ("yes", "no")


@pytest.mark.parametrize("size_px", [20, 32, 40])
def test_letters_look_as_freetype_draws_them(size_px, faces):
    for face in faces:
        if face.weights is not None:
            continue
        font = ImageFont.truetype(face.path, size_px, layout_engine=ImageFont.Layout.BASIC)
        for character in "minugQf.":
            ink, left, top, advance = face.glyphs(size_px)[character]
            ours, theirs = np.zeros((160, 160), np.uint8), Image.new("L", (160, 160))
            ours[100 + top : 100 + top + ink.shape[0], 60 + left : 60 + left + ink.shape[1]] = ink
            ImageDraw.Draw(theirs).text((60, 100), character, fill=255, font=font, anchor="ls")
            # hints move strokes by up to a pixel, and round advances at either size
            assert abs(advance - font.getlength(character)) <= 2
            a, b = cv2.blur(ours, (3, 3)), cv2.blur(np.asarray(theirs), (3, 3))
            assert int(a.sum()) == pytest.approx(int(b.sum()), rel=0.25, abs=1000)
            for one, other in ((a, b), (b, a)):
                assert (other[cv2.erode(one, np.ones((3, 3))) > 200] > 64).all()
                assert (one[cv2.dilate(other, np.ones((5, 5))) == 0] == 0).all()


def test_all_default_faces_are_found(faces):
    assert len(faces) >= 11
    assert len({face.name for face in faces}) == len(faces)


def test_a_character_that_no_face_draws_is_the_users_to_mend():
    with pytest.raises(UserError, match=r"datamodule.fonts=null has no face .*vocabulary"):
        load_faces(None, characters="ab\u4e2d")


def test_an_empty_folder_of_fonts_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match=r"^datamodule.fonts=.*Pass datamodule.fonts=<folder>"):
        find_faces(tmp_path)
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    with pytest.raises(UserError, match="unreadable"):
        load_faces(tmp_path, characters="abc")


def test_a_mixed_face_has_the_letters_of_both_as_high_as_each_other(faces):
    first, second = faces[0], faces[3]
    mixed = MixedFace(first, second, frozenset("abcx"))
    glyphs, size = mixed.glyphs(48), round(mixed.ratio * 48)
    for character in "abcx":
        assert (glyphs[character].ink == second.glyphs(size)[character].ink).all()
    for character in "defy":
        assert (glyphs[character].ink == first.glyphs(48)[character].ink).all()
    assert glyphs["x"].top == pytest.approx(first.glyphs(48)["x"].top, abs=2)
    width = first.width("de") + mixed.ratio * second.width("ab")
    assert mixed.width("adbe") == pytest.approx(width)
    ends = mixed.measures.ends("ad")
    np.testing.assert_allclose(ends[0], mixed.ratio * measures(second, None).ends("a")[0])
    np.testing.assert_allclose(ends[1], measures(first, None).ends("d")[0])


def test_stretched_letters_are_wider_or_narrower_and_as_high(faces):
    def widths(stretch):
        found = []
        for number in range(24):
            words = ["nnnnnnnn"] * 3
            drawing = render(
                words, faces[0], height=160, width=1200, min_lines=1, max_lines=1, stretch=stretch,
                generator=np.random.default_rng(number),
            )  # fmt: skip
            sizes = drawing.letters[:, 2:] - drawing.letters[:, :2]
            found.append(np.diff(drawing.letters[:8, 0]).mean() / sizes[:, 1].mean())
        return np.array(found)

    plain, stretched = widths(0.0), widths(0.3)
    logarithms = np.log(stretched / plain)
    assert logarithms.std() == pytest.approx(0.3, rel=0.4)
    assert logarithms.min() < -0.15 and logarithms.max() > 0.15


def words_of(face, *, seed, text="nnnnnnnn", lines=1, **hand):
    """Return the drawing of lines of one word each, upright and level but for what is asked for."""
    return render(
        [text] * lines, face, height=600, width=1200, min_lines=lines, max_lines=lines,
        generator=np.random.default_rng(seed), **hand,
    )  # fmt: skip


def test_letters_reach_farther_up_and_down_and_an_x_stays_as_it_is(faces):
    def heights(reach, seed):
        boxes = words_of(faces[2], seed=seed, text="xlp", reach=reach).letters
        return np.array([-boxes[1, 1] + boxes[0, 3], boxes[2, 3] - boxes[0, 3]]) / (
            boxes[0, 3] - boxes[0, 1]
        )

    ratios = np.array([heights(0.5, seed) / heights(0.0, seed) for seed in range(16)])
    assert ratios.min() > 0.9  # never less, to a pixel
    assert ratios.mean() > 1.2


def test_letters_that_stand_apart_are_joined_as_far_as_the_hand_goes(faces):
    def gaps(spread, seed):
        drawing = words_of(faces[0], seed=seed, spread=spread)
        middles = drawing.letters[:8, [0, 2]].mean(axis=1)
        return np.diff(middles).mean() / (drawing.letters[0, 3] - drawing.letters[0, 1])

    wider = np.array([gaps(0.6, seed) / gaps(0.0, seed) for seed in range(32)])
    assert 0.3 < (wider > 1.03).mean() < 0.7  # half of the hands
    assert wider.max() > 1.3
    apart = words_of(faces[0], seed=int(wider.argmax()), spread=0.6)
    count, _ = cv2.connectedComponents((apart.image > 0).astype(np.uint8))
    assert count - 1 < 4  # eight letters of a word hang together


def test_half_of_the_hands_lean_farther_to_the_right(faces):
    def lean(lean_deg, seed):
        box = words_of(faces[2], seed=seed, text="l", lean_deg=lean_deg).boxes[0]
        ink = words_of(faces[2], seed=seed, text="l", lean_deg=lean_deg).image
        rows, columns = np.nonzero(ink)
        slope = np.polyfit(rows, columns, 1)[0]
        assert box[3] - box[1] > 20
        return -np.degrees(np.arctan(slope))

    more = np.array([lean(40.0, seed) - lean(0.0, seed) for seed in range(32)])
    assert more.min() > -1.5 and more.max() < 42
    assert 0.3 < (more > 2).mean() < 0.7


def test_lines_slope_by_so_much_and_each_a_little_otherwise(faces):
    def slopes(deviation, seed):
        drawing = words_of(
            faces[2], seed=seed, text="xxxxxxxxxxxxxxxx", lines=3, line_slope_deg=deviation
        )
        lines = drawing.letters.reshape(3, 16, 4)
        fits = [np.polyfit(line[:, 0], line[:, 3], 1)[0] for line in lines]
        return np.degrees(np.arctan(fits))

    sloping = np.array([slopes(2.0, seed) - slopes(0.0, seed) for seed in range(40)])
    assert sloping[:, 0].std() == pytest.approx(2.0, rel=0.4)
    assert np.ptp(sloping, axis=1).mean() > 0.4


def test_half_of_the_hands_cross_a_t_with_long_bars_and_no_other_letter(faces):
    def widths(text, long_bars, seed):
        drawing = words_of(faces[2], seed=seed, text=text, long_bars=long_bars)
        (width,) = np.diff(np.flatnonzero(drawing.image.any(axis=0))[[0, -1]])
        return width

    longer = np.array([widths("t", 3.0, seed) / widths("t", 0.0, seed) for seed in range(32)])
    assert 0.3 < (longer > 1.1).mean() < 0.7
    assert longer.max() > 2
    assert all(widths("l", 3.0, seed) == widths("l", 0.0, seed) for seed in range(8))


def test_bars_go_through_the_upper_part_of_their_letters():
    boxes = np.array([[10, 20, 22, 60], [100, 25, 112, 65]])
    generator = np.random.default_rng(0)
    for _ in range(50):
        curves = Bars.drawn(2.0, generator).across(boxes, 20.0, generator)
        for (left, top, right, bottom), curve in zip(boxes, curves, strict=True):
            assert curve[0, 0] <= left and curve[-1, 0] > right
            assert (np.diff(curve[:, 0]) > 0).all()
            at_letter = np.interp((left + right) / 2, *curve.T)
            assert top - 20 < at_letter < (top + bottom) / 2 + 20
            assert curve[-1, 0] - curve[0, 0] <= right - left + 1.8 * 2 * 20


def test_one_or_two_words_are_underlined_and_stay_in_the_text(faces):
    def drawing(underlined, crossed_out=0.0, seed=0):
        return render(
            ["cannon"] * 9, faces[2], **CANVASES["note"], underlined=underlined,
            crossed_out=crossed_out, generator=np.random.default_rng(seed),
        )  # fmt: skip

    shares = []
    for seed in range(8):
        plain, lined = drawing(0.0, seed=seed), drawing(1.0, seed=seed)
        assert lined.text.split() == plain.text.split() == ["cannon"] * 9
        assert len(lined.letters) == len(plain.letters)
        assert elsewhere(plain) == 0
        shares.append(elsewhere(lined))
        both = drawing(1.0, crossed_out=1.0, seed=seed)
        assert both.text.split() == ["cannon"] * 9
    assert np.mean(shares) > 0.01  # but for what of a line runs through a letter's box
    assert min(shares) > 0
    assert max(shares) < 0.2


def test_a_line_runs_below_the_word_that_is_underlined():
    for seed in range(50):
        (curve,) = strokes.underline(
            100.0, 180.0, 50.0, x_height_px=20.0, generator=np.random.default_rng(seed)
        )
        assert (np.diff(curve[:, 0]) > 0).all()
        assert curve[0, 0] == pytest.approx(100, abs=8) and curve[-1, 0] == pytest.approx(
            180, abs=8
        )
        assert 50 < curve[:, 1].mean() < 50 + 20
