"""EMNIST (Cohen et al. 2017): its files as NIST gives them, single characters, and lines joined of them."""

import gzip
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from paragraph_ocr import console
from paragraph_ocr.data import text
from paragraph_ocr.data.archive import files_of
from paragraph_ocr.data.corpus import Progress, digest, is_prepared, store_path, write_store
from paragraph_ocr.data.paragraph import Paragraph
from paragraph_ocr.data.text import Passages
from paragraph_ocr.errors import UserError

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""The classes of the split "byclass" in the order of their labels (its mapping.txt)."""

SIZE_PX = 28
"""Height and width of a character."""

MAX_IMAGES = 1_000_000
"""The larger half of byclass holds 697,932; a file that claims more than this is not EMNIST."""

VAL_SHARE = 0.1
"""Of EMNIST's training images, kept from training: EMNIST itself has no validation split."""

_MAT_BYTES = MAX_IMAGES * SIZE_PX**2
_CHUNK = 1 << 20
_VERSION = 1  # raise it whenever the same files and fields give other paragraphs
_SEED = (
    20170217  # deals validation images, whatever the run's seed: a store's test is never trained on
)


@dataclass(frozen=True, slots=True)
class Half:
    """EMNIST's training or test images."""

    images: np.ndarray
    """uint8 (n, 28, 28), upright: 0 is paper, 255 is ink."""
    labels: np.ndarray
    """uint8 (n,): index into CHARACTERS."""


class _File(NamedTuple):
    """A file, or a member of a zip archive."""

    path: Path
    member: str | None

    def __str__(self) -> str:
        return f"{self.path} ({self.member})" if self.member else str(self.path)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        if self.member is None:
            with self.path.open("rb") as stream:
                yield stream
        else:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
                yield stream  # type: ignore[misc]


_GZIPS = tuple(
    f"emnist-byclass-{half}-{kind}-ubyte.gz"
    for half in ("train", "test")
    for kind in ("images-idx3", "labels-idx1")
)
_MAT = "emnist-byclass.mat"


def find_emnist(root: Path) -> list[_File]:
    """Return the four gzip files, or the MATLAB file, somewhere below a folder or in a zip there.

    Raises:
        UserError: neither is there, or only some of the four.
    """
    gzips = [_locate(root, name, archive="gzip.zip") for name in _GZIPS]
    if all(gzips):
        return [file for file in gzips if file]
    matlab = _locate(root, _MAT, archive="matlab.zip")
    if matlab:
        return [matlab]
    missing = [name for name, file in zip(_GZIPS, gzips, strict=True) if not file]
    raise UserError(
        f"datamodule.root={root} lacks {', '.join(missing)} (and {_MAT}). "
        "Put EMNIST's gzip.zip or matlab.zip there, as it is or unpacked."
    )


def read_emnist(root: Path) -> dict[str, Half]:
    """Return EMNIST's halves "train" and "test".

    Both formats hold each image column by column; here it stands upright.

    Raises:
        UserError: a file is missing, broken, cut short, not what its name says, or beyond MAX_IMAGES.
    """
    files = find_emnist(root)
    halves = _read_matlab(files[0]) if len(files) == 1 else _read_gzips(files)
    for name, half in halves.items():
        if len(half.images) != len(half.labels):
            raise UserError(
                f"datamodule.root={root}: {name} has {len(half.images)} images and "
                f"{len(half.labels)} labels. Fetch the files again."
            )
        if len(half.labels) and half.labels.max() >= len(CHARACTERS):
            raise UserError(
                f"datamodule.root={root}: label {half.labels.max()} is none of byclass, which has "
                f"{len(CHARACTERS)} classes. Fetch the files again."
            )
    return halves


@dataclass(frozen=True, kw_only=True)
class EmnistCorpus:
    """Single characters: paragraphs of one character, spread over the classes as evenly as they go.

    Training and validation come of EMNIST's training images (no image serves both), test of its test
    images. Numbers are limits: fewer images give fewer paragraphs. Characters that the vocabulary
    cannot write are left out.

    Raises:
        UserError: in `prepare`, see `read_emnist`; or no character is left.
    """

    name: str
    root: Path
    height: int
    width: int
    num_train: int
    num_val: int
    num_test: int
    characters: str
    """The vocabulary's."""
    seed: int

    def __post_init__(self) -> None:
        self._check_canvas(self.width, "one character")

    def fingerprint(self) -> str:
        """Return what changes with any field and with the files (by size and time)."""
        files = [
            (file.path.name, file.member, stat.st_size, stat.st_mtime_ns)
            for file in find_emnist(self.root)
            for stat in [file.path.stat()]
        ]
        fields = {**asdict(self), "root": None}
        return digest({"emnist": _VERSION, "files": files, **fields, **self._texts()})

    def prepare(self, root: Path, *, num_workers: int, progress: Progress | None = None) -> Path:
        if is_prepared(self, root):
            return store_path(self, root)
        return write_store(self, root, self._paragraphs(), total=self._total, progress=progress)

    @property
    def _total(self) -> int:
        return self.num_train + self.num_val + self.num_test

    def _texts(self) -> dict[str, str | int]:
        """Return what else decides the content."""
        return {}

    def _check_canvas(self, width: int, what: str) -> None:
        if self.height < SIZE_PX or width < SIZE_PX or width > self.width:
            raise UserError(
                f"datamodule.height={self.height} and width={self.width} are too small for {what} of "
                f"{SIZE_PX} px. Pass datamodule.height={max(32, self.height)} "
                f"datamodule.width={-(-width // 32) * 32}."
            )

    def _pools(self) -> dict[str, "Pool"]:
        halves = read_emnist(self.root)
        pools = {
            "train": Pool(halves["train"], self.characters, part="train"),
            "val": Pool(halves["train"], self.characters, part="val"),
            "test": Pool(halves["test"], self.characters, part="test"),
        }
        for split, pool in pools.items():
            if not any(map(len, pool.places.values())):
                raise UserError(
                    f"datamodule.root={self.root} gives {split} no character of the vocabulary. "
                    "Pass vocabulary=iam."
                )
        return pools

    def _paragraphs(self) -> Iterator[Paragraph]:
        for index, (split, pool) in enumerate(self._pools().items()):
            generator = np.random.default_rng([self.seed, index])
            asked = getattr(self, f"num_{split}")
            drawn = list(pool.spread(asked, generator))
            if len(drawn) < asked:
                console.warn(f"EMNIST has {len(drawn)} characters for {split}: all are taken.")
            for character, place in drawn:
                line = join([pool.half.images[place]], 0.0, height=self.height, width=self.width)
                yield Paragraph(line, character, split, source=f"{pool.name} {place}", writer="")


@dataclass(frozen=True, kw_only=True)
class EmnistLinesCorpus(EmnistCorpus):
    """Lines of running text, each character an EMNIST image of its own.

    Punctuation, which EMNIST lacks, is left out of the text; a space is an empty place. No document
    and no image serves two splits. `overlap` is a share of a character's 28 px, drawn for each line.
    """

    texts: Path | None
    min_characters: int
    max_characters: int
    min_overlap: float
    max_overlap: float

    def __post_init__(self) -> None:
        self._check_canvas(SIZE_PX * self.max_characters, f"{self.max_characters} characters")

    def _texts(self) -> dict[str, str | int]:
        return {"texts": text.text_identity(self.texts), "text": text.TEXT_VERSION}

    def _paragraphs(self) -> Iterator[Paragraph]:
        pools = self._pools()
        spelt = [
            c for c in CHARACTERS if all(len(pool.places.get(c, ())) for pool in pools.values())
        ]
        passages = Passages(self.texts, characters="".join([*spelt, " "]), random_share=0.0)
        for index, (split, pool) in enumerate(pools.items()):
            generator = np.random.default_rng([self.seed, index])
            for number in range(getattr(self, f"num_{split}")):
                written = self._draw(passages, generator, split)
                images = [
                    _SPACE if c == " " else pool.half.images[generator.choice(pool.places[c])]
                    for c in written
                ]
                overlap = generator.uniform(self.min_overlap, self.max_overlap)
                line = join(images, overlap, height=self.height, width=self.width)
                yield Paragraph(
                    line, written, split, source=f"{pool.name} line {number}", writer=""
                )

    def _draw(self, passages: Passages, generator: np.random.Generator, split: str) -> str:
        length = int(generator.integers(self.min_characters, self.max_characters + 1))
        return " ".join(
            passages.draw(
                generator,
                split,
                length=length,
                minimum=self.min_characters,
                maximum=self.max_characters,
            )
        )


class Pool:
    """The images that a split may use, by character: places in its half.

    `part` is "train" or "val", which share EMNIST's training images, or "test", which takes all.
    """

    def __init__(self, half: Half, characters: str, *, part: str) -> None:
        self.half, self.name = half, "emnist test" if part == "test" else "emnist train"
        generator = np.random.default_rng(_SEED)
        self.places: dict[str, np.ndarray] = {}
        for label, character in enumerate(CHARACTERS):
            places = generator.permutation(np.flatnonzero(half.labels == label))
            num_val = max(1, round(VAL_SHARE * len(places))) if len(places) > 1 else 0
            parts = {"train": places[num_val:], "val": places[:num_val], "test": places}
            if character in characters:
                self.places[character] = parts[part]

    def spread(self, count: int, generator: np.random.Generator) -> Iterator[tuple[str, int]]:
        """Yield up to `count` (character, place), each place once, in random order."""
        drawn: list[tuple[str, int]] = []
        waiting = {c: list(generator.permutation(places)) for c, places in self.places.items()}
        while waiting and len(drawn) < count:
            for character in generator.permutation(sorted(waiting)).tolist():
                if not waiting[character]:
                    del waiting[character]
                elif len(drawn) < count:
                    drawn.append((character, int(waiting[character].pop())))
        yield from (drawn[index] for index in generator.permutation(len(drawn)))


_SPACE = np.zeros((SIZE_PX, SIZE_PX), np.uint8)


def join(
    characters: Sequence[np.ndarray], overlap: float, *, height: int, width: int
) -> np.ndarray:
    """Return characters (uint8 (28, 28)) side by side on a canvas; where two overlap, the darker shows.

    The first stands at the left edge, a single one in the middle; all in the middle of the height.
    """
    pitch = SIZE_PX - int(overlap * SIZE_PX)
    line = np.zeros((height, width), np.uint8)
    top = (height - SIZE_PX) // 2
    left = (width - SIZE_PX) // 2 if len(characters) == 1 else 0
    for index, image in enumerate(characters):
        start = left + index * pitch
        part = line[top : top + SIZE_PX, start : start + SIZE_PX]
        np.maximum(part, image, out=part)
    return line


def _locate(root: Path, name: str, *, archive: str) -> _File | None:
    files = files_of(root)
    for path in files:
        if path.name == name:
            return _File(path, None)
    for path in files:
        if path.name != archive:
            continue
        with _one_line_for(_File(path, None)), zipfile.ZipFile(path) as opened:
            for member in opened.namelist():
                if member.rpartition("/")[2] == name:
                    return _File(path, member)
    return None


def _read_gzips(files: Sequence[_File]) -> dict[str, Half]:
    arrays = [_read_idx(file, axes=3 - 2 * (index % 2)) for index, file in enumerate(files)]
    halves = zip(("train", "test"), arrays[::2], arrays[1::2], strict=True)
    return {name: Half(images.transpose(0, 2, 1), labels) for name, images, labels in halves}


def _read_idx(file: _File, *, axes: int) -> np.ndarray:
    """Return the array of an IDX file of bytes; no more is unpacked than its header claims."""
    with _one_line_for(file), file.open() as packed, gzip.GzipFile(fileobj=packed) as stream:
        magic = stream.read(4)
        if magic != bytes((0, 0, 8, axes)):
            raise UserError(
                f"{file} begins with {magic.hex(' ') or 'nothing'}, not with 00 00 08 {axes:02} as an "
                f"IDX file of {'images' if axes == 3 else 'labels'} does. Fetch it again."
            )
        shape = tuple(np.frombuffer(stream.read(4 * axes), ">u4").tolist())
        if len(shape) < axes or shape[0] > MAX_IMAGES or set(shape[1:]) - {SIZE_PX}:
            raise UserError(
                f"{file} claims {'x'.join(map(str, shape))}, and at most {MAX_IMAGES:,} images of "
                f"{SIZE_PX}x{SIZE_PX} are EMNIST. Fetch it again."
            )
        size = int(np.prod(shape))
        content = stream.read(size + 1)
    if len(content) != size:
        found = f"only {len(content):,}" if len(content) < size else "more"
        raise UserError(f"{file} claims {size:,} bytes of data and holds {found}. Fetch it again.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_matlab(file: _File) -> dict[str, Half]:
    """Return both halves of a MATLAB 5 file: dataset.{train,test}.{images,labels}."""
    import scipy.io  # a quarter of a second, and nobody else needs it

    with _one_line_for(file), file.open() as stream:
        content = stream.read(_MAT_BYTES + 1)
        _check_unpacked_size(file, content)
        try:
            dataset = scipy.io.loadmat(BytesIO(content), variable_names="dataset")["dataset"][0, 0]
            halves = {}
            for name in ("train", "test"):
                half = dataset[name][0, 0]
                images, labels = half["images"], half["labels"].ravel()
                if images.dtype != np.uint8 or images.shape[1:] != (SIZE_PX**2,):
                    raise ValueError(f"{name} images are {images.dtype} {images.shape}")
                upright = images.reshape(-1, SIZE_PX, SIZE_PX).transpose(0, 2, 1)
                halves[name] = Half(upright, labels.astype(np.uint8))
        except Exception as error:  # scipy raises whatever a broken file leads it to
            raise ValueError(f"it is not EMNIST's MATLAB 5 file ({repr(error)[:200]})") from error
    return halves


def _check_unpacked_size(file: _File, content: bytes) -> None:
    """Refuse a MATLAB 5 file that unpacks to more than EMNIST could; nothing is kept unpacked.

    After a header of 128 bytes, each element has a tag (type, size); type 15 is a zlib stream.
    """
    if content[126:128] != b"IM":
        raise ValueError("it is not a little-endian MATLAB 5 file")
    unpacked, place = 0, 128
    while place + 8 <= len(content) and unpacked <= _MAT_BYTES:
        kind, size = np.frombuffer(content, "<u4", 2, place).tolist()
        place += 8
        stream, waiting = zlib.decompressobj(), content[place : place + size]
        while kind == 15 and waiting and unpacked <= _MAT_BYTES and not stream.eof:
            unpacked += len(stream.decompress(waiting, _CHUNK))
            waiting = stream.unconsumed_tail
        place += size
    if max(unpacked, len(content)) > _MAT_BYTES:
        raise UserError(
            f"{file} unpacks to more than {_MAT_BYTES:,} bytes, more than EMNIST holds. "
            "Fetch it again."
        )


@contextmanager
def _one_line_for(file: _File) -> Iterator[None]:
    """Turn what a broken file raises into one line."""
    broken = (
        OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError, RuntimeError, struct.error,
    )  # fmt: skip
    try:
        yield
    except broken as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file} cannot be read: {said}. Fetch it again.") from error
