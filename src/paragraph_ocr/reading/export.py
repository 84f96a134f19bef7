"""A trained model as two ONNX graphs: pages to memory, and one cached step of the decoder."""

import copy
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from paragraph_ocr.config import DecodingConfig
from paragraph_ocr.errors import UserError
from paragraph_ocr.model.transformer import TransformerReader
from paragraph_ocr.reading.onnx import DECODER_STEP, ENCODER, MAX_LENGTH, OnnxRecognizer
from paragraph_ocr.reading.read import Recognizer
from paragraph_ocr.stored import write_config


def export_onnx(recognizer: Recognizer, folder: Path) -> None:
    """Write encoder.onnx, decoder_step.onnx and config.yaml, all that `OnnxRecognizer` needs.

    The canvas is fixed, the number of pages is not. The step's cache grows by a position each time.

    Raises:
        UserError: the model is no Transformer, or the exporter is not installed.
    """
    model = recognizer.model
    if not isinstance(model, TransformerReader):
        raise UserError(
            "to=onnx writes Transformers, and this run's is model=line_cnn, whose windows are read in one "
            "go. Pass to=mlflow."
        )
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).to("cpu")
    height, width = recognizer.canvas
    pages = torch.zeros(2, 1, height, width, dtype=torch.uint8)
    sizes = torch.tensor([[height, width], [height // 2, width // 2]])
    encoder, step = _EncoderGraph(model).eval(), _StepGraph(model).eval()
    with torch.no_grad():
        mask, *crosses = encoder(pages, sizes)
    pasts = [cross[:, :, :, :3] for cross in crosses]
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    names = {
        part: [f"{part}_{layer}" for layer in range(len(crosses))]
        for part in ("cross", "past", "extended")
    }
    _export(
        encoder,
        (pages, sizes),
        folder / ENCODER,
        inputs=["images", "sizes"],
        outputs=["mask", *names["cross"]],
        shapes=({0: batch}, {0: batch}),
        max_length=recognizer.max_length,
    )
    each = len(crosses)
    _export(
        step,
        (torch.tensor([1, 1]), torch.tensor([3]), mask, crosses, pasts),
        folder / DECODER_STEP,
        inputs=["tokens", "position", "mask", *names["cross"], *names["past"]],
        outputs=["log_probabilities", *names["extended"]],
        shapes=(
            {0: batch},
            {},
            {0: batch},
            [{1: batch}] * each,
            [{1: batch, 3: length}] * each,
        ),
        max_length=recognizer.max_length,
    )
    experiment = copy.deepcopy(recognizer.experiment)
    experiment.decoding = DecodingConfig(name="greedy")
    write_config(experiment, folder)


class _EncoderGraph(nn.Module):
    """Everything that is done once a page: encoder, and the keys and values of cross-attention."""

    def __init__(self, model: TransformerReader) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: UInt8[Tensor, "B 1 H W"], sizes: Int[Tensor, "B 2"]
    ) -> tuple[Tensor, ...]:
        """Return the mask "B M" of cells on the page, and for each layer "2 B heads M d"."""
        memory = self.model.encode(images, sizes)
        cache = self.model.decoder.start(memory.states, memory.mask, max_length=0)
        assert memory.mask is not None
        return memory.mask, *cache.crosses


class _StepGraph(nn.Module):
    """One step of the decoder over a cache that is handed in and handed back a position longer."""

    def __init__(self, model: TransformerReader) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self,
        tokens: Int[Tensor, " B"],
        position: Int[Tensor, "1"],
        mask: Bool[Tensor, "B M"],
        crosses: list[Float[Tensor, "2 B heads M d"]],
        pasts: list[Float[Tensor, "2 B heads T d"]],
    ) -> tuple[Tensor, ...]:
        cache = _GrowingCache(crosses, mask[:, None, None], list(pasts), position)
        logits = self.decoder.step(tokens, cache)  # type: ignore[arg-type]
        return logits.log_softmax(dim=-1), *cache.pasts


class _GrowingCache:
    """What `Decoder.step` needs of a cache, without writing in place, which no graph can."""

    sharing = 1

    def __init__(
        self, crosses: list[Tensor], mask: Tensor, pasts: list[Tensor], length: Tensor
    ) -> None:
        self.crosses, self.mask, self.pasts, self.length = crosses, mask, pasts, length

    def extend(self, layer: int, newest: Tensor) -> Tensor:
        self.pasts[layer] = torch.cat([self.pasts[layer], newest], dim=3)
        return self.pasts[layer]


def _export(
    graph: nn.Module,
    example: tuple[object, ...],
    path: Path,
    *,
    inputs: list[str],
    outputs: list[str],
    shapes: tuple[object, ...],
    max_length: int,
) -> None:
    # told of each shared size, and of the operators of a torchvision that is not asked for
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            program = torch.onnx.export(
                graph,
                example,
                dynamo=True,
                verbose=False,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=shapes,
            )
    except ImportError as error:
        raise UserError(
            f"to=onnx needs {error.name or 'onnxscript'}, which is not installed. "
            "Type pip install -e '.[onnx]'."
        ) from error
    assert program is not None
    program.model.metadata_props[MAX_LENGTH] = str(max_length)
    aside = path.with_name(f".{path.name}.part")
    program.save(aside, external_data=False)
    aside.replace(path)


@dataclass(frozen=True, slots=True)
class Comparison:
    """torch and onnxruntime on the same images: seconds a batch (medians), and whether the texts agree."""

    batch_size: int
    torch_s: float
    onnx_s: float
    same: int
    of: int


def compare(
    recognizer: Recognizer,
    exported: OnnxRecognizer,
    images: Sequence[Path],
    *,
    batch_size: int,
    rounds: int = 7,
) -> Comparison:
    """Return how both read the same images, taking turns so that a busy machine slows both alike."""
    batch = images[:batch_size]
    texts, seconds = [], []
    for number in range(rounds + 1):
        began = time.perf_counter()
        first = recognizer.read_batch(batch)
        turned = time.perf_counter()
        second = exported.read_batch(batch)
        ended = time.perf_counter()
        if number:  # the first round warms both up
            seconds.append((turned - began, ended - turned))
        texts = [(a.text, b.text) for a, b in zip(first, second, strict=True)]
    own, other = (median(column) for column in zip(*seconds, strict=True))
    return Comparison(len(batch), own, other, sum(a == b for a, b in texts), len(texts))
