"""Whatever is wrong with a user's files is one line with the remedy, and leaves nothing behind."""

import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import iam_corpus
import pyarrow as arrow
import pyarrow.parquet
import pytest
from PIL import Image
from test_archive import write_tar, write_zip

from commands import run_command
from paragraph_ocr.data.folder import FolderCorpus
from paragraph_ocr.data.iam import IamCorpus
from paragraph_ocr.data.store import Store
from paragraph_ocr.errors import UserError

Spoil = Callable[[Path, list[iam_corpus.Page]], object]
"""Spoils a whole copy of IAM that lies in a folder."""


def edit(pattern: str, old: str, new: str, *, name: str = "xml/{id}.xml") -> Spoil:
    """Replace the first match of `pattern` in a file of the first form."""

    def spoil(folder, pages):
        path = folder / name.format(id=pages[0].id)
        text = path.read_text()
        found = re.search(pattern, text)
        assert found, text[:500]
        path.write_text(text.replace(found[0], found[0].replace(old, new), 1))

    return spoil


def overwrite(name: str, content: str | bytes) -> Spoil:
    def spoil(folder, pages):
        path = folder / name.format(id=pages[0].id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def add_line(name: str, line: str) -> Spoil:
    """Append a line to a file; {test} is the first line of the test set, {train} of training."""

    def spoil(folder, pages):
        ids = {
            "test": next(page for page in pages if page.set == "testset").lines[0].id,
            "train": next(page for page in pages if page.set == "trainset").lines[0].id,
            "last": next(page for page in pages if page.set == "trainset").lines[-1].id,
            "form": pages[0].id,
        }
        with (folder / name.format(**ids)).open("a") as file:
            file.write(line.format(**ids) + "\n")

    return spoil


def cut(name: str, share: float = 0.6) -> Spoil:
    def spoil(folder, pages):
        path = folder / name.format(id=pages[0].id)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return spoil


def remove(*names: str) -> Spoil:
    def spoil(folder, pages):
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def duplicate(name: str, other: str) -> Spoil:
    def spoil(folder, pages):
        path = folder / other.format(id=pages[0].id)
        path.parent.mkdir(exist_ok=True)
        shutil.copy(folder / name.format(id=pages[0].id), path)

    return spoil


def both(*spoils: Spoil) -> Spoil:
    return lambda folder, pages: [spoil(folder, pages) for spoil in spoils]


def lead_out(folder, pages):
    path = folder / "formsA-D" / f"{pages[0].id}.png"
    outside = folder.parent / "outside.png"
    path.rename(outside)
    path.symlink_to(outside)


def bomb() -> bytes:
    """Return a PNG that claims 60,000 x 60,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(60_001))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def small_image(folder, pages):
    path = folder / "formsA-D" / f"{pages[0].id}.png"
    Image.open(path).resize((300, 300)).save(path)


def narrow_images(folder, pages):
    """Leave the tables alone to describe forms, and make an image too small for them."""
    remove("xml")(folder, pages)
    small_image(folder, pages)


def encrypt(folder, pages):
    path = folder / "iamdb.zip"
    whole = bytearray(path.read_bytes())
    for found in re.finditer(rb"PK\x01\x02", bytes(whole)):
        whole[found.start() + 8] |= 1
    path.write_bytes(whole)


LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE form [<!ENTITY a "ha">'
    + "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + ']><form id="a01-000" writer-id="&i;"/>'
)
OUTSIDE = '<!DOCTYPE form [<!ENTITY a SYSTEM "file:///etc/passwd">]><form id="&a;" writer-id="1"/>'
LINE = r'<line id="[^"]*-00" text="[^"]*"'
FORM = "formsA-D/{id}.png"
XML = "xml/{id}.xml"

IAM: dict[str, tuple[str, Spoil, str, dict]] = {
    # archives
    "truncated tgz": ("archives", cut("formsI-Z.tgz"), "formsI-Z.tgz is cut short", {}),
    "truncated description": ("archives", cut("xml.tgz"), "xml.tgz is cut short", {}),
    "truncated zip": ("half", cut("iamdb.zip"), "iamdb.zip is cut short", {}),
    "no archive": ("archives", overwrite("xml.tgz", "<html>login"), "xml.tgz is cut short", {}),
    "climbing tgz": (
        "archives",
        lambda folder, pages: write_tar(folder / "xml.tgz", {"../a01-000.xml": b""}),
        "'../a01-000.xml' leads outside",
        {},
    ),
    "absolute zip": (
        "half",
        lambda folder, pages: write_zip(folder / "more.zip", {"/etc/a01-000.xml": b""}),
        "'/etc/a01-000.xml' leads outside",
        {},
    ),
    "symlink tgz": (
        "archives",
        lambda folder, pages: write_tar(
            folder / "more.tgz", links=[(tarfile.SYMTYPE, "a01-000.xml", "/etc/passwd")]
        ),
        "more.tgz: the link a01-000.xml to '/etc/passwd' leads outside",
        {},
    ),
    "hard link tgz": (
        "archives",
        lambda folder, pages: write_tar(
            folder / "more.tgz", links=[(tarfile.LNKTYPE, "a01-000.xml", "../../x")]
        ),
        "'../../x' leads outside",
        {},
    ),
    "symlink zip": (
        "half",
        lambda folder, pages: write_zip(folder / "more.zip", links=[("xml/a.xml", "../../x")]),
        "'../../x' leads outside",
        {},
    ),
    "symlink folder": ("folders", lead_out, "leads outside of", {}),
    "bomb zip": (
        "half",
        lambda folder, pages: write_zip(folder / "more.zip", {"a09-009.xml": bytes(2**25)}),
        "more.zip: a09-009.xml of 33,554,432 bytes makes it swell",
        {},
    ),
    "bomb tgz": (
        "archives",
        lambda folder, pages: write_tar(folder / "more.tgz", {"a09-009.xml": bytes(2**25)}),
        "more.tgz: a09-009.xml of 33,554,432 bytes makes it swell",
        {},
    ),
    "encrypted zip": ("half", encrypt, "is encrypted", {}),
    # images
    "bomb png": ("folders", overwrite(FORM, bomb()), "claims more than 150,000,000 px", {}),
    "no image": ("folders", overwrite(FORM, "not an image"), ".png is no PNG, JPEG", {}),
    "truncated image": ("folders", cut(FORM), ".png cannot be read", {}),
    "other shape": ("folders", small_image, "another shape than form", {}),
    "outside of the image": ("folders", narrow_images, "is too small for the lines of form", {}),
    "two images": ("folders", duplicate(FORM, "again/{id}.png"), "is too. Leave one", {}),
    "no forms": (
        "folders",
        remove("formsA-D", "formsE-H", "formsI-Z"),
        "holds no images of the forms",
        {},
    ),
    "no form of a split": ("folders", remove("formsE-H"), "no image of any form of test", {}),
    # descriptions
    "broken xml": ("folders", cut(XML), ".xml is broken XML", {}),
    "entities": ("folders", overwrite(XML, LAUGHS), ".xml declares entities", {}),
    "external entity": ("folders", overwrite(XML, OUTSIDE), ".xml declares entities", {}),
    "no writer": ("folders", edit('writer-id="[^"]*"', "writer-id", "w"), "attribute 'writer-id'", {}),
    "no number": ("folders", edit('height="[0-9]+"', 'height="', 'height="x'), "invalid literal", {}),
    "empty text": ("folders", edit(LINE, "text=", 'text="" was='), "-00 has an empty transcription", {}),
    "line twice": ("folders", edit(r'<line id="[^"]*-01"', '-01"', '-00"'), "-00 is there twice", {}),
    "line without strokes": (
        "folders",
        edit(r"(?s)<line.*?</line>", "<cmp", "<gone"),
        "-00 has no components",
        {},
    ),
    "no area": ("folders", edit(r'<cmp x="\d+"', 'x="', 'x="-9'), "-00 has no area", {}),
    "no lines": ("folders", edit(r"(?s)<handwritten-part>.*</handwritten-part>", "line", "other"),
                 "has no handwritten lines", {}),
    "form twice": ("folders", duplicate(XML, "again/{id}.xml"), "does too. Leave one", {}),
    "nothing": ("folders", remove("xml", "ascii"), "describes no forms", {}),
    "short row": ("folders", both(remove("xml"), add_line("ascii/lines.txt", "{form}-99 ok 1")),
                  "fewer than 9 columns", {}),
    "row of no form": (
        "folders",
        both(remove("xml"), add_line("ascii/lines.txt", "z99-999-00 ok 1 1 1 1 1 1 a")),
        "z99-999-00 is no line of a form",
        {},
    ),
    "row twice": ("folders", both(remove("xml"), add_line("ascii/forms.txt", "{form} 000 2")),
                  "is there twice", {}),
    "row without number": (
        "folders",
        both(remove("xml"), add_line("ascii/lines.txt", "{form}-99 ok 1 1 a b c d e")),
        "invalid literal",
        {},
    ),
    # splits
    "no list": ("folders", remove("task/validationset2.txt"), "lacks validationset1.txt or val", {}),
    "unknown forms": ("folders", overwrite("task/testset.txt", "z99-999-00\n"),
                      "testset.txt name no form that is described here", {}),
    "no id": ("folders", add_line("task/testset.txt", "hello world"), "'hello world' is no id", {}),
    "line in two lists": ("folders", add_line("task/testset.txt", "{train}"), "into train and test", {}),
    "form in two lists": ("folders", add_line("task/testset.txt", "{last}"), "lines of form", {}),
    "writer in two lists": (
        "folders",
        edit('writer-id="000"', "000", "003"),
        "writer 003 stands in train",
        {},
    ),
    "aachen without lists": ("folders", remove(), "finds no list of train", {"split": "aachen"}),
    # Parquet
    "truncated parquet": (
        "parquet", cut("test-00000-of-00001.parquet"), "is no whole Parquet file", {"unit": "lines"},
    ),
    "parquet of lines": ("parquet", remove(), "Pass datamodule=iam_lines", {}),
    "parquet without a split": (
        "parquet",
        lambda folder, pages: (folder / "test-00000-of-00001.parquet").rename(folder / "x.parquet"),
        "says no split",
        {"unit": "lines"},
    ),
    "parquet without a test split": (
        "parquet", remove("test-00000-of-00001.parquet"), "no image of any form of test",
        {"unit": "lines"},
    ),
}  # fmt: skip


def refused(corpus, tmp_path, said):
    """Check that preparation ends in one line with a remedy, and leaves nothing."""
    stores = tmp_path / "stores"
    with pytest.raises(UserError, match=re.escape(said)) as refusal:
        corpus.prepare(stores, num_workers=0)
    line = str(refusal.value)
    assert "\n" not in line
    assert len(re.findall(r"[.!] (?=[A-Z])", line)) >= 1, f"no remedy: {line}"
    assert str(tmp_path) in line, f"no path: {line}"
    assert not stores.exists() or list(stores.iterdir()) == []


@pytest.mark.parametrize("case", IAM)
def test_a_spoilt_copy_of_iam(iam_copies, iam_pages, tmp_path, case):
    layout, spoil, said, settings = IAM[case]
    folder = shutil.copytree(iam_copies / layout, tmp_path / "iam")
    spoil(folder, iam_pages)
    refused(iam(folder, **settings), tmp_path, said)


def iam(folder, *, unit="paragraphs", split="reference") -> IamCorpus:
    height, width = (56, 1536) if unit == "lines" else (144, 160)
    return IamCorpus(name="iam", folder=folder, unit=unit, height=height, width=width, split=split)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("L", (40, 20), 255).save(file, "PNG")
    return file.getvalue()


PARQUET = {
    "no text": ([{"image": {"bytes": png(), "path": ""}}], "lacks the column text"),
    "empty text": ([{"image": {"bytes": png(), "path": ""}, "text": " "}], "row 1 has an empty"),
    "a path alone": (
        [{"image": {"bytes": None, "path": "x.png"}, "text": "a"}],
        "row 1 holds no bytes",
    ),
    "a name for an image": ([{"image": "x.png", "text": "a"}], "row 1 holds no bytes"),
    "no image": ([{"image": b"nothing", "text": "a"}], "row 1 is no PNG"),
    "bomb": ([{"image": bomb(), "text": "a"}], "claims more than 150,000,000 px"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_a_spoilt_parquet_file(tmp_path, case):
    rows, said = PARQUET[case]
    folder = tmp_path / "lines"
    folder.mkdir()
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), folder / "train.parquet")
    refused(iam(folder, unit="lines"), tmp_path, said)


PAGE = """<PcGts><Page imageFilename="p.png"><TextRegion id="r1">{coords}
<TextEquiv><Unicode>text</Unicode></TextEquiv></TextRegion></Page></PcGts>"""
COORDS = '<Coords points="1,1 30,1 30,15"/>'
ALTO = """<alto>{file}<TextBlock ID="b" HPOS="1" VPOS="1" WIDTH="9" HEIGHT="{height}"><TextLine>
<String CONTENT="text"/></TextLine></TextBlock></alto>"""
FILE = "<fileName>p.png</fileName>"
FOLDERS: dict[str, tuple[dict[str, str | bytes], str]] = {
    "empty": ({}, "holds no manifest"),
    "missing image": (
        {"manifest.jsonl": '{"image": "q.png", "text": "a"}'},
        "q.png does not exist",
    ),
    "unreadable image": ({"p.png": b"nothing", "p.txt": "text"}, "p.png is no PNG"),
    "bomb": ({"p.png": bomb(), "p.txt": "text"}, "claims more than 150,000,000 px"),
    "empty text": ({"p.txt": "\n"}, "p.png has an empty transcription"),
    "no text": ({"q.png": png(), "p.txt": "a"}, "q.png has no q.txt beside it"),
    "climbing": ({"manifest.jsonl": '{"image": "../p.png", "text": "a"}'}, "outside the folder"),
    "twice": ({"manifest.csv": "image,text\np.png,a\np.png,b\n"}, "p.png is listed twice"),
    "unknown split": ({"manifest.csv": "image,text,split\np.png,a,dev\n"}, "split='dev'"),
    "no json": ({"manifest.jsonl": json.dumps({"image": "p.png"})[:-3]}, "line 1 is no JSON"),
    "broken page": ({"p.xml": PAGE.format(coords=COORDS)[:60]}, "p.xml is broken XML"),
    "entities": ({"p.xml": LAUGHS}, "p.xml declares a DTD or entities"),
    "no corners": ({"p.xml": PAGE.format(coords="")}, "p.xml lacks what a PcGts file needs"),
    "bad corners": ({"p.xml": PAGE.format(coords='<Coords points="1,a"/>')}, "p.xml lacks what"),
    "page without its scan": (
        {"p.xml": PAGE.format(coords=COORDS).replace("p.png", "q.png")},
        "q.png does not exist",
    ),
    "alto without a scan": ({"p.xml": ALTO.format(file="", height=9)}, "no fileName"),
    "alto without size": ({"p.xml": ALTO.format(file=FILE, height="")}, "p.xml lacks what a alto"),
    "neither": ({"p.xml": "<html/>"}, "p.xml is neither PAGE XML nor ALTO"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_spoilt_folder(tmp_path, case):
    files, said = FOLDERS[case]
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in ({"p.png": png(), **files} if files else files).items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    refused(FolderCorpus(name="mine", folder=folder, height=64, width=64), tmp_path, said)


# What befalls the process

PROGRAM = """
import os, signal, sys
from pathlib import Path
from paragraph_ocr.data.iam import IamCorpus
from paragraph_ocr.errors import UserError

if __name__ == "__main__":
    folder, root, doom = sys.argv[1:]

    def progress(done, total):
        if doom == "kill" and done > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    corpus = IamCorpus(name="iam", folder=Path(folder), unit="paragraphs", height=144, width=160)
    try:
        corpus.prepare(Path(root), num_workers=2, progress=progress)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
"""


@pytest.fixture
def start(tmp_path, iam_copies):
    """Return a function that starts a preparation as a process of its own."""
    program = tmp_path / "prepare.py"
    program.write_text(PROGRAM)

    def start(doom: str = "", *, root: Path = tmp_path / "stores", file_bytes: int | None = None):
        def limit() -> None:
            if file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

        return subprocess.Popen(
            [sys.executable, program, iam_copies / "archives", root, doom],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )

    return start


def test_a_killed_preparation_is_made_up_for_by_the_next(start, tmp_path, iam_pages):
    killed = start("kill")
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("stores/*.h5")) == []
    again = start()
    assert again.communicate(timeout=120)[1] == "" and again.returncode == 0
    (store,) = (tmp_path / "stores").iterdir()
    assert len(Store(store)) == len(iam_pages)


def test_two_preparations_at_once_leave_one_whole_store(start, tmp_path, iam_pages):
    both = [start(), start()]
    for process in both:
        assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
    (store,) = (tmp_path / "stores").iterdir()
    assert len(Store(store)) == len(iam_pages)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_full_disk_is_one_line_and_leaves_nothing(start, tmp_path, iam_copies, share):
    whole = iam(iam_copies / "archives").prepare(tmp_path / "whole", num_workers=0).stat().st_size
    full = start(file_bytes=int(share * whole))
    said = full.communicate(timeout=120)[1]
    assert full.returncode == 2, said
    (line,) = said.strip().splitlines()
    assert "stores cannot take iam-" in line and "outputs=<folder>" in line
    assert list((tmp_path / "stores").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder that holds 40 kB, where the tests may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_small_disk_is_one_line_and_leaves_nothing(start, small_disk):
    full = start(root=small_disk)
    said = full.communicate(timeout=120)[1]
    assert full.returncode == 2, said
    assert "No space left" in said and said.count("\n") == 1
    assert list(small_disk.iterdir()) == []


def test_the_command_line_gives_the_line_and_status_2(iam_copies, tmp_path):
    folder = shutil.copytree(iam_copies / "half", tmp_path / "iam")
    (folder / "iamdb.zip").write_bytes((folder / "iamdb.zip").read_bytes()[:-100])
    done = run_command(
        "train.py", "model=tiny", "datamodule=iam_paragraphs", "tracking=off", "trainer=cpu",
        f"datamodule.root={folder}", f"outputs={tmp_path / 'outputs'}", env=os.environ,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "iamdb.zip is cut short or broken" in line
    assert not list((tmp_path / "outputs").rglob("*.h5"))


def test_a_zip_within_the_zip_is_not_looked_into(iam_copies, iam_pages, tmp_path):
    folder = shutil.copytree(iam_copies / "half", tmp_path / "iam")
    with zipfile.ZipFile(folder / "iamdb.zip", "a") as archive:
        archive.writestr("iamdb/inner.zip", b"whatever")
    assert len(Store(iam(folder).prepare(tmp_path / "stores", num_workers=0))) == len(iam_pages)
