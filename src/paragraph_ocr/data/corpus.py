"""Corpora made to measure: what each paragraph of a store is, and preparing the store once.

A corpus says what a paragraph is as a function of split and number alone, so that any number of
processes makes the same file. Corpora that come from elsewhere write their stores with StoreWriter.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from paragraph_ocr.data import fonts, text
from paragraph_ocr.data.parallel import in_order
from paragraph_ocr.data.render import RENDERER_VERSION, SMALLEST_PX, render
from paragraph_ocr.data.store import PackedParagraph, Paragraph, Store, StoreWriter, pack
from paragraph_ocr.data.text import LONGEST_WORD, SPLITS
from paragraph_ocr.errors import UserError

Progress = Callable[[int, int], None]
"""Told (done, total) while a store is being prepared."""

_ATTEMPTS = 100  # draws of a text before giving up on finding one that the store lacks


class Corpus(Protocol):
    """What a data module needs of a corpus."""

    @property
    def name(self) -> str: ...

    def prepare(self, root: Path, *, num_workers: int, progress: Progress | None = None) -> Path:
        """Return the path of the store under the root, made now unless it is there and whole."""
        ...


@dataclass(frozen=True, kw_only=True)
class GeneratedCorpus:
    """Paragraphs drawn from a seed. Subclasses say how one is drawn.

    Raises:
        UserError: numbers that contradict one another.
    """

    name: str
    height: int
    """Pixels of the canvas."""
    width: int
    min_lines: int
    max_lines: int
    min_characters: int
    mean_characters: int
    """Lengths are drawn from a beta distribution between least and greatest, with this mean."""
    max_characters: int
    num_train: int
    num_val: int
    num_test: int
    characters: str
    """The alphabet that texts are written in."""
    seed: int = 0

    version: ClassVar[int] = 1
    """Raise it whenever the same fields give other paragraphs."""

    def __post_init__(self) -> None:
        if self.min_lines > self.max_lines:
            raise UserError(
                f"datamodule.min_lines={self.min_lines} is more than datamodule.max_lines="
                f"{self.max_lines}. Pass datamodule.min_lines=<at most {self.max_lines}>."
            )
        if not self.min_characters < self.mean_characters < self.max_characters:
            raise UserError(
                f"datamodule.mean_characters={self.mean_characters} must lie between "
                f"datamodule.min_characters={self.min_characters} and datamodule.max_characters="
                f"{self.max_characters}. Pass datamodule.mean_characters=<a number between them>."
            )

    def draw(self, split: str, index: int, attempt: int) -> Paragraph:
        """Return a paragraph that depends on the fields and these three alone."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return what tells apart stores of other bytes: a hash of all that paragraphs depend on.

        Versions of Pillow, OpenCV and NumPy are not part of it: they may move a grey level.
        """
        return hashlib.sha256(json.dumps(self._ingredients(), sort_keys=True).encode()).hexdigest()

    def path(self, root: Path) -> Path:
        """Return where the store lies under the root."""
        return root / f"{self.name}-{self.fingerprint()[:12]}.h5"

    def prepare(self, root: Path, *, num_workers: int, progress: Progress | None = None) -> Path:
        """Return the path of the store, made now by `num_workers` processes unless it is whole.

        0 workers draw in this process. Two preparations of one store wait for each other.
        """
        path = self.path(root)
        if _is_whole(path, self.fingerprint()):
            return path
        with _alone(path):
            if not _is_whole(path, self.fingerprint()):
                self._write(path, num_workers=num_workers, progress=progress)
        return path

    def _write(self, path: Path, *, num_workers: int, progress: Progress | None) -> None:
        wanted = [
            (split, index)
            for split, count in zip(SPLITS, self._counts(), strict=True)
            for index in range(count)
        ]
        seen: set[str] = set()
        with StoreWriter(path, fingerprint=self.fingerprint()) as writer:
            drawn = in_order(self._draw_packed, wanted, num_workers=num_workers)
            for done, ((split, index), packed) in enumerate(zip(wanted, drawn, strict=True), 1):
                attempt = 0
                while (words := " ".join(packed.text.split())) in seen:
                    attempt += 1
                    if attempt > _ATTEMPTS:
                        raise UserError(
                            f"datamodule.num_{split}={dict(zip(SPLITS, self._counts(), strict=True))[split]}"
                            f" is more than there are texts of {self.min_characters} to "
                            f"{self.max_characters} characters. Pass a smaller datamodule.num_{split}, "
                            "or a greater datamodule.mean_characters."
                        )
                    packed = pack(self.draw(split, index, attempt))
                seen.add(words)
                writer.add_packed(packed)
                if progress is not None:
                    progress(done, len(wanted))

    def _draw_packed(self, wanted: tuple[str, int]) -> PackedParagraph:
        return pack(self.draw(*wanted, 0))

    def _counts(self) -> tuple[int, int, int]:
        return self.num_train, self.num_val, self.num_test

    def _ingredients(self) -> dict[str, object]:
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return {"corpus": type(self).__name__, "version": self.version, **plain}

    def _generator(self, split: str, index: int, attempt: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(split), index, attempt])

    def _length(self, generator: np.random.Generator) -> int:
        """Return a number of characters; the distribution is flat-topped and skewed to the mean."""
        span = self.max_characters - self.min_characters
        share = (self.mean_characters - self.min_characters) / span
        return self.min_characters + round(span * generator.beta(3.5 * share, 3.5 * (1 - share)))


@dataclass(frozen=True, kw_only=True)
class SyntheticCorpus(GeneratedCorpus):
    """Real text, mixed with random words, in handwriting-like faces.

    Raises:
        UserError: lines too long for the canvas to be legible.
    """

    fonts: Path | None = None
    """Folder of font files; None: the faces installed as packages."""
    texts: Path | None = None
    """Folder of .txt files; None: Shakespeare's plays."""
    random_share: float = 0.25
    """Share of words that are random words, numbers and signs."""

    version: ClassVar[int] = RENDERER_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        # a letter takes about 0.45 em, and the pitch of lines is about 1.1 em
        size = min(
            self.width / (0.45 * max(self.max_characters / self.max_lines, LONGEST_WORD)),
            self.height / (1.1 * self.min_lines),
        )
        if size < SMALLEST_PX:
            raise UserError(
                f"datamodule.max_characters={self.max_characters} in datamodule.max_lines="
                f"{self.max_lines} lines would be written {size:.0f} px tall on {self.height}x"
                f"{self.width}, and {SMALLEST_PX} px is the least. Pass a greater datamodule.width or "
                "datamodule.height, or a smaller datamodule.max_characters."
            )

    def draw(self, split: str, index: int, attempt: int) -> Paragraph:
        generator = self._generator(split, index, attempt)
        faces, passages = _materials(self.fonts, self.texts, self.characters, self.random_share)
        words = passages.draw(
            generator,
            split,
            length=self._length(generator),
            minimum=self.min_characters,
            maximum=self.max_characters,
        )
        face = faces[generator.integers(len(faces))]
        drawing = render(
            words,
            face,
            height=self.height,
            width=self.width,
            min_lines=self.min_lines,
            max_lines=self.max_lines,
            generator=generator,
        )
        return Paragraph(drawing.image, drawing.text, split, source=face.name, writer=face.name)

    def _ingredients(self) -> dict[str, object]:
        return super()._ingredients() | {
            "fonts": fonts.digest(fonts.find_faces(self.fonts)),
            "texts": text.identity(self.texts),
        }


@dataclass(frozen=True, kw_only=True)
class FakeCorpus(GeneratedCorpus):
    """Noise, with random letters for a transcription: needs neither fonts nor text, teaches nothing."""

    def draw(self, split: str, index: int, attempt: int) -> Paragraph:
        generator = self._generator(split, index, attempt)
        letters = [c for c in self.characters if not c.isspace()]
        drawn = generator.choice(letters, size=self._length(generator))
        num_lines = min(generator.integers(self.min_lines, self.max_lines + 1), len(drawn))
        # a newline takes the place of a letter, never the first or last of a line
        ends = np.linspace(0, len(drawn), num_lines + 1).astype(int)[1:-1]
        drawn[ends[(ends > 0) & (ends < len(drawn) - 1)]] = "\n"
        noise = generator.integers(256, size=(self.height, self.width), dtype=np.uint8)
        return Paragraph(noise, "".join(drawn), split, source="noise", writer="nobody")


@lru_cache(maxsize=2)
def _materials(
    folder: Path | None, texts: Path | None, characters: str, random_share: float
) -> tuple[list[fonts.Face], text.Passages]:
    """Return faces and text, read once a process."""
    return (
        fonts.load_faces(folder, characters=characters),
        text.Passages(texts, characters=characters, random_share=random_share),
    )


def _is_whole(path: Path, fingerprint: str) -> bool:
    """Return whether the store is there; a file of that name that is no store is the user's to mend."""
    return path.exists() and Store(path).fingerprint == fingerprint


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time prepare this path; what killed ones left is taken away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        with suppress(OSError):  # a file system without locks: the later rename wins
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            for left_over in path.parent.glob(f".{path.name}.*.tmp"):
                left_over.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)
