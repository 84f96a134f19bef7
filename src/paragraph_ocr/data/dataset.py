"""Rows of a store as items, and items as batches."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from paragraph_ocr.batch import Batch
from paragraph_ocr.data.augment import Strengths
from paragraph_ocr.data.augment_page import augment_page
from paragraph_ocr.data.store import Store
from paragraph_ocr.vocabulary import Vocabulary


class Item(NamedTuple):
    """One paragraph: canvas "H W", token ids, true height and width, row in the store."""

    image: np.ndarray
    tokens: list[int]
    size: tuple[int, int]
    row: int


class ParagraphDataset(Dataset[Item]):
    """Some rows of a store, in the order given, over and over: len(dataset) after a position is the
    same paragraph in the next epoch.

    Args:
        augmentation: strengths and seed. The page of a row depends on seed, epoch and row alone.
        hold: keep what was read once in memory, for a few rows that are wanted again and again as
            they are.
    """

    def __init__(
        self,
        store: Store,
        rows: Sequence[int],
        vocabulary: Vocabulary,
        *,
        augmentation: tuple[Strengths, int] | None = None,
        hold: bool = False,
    ) -> None:
        if hold and augmentation is not None:
            raise ValueError("what is held is the same in every epoch, and so not augmented")
        self.store, self.rows, self.vocabulary = store, list(map(int, rows)), vocabulary
        self.augmentation, self.hold = augmentation, hold
        self._held: dict[int, Item] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        epoch, position = divmod(index, len(self))
        if position not in self._held:
            item = self._read(epoch, position)
            if not self.hold:
                return item
            self._held[position] = item
        return self._held[position]

    def _read(self, epoch: int, position: int) -> Item:
        row = self.rows[position]
        height, width = map(int, self.store.sizes[row])
        tokens = self.vocabulary.encode(self.vocabulary.prepare(self.store.texts[row]))
        image = self.store.image(row)
        if self.augmentation is not None:
            strengths, seed = self.augmentation
            page, image = image[:height, :width], np.zeros_like(image)
            generator = np.random.default_rng([seed, epoch, row])
            image[:height, :width] = augment_page(page, strengths, generator)
        return Item(image, tokens, (height, width), row)


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
