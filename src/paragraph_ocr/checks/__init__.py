"""Which values a config may hold: each alone, what must go together, what this machine has."""

import re
from itertools import pairwise
from typing import Any

from paragraph_ocr.checks.data import check_data, check_files, is_there
from paragraph_ocr.checks.devices import check_devices
from paragraph_ocr.checks.values import check_values
from paragraph_ocr.config import (
    DecoderConfig,
    DecodingConfig,
    Experiment,
    GeneratedData,
    LineCnnModel,
    TrackingConfig,
    TrainerConfig,
    TransformerModel,
    VocabularyConfig,
)
from paragraph_ocr.errors import UserError

_VIEWS = ((0.2, 2.0), (0.2, 2.0), (-60, 60), (-45, 45))
"""Least and greatest numbers of a view: factors of width and height, degrees of leaning and turning."""

__all__ = ["check_combinations", "check_together", "check_values"]


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
    _check_decoding(experiment.decoding)
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
    _check_calm(experiment)
    check_data(experiment)


def check_combinations(experiment: Experiment) -> None:
    """Check what must go together, and with this machine: its files and devices."""
    check_together(experiment)
    weights = experiment.model.weights
    if weights is not None and not is_there(weights):
        raise UserError(
            f"model.weights={weights} does not exist. Pass a run folder or a .safetensors file."
        )
    check_files(experiment)
    _check_tracking(experiment.tracking)
    check_devices(experiment)


def _check_schedule(experiment: Experiment) -> None:
    """Check that a schedule that comes to an end knows when that is."""
    name, trainer = experiment.schedule.name, experiment.trainer
    if _counts_steps(trainer) or name == "constant":
        return
    if trainer.max_time is None or name == "one_cycle":
        limit = "trainer.max_steps" if name == "one_cycle" else "trainer.max_time"
        raise UserError(
            f"schedule={name} needs to know when training ends. Pass {limit}=<limit>, or "
            "schedule=constant."
        )


def _counts_steps(trainer: TrainerConfig) -> bool:
    """Return whether training ends after so many steps or epochs, whatever its time."""
    if trainer.max_steps != -1:
        return True
    return trainer.max_epochs != -1 and (trainer.max_epochs is not None or trainer.max_time is None)


def _check_calm(experiment: Experiment) -> None:
    """Check that augmentation that is to be calmer is the learner's, and that it can know when."""
    after = f"regularization.calm_after={experiment.regularization.calm_after:g}"
    if experiment.regularization.calm_after == 1:
        return
    if experiment.regularization.augment_on == "workers":
        raise UserError(
            f"{after} does nothing where workers augment. Pass regularization.augment_on=device."
        )
    if not _counts_steps(experiment.trainer) and experiment.trainer.max_time is None:
        raise UserError(f"{after} needs to know when training ends. Pass trainer.max_time=<limit>.")


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


def _check_decoding(decoding: DecodingConfig) -> None:
    if decoding.name != "beam" and decoding.beam_width != 1:
        raise UserError(
            f"decoding.beam_width={decoding.beam_width} does nothing in decoding={decoding.name}. "
            "Pass decoding=beam."
        )
    if (decoding.name == "vote") != bool(decoding.views):
        raise UserError(
            f"decoding.views={decoding.views} does not go with decoding.name={decoding.name}. "
            f"Pass decoding={'vote' if decoding.views else 'greedy'}."
        )
    for key, value in (("enough", decoding.enough), ("lexicon", decoding.lexicon)):
        if value and decoding.name != "vote":
            raise UserError(
                f"decoding.{key}={value} does nothing in decoding={decoding.name}. Pass decoding=vote."
            )
    for view in decoding.views:
        numbers = isinstance(view, list) and all(isinstance(part, int | float) for part in view)
        if (
            not numbers
            or len(view) != len(_VIEWS)
            or not all(low <= part <= high for part, (low, high) in zip(view, _VIEWS, strict=True))
        ):
            raise UserError(
                f"decoding.views has {view}, and needs two factors from {_VIEWS[0][0]} to {_VIEWS[0][1]}, "
                f"a lean of at most {_VIEWS[2][1]} and a turn of at most {_VIEWS[3][1]} degrees. "
                "Pass decoding.views=[[1,1,0,0],[1.15,1,12,0]]."
            )
    _check_enough(decoding)
    if any(b <= a for a, b in pairwise([0, *decoding.heights])):
        raise UserError(
            f"decoding.heights={decoding.heights} must be pixels that rise. Pass decoding.heights=[] to "
            "read every page on its whole canvas."
        )


def _check_enough(decoding: DecodingConfig) -> None:
    before: list[Any] = [1, -1]
    for pair in decoding.enough:
        numbers = isinstance(pair, list) and [*map(type, pair)] in ([int, float], [int, int])
        if not numbers or not (
            before[0] < pair[0] < len(decoding.views) and before[1] < pair[1] <= 1
        ):
            raise UserError(
                f"decoding.enough has {pair}, and needs numbers of readings from 2 to fewer than the "
                f"{len(decoding.views)} views, each with a share of characters up to 1, both rising. "
                "Pass decoding.enough=[[2,0.02]], or [] to read all views."
            )
        before = pair


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
    if experiment.decoding.name != "greedy":
        raise UserError(
            f"decoding={experiment.decoding.name} does nothing for model=line_cnn. Pass decoding=greedy."
        )
    if experiment.decoding.heights:
        raise UserError(
            f"decoding.heights={experiment.decoding.heights} does nothing for model=line_cnn, whose lines "
            "are all as high. Pass decoding.heights=[]."
        )
    if experiment.regularization.guidance:
        raise UserError(
            f"regularization.guidance={experiment.regularization.guidance:g} does nothing for "
            "model=line_cnn, which looks at windows in their order. Pass regularization.guidance=0."
        )


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
