"""Corpus: where paragraphs come from, and how they become a store, once."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from paragraph_ocr import console
from paragraph_ocr.data.paragraph import Paragraph
from paragraph_ocr.data.store import VERSION, PackedParagraph, Store, StoreWriter, pack
from paragraph_ocr.errors import UserError

Progress = Callable[[int, int], None]
"""Takes how many paragraphs are done, and how many there will be."""


@runtime_checkable
class Corpus(Protocol):
    """Paragraphs in an order of their own, made or read once and kept in a store."""

    @property
    def name(self) -> str: ...

    def fingerprint(self) -> str:
        """Return what changes whenever the store's content would."""

    def prepare(self, root: Path, *, num_workers: int, progress: Progress | None = None) -> Path:
        """Return the path of the store, `store_path(self, root)`, written first if need be.

        `num_workers` processes do the work; 0 or 1: this one. The bytes do not depend on it.
        """


def store_path(corpus: Corpus, root: Path) -> Path:
    return root / f"{corpus.name}-{corpus.fingerprint()[:12]}.h5"


def is_prepared(corpus: Corpus, root: Path) -> bool:
    """Return whether the corpus has a whole store; a broken one gives a warning."""
    path = store_path(corpus, root)
    if not path.exists():
        return False
    try:
        return Store(path).fingerprint == corpus.fingerprint()
    except UserError as error:
        console.warn(f"{error} It is prepared again.")
        return False


def write_store(
    corpus: Corpus,
    root: Path,
    paragraphs: Iterable[Paragraph | PackedParagraph],
    *,
    total: int,
    progress: Progress | None = None,
) -> Path:
    """Return the path of the store, the paragraphs written to it in their order."""
    path = store_path(corpus, root)
    with StoreWriter(path, fingerprint=corpus.fingerprint()) as writer:
        for done, paragraph in enumerate(paragraphs, start=1):
            writer.add(pack(paragraph) if isinstance(paragraph, Paragraph) else paragraph)
            if progress is not None:
                progress(done, total)
    return path


def digest(identity: Mapping[str, Any]) -> str:
    """Return a fingerprint of what makes a store's content, and of the store's format."""
    text = json.dumps({**identity, "store": VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
