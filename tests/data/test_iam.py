"""IAM as copies of it lie on disks: read back exactly, the same from each, and no writer in two splits."""

import os
import re
import shutil
import time
from collections import Counter

import iam_corpus
import numpy as np
import pytest

from paragraph_ocr.data.archive import sources
from paragraph_ocr.data.iam import LINE_CANVAS, PADDING_PX, IamCorpus, _crop_line
from paragraph_ocr.data.iam_forms import deal, join_tokens, parse_form, read_descriptions
from paragraph_ocr.data.scan import ink
from paragraph_ocr.data.store import Store
from paragraph_ocr.errors import UserError

FORMS = 20


@pytest.fixture
def copy(iam_copies, tmp_path):
    """Return a function that copies a layout to where it may be spoilt."""

    def copy(layout):
        return shutil.copytree(iam_copies / layout, tmp_path / layout)

    return copy


def corpus(folder, *, unit="paragraphs", **changes):
    size = {"height": 56, "width": 1536} if unit == "lines" else {"height": 576, "width": 640}
    return IamCorpus(**{"name": f"iam_{unit}", "folder": folder, "unit": unit, **size, **changes})


def prepared(folder, tmp_path, *, workers=0, **changes) -> Store:
    return Store(corpus(folder, **changes).prepare(tmp_path / "stores", num_workers=workers))


def rows(store) -> dict:
    return {
        source: (text, split, writer)
        for source, text, split, writer in zip(
            store.sources, store.texts, store.splits, store.writers, strict=True
        )
    }


@pytest.mark.parametrize("layout", ["archives", "folders", "half"])
def test_paragraphs_are_read_as_they_were_written(iam_pages, iam_copies, tmp_path, layout):
    store = prepared(iam_copies / layout, tmp_path)
    assert rows(store) == {page.id: (page.text, page.split, page.writer) for page in iam_pages}
    assert store.sources == sorted(store.sources)


@pytest.mark.parametrize("layout", ["archives", "folders", "half"])
def test_lines_are_read_as_they_were_written(iam_pages, iam_copies, tmp_path, layout):
    store = prepared(iam_copies / layout, tmp_path, unit="lines")
    assert rows(store) == {
        line.id: (line.text, page.split, page.writer) for page in iam_pages for line in page.lines
    }


def test_lines_of_parquet_files_are_those_of_the_forms(iam_pages, iam_copies, tmp_path):
    store = prepared(iam_copies / "parquet", tmp_path, unit="lines")
    assert Counter(zip(store.texts, store.splits, strict=True)) == Counter(
        (line.text, page.split) for page in iam_pages for line in page.lines
    )
    assert len(set(store.sources)) == len(store)
    with pytest.raises(UserError, match="datamodule=iam_lines"):
        prepared(iam_copies / "parquet", tmp_path)


def test_boxes_and_words_are_those_of_the_description(iam_pages, iam_copies):
    for layout in ("archives", "folders", "half"):
        parts = sources(iam_copies / layout)
        forms = read_descriptions(parts, splitting="reference", root="").forms
        assert list(forms) == sorted(page.id for page in iam_pages)
        for page in iam_pages:
            form = forms[page.id]
            assert form.size == page.size
            assert [line.box for line in form.lines] == [line.box for line in page.lines]
            assert [line.text for line in form.lines] == [line.text for line in page.lines]


def test_a_paragraph_shows_all_of_its_lines_and_nothing_printed(iam_pages, iam_copies, tmp_path):
    store = prepared(iam_copies / "folders", tmp_path)
    for row, source in enumerate(store.sources):
        page = next(page for page in iam_pages if page.id == source)
        lefts, tops, rights, bottoms = zip(*(line.box for line in page.lines), strict=True)
        around = (min(lefts) - PADDING_PX, min(tops) - PADDING_PX)
        size = (max(bottoms) + PADDING_PX - around[1], max(rights) + PADDING_PX - around[0])
        whole = page.image()[around[1] :, around[0] :][: size[0], : size[1]]
        height, width = store.sizes[row]
        assert abs(width / height - size[1] / size[0]) < 0.02
        # as much ink as the form has there, at half its size
        found = store.image(row)[:height, :width].mean()
        assert found == pytest.approx(ink(whole).mean(), rel=0.25)


def test_every_copy_gives_the_same_pictures(iam_copies, tmp_path):
    def images(layout, unit):
        store = prepared(iam_copies / layout, tmp_path, unit=unit)
        return {store.sources[row]: store.image(row) for row in range(len(store))}

    for unit in ("paragraphs", "lines"):
        full, folders, half = (images(name, unit) for name in ("archives", "folders", "half"))
        assert full.keys() == folders.keys() == half.keys()
        for name, image in full.items():
            assert (image == folders[name]).all()
            # once more scaled and packed as JPEG: strokes stay where they were
            shrunk = [np.float64(found)[:56, :400].reshape(14, 4, 100, 4).mean((1, 3))
                      for found in (image, half[name])]  # fmt: skip
            assert np.corrcoef(shrunk[0].ravel(), shrunk[1].ravel())[0, 1] > 0.75


def test_the_tables_serve_where_there_is_no_xml(iam_pages, copy, tmp_path):
    folder = copy("archives")
    (folder / "xml.tgz").unlink()
    store = prepared(folder, tmp_path)
    assert rows(store) == {page.id: (page.text, page.split, page.writer) for page in iam_pages}
    with_xml = prepared(copy("folders"), tmp_path)
    for row in range(len(store)):
        assert (store.image(row) == with_xml.image(row)).all()


def test_lines_tgz_serves_where_there_are_no_forms(iam_pages, copy, tmp_path):
    folder = copy("archives")
    (folder / "formsE-H.tgz").unlink()
    store = prepared(folder, tmp_path, unit="lines")
    assert rows(store) == {
        line.id: (line.text, page.split, page.writer) for page in iam_pages for line in page.lines
    }


def test_a_line_keeps_its_neighbours_strokes_out_unless_a_word_has_no_place(
    iam_pages, copy, tmp_path
):
    folder = copy("folders")

    def strokes_of(page) -> np.ndarray:
        """Return whether each pixel of the second line's box lies in a box of its strokes."""
        image = np.zeros(page.size, bool)
        for _, strokes in page.lines[1].components:
            for left, top, right, bottom in strokes:
                image[top:bottom, left:right] = True
        box = page.lines[1].box
        return image[slice(*box[1::2]), slice(*box[::2])]

    # the one with the most paper about its strokes
    whole = [p for p in iam_pages if all(strokes for _, strokes in p.lines[1].components)]
    page = min(whole, key=lambda page: strokes_of(page).mean())
    line, own = page.lines[1], strokes_of(page)
    assert 0.1 < own.mean() < 0.9
    image = np.full(page.size, 255, np.uint8)
    image[:, ::3] = 100  # strokes all over, and more paper still

    def covered() -> float:
        form = parse_form((folder / "xml" / f"{page.id}.xml").read_bytes(), where="")
        crop = _crop_line(image, form.lines[1], 1.0)[PADDING_PX:-PADDING_PX, PADDING_PX:-PADDING_PX]
        return 3 * float((crop == 100).mean())

    # components are padded a little
    assert own.mean() < covered() < 0.99
    rewrite(
        folder / "xml" / f"{page.id}.xml",
        lambda text: re.sub(f'(id="{line.id}-00">)(<cmp[^>]*>)+', r"\1", text),
    )
    assert covered() == pytest.approx(1, abs=0.02)


def test_a_partial_copy_says_what_is_missing_and_serves(iam_pages, copy, tmp_path, capsys):
    folder = copy("archives")
    (folder / "formsI-Z.tgz").unlink()
    (folder / "lines.tgz").unlink()
    store = prepared(folder, tmp_path)
    here = [page for page in iam_pages if page.id < "i"]
    assert sorted(store.sources) == sorted(page.id for page in here)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{FORMS - len(here)} of {FORMS} forms have no image here" in said
    assert f"{FORMS} of 1,539 forms are described" in said
    counts = Counter(page.split for page in here)
    assert f"{counts['train']} train, {counts['val']} val, {counts['test']} test" in said


def test_an_archive_beside_its_folder_is_read_once(iam_pages, iam_copies, copy, tmp_path):
    folder = copy("folders")
    shutil.copy(iam_copies / "archives" / "formsA-D.tgz", folder)
    shutil.copy(iam_copies / "archives" / "xml.tgz", folder)
    assert len(prepared(folder, tmp_path)) == FORMS


def test_no_writer_and_no_form_stands_in_two_splits(iam_copies, tmp_path):
    for layout, unit in (("archives", "lines"), ("half", "paragraphs")):
        store = prepared(iam_copies / layout, tmp_path, unit=unit)
        homes: dict[str, set[str]] = {}
        for source, writer, split in zip(store.sources, store.writers, store.splits, strict=True):
            homes.setdefault(writer, set()).add(split)
            homes.setdefault(re.match("[^-]+-[^-]+", source)[0], set()).add(split)
        assert all(len(found) == 1 for found in homes.values())


def rewrite(path, change):
    text = path.read_text()
    changed = change(text)
    assert changed != text
    path.write_text(changed)


def test_a_form_of_no_list_by_a_writer_of_the_test_set_is_not_kept_silently(
    iam_pages, copy, tmp_path, capsys
):
    folder = copy("folders")
    tester = next(page for page in iam_pages if page.set == "testset")
    other = next(page for page in iam_pages if page.set == "")
    rewrite(
        folder / "xml" / f"{other.id}.xml",
        lambda text: text.replace(f'writer-id="{other.writer}"', f'writer-id="{tester.writer}"'),
    )
    store = prepared(folder, tmp_path)
    assert rows(store)[other.id][1] == "train"
    said = " ".join(capsys.readouterr().out.split())
    assert "1 form in none of the lists but by writers of val or test" in said
    assert other.id in said
    store = prepared(folder, tmp_path, split="independent")
    assert other.id not in store.sources
    assert len(store) == FORMS - 1
    assert "left out of training" in capsys.readouterr().out


def test_a_writer_in_two_lists_is_the_users_to_mend(iam_pages, copy, tmp_path):
    folder = copy("folders")
    tester = next(page for page in iam_pages if page.set == "testset")
    trained = next(page for page in iam_pages if page.set == "trainset")
    rewrite(
        folder / "xml" / f"{trained.id}.xml",
        lambda text: text.replace(f'writer-id="{trained.writer}"', f'writer-id="{tester.writer}"'),
    )
    with pytest.raises(UserError, match=f"writer {tester.writer} stands in train .*and in test"):
        prepared(folder, tmp_path)


def test_aachens_lists_are_taken_as_given(iam_pages, copy, tmp_path):
    folder = copy("folders")
    by_set = {name: [p for p in iam_pages if p.set == name] for name in iam_corpus.SETS}
    chosen = {
        "train": by_set["trainset"],
        "validation": by_set["validationset1"],
        "test": by_set["testset"] + by_set["validationset2"],
    }
    for name, found in chosen.items():
        (folder / f"{name}.uttlist").write_text("".join(f"{page.id}\n" for page in found))
    store = prepared(folder, tmp_path, split="aachen")
    names = {"train": "train", "validation": "val", "test": "test"}
    assert dict(zip(store.sources, store.splits, strict=True)) == {
        page.id: names[name] for name, found in chosen.items() for page in found
    }
    # by lines: the first two of each form
    for name, found in chosen.items():
        listed = "".join(f"{line.id}\n" for page in found for line in page.lines[:2])
        (folder / f"{name}.uttlist").write_text(listed)
    store = prepared(folder, tmp_path, split="aachen", unit="lines")
    assert sorted(store.sources) == sorted(
        line.id for found in chosen.values() for page in found for line in page.lines[:2]
    )


def test_the_reference_counts_of_a_whole_copy_are_reached():
    """232, 220 and 1,087 pages, from lists and descriptions as many as IAM's."""
    from paragraph_ocr.data.iam_forms import Box, Descriptions, Form, Line

    counts = {
        "testset": 232,
        "validationset1": 105,
        "validationset2": 115,
        "trainset": 747,
        "": 340,
    }
    lines = {"testset": 1965, "validationset1": 926, "validationset2": 1000, "": 9462}
    forms, lists, number = {}, {}, 0
    for name, count in counts.items():
        for index in range(count):
            identity = f"{chr(97 + number % 16)}{number // 16 % 100:02d}-{number % 1000:03d}"
            share = {"trainset": "", "": ""}.get(name, name)
            total = counts["trainset"] + counts[""] if share == "" else count
            place = index + (counts["trainset"] if name == "" else 0)
            many = lines[share] * (place + 1) // total - lines[share] * place // total
            written = tuple(
                Line(f"{identity}-{n:02d}", "a", (Box(0, 0, 1, 1),)) for n in range(many)
            )
            forms[identity] = Form(identity, f"{name}{index // 3}", written, None)
            if name:
                lists.setdefault(f"{name}.txt", []).append(f"{identity}-00")
            number += 1
    assert len(forms) == 1539
    splits = deal(Descriptions(forms, lists), splitting="reference", root="")
    assert Counter(splits.forms.values()) == {"train": 1087, "val": 220, "test": 232}
    assert splits.remarks == ()
    assert Counter(
        split for identity, split in splits.forms.items() for _ in forms[identity].lines
    ) == {"train": 9462, "val": 1926, "test": 1965}


def test_training_lines_lie_beside_the_paragraphs(iam_pages, iam_copies, tmp_path):
    store = prepared(iam_copies / "half", tmp_path, lines_beside=LINE_CANVAS)
    beside = [row for row in range(len(store)) if store.canvas(row) == LINE_CANVAS]
    assert {store.sources[row] for row in beside} == {
        line.id for page in iam_pages if page.split == "train" for line in page.lines
    }
    assert beside == list(range(FORMS, len(store)))


def test_the_number_of_workers_does_not_change_a_byte(iam_copies, tmp_path):
    made = [
        corpus(iam_copies / "archives").prepare(tmp_path / str(workers), num_workers=workers)
        for workers in (0, 2)
    ]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_an_unchanged_copy_is_not_prepared_again_and_a_changed_one_is(iam_pages, copy, tmp_path):
    folder = copy("folders")
    first = corpus(folder).prepare(tmp_path, num_workers=0)
    before = first.stat()
    assert corpus(folder).prepare(tmp_path, num_workers=0) == first
    assert first.stat().st_mtime_ns == before.st_mtime_ns
    page = iam_pages[0]
    form = folder / "xml" / f"{page.id}.xml"
    rewrite(form, lambda text: text.replace(f'writer-id="{page.writer}"', 'writer-id="999"'))
    os.utime(form, (time.time() + 5,) * 2)
    second = corpus(folder).prepare(tmp_path, num_workers=0)
    assert second != first
    assert rows(Store(second))[page.id][2] == "999"


def test_progress_is_told_of_every_form(iam_copies, tmp_path):
    told = []
    corpus(iam_copies / "archives").prepare(
        tmp_path, num_workers=0, progress=lambda *step: told.append(step)
    )
    assert told == [(done, FORMS) for done in range(1, FORMS + 1)]


def test_a_paragraph_larger_than_the_canvas_is_scaled_and_whole(iam_copies, tmp_path):
    large = prepared(iam_copies / "folders", tmp_path)
    small = prepared(iam_copies / "folders", tmp_path, height=64, width=96)
    for row in range(len(small)):
        height, width = small.sizes[row]
        assert height <= 64 and width <= 96
        assert width / height == pytest.approx(large.sizes[row][1] / large.sizes[row][0], rel=0.06)
        assert small.image(row).any(axis=0)[max(0, width - 12) : width].any()


def test_what_is_escaped_twice_is_read_plainly(iam_pages):
    texts = [word for page in iam_pages for line in page.lines for word in line.text.split()]
    assert any(word.startswith('"') for word in texts) and "&" in texts
    page = iam_pages[0]
    xml = iam_corpus.xml(page)
    assert "&amp;quot;" in xml or "&amp;amp;" in xml
    assert parse_form(xml.encode(), where="x").text == page.text
    with_dtd = xml.replace("<form", '<!DOCTYPE form SYSTEM "form.dtd">\n<form', 1)
    assert parse_form(with_dtd.encode(), where="x").text == page.text


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("A|MOVE|to|stop|Mr.|Gaitskell|from", "A MOVE to stop Mr. Gaitskell from"),
        ('he|said|"|not|now|"|,|and|(|so|)|left|;|why|?', 'he said "not now", and (so) left; why?'),
        ("it|'s|the|boys'|own|,|is|n't|it", "it's the boys' own, isn't it"),
        ('"|All|"|is|well|...', '"All" is well...'),
    ],
)
def test_tokens_of_the_tables_become_the_line_again(tokens, text):
    assert join_tokens(tokens.split("|")) == text
