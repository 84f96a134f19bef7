"""Which values a config may hold: each alone, what must go together, what this machine has."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from paragraph_ocr.config import (
    PAGES,
    DataConfig,
    DecoderConfig,
    EmnistData,
    EmnistLinesData,
    Experiment,
    FolderData,
    GeneratedData,
    IamData,
    IamStackedData,
    LineCnnModel,
    TrackingConfig,
    TrainerConfig,
    TransformerModel,
    VocabularyConfig,
)
from paragraph_ocr.errors import UserError, nearest

_CHOICES: dict[str, tuple[str, ...]] = {
    "model.decoder.norm": ("pre", "post"),
    "optimizer.name": ("adamw", "adam", "sgd", "muon"),
    "schedule.name": ("constant", "cosine", "one_cycle", "warmup_stable_decay"),
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda"),
    "trainer.precision": ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"),
    "trainer.strategy": ("auto", "ddp"),
    "trainer.on_nan": ("stop", "skip", "rollback"),
    "trainer.profiler": ("simple", "advanced", "pytorch"),
    "decoding.name": ("greedy", "beam"),
    "model.loss": ("windows", "ctc"),
    "regularization.augment_on": ("device", "workers"),
    "vocabulary.unknown": ("error", "drop", "replace"),
    "datamodule.too_long": ("error", "skip"),
    "datamodule.placement": ("disk", "host", "gpu"),
    "tracking.name": ("mlflow", "off"),
}

_OWN_FILES: dict[type[DataConfig], tuple[tuple[str, ...], str]] = {
    FolderData: (("auto", "train", "val", "test"), "folder of your images and transcriptions"),
    IamData: (("reference", "independent", "aachen"), "folder of IAM's archives"),
    EmnistData: ((), "folder of EMNIST's files"),
}
"""Data modules that read files of the user's: choices of `split`, and what `root` is."""

_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "model.encoder.stage": (0, 4),
    "model.decoder.depth": (1, 100),
    "model.decoder.width": (4, 65536),
    "model.decoder.heads": (1, 1024),
    "model.decoder.feed_forward": (1, 1_000_000),
    "model.window_width_px": (2, 10_000),
    "model.window_stride_px": (2, 10_000),
    "model.channels": (1, 10_000),
    "model.width": (1, 1_000_000),
    "datamodule.batch_size": (1, 1_000_000),
    "datamodule.num_workers": (0, 1024),
    "datamodule.max_length": (3, 100_000),
    "datamodule.length_buckets": (0, 100_000),
    "datamodule.pad_to_multiple": (1, 100_000),
    "datamodule.height": (32, 10_000),
    "datamodule.width": (32, 10_000),
    "datamodule.min_lines": (1, 1000),
    "datamodule.min_characters": (1, 100_000),
    "datamodule.max_lines": (1, 1000),
    "datamodule.dataset_len": (1, 100_000_000),
    "datamodule.num_train": (1, 100_000_000),
    "datamodule.num_val": (1, 100_000_000),
    "datamodule.num_test": (1, 100_000_000),
    "datamodule.random_share": (0, 1),
    "datamodule.jitter": (0, 2),
    "datamodule.pressure": (0, 1),
    "datamodule.joined": (0, 1),
    "datamodule.word_slant_deg": (0, 20),
    "datamodule.crossed_out": (0, 1),
    "datamodule.baseline_wave": (0, 1),
    "datamodule.min_overlap": (0, 0.9),
    "datamodule.max_overlap": (0, 0.9),
    "regularization.dropout": (0, 0.99),
    "regularization.weight_decay": (0, 10),
    "regularization.label_smoothing": (0, 0.99),
    "regularization.gradient_clip": (0, 1e9),
    "regularization.token_noise": (0, 0.99),
    "regularization.ema": (0, 0.999999),
    "regularization.augmentation.rotation_deg": (0, 45),
    "regularization.augmentation.shear_deg": (0, 60),
    "regularization.augmentation.scale": (0, 0.9),
    "regularization.augmentation.perspective": (0, 0.3),
    "regularization.augmentation.translation_px": (0, 1000),
    "regularization.augmentation.elastic_px": (0, 100),
    "regularization.augmentation.tremor_px": (0, 100),
    "regularization.augmentation.pen_px": (0, 20),
    "regularization.augmentation.blur_px": (0, 20),
    "regularization.augmentation.ink": (0, 1),
    "regularization.augmentation.paper": (0, 1),
    "regularization.augmentation.noise": (0, 1),
    "regularization.augmentation.neighbours_px": (0, 200),
    "regularization.augmentation.rules": (0, 1),
    "regularization.augmentation.threshold": (0, 1),
    "regularization.augmentation.show_through": (0, 1),
    "regularization.augmentation.stains": (0, 1),
    "regularization.augmentation.coarse_px": (0, 8),
    "optimizer.lr": (0, 100),
    "schedule.warmup_steps": (0, 10_000_000),
    "schedule.final_factor": (0, 1),
    "schedule.decay_share": (0, 1),
    "curriculum.look_every": (1, 1_000_000),
    "curriculum.replay": (0, 0.9),
    "trainer.overfit_batches": (0, 1e9),
    "trainer.accumulate_grad_batches": (1, 1_000_000),
    "trainer.checkpoint.every_s": (0, 1e9),
    "trainer.checkpoint.every_n_steps": (1, 1_000_000_000),
    "trainer.checkpoint.keep": (1, 1000),
    "decoding.beam_width": (1, 1000),
    "tracking.num_samples": (0, 1000),
}


def check_values(composed: DictConfig) -> None:
    """Check each value alone, against its choices or its range."""
    _check_values(composed, "")
    for name in composed.curriculum.corpora:  # each is a data module
        _check_values(composed, f"curriculum.corpora.{name}", instead_of="datamodule")


def _check_values(composed: DictConfig, path: str, *, instead_of: str = "") -> None:
    """Check what lies below a path against the rules for what lies below another."""
    for key, choices in _CHOICES.items():
        if key.startswith(instead_of):
            place = path + key.removeprefix(instead_of)
            _check_choice(place, OmegaConf.select(composed, place), choices)
    for key, (low, high) in _RANGES.items():
        if not key.startswith(instead_of):
            continue
        place = path + key.removeprefix(instead_of)
        value = OmegaConf.select(composed, place)
        if value is not None and not low <= value <= high:
            raise UserError(
                f"{place}={value} must lie in {low:.10g} to {high:.10g}. Pass {place}=<number>."
            )


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        close = nearest(str(value), choices, count=1)
        raise UserError(
            f"{key}={value} is not one of {', '.join(choices)}. "
            f"Pass {key}={close[0] if close else '<one of these>'}."
        )


def check_together(experiment: Experiment) -> None:
    """Check what must go together, whatever the machine."""
    trainer = experiment.trainer
    match experiment.model:
        case TransformerModel(decoder=decoder):
            _check_decoder(decoder)
        case LineCnnModel() as model:
            _check_line_cnn(model, experiment)
    _check_vocabulary(experiment.vocabulary)
    if experiment.optimizer.lr == 0:
        raise UserError("optimizer.lr=0 learns nothing. Pass optimizer.lr=1e-3.")
    if experiment.decoding.name == "greedy" and experiment.decoding.beam_width != 1:
        raise UserError(
            f"decoding.beam_width={experiment.decoding.beam_width} does nothing in greedy decoding. "
            "Pass decoding=beam."
        )
    if trainer.fast_dev_run is not False and trainer.overfit_batches:
        raise UserError(
            f"trainer.fast_dev_run={trainer.fast_dev_run} and trainer.overfit_batches="
            f"{trainer.overfit_batches} exclude each other. Pass trainer.fast_dev_run=false."
        )
    if isinstance(trainer.overfit_batches, float) and trainer.overfit_batches > 1:
        raise UserError(
            f"trainer.overfit_batches={trainer.overfit_batches} is a share above 1. "
            f"Pass trainer.overfit_batches={int(trainer.overfit_batches)} for that many batches."
        )
    _check_schedule(experiment)
    for each in _with_each_corpus(experiment):
        with each as variant:
            _check_data(variant)
    _check_curriculum(experiment)


def _check_schedule(experiment: Experiment) -> None:
    """Check that a schedule that comes to an end knows when that is."""
    name, trainer = experiment.schedule.name, experiment.trainer
    epochs = trainer.max_epochs == -1 or (
        trainer.max_epochs is None and trainer.max_time is not None
    )
    if trainer.max_steps != -1 or not epochs or name == "constant":
        return
    if trainer.max_time is None or name == "one_cycle":
        limit = "trainer.max_steps" if name == "one_cycle" else "trainer.max_time"
        raise UserError(
            f"schedule={name} needs to know when training ends. Pass {limit}=<limit>, or "
            "schedule=constant."
        )


def _check_data(experiment: Experiment) -> None:
    data = experiment.datamodule
    if isinstance(data, GeneratedData):
        _check_generated(data)
    if isinstance(data, EmnistData):
        _check_emnist(data)
    if data.placement != "disk":
        _check_placement(experiment)
    if data.length_buckets and isinstance(data, IamStackedData):
        raise UserError(
            f"datamodule.length_buckets={data.length_buckets} needs to know lengths, and datamodule="
            f"{data.name} stacks new paragraphs in every epoch. Pass datamodule.length_buckets=0."
        )


def check_combinations(experiment: Experiment) -> None:
    """Check what must go together, and with this machine: its files and devices."""
    check_together(experiment)
    trainer, weights = experiment.trainer, experiment.model.weights
    if weights is not None and not _is_there(weights):
        raise UserError(
            f"model.weights={weights} does not exist. Pass a run folder or a .safetensors file."
        )
    for each in _with_each_corpus(experiment):
        with each as variant:
            _check_files(variant.datamodule)
    _check_tracking(experiment.tracking)
    devices = trainer.devices
    if devices != "auto" and not (
        str(devices).lstrip("-").isdecimal() and int(devices) in {-1, *range(1, 4097)}
    ):
        raise UserError(
            f"trainer.devices={devices} must be a number of devices, or auto for all. "
            "Pass trainer.devices=1."
        )
    _check_processes(experiment)
    _check_device(trainer)
    if experiment.datamodule.placement == "gpu":
        _check_gpu(trainer)


def _check_files(data: DataConfig) -> None:
    """Check that what a data module reads is here."""
    for kind, (choices, wanted) in _OWN_FILES.items():
        if not isinstance(data, kind):
            continue
        if choices:
            _check_choice("datamodule.split", data.split, choices)  # type: ignore[attr-defined]
        if data.root is None:
            raise UserError(
                f"datamodule.root has no value, and datamodule={data.name} needs it. "
                f"Pass datamodule.root=<{wanted}>."
            )
    if isinstance(data, GeneratedData) and data.root is not None:
        raise UserError(
            f"datamodule.root={data.root} does nothing for datamodule={data.name}, which makes its own "
            "pages. Leave it out, or pass datamodule=folder."
        )
    for key in ("root", "fonts", "texts"):
        path = getattr(data, key, None)
        if path is not None and not _is_there(path, folder=True):
            raise UserError(
                f"datamodule.{key}={path} is not a folder. Pass datamodule.{key}=<folder>."
            )


def _is_there(path: str, *, folder: bool = False) -> bool:
    """Return whether there is such a file or folder; no system takes every text for a path."""
    try:
        return Path(path).is_dir() if folder else Path(path).exists()
    except (OSError, ValueError):
        return False


def _with_each_corpus(experiment: Experiment) -> Iterator[AbstractContextManager[Experiment]]:
    """Yield the experiment, and once more for each of the curriculum's corpora as its data module.

    What is refused within names the corpus.
    """
    yield nullcontext(experiment)
    for name, corpus in experiment.curriculum.corpora.items():
        yield _as_datamodule(experiment, name, corpus)


@contextmanager
def _as_datamodule(experiment: Experiment, name: str, corpus: DataConfig) -> Iterator[Experiment]:
    try:
        placement = experiment.datamodule.placement  # theirs, whatever a corpus says
        yield replace(experiment, datamodule=replace(corpus, placement=placement))
    except UserError as error:
        named = re.sub(r"datamodule\.(?!placement)", f"curriculum.corpora.{name}.", str(error))
        raise UserError(named) from error


def _check_curriculum(experiment: Experiment) -> None:
    """Check that each stage has pages and, but for the last, an end."""
    curriculum, trainer = experiment.curriculum, experiment.trainer
    if not curriculum.stages:
        return
    known = (PAGES, *curriculum.corpora)
    for number, stage in enumerate(curriculum.stages):
        key = f"curriculum.stages[{number}]"
        for name, share in stage.corpora.items():
            _check_choice(f"{key}.corpora", name, known)
            if share <= 0:
                raise UserError(f"{key}.corpora.{name}={share} must be above 0. Leave it out.")
        if not stage.corpora or stage.batch_size < 1:
            raise UserError(f"{key} needs corpora and a batch_size of 1 or more. Add them.")
        last = number == len(curriculum.stages) - 1
        if last != (stage.below is None and stage.max_steps is None):
            raise UserError(
                f"{key} is the last stage, which ends with the training. Leave out below and max_steps."
                if last
                else f"{key} never ends. Give it below (of train/loss) or max_steps."
            )
    for name, corpus in curriculum.corpora.items():
        if corpus.max_length > experiment.datamodule.max_length:
            raise UserError(
                f"curriculum.corpora.{name}.max_length={corpus.max_length} is above "
                f"datamodule.max_length={experiment.datamodule.max_length}, which the model is built for. "
                f"Pass curriculum.corpora.{name}.max_length={experiment.datamodule.max_length}."
            )
    if trainer.overfit_batches:
        raise UserError(
            f"curriculum={curriculum.name} has pages of its own, and trainer.overfit_batches="
            f"{trainer.overfit_batches} knows but a few. Pass curriculum=none."
        )
    if str(trainer.devices) != "1":
        raise UserError(
            f"curriculum={curriculum.name} is for one process, and trainer.devices={trainer.devices}. "
            "Pass trainer.devices=1, or curriculum=none."
        )


def _check_tracking(tracking: TrackingConfig) -> None:
    if tracking.register is not None and not tracking.log_model:
        raise UserError(
            f"tracking.register={tracking.register} needs a logged model. Pass tracking.log_model=true."
        )
    if tracking.register is not None and not re.fullmatch(r"[\w. -]+", tracking.register):
        raise UserError(
            f"tracking.register={tracking.register!r} may hold letters, digits, blanks and ._- alone. "
            "Pass tracking.register=<name>."
        )
    if tracking.log_model and tracking.name == "off":
        raise UserError("tracking.log_model=true needs MLflow. Pass tracking=mlflow.")


def _check_decoder(decoder: DecoderConfig) -> None:
    if decoder.width % decoder.heads:
        wider = decoder.heads * (decoder.width // decoder.heads + 1)
        raise UserError(
            f"model.decoder.width={decoder.width} is not divisible by model.decoder.heads="
            f"{decoder.heads}. Pass model.decoder.width={wider}"
            " or another number of heads."
        )
    if decoder.width % 4:
        wider = decoder.heads * (decoder.width // decoder.heads + 1)
        raise UserError(
            f"model.decoder.width={decoder.width} is not divisible by 4, which 2-D sine positions "
            f"need. Pass model.decoder.width={decoder.width + 4 - decoder.width % 4}."
        )


def _check_line_cnn(model: LineCnnModel, experiment: Experiment) -> None:
    data = experiment.datamodule
    for key in ("window_width_px", "window_stride_px"):
        if (value := getattr(model, key)) % 2:
            raise UserError(
                f"model.{key}={value} must be even, because pooling halves the line. "
                f"Pass model.{key}={value + 1}."
            )
    if isinstance(data, GeneratedData) and data.max_lines > 1:
        raise UserError(
            f"model=line_cnn reads single lines, and datamodule={data.name} has up to "
            f"{data.max_lines} on a page. Pass datamodule=synthetic_lines or datamodule=emnist_lines."
        )
    if experiment.decoding.name == "beam":
        raise UserError("decoding=beam does nothing for model=line_cnn. Pass decoding=greedy.")


def _check_vocabulary(vocabulary: VocabularyConfig) -> None:
    characters, replacement = vocabulary.characters, vocabulary.replacement
    if characters is None and not vocabulary.from_data:
        raise UserError(
            "vocabulary.characters=null, and vocabulary.from_data=false does not look for any. "
            "Pass vocabulary=from_data, or vocabulary=iam."
        )
    if vocabulary.unknown == "replace" and len(replacement) != 1:
        raise UserError(
            f"vocabulary.replacement={replacement!r} must be a single character. "
            "Pass vocabulary.replacement=<character>."
        )
    if vocabulary.unknown == "replace" and characters is not None and replacement not in characters:
        raise UserError(
            f"vocabulary.replacement={replacement!r} is not in vocabulary.characters. Pass one that "
            "is, or vocabulary.unknown=drop."
        )


def _check_emnist(data: EmnistData) -> None:
    if not isinstance(data, EmnistLinesData):
        return
    if data.min_characters >= data.max_characters:
        raise UserError(
            f"datamodule.min_characters={data.min_characters} must be below datamodule.max_characters="
            f"{data.max_characters}. Pass datamodule.min_characters={max(1, data.max_characters // 2)}."
        )
    if data.min_overlap > data.max_overlap:
        raise UserError(
            f"datamodule.min_overlap={data.min_overlap} is above datamodule.max_overlap="
            f"{data.max_overlap}. Pass datamodule.min_overlap={data.max_overlap}."
        )
    _check_room_for_tokens(data)


def _check_generated(data: GeneratedData) -> None:
    if data.min_lines > data.max_lines:
        raise UserError(
            f"datamodule.min_lines={data.min_lines} is above datamodule.max_lines={data.max_lines}. "
            f"Pass datamodule.min_lines={data.max_lines} or fewer."
        )
    if not data.min_characters <= data.mean_characters <= data.max_characters:
        raise UserError(
            f"datamodule.mean_characters={data.mean_characters} must lie between min_characters="
            f"{data.min_characters} and max_characters={data.max_characters}. "
            f"Pass datamodule.mean_characters={(data.min_characters + data.max_characters) // 2}."
        )
    _check_room_for_tokens(data)


def _check_room_for_tokens(data: GeneratedData | EmnistLinesData) -> None:
    if data.max_characters + 2 > data.max_length:  # the start and the end token
        raise UserError(
            f"datamodule.max_length={data.max_length} is too short for "
            f"datamodule.max_characters={data.max_characters} and start and end. "
            f"Pass datamodule.max_length={data.max_characters + 2} or more."
        )


def _check_placement(experiment: Experiment) -> None:
    """Check that pages that are kept in memory need nothing done to them before they are a batch."""
    data, on = experiment.datamodule, experiment.regularization.augment_on
    if on == "workers":
        raise UserError(
            f"regularization.augment_on=workers changes pages that datamodule.placement={data.placement} "
            "keeps as they are. Pass regularization.augment_on=device, or datamodule.placement=disk."
        )
    if isinstance(data, IamStackedData):
        raise UserError(
            f"datamodule.placement={data.placement} keeps pages, and datamodule={data.name} stacks new "
            "ones in every epoch. Pass datamodule.placement=disk."
        )


def _check_processes(experiment: Experiment) -> None:
    """Check that what is for one process is not asked of several."""
    trainer = experiment.trainer
    if str(trainer.devices) == "1":
        return
    if trainer.overfit_batches:
        raise UserError(
            f"trainer.overfit_batches={trainer.overfit_batches} is for one process, and trainer.devices="
            f"{trainer.devices}. Pass trainer.devices=1."
        )
    if experiment.trial is not None:
        raise UserError(
            f"trainer.devices={trainer.devices} does not go with a search, which trains a trial on one "
            "device. Pass trainer.devices=1, and hydra.sweeper.gpus and n_jobs for several at once."
        )


def _check_device(trainer: TrainerConfig) -> None:
    """Check that the device is there and can compute in the precision asked for.

    Asks torch, and so imports it, only if the answer depends on the machine.
    """
    half = trainer.precision.startswith(("16", "bf16"))
    if trainer.accelerator == "cpu":
        if trainer.precision.startswith("16"):
            raise UserError(
                f"trainer.precision={trainer.precision} needs a GPU, and trainer.accelerator=cpu. "
                "Pass trainer.precision=32-true, or bf16-mixed."
            )
        return
    if trainer.accelerator == "auto" and not half:
        return
    import torch

    if not torch.cuda.is_available():
        if trainer.accelerator != "auto":
            raise UserError(
                f"trainer.accelerator={trainer.accelerator} needs a GPU, and torch finds none here. "
                "Pass trainer=cpu, or trainer=auto."
            )
        if trainer.precision.startswith("16"):
            raise UserError(
                f"trainer.precision={trainer.precision} needs a GPU, and torch finds none here. "
                "Pass trainer.precision=auto."
            )
    elif trainer.precision.startswith("bf16") and not torch.cuda.is_bf16_supported():
        raise UserError(
            f"trainer.precision={trainer.precision} is not supported by this GPU. "
            "Pass trainer.precision=16-mixed."
        )


def _check_gpu(trainer: TrainerConfig) -> None:
    """Check that there is a card to keep pages on; as `_check_device`, asks torch only if it must."""
    here = "trainer.accelerator=cpu" if trainer.accelerator == "cpu" else None
    if here is None:
        import torch

        here = None if torch.cuda.is_available() else "torch finds none here"
    if here is not None:
        raise UserError(
            f"datamodule.placement=gpu needs a GPU, and {here}. Pass datamodule.placement=host."
        )
