"""From an experiment to its parts: the only place that knows both config and objects."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import UInt8
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import AdvancedProfiler, Profiler, SimpleProfiler
from torch import Tensor

from paragraph_ocr.batch import Batch
from paragraph_ocr.build_model import build_decoding, vocabulary_from
from paragraph_ocr.config import (
    PAGES,
    DataConfig,
    EmnistData,
    EmnistLinesData,
    Experiment,
    FolderData,
    GeneratedData,
    IamLinesData,
    IamParagraphsData,
    IamStackedData,
    RenderedData,
    TrainerConfig,
)
from paragraph_ocr.curriculum import Curriculum, Stage
from paragraph_ocr.data.augment import Augment, Strengths
from paragraph_ocr.data.augment_page import augment_page
from paragraph_ocr.data.corpus import Corpus
from paragraph_ocr.data.curriculum import CurriculumDataModule
from paragraph_ocr.data.datamodule import ParagraphDataModule
from paragraph_ocr.data.emnist import EmnistCorpus, EmnistLinesCorpus
from paragraph_ocr.data.fake import FakeCorpus
from paragraph_ocr.data.folder import FolderCorpus
from paragraph_ocr.data.iam import LINE_CANVAS, IamCorpus
from paragraph_ocr.data.parallel import cores
from paragraph_ocr.data.stacked import Stacking
from paragraph_ocr.data.store import Store
from paragraph_ocr.data.synthetic import SyntheticCorpus
from paragraph_ocr.errors import UserError
from paragraph_ocr.learning.learner import Learner
from paragraph_ocr.learning.optim import build_optimizer, build_schedule
from paragraph_ocr.learning.processes import (
    Processes,
    SynchronisedBatchNorm,
    norms_that_differ,
)
from paragraph_ocr.model.reader import Reader
from paragraph_ocr.profiling import StepTrace
from paragraph_ocr.vocabulary import Vocabulary, found_characters

EPOCHS = 20
EPOCHS_TO_OVERFIT = 200  # at most: it ends once the batch has been read
EPOCHS_BETWEEN_READINGS_TO_OVERFIT = 10  # an epoch is a step, and reading costs several


WRITABLE = "".join(map(chr, range(32, 127))) + "\n"
"""What generated text is written in where the vocabulary is to be found in it: ASCII."""

_LOADING = {
    "root", "batch_size", "num_workers", "max_length", "too_long", "normalise", "placement",
    "length_buckets", "pad_to_multiple",
}  # fmt: skip
"""Fields of a data module that say how paragraphs are loaded, not what they are."""


def build_vocabulary(
    experiment: Experiment, *, progress: Callable[[int, int], None] | None = None
) -> Vocabulary:
    """Return the vocabulary.

    With `vocabulary.from_data`, the store is prepared and the characters of its training split are put
    into `experiment.vocabulary.characters`, so that the config that a run leaves gives this vocabulary
    again without the data.
    """
    config = experiment.vocabulary
    if config.characters is None:
        corpus = build_corpus(experiment.datamodule, WRITABLE, seed=experiment.seed)
        workers = cores()
        store = Store(corpus.prepare(_stores(experiment), num_workers=workers, progress=progress))
        texts = [store.texts[row] for row in store.rows("train")]
        texts += [config.replacement] if config.unknown == "replace" else []
        config.characters = found_characters(texts, fold=config.fold)
    return vocabulary_from(config)


def build_augment(experiment: Experiment) -> Augment:
    """Return what the learner does to a batch on its device: nothing if the loader's workers do it."""
    on_device = experiment.regularization.augment_on == "device"
    return Augment(build_strengths(experiment) if on_device else Strengths())


def build_strengths(experiment: Experiment) -> Strengths:
    """Return how strongly training pages are augmented; memorising goes without."""
    if experiment.trainer.overfit_batches:
        return Strengths()
    return Strengths(**asdict(experiment.regularization.augmentation))


def augment_somewhere(batch: Batch, experiment: Experiment) -> UInt8[Tensor, "B 1 H W"]:
    """Return pages as training would see them, whether on the device or by the loader's workers."""
    if experiment.regularization.augment_on == "device":
        return build_augment(experiment)(batch.images, batch.sizes)
    strengths, pages = build_strengths(experiment), batch.images.clone()
    for index, canvas in enumerate(pages[:, 0].numpy()):
        height, width = canvas.shape if batch.sizes is None else batch.sizes[index].tolist()
        generator = np.random.default_rng([experiment.seed, index])
        canvas[:height, :width] = augment_page(canvas[:height, :width], strengths, generator)
    return pages


def build_learner(experiment: Experiment, recognizer: Reader, vocabulary: Vocabulary) -> Learner:
    """Return the learner; memorising a batch (`overfit_batches`) goes without augmentation and noise."""
    regularization, trainer = experiment.regularization, experiment.trainer
    pages = experiment.datamodule
    if not any(parameter.requires_grad for parameter in recognizer.parameters()):
        raise UserError("model: nothing is left to train. Pass model.encoder.freeze=false.")
    # scaling would have to be part of the graph; so would the talk of several processes
    recorded = trainer.cuda_graphs and num_processes(trainer) == 1 and not _scales_loss(trainer)
    optimizer = build_optimizer(
        recognizer,
        weight_decay=regularization.weight_decay,
        # a fused step would unscale what has been clipped already
        fused=_uses_gpus(trainer) and not _scales_loss(trainer),
        recorded=recorded,
        **asdict(experiment.optimizer),
    )
    return Learner(
        recognizer,
        vocabulary,
        optimizer=optimizer,
        schedule=partial(_schedule, experiment),
        augment=build_augment(experiment).with_letters,
        calm_augment=(
            Augment(build_strengths(experiment).times(regularization.calm)).with_letters
            if regularization.calm_after < 1
            else None
        ),
        calm_after=regularization.calm_after,
        decoding=build_decoding(experiment, vocabulary),
        max_length=pages.max_length,
        max_loss_to_read=experiment.decoding.max_loss,
        label_smoothing=regularization.label_smoothing,
        token_noise=0.0 if trainer.overfit_batches else regularization.token_noise,
        guidance=regularization.guidance,
        num_samples=experiment.tracking.num_samples,
        ema=regularization.ema,
        compile=trainer.compile,
        # most of a curriculum's time goes to whole pages; each further canvas would take half a minute
        canvas=(pages.height, pages.width) if experiment.curriculum.stages else None,
        cuda_graphs=recorded,
    )


def _schedule(
    experiment: Experiment,
    optimizer: torch.optim.Optimizer,
    total_steps: int | None,
    time_share: Callable[[], float] | None,
) -> Any:
    return build_schedule(
        optimizer, total_steps=total_steps, time_share=time_share, **asdict(experiment.schedule)
    )


def build_corpus(data: DataConfig, characters: str, *, seed: int) -> Corpus:
    """Return what makes the store of this data module; generated text keeps to the characters."""
    match data:
        case RenderedData():
            fields = _without_loading(data)
            fields["fonts"] = None if data.fonts is None else Path(data.fonts)
            fields["texts"] = None if data.texts is None else Path(data.texts)
            fields["held_out"] = tuple(data.held_out)
            return SyntheticCorpus(**fields, characters=characters, seed=seed)
        case GeneratedData():
            return FakeCorpus(**_without_loading(data), characters=characters, seed=seed)
        case EmnistLinesData(root=str(root)):
            fields = _without_loading(data)
            fields["texts"] = None if data.texts is None else Path(data.texts)
            return EmnistLinesCorpus(**fields, root=Path(root), characters=characters, seed=seed)
        case EmnistData(root=str(root)):
            fields = _without_loading(data)
            return EmnistCorpus(**fields, root=Path(root), characters=characters, seed=seed)
        case FolderData(root=str(root)):
            return FolderCorpus(
                name=data.name,
                folder=Path(root),
                height=data.height,
                width=data.width,
                split=data.split,
                normalise=data.normalise,
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


def writable(experiment: Experiment, vocabulary: Vocabulary) -> str:
    """Return the characters that generated text keeps to: a found vocabulary must not change its data."""
    return WRITABLE if experiment.vocabulary.from_data else "".join(vocabulary.characters)


def _without_loading(data: DataConfig) -> dict[str, Any]:
    """Return the fields that say what the paragraphs are, not how they are loaded."""
    return {key: value for key, value in asdict(data).items() if key not in _LOADING}


def _stores(experiment: Experiment) -> Path:
    return Path(experiment.outputs) / "data"


def build_datamodule(
    experiment: Experiment,
    vocabulary: Vocabulary,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ParagraphDataModule | CurriculumDataModule:
    """Return the data module: with a curriculum's training pages, or with its own."""
    pages, config = build_pages(experiment, vocabulary, progress=progress), experiment.curriculum
    if not config.stages:
        return pages
    data, corpora = experiment.datamodule, {}
    for name, corpus in config.corpora.items():
        loaded = replace(  # as the pages are
            corpus,
            num_workers=data.num_workers,
            placement=data.placement,
            pad_to_multiple=data.pad_to_multiple,
        )
        # by its name, so that corpora which differ in nothing else are not the same paragraphs
        seed = experiment.seed + zlib.crc32(name.encode())
        variant = replace(experiment, datamodule=loaded, seed=seed)
        corpora[name] = build_pages(variant, vocabulary, progress=progress)
    stages = [Stage(s.corpora, s.batch_size, s.below, s.max_steps) for s in config.stages]
    curriculum = Curriculum(
        stages, config.look_every, config.replay, experiment.seed, wait=config.wait
    )
    return CurriculumDataModule(pages, {PAGES: pages, **corpora}, curriculum)


def build_pages(
    experiment: Experiment,
    vocabulary: Vocabulary,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ParagraphDataModule:
    """Return the module of the experiment's own paragraphs, whatever its curriculum."""
    data = experiment.datamodule
    in_workers = experiment.regularization.augment_on == "workers"
    return ParagraphDataModule(
        build_corpus(data, writable(experiment, vocabulary), seed=experiment.seed),
        root=_stores(experiment),
        vocabulary=vocabulary,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        max_length=data.max_length,
        too_long=data.too_long,
        stacking=_stacking(data),
        overfit_batches=experiment.trainer.overfit_batches,
        strengths=build_strengths(experiment) if in_workers else Strengths(),
        placement=data.placement,
        length_buckets=data.length_buckets,
        pad_to_multiple=data.pad_to_multiple,
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
    if not _uses_gpus(trainer):
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


def _scales_loss(trainer: TrainerConfig) -> bool:
    return precision(trainer) == "16-mixed"


def num_processes(trainer: TrainerConfig) -> int:
    """Return how many processes train together: one for each device asked for."""
    if str(trainer.devices) in {"auto", "-1"}:
        return max(1, torch.cuda.device_count()) if _uses_gpus(trainer) else 1
    return int(trainer.devices)


def differing_norms(experiment: Experiment, recognizer: Reader) -> bool:
    """Return whether each of several processes would normalise its batches by itself."""
    trainer = experiment.trainer
    alone = num_processes(trainer) == 1 or _uses_gpus(trainer)
    return not alone and norms_that_differ(recognizer)


def _uses_gpus(trainer: TrainerConfig) -> bool:
    return trainer.accelerator != "cpu" and torch.cuda.is_available()


def build_trainer(
    experiment: Experiment,
    *,
    folder: Path,
    logger: Logger | None,
    callbacks: list[Callback],
    plugins: Sequence[Any] = (),
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
    own = {
        "overfit_batches",
        "compile",
        "cuda_graphs",
        "early_stopping",
        "precision",
        "profiler",
        "on_nan",
        "checkpoint",
        "strategy",
    }
    together = num_processes(config) > 1
    on_gpus = together and _uses_gpus(config)
    settings = {key: value for key, value in asdict(config).items() if key not in own}
    if config.max_epochs is None and config.max_time is not None:
        settings["max_epochs"] = -1
    elif config.max_epochs is None:
        settings["max_epochs"] = EPOCHS_TO_OVERFIT if overfit else EPOCHS
    if config.check_val_every_n_epoch is None:
        every = EPOCHS_BETWEEN_READINGS_TO_OVERFIT if overfit else 1
        settings["check_val_every_n_epoch"] = every
    try:
        return pl.Trainer(
            **settings,
            strategy=Processes() if together else "auto",
            plugins=[*plugins, *([SynchronisedBatchNorm()] if on_gpus else [])],
            precision=precision(config),  # type: ignore[arg-type]
            benchmark=_uses_gpus(config) and not config.deterministic,
            profiler=_profiler(config, folder),
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


def _profiler(trainer: TrainerConfig, folder: Path) -> Profiler | None:
    match trainer.profiler:
        case "pytorch":
            return StepTrace(folder, max_steps=trainer.max_steps)
        case "simple":
            return SimpleProfiler(dirpath=folder, filename="profile")
        case "advanced":
            return AdvancedProfiler(dirpath=folder, filename="profile")
    return None
