"""Paragraphs unpacked once and kept in memory, this host's or the card's, where batches are gathered."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paragraph_ocr.batch import Batch
from paragraph_ocr.data.dataset import (
    TO_LONGEST,
    HeldDataset,
    Item,
    LabelPadding,
    ParagraphDataset,
)
from paragraph_ocr.data.parallel import cores
from paragraph_ocr.errors import UserError
from paragraph_ocr.vocabulary import Vocabulary

_HOST_SHARE, _CARD_SHARE = 0.8, 0.5
"""Of the free memory that pages may take; on a card the rest is the training's."""

_READ_TOGETHER = 64  # items
_THREADS = 4


class PlacedDataset(Dataset[Batch]):
    """The batches that `collate` would make of a dataset's items, gathered on a device.

    Made by reading every item once. Takes positions as the dataset does, a batch of them at a time.

    Args:
        device: None is this host's memory.
        pinned: a batch on the host lies in page-locked memory, from which a GPU fetches it by itself.
    """

    def __init__(
        self,
        dataset: ParagraphDataset | HeldDataset,
        *,
        device: torch.device | None,
        pinned: bool = False,
        padding: LabelPadding = TO_LONGEST,
    ) -> None:
        self._on_host, self._pinned, self._padding = device is None, pinned, padding
        self.device = device = device or torch.device("cpu")
        self._canvases = sorted({dataset.store.canvas(row) for row in dataset.rows})
        canvas_of = [self._canvases.index(dataset.store.canvas(row)) for row in dataset.rows]
        self._canvas_of = np.array(canvas_of)
        self._place = np.zeros(len(dataset), int)  # of each item among the pages on its canvas
        for index in range(len(self._canvases)):
            on_it = self._canvas_of == index
            self._place[on_it] = np.arange(on_it.sum())
        self._pages = [
            torch.empty(canvas_of.count(index), *canvas, dtype=torch.uint8, device=device)
            for index, canvas in enumerate(self._canvases)
        ]
        labels: list[list[int]] = []
        letters: list[np.ndarray | None] = []
        sizes: list[tuple[int, int]] = []
        rows: list[int] = []
        for items in _read_together(dataset):
            here = slice(len(rows), len(rows) + len(items))
            for index in set(self._canvas_of[here].tolist()):
                chosen = np.flatnonzero(self._canvas_of[here] == index)
                first = int(self._place[here][chosen[0]])
                # one copy instead of many, each of which would wait for a card
                together = torch.from_numpy(np.stack([items[i].image for i in chosen]))
                self._pages[index][first : first + len(chosen)].copy_(together)
            labels += [item.tokens for item in items]
            letters += [item.letters for item in items]
            sizes += [item.size for item in items]
            rows += [item.row for item in items]
        self._lengths, self._sizes = np.array([*map(len, labels)]), np.array(sizes)
        longest = padding.length(int(self._lengths.max()))
        tokens = np.full((len(labels), longest), Vocabulary.pad, np.int32)
        for label, padded in zip(labels, tokens, strict=True):
            padded[: len(label)] = label
        self._tokens = torch.from_numpy(tokens).to(device)
        self._letters = _placed(letters, longest, device)
        self._sizes_there = torch.from_numpy(self._sizes).to(device)
        self._rows = torch.tensor(rows).to(device)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, positions: Sequence[int]) -> Batch:
        items = np.asarray(positions) % len(self)  # positions count on through the epochs
        index = self._there(items)
        images = self._images(items)
        filled = bool((self._sizes[items] == images.shape[2:]).all())
        length = self._padding.length(int(self._lengths[items].max()))
        letters = self._letters
        return Batch(
            images,
            self._tokens[:, :length].index_select(0, index).long(),
            None if filled else self._sizes_there.index_select(0, index),
            self._rows.index_select(0, index),
            None if letters is None else letters[:, :length].index_select(0, index).float(),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the pages."""
        return sum(pages.numel() for pages in self._pages)

    def _images(self, items: np.ndarray) -> Tensor:
        """Return the items' pages, "B 1 H W"; smaller canvases lie at the top left of the largest."""
        used = sorted({*self._canvas_of[items].tolist()})
        height, width = np.max([self._canvases[canvas] for canvas in used], axis=0).tolist()
        make = torch.empty if len(used) == 1 else torch.zeros
        shape = (len(items), 1, height, width)
        images = make(shape, dtype=torch.uint8, device=self.device, pin_memory=self._pinned)
        for canvas in used:
            chosen = np.flatnonzero(self._canvas_of[items] == canvas)
            if len(used) == 1:
                self._gather(canvas, items, images[:, 0])
            else:
                height, width = self._canvases[canvas]
                pages = images.new_empty(len(chosen), height, width)
                self._gather(canvas, items[chosen], pages)
                images[self._there(chosen), 0, :height, :width] = pages
        return images

    def _gather(self, canvas: int, items: np.ndarray, into: Tensor) -> None:
        """Copy the pages of items on one canvas."""
        places, pages = self._place[items], self._pages[canvas]
        if (
            self._on_host
        ):  # on a busy host torch's threads wait for one another longer than they copy
            np.take(pages.numpy(), places, axis=0, out=into.numpy(), mode="clip")
        else:
            torch.index_select(pages, 0, self._there(places), out=into)

    def _there(self, index: np.ndarray) -> Tensor:
        """Return an index on the device, without waiting for what the device is doing."""
        index_here = torch.from_numpy(index)
        if self.device.type != "cuda":
            return index_here
        return index_here.pin_memory().to(self.device, non_blocking=True)


def _placed(
    letters: Sequence[np.ndarray | None], length: int, device: torch.device
) -> Tensor | None:
    """Return the places of all letters, "items L 2", in 16 bits, which have every quarter of a pixel up to
    512 and every pixel up to 2,048; None if none are known."""
    if all(each is None for each in letters):
        return None
    together = np.full((len(letters), length, 2), np.nan, np.float16)
    for each, places in zip(letters, together, strict=True):
        if each is not None:
            places[: len(each)] = each
    return torch.from_numpy(together).to(device)


def require_room(
    datasets: Iterable[ParagraphDataset | HeldDataset],
    *,
    device: torch.device | None,
    placement: str,
    processes: int = 1,
) -> None:
    """Check that unpacked pages fit into a device's free memory, with room left for the training.

    Args:
        device: None is this host's memory.
        placement: what the user chose, to name it.
        processes: how many of this host will each hold all the pages.

    Raises:
        UserError: they do not.
    """
    pages = sum(prod(dataset.store.canvas(row)) for dataset in datasets for row in dataset.rows)
    if device is not None and device.type == "cuda":
        room, place, instead = torch.cuda.mem_get_info(device)[0] * _CARD_SHARE, str(device), "host"
    else:
        room, place, instead = free_bytes() * _HOST_SHARE / processes, "this host", "disk"
    if pages > room:
        raise UserError(
            f"datamodule.placement={placement} needs {pages / 1e9:.2f} GB for pages, and {place} has "
            f"{room / 1e9:.2f} GB to spare{f' for each of {processes} processes' * (processes > 1)}. "
            f"Pass datamodule.placement={instead}."
        )


def free_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how much memory this host gives to new data; a container may have less than there is."""
    free = psutil.virtual_memory().available
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return min(free, max(0, limit - used + int(stat.get("inactive_file", 0))))


def _read_together(dataset: ParagraphDataset | HeldDataset) -> Iterator[list[Item]]:
    """Yield the items in order, some at a time, unpacked by threads: zlib lets go of Python meanwhile.

    Each thread takes many in a row: threads that pass Python on at every item are slower than one.
    """

    def read(start: int) -> list[Item]:
        return [dataset[i] for i in range(start, min(start + _READ_TOGETHER, len(dataset)))]

    reading: deque[Future[list[Item]]] = deque()
    with ThreadPoolExecutor(min(_THREADS, cores())) as threads:
        for start in range(0, len(dataset), _READ_TOGETHER):
            reading.append(threads.submit(read, start))
            if len(reading) > 2 * _THREADS:  # no more than wait beside their copies
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()
