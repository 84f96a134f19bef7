"""From an experiment to its parts: the only place that knows both config and objects."""

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from safetensors import SafetensorError
from safetensors.torch import load_file

from paragraph_ocr.config import (
    DataConfig,
    EncoderConfig,
    Experiment,
    FolderData,
    GeneratedData,
    IamData,
    IamLinesData,
    IamParagraphsData,
    IamStackedData,
    RenderedData,
    TrainerConfig,
)
from paragraph_ocr.data.augment import Augment
from paragraph_ocr.data.corpus import Corpus
from paragraph_ocr.data.datamodule import ParagraphDataModule
from paragraph_ocr.data.fake import FakeCorpus
from paragraph_ocr.data.folder import FolderCorpus
from paragraph_ocr.data.iam import LINE_CANVAS, IamCorpus
from paragraph_ocr.data.stacked import Stacking
from paragraph_ocr.data.synthetic import SyntheticCorpus
from paragraph_ocr.errors import UserError
from paragraph_ocr.learning.learner import Learner
from paragraph_ocr.learning.optim import build_optimizer, build_schedule
from paragraph_ocr.model.decoder import Decoder
from paragraph_ocr.model.encoder import Encoder
from paragraph_ocr.model.generate import Beam, Greedy, SpecialTokens
from paragraph_ocr.model.recognizer import Recognizer
from paragraph_ocr.vocabulary import Vocabulary

EPOCHS = 20
EPOCHS_TO_OVERFIT = 200  # at most: it ends once the batch has been read
EPOCHS_BETWEEN_READINGS_TO_OVERFIT = 10  # an epoch is a step, and reading costs several


def build_vocabulary(experiment: Experiment) -> Vocabulary:
    try:
        return Vocabulary(**asdict(experiment.vocabulary))
    except ValueError as error:
        raise UserError(
            f"vocabulary.characters={experiment.vocabulary.characters!r}: {error}. "
            "Pass each character once."
        ) from error


def build_recognizer(experiment: Experiment, vocabulary: Vocabulary) -> Recognizer:
    """Return the model, with `model.weights` loaded if given.

    Raises:
        UserError: the encoder cannot be had, or the weights belong to another model.
    """
    data = experiment.datamodule
    encoder = build_encoder(experiment.model.encoder)
    if isinstance(data, GeneratedData | FolderData | IamData):
        encoder.check_canvas(data.height, data.width)
    decoder = Decoder(
        num_tokens=len(vocabulary),
        dropout=experiment.regularization.dropout,
        max_length=data.max_length,
        **asdict(experiment.model.decoder),
    )
    special = SpecialTokens(vocabulary.start, vocabulary.end, vocabulary.pad)
    recognizer = Recognizer(encoder, decoder, special=special)
    if experiment.model.weights is not None:
        load_weights(recognizer, Path(experiment.model.weights))
    return recognizer


def build_encoder(config: EncoderConfig) -> Encoder:
    """Return a new encoder; in a search, whose trials begin alike, a copy of the one built before.

    The copy and the random numbers after it are bit for bit those of building anew.
    """
    state = torch.get_rng_state()
    pristine, after = _pristine_encoder(json.dumps(asdict(config)), state.numpy().tobytes())
    torch.set_rng_state(after)
    return copy.deepcopy(pristine)


@functools.lru_cache(maxsize=8)
def _pristine_encoder(config: str, random_state: bytes) -> tuple[Encoder, torch.Tensor]:
    """Return an encoder that nobody has trained, and the state of torch's generator after it."""
    encoder = Encoder(**json.loads(config))
    return encoder, torch.get_rng_state()


def load_weights(recognizer: Recognizer, path: Path) -> None:
    """Load a .safetensors file, or the best weights of a run folder.

    Raises:
        UserError: the file is no safetensors file, or of another model.
    """
    file = path / "best.safetensors" if path.is_dir() else path
    remedy = "Pass the model's own overrides with it, or another file."
    try:
        recognizer.load_state_dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model.weights={path} cannot be read: {error}. Pass a run folder or a .safetensors file."
        ) from error
    except RuntimeError as error:  # missing, unexpected or misshapen tensors, one a line
        first = str(error).splitlines()[1].strip()
        raise UserError(
            f"model.weights={path} belongs to another model: {first} {remedy}"
        ) from error


def build_decoding(experiment: Experiment) -> Greedy | Beam:
    decoding = experiment.decoding
    if decoding.name == "beam":
        return Beam(width=decoding.beam_width, length_penalty=decoding.length_penalty)
    return Greedy()


def build_augment(experiment: Experiment) -> Augment:
    """Return the augmentation of training pages; memorising goes without."""
    if experiment.trainer.overfit_batches:
        return Augment()
    return Augment(**asdict(experiment.regularization.augmentation))


def build_learner(
    experiment: Experiment, recognizer: Recognizer, vocabulary: Vocabulary
) -> Learner:
    """Return the learner; memorising a batch (`overfit_batches`) goes without augmentation and noise."""
    regularization, trainer = experiment.regularization, experiment.trainer
    if not any(parameter.requires_grad for parameter in recognizer.parameters()):
        raise UserError("model: nothing is left to train. Pass model.encoder.freeze=false.")
    optimizer = build_optimizer(
        recognizer, weight_decay=regularization.weight_decay, **asdict(experiment.optimizer)
    )
    return Learner(
        recognizer,
        vocabulary,
        optimizer=optimizer,
        schedule=partial(_schedule, experiment),
        augment=build_augment(experiment),
        decoding=build_decoding(experiment),
        max_length=experiment.datamodule.max_length,
        max_loss_to_read=experiment.decoding.max_loss,
        label_smoothing=regularization.label_smoothing,
        token_noise=0.0 if trainer.overfit_batches else regularization.token_noise,
        num_samples=experiment.tracking.num_samples,
        compile=trainer.compile,
    )


def _schedule(experiment: Experiment, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    return build_schedule(optimizer, total_steps=total_steps, **asdict(experiment.schedule))


def build_corpus(data: DataConfig, vocabulary: Vocabulary, *, seed: int) -> Corpus:
    """Return what makes the store of this data module."""
    characters = "".join(vocabulary.characters)
    match data:
        case RenderedData():
            fields = _without_loading(data)
            fields["fonts"] = None if data.fonts is None else Path(data.fonts)
            fields["texts"] = None if data.texts is None else Path(data.texts)
            return SyntheticCorpus(**fields, characters=characters, seed=seed)
        case GeneratedData():
            return FakeCorpus(**_without_loading(data), characters=characters, seed=seed)
        case FolderData(root=str(root)):
            return FolderCorpus(
                name=data.name,
                folder=Path(root),
                height=data.height,
                width=data.width,
                split=data.split,
            )
        case IamLinesData(root=str(root)) | IamParagraphsData(root=str(root)):
            stacked = isinstance(data, IamStackedData)
            return IamCorpus(
                # both kinds of stacked paragraphs share a store
                name="iam_paragraphs_and_lines" if stacked else data.name,
                folder=Path(root),
                unit="lines" if isinstance(data, IamLinesData) else "paragraphs",
                height=data.height,
                width=data.width,
                split=data.split,
                lines_beside=LINE_CANVAS if stacked else None,
            )
    raise ValueError(f"no corpus for {type(data).__name__}")


def _without_loading(data: DataConfig) -> dict[str, Any]:
    """Return the fields that say what the paragraphs are, not how they are loaded."""
    loading = set(DataConfig.__dataclass_fields__) - {"name"}
    return {key: value for key, value in asdict(data).items() if key not in loading}


def build_datamodule(
    experiment: Experiment,
    vocabulary: Vocabulary,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ParagraphDataModule:
    data = experiment.datamodule
    return ParagraphDataModule(
        build_corpus(data, vocabulary, seed=experiment.seed),
        root=Path(experiment.outputs) / "data",
        vocabulary=vocabulary,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        max_length=data.max_length,
        too_long=data.too_long,
        stacking=_stacking(data),
        overfit_batches=experiment.trainer.overfit_batches,
        seed=experiment.seed,
        progress=progress,
    )


def _stacking(data: DataConfig) -> Stacking | None:
    if not isinstance(data, IamStackedData):
        return None
    return Stacking(
        canvas=(data.height, data.width),
        num_paragraphs=data.dataset_len,
        max_lines=data.max_lines,
        originals=data.originals,
    )


def precision(trainer: TrainerConfig) -> str:
    """Return the precision, "auto" settled by the device: bf16, fp16 on an older GPU, or float32."""
    if trainer.precision != "auto":
        return trainer.precision
    if trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


def build_trainer(
    experiment: Experiment, *, folder: Path, logger: Logger | None, callbacks: list[Callback]
) -> pl.Trainer:
    """Return Lightning's Trainer; `overfit_batches` is the data module's matter."""
    config, overfit = experiment.trainer, bool(experiment.trainer.overfit_batches)
    if config.early_stopping.patience is not None:
        callbacks = [
            *callbacks,
            EarlyStopping(
                "val/cer",
                patience=config.early_stopping.patience,
                min_delta=config.early_stopping.min_delta,
                check_on_train_epoch_end=False,
            ),
        ]
    own = {"overfit_batches", "compile", "early_stopping", "precision", "profiler"}
    settings = {key: value for key, value in asdict(config).items() if key not in own}
    if config.max_epochs is None:
        settings["max_epochs"] = EPOCHS_TO_OVERFIT if overfit else EPOCHS
    if config.check_val_every_n_epoch is None:
        every = EPOCHS_BETWEEN_READINGS_TO_OVERFIT if overfit else 1
        settings["check_val_every_n_epoch"] = every
    try:
        return pl.Trainer(
            **settings,
            precision=precision(config),  # type: ignore[arg-type]
            profiler=_profiler(config.profiler, folder),
            gradient_clip_val=experiment.regularization.gradient_clip or None,
            logger=logger or False,
            callbacks=callbacks,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    except (pl.utilities.exceptions.MisconfigurationException, ValueError, TypeError) as error:
        first = " ".join(str(error).split())
        raise UserError(
            f"trainer: {first}. See conf/trainer/auto.yaml for what is allowed."
        ) from error


def _profiler(name: str | None, folder: Path) -> Profiler | None:
    if name is None:
        return None
    kinds = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    return kinds[name](dirpath=folder, filename="profile")
