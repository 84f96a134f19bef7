"""A user's folder becomes a store, or one line says what is wrong with it."""

import csv
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from paragraph_ocr.data.folder import FolderCorpus
from paragraph_ocr.data.store import Store
from paragraph_ocr.errors import UserError


def draw(path, text="a b"):
    page = np.full((60, 90), 255, np.uint8)
    cv2.putText(page, text, (5, 40), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 0, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(page).save(path)


def corpus(folder, **changes):
    settings = {"name": "mine", "folder": folder, "height": 64, "width": 96, **changes}
    return FolderCorpus(**settings)


def manifest(folder, *rows):
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def pages(tmp_path):
    folder = tmp_path / "mine"
    for index in range(4):
        draw(folder / f"p{index}.png", f"n{index}")
    return folder


def listed(index, **more):
    return {"image": f"p{index}.png", "text": f"line {index}\nend", **more}


def prepared(corpus, tmp_path, workers=0):
    return Store(corpus.prepare(tmp_path / "stores", num_workers=workers))


def test_a_manifest_of_json_lines_is_read_as_it_says(pages, tmp_path):
    splits = ("train", "val", "test", "train")
    manifest(pages, *(listed(i, split=s, writer=f"w{i}") for i, s in enumerate(splits)))
    store = prepared(corpus(pages), tmp_path)
    assert store.texts == [f"line {i}\nend" for i in range(4)]
    assert tuple(store.splits) == splits
    assert store.writers == ["w0", "w1", "w2", "w3"]
    assert store.sources == [f"p{i}.png" for i in range(4)]
    assert store.sizes.tolist() == [[60, 90]] * 4
    assert store.image(0).shape == (64, 96)
    assert store.image(0)[60:].max() == 0
    assert store.image(0).max() == 255


def test_a_csv_manifest_holds_newlines_and_commas(pages, tmp_path):
    with (pages / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "text"])
        writer.writerows([[f"p{i}.png", f'a, "b"\n{i}'] for i in range(4)])
    store = prepared(corpus(pages), tmp_path)
    assert store.texts == [f'a, "b"\n{i}' for i in range(4)]


def test_images_beside_text_files_need_no_manifest(tmp_path):
    folder = tmp_path / "mine"
    for name in ("b/two", "a"):
        draw(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"text of {name}\n")
    store = prepared(corpus(folder, split="test"), tmp_path)
    assert store.sources == ["a.png", "b/two.png"]
    assert store.texts == ["text of a", "text of b/two"]
    assert set(store.splits) == {"test"}


def test_pages_of_one_writer_stay_together_and_no_split_is_empty(tmp_path):
    folder = tmp_path / "mine"
    rows = []
    for index in range(12):
        draw(folder / f"p{index}.png")
        rows.append(listed(index, writer=f"w{index // 3}"))
    manifest(folder, *rows)
    store = prepared(corpus(folder), tmp_path)
    homes = {}
    for writer, split in zip(store.writers, store.splits, strict=True):
        assert homes.setdefault(writer, split) == split
    assert set(store.splits) == {"train", "val", "test"}


def test_more_pages_later_move_no_page_to_another_split(tmp_path):
    def splits(count):
        folder = tmp_path / str(count)
        for index in range(count):
            draw(folder / f"p{index}.png")
        manifest(folder, *(listed(index) for index in range(count)))
        store = prepared(corpus(folder), tmp_path)
        return dict(zip(store.sources, store.splits, strict=True))

    few, many = splits(40), splits(60)
    assert all(many[name] == split for name, split in few.items())


def test_a_changed_page_or_text_is_prepared_again_and_an_unchanged_folder_is_not(pages, tmp_path):
    manifest(pages, *(listed(i) for i in range(4)))
    first = corpus(pages).prepare(tmp_path, num_workers=0)
    before = first.stat()
    assert corpus(pages).prepare(tmp_path, num_workers=0) == first
    assert first.stat().st_mtime_ns == before.st_mtime_ns
    draw(pages / "p0.png", "new")
    second = corpus(pages).prepare(tmp_path, num_workers=0)
    manifest(pages, *(listed(i, writer="x") for i in range(4)))
    third = corpus(pages).prepare(tmp_path, num_workers=0)
    assert len({first, second, third}) == 3


def test_the_number_of_workers_does_not_change_a_byte(tmp_path):
    folder = tmp_path / "mine"
    for index in range(40):
        draw(folder / f"p{index}.png")
    manifest(folder, *(listed(index) for index in range(40)))
    one = corpus(folder).prepare(tmp_path / "1", num_workers=0).read_bytes()
    assert one == corpus(folder).prepare(tmp_path / "2", num_workers=2).read_bytes()


BAD = {
    "missing image": ([{"image": "no.png", "text": "a"}], "no.png does not exist"),
    "empty text": ([{"image": "p0.png", "text": " \n"}], "empty transcription"),
    "no text": ([{"image": "p0.png"}], "empty transcription"),
    "no image": ([{"text": "a"}], "line 1 has no image"),
    "twice": ([listed(0), listed(0)], "listed twice"),
    "unknown split": ([listed(0, split="dev")], "split='dev'"),
    "half of the splits": ([listed(0, split="train"), listed(1)], "names no split"),
    "writer in two splits": (
        [listed(0, split="train", writer="w"), listed(1, split="test", writer="w")],
        "writer w stands in",
    ),
    "climbs out": ([{"image": "../secret.png", "text": "a"}], "outside the folder"),
    "absolute": ([{"image": "/etc/hostname", "text": "a"}], "outside the folder"),
    "a list": ([[1, 2]], "line 1 is no JSON object"),
    "a number for text": ([{"image": "p0.png", "text": 5}], "5 is no text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_manifest_is_one_line_and_leaves_nothing(pages, tmp_path, name):
    draw(tmp_path / "secret.png")
    rows, said = BAD[name]
    manifest(pages, *rows)
    refused(pages, tmp_path, said)


def refused(folder, tmp_path, said):
    with pytest.raises(UserError, match=said) as refusal:
        corpus(folder).prepare(tmp_path / "stores", num_workers=0)
    assert "\n" not in str(refusal.value)
    stores = tmp_path / "stores"
    assert not stores.exists() or list(stores.iterdir()) == []


def test_a_link_out_of_the_folder_is_refused(pages, tmp_path):
    draw(tmp_path / "secret.png")
    (pages / "link.png").symlink_to(tmp_path / "secret.png")
    manifest(pages, {"image": "link.png", "text": "a"})
    refused(pages, tmp_path, "leads outside")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "holds no manifest"),
        ({"manifest.jsonl": b"{broken\n"}, "line 1 is no JSON"),
        ({"manifest.jsonl": b"\xff\xfe\x00"}, "not UTF-8"),
        ({"manifest.jsonl": b"", "manifest.csv": b""}, "both"),
        ({"page.png": b""}, "no page.txt beside it"),
        ({"page.png": b"", "page.txt": b"\xff"}, "not UTF-8"),
        ({"page.png": b"no image", "page.txt": b"text"}, "page.png"),
    ],
)
def test_a_bad_folder_is_one_line_and_leaves_nothing(tmp_path, files, said):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    refused(folder, tmp_path, said)
