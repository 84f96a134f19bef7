"""Reading with onnxruntime and NumPy alone: what `export_onnx` wrote, and no torch.

recognizer = OnnxRecognizer.load("exported")
print(recognizer.read("note.jpg").text)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paragraph_ocr.config import Experiment
from paragraph_ocr.errors import UserError
from paragraph_ocr.reading.page import Picture, Prepared, prepare, transcribe
from paragraph_ocr.reading.transcript import Transcript
from paragraph_ocr.stored import CONFIG, read_config
from paragraph_ocr.vocabulary import Vocabulary

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ENCODER, DECODER_STEP = "encoder.onnx", "decoder_step.onnx"
MAX_LENGTH = "max_length"
"""Key of a graph's metadata: for how many tokens it has positions."""


class OnnxRecognizer:
    """Two graphs on the CPU, with the vocabulary and the canvas of the run they were made of.

    Attributes:
        canvas: height and width in pixels that pages are fitted to.
        normalise: whether pages are made to look like rendered ones first.
        max_length: tokens that a reading may have, start and end included; the graphs have positions
            for no more.
    """

    def __init__(
        self, encoder: "InferenceSession", step: "InferenceSession", experiment: Experiment
    ) -> None:
        characters = experiment.vocabulary.characters
        assert characters is not None
        self._encoder, self._step = encoder, step
        self._inputs = [tensor.name for tensor in step.get_inputs()]
        self._outputs = [tensor.name for tensor in step.get_outputs()]
        self.vocabulary = Vocabulary(characters)
        self.experiment = experiment
        self.max_length = experiment.datamodule.max_length
        self.canvas = (experiment.datamodule.height, experiment.datamodule.width)
        self.normalise = experiment.datamodule.normalise

    @classmethod
    def load(cls, folder: str | Path, *, num_threads: int = 0) -> "OnnxRecognizer":
        """Return the exported model of a folder.

        Args:
            num_threads: of onnxruntime; 0 takes a thread for each core.

        Raises:
            UserError: a file is missing or damaged, or onnxruntime is not installed.
        """
        folder = Path(folder)
        for name in (ENCODER, DECODER_STEP, CONFIG):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} holds no {name}. Make it with "
                    f"python scripts/export.py checkpoint=<run folder> folder={folder}."
                )
        experiment = read_config(folder / CONFIG)
        if experiment.vocabulary.characters is None:
            raise UserError(f"{folder / CONFIG} has no vocabulary.characters. Export it again.")
        sessions = [_session(folder / name, num_threads) for name in (ENCODER, DECODER_STEP)]
        positions = int(sessions[1].get_modelmeta().custom_metadata_map.get(MAX_LENGTH, 0))
        if experiment.datamodule.max_length > positions:
            raise UserError(
                f"{folder / CONFIG}: datamodule.max_length={experiment.datamodule.max_length}, and "
                f"{DECODER_STEP} has positions for {positions} tokens. Export it again."
            )
        return cls(sessions[0], sessions[1], experiment)

    def read(self, image: Picture) -> Transcript:
        """Return the reading of one image, greedily.

        Raises:
            UserError: it is no image, or too large.
        """
        return self.read_batch([image])[0]

    def read_batch(self, images: Sequence[Picture]) -> list[Transcript]:
        """Return the readings of a few images, computed together.

        Raises:
            UserError: one is no image, or too large.
        """
        pages = [prepare(image, self.canvas, normalise=self.normalise) for image in images]
        return self._read(pages) if pages else []

    def _read(self, pages: Sequence[Prepared]) -> list[Transcript]:
        canvases = np.stack([page.canvas for page in pages])[:, None]
        sizes = np.array([page.size for page in pages], np.int64)
        return [
            transcribe(tokens, confidences, total, page, self.vocabulary)
            for page, (tokens, confidences, total) in zip(
                pages, self._generate(canvases, sizes), strict=True
            )
        ]

    def _generate(
        self, canvases: np.ndarray, sizes: np.ndarray
    ) -> list[tuple[list[int], list[float], float]]:
        """Return tokens, their confidences, and the log-probability of the whole, for each page."""
        mask, *crosses = self._encoder.run_with_ort_values(
            None, {"images": _value(canvases), "sizes": _value(sizes)}
        )
        shape = list(crosses[0].shape())
        shape[3] = 0
        pasts = [_value(np.zeros(shape, np.float32)) for _ in crosses]
        rows = np.arange(len(canvases))  # still being read
        tokens = np.full(len(canvases), self.vocabulary.start)
        written: list[list[int]] = [[] for _ in rows]
        scores: list[list[float]] = [[] for _ in rows]
        for position in range(self.max_length - 1):
            given = (_value(tokens), _value(np.array([position])), mask, *crosses, *pasts)
            logs, *pasts = self._step.run_with_ort_values(
                self._outputs, dict(zip(self._inputs, given, strict=True))
            )
            log_probabilities = logs.numpy()
            tokens = log_probabilities.argmax(axis=1)
            for row, token, score in zip(rows, tokens, log_probabilities.max(axis=1), strict=True):
                written[row].append(int(token))
                scores[row].append(float(score))
            going = np.flatnonzero(tokens != self.vocabulary.end)
            if len(going) == 0:
                break
            if len(going) < len(rows):
                rows, tokens = rows[going], tokens[going]
                mask = _value(mask.numpy()[going])
                crosses = [_value(value.numpy()[:, going]) for value in crosses]
                pasts = [_value(value.numpy()[:, going]) for value in pasts]
        return [self._reading(*pair) for pair in zip(written, scores, strict=True)]

    def _reading(
        self, tokens: list[int], scores: list[float]
    ) -> tuple[list[int], list[float], float]:
        length = len(tokens) - (tokens[-1] == self.vocabulary.end)
        return tokens[:length], np.exp(scores[:length]).tolist(), sum(scores)


def _session(path: Path, num_threads: int) -> "InferenceSession":
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("onnxruntime is not installed. Type pip install -e '.[onnx]'.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own have no common base
        raise UserError(f"{path} is no graph of this model: {error}. Export it again.") from error


def _value(array: np.ndarray) -> Any:
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
