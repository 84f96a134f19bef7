"""Paragraph: what any corpus produces and a store holds."""

from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Paragraph:
    """One image and its transcription."""

    image: np.ndarray
    """uint8 (H, W): 0 is paper, 255 is ink."""
    text: str
    """Transcription, lines parted by a newline."""
    split: str
    """One of SPLITS."""
    source: str
    """Where it comes from: a face, the name of a scan."""
    writer: str
    """Whose hand; paragraphs of one writer share it."""
    letters: np.ndarray | None = None
    """int16 (n, 2): x and y in pixels of the middle of each character that is no white space, in their order;
    None where nobody knows."""
