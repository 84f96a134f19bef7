"""What is benchmarked: the experiment composed as train.py does, its device, models and pages."""

import gc
from collections.abc import Sequence
from dataclasses import fields
from typing import Generic, TypeVar

import pytorch_lightning as pl
import torch

from paragraph_ocr.batch import Batch
from paragraph_ocr.benchmark.options import WorkOptions
from paragraph_ocr.benchmark.reference import Reference, published_precision
from paragraph_ocr.benchmark.table import environment
from paragraph_ocr.build_model import build_recognizer, vocabulary_from
from paragraph_ocr.config import DataConfig, Experiment, TransformerModel
from paragraph_ocr.errors import UserError
from paragraph_ocr.model.transformer import TransformerReader
from paragraph_ocr.validation import compose, validate
from paragraph_ocr.vocabulary import SPECIAL_TOKENS

AS_PUBLISHED = (
    "model=reference",
    "regularization=reference",
    "optimizer=adam",
    "schedule=constant",
)
"""Our side of the same work: the published network, dropout and optimizer."""


Given = TypeVar("Given", bound=WorkOptions)


class Setting(Generic[Given]):
    """Device and sizes that the options give, and what is built for them."""

    def __init__(self, options: Given) -> None:
        self.options = options
        size = options.sized
        self.height, self.width = options.height or size.height, options.width or size.width
        self.tokens = options.tokens or size.tokens
        self.repeats = options.repeats or size.repeats
        found = torch.cuda.is_available()
        if options.device == "cuda" and not found:
            raise UserError("device=cuda is not here: torch finds no GPU. Pass device=auto.")
        self.on_gpu = found and options.device != "cpu"
        self.device = torch.device("cuda" if self.on_gpu else "cpu")

    @property
    def device_name(self) -> str:
        if self.on_gpu:
            return torch.cuda.get_device_name(self.device)
        return f"CPU ({torch.get_num_threads()} threads)"

    def environment(self, precision: str | None = None) -> dict[str, str]:
        """Return device and versions; given our precision, also that and the reference's."""
        more = {"cuda": str(torch.version.cuda)} if self.on_gpu else {}
        if precision is not None:
            more |= {"precision": precision, "reference": published_precision(self.device)}
        return environment(self.device_name, **more)

    def experiment(self, *more: str, **changed: int) -> Experiment:
        """Return what train.py composes of our overrides, these, and last the user's.

        Args:
            changed: height, width or tokens in place of the options'.
        """
        options, size = self.options, self.options.sized
        tokens = changed.get("tokens", self.tokens)
        characters = tokens - 2  # but start and end
        composed = compose(
            [
                *AS_PUBLISHED,
                *size.overrides,
                f"datamodule.height={changed.get('height', self.height)}",
                f"datamodule.width={changed.get('width', self.width)}",
                f"datamodule.max_length={tokens}",
                f"datamodule.min_characters={min(size.min_characters, characters // 2)}",
                f"datamodule.max_characters={characters}",
                f"datamodule.mean_characters={min(size.mean_characters, characters)}",
                "datamodule.num_val=1",
                "datamodule.num_test=1",
                f"trainer={'gpu' if self.on_gpu else 'cpu'}",
                f"trainer.precision={'auto' if self.on_gpu else '32-true'}",
                f"trainer.compile={str(self.on_gpu).lower()}",
                f"tracking={options.tracking}",
                f"seed={options.seed}",
                f"outputs={options.outputs}",
                *more,
                *options.override,
            ]
        )
        return validate(composed)

    def recognizer(self, experiment: Experiment) -> TransformerReader:
        """Return our model with random weights, the same for the same seed.

        Raises:
            UserError: it is not of the kind that the reference is.
        """
        pl.seed_everything(experiment.seed, verbose=False)
        recognizer = build_recognizer(experiment, vocabulary_from(experiment.vocabulary))
        if not isinstance(recognizer, TransformerReader):
            raise UserError("model: only a Transformer is benchmarked. Pass no override=model=.")
        return recognizer

    def reference(self, experiment: Experiment) -> Reference:
        """Return the published design of the experiment's size, with random weights.

        Raises:
            UserError: the experiment's model is of another design.
        """
        model, data = experiment.model, experiment.datamodule
        assert isinstance(model, TransformerModel)
        decoder, encoder = model.decoder, model.encoder
        same_encoder = (encoder.name, encoder.stage, encoder.in_channels) == ("resnet18", 4, 3)
        same_decoder = decoder.norm == "post" and not decoder.tied
        if not (same_encoder and same_decoder and encoder.horizontal_stride in (None, 32)):
            raise UserError(
                "the reference is a ResNet-18 and a post-norm decoder, and the overrides give another "
                "model. Pass override= without model=, such as override=model.decoder.depth=2."
            )
        pl.seed_everything(experiment.seed, verbose=False)
        return Reference(
            num_tokens=len(vocabulary_from(experiment.vocabulary)),
            canvas=(data.height, data.width),
            max_length=data.max_length,
            width=decoder.width,
            depth=decoder.depth,
            heads=decoder.heads,
            feed_forward=decoder.feed_forward,
            dropout=experiment.regularization.dropout,
        )

    def batch(self, size: int, experiment: Experiment) -> Batch:
        """Return noise under random texts of the greatest length, on the device."""
        generator = torch.Generator().manual_seed(experiment.seed)
        data, vocabulary = experiment.datamodule, vocabulary_from(experiment.vocabulary)
        first, known = len(SPECIAL_TOKENS), len(vocabulary)
        images = torch.randint(
            0, 256, (size, 1, data.height, data.width), dtype=torch.uint8, generator=generator
        )
        tokens = torch.randint(first, known, (size, data.max_length), generator=generator)
        tokens[:, 0], tokens[:, -1] = vocabulary.start, vocabulary.end
        return Batch(images, tokens, None, torch.full((size,), -1)).to(self.device)

    def is_published(self, experiment: Experiment) -> bool:
        """Return whether the work is the one that the published figures are of."""
        data = experiment.datamodule
        same_pages = (data.height, data.width, data.max_length) == (576, 640, 682)
        model = experiment.model
        assert isinstance(model, TransformerModel)
        decoder = model.decoder
        sizes = (decoder.depth, decoder.width, decoder.heads, decoder.feed_forward)
        return same_pages and sizes == (4, 256, 4, 1024)


def placements() -> Sequence[str]:
    """Return where a data module can keep its pages, if it can be told."""
    known = "placement" in {field.name for field in fields(DataConfig)}
    return ("disk", "host", "gpu") if known else ()


def free(device: torch.device) -> None:
    """Give back the memory of what nobody refers to any more, compiled code included."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
