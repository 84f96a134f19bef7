"""New paragraphs out of real lines, stacked while training runs, others in every epoch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from paragraph_ocr.data.augment import Strengths
from paragraph_ocr.data.dataset import Item, ParagraphDataset, augmented
from paragraph_ocr.data.scan import fit
from paragraph_ocr.data.store import Store
from paragraph_ocr.errors import UserError
from paragraph_ocr.vocabulary import Vocabulary

STACKED = -1
"""Row of an item that is in no store."""

_OVERLAP = (0.0, 0.25)
"""Share of a line's box that the next one covers: boxes hold padding, ascenders and descenders."""
_INDENT_PX = 20


@dataclass(frozen=True, slots=True)
class Stacking:
    """What paragraphs are stacked, from the lines that lie in a store beside its paragraphs."""

    canvas: tuple[int, int]
    """Height and width in pixels of the paragraphs; rows of the store on another canvas are lines."""
    num_paragraphs: int
    """In an epoch."""
    max_lines: int
    """Of a paragraph; the least is one."""
    originals: bool
    """Whether the real training paragraphs come too, each once an epoch."""


class StackedDataset(Dataset[Item]):
    """Real paragraphs (maybe none), then stacked ones.

    Positions count on through the epochs: `epoch * len(dataset) + position`. A stacked paragraph is a
    function of seed, epoch and position, whichever process makes it.

    Args:
        originals, lines: rows of the store.
        max_length: tokens that a transcription may have, start and end included; a paragraph that would
            be longer gets fewer lines.

    Raises:
        UserError: no line is short enough.
    """

    def __init__(
        self,
        store: Store,
        vocabulary: Vocabulary,
        stacking: Stacking,
        *,
        originals: Sequence[int],
        lines: Sequence[int],
        max_length: int,
        seed: int,
        augmentation: tuple[Strengths, int] | None = None,
    ) -> None:
        self.store, self.vocabulary, self.stacking = store, vocabulary, stacking
        self.originals = ParagraphDataset(store, originals, vocabulary, augmentation=augmentation)
        self.augmentation = augmentation
        self.max_length, self.seed = max_length, seed
        texts = {row: vocabulary.prepare(store.texts[row]) for row in lines}
        self._texts = {row: text for row, text in texts.items() if len(text) + 2 <= max_length}
        self.lines = list(self._texts)
        if not self.lines:
            raise UserError(
                f"datamodule.max_length={max_length} leaves no training line to stack. Pass a greater one."
            )
        self._length = len(self.originals) + stacking.num_paragraphs

    def __len__(self) -> int:
        return self._length

    @property
    def rows(self) -> list[int]:
        """Rows of the real paragraphs."""
        return self.originals.rows[: self._length]

    def __getitem__(self, index: int) -> Item:
        epoch, position = divmod(index, self._length)
        if position < len(self.originals):
            return self.originals[epoch * len(self.originals) + position]
        item = self._stacked(np.random.default_rng([self.seed, epoch, position]))
        return augmented(item, self.augmentation, key=(epoch, position, 1))

    def _stacked(self, generator: np.random.Generator) -> Item:
        most = min(self.stacking.max_lines, len(self.lines))
        count = int(generator.integers(1, most + 1))
        rows = [self.lines[place] for place in generator.choice(len(self.lines), count, False)]
        length = np.cumsum([len(self._texts[row]) + 1 for row in rows])  # each with a newline
        rows = rows[: max(1, int(np.searchsorted(length, self.max_length - 1, side="right")))]
        sheet = stack([self._line(row) for row in rows], generator)
        height, width = self.stacking.canvas
        sheet = fit(sheet, height=height, width=width)
        padding = ((0, height - sheet.shape[0]), (0, width - sheet.shape[1]))
        tokens = self.vocabulary.encode("\n".join(self._texts[row] for row in rows))
        size = sheet.shape[0], sheet.shape[1]
        return Item(np.pad(sheet, padding), tokens, size, STACKED)

    def _line(self, row: int) -> np.ndarray:
        height, width = self.store.sizes[row]
        return self.store.image(row)[:height, :width]


def stack(lines: Sequence[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """Return the lines, uint8 ink, one under the other on a sheet as large as they need.

    At random: how much they overlap, and how far each begins from the left.
    """
    overlap = generator.uniform(*_OVERLAP)
    lefts = generator.integers(_INDENT_PX + 1, size=len(lines)).tolist()
    tops, top = [], 0
    for line in lines:
        tops.append(top)
        top += max(1, round((1 - overlap) * line.shape[0]))
    placed = list(zip(lines, tops, lefts, strict=True))
    height = max(top + line.shape[0] for line, top, _ in placed)
    width = max(left + line.shape[1] for line, _, left in placed)
    sheet = np.zeros((height, width), np.uint8)
    for line, top, left in placed:
        part = sheet[top : top + line.shape[0], left : left + line.shape[1]]
        np.maximum(part, line, out=part)
    return sheet
