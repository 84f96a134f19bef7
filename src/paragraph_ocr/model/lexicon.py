"""What a word that no dictionary has was most likely meant to be: a noisy channel (Kernighan et al. 1990).

Of the words that a language has, it is the one from which a page's readings are explained most easily: by few
letters misread, by those that the model was unsure of, by a common word. If none explains them well, what was
read stands: a name, or a word of another language.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from paragraph_ocr.errors import UserError
from paragraph_ocr.model.generate import Reading

_WORD = re.compile(r"(?<!\w)[^\W\d_]+(?:'[^\W\d_]+)*(?!\w)")
"""Letters, with apostrophes between; not what holds figures."""

_SHORTEST = 3  # letters of a word that is looked at
_COMMONEST = 60_000  # words of a language that another may be taken for
_EXAMINED = 8  # of these for each word, those nearest to what was read

_WRONG, _TOO_MUCH, _LEFT_OUT = 1.0, 1.5, 3.0
"""Nats that it costs a word at least if a letter of it was read as another one, one was read that it does not
have, and one of its own was not read."""

_COMMON, _UNKNOWN = 0.25, 8.0
"""Share of a word's logarithmic frequency that counts, and nats that a word costs that is in no dictionary.
All these were chosen on rendered pages of validation texts in held-out faces. Half or twice of one makes up
to 5% more errors, but of the last up to 28%."""


class _Seen(NamedTuple):
    """What one reading has in the place of a word."""

    letters: str
    """In lower case."""
    doubts: list[float]
    """Nats of each letter, the more the surer; as if each could be wrong at least a little."""
    weight: float
    """Of the reading; all of a page's sum to 1."""

    def cost(self, word: str) -> float:
        """Return how much must have gone wrong for these letters to be read where a word was written."""
        if self.letters == word:
            return 0.0
        total = 0.0
        for tag, begin, end, first, last in Levenshtein.opcodes(self.letters, word):
            if tag == "insert":
                near = self.doubts[max(0, begin - 1) : begin + 1]
                total += (last - first) * (_LEFT_OUT + 0.5 * min(near, default=0.0))
            elif tag != "equal":
                each = _TOO_MUCH if tag == "delete" else _WRONG
                total += math.fsum(self.doubts[begin:end]) + (end - begin) * each
        return total


class Lexicon:
    """Words of a language and how often each comes.

    Args:
        counts: of words in lower case.
        tokens: what each token of the model writes.
    """

    def __init__(self, counts: Mapping[str, int], tokens: Sequence[str]) -> None:
        self._tokens = tokens
        self._ids = {written: token for token, written in enumerate(tokens)}
        self._known = frozenset(counts)
        total = sum(counts.values())
        writable = [word for word in counts if self._ids.keys() >= {*word}]
        writable.sort(key=counts.__getitem__, reverse=True)
        self._costs = {
            word: -_COMMON * math.log(counts[word] / total) for word in writable[:_COMMONEST]
        }
        by_length = defaultdict[int, list[str]](list)
        for word in self._costs:
            by_length[len(word)].append(word)
        self._words = {
            length: (words, np.array([*map(_letters_of, words)]))
            for length, words in by_length.items()
        }

    def corrected(
        self, reading: Reading, readings: Sequence[Reading], weights: Sequence[float], most: int
    ) -> Reading:
        """Return the reading with other words in place of those that are none, where these explain more.

        Args:
            readings: of the page, from which the one was made, with a weight each.
            most: tokens, after which it is cut off.
        """
        text = "".join(self._written(token) for token in reading.tokens)
        doubtful = [word for word in _WORD.finditer(text) if not self._stands(word)]
        if not doubtful:
            return reading
        total = sum(weights)
        views = [
            (other, weight / total, _places(reading.tokens, other.tokens))
            for other, weight in zip(readings, weights, strict=True)
        ]
        tokens, confidences = [*reading.tokens], [*reading.confidences]
        for word in reversed(doubtful):  # from the end, so that places stay
            seen = [self._seen(*view, word.start(), word.end()) for view in views]
            meant, share = self._meant(word[0].lower(), seen)
            letters = _in_case_of(word[0], meant)
            if meant != word[0].lower() and self._ids.keys() >= {*letters}:
                tokens[word.start() : word.end()] = [self._ids[letter] for letter in letters]
                confidences[word.start() : word.end()] = [share ** (1 / len(meant))] * len(meant)
        del tokens[most:], confidences[most:]
        return Reading(tokens, confidences, math.fsum(map(math.log, confidences)))

    def _written(self, token: int) -> str:
        """Return one character, whatever a token writes."""
        written = self._tokens[token]
        return written if len(written) == 1 else "\0"

    def _stands(self, word: re.Match[str]) -> bool:
        """Return whether a word is left as it is: known, short, or part of one that a line's end divides."""
        letters = word[0].lower()
        if len(letters) < _SHORTEST or {letters, letters.removesuffix("'s")} & self._known:
            return True
        before, after = word.string[: word.start()], word.string[word.end() :]
        return bool(re.match(r"-[ ]*\n", after) or re.search(r"-[ ]*\n[ ]*$", before))

    def _seen(
        self, reading: Reading, weight: float, places: Sequence[int], start: int, end: int
    ) -> _Seen:
        first, last = places[start], places[end]
        letters = "".join(self._written(token) for token in reading.tokens[first:last]).lower()
        doubts = [-math.log(max(1e-9, 1 - its)) for its in reading.confidences[first:last]]
        return _Seen(letters, doubts, weight)

    def _meant(self, word: str, seen: Sequence[_Seen]) -> tuple[str, float]:
        """Return the word that explains best what was seen, and its share of all that were examined."""
        near = {
            found: 0.0
            for its in {word, *(its.letters for its in seen)}
            for found in self._near(its)
        }
        for found in near:
            far = sum(its.weight * Levenshtein.distance(its.letters, found) for its in seen)
            near[found] = _LEFT_OUT * far + self._costs[found]
        examined = sorted(near, key=near.__getitem__)[:_EXAMINED]
        costs = {word: _UNKNOWN + sum(its.weight * its.cost(word) for its in seen)}
        for found in examined:
            costs[found] = self._costs[found] + sum(its.weight * its.cost(found) for its in seen)
        best = min(costs, key=costs.__getitem__)
        return best, 1 / math.fsum(math.exp(costs[best] - cost) for cost in costs.values())

    def _near(self, letters: str) -> list[str]:
        """Return the words at most so many letters from some: one of short ones, three of long ones."""
        most = 1 if len(letters) <= 4 else 2 if len(letters) <= 8 else 3
        own, near = _letters_of(letters), []
        for length in range(len(letters) - most, len(letters) + most + 1):
            words, theirs = self._words.get(length, ((), None))
            if theirs is not None:  # those with about the same letters, which is quick to tell
                alike = np.flatnonzero(np.bitwise_count(theirs ^ own) <= 2 * most)
                near += [words[index] for index in alike.tolist()]
        found = process.extract(
            letters, near, scorer=Levenshtein.distance, score_cutoff=most, limit=None
        )
        return [word for word, _, _ in found]


@lru_cache(maxsize=4)
def lexicon(language: str, tokens: tuple[str, ...]) -> Lexicon:
    """Return the words of a language that pyspellchecker has: en, de, es, fr, ...

    Raises:
        UserError: it does not have this one.
    """
    from spellchecker import SpellChecker  # half a second, and most readers need none

    languages = sorted(SpellChecker.languages())
    if language not in languages:
        raise UserError(
            f"decoding.lexicon={language} is no language that pyspellchecker has ({', '.join(languages)}). "
            "Pass one of these, or decoding.lexicon=null."
        )

    return Lexicon(SpellChecker(language=language).word_frequency.dictionary, tokens)


def _letters_of(word: str) -> np.uint32:
    """Return a bit for each letter that stands in a word."""
    return np.uint32(sum(1 << bit for bit in {ord(letter) % 32 for letter in word}))


def _places(tokens: Sequence[int], others: Sequence[int]) -> list[int]:
    """Return for each place between tokens, ends included, the one between the others."""
    places = [0] * (len(tokens) + 1)
    for edit in Levenshtein.opcodes(tokens, others):
        length, theirs = edit.src_end - edit.src_start, edit.dest_end - edit.dest_start
        for step in range(length + 1):
            places[edit.src_start + step] = edit.dest_start + round(step / max(1, length) * theirs)
    places[-1] = len(others)
    return places


def _in_case_of(word: str, meant: str) -> str:
    if len(word) > 1 and word.isupper():
        return meant.upper()
    return meant[:1].upper() + meant[1:] if word[0].isupper() else meant
