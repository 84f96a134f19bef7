"""Paragraphs in one HDF5 file: compressed images of fixed canvas sizes beside their transcriptions.

    /images/<H>x<W>   uint8 (n, H, W), chunks (1, H, W), gzip: 0 is paper, 255 is ink
    /canvas, /place   for each row: index into the attribute `canvases`, and place in that dataset
    /size             for each row: true height and width in pixels, from the top left
    /text, /split, /source, /writer
    /num_letters      for each row, if any paragraph says where its letters are: how many do; 0 is unknown
    /letters          int16 (all of them, 2): x and y in pixels of each row's letters, row after row
    attributes        format, version, fingerprint, canvases

A file is written aside and renamed when whole, and never changes afterwards.
"""

import hashlib
import io
import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import h5py
import numpy as np

from paragraph_ocr.data.paragraph import SPLITS, Paragraph
from paragraph_ocr.errors import UserError

FORMAT = "paragraph_ocr store"
VERSION = 1

_NUMBERS: dict[str, tuple[int, ...]] = {"canvas": (), "place": (), "size": (2,)}
_WORDS = ("text", "split", "source", "writer")
_NO_LETTERS = np.zeros((0, 2), np.int16)

MAX_ROWS = 10_000_000
MAX_CANVAS_PX = 65_535
"""Of each side; a canvas has no more than `MAX_PIXELS`."""
MAX_PIXELS = 150_000_000
_SLICE_BYTES = 2**26  # of text read at a time, if every row were as long as the file allows

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
    letters: np.ndarray = field(default_factory=_NO_LETTERS.copy)
    """As in `Paragraph`; empty where nobody knows."""


def pack(paragraph: Paragraph, *, canvas: tuple[int, int] | None = None) -> PackedParagraph:
    """Return the paragraph with its image on a canvas (height, width), compressed.

    The image lies at the top left, the rest is paper. None: the canvas is the image.

    Raises:
        ValueError: not a uint8 image of two axes, larger than the canvas, an unknown split, or letters
            that are not those of the text.
    """
    image = paragraph.image
    if image.dtype != np.uint8 or image.ndim != 2:
        raise ValueError(f"an image is uint8 (H, W), not {image.dtype} {image.shape}")
    if paragraph.split not in SPLITS:
        raise ValueError(f"split {paragraph.split!r} is none of {SPLITS}")
    letters = _NO_LETTERS if paragraph.letters is None else paragraph.letters.astype(np.int16)
    if paragraph.letters is not None and letters.shape != (num_letters(paragraph.text), 2):
        raise ValueError(f"{paragraph.text!r} does not have letters at {letters.shape} places")
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
        letters=letters,
    )


def num_letters(text: str) -> int:
    """Return how many characters of a text are no white space."""
    return len("".join(text.split()))


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
        self._letters: list[np.ndarray] = []

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
        self._letters.append(packed.letters)

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
        counts = np.array([*map(len, self._letters)], np.int32)
        if counts.any():
            together = np.concatenate(self._letters)
            self._file.create_dataset("num_letters", data=counts, track_times=False)
            self._file.create_dataset("letters", data=together, track_times=False)
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
            try:
                self._read_columns(file)
            except (KeyError, ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
                raise self._broken(error) from error
        self._images: list[h5py.Dataset] = []
        self._owner: int | None = None  # the process that opened the file

    def _read_columns(self, file: h5py.File) -> None:
        """Read everything but the images, each size checked before memory is taken for it.

        Raises:
            ValueError: a type, shape or number that no store has.
        """
        self.fingerprint = str(file.attrs["fingerprint"])
        canvases = np.asarray(file.attrs["canvases"])
        if canvases.ndim != 2 or canvases.shape[1] != 2 or canvases.dtype.kind not in "iu":
            raise ValueError(f"canvases are {canvases.dtype} {canvases.shape}")
        self.canvases = [(int(h), int(w)) for h, w in canvases]
        for height, width in self.canvases:
            if not 0 < max(height, width) <= MAX_CANVAS_PX or not 0 < height * width <= MAX_PIXELS:
                raise ValueError(f"a canvas is {height}x{width} px")
        length = len(_column(file, "canvas"))
        if length > MAX_ROWS:
            raise ValueError(f"it claims {length:,} rows, and {MAX_ROWS:,} are the most")
        self._canvas_of, self._places, self.sizes = (
            _numbers(_column(file, name), name, (length, *width))
            for name, width in _NUMBERS.items()
        )
        """True height and width of each row in pixels."""
        pages = sum(_images(file, canvas).id.get_storage_size() for canvas in self.canvases)
        beside = file.id.get_filesize() - pages  # as long as a text can be
        if beside < 0:
            raise ValueError("its images claim more than the file")
        self.texts, self.splits, self.sources, self.writers = (
            _words(_column(file, name), name, length, longest=beside) for name in _WORDS
        )
        if length and not 0 <= self._canvas_of.min() <= self._canvas_of.max() < len(self.canvases):
            raise ValueError("a row names a canvas that is not there")
        if length and (self._places.min() < 0 or self.sizes.min() < 1):
            raise ValueError("a row has no place or no size")
        if length and (self.sizes > np.array(self.canvases)[self._canvas_of]).any():
            raise ValueError("a page is larger than its canvas")
        if unknown := {*self.splits} - {*SPLITS}:
            raise ValueError(f"a row is of split {sorted(unknown)[0][:20]!r}")
        self._letters, self._ends = _letters(file, self.texts)

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

    def letters(self, row: int) -> np.ndarray | None:
        """Return where the row's letters are, as `Paragraph.letters`: empty if nobody knows, None if nobody
        does of any row."""
        if self._letters is None:
            return None
        return self._letters[self._ends[row] : self._ends[row + 1]]

    def image(self, row: int) -> np.ndarray:
        """Return the row's whole canvas, uint8 (H, W): 0 is paper, 255 is ink.

        Raises:
            UserError: the file went bad since it was opened.
        """
        if self._owner != os.getpid():
            # a handle carried over a fork shares its state with the parent: forget it
            file = self._open()
            self._images = [_images(file, canvas) for canvas in self.canvases]
            self._owner = os.getpid()
        canvas = self.canvases[self._canvas_of[row]]
        try:
            return _unpack(self._images[self._canvas_of[row]], int(self._places[row]), canvas)
        except (OSError, ValueError, RuntimeError, KeyError, zlib.error) as error:
            raise self._broken(error) from error

    def close(self) -> None:
        """Close this process's handle, if it has one; the next image opens it again."""
        if self._owner == os.getpid() and self._images:
            self._images[0].file.close()
        self._images, self._owner = [], None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_images": [], "_owner": None}

    def _open(self) -> h5py.File:
        remedy = _REMEDY
        if not self.path.is_file():
            raise UserError(f"{self.path.parent} has no {self.path.name}. {remedy}")
        try:
            # never changed once it has its name, so no lock, which some network file systems lack
            file = h5py.File(self.path, "r", locking=False)
        except OSError as error:
            raise UserError(f"{self.path} is not a whole HDF5 file. {remedy}") from error
        try:
            kind, version = file.attrs.get("format"), file.attrs.get("version")
        except (OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
            file.close()
            raise self._broken(error) from error
        if not isinstance(kind, str) or kind != FORMAT:
            file.close()
            raise UserError(f"{self.path} is HDF5, but not a {FORMAT}. {remedy}")
        if np.ndim(version) or version != VERSION:
            file.close()
            found = str(version)[:20]
            raise UserError(f"{self.path} has version {found}; this code reads {VERSION}. {remedy}")
        return file

    def _broken(self, error: Exception) -> UserError:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        return UserError(f"{self.path} is no whole store: {said}. {_REMEDY}")


_REMEDY = "Delete it to have it prepared again, or pass another outputs=<folder>."


def _numbers(column: h5py.Dataset, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if column.dtype.kind not in "iu" or column.shape != shape:
        raise ValueError(f"{name} is {column.dtype} {column.shape}, and not integers {shape}")
    return column[:]


def _words(column: h5py.Dataset, name: str, length: int, *, longest: int) -> list[str]:
    """Return a column of text; a few rows at a time, because many may name one text in the file."""
    if h5py.check_string_dtype(column.dtype) is None or column.shape != (length,):
        raise ValueError(f"{name} is {column.dtype} {column.shape}, and not text ({length},)")
    words: list[str] = []
    spent, step = 0, max(16, min(4096, _SLICE_BYTES // max(1, longest)))
    for start in range(0, length, step):
        rows = column.asstr()[start : start + step].tolist()
        spent += sum(map(len, rows))
        if spent > longest:
            raise ValueError(f"{name} holds more characters than the file")
        words += rows
    return words


def _letters(file: h5py.File, texts: Sequence[str]) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the places of all letters, and where among them those of each row begin and end."""
    if "num_letters" not in file:
        return None, np.zeros(0, int)
    counts = _numbers(_column(file, "num_letters"), "num_letters", (len(texts),))
    wanted = np.array([*map(num_letters, texts)], int)
    if ((counts != wanted) & (counts != 0)).any():
        raise ValueError("a row has letters that are not those of its text")
    ends = np.concatenate([[0], np.cumsum(counts, dtype=int)])
    return _numbers(_column(file, "letters"), "letters", (int(ends[-1]), 2)), ends


def _images(file: h5py.File, canvas: tuple[int, int]) -> h5py.Dataset:
    """Return the images of a canvas, each a chunk of its own, packed by nothing but gzip."""
    images = _column(file, f"images/{canvas[0]}x{canvas[1]}")
    plain = images.chunks == (1, *canvas) and images.dtype == np.uint8
    filters = images.id.get_create_plist()
    if not plain or images.shape[1:] != canvas or [*_filters(filters)] != [h5py.h5z.FILTER_DEFLATE]:
        raise UserError(f"{file.filename}: the images of {canvas} are no pages. Delete the file.")
    return images


def _filters(plist: h5py.h5p.PropDCID) -> Iterator[int]:
    for index in range(plist.get_nfilters()):
        yield plist.get_filter(index)[0]


def _unpack(images: h5py.Dataset, place: int, canvas: tuple[int, int]) -> np.ndarray:
    """Return an image; by our own hand, for HDF5 unpacks a chunk to whatever it swells to."""
    size = canvas[0] * canvas[1]
    packed = bytearray(size + size // 1000 + 64)  # zlib's own bound for what does not shrink
    unfiltered, chunk = images.id.read_direct_chunk((place, 0, 0), out=packed)
    if unfiltered:
        raise ValueError(f"page {place} of {canvas} is not packed")
    stream = zlib.decompressobj()
    page = stream.decompress(chunk, size + 1)
    if len(page) != size or stream.unconsumed_tail:
        raise ValueError(f"page {place} of {canvas} unpacks to another size")
    return np.frombuffer(page, np.uint8).reshape(canvas).copy()


def _column(file: h5py.File, name: str) -> h5py.Dataset:
    """Return a dataset that lies in this very file: a store never leads to another file."""
    group: h5py.Group = file
    for part in name.split("/"):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise UserError(
                f"{file.filename}: {name} is missing or leads elsewhere. Delete the file."
            )
        group = group[part]
        if part != name.rpartition("/")[2] and not isinstance(group, h5py.Group):
            raise UserError(f"{file.filename}: {name} is missing. Delete the file.")
    if not isinstance(group, h5py.Dataset) or group.external or group.is_virtual:
        raise UserError(f"{file.filename}: {name} leads to another file. Delete the file.")
    return group
