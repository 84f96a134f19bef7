"""From a config to a model and its weights: all that reading needs, and no framework of training."""

import copy
import functools
import json
import unicodedata
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from paragraph_ocr import console
from paragraph_ocr.config import (
    EncoderConfig,
    Experiment,
    LineCnnModel,
    TransformerModel,
    VocabularyConfig,
)
from paragraph_ocr.errors import UserError
from paragraph_ocr.model.decoder import Decoder
from paragraph_ocr.model.encoder import Encoder
from paragraph_ocr.model.generate import Beam, Greedy, SpecialTokens
from paragraph_ocr.model.lexicon import lexicon
from paragraph_ocr.model.line_cnn import LineCnn
from paragraph_ocr.model.reader import Reader
from paragraph_ocr.model.transformer import TransformerReader
from paragraph_ocr.model.vote import View, Vote
from paragraph_ocr.quantised import restore
from paragraph_ocr.stored import read_config
from paragraph_ocr.vocabulary import Vocabulary


def vocabulary_from(config: VocabularyConfig) -> Vocabulary:
    """Return the vocabulary of a config whose characters are known.

    Raises:
        UserError: a character stands in it twice, or is not one.
    """
    assert config.characters is not None
    config.characters = unicodedata.normalize("NFC", config.characters)
    try:
        return Vocabulary(
            config.characters,
            fold=config.fold,
            unknown=config.unknown,
            replacement=config.replacement,
        )
    except ValueError as error:
        raise UserError(
            f"vocabulary.characters={config.characters!r}: {error}. Pass each character once."
        ) from error


def build_recognizer(
    experiment: Experiment, vocabulary: Vocabulary, *, initial_weights: bool = True
) -> Reader:
    """Return the model, with `model.weights` loaded if given, unless others will follow.

    Raises:
        UserError: the encoder cannot be had, or the weights belong to another model.
    """
    match experiment.model:
        case TransformerModel() as model:
            recognizer: Reader = _transformer(model, experiment, vocabulary)
        case LineCnnModel() as model:
            recognizer = _line_cnn(model, experiment, vocabulary)
        case other:
            raise ValueError(f"no model for {type(other).__name__}")
    if experiment.model.weights is not None and initial_weights:
        path = Path(experiment.model.weights)
        load_weights(recognizer, path)
        if isinstance(experiment.model, TransformerModel):
            _compare_columns(experiment.model, path)
    return recognizer


def _compare_columns(model: TransformerModel, path: Path) -> None:
    """Warn if weights were trained with columns of another width, which their shapes do not tell."""
    try:
        trained = read_config(path if path.is_dir() else path.parent).model
    except UserError:  # weights alone, or of another version
        return
    if not isinstance(trained, TransformerModel):
        return
    then, now = trained.encoder.horizontal_stride, model.encoder.horizontal_stride
    if then != now:
        console.warn(
            f"model.weights={path} was trained with model.encoder.horizontal_stride={then}, "
            f"and this model has {now}: it does not read until it is trained again."
        )


def _transformer(
    model: TransformerModel, experiment: Experiment, vocabulary: Vocabulary
) -> TransformerReader:
    data = experiment.datamodule
    encoder = build_encoder(model.encoder, canvas=(data.height, data.width))
    decoder = Decoder(
        num_tokens=len(vocabulary),
        dropout=experiment.regularization.dropout,
        max_length=data.max_length,
        **asdict(model.decoder),
    )
    return TransformerReader(encoder, decoder, special=_special(vocabulary))


def _line_cnn(model: LineCnnModel, experiment: Experiment, vocabulary: Vocabulary) -> LineCnn:
    data, fields = experiment.datamodule, asdict(model)
    fields.pop("weights")
    line_cnn = LineCnn(
        **fields,
        num_tokens=len(vocabulary),
        height=data.height,
        dropout=experiment.regularization.dropout,
        special=_special(vocabulary),
        blank=vocabulary.blank,
    )
    # between two equal characters CTC needs a window for the blank
    windows, needed = line_cnn.num_windows(data.width), 2 * (data.max_length - 2) - 1
    if model.loss == "ctc" and windows < needed:
        raise UserError(
            f"model.window_stride_px={model.window_stride_px} gives {windows} windows, and CTC needs "
            f"{needed} for datamodule.max_length={data.max_length}. "
            f"Pass model.window_stride_px={max(2, data.width // (needed + 1) // 2 * 2)}."
        )
    return line_cnn


def _special(vocabulary: Vocabulary) -> SpecialTokens:
    return SpecialTokens(vocabulary.start, vocabulary.end, vocabulary.pad)


def build_encoder(config: EncoderConfig, *, canvas: tuple[int, int]) -> Encoder:
    """Return a new encoder; in a search, whose trials begin alike, a copy of the one built before.

    The copy and the random numbers after it are bit for bit those of building anew.

    Raises:
        UserError: there is no such encoder, or it does not take pages of this height and width.
    """
    state = torch.get_rng_state()
    described = json.dumps(asdict(config))
    pristine, after = _pristine_encoder(described, canvas, state.numpy().tobytes())
    torch.set_rng_state(after)
    return copy.deepcopy(pristine)


@functools.lru_cache(maxsize=8)
def _pristine_encoder(
    config: str, canvas: tuple[int, int], random_state: bytes
) -> tuple[Encoder, torch.Tensor]:
    """Return an encoder that nobody has trained, and the state of torch's generator after it."""
    encoder = Encoder(**json.loads(config))
    after = torch.get_rng_state()
    encoder.check_canvas(*canvas)
    return encoder, after


def load_weights(recognizer: Reader, path: Path) -> None:
    """Load a .safetensors file, quantised or not, or the best weights of a run folder.

    Raises:
        UserError: the file is no safetensors file, or of another model.
    """
    file = path / "best.safetensors" if path.is_dir() else path
    remedy = "Pass the model's own overrides with it, or another file."
    if not file.is_file():
        raise UserError(
            f"model.weights={path} holds no weights. Pass a run folder or a .safetensors file."
        )
    try:
        recognizer.load_state_dict(restore(load_file(file)))
    # a header may lack what it needs, or name a type of numbers that torch does not have
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"model.weights={path} cannot be read: {error}. Pass a run folder or a .safetensors file."
        ) from error
    except RuntimeError as error:  # missing, unexpected or misshapen tensors, one a line
        first = str(error).splitlines()[-1].strip()
        raise UserError(
            f"model.weights={path} belongs to another model: {first} {remedy}"
        ) from error


def build_decoding(experiment: Experiment, vocabulary: Vocabulary) -> Greedy | Beam | Vote:
    """Return how a model with this vocabulary reads.

    Raises:
        UserError: decoding.lexicon is no language that pyspellchecker has.
    """
    decoding = experiment.decoding
    if decoding.name == "beam":
        return Beam(width=decoding.beam_width, length_penalty=decoding.length_penalty)
    if decoding.name == "vote":
        data = experiment.datamodule
        views = tuple(View(*map(float, view)) for view in decoding.views)
        words = None
        if decoding.lexicon is not None:
            words = lexicon(decoding.lexicon, vocabulary.tokens)
        enough = tuple((int(count), float(most)) for count, most in decoding.enough)
        return Vote(views, (data.height, data.width), enough=enough, lexicon=words)
    return Greedy()
