"""Corpora in IAM's own formats, of forms that look like IAM's, at any size.

    python tests/data/iam_corpus.py FOLDER --forms 100 --layout archives

Layouts: `archives` and `folders` as the database is published, `half` as the FSDL lab packed it, `parquet`
as the Hugging Face hub has lines of it. Every layout holds the same forms. No real IAM is needed or
imitated closer than its formats go: texts are Shakespeare's, hands are fonts.
"""

import argparse
import io
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from xml.sax.saxutils import escape

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from paragraph_ocr.data import fonts
from paragraph_ocr.data.parallel import in_order
from paragraph_ocr.data.render import render
from paragraph_ocr.data.text import Passages

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz !\"#&'()*+,-./:;?\n"
FULL_SIZE = (3542, 2479)  # height and width in pixels of IAM's forms
LAYOUTS = ("archives", "folders", "half", "parquet")

SETS = ("trainset", "validationset1", "validationset2", "testset", "", *("trainset", "") * 3)
"""Which list a writer's forms are in, by turns; "" is none of them."""

FORMS_OF_A_WRITER = 2
LEAST_FORMS = FORMS_OF_A_WRITER * 5  # every list has a writer then

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class TrueLine:
    id: str
    text: str
    box: Box
    """Left, top, right, bottom in pixels at full size."""
    components: tuple[tuple[str, tuple[Box, ...]], ...]
    """Words, and the boxes of their strokes; a word may have none."""


@dataclass(frozen=True)
class Page:
    id: str
    writer: str
    lines: tuple[TrueLine, ...]
    size: tuple[int, int]
    set: str
    png: bytes

    @property
    def split(self) -> str:
        """As the reference deals them."""
        return {"t": "test", "v": "val"}.get(self.set.replace("train", "")[:1], "train")

    @property
    def text(self) -> str:
        return "\n".join(line.text for line in self.lines)

    def image(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.png)))

    def line_images(self) -> list[bytes]:
        """Return the box of each line as a PNG file."""
        image = self.image()
        boxes = [line.box for line in self.lines]
        return [png(image[top:bottom, left:right]) for left, top, right, bottom in boxes]


def make_pages(
    count: int, *, scale: float = 1.0, seed: int = 0, num_workers: int = 0
) -> Iterator[Page]:
    """Yield forms; at scale 1 they have IAM's size and as much text."""
    make = partial(_page, scale=scale, seed=seed)
    return in_order(make, range(count), num_workers=num_workers, chunk=2)


def _page(index: int, *, scale: float, seed: int) -> Page:
    generator = np.random.default_rng([seed, index])
    writer = index // FORMS_OF_A_WRITER
    identity = f"{chr(97 + index % 16)}{1 + index // 16:02d}-{index * 7 % 1000:03d}"
    identity += ("", "u", "x")[index % 3]
    faces, passages = _material()
    face = faces[writer % len(faces)]

    height, width = (round(length * scale) for length in FULL_SIZE)
    room_height, room_width = round(0.58 * height), round(0.82 * width)
    smaller = max(1, round(2 * scale))  # the renderer draws letters of at most 64 px
    words = _words(passages, generator, length=round(90 + 500 * max(0.0, scale - 0.4)))
    drawing = render(
        words,
        face,
        height=room_height // smaller,
        width=room_width // smaller,
        min_lines=3,
        max_lines=13,
        generator=generator,
    )
    ink = cv2.resize(drawing.image, None, fx=smaller, fy=smaller, interpolation=cv2.INTER_CUBIC)
    left, top = round(0.1 * width), round(0.215 * height)
    paper = generator.normal(246, 1.5, size=(height, width)).astype(np.float32)
    strength = generator.uniform(110, 200)
    paper[top : top + ink.shape[0], left : left + ink.shape[1]] -= ink * (strength / 255)
    image = Image.fromarray(np.clip(paper, 0, 255).astype(np.uint8))
    _print(image, identity, " ".join(words))

    lines = []
    parts, of_line = _connected(drawing.image, drawing.boxes)
    parts = parts * smaller + np.array([left, top, left, top])
    for number, text in enumerate(drawing.lines):
        mine = parts[of_line == number]
        lines.append(_line(f"{identity}-{number:02d}", text, mine))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=2)
    return Page(
        identity,
        f"{writer:03d}",
        tuple(lines),
        (height, width),
        SETS[writer % len(SETS)],
        file.getvalue(),
    )


@lru_cache(maxsize=1)
def _material() -> tuple[list[fonts.Face], Passages]:
    faces, _ = fonts.load_faces(None, characters=CHARACTERS)
    return faces, Passages(None, characters=CHARACTERS, random_share=0.0)


def _words(passages: Passages, generator: np.random.Generator, *, length: int) -> list[str]:
    """Return words with signs that need escaping, and that the tables' tokens tell unambiguously."""
    size = round(length * generator.uniform(0.7, 1.3))
    found = passages.draw(generator, "train", length=size, minimum=40, maximum=670)
    words = [word.strip("'\"()-&*") for word in found]
    words = [word for word in words if word and "(" not in word and ")" not in word]
    place = int(generator.integers(len(words) - 2))
    words[place] = '"' + words[place].rstrip(".,;:!?") + '"'
    words.insert(place + 1, "&")
    return words


def _connected(image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes (n, 4) of connected strokes, and the line that each belongs to.

    A stroke belongs to the line that runs nearest to its middle; all lines share a slope. Strokes of two
    lines that touch are cut apart between them.
    """
    ink = (image > 40).astype(np.uint8)
    across = np.arange(image.shape[1]) - image.shape[1] / 2
    heights, slope = boxes[:, [1, 3]].mean(axis=1), 0.0
    pitch = np.diff(heights).mean() if len(boxes) > 1 else image.shape[0]
    for attempt in range(2):
        _, labels, stats, middles = cv2.connectedComponentsWithStats(ink)
        stats, middles = stats[1:], middles[1:]  # the first is the paper
        for _ in range(5):
            x = middles[:, :1] - image.shape[1] / 2
            of_line = np.abs(middles[:, 1:] - slope * x - heights).argmin(axis=1)
            solved = np.linalg.lstsq(
                np.hstack([x, np.eye(len(boxes))[of_line]]), middles[:, 1], rcond=None
            )[0]
            slope = float(solved[0])
            heights = np.where(np.bincount(of_line, minlength=len(boxes)) > 0, solved[1:], heights)
        if attempt == 0:
            tall = np.isin(labels, 1 + np.flatnonzero(stats[:, cv2.CC_STAT_HEIGHT] > 1.3 * pitch))
            for between in (heights[1:] + heights[:-1]) / 2:
                rows = np.rint(between + slope * across).astype(int).clip(0, image.shape[0] - 1)
                columns = np.arange(image.shape[1])
                ink[rows, columns] &= ~tall[rows, columns]
                below = (rows + 1).clip(0, image.shape[0] - 1)  # strokes also meet at corners
                ink[below, columns] &= ~tall[below, columns]
    x, y, width, height = stats[:, :4].T
    return np.stack([x, y, x + width, y + height], axis=1), of_line


def _line(identity: str, text: str, parts: np.ndarray) -> TrueLine:
    """Return a line of which these are the strokes, dealt to its words from left to right."""
    parts = parts[parts[:, 0].argsort()]
    box = (*parts[:, :2].min(axis=0).tolist(), *parts[:, 2:].max(axis=0).tolist())
    words = text.split()
    begins = np.cumsum([0, *(len(word) + 1 for word in words)]) / (len(text) + 1)
    places = (parts[:, [0, 2]].mean(axis=1) - box[0]) / (box[2] - box[0])
    of_word = np.clip(np.searchsorted(begins, places, side="right") - 1, 0, len(words) - 1)
    components = tuple(
        (word, tuple(map(tuple, parts[of_word == index].tolist())))
        for index, word in enumerate(words)
    )
    return TrueLine(identity, text, box, components)


def _print(image: Image.Image, identity: str, text: str) -> None:
    """Print the head, the text to copy, and the rules of an IAM form."""
    draw = ImageDraw.Draw(image)
    width, height = image.size
    font = ImageFont.load_default(max(8, round(height / 75)))
    for share in (0.075, 0.205, 0.81):
        draw.line((0.04 * width, share * height, 0.96 * width, share * height), 60, 3)
    draw.text((0.05 * width, 0.05 * height), "Sentence Database", 40, font)
    draw.text((0.8 * width, 0.05 * height), identity.upper(), 40, font)
    lines, line = [], ""
    for word in text.split():
        if draw.textlength(f"{line} {word}", font) > 0.85 * width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    for number, printed in enumerate([*lines, line][:6]):
        draw.text((0.07 * width, (0.085 + 0.019 * number) * height), printed, 40, font)
    draw.text((0.1 * width, 0.83 * height), "Name:", 40, font)


# What is written of the pages, in IAM's words


def xml(page: Page) -> str:
    """Return the description of a form; like IAM's, it escapes twice inside attributes."""

    def quoted(text: str) -> str:
        once = escape(text, {'"': "&quot;"})
        return f'"{escape(once)}"' if once != text else f'"{once}"'

    lines = []
    for line in page.lines:
        words = []
        for number, (word, strokes) in enumerate(line.components):
            boxes = "".join(
                f'<cmp x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>'
                for left, top, right, bottom in strokes
            )
            words.append(
                f'<word tag="NN" text={quoted(word)} id="{line.id}-{number:02d}">{boxes}</word>'
            )
        lines.append(
            f'<line id="{line.id}" text={quoted(line.text)} threshold="154" segmentation="ok" '
            f'asx="{line.box[0]}" asy="{line.box[1]}">\n{chr(10).join(words)}\n</line>'
        )
    return (
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n'
        f'<form created="2026-01-01" height="{page.size[0]}" id="{page.id}" modified="2026-01-01" '
        f'version="3.0" width="{page.size[1]}" writer-id="{page.writer}">\n'
        f"<machine-printed-part><machine-print-line text={quoted(page.text.replace(chr(10), ' '))}/>"
        "</machine-printed-part>\n"
        f"<handwritten-part>\n{chr(10).join(lines)}\n</handwritten-part>\n</form>\n"
    )


def tokens(text: str) -> list[str]:
    """Return the words and signs that the tables part."""
    found = []
    for word in text.split():
        before = ['"'] if word.startswith('"') else []
        word = word[len(before) :]
        after: list[str] = []
        while len(word) > 1 and word[-1] in '.,;:!?"':
            after.insert(0, word[-1])
            word = word[:-1]
        found += [*before, word, *after]
    return found


def tables(pages: Sequence[Page]) -> dict[str, str]:
    """Return forms.txt and lines.txt."""
    forms, lines = (
        ["#--- forms.txt ---#", "# a01-000u 000 2 prt 7 5 52 36"],
        ["#--- lines.txt ---#"],
    )
    for page in pages:
        count = len(page.lines)
        forms.append(f"{page.id} {page.writer} 2 prt {count} {count} 52 52")
        for number, line in enumerate(page.lines):
            left, top, right, bottom = line.box
            flag = "err" if number == 1 else "ok"
            lines.append(
                f"{line.id} {flag} 154 19 {left} {top} {right - left} {bottom - top} "
                + "|".join(tokens(line.text))
            )
    return {"forms.txt": "\n".join(forms) + "\n", "lines.txt": "\n".join(lines) + "\n"}


def lists(pages: Sequence[Page]) -> dict[str, str]:
    """Return the lists of the writer-independent task; like IAM's, they leave out some lines."""
    return {
        f"{name}.txt": "".join(
            f"{line.id}\n"
            for page in pages
            if page.set == name
            for line in page.lines[: max(1, len(page.lines) - 1)]
        )
        for name in ("trainset", "validationset1", "validationset2", "testset")
    }


def half(page: Page) -> bytes:
    """Return the form at half size, as JPEG."""
    image = page.image()
    size = (image.shape[1] // 2, image.shape[0] // 2)
    file = io.BytesIO()
    Image.fromarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA)).save(
        file, "JPEG", quality=92
    )
    return file.getvalue()


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=2)
    return file.getvalue()


# Layouts


def write(folder: Path, pages: Iterable[Page], layout: str) -> list[Page]:
    """Write the pages in a layout, and return them without their images."""
    folder.mkdir(parents=True, exist_ok=True)
    return {"archives": _archives, "folders": _folders, "half": _half, "parquet": _parquet}[layout](
        folder, pages
    )


def _archives(folder: Path, pages: Iterable[Page]) -> list[Page]:
    kept = []
    groups = {
        letter: "A-D" if letter <= "d" else "E-H" if letter <= "h" else "I-Z" for letter in LETTERS
    }
    forms = {name: _Tar(folder / f"forms{name}.tgz") for name in ("A-D", "E-H", "I-Z")}
    lines, described, ascii_ = (_Tar(folder / f"{name}.tgz") for name in ("lines", "xml", "ascii"))
    for page in pages:
        forms[groups[page.id[0]]].add(f"{page.id}.png", page.png)
        described.add(f"{page.id}.xml", xml(page).encode("latin-1"))
        for line, image in zip(page.lines, page.line_images(), strict=True):
            lines.add(f"{page.id[:3]}/{page.id}/{line.id}.png", image)
        kept.append(_bare(page))
    for name, text in tables(kept).items():
        ascii_.add(name, text.encode())
    for archive in (*forms.values(), lines, described, ascii_):
        archive.close()
    with zipfile.ZipFile(folder / "largeWriterIndependentTextLineRecognitionTask.zip", "w") as task:
        for name, text in lists(kept).items():
            task.writestr(f"LargeWriterIndependentTextLineRecognitionTask/{name}", text)
    return kept


LETTERS = [chr(97 + index) for index in range(16)]


class _Tar:
    """A .tgz written file by file."""

    def __init__(self, path: Path) -> None:
        self._file = tarfile.open(path, "w:gz", compresslevel=1)  # noqa: SIM115

    def add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._file.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        self._file.close()


def _folders(folder: Path, pages: Iterable[Page]) -> list[Page]:
    kept = []

    def put(name: str, data: bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    for page in pages:
        group = "A-D" if page.id < "e" else "E-H" if page.id < "i" else "I-Z"
        put(f"forms{group}/{page.id}.png", page.png)
        put(f"xml/{page.id}.xml", xml(page).encode("latin-1"))
        kept.append(_bare(page))
    for name, text in tables(kept).items():
        put(f"ascii/{name}", text.encode())
    for name, text in lists(kept).items():
        put(f"task/{name}", text.encode())
    return kept


def _half(folder: Path, pages: Iterable[Page]) -> list[Page]:
    kept = []
    with zipfile.ZipFile(folder / "iamdb.zip", "w") as archive:
        for page in pages:
            archive.writestr(f"iamdb/forms/{page.id}.jpg", half(page))
            archive.writestr(f"iamdb/xml/{page.id}.xml", xml(page).encode("latin-1"))
            kept.append(_bare(page))
        for name, text in lists(kept).items():
            archive.writestr(f"iamdb/task/{name}", text)
    return kept


def _parquet(folder: Path, pages: Iterable[Page]) -> list[Page]:
    import pyarrow as arrow
    import pyarrow.parquet

    kept = []
    rows: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    for page in pages:
        rows[page.split] += [
            {"image": {"bytes": image, "path": f"{line.id}.png"}, "text": line.text}
            for line, image in zip(page.lines, page.line_images(), strict=True)
        ]
        kept.append(_bare(page))
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        table = arrow.Table.from_pylist(rows[split])
        pyarrow.parquet.write_table(table, folder / f"{name}-00000-of-00001.parquet")
    return kept


def _bare(page: Page) -> Page:
    return Page(page.id, page.writer, page.lines, page.size, page.set, b"")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--forms", type=int, default=100)
    parser.add_argument("--layout", choices=LAYOUTS, default="archives")
    parser.add_argument("--scale", type=float, default=1.0, help="of IAM's size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    typed = parser.parse_args()
    if typed.forms < LEAST_FORMS:
        sys.exit(f"--forms={typed.forms} leaves a split empty. Pass --forms={LEAST_FORMS} or more.")
    pages = make_pages(typed.forms, scale=typed.scale, seed=typed.seed, num_workers=typed.workers)
    write(typed.folder, pages, typed.layout)


if __name__ == "__main__":
    main()
