"""Paragraphs in one HDF5 file: compressed images of fixed canvas sizes beside their transcriptions.

    /images/<H>x<W>   uint8 (n, H, W), chunks (1, H, W), gzip: 0 is paper, 255 is ink
    /canvas, /place   for each row: index into the attribute `canvases`, and place in that dataset
    /size             for each row: true height and width in pixels, from the top left
    /text, /split, /source, /writer
    attributes        format, version, fingerprint, canvases

A file is written aside and renamed when whole, and never changes afterwards.
"""

import hashlib
import io
import json
import os
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import h5py
import numpy as np

from paragraph_ocr.data.paragraph import SPLITS, Paragraph
from paragraph_ocr.errors import Stopped, UserError

FORMAT = "paragraph_ocr store"
VERSION = 1

_NUMBERS: dict[str, tuple[int, ...]] = {"canvas": (), "place": (), "size": (2,)}
_WORDS = ("text", "split", "source", "writer")

_GZIP_LEVEL = 1  # level 4 saves 8% of the bytes and writes at half the speed
_ABANDONED_S = 86_400  # since the last write; then its writer is dead
_GROWTH = 256  # rows by which a dataset of images is extended at a time


@dataclass(frozen=True, slots=True)
class PackedParagraph:
    """A paragraph whose image is compressed already, so that many processes can share that work."""

    chunk: bytes
    canvas: tuple[int, int]
    size: tuple[int, int]
    text: str
    split: str
    source: str
    writer: str


def pack(paragraph: Paragraph, *, canvas: tuple[int, int] | None = None) -> PackedParagraph:
    """Return the paragraph with its image on a canvas (height, width), compressed.

    The image lies at the top left, the rest is paper. None: the canvas is the image.

    Raises:
        ValueError: not a uint8 image of two axes, larger than the canvas, or an unknown split.
    """
    image = paragraph.image
    if image.dtype != np.uint8 or image.ndim != 2:
        raise ValueError(f"an image is uint8 (H, W), not {image.dtype} {image.shape}")
    if paragraph.split not in SPLITS:
        raise ValueError(f"split {paragraph.split!r} is none of {SPLITS}")
    height, width = image.shape
    canvas = canvas or (height, width)
    if height > canvas[0] or width > canvas[1]:
        raise ValueError(
            f"an image of {height}x{width} exceeds its canvas of {canvas[0]}x{canvas[1]}"
        )
    if canvas != (height, width):
        image = np.pad(image, ((0, canvas[0] - height), (0, canvas[1] - width)))
    return PackedParagraph(
        chunk=zlib.compress(image.tobytes(), _GZIP_LEVEL),
        canvas=canvas,
        size=(height, width),
        text=paragraph.text,
        split=paragraph.split,
        source=paragraph.source,
        writer=paragraph.writer,
    )


class StoreWriter:
    """Writes a store under a temporary name; leaving the `with` block in peace makes it appear.

    An exception inside the block leaves nothing behind. A killed process leaves a hidden file
    `.<name>.<random>.tmp`, which nothing takes for a store, and which a writer removes a day later.
    If two writers finish the same path, the later wins.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """

    def __init__(self, path: Path, *, fingerprint: str) -> None:
        self._path = path
        self._aside = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        self._fingerprint = fingerprint
        self._places: dict[tuple[int, int], int] = {}  # rows so far on each canvas
        self._columns: dict[str, list] = {name: [] for name in (*_NUMBERS, *_WORDS)}

    def __enter__(self) -> "StoreWriter":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for left in self._path.parent.glob(f".{self._path.name}.*.tmp"):
            with suppress(FileNotFoundError):  # its writer is done
                if time.time() - left.stat().st_mtime > _ABANDONED_S:
                    left.unlink()
        try:
            self._disk = _Disk(self._aside)
        except OSError as error:
            raise self._refusal(error) from error
        self._file = h5py.File(self._disk, "w", libver="v110", track_times=False)
        return self

    def add(self, packed: PackedParagraph) -> None:
        place = self._places.setdefault(packed.canvas, 0)
        images = self._images(packed.canvas)
        if place == len(images):
            images.resize(place + _GROWTH, axis=0)
        images.id.write_direct_chunk((place, 0, 0), packed.chunk)
        if self._disk.error is not None:
            raise self._refusal(self._disk.error)
        self._places[packed.canvas] = place + 1
        self._columns["canvas"].append(list(self._places).index(packed.canvas))
        self._columns["place"].append(place)
        for name in ("size", *_WORDS):
            self._columns[name].append(getattr(packed, name))

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._write_columns()
            self._file.close()
            self._disk.close()
            if kind is None and self._disk.error is not None:
                raise self._refusal(self._disk.error)
            if kind is None:
                self._aside.replace(self._path)
        finally:
            self._disk.close()
            self._aside.unlink(missing_ok=True)

    def _refusal(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path.parent} cannot take {self._path.name}: {error.strerror}. Make room there, or "
            "pass another outputs=<folder>."
        )

    def _images(self, canvas: tuple[int, int]) -> h5py.Dataset:
        name = f"images/{canvas[0]}x{canvas[1]}"
        if name in self._file:
            return self._file[name]
        return self._file.create_dataset(
            name,
            shape=(0, *canvas),
            maxshape=(None, *canvas),
            chunks=(1, *canvas),
            dtype=np.uint8,
            compression="gzip",
            compression_opts=_GZIP_LEVEL,
            track_times=False,
        )

    def _write_columns(self) -> None:
        for canvas, count in self._places.items():
            self._images(canvas).resize(count, axis=0)
        for name, width in _NUMBERS.items():
            values = np.array(self._columns[name], np.int32).reshape(-1, *width)
            self._file.create_dataset(name, data=values, track_times=False)
        for name in _WORDS:
            self._file.create_dataset(
                name, data=self._columns[name], dtype=h5py.string_dtype(), track_times=False
            )
        self._file.attrs.update(
            format=FORMAT,
            version=VERSION,
            fingerprint=self._fingerprint,
            canvases=np.array(list(self._places), np.int32).reshape(-1, 2),
        )


class _Disk(io.RawIOBase):
    """A new file that HDF5 writes through.

    HDF5 does not live through a full disk: it crashes the process at its end. So it is never told; the
    error is kept for who asks, and what is written after it is lost.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("x+b", buffering=0)
        self.error: OSError | None = None

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        try:
            done = 0
            while done < len(view) and self.error is None:
                done += self._file.write(view[done:]) or 0
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            self._file.truncate(size)
        except OSError as error:
            self.error = self.error or error
        return size or 0

    def readinto(self, buffer) -> int:
        return self._file.readinto(buffer) or 0

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        """Close the file once its bytes are on the disk, where a network's error shows."""
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            self.error = self.error or error


class Store:
    """A store for reading: the columns in memory, the images on disk.

    The file is opened once a process, at the first image that it reads, so that a Store can be
    pickled to a spawned worker or carried over a fork.

    Raises:
        UserError: no such file, not a whole store, or one of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            self.fingerprint = str(file.attrs["fingerprint"])
            self.canvases = [(int(h), int(w)) for h, w in file.attrs["canvases"]]
            self._canvas_of = _column(file, "canvas")[:]
            self._places = _column(file, "place")[:]
            self.sizes = _column(file, "size")[:]
            """True height and width of each row in pixels."""
            self.texts, self.splits, self.sources, self.writers = (
                _column(file, name).asstr()[:].tolist() for name in _WORDS
            )
        self._images: list[h5py.Dataset] = []
        self._owner: int | None = None  # the process that opened the file

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"Store({self.path.name}: {len(self)} paragraphs on {self.canvases})"

    def rows(self, split: str) -> list[int]:
        """Return the rows of a split, in the order of the store."""
        return [row for row, found in enumerate(self.splits) if found == split]

    def digest(self) -> str:
        """Return a hash of its columns: equal for the same paragraphs in the same order."""
        columns = (self.texts, self.splits, self.sources, self.canvases, self.sizes.tolist())
        return hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:32]

    def canvas(self, row: int) -> tuple[int, int]:
        """Return height and width in pixels of the row's image as stored, padding included."""
        return self.canvases[self._canvas_of[row]]

    def image(self, row: int) -> np.ndarray:
        """Return the row's whole canvas, uint8 (H, W): 0 is paper, 255 is ink.

        Raises:
            Stopped: the file went away or bad since it was opened.
        """
        if self._owner != os.getpid():
            # a handle carried over a fork shares its state with the parent: forget it
            file = self._open()
            self._images = [_column(file, f"images/{h}x{w}") for h, w in self.canvases]
            self._owner = os.getpid()
        try:
            return self._images[self._canvas_of[row]][self._places[row]]
        except OSError as error:
            raise Stopped(
                f"{self.path} cannot be read any more ({error}). Bring the file back, or delete it to "
                "have it prepared again."
            ) from error

    def close(self) -> None:
        """Close this process's handle, if it has one; the next image opens it again."""
        if self._owner == os.getpid() and self._images:
            self._images[0].file.close()
        self._images, self._owner = [], None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_images": [], "_owner": None}

    def _open(self) -> h5py.File:
        remedy = "Delete it to have it prepared again, or pass another outputs=<folder>."
        if not self.path.is_file():
            raise UserError(f"{self.path.parent} has no {self.path.name}. {remedy}")
        try:
            # never changed once it has its name, so no lock, which some network file systems lack
            file = h5py.File(self.path, "r", locking=False)
        except OSError as error:
            raise UserError(f"{self.path} is not a whole HDF5 file. {remedy}") from error
        if file.attrs.get("format") != FORMAT:
            file.close()
            raise UserError(f"{self.path} is HDF5, but not a {FORMAT}. {remedy}")
        if file.attrs["version"] != VERSION:
            found = file.attrs["version"]
            file.close()
            raise UserError(f"{self.path} has version {found}; this code reads {VERSION}. {remedy}")
        return file


def _column(file: h5py.File, name: str) -> h5py.Dataset:
    """Return a dataset that lies in this very file: a store never leads to another file."""
    group: h5py.Group = file
    for part in name.split("/"):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise UserError(
                f"{file.filename}: {name} is missing or leads elsewhere. Delete the file."
            )
        group = group[part]
    if not isinstance(group, h5py.Dataset) or group.external or group.is_virtual:
        raise UserError(f"{file.filename}: {name} leads to another file. Delete the file.")
    return group
