"""Rows of a store as items, and items as batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from paragraph_ocr.batch import Batch
from paragraph_ocr.data.augment import Strengths
from paragraph_ocr.data.augment_page import augment_with_letters
from paragraph_ocr.data.store import Store
from paragraph_ocr.vocabulary import Vocabulary


class Item(NamedTuple):
    """One paragraph: canvas "H W", token ids, true height and width, row in the store (-1: in none)."""

    image: np.ndarray
    tokens: list[int]
    size: tuple[int, int]
    row: int
    letters: np.ndarray | None = None
    """float32 (tokens, 2): x and y in pixels of the middle of each token's ink, NaN where there is none or
    nobody knows; None if that holds for the whole store."""


class ParagraphDataset(Dataset[Item]):
    """Some rows of a store, in the order given, over and over: len(dataset) after a position is the
    same paragraph in the next epoch.

    Args:
        augmentation: strengths and seed. The page of a row depends on seed, epoch and row alone.
    """

    def __init__(
        self,
        store: Store,
        rows: Sequence[int],
        vocabulary: Vocabulary,
        *,
        augmentation: tuple[Strengths, int] | None = None,
    ) -> None:
        self.store, self.rows, self.vocabulary = store, list(map(int, rows)), vocabulary
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        epoch, position = divmod(index, len(self))
        row = self.rows[position]
        height, width = map(int, self.store.sizes[row])
        text = self.store.texts[row]
        prepared = self.vocabulary.prepare(text)
        tokens = self.vocabulary.encode(prepared)
        letters = self.store.letters(row)
        if letters is not None:
            letters = _by_token(letters if prepared == text else letters[:0], text, len(tokens))
        item = Item(self.store.image(row), tokens, (height, width), row, letters)
        return augmented(item, self.augmentation, key=(epoch, row))


def _by_token(letters: np.ndarray, text: str, num_tokens: int) -> np.ndarray:
    """Return the places of a text's letters, if there are any, as those of its tokens, from the start on."""
    places = np.full((num_tokens, 2), np.nan, np.float32)
    if len(letters):
        inked = [not character.isspace() for character in text]
        places[1 + np.flatnonzero(inked)] = letters
    return places


def augmented(
    item: Item, augmentation: tuple[Strengths, int] | None, *, key: tuple[int, ...]
) -> Item:
    """Return the item with its page changed as seed and key decide; the canvas beyond it stays paper."""
    if augmentation is None:
        return item
    strengths, seed = augmentation
    height, width = item.size
    canvas = np.zeros_like(item.image)
    generator = np.random.default_rng([seed, *key])
    page, letters = augment_with_letters(
        item.image[:height, :width], item.letters, strengths, generator
    )
    canvas[:height, :width] = page
    return item._replace(image=canvas, letters=letters)


class HeldDataset(Dataset[Item]):
    """The first paragraphs of a dataset's first epoch, over and over, kept in memory once read."""

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset, self.store = dataset, dataset.store
        self.rows: list[int] = dataset.rows[:count]
        self._length = min(count, len(dataset))
        self._items: dict[int, Item] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        position = index % self._length
        if position not in self._items:
            self._items[position] = self.dataset[position]
        return self._items[position]


@dataclass(frozen=True, slots=True)
class LabelPadding:
    """How many tokens the labels of a batch have: as its longest, rounded up to a multiple.

    `most` stands for a multiple too, whatever it is: a model has no positions beyond it.
    """

    multiple: int = 1
    most: int | None = None

    def length(self, longest: int) -> int:
        rounded = -(-longest // self.multiple) * self.multiple
        return rounded if self.most is None else max(longest, min(rounded, self.most))


TO_LONGEST = LabelPadding()


class BatchDataset(Dataset[Batch]):
    """Batches of a dataset's items, each made from a list of positions."""

    def __init__(self, dataset: Dataset[Item], *, padding: LabelPadding = TO_LONGEST) -> None:
        self.dataset, self.padding = dataset, padding

    def __getitem__(self, positions: Sequence[int]) -> Batch:
        return collate([self.dataset[position] for position in positions], padding=self.padding)


def collate(items: Sequence[Item], *, padding: LabelPadding = TO_LONGEST) -> Batch:
    """Return the items as one batch: labels padded to one length, canvases as large as the largest."""
    height = max(item.image.shape[0] for item in items)
    width = max(item.image.shape[1] for item in items)
    length = padding.length(max(len(item.tokens) for item in items))
    images = torch.zeros(len(items), 1, height, width, dtype=torch.uint8)
    tokens = torch.full((len(items), length), Vocabulary.pad)
    pages, labels = images.numpy(), tokens.numpy()  # torch would start its threads for each row
    for index, item in enumerate(items):
        pages[index, 0, : item.image.shape[0], : item.image.shape[1]] = item.image
        labels[index, : len(item.tokens)] = item.tokens
    sizes = torch.tensor([item.size for item in items])
    filled = bool((sizes == torch.tensor([height, width])).all())
    rows = torch.tensor([item.row for item in items])
    return Batch(images, tokens, None if filled else sizes, rows, _letters(items, length))


def _letters(items: Sequence[Item], length: int) -> torch.Tensor | None:
    """Return the places of the items' letters, "B L 2"; None if no item knows them."""
    if all(item.letters is None for item in items):
        return None
    letters = torch.full((len(items), length, 2), torch.nan)
    places = letters.numpy()
    for index, item in enumerate(items):
        if item.letters is not None:
            places[index, : len(item.letters)] = item.letters
    return letters
