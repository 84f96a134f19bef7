"""A trained model and everything it needs to read: load it, give it images, take the text.

    recognizer = Recognizer.load("outputs/runs/<run>")
    print(recognizer.read("note.jpg").text)

Nothing of Lightning, Hydra, Optuna or MLflow is imported here.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from paragraph_ocr.build_model import (
    build_decoding,
    build_recognizer,
    load_weights,
    vocabulary_from,
)
from paragraph_ocr.config import Experiment, TransformerModel
from paragraph_ocr.data.parallel import cores
from paragraph_ocr.errors import UserError
from paragraph_ocr.model.generate import Beam, Greedy, Reading
from paragraph_ocr.model.reader import Reader
from paragraph_ocr.model.vote import Vote
from paragraph_ocr.reading.checkpoint import find_checkpoint
from paragraph_ocr.reading.page import Picture, Prepared, prepare, transcribe
from paragraph_ocr.reading.transcript import Refusal, Transcript
from paragraph_ocr.stored import read_config
from paragraph_ocr.vocabulary import Vocabulary

__all__ = ["Recognizer", "Refusal", "Transcript"]

BATCH_SIZE = 16
_THREADS = 4  # that prepare images while the model reads

_INK = 64  # grey level from which a pixel counts as ink
_BELOW = 0.03
"""Paper that a lower canvas leaves below the ink at least, as a share of the model's own: pages keep such a
margin where there is room."""


class Recognizer:
    """A model in evaluation mode, with its vocabulary, canvas and way of decoding.

    Attributes:
        canvas: height and width in pixels that pages are fitted to.
        heights: of lower canvases in pixels, rising, on which pages are read whose ink ends so early.
        normalise: whether pages are made to look like rendered ones first.
        max_length: tokens that a reading may have, start and end included.
        precision: what is computed in: bfloat16 on a device that has it, else float32.
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
        self.decoding: Greedy | Beam | Vote = build_decoding(experiment, vocabulary)
        self.max_length = experiment.datamodule.max_length
        self.canvas = (experiment.datamodule.height, experiment.datamodule.width)
        self.heights = [*experiment.decoding.heights]
        self.normalise = experiment.datamodule.normalise
        self.precision = torch.bfloat16 if computes_in_bfloat16(self.device) else torch.float32

    @classmethod
    def load(
        cls, path: str | Path, *, device: str = "auto", outputs: Path = Path("outputs")
    ) -> "Recognizer":
        """Return the model of a run folder, an MLflow run or a release; see `find_checkpoint`.

        Args:
            device: auto (a GPU if there is one), cpu, cuda or cuda:<number>.
            outputs: see `find_checkpoint`.

        Raises:
            UserError: there is no such model or device, or the files are damaged.
        """
        chosen = _device(device)
        checkpoint = find_checkpoint(path, outputs=outputs)
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

        As by datamodule=folder: ink on paper, upright, whole, on the canvas.

        Raises:
            UserError: it is no image, or too large.
        """
        page = prepare(image, self.canvas, normalise=self.normalise)
        return torch.from_numpy(page.canvas)[None], page.size

    def read(self, image: Picture) -> Transcript:
        """Return the reading of one image.

        Raises:
            UserError: it is no image, or too large.
        """
        return self.read_batch([image])[0]

    def read_batch(self, images: Sequence[Picture]) -> list[Transcript]:
        """Return the readings of a few images, computed together.

        Raises:
            UserError: one is no image, or too large.
        """
        return self._read(
            [prepare(image, self.canvas, normalise=self.normalise) for image in images]
        )

    def read_all(
        self, images: Iterable[Picture], *, batch_size: int = BATCH_SIZE
    ) -> Iterator[Transcript | Refusal]:
        """Yield a reading of each image in order, or a refusal of what cannot be read.

        Images are taken from their iterator, and prepared by a few threads, two batches ahead of the one
        that the model reads.
        """
        remaining = iter(images)
        waiting: deque[Future[Prepared | Refusal]] = deque()
        threads = ThreadPoolExecutor(min(_THREADS, cores()))
        try:
            while True:
                while len(waiting) < 3 * batch_size:
                    try:
                        image = next(remaining)
                    except StopIteration:
                        break
                    waiting.append(threads.submit(self._page_or_refusal, image))
                if not waiting:
                    return
                count = min(batch_size, len(waiting))
                batch = [waiting.popleft().result() for _ in range(count)]
                read = iter(self._read([page for page in batch if isinstance(page, Prepared)]))
                for page in batch:
                    yield page if isinstance(page, Refusal) else next(read)
        finally:
            threads.shutdown(wait=True, cancel_futures=True)

    def read_pages(
        self, pages: UInt8[Tensor, "B 1 H W"], sizes: Int[Tensor, "B 2"] | None = None
    ) -> list[Transcript]:
        """Return the readings of pages that are on their canvas already, as in a `Batch`."""
        covered = [pages.shape[2:]] * len(pages) if sizes is None else sizes.tolist()
        prepared = [
            Prepared(page[0].cpu().numpy(), (height, width), "", (height, width), np.eye(2, 3))
            for page, (height, width) in zip(pages, covered, strict=True)
        ]
        return self._transcripts(self.readings(pages, sizes), prepared)

    def _page_or_refusal(self, image: Picture) -> Prepared | Refusal:
        try:
            return prepare(image, self.canvas, normalise=self.normalise)
        except UserError as error:
            return Refusal(str(image) if isinstance(image, str | Path) else "", str(error))

    def _read(self, pages: Sequence[Prepared]) -> list[Transcript]:
        if not pages:
            return []
        canvases = torch.from_numpy(np.stack([page.canvas for page in pages]))[:, None]
        filled = all(page.size == self.canvas for page in pages)
        sizes = None if filled else torch.tensor([page.size for page in pages])
        return self._transcripts(self.readings(canvases, sizes), pages)

    def readings(
        self, pages: UInt8[Tensor, "B 1 H W"], sizes: Int[Tensor, "B 2"] | None = None
    ) -> list[Reading]:
        """Return what the model alone makes of pages that are on their canvas: tokens, no text.

        How high a canvas a page is read on does not depend on those beside it.
        """
        heights = self.lowest(pages)
        read: dict[int, Reading] = {}
        for height in {*heights}:
            rows = [row for row, lowest in enumerate(heights) if lowest == height]
            covered = sizes
            if sizes is not None:
                covered = sizes[rows].minimum(sizes.new_tensor([height, pages.shape[3]]))
            read |= zip(rows, self._read_on_canvas(pages[rows, :, :height], covered), strict=True)
        return [read[row] for row in range(len(pages))]

    def lowest(self, pages: UInt8[Tensor, "B 1 H W"]) -> list[int]:
        """Return the height of the lowest canvas that holds each page's ink."""
        whole = pages.shape[2]
        if not self.heights:
            return [whole] * len(pages)
        rows = torch.arange(1, whole + 1, device=pages.device)
        ends = ((pages[:, 0] >= _INK).any(dim=2) * rows).amax(dim=1) + round(_BELOW * whole)
        return [next((h for h in self.heights if end <= h < whole), whole) for end in ends.tolist()]

    def _read_on_canvas(
        self, pages: UInt8[Tensor, "B 1 H W"], sizes: Int[Tensor, "B 2"] | None
    ) -> list[Reading]:
        half, decoding = self.precision is not torch.float32, self.decoding
        if isinstance(decoding, Vote) and self.heights:
            decoding = replace(decoding, canvas=(pages.shape[2], pages.shape[3]))
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, self.precision if half else None, enabled=half),
        ):
            return self.model.read(
                pages.to(self.device),
                None if sizes is None else sizes.to(self.device),
                decoding=decoding,
                max_length=self.max_length,
            )

    def _transcripts(
        self, readings: Sequence[Reading], pages: Sequence[Prepared]
    ) -> list[Transcript]:
        return [
            transcribe(
                reading.tokens, reading.confidences, reading.log_probability, page, self.vocabulary
            )
            for reading, page in zip(readings, pages, strict=True)
        ]


def computes_in_bfloat16(device: torch.device) -> bool:
    """Return whether the device's own instructions do; others would emulate them, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.9
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


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
