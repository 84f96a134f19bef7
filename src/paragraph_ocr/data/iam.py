"""IamCorpus: the IAM handwriting database, in whichever form a copy of it lies.

The official archives or their folders, the half-size zip of the FSDL lab, or Parquet files of lines. Lines
and paragraphs are cut out of the scanned forms; `lines.tgz` serves where there are no forms.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from paragraph_ocr import console
from paragraph_ocr.data import parquet
from paragraph_ocr.data.archive import Source, files_of, sources
from paragraph_ocr.data.corpus import Progress, digest, is_prepared, store_path, write_store
from paragraph_ocr.data.iam_forms import (
    FORM_ID,
    Box,
    Descriptions,
    Form,
    Line,
    Splits,
    deal,
    read_descriptions,
)
from paragraph_ocr.data.paragraph import SPLITS, Paragraph
from paragraph_ocr.data.parallel import in_order
from paragraph_ocr.data.scan import SUFFIXES, fit, ink, read_grey
from paragraph_ocr.data.store import PackedParagraph, pack
from paragraph_ocr.errors import UserError

PADDING_PX = 16
"""Around a box at full size; the FSDL lab's 8 px at half size."""

_AROUND_PX = 3  # at full size: the grey edge of a stroke lies outside of its component

FULL_SIZE = (3542, 2479)
"""Height and width in pixels of IAM's forms (300 dpi), for copies that do not say."""

SCALES = (1.0, 0.5)
"""Sizes of scans known to be in use: the official one, and the FSDL lab's."""

GREATEST_SCALE = 0.5
"""Lines and paragraphs are stored no larger than this, so that every copy gives the same ones."""

LINE_CANVAS = (192, 1280)
"""Height and width in pixels of the lines stored beside paragraphs: IAM's widest at half size fit."""

NUM_FORMS = 1539
"""Of the whole database."""

_SPLIT_NAMES = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}

_VERSION = 3  # raise it whenever the same files give another store

_SKIP = ("words", "sentences")  # of the official copy; 115,000 files that serve nothing here
# beginnings of the names of official archives
_NO_FORMS = ("lines", "words", "sentences", "xml", "ascii")
_NO_LINES = ("forms", "words", "sentences", "xml", "ascii")
_PICTURES = ("forms", "lines", "words", "sentences")
_CHUNK = 4  # scans a task: some 10 MB


class Scan(NamedTuple):
    """An image as it lies, and what is to be cut out of it."""

    data: bytes
    where: str
    form: Form
    split: str
    lines: tuple[Line, ...]
    """What is wanted as lines."""
    of_line: bool = False
    """Whether the image shows a line alone, and not the form."""


@dataclass(frozen=True, kw_only=True)
class IamCorpus:
    """Lines or paragraphs of IAM on a canvas of `height` x `width` pixels.

    Args:
        unit: "lines" or "paragraphs".
        lines_beside: canvas (height, width) of the training lines that are stored after the paragraphs,
            to be stacked into new ones; None stores none.
        split: one of iam_forms.SPLITTINGS.

    Raises:
        UserError: in `prepare`, for whatever in the folder cannot be used; nothing is written then.
    """

    name: str
    folder: Path
    unit: str
    height: int
    width: int
    split: str = "reference"
    lines_beside: tuple[int, int] | None = None

    def fingerprint(self) -> str:
        """Return what changes with any file of the folder (by size and time) and with the settings."""
        files = [
            (path.relative_to(self.folder).as_posix(), stat.st_size, stat.st_mtime_ns)
            for path in files_of(self.folder, skip=_SKIP)
            for stat in [path.stat()]
        ]
        settings = [self.unit, self.height, self.width, self.split, self.lines_beside]
        return digest({"iam": _VERSION, "files": files, "settings": settings})

    def prepare(self, root: Path, *, num_workers: int, progress: Progress | None = None) -> Path:
        if is_prepared(self, root):
            return store_path(self, root)
        tables = [p for p in files_of(self.folder, skip=_SKIP) if p.suffix.lower() == ".parquet"]
        if tables:
            rows = self._from_parquet(tables, num_workers, progress)
        else:
            rows = self._from_scans(num_workers, progress)
        self._report(rows)
        return write_store(self, root, rows, total=len(rows))

    @property
    def _here(self) -> str:
        return f"datamodule.root={self.folder}"

    def _from_scans(self, num_workers: int, progress: Progress | None) -> list[PackedParagraph]:
        """Return the rows of the store in order of form and line, cut out of scans."""
        parts = sources(self.folder, skip=_SKIP)
        descriptions = read_descriptions(
            (part for part in parts if not _is_named(part, _PICTURES)),
            splitting=self.split,
            root=self.folder,
        )
        splits = deal(descriptions, splitting=self.split, root=self.folder)
        for remark in splits.remarks:
            console.warn(f"IAM, split {self.split}: {remark}.")
        shelf = _Shelf(self, parts, descriptions, splits)
        rows: list[PackedParagraph] = []
        done: set[str] = set()
        made = in_order(
            partial(_cut_out, self), shelf.scans(), num_workers=num_workers, chunk=_CHUNK
        )
        for form, found in made:
            rows += found
            done.add(form)
            if progress is not None:
                progress(len(done), len(splits.forms))
        if remark := shelf.remark():
            console.warn(f"IAM: {remark}.")
        if not rows:
            raise UserError(
                f"{self._here} holds no images of the forms that are described. Put formsA-D.tgz, "
                "formsE-H.tgz and formsI-Z.tgz there."
            )
        canvas = (self.height, self.width)
        return sorted(rows, key=lambda row: (row.canvas != canvas, row.source))

    def _from_parquet(
        self, tables: list[Path], num_workers: int, progress: Progress | None
    ) -> list[PackedParagraph]:
        """Return the rows of the store, in order of files and rows."""
        if self.unit != "lines":
            raise UserError(
                f"{self._here} holds Parquet files, which give lines alone. Pass datamodule=iam_lines."
            )
        splits = {path: _split_of(path, self.folder) for path in tables}
        total = parquet.count(tables)
        records = ((splits[path], record) for path in tables for record in parquet.records(path))
        rows = []
        for row in in_order(partial(_read_record, self), records, num_workers=num_workers):
            rows.append(row)
            if progress is not None:
                progress(len(rows), total)
        return rows

    def _report(self, rows: list[PackedParagraph]) -> None:
        """Say how many there are.

        Raises:
            UserError: a split is empty.
        """
        canvas = (self.height, self.width)
        counts = Counter(row.split for row in rows if row.canvas == canvas)
        for split in SPLITS:
            if not counts[split]:
                raise UserError(
                    f"{self._here} has no image of any form of {split} (datamodule.split={self.split}). "
                    "Add the missing archives of forms, or pass another datamodule.split."
                )
        listed = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS)
        writers = len({row.writer for row in rows if row.writer})
        console.say(f"IAM: {listed} {self.unit}" + (f" by {writers:,} writers" if writers else ""))


class _Shelf:
    """The images of a copy, each form's once, and what is lacking."""

    def __init__(
        self,
        corpus: IamCorpus,
        parts: list[Source],
        descriptions: Descriptions,
        splits: Splits,
    ) -> None:
        self._corpus, self._parts = corpus, parts
        self._descriptions, self._splits = descriptions, splits
        self.seen: set[str] = set()
        """Forms of which there is an image."""
        self._strangers: set[str] = set()
        self._lines_lacking = 0  # of forms of which other lines are there

    def scans(self) -> Iterator[Scan]:
        """Yield the forms' images; then, where lines are wanted, those of lines of other forms."""
        yield from self._forms()
        if self._corpus.unit == "lines" and len(self.seen) < len(self._splits.forms):
            yield from self._lines()

    def remark(self) -> str:
        """Return what is lacking in this copy, or nothing."""
        lacking = sorted(self._splits.forms.keys() - self.seen)
        remarks = []
        if lacking:
            named = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
            remarks.append(
                f"{len(lacking):,} of {len(self._splits.forms):,} forms have no image here ({named})"
            )
        if self._lines_lacking:
            remarks.append(f"{self._lines_lacking:,} lines of others have no image")
        if len(self._descriptions.forms) < NUM_FORMS:
            remarks.append(
                f"{len(self._descriptions.forms):,} of {NUM_FORMS:,} forms are described"
            )
        if self._strangers:
            remarks.append(f"{len(self._strangers):,} images of forms that are not described")
        return "; ".join(remarks)

    def _forms(self) -> Iterator[Scan]:
        descriptions, splits = self._descriptions, self._splits
        for part in self._parts:
            if _is_named(part, _NO_FORMS) or not self._lacking():
                continue
            here: dict[str, str] = {}
            before = frozenset(self.seen)

            def wanted(name: PurePosixPath, before: frozenset[str] = before) -> bool:
                if name.suffix.lower() not in SUFFIXES or not FORM_ID.fullmatch(name.stem):
                    return False
                if name.stem not in descriptions.forms:
                    self._strangers.add(name.stem)
                return name.stem in splits.forms and name.stem not in before

            for member in part.members(wanted):
                form = descriptions.forms[member.name.stem]
                if form.id in here:
                    raise UserError(
                        f"{member.where} is an image of form {form.id}, and {here[form.id]} is too. "
                        "Leave one."
                    )
                here[form.id] = member.where
                self.seen.add(form.id)
                yield Scan(member.data, member.where, form, splits.forms[form.id], self._cut(form))

    def _lines(self) -> Iterator[Scan]:
        lacking = self._lacking()
        lines = {
            line.id: (self._descriptions.forms[identity], line)
            for identity in lacking
            for line in self._cut(self._descriptions.forms[identity])
        }
        for part in self._parts:
            if _is_named(part, _NO_LINES):
                continue

            def wanted(name: PurePosixPath) -> bool:
                return name.suffix.lower() in SUFFIXES and name.stem in lines

            for member in part.members(wanted):
                form, line = lines.pop(member.name.stem)
                self.seen.add(form.id)
                split = self._splits.forms[form.id]
                yield Scan(member.data, member.where, form, split, (line,), of_line=True)
        self._lines_lacking = sum(form.id in self.seen for form, _ in lines.values())

    def _lacking(self) -> set[str]:
        return self._splits.forms.keys() - self.seen

    def _cut(self, form: Form) -> tuple[Line, ...]:
        """Return the lines that are wanted as lines."""
        corpus, listed = self._corpus, self._splits.lines
        as_lines = corpus.unit == "lines" or (
            corpus.lines_beside is not None and self._splits.forms[form.id] == "train"
        )
        if not as_lines:
            return ()
        return tuple(line for line in form.lines if listed is None or line.id in listed)


def _is_named(part: Source, beginnings: tuple[str, ...]) -> bool:
    """Return whether it is an archive with one of the official names."""
    return part.path.is_file() and part.path.name.lower().startswith(beginnings)


def _split_of(path: Path, folder: Path) -> str:
    """Return the split that the name of a Parquet file, or of a folder above it, gives.

    Raises:
        UserError: none.
    """
    for part in reversed(path.relative_to(folder).parts):
        word = re.split(r"[-_.]", part.lower())[0]
        if word in _SPLIT_NAMES:
            return _SPLIT_NAMES[word]
    raise UserError(
        f"{path}: the name says no split. Let it begin with train, validation or test, as in "
        "train-00000-of-00001.parquet."
    )


def _read_record(corpus: IamCorpus, dealt: tuple[str, parquet.Record]) -> PackedParagraph:
    split, record = dealt
    grey = read_grey(record.image, where=record.where)
    # the hub's copies of IAM lines are 128 px tall or of full size; none is of half size
    return _pack(
        grey,
        1.0,
        record.text,
        (corpus.height, corpus.width),
        split=split,
        source=record.id,
        writer="",
    )


def _cut_out(corpus: IamCorpus, scan: Scan) -> tuple[str, list[PackedParagraph]]:
    """Return the form's id, and its paragraph and the lines that are wanted."""
    grey = read_grey(scan.data, where=scan.where)
    form = scan.form
    canvas = (corpus.height, corpus.width)
    line_canvas = canvas if corpus.unit == "lines" else corpus.lines_beside or canvas
    if scan.of_line:
        (line,) = scan.lines
        scale = _nearest_scale(grey.shape[1] / (line.box.right - line.box.left))
        pieces = [(grey, line.text, line.id, line_canvas)]
    else:
        scale = _scale(form, grey, where=scan.where)
        pieces = []
        if corpus.unit == "paragraphs":
            pieces.append((_crop(grey, form.box, scale), form.text, form.id, canvas))
        pieces += [
            (_crop_line(grey, line, scale), line.text, line.id, line_canvas) for line in scan.lines
        ]
    return form.id, [
        _pack(piece, scale, text, room, split=scan.split, source=source, writer=form.writer)
        for piece, text, source, room in pieces
    ]


def _pack(
    grey: np.ndarray,
    scale: float,
    text: str,
    canvas: tuple[int, int],
    *,
    split: str,
    source: str,
    writer: str,
) -> PackedParagraph:
    """Return a piece of a scan of that scale as ink, scaled to fit its canvas."""
    most = [math.ceil(length * GREATEST_SCALE / scale) for length in grey.shape]
    height, width = map(min, canvas, most)
    image = ink(fit(grey, height=height, width=width))
    return pack(Paragraph(image, text, split, source, writer), canvas=canvas)


def _scale(form: Form, grey: np.ndarray, *, where: str) -> float:
    """Return pixels of the image to those that the form's boxes count in.

    From the size that the description gives. Without one (the tables): 1 or 1/2, whichever makes the
    image nearer to a form of IAM's size, or, for forms of another size, lets the boxes lie inside it.

    Raises:
        UserError: the image has another shape than the form, or the boxes lie outside of it.
    """
    if form.size is not None:
        scale = grey.shape[0] / form.size[0]
        if abs(form.size[1] * scale - grey.shape[1]) > max(2.0, 0.01 * grey.shape[1]):
            raise UserError(
                f"{where} has {grey.shape[1]}x{grey.shape[0]} px, another shape than form {form.id} of "
                f"{form.size[1]}x{form.size[0]}. Fetch it again, or take it out."
            )
    else:
        expected = [scale for scale in SCALES if abs(grey.shape[0] / FULL_SIZE[0] - scale) < 0.05]
        inside = [
            scale
            for scale in SCALES
            if form.box.bottom * scale <= grey.shape[0] and form.box.right * scale <= grey.shape[1]
        ]
        scale = (expected or inside or [SCALES[0]])[0]
    if form.box.bottom * scale > grey.shape[0] + 2 or form.box.right * scale > grey.shape[1] + 2:
        raise UserError(
            f"{where} is too small for the lines of form {form.id}, which end at "
            f"{form.box.right},{form.box.bottom}. Fetch it again, or take it out."
        )
    return scale


def _nearest_scale(ratio: float) -> float:
    return min(SCALES, key=lambda scale: abs(math.log(scale / ratio)))


def _crop(grey: np.ndarray, box: Box, scale: float) -> np.ndarray:
    """Return the box, padded, of a scan of that scale."""
    left, top = (max(0, round((edge - PADDING_PX) * scale)) for edge in box[:2])
    right, bottom = (round((edge + PADDING_PX) * scale) for edge in box[2:])
    return grey[top:bottom, left:right]


def _crop_line(grey: np.ndarray, line: Line, scale: float) -> np.ndarray:
    """Return the line's box, padded, with paper where its components are not."""
    crop = _crop(grey, line.box, scale)
    left, top = (max(0, round((edge - PADDING_PX) * scale)) for edge in line.box[:2])
    own = np.zeros(crop.shape, bool)
    for box in line.components:
        x0, y0 = (round((edge - _AROUND_PX) * scale) for edge in box[:2])
        x1, y1 = (round((edge + _AROUND_PX) * scale) for edge in box[2:])
        own[max(0, y0 - top) : max(0, y1 - top), max(0, x0 - left) : max(0, x1 - left)] = True
    paper = int(np.median(crop))
    return np.where(own, crop, np.uint8(paper))
