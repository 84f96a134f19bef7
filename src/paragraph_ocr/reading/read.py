"""A trained model and everything it needs to read: load it, give it images, take the text.

    recognizer = Recognizer.load("outputs/runs/<run>")
    print(recognizer.read("note.jpg").text)

Nothing of Lightning, Hydra, Optuna or MLflow is imported here.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from paragraph_ocr.build_model import (
    build_decoding,
    build_recognizer,
    load_weights,
    vocabulary_from,
)
from paragraph_ocr.config import Experiment, TransformerModel
from paragraph_ocr.data.scan import fit, ink, read_grey
from paragraph_ocr.errors import UserError
from paragraph_ocr.model.generate import Beam, Greedy, Reading
from paragraph_ocr.model.reader import Reader
from paragraph_ocr.reading.checkpoint import find_checkpoint
from paragraph_ocr.reading.transcript import Character, Refusal, Transcript, split_lines
from paragraph_ocr.stored import read_config
from paragraph_ocr.vocabulary import SPECIAL_TOKENS, Vocabulary

__all__ = ["Recognizer", "Refusal", "Transcript"]

Picture = str | Path | Image.Image | np.ndarray
"""A file, an image of Pillow's, or an array: uint8 or uint16 (H, W), uint8 (H, W, 3) or (H, W, 4)."""

BATCH_SIZE = 16
_THREADS = 4  # that prepare images while the model reads


@dataclass(frozen=True, slots=True)
class _Page:
    """An image made ready."""

    canvas: UInt8[Tensor, "1 H W"]
    size: tuple[int, int]
    source: str
    source_size: tuple[int, int]


class Recognizer:
    """A model in evaluation mode, with its vocabulary, canvas and way of decoding.

    Attributes:
        canvas: height and width in pixels that pages are fitted to.
        max_length: tokens that a reading may have, start and end included.
    """

    def __init__(
        self,
        model: Reader,
        vocabulary: Vocabulary,
        experiment: Experiment,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.vocabulary, self.experiment = vocabulary, experiment
        self.decoding: Greedy | Beam = build_decoding(experiment)
        self.max_length = experiment.datamodule.max_length
        self.canvas = (experiment.datamodule.height, experiment.datamodule.width)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto") -> "Recognizer":
        """Return the model of a run folder, an MLflow run or a release; see `find_checkpoint`.

        Args:
            device: auto (a GPU if there is one), cpu, cuda or cuda:<number>.

        Raises:
            UserError: there is no such model or device, or the files are damaged.
        """
        chosen = _device(device)
        checkpoint = find_checkpoint(path)
        experiment = read_config(checkpoint.config)
        # its own weights come next, so those it started from need not be here any more
        experiment.model.weights = None
        if isinstance(experiment.model, TransformerModel):
            experiment.model.encoder.pretrained = False
        if experiment.vocabulary.characters is None:
            raise UserError(
                f"{checkpoint.config}: vocabulary.characters has no value. Pass a finished run."
            )
        vocabulary = vocabulary_from(experiment.vocabulary)
        model = build_recognizer(experiment, vocabulary)
        try:
            load_weights(model, checkpoint.weights)
        except UserError as error:
            said = [line.strip() for line in str(error.__cause__).splitlines()]
            raise UserError(
                f"checkpoint={path}: {checkpoint.weights.name} is damaged or belongs to another model "
                f"({' '.join(said[:2])[:160]}). Pass another run."
            ) from error
        return cls(model, vocabulary, experiment, device=chosen)

    def page(self, image: Picture) -> tuple[UInt8[Tensor, "1 H W"], tuple[int, int]]:
        """Return the image as the model sees it, and the height and width that it covers.

        Cleaned and scaled as by datamodule=folder: ink on paper, upright, whole, on the canvas.

        Raises:
            UserError: it is no image, or too large.
        """
        page = self._page(image)
        return page.canvas, page.size

    def read(self, image: Picture) -> Transcript:
        """Return the reading of one image.

        Raises:
            UserError: it is no image, or too large.
        """
        return self._read([self._page(image)])[0]

    def read_all(
        self, images: Iterable[Picture], *, batch_size: int = BATCH_SIZE
    ) -> Iterator[Transcript | Refusal]:
        """Yield a reading of each image in order, or a refusal of what cannot be read.

        Images are taken from their iterator, and prepared by a few threads, two batches ahead.
        """
        remaining = iter(images)
        waiting: deque[Future[_Page | Refusal]] = deque()
        threads = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
        try:
            while True:
                while len(waiting) < 2 * batch_size:
                    try:
                        image = next(remaining)
                    except StopIteration:
                        break
                    waiting.append(threads.submit(self._page_or_refusal, image))
                if not waiting:
                    return
                count = min(batch_size, len(waiting))
                batch = [waiting.popleft().result() for _ in range(count)]
                read = iter(self._read([page for page in batch if isinstance(page, _Page)]))
                for page in batch:
                    yield page if isinstance(page, Refusal) else next(read)
        finally:
            threads.shutdown(wait=True, cancel_futures=True)

    def read_pages(
        self, pages: UInt8[Tensor, "B 1 H W"], sizes: Int[Tensor, "B 2"] | None = None
    ) -> list[Transcript]:
        """Return the readings of pages that are on their canvas already, as in a `Batch`."""
        readings = self._readings(pages, sizes)
        covered = [pages.shape[2:]] * len(pages) if sizes is None else sizes.tolist()
        return [
            self._transcript(reading, canvas, (int(height), int(width)))
            for reading, canvas, (height, width) in zip(readings, pages, covered, strict=True)
        ]

    def _page(self, image: Picture) -> _Page:
        source = str(image) if isinstance(image, str | Path) else ""
        file = Path(image) if isinstance(image, str) else image
        if isinstance(file, np.ndarray):
            file = _from_array(file)
        grey = read_grey(file, where=source or "the image")
        height, width = self.canvas
        page = fit(ink(grey), height=height, width=width)
        canvas = torch.zeros(1, height, width, dtype=torch.uint8)
        canvas[0, : page.shape[0], : page.shape[1]] = torch.from_numpy(page)
        return _Page(canvas, page.shape, source, grey.shape)

    def _page_or_refusal(self, image: Picture) -> _Page | Refusal:
        try:
            return self._page(image)
        except UserError as error:
            return Refusal(str(image) if isinstance(image, str | Path) else "", str(error))

    def _read(self, pages: Sequence[_Page]) -> list[Transcript]:
        if not pages:
            return []
        canvases = torch.stack([page.canvas for page in pages])
        filled = all(page.size == self.canvas for page in pages)
        sizes = None if filled else torch.tensor([page.size for page in pages])
        return [
            replace(
                self._transcript(reading, page.canvas, page.size, source_size=page.source_size),
                source=page.source,
            )
            for reading, page in zip(self._readings(canvases, sizes), pages, strict=True)
        ]

    def _readings(self, pages: Tensor, sizes: Tensor | None) -> list[Reading]:
        with torch.inference_mode():
            return self.model.read(
                pages.to(self.device),
                None if sizes is None else sizes.to(self.device),
                decoding=self.decoding,
                max_length=self.max_length,
            )

    def _transcript(
        self,
        reading: Reading,
        canvas: Tensor,
        size: tuple[int, int],
        *,
        source_size: tuple[int, int] | None = None,
    ) -> Transcript:
        characters = tuple(
            Character(self.vocabulary.tokens[token], min(1.0, confidence))
            for token, confidence in zip(reading.tokens, reading.confidences, strict=True)
            if token >= len(SPECIAL_TOKENS)
        )
        page = canvas[0, : size[0], : size[1]].cpu().numpy()
        full = source_size or size
        lines = split_lines(characters, page, size=full)
        return Transcript("", full, characters, reading.log_probability, lines)


def _from_array(array: np.ndarray) -> Image.Image:
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    colour = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if not (grey or colour) or 0 in array.shape:
        raise UserError(
            f"an array of {array.dtype} {array.shape} is no image. "
            "Give uint8 of (height, width) or (height, width, 3)."
        )
    return Image.fromarray(array)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name} is not one of auto, cpu, cuda, cuda:<n>. Pass device=auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={name} is not here: torch finds {torch.cuda.device_count()} GPUs. "
            "Pass device=auto."
        )
    return device
