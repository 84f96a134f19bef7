"""Corpora: one config, one store, whatever makes it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import psutil
import pytest

from paragraph_ocr.data.store import Store
from paragraph_ocr.data.text import Passages
from paragraph_ocr.errors import UserError


@pytest.fixture(scope="module")
def store(notes, tmp_path_factory) -> Store:
    return Store(notes.prepare(tmp_path_factory.mktemp("notes"), num_workers=2))


def test_the_number_of_workers_does_not_change_a_byte(few_notes, tmp_path):
    made = [
        few_notes.prepare(tmp_path / str(workers), num_workers=workers).read_bytes()
        for workers in (0, 1, 4)
    ]
    assert made[0] == made[1] == made[2]


def test_a_second_preparation_makes_nothing(noise, tmp_path):
    first = noise.prepare(tmp_path, num_workers=0)
    before = first.stat()

    def complain(done: int, total: int) -> None:
        raise AssertionError

    second = noise.prepare(tmp_path, num_workers=0, progress=complain)
    assert second == first
    assert (second.stat().st_ino, second.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_every_field_that_changes_the_paragraphs_changes_the_path(few_notes, noise, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("some words " * 40)
    others = {
        "texts": tmp_path,
        "random_share": 0.5,
        "test_random_share": 0.0,
        "seed": 1,
        "characters": few_notes.characters[1:],
        "held_out": ("Zeyada",),
        "jitter": 0.5,
        "pressure": 0.5,
        "joined": 0.5,
        "word_slant_deg": 3.0,
        "crossed_out": 0.5,
        "baseline_wave": 0.2,
        "uneven_lines": 0.5,
        "mixed_faces": 0.5,
        "stretch": 0.2,
        "reach": 0.2,
        "spread": 0.2,
        "lean_deg": 20.0,
        "line_slope_deg": 1.0,
        "long_bars": 1.0,
        "underlined": 0.5,
        "cut_out": 0.5,
        "forms": 0.1,
    }
    for corpus in (few_notes, noise):
        prints = [corpus.fingerprint()]
        for field, value in asdict(corpus).items():
            if field in ("name", "fonts"):
                continue
            changed = others.get(field, value + 1 if isinstance(value, int) else value)
            prints.append(replace(corpus, **{field: changed}).fingerprint())
        assert len(set(prints)) == len(prints)
    assert few_notes.fingerprint() != noise.fingerprint()


def test_other_text_or_fonts_in_the_same_folder_change_the_path(few_notes, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("some words " * 40)
    corpus = replace(few_notes, texts=tmp_path)
    before = corpus.fingerprint()
    assert corpus.fingerprint() == before
    (tmp_path / "a.txt").write_text("other words " * 40)
    assert corpus.fingerprint() != before


def test_splits_have_the_promised_sizes_and_the_mean_length_is_kept(store, notes):
    assert [len(store.rows(s)) for s in ("train", "val", "test")] == [200, 20, 20]
    lengths = [len(text) for text in store.texts]
    assert min(lengths) >= 100
    assert max(lengths) <= 250
    assert 140 < np.mean(lengths) < 165
    assert np.std(lengths) > 20
    lines = [text.count("\n") + 1 for text in store.texts]
    assert set(lines) == {3, 4, 5, 6}


def test_no_text_stands_twice(store):
    assert len({" ".join(text.split()) for text in store.texts}) == len(store)


def test_a_corpus_with_too_few_different_texts_is_the_users_to_mend(noise, tmp_path):
    small = replace(
        noise,
        characters="ab \n",
        min_characters=1,
        mean_characters=2,
        max_characters=3,
        max_lines=1,
    )
    with pytest.raises(UserError, match=r"datamodule.num_train=\d+ is more than there are"):
        small.prepare(tmp_path, num_workers=0)
    assert list(tmp_path.glob("*.h5")) == []


def test_each_split_reads_from_documents_of_its_own(store, notes):
    words = Passages(None, characters=notes.characters, random_share=0.25)._words
    only = {
        split: set(found).difference(*(words[other] for other in words if other != split))
        for split, found in words.items()
    }
    for row, text in enumerate(store.texts):
        found = set(text.split())
        for split, own in only.items():
            # a random word may by chance be one that another split's plays hold
            assert split == store.splits[row] or len(found & own) <= 2


def test_ink_stays_off_the_border_of_every_stored_page(store):
    for row in range(len(store)):
        image = store.image(row)
        assert not (image[0].any())
        assert not (image[-1].any())
        assert not (image[:, 0].any())
        assert not (image[:, -1].any())


def test_progress_is_told_of_every_paragraph(noise, tmp_path):
    told = []
    noise.prepare(tmp_path, num_workers=0, progress=lambda *step: told.append(step))
    assert told == [(n, 35) for n in range(1, 36)]


def test_noise_has_the_promised_lines_and_characters(noise, tmp_path, vocabulary):
    store = Store(noise.prepare(tmp_path, num_workers=0))
    vocabulary.require(store.texts)
    for text in store.texts:
        assert 4 <= len(text) <= 40
        lines = text.split("\n")
        assert len(lines) <= 2
        assert all(lines)


PROGRAM = """
import signal, sys
from pathlib import Path
from dataclasses import replace
sys.path.insert(0, sys.argv[2])
from conftest import CHARACTERS, notes

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit none
    corpus = replace(notes.__wrapped__() if hasattr(notes, "__wrapped__") else notes(), num_train=20_000)

    def say(done, total):
        if done == 20:
            print("going", flush=True)

    corpus.prepare(Path(sys.argv[1]), num_workers=2, progress=say)
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_preparation_leaves_no_store_and_no_process(tmp_path, sign):
    program = tmp_path / "prepare.py"
    program.write_text(PROGRAM)
    root = tmp_path / "root"
    process = subprocess.Popen(
        [sys.executable, str(program), str(root), os.path.dirname(__file__)],  # noqa: PTH120
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"going\n", process.stderr.read()
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    # Python drops an interrupt that falls into a weak reference's callback: one presses again
    for _ in range(3):
        os.kill(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
            break
    assert process.returncode is not None
    deadline = time.monotonic() + 15
    while any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
    assert list(root.glob("*.h5")) == []
    if sign == signal.SIGINT:
        assert list(root.glob(".*.tmp")) == []


@pytest.mark.parametrize(
    "trait",
    [
        {"mixed_faces": 1.0},
        {"stretch": 0.3},
        {"reach": 0.5},
        {"spread": 0.5},
        {"lean_deg": 40.0},
        {"line_slope_deg": 3.0},
        {"long_bars": 2.0},
        {"underlined": 1.0},
        {"cut_out": 1.0},
        {"forms": 0.15},
    ],
    ids=lambda trait: next(iter(trait)),
)
def test_hands_that_no_face_has_are_trained_with_and_not_tested(few_notes, trait):
    def page(corpus, split):
        return corpus.maker()(np.random.default_rng(3), split).image

    made_up = replace(few_notes, **trait)
    for split in ("val", "test"):
        assert np.array_equal(page(made_up, split), page(few_notes, split))
    # half of the hands lean or stand apart no more than others
    trained = [made_up.maker(), few_notes.maker()]
    drawn = [[make(np.random.default_rng(s), "train").image for s in range(6)] for make in trained]
    assert any(not np.array_equal(*pair) for pair in zip(*drawn, strict=True))
