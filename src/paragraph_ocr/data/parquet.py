"""Images and texts in Parquet files, as the Hugging Face hub keeps data sets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from paragraph_ocr.errors import UserError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_ROWS = 64  # read at a time

MAX_RATIO = 200
"""Of the bytes of all columns to those of the file; scans are packed already."""

_HARMLESS_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Record:
    """A row; the image as the bytes of its file."""

    id: str
    where: str
    """The path to name to a person."""
    image: bytes
    text: str


def count(paths: Sequence[Path]) -> int:
    """Return the number of rows of all files.

    Raises:
        UserError: a file is no Parquet file, or lacks the columns image and text.
    """
    return sum(_open(path).metadata.num_rows for path in paths)


def records(path: Path) -> Iterator[Record]:
    """Yield the rows of a file in their order.

    `image` holds bytes, or as the hub writes it {bytes, path}; `text` is the transcription.

    Raises:
        UserError: the file cannot be read, or a row has no image or an empty transcription.
    """
    number = 0
    try:
        for batch in _open(path).iter_batches(_ROWS, columns=["image", "text"]):
            for row in batch.to_pylist():
                number += 1
                where = f"{path} row {number}"
                image, text = row["image"], row["text"]
                if isinstance(image, dict):
                    image = image.get("bytes")
                if not isinstance(image, bytes) or not image:
                    raise UserError(
                        f"{where} holds no bytes of an image. Export it with its images."
                    )
                if not isinstance(text, str) or not text.strip():
                    raise UserError(f"{where} has an empty transcription. Give its text.")
                yield Record(f"{path.name}#{number}", where, image, text.strip())
    except (
        _arrow().ArrowException,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        MemoryError,
    ) as error:
        raise _broken(path, error) from error


def _arrow() -> ModuleType:
    """Return pyarrow, which only this needs, and which some machines lack."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow. Type `pip install pyarrow`.") from error
    return pyarrow


def _open(path: Path) -> "ParquetFile":
    arrow = _arrow()
    try:
        file = arrow.parquet.ParquetFile(path)
    except (_arrow().ArrowException, OSError, ValueError, MemoryError) as error:
        raise _broken(path, error) from error
    claimed = sum(
        file.metadata.row_group(index).total_byte_size
        for index in range(file.metadata.num_row_groups)
    )
    if claimed > max(_HARMLESS_BYTES, MAX_RATIO * path.stat().st_size):
        raise UserError(
            f"{path} unpacks to {claimed:,} bytes, like a decompression bomb (at most {MAX_RATIO} times "
            "the file). Do not trust it."
        )
    lacking = {"image", "text"} - set(file.schema_arrow.names)
    if lacking:
        raise UserError(
            f"{path} lacks the column {' and '.join(sorted(lacking))}. Export it with image and text."
        )
    return file


def _broken(path: Path, error: Exception) -> UserError:
    said = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return UserError(f"{path} is no whole Parquet file: {said} Fetch it again.")
