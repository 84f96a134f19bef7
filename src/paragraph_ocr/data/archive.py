"""Files of a folder and of the archives in it, read one after another and never extracted.

What comes from elsewhere may be cut short, lead out of its folder, or swell: each is refused by name.
"""

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from paragraph_ocr.errors import UserError

MAX_MEMBER_BYTES = 512 * 2**20
"""Of one file in an archive: a page at 1,200 dpi, uncompressed, is a quarter of it."""

MAX_TEXT_BYTES = 64 * 2**20
"""Of a manifest, a transcription or an XML file outside of archives."""

MAX_RATIO = 200
"""Of the bytes of all files to those of the archive; XML has 20, a bomb 1,000 and more."""

_MAX_HEADER_BYTES = 2**20  # of a long name, or of what else a tar header may say
_HARMLESS_BYTES = 16 * 2**20  # a small archive of blank pages may well be packed a thousandfold

_TARS = (".tgz", ".tar.gz", ".tar")
ARCHIVES = (*_TARS, ".zip")

Wanted = Callable[[PurePosixPath], bool]


@dataclass(frozen=True, slots=True)
class Member:
    """A file as read."""

    name: PurePosixPath
    """Inside its folder or archive."""
    where: str
    """The path to name to a person."""
    data: bytes


@dataclass(frozen=True, slots=True)
class Source:
    """A folder, or one archive."""

    path: Path
    skip: frozenset[str] = frozenset()
    """Names of folders not looked into."""

    def members(self, wanted: Wanted) -> Iterator[Member]:
        """Yield the wanted files: a folder's in order of their names, an archive's as they lie.

        Raises:
            UserError: a truncated archive, a name or link that leads out, or a file that swells.
        """
        if self.path.is_dir():
            return self._folder(wanted)
        zipped = self.path.name.lower().endswith(".zip")
        return _refusing(self.path, self._zip(wanted) if zipped else self._tar(wanted))

    def _folder(self, wanted: Wanted) -> Iterator[Member]:
        for path in files_of(self.path, skip=self.skip):
            name = PurePosixPath(path.relative_to(self.path).as_posix())
            if not wanted(name):
                continue
            try:
                data = path.read_bytes()
            except OSError as error:
                raise UserError(
                    f"{path} cannot be read: {error.strerror}. Mend it or take it out."
                ) from error
            yield Member(name, str(path), data)

    def _zip(self, wanted: Wanted) -> Iterator[Member]:
        with zipfile.ZipFile(self.path) as archive:
            budget = _Budget(self.path)
            for info in archive.infolist():
                name = _safe(info.filename, self.path)
                link = stat.S_IFMT(info.external_attr >> 16) == stat.S_IFLNK
                if info.is_dir() or not (link or wanted(name)):
                    continue
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise NotImplementedError(f"{name} is packed by another method than deflate")
                if info.flag_bits & 1:
                    raise UserError(
                        f"{self.path}: {name} is encrypted. Pack it without a password."
                    )
                budget.spend(name, info.file_size)
                with archive.open(info) as file:
                    data = _read(file, info.file_size)
                if link:
                    _check_link(name, data.decode(errors="replace"), self.path)
                else:
                    yield Member(name, f"{self.path}: {name}", data)

    def _tar(self, wanted: Wanted) -> Iterator[Member]:
        with self.path.open("rb") as packed:
            gzipped = packed.read(2) == b"\x1f\x8b"
            packed.seek(0)
            whole = gzip.GzipFile(fileobj=packed) if gzipped else packed
            noted = _LastRead(whole)
            budget = _Budget(self.path)
            with tarfile.open(fileobj=noted, mode="r:") as archive:  # type: ignore[call-overload]
                while (info := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep every one
                    name = _safe(info.name, self.path)
                    if info.issym() or info.islnk():
                        # a hard link names its target from the top of the archive
                        _check_link(name if info.issym() else None, info.linkname, self.path)
                        continue
                    if not (info.isfile() or info.isdir()):
                        raise UserError(f"{self.path}: {name} is a device. Take it out.")
                    budget.spend(name, info.size)  # what is passed over is unpacked all the same
                    if info.isfile() and wanted(name):
                        file = archive.extractfile(info)
                        assert file is not None
                        noted.most = MAX_MEMBER_BYTES
                        data = _read(file, info.size)
                        noted.most = _MAX_HEADER_BYTES
                        yield Member(name, f"{self.path}: {name}", data)
            if noted.last.strip(b"\0") or len(noted.last) < tarfile.BLOCKSIZE:
                # tarfile takes any end for the end; a whole archive ends in blocks of zeros
                raise tarfile.ReadError("its end is missing")
            while noted.read(_MAX_HEADER_BYTES):  # to the end, where gzip keeps its checksum
                pass


def sources(root: Path, *, skip: Collection[str] = ()) -> list[Source]:
    """Return the folder itself and the archives below it, in order of their names.

    Args:
        skip: names of folders not looked into.
    """
    paths = files_of(root, skip=skip)
    archives = [path for path in paths if path.name.lower().endswith(ARCHIVES)]
    return [Source(root, frozenset(skip)), *map(Source, archives)]


def files_of(root: Path, *, skip: Collection[str] = ()) -> list[Path]:
    """Return every file below a folder in order of their names, but for hidden ones.

    Links to folders are not followed.

    Raises:
        UserError: a link leads out of the folder or nowhere, or a folder cannot be read.
    """

    def walk(folder: Path) -> Iterator[Path]:
        try:
            with os.scandir(folder) as found:
                entries = [*found]  # which know their kind without being asked one by one
        except OSError as error:
            raise UserError(
                f"{folder} cannot be read: {error.strerror}. Make it readable."
            ) from error
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            path = Path(entry.path)
            if entry.is_symlink():
                check_inside(path, root)
                if path.is_dir():
                    continue
            if entry.is_file():
                yield path
            elif entry.is_dir() and entry.name not in skip:
                yield from walk(path)

    return sorted(walk(root))


def check_inside(path: Path, root: Path) -> None:
    """Check that a path, its links followed, is a file or folder in the folder.

    Raises:
        UserError: it leads outside or nowhere.
    """
    try:
        leads_out = not path.resolve(strict=True).is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # nowhere, links in a ring, or no path at all
        leads_out = True
    if leads_out:
        raise UserError(f"{path} leads outside of {root} or nowhere. Put what it points to there.")


def read_text(path: Path, *, root: Path) -> str:
    """Return the text of a file that lies in a folder, its lines ended by newlines.

    Raises:
        UserError: a link that leads out, no regular file, more than MAX_TEXT_BYTES, or not UTF-8.
    """
    try:
        text = read_bytes(path, root=root).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8. Save it so.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_bytes(path: Path, *, root: Path) -> bytes:
    """Return a file's bytes; see `read_text`."""
    check_inside(path, root)
    if not path.is_file():
        raise UserError(f"{path} is no file. Take it out.")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Take it out.") from error
    if len(content) > MAX_TEXT_BYTES:
        raise UserError(f"{path} has more than {MAX_TEXT_BYTES:,} bytes. Split it.")
    return content


def _refusing(path: Path, members: Iterator[Member]) -> Iterator[Member]:
    """Yield the members; what the libraries raise becomes one line."""
    remedy = "Fetch it again."
    try:
        yield from members
    except (
        EOFError, zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, struct.error,
        ValueError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is cut short or broken: {said}. {remedy}") from error
    except RuntimeError as error:
        raise UserError(f"{path} cannot be unpacked: {error}. Pack it as a plain .zip.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {remedy}") from error


def _safe(name: str, archive: Path) -> PurePosixPath:
    """Return the name if it stays inside.

    Raises:
        UserError: it is absolute or climbs, on any system.
    """
    path = PurePosixPath(name)
    windows = PureWindowsPath(name)
    if path.is_absolute() or windows.drive or windows.root or ".." in {*path.parts, *windows.parts}:
        raise UserError(f"{archive}: {name!r} leads outside of the archive. Do not trust it.")
    return path


def _check_link(link: PurePosixPath | None, target: str, archive: Path) -> None:
    """Check that a link's target lies in the archive; None: the target is told from its top."""
    folder = link.parent if link is not None else PurePosixPath()
    depth = 0
    for part in (folder / target).parts:
        depth += -1 if part == ".." else 1
        if depth < 0 or PurePosixPath(target).is_absolute():
            raise UserError(
                f"{archive}: the link {link or ''} to {target!r} leads outside of the archive. "
                "Do not trust it."
            )


def _read(file, size: int) -> bytes:
    """Return the whole file, which its archive says to have `size` bytes."""
    data = file.read(size + 1)
    if len(data) != size:
        raise EOFError("a file is longer or shorter than the archive says")
    return data


class _Budget:
    """What an archive may still unpack to."""

    def __init__(self, archive: Path) -> None:
        self._archive = archive
        self._left = max(_HARMLESS_BYTES, MAX_RATIO * archive.stat().st_size)

    def spend(self, name: PurePosixPath, size: int) -> None:
        """Count a file of `size` bytes, before it is read.

        Raises:
            UserError: it, or all so far, is more than an honest archive holds.
        """
        self._left -= size
        if size > MAX_MEMBER_BYTES or self._left < 0:
            raise UserError(
                f"{self._archive}: {name} of {size:,} bytes makes it swell like a decompression bomb "
                f"(at most {MAX_MEMBER_BYTES:,} bytes a file, and {MAX_RATIO} times the archive). "
                "Do not trust it."
            )


class _LastRead(io.RawIOBase):
    """A file that remembers what was read of it last."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file, self.last = file, b""
        self.most = _MAX_HEADER_BYTES

    def read(self, size: int = -1) -> bytes:
        if size > self.most:  # tarfile takes whole what a header says that a long name has
            raise tarfile.ReadError("a header claims too much")
        self.last = self._file.read(size)
        return self.last

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
