"""Corpora in EMNIST's own two file formats, of characters drawn in the installed faces.

    python tests/emnist_files.py FOLDER [IMAGES_A_CLASS]

writes gzip.zip, from which `datamodule=emnist root=FOLDER` trains where EMNIST itself cannot be had.
"""

import gzip
import struct
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import scipy.io

from paragraph_ocr.data.emnist import CHARACTERS, Half
from paragraph_ocr.data.fonts import load_faces


def draw_half(per_class: int, seed: int) -> Half:
    """Return `per_class` upright images of every character: fitted into 20x20 as EMNIST's are."""
    generator = np.random.default_rng(seed)
    faces, _ = load_faces(None, characters=CHARACTERS)
    images = [
        _draw(character, faces[generator.integers(len(faces))], generator)
        for character in CHARACTERS
        for _ in range(per_class)
    ]
    labels = np.repeat(np.arange(len(CHARACTERS), dtype=np.uint8), per_class)
    order = generator.permutation(len(labels))
    return Half(np.stack(images)[order], labels[order])


def _draw(character: str, face, generator: np.random.Generator) -> np.ndarray:
    ink = face.glyphs(48)[character].ink
    ink = np.pad(ink, 12)
    centre = np.array(ink.shape[::-1]) / 2
    turn = cv2.getRotationMatrix2D(tuple(centre), generator.uniform(-8, 8), 1.0)
    turn[0, 1] += generator.uniform(-0.2, 0.2)
    turn[:, 2] += centre - turn @ [*centre, 1]
    ink = cv2.warpAffine(ink, turn, ink.shape[::-1])
    ys, xs = np.nonzero(ink > 40)
    ink = ink[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    scale = 20 / max(ink.shape)
    size = [max(1, round(side * scale)) for side in ink.shape[::-1]]
    small = cv2.resize(ink, size, interpolation=cv2.INTER_AREA)
    image = np.zeros((28, 28), np.uint8)
    top, left = (28 - size[1]) // 2, (28 - size[0]) // 2
    image[top : top + size[1], left : left + size[0]] = small
    blurred = cv2.GaussianBlur(image, (0, 0), generator.uniform(0.3, 0.8))
    return cv2.convertScaleAbs(blurred, alpha=255 / max(1, blurred.max()))


def idx(array: np.ndarray) -> bytes:
    """Return the bytes of an IDX file, as EMNIST's gzip files hold: magic, big-endian shape, data."""
    magic = bytes((0, 0, 8, array.ndim))
    return magic + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def gzips(halves: dict[str, Half]) -> dict[str, bytes]:
    """Return EMNIST's four gzip files by name; images lie column by column in them."""
    files = {}
    for name, half in halves.items():
        columns = np.ascontiguousarray(half.images.transpose(0, 2, 1))
        files[f"emnist-byclass-{name}-images-idx3-ubyte.gz"] = gzip.compress(idx(columns), 1)
        files[f"emnist-byclass-{name}-labels-idx1-ubyte.gz"] = gzip.compress(idx(half.labels), 1)
    return files


def write_gzips(folder: Path, halves: dict[str, Half]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in gzips(halves).items():
        (folder / name).write_bytes(content)


def write_gzip_archive(folder: Path, halves: dict[str, Half]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "gzip.zip", "w") as archive:
        for name, content in gzips(halves).items():
            archive.writestr(f"gzip/{name}", content)


def write_matlab(folder: Path, halves: dict[str, Half]) -> None:
    """Write emnist-byclass.mat: dataset.{train,test}.{images,labels,writers} and dataset.mapping."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        name: {
            # MATLAB's own order of an upright image, as a row of 784
            "images": half.images.transpose(0, 2, 1).reshape(-1, 784),
            "labels": half.labels[:, None],
            "writers": np.zeros((len(half.labels), 1), np.uint16),
        }
        for name, half in halves.items()
    }
    mapping = np.array([[label, ord(c)] for label, c in enumerate(CHARACTERS)], np.uint8)
    dataset = {**parts, "mapping": mapping}
    scipy.io.savemat(folder / "emnist-byclass.mat", {"dataset": dataset}, do_compression=True)


def write_matlab_archive(folder: Path, halves: dict[str, Half]) -> None:
    write_matlab(folder / "aside", halves)
    file = folder / "aside" / "emnist-byclass.mat"
    with zipfile.ZipFile(folder / "matlab.zip", "w") as archive:
        archive.write(file, "matlab/emnist-byclass.mat")
    file.unlink()


FORMATS = {
    "gzips": write_gzips,
    "gzip archive": write_gzip_archive,
    "matlab": write_matlab,
    "matlab archive": write_matlab_archive,
}


if __name__ == "__main__":
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 400
    write_gzip_archive(
        Path(sys.argv[1]), {"train": draw_half(count, 0), "test": draw_half(max(1, count // 6), 1)}
    )
