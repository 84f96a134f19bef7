"""Text to token ids and back."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from paragraph_ocr.errors import UserError

SPECIAL_TOKENS = ("<B>", "<S>", "<E>", "<P>")
"""Blank (unused by a Transformer, kept for CTC), start, end, pad: the order of the FSDL 2022 lab."""


FOLDED = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u0060\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u00ad", "-"),
        "\u2026": "...",
        "\u00a0": " ",
    }
)
"""Typographic characters and what a typewriter has for them."""


class Vocabulary:
    """The characters a model can write, one token each, behind four special tokens.

    Args:
        fold: write typographic quotes, dashes and ellipses as their plain forms.
        unknown: what `prepare` does with characters that are not in the vocabulary: "error" leaves
            them (to be refused), "drop" leaves them out, "replace" writes `replacement`.

    Raises:
        ValueError: a character stands twice, something longer than a character is given, or the
            replacement that is to be written is no character of the vocabulary.
    """

    blank, start, end, pad = range(4)

    def __init__(
        self,
        characters: Iterable[str],
        *,
        fold: bool = False,
        unknown: str = "error",
        replacement: str = "?",
    ) -> None:
        self.fold, self.treatment = fold, unknown
        self.instead = {"error": None, "drop": "", "replace": replacement}[unknown]
        self.characters = tuple(characters)
        if any(len(character) != 1 for character in self.characters):
            raise ValueError("a vocabulary is made of single characters")
        if len(set(self.characters)) != len(self.characters):
            raise ValueError("a character stands twice in the vocabulary")
        if self.instead and self.instead not in self.characters:
            raise ValueError(f"the replacement {replacement!r} is not in the vocabulary")
        self.tokens = SPECIAL_TOKENS + self.characters
        self._ids = {
            character: len(SPECIAL_TOKENS) + index
            for index, character in enumerate(self.characters)
        }

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} tokens: {''.join(self.characters)!r})"

    def prepare(self, text: str) -> str:
        """Return the text normalised, its unknown characters treated as was asked for."""
        text = normalise(text, fold=self.fold)
        instead = self.instead
        if instead is not None:
            text = "".join(c if c in self._ids else instead for c in text)
        return text

    def encode(self, text: str) -> list[int]:
        """Return the ids of start, each character, end.

        Raises:
            UserError: a character is unknown (see `require`).
        """
        try:
            return [self.start, *(self._ids[character] for character in text), self.end]
        except KeyError:
            self.require([text])
            raise

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text before the first end token; special tokens write nothing."""
        characters = []
        for index in ids:
            if index == self.end:
                break
            if index >= len(SPECIAL_TOKENS):
                characters.append(self.tokens[index])
        return "".join(characters)

    def unknown(self, texts: Iterable[str]) -> Counter[str]:
        """Return how often each character that the vocabulary lacks stands in the texts."""
        counts = Counter(character for text in texts for character in text)
        return Counter({c: n for c, n in counts.items() if c not in self._ids})

    def require(self, texts: Sequence[str]) -> None:
        """Check that every character of the texts is known.

        Raises:
            UserError: names every unknown character with its count, and the remedy.
        """
        unknown = self.unknown(texts)
        if unknown:
            raise UserError(
                f"vocabulary.characters lacks {listed(unknown)}. Add them with "
                "vocabulary.characters=<all characters>, or pass vocabulary.fold=true (typographic "
                "quotes and dashes), vocabulary.unknown=drop or vocabulary.unknown=replace."
            )


def normalise(text: str, *, fold: bool) -> str:
    """Return the text in NFC, typographic signs in their plain forms if `fold`."""
    text = unicodedata.normalize("NFC", text)
    return text.translate(FOLDED) if fold else text


def found_characters(texts: Iterable[str], *, fold: bool) -> str:
    """Return every character of the normalised texts once, in the order of their code points."""
    return "".join(sorted({c for text in texts for c in normalise(text, fold=fold)}))


def listed(counts: Counter[str]) -> str:
    """Return up to 20 characters with code point and count, the most frequent first, in one line."""
    named = ", ".join(f"{c!r} (U+{ord(c):04X}) x{n}" for c, n in counts.most_common(20))
    return named + (f" and {len(counts) - 20} more" if len(counts) > 20 else "")
