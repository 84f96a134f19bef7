"""Rows of a store as items, and items as batches."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from paragraph_ocr.batch import Batch
from paragraph_ocr.data.store import Store
from paragraph_ocr.vocabulary import Vocabulary


class Item(NamedTuple):
    """One paragraph: canvas "H W", token ids, true height and width, row in the store (-1: in none)."""

    image: np.ndarray
    tokens: list[int]
    size: tuple[int, int]
    row: int


class ParagraphDataset(Dataset[Item]):
    """Some rows of a store, in the order given.

    Args:
        hold: keep what was read once in memory, for a few rows that are wanted again and again.
    """

    def __init__(
        self, store: Store, rows: Sequence[int], vocabulary: Vocabulary, *, hold: bool = False
    ) -> None:
        self.store, self.rows, self.vocabulary = store, list(map(int, rows)), vocabulary
        self.hold = hold
        self._held: dict[int, Item] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, count: int) -> "ParagraphDataset":
        """Return the first paragraphs alone, held in memory once read: they are to be memorised."""
        return ParagraphDataset(self.store, self.rows[:count], self.vocabulary, hold=True)

    def __getitem__(self, index: int) -> Item:
        if index not in self._held:
            item = self._read(index)
            if not self.hold:
                return item
            self._held[index] = item
        return self._held[index]

    def _read(self, index: int) -> Item:
        row = self.rows[index]
        height, width = map(int, self.store.sizes[row])
        tokens = self.vocabulary.encode(self.vocabulary.prepare(self.store.texts[row]))
        return Item(self.store.image(row), tokens, (height, width), row)


def collate(items: Sequence[Item], *, pad: int = Vocabulary.pad) -> Batch:
    """Return the items as one batch: labels as long as the longest, canvases as large as the largest."""
    height = max(item.image.shape[0] for item in items)
    width = max(item.image.shape[1] for item in items)
    length = max(len(item.tokens) for item in items)
    images = torch.zeros(len(items), 1, height, width, dtype=torch.uint8)
    tokens = torch.full((len(items), length), pad)
    for index, item in enumerate(items):
        images[index, 0, : item.image.shape[0], : item.image.shape[1]] = torch.from_numpy(
            item.image
        )
        tokens[index, : len(item.tokens)] = torch.tensor(item.tokens)
    sizes = torch.tensor([item.size for item in items])
    filled = bool((sizes == torch.tensor([height, width])).all())
    rows = torch.tensor([item.row for item in items])
    return Batch(images, tokens, None if filled else sizes, rows)
