"""The store: what is written is read, by any process, or it is no store."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest

from paragraph_ocr.data.store import Paragraph, Store, StoreWriter, pack
from paragraph_ocr.errors import UserError


def paragraphs(count: int = 9) -> list[Paragraph]:
    generator = np.random.default_rng(0)
    splits = ("train", "val", "test")
    return [
        Paragraph(
            generator.integers(256, size=(20 + n % 2 * 10, 30), dtype=np.uint8),
            f"Zeile {n}\n\u00e4\u00f6\u00fc \u20ac",
            splits[n % 3],
            f"face {n}",
            f"writer {n // 2}",
        )
        for n in range(count)
    ]


def write(path, wanted=None, *, canvas=None, fingerprint="abc"):
    wanted = paragraphs() if wanted is None else wanted
    with StoreWriter(path, fingerprint=fingerprint) as writer:
        for paragraph in wanted:
            writer.add(pack(paragraph, canvas=canvas))
    return path


def test_a_store_gives_back_what_was_written(tmp_path):
    store = Store(write(tmp_path / "a.h5"))
    assert len(store) == 9
    assert store.fingerprint == "abc"
    assert store.canvases == [(20, 30), (30, 30)]
    for row, paragraph in enumerate(paragraphs()):
        assert (store.image(row) == paragraph.image).all()
        assert store.texts[row] == paragraph.text
        assert store.splits[row] == paragraph.split
        assert store.sources[row] == paragraph.source
        assert store.writers[row] == paragraph.writer
        assert tuple(store.sizes[row]) == paragraph.image.shape == store.canvas(row)
    assert store.rows("val") == [1, 4, 7]


def with_letters() -> list[Paragraph]:
    """Return the paragraphs, every second of which says where its letters are."""
    generator = np.random.default_rng(1)
    return [
        replace(paragraph, letters=generator.integers(0, 20, size=(10, 2))) if n % 2 else paragraph
        for n, paragraph in enumerate(paragraphs())
    ]


def test_a_store_keeps_where_letters_are(tmp_path):
    store = Store(write(tmp_path / "a.h5", with_letters()))
    for row, paragraph in enumerate(with_letters()):
        wanted = np.zeros((0, 2)) if paragraph.letters is None else paragraph.letters
        assert np.array_equal(store.letters(row), wanted)
    plain = Store(write(tmp_path / "b.h5"))
    assert {plain.letters(row) is None for row in range(9)} == {True}


def test_letters_that_are_not_those_of_the_text_are_refused(tmp_path):
    wrong = replace(paragraphs()[0], letters=np.zeros((11, 2)))
    with pytest.raises(ValueError, match="letters at"):
        pack(wrong)
    for name in ("num_letters", "letters"):
        path = write(tmp_path / f"{name}.h5", with_letters())
        with h5py.File(path, "r+") as file:
            values = file[name][:]
            del file[name]
            file[name] = values[:-1] if name == "letters" else values + 1
        with pytest.raises(UserError, match="no whole store"):
            Store(path)


def test_images_are_padded_with_paper_to_a_canvas_and_keep_their_true_size(tmp_path):
    store = Store(write(tmp_path / "a.h5", canvas=(32, 40)))
    assert store.canvases == [(32, 40)]
    for row, paragraph in enumerate(paragraphs()):
        height, width = store.sizes[row]
        image = store.image(row)
        assert (image[:height, :width] == paragraph.image).all()
        assert not image[height:].any()
        assert not image[:, width:].any()


def test_what_does_not_fit_is_refused():
    image = np.zeros((10, 10), np.uint8)
    for wrong, canvas in ((image, (9, 10)), (image.astype(float), None), (image[None], None)):
        with pytest.raises(ValueError):
            pack(Paragraph(wrong, "", "train", "", ""), canvas=canvas)
    with pytest.raises(ValueError, match="split"):
        pack(Paragraph(image, "", "dev", "", ""))


def test_any_hdf5_program_can_read_a_store(tmp_path):
    with h5py.File(write(tmp_path / "a.h5"), "r") as file:
        images = file["images/20x30"]
        assert images.chunks == (1, 20, 30)
        assert images.compression == "gzip"
        assert (images[0] == paragraphs()[0].image).all()
        assert file["text"].asstr()[0] == paragraphs()[0].text


def test_the_same_paragraphs_give_the_same_bytes_at_any_time(tmp_path):
    first = write(tmp_path / "a.h5").read_bytes()
    time.sleep(1.1)  # HDF5 keeps times in seconds
    assert write(tmp_path / "b.h5").read_bytes() == first


def test_an_error_while_writing_leaves_nothing_behind(tmp_path):
    with (
        pytest.raises(RuntimeError),
        StoreWriter(tmp_path / "a.h5", fingerprint="abc") as writer,
    ):
        writer.add(pack(paragraphs()[0]))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_exists_stays_until_the_new_one_is_whole(tmp_path):
    path = write(tmp_path / "a.h5", fingerprint="old")
    with StoreWriter(path, fingerprint="new") as writer:
        writer.add(pack(paragraphs()[0]))
        assert Store(path).fingerprint == "old"
    assert Store(path).fingerprint == "new"


def test_two_writers_of_one_path_do_not_collide(tmp_path):
    path = tmp_path / "a.h5"
    with StoreWriter(path, fingerprint="abc") as one, StoreWriter(path, fingerprint="abc") as two:
        for paragraph in paragraphs():
            one.add(pack(paragraph))
            two.add(pack(paragraph))
    assert len(Store(path)) == 9
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_every_truncation_of_a_store_is_refused(tmp_path):
    whole = write(tmp_path / "a.h5").read_bytes()
    cut = tmp_path / "cut.h5"
    for size in np.linspace(0, len(whole) - 1, 40).astype(int):
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match="Delete it"):
            Store(cut)


def test_a_foreign_file_and_another_version_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no a.h5"):
        Store(tmp_path / "a.h5")
    foreign = tmp_path / "foreign.h5"
    with h5py.File(foreign, "w") as file:
        file["data"] = 1
    with pytest.raises(UserError, match="not a paragraph_ocr store"):
        Store(foreign)
    newer = write(tmp_path / "newer.h5")
    with h5py.File(newer, "a") as file:
        file.attrs["version"] = 99
    with pytest.raises(UserError, match="version 99"):
        Store(newer)


@pytest.mark.parametrize("kind", ["external link", "soft link", "external data", "virtual"])
def test_a_store_never_leads_to_another_file(tmp_path, kind):
    path, other = write(tmp_path / "a.h5"), write(tmp_path / "other.h5")
    with h5py.File(path, "a") as file:
        del file["place"]
        match kind:
            case "external link":
                file["place"] = h5py.ExternalLink(str(other), "/place")
            case "soft link":
                file["place"] = h5py.SoftLink("/canvas")
            case "external data":
                file.create_dataset("place", (9,), "i4", external=[(str(other), 0, 36)])
            case "virtual":
                layout = h5py.VirtualLayout((9,), "i4")
                layout[:] = h5py.VirtualSource(str(other), "place", (9,))
                file.create_virtual_dataset("place", layout)
    with pytest.raises(UserError, match="place"):
        Store(path)


def _sums(store: Store, results) -> None:
    results.put([int(store.image(row).sum()) for row in (3, 0, 8, 1)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_read_through_a_store_that_the_parent_has_open(tmp_path, method):
    store = Store(write(tmp_path / "a.h5"))
    store.image(0)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    workers = [context.Process(target=_sums, args=(store, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    expected = [int(paragraphs()[row].image.sum()) for row in (3, 0, 8, 1)]
    assert [results.get(timeout=60) for _ in workers] == [expected] * 3
    for worker in workers:
        worker.join()
    assert int(store.image(3).sum()) == expected[0]


def test_a_closed_or_copied_store_opens_again(tmp_path):
    store = Store(write(tmp_path / "a.h5"))
    store.image(0)
    copied = pickle.loads(pickle.dumps(store))
    store.close()
    for reopened in (store, copied):
        assert (reopened.image(5) == paragraphs()[5].image).all()


def test_a_killed_writer_leaves_nothing_that_looks_like_a_store(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; import numpy as np\n"
        "from paragraph_ocr.data.store import Paragraph, StoreWriter, pack\n"
        "with StoreWriter(Path(sys.argv[1]), fingerprint='abc') as writer:\n"
        "    for n in range(10**9):\n"
        "        writer.add(pack(Paragraph(np.full((20, 30), n % 256, np.uint8), str(n), 'train', '', '')))\n"
        "        if n == 300: print('going', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "a.h5")], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"going\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("*.h5")) == []
    write(tmp_path / "a.h5")
    assert len(Store(tmp_path / "a.h5")) == 9


def test_a_store_names_no_place_of_its_machine_and_opens_anywhere(tmp_path):
    first = write(tmp_path / "here" / "a.h5")
    assert str(tmp_path).encode() not in first.read_bytes()
    second = tmp_path / "there" / "other name.h5"
    second.parent.mkdir()
    first.rename(second)
    second.chmod(0o444)
    assert (Store(second).image(5) == paragraphs()[5].image).all()
    with h5py.File(second, "r") as file:
        filters = [file["images/20x30"].id.get_create_plist().get_filter(0)[0]]
        assert filters == [h5py.h5z.FILTER_DEFLATE], "every HDF5 library has it"


def test_random_reads_keep_up_with_training(tmp_path):
    generator = np.random.default_rng(0)
    pages = []
    for n in range(32):  # an eighth of a page is ink, as of IAM's paragraphs
        page = np.zeros((576, 640), np.uint8)
        for top in range(0, 570, 8):
            page[top, :] = generator.integers(256, size=640)
        pages.append(Paragraph(page, str(n), "train", "", ""))
    store = Store(write(tmp_path / "a.h5", pages))
    rows = generator.integers(32, size=400).tolist()
    began = time.process_time()
    for row in rows:
        store.image(row)
    # 2,100 a second were measured on one core; an unlucky chunk shape gives 15
    assert len(rows) / (time.process_time() - began) > 600


def test_what_a_dead_writer_left_is_removed_after_a_day(tmp_path):
    old, young = tmp_path / ".a.h5.1.tmp", tmp_path / ".a.h5.2.tmp"
    for path, age_s in ((old, 2 * 86_400), (young, 60)):
        path.touch()
        os.utime(path, (time.time() - age_s,) * 2)
    write(tmp_path / "a.h5")
    assert not old.exists() and young.exists()
