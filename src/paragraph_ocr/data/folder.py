"""The user's own pages: a folder of images with transcriptions, as it lies."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

from paragraph_ocr.data.archive import check_inside, read_bytes, read_text
from paragraph_ocr.data.corpus import Progress, digest, is_prepared, store_path, write_store
from paragraph_ocr.data.layout import Polygon, read_layout
from paragraph_ocr.data.normalise import NORMALISER_VERSION, normalise_page
from paragraph_ocr.data.paragraph import SPLITS, Paragraph
from paragraph_ocr.data.parallel import in_order
from paragraph_ocr.data.scan import SUFFIXES, cut, fit, read_page, read_scan
from paragraph_ocr.data.store import PackedParagraph, pack
from paragraph_ocr.errors import UserError

MANIFESTS = ("manifest.jsonl", "manifest.csv")

_VERSION = 3  # raise it whenever the same files give another store


@dataclass(frozen=True, slots=True)
class Entry:
    """A page as the folder names it; split and writer are empty where nothing is said."""

    image: str
    text: str
    split: str = ""
    writer: str = ""
    region: str = ""
    """Id of the paragraph on the image; empty for the whole image."""
    polygon: Polygon = ()

    @property
    def id(self) -> str:
        return f"{self.image}#{self.region}" if self.region else self.image


@dataclass(frozen=True, kw_only=True)
class FolderCorpus:
    """Images below a folder, with .txt files beside them, a manifest, or PAGE or ALTO files.

    PAGE and ALTO files give a paragraph for each region with text; the scan lies beside the XML file or
    in the folder above it (as in `page/`), under the name that the file gives.

    `split` is "auto" (the manifest's column, else by writer, else by a hash of the image's name: 80%,
    10%, 10%) or one of SPLITS, which then takes everything.

    Raises:
        UserError: in `prepare`, for whatever in the folder cannot be used; nothing is written then.
    """

    name: str
    folder: Path
    height: int
    width: int
    split: str = "auto"
    normalise: bool = False
    """Whether pages are made to look like rendered ones; otherwise they are only scaled down."""

    def fingerprint(self) -> str:
        """Return what changes with any name, transcription or image file (by size and time)."""
        files = [
            (astuple(entry), stat.st_size, stat.st_mtime_ns)
            for entry in self.entries()
            for stat in [(self.folder / entry.image).stat()]
        ]
        canvas = (self.height, self.width)
        identity: dict[str, object] = {
            "folder": _VERSION,
            "files": files,
            "canvas": canvas,
            "split": self.split,
        }
        if self.normalise:
            identity["normalise"] = NORMALISER_VERSION
        return digest(identity)

    def prepare(self, root: Path, *, num_workers: int, progress: Progress | None = None) -> Path:
        if is_prepared(self, root):
            return store_path(self, root)
        entries = self.entries()
        made = in_order(
            partial(_read, self), list(zip(entries, self._splits(entries), strict=True)),
            num_workers=num_workers,
        )  # fmt: skip
        return write_store(self, root, made, total=len(entries), progress=progress)

    def entries(self) -> list[Entry]:
        """Return the pages in order, each checked but for its pixels.

        Raises:
            UserError: names the first line or file that cannot be used.
        """
        manifests = [name for name in MANIFESTS if (self.folder / name).exists()]
        if len(manifests) > 1:
            raise UserError(f"{self._here}: both {' and '.join(manifests)} are there. Leave one.")
        layouts = sorted(self.folder.rglob("*.xml"))
        if manifests:
            found = list(self._listed(manifests[0]))
        else:
            found = list(self._marked(layouts) if layouts else self._beside())
        if not found:
            raise UserError(
                f"{self._here} holds no manifest.jsonl or manifest.csv, no PAGE or ALTO files with "
                "text, and no images beside .txt files. Put one of these there."
            )
        twice = [name for name, count in Counter(e.id for e in found).items() if count > 1]
        if twice:
            raise UserError(f"{self._here}: {twice[0]} is listed twice. Leave one.")
        for entry in found:
            self._check(entry)
        return found

    @property
    def _here(self) -> str:
        return f"datamodule.root={self.folder}"

    def _table(self, manifest: str, text: str) -> Iterator[object]:
        try:
            yield from csv.DictReader(text.splitlines(True))
        except csv.Error as error:
            raise UserError(f"{self._here}: {manifest} is no CSV: {error}. Mend it.") from error

    def _listed(self, manifest: str) -> Iterator[Entry]:
        text = read_text(self.folder / manifest, root=self.folder)
        if manifest.endswith(".csv"):
            rows: Iterator[tuple[int, object]] = enumerate(self._table(manifest, text), 2)
        else:
            lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
            rows = ((number, _json(line)) for number, line in lines)
        for number, row in rows:
            where = f"{self._here}: {manifest} line {number}"
            if not isinstance(row, dict):
                raise UserError(f"{where} is no JSON object. Mend that line.")
            fields = [row.get(key) or "" for key in ("image", "text", "split", "writer")]
            for value in fields:
                if not isinstance(value, str):
                    raise UserError(f"{where}: {repr(value)[:80]} is no text. Mend that line.")
            if not fields[0]:
                raise UserError(f"{where} has no image. Give image and text.")
            image, text, split, writer = fields
            yield Entry(image, text, split, writer)

    def _beside(self) -> Iterator[Entry]:
        for path in sorted(self.folder.rglob("*")):
            if path.suffix.lower() not in SUFFIXES:
                continue
            text = path.with_suffix(".txt")
            name = path.relative_to(self.folder).as_posix()
            if not text.is_file():
                raise UserError(f"{self._here}: {name} has no {text.name} beside it. Add it.")
            yield Entry(name, read_text(text, root=self.folder).strip("\n"))

    def _marked(self, layouts: list[Path]) -> Iterator[Entry]:
        for path in layouts:
            for region in read_layout(path, read_bytes(path, root=self.folder)):
                names = [path.parent / region.image, path.parent.parent / region.image]
                image = next((name for name in names if name.is_file()), names[0])
                inside = image.absolute().is_relative_to(self.folder.absolute())
                name = image.relative_to(self.folder).as_posix() if inside else str(image)
                yield Entry(name, region.text, region=region.id, polygon=region.polygon)

    def _check(self, entry: Entry) -> None:
        for value in astuple(entry)[:5]:
            if "\0" in value or not _is_unicode(value):
                raise UserError(
                    f"{self._here}: {value[:80]!r} holds what is no character. Take it out."
                )
        path = self.folder / entry.image
        if Path(entry.image).is_absolute() or ".." in Path(entry.image).parts:
            raise UserError(f"{self._here}: {entry.image} lies outside the folder. Move it inside.")
        try:
            there = path.is_file()
        except OSError:  # a name longer than any
            there = False
        if not there:
            raise UserError(
                f"{self._here}: {entry.image[:200]} does not exist. Add it or take it out."
            )
        check_inside(path, self.folder)
        if not entry.text.strip():
            raise UserError(
                f"{self._here}: {entry.image} has an empty transcription. Give its text."
            )
        if entry.split not in ("", *SPLITS):
            raise UserError(
                f"{self._here}: {entry.image} has split={entry.split!r}. Use {', '.join(SPLITS)}."
            )

    def _splits(self, entries: list[Entry]) -> list[str]:
        """Return the split of each page.

        Raises:
            UserError: some pages name a split and others do not, or a writer stands in two.
        """
        if self.split != "auto":
            return [self.split] * len(entries)
        if any(entry.split for entry in entries):
            without = [entry.image for entry in entries if not entry.split]
            if without:
                raise UserError(f"{self._here}: {without[0]} names no split, and others do.")
            homes: dict[str, str] = {}
            for entry in entries:
                if entry.writer and homes.setdefault(entry.writer, entry.split) != entry.split:
                    raise UserError(
                        f"{self._here}: writer {entry.writer} stands in {homes[entry.writer]} and "
                        f"{entry.split}. Keep a writer's pages together."
                    )
            return [entry.split for entry in entries]
        units = [entry.writer or entry.image for entry in entries]
        dealt = _deal(set(units))
        return [dealt[unit] for unit in units]


def _deal(units: set[str]) -> dict[str, str]:
    """Return the split of each writer or page; more of them later move none of these.

    But for a split that would stay empty: it gets the unit with the least hash of training's.
    """

    def share(unit: str) -> float:
        return int.from_bytes(hashlib.sha256(unit.encode()).digest()[:8]) / 2**64

    dealt = {u: "val" if share(u) < 0.1 else "test" if share(u) < 0.2 else "train" for u in units}
    for split in ("val", "test"):
        spare = sorted((u for u in units if dealt[u] == "train"), key=share)
        if split not in dealt.values() and len(spare) > 1:
            dealt[spare[0]] = split
    return dealt


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # no JSON, a number of too many digits, or too deep
        return None


def _is_unicode(text: str) -> bool:
    """Return whether a text can be written; JSON may hold half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(corpus: FolderCorpus, page: tuple[Entry, str]) -> PackedParagraph:
    entry, split = page
    height, width = canvas = (corpus.height, corpus.width)
    path = corpus.folder / entry.image
    if entry.polygon:
        part = cut(read_scan(path), entry.polygon)
        if corpus.normalise:
            image, _ = normalise_page(part, height=height, width=width)
        else:
            image = fit(part, height=height, width=width)
    else:
        image = read_page(
            path, where=str(path), height=height, width=width, normalise=corpus.normalise
        ).ink
    paragraph = Paragraph(image, entry.text, split, source=entry.id, writer=entry.writer)
    return pack(paragraph, canvas=canvas)
