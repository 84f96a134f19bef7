"""GeneratedCorpus: paragraphs made to measure, each from a random generator of its own."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paragraph_ocr.data.corpus import Progress, is_prepared, store_path, write_store
from paragraph_ocr.data.paragraph import SPLITS, Paragraph
from paragraph_ocr.data.parallel import in_order
from paragraph_ocr.data.store import PackedParagraph, pack
from paragraph_ocr.errors import UserError

Maker = Callable[[np.random.Generator, str], Paragraph]
"""Makes a paragraph of a split; all that is random comes from the generator."""

_ATTEMPTS = 100  # to make a text that is not in the store yet


class Place(NamedTuple):
    """What a paragraph's random numbers depend on, beside the seed."""

    split: str
    number: int
    attempt: int = 0


@dataclass(frozen=True, kw_only=True)
class GeneratedCorpus(ABC):
    """What all generated corpora share; a subclass says how a paragraph is made.

    Raises:
        UserError: the vocabulary cannot write lines of words, or the lengths leave no room.
    """

    name: str
    height: int
    width: int
    min_lines: int
    max_lines: int
    min_characters: int
    mean_characters: int
    max_characters: int
    num_train: int
    num_val: int
    num_test: int
    characters: str
    """The vocabulary's."""
    seed: int

    def __post_init__(self) -> None:
        for character, needed in ((" ", True), ("\n", self.max_lines > 1)):
            if needed and character not in self.characters:
                raise UserError(
                    f"vocabulary.characters lacks {character!r}, which datamodule={self.name} needs. "
                    "Add it, or pass vocabulary=iam."
                )
        if len(set(self.characters) - {" ", "\n"}) < 2:
            raise UserError(
                f"vocabulary.characters={self.characters!r} spells no words. Pass vocabulary=iam."
            )
        least = max(self.min_characters + 1, 2 * self.min_lines)
        if self.max_characters < least:
            raise UserError(
                f"datamodule.max_characters={self.max_characters} is too few for min_characters="
                f"{self.min_characters} and min_lines={self.min_lines}. "
                f"Pass datamodule.max_characters={least} or more."
            )

    @abstractmethod
    def fingerprint(self) -> str: ...

    @abstractmethod
    def maker(self) -> Maker:
        """Return what makes this corpus's paragraphs; called once a process."""

    def prepare(self, root: Path, *, num_workers: int, progress: Progress | None = None) -> Path:
        if is_prepared(self, root):
            return store_path(self, root)
        total = self.num_train + self.num_val + self.num_test
        return write_store(
            self, root, self._paragraphs(num_workers), total=total, progress=progress
        )

    def length(self, generator: np.random.Generator) -> int:
        """Return a number of characters whose mean is `mean_characters`."""
        low, high = self.min_characters, self.max_characters
        share = np.clip((self.mean_characters - low) / (high - low), 0.01, 0.99)
        # a beta distribution has this mean; 5 makes a hump with both ends in reach
        return round(low + (high - low) * generator.beta(5 * share, 5 * (1 - share)))

    def _paragraphs(self, num_workers: int) -> Iterator[PackedParagraph]:
        counts = (self.num_train, self.num_val, self.num_test)
        places = [
            Place(split, index)
            for split, count in zip(SPLITS, counts, strict=True)
            for index in range(count)
        ]
        made = in_order(partial(_make, self), places, num_workers=num_workers)
        seen: set[str] = set()
        for place, paragraph in zip(places, made, strict=True):
            for attempt in range(1, _ATTEMPTS):
                if paragraph.text not in seen:
                    break
                paragraph = _make(self, place._replace(attempt=attempt))
            else:
                raise UserError(
                    f"datamodule.num_{place.split}={getattr(self, f'num_{place.split}')} is more than "
                    "there are different texts. Pass fewer, or a greater datamodule.max_characters."
                )
            seen.add(paragraph.text)
            yield paragraph


def _make(corpus: GeneratedCorpus, place: Place) -> PackedParagraph:
    key = [corpus.seed, SPLITS.index(place.split), place.number, place.attempt]
    return pack(_maker(corpus)(np.random.default_rng(key), place.split))


@lru_cache(maxsize=1)  # faces and text are read once a process
def _maker(corpus: GeneratedCorpus) -> Maker:
    return corpus.maker()
