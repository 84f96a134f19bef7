"""EMNIST from its own files: read back exactly, refused in one line, dealt without a leak."""

import gzip
import tracemalloc
import zipfile
from dataclasses import replace

import numpy as np
import pytest

import emnist_files
from paragraph_ocr.data import emnist as module
from paragraph_ocr.data.emnist import (
    CHARACTERS,
    EmnistCorpus,
    EmnistLinesCorpus,
    Half,
    Pool,
    join,
    read_emnist,
)
from paragraph_ocr.data.store import Store
from paragraph_ocr.errors import UserError

IMAGES = "emnist-byclass-train-images-idx3-ubyte.gz"
LABELS = "emnist-byclass-train-labels-idx1-ubyte.gz"
MAT = "emnist-byclass.mat"


@pytest.fixture
def lines(emnist):
    """What conf/datamodule/emnist_lines.yaml describes, with fewer lines."""
    return EmnistLinesCorpus(
        name="emnist_lines",
        root=emnist["gzips"],
        height=32,
        width=896,
        num_train=30,
        num_val=10,
        num_test=10,
        texts=None,
        min_characters=16,
        max_characters=32,
        min_overlap=0.0,
        max_overlap=0.33,
        characters=CHARACTERS + " .",
        seed=0,
    )


@pytest.fixture
def characters(emnist):
    return EmnistCorpus(
        name="emnist",
        root=emnist["matlab"],
        height=32,
        width=32,
        num_train=200,
        num_val=30,
        num_test=10_000,
        characters=CHARACTERS,
        seed=0,
    )


@pytest.mark.parametrize("name", emnist_files.FORMATS)
def test_every_format_gives_the_images_upright_and_their_labels(emnist, emnist_halves, name):
    halves = read_emnist(emnist[name])
    assert set(halves) == {"train", "test"}
    for half, written in ((halves[key], emnist_halves[key]) for key in halves):
        assert np.array_equal(half.images, written.images)
        assert np.array_equal(half.labels, written.labels)


def test_an_image_in_the_file_lies_on_its_side(emnist):
    with gzip.open(emnist["gzips"] / IMAGES) as stream:
        raw = np.frombuffer(stream.read()[16:], np.uint8).reshape(-1, 28, 28)
    upright = read_emnist(emnist["gzips"])["train"].images
    assert np.array_equal(raw[5].T, upright[5])
    assert not np.array_equal(raw[5], upright[5])


def break_file(folder, how):
    """Do to a folder of EMNIST's gzip files what a bad download or a wrong file would."""
    images = folder / IMAGES
    packed = images.read_bytes()
    unpacked = gzip.decompress(packed)
    match how:
        case "cut short":
            images.write_bytes(packed[: len(packed) // 2])
        case "cut short inside":
            images.write_bytes(gzip.compress(unpacked[:-100]))
        case "too long":
            images.write_bytes(gzip.compress(unpacked + b"\0"))
        case "empty":
            images.write_bytes(b"")
        case "no gzip":
            images.write_bytes(unpacked)
        case "wrong magic":
            images.write_bytes(gzip.compress(b"\0\0\x0d\x03" + unpacked[4:]))
        case "labels for images":
            images.write_bytes((folder / LABELS).read_bytes())
        case "other size":
            images.write_bytes(gzip.compress(emnist_files.idx(np.zeros((3, 32, 32), np.uint8))))
        case "claims too much":
            images.write_bytes(gzip.compress(unpacked[:4] + b"\xff" * 4 + unpacked[8:]))
        case "bit flipped":
            images.write_bytes(packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:])
        case "counts differ":
            (folder / LABELS).write_bytes(gzip.compress(emnist_files.idx(np.zeros(3, np.uint8))))
        case "unknown label":
            count = len(gzip.decompress((folder / LABELS).read_bytes())) - 8
            (folder / LABELS).write_bytes(
                gzip.compress(emnist_files.idx(np.full(count, 62, np.uint8)))
            )
        case "one missing":
            (folder / LABELS).unlink()
        case "not a zip":
            for file in folder.iterdir():
                file.unlink()
            (folder / "gzip.zip").write_bytes(b"PK no")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut short", "cannot be read"),
        ("cut short inside", "holds only"),
        ("too long", "holds more"),
        ("empty", "begins with nothing"),
        ("no gzip", "cannot be read"),
        ("wrong magic", "begins with 00 00 0d 03, not with 00 00 08 03"),
        ("labels for images", "begins with 00 00 08 01"),
        ("other size", "claims 3x32x32"),
        ("claims too much", "claims 4294967295x28x28"),
        ("bit flipped", "CRC"),
        ("counts differ", "496 images and 3 labels"),
        ("unknown label", "label 62 is none of byclass"),
        ("one missing", "lacks emnist-byclass-train-labels-idx1-ubyte.gz"),
        ("not a zip", "gzip.zip cannot be read"),
    ],
)
def test_a_broken_gzip_file_is_one_line(tmp_path, emnist_halves, how, said):
    emnist_files.write_gzips(tmp_path, emnist_halves)
    break_file(tmp_path, how)
    with pytest.raises(UserError, match=said) as refusal:
        read_emnist(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a little-endian MATLAB 5 file"),
        (b"x" * 300, "not a little-endian MATLAB 5 file"),
        (b"MATLAB 5.0".ljust(124) + b"\0\1IM", "not EMNIST's"),
    ],
)
def test_what_is_no_matlab_file_of_emnist_is_one_line(tmp_path, content, said):
    (tmp_path / MAT).write_bytes(content)
    with pytest.raises(UserError, match=said) as refusal:
        read_emnist(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_matlab_file_cut_short_is_one_line(tmp_path, emnist):
    content = (emnist["matlab"] / MAT).read_bytes()
    (tmp_path / MAT).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        read_emnist(tmp_path)


def test_a_bomb_is_refused_before_it_fills_memory(tmp_path, emnist_halves, monkeypatch):
    monkeypatch.setattr(module, "_MAT_BYTES", 5_000_000)
    emnist_files.write_gzips(tmp_path, emnist_halves)
    (tmp_path / IMAGES).write_bytes(
        gzip.compress(emnist_files.idx(np.zeros((9, 28, 28), np.uint8)) + bytes(300_000_000), 1)
    )
    matlab = tmp_path / "matlab"
    many = Half(np.zeros((100_000, 28, 28), np.uint8), np.zeros(100_000, np.uint8))
    emnist_files.write_matlab(matlab, {"train": many, "test": many})
    assert (matlab / MAT).stat().st_size < 1_000_000
    tracemalloc.start()
    with pytest.raises(UserError, match="holds more"):
        read_emnist(tmp_path)
    with pytest.raises(UserError, match="unpacks to more than"):
        read_emnist(matlab)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_zip_without_emnist_is_told_what_is_missing(tmp_path):
    with zipfile.ZipFile(tmp_path / "gzip.zip", "w") as archive:
        archive.writestr("gzip/emnist-letters-train-images-idx3-ubyte.gz", b"")
    with pytest.raises(UserError, match=r"lacks emnist-byclass-.*Put EMNIST's gzip.zip"):
        read_emnist(tmp_path)


def test_no_image_serves_two_splits_and_every_class_is_in_each(emnist_halves):
    train, val = (
        Pool(emnist_halves["train"], CHARACTERS, part=part).places for part in ("train", "val")
    )
    for character in CHARACTERS:
        assert len(train[character]) == 7
        assert len(val[character]) == 1
        assert not set(train[character]) & set(val[character])


def test_characters_are_spread_over_the_classes_each_image_once(characters, tmp_path, capsys):
    store = Store(characters.prepare(tmp_path, num_workers=0))
    by_split = {s: [store.texts[row] for row in store.rows(s)] for s in ("train", "val", "test")}
    assert len(by_split["train"]) == 200
    counts = [by_split["train"].count(c) for c in CHARACTERS]
    assert max(counts) - min(counts) <= 1
    assert len(by_split["val"]) == 30
    assert sorted(by_split["test"]) == sorted(CHARACTERS * 3)
    assert "186 characters for test" in capsys.readouterr().out
    assert len(set(store.sources)) == len(store)


def test_a_character_of_the_store_is_the_image_it_names(characters, emnist_halves, tmp_path):
    store = Store(characters.prepare(tmp_path, num_workers=0))
    for row in (0, 150, 210, 300):
        half, place = store.sources[row].removeprefix("emnist ").split(" ")
        image = emnist_halves[half].images[int(place)]
        assert np.array_equal(store.image(row)[2:-2, 2:-2], image)
        assert store.texts[row] == CHARACTERS[emnist_halves[half].labels[int(place)]]


def test_where_characters_overlap_the_darker_shows_and_nothing_wraps():
    black, grey = np.full((28, 28), 255, np.uint8), np.full((28, 28), 200, np.uint8)
    line = join([grey, black, grey], 0.25, height=32, width=96)
    assert set(line[:2].ravel()) == set(line[-2:].ravel()) == {0}
    row = line[16]
    assert (row[:21] == 200).all()
    assert (row[21:49] == 255).all()
    assert (row[49:70] == 200).all()
    assert (row[70:] == 0).all()


def test_a_line_shows_the_images_of_its_text_at_its_pitch(lines, emnist_halves, tmp_path):
    lines = replace(lines, min_overlap=0.0, max_overlap=0.0)
    store = Store(lines.prepare(tmp_path, num_workers=0))
    assert store.canvases == [(32, 896)]
    for row in (0, 35, 45):
        half = emnist_halves["test" if store.splits[row] == "test" else "train"]
        text, image = store.texts[row], store.image(row)
        assert 16 <= len(text) <= 32
        for place, character in enumerate(text):
            shown = image[2:-2, 28 * place : 28 * (place + 1)]
            same = half.images[half.labels == CHARACTERS.find(character)]
            known = (same == shown).all(axis=(1, 2)).any()
            assert known if character != " " else not shown.any()
        assert not image[:, 28 * len(text) :].any()


def test_overlap_is_drawn_for_each_line_between_its_ends(lines, tmp_path):
    store = Store(lines.prepare(tmp_path, num_workers=0))
    pitches = []
    for row in range(len(store)):
        inked = np.flatnonzero(store.image(row).max(axis=0))
        pitches.append((inked[-1] - 27) / (len(store.texts[row]) - 1))
    assert 17 < min(pitches) < 20
    assert 26 < max(pitches) < 29


def test_the_text_holds_only_what_emnist_has_and_the_vocabulary_writes(lines, tmp_path):
    few = replace(lines, characters="abcdefghijklmnopqrstuvwxyz .")
    texts = Store(few.prepare(tmp_path, num_workers=0)).texts
    assert set("".join(texts)) <= set("abcdefghijklmnopqrstuvwxyz ")
    assert all(text == " ".join(text.split()) for text in texts)


def test_the_same_fields_give_the_same_store_and_others_another(lines, emnist, tmp_path):
    first = Store(lines.prepare(tmp_path / "a", num_workers=0))
    second = Store(lines.prepare(tmp_path / "b", num_workers=0))
    assert first.path.name == second.path.name
    assert first.path.read_bytes() == second.path.read_bytes()
    others = [
        replace(lines, seed=1),
        replace(lines, max_overlap=0.2),
        replace(lines, root=emnist["matlab"]),
    ]
    assert len({lines.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_a_canvas_that_holds_too_little_is_refused(lines, characters):
    with pytest.raises(UserError, match=r"Pass datamodule.height=32 datamodule.width=896"):
        replace(lines, width=880)
    with pytest.raises(UserError, match="one character"):
        replace(characters, height=20)


def test_a_vocabulary_without_emnists_characters_is_refused(characters, tmp_path):
    with pytest.raises(UserError, match="no character of the vocabulary"):
        replace(characters, characters="äöü").prepare(tmp_path, num_workers=0)
