"""What data modules and a curriculum must have: settings that go together, and files that are there."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from paragraph_ocr.checks.values import check_choice
from paragraph_ocr.config import (
    PAGES,
    DataConfig,
    EmnistData,
    EmnistLinesData,
    Experiment,
    FolderData,
    GeneratedData,
    IamData,
    IamStackedData,
)
from paragraph_ocr.errors import UserError

_OWN_FILES: dict[type[DataConfig], tuple[tuple[str, ...], str]] = {
    FolderData: (("auto", "train", "val", "test"), "folder of your images and transcriptions"),
    IamData: (("reference", "independent", "aachen"), "folder of IAM's archives"),
    EmnistData: ((), "folder of EMNIST's files"),
}
"""Data modules that read files of the user's: choices of `split`, and what `root` is."""


def check_data(experiment: Experiment) -> None:
    """Check the data module, each of the curriculum's corpora, and its stages."""
    for each in _with_each_corpus(experiment):
        with each as variant:
            _check_data(variant)
    _check_curriculum(experiment)


def check_files(experiment: Experiment) -> None:
    """Check that what data module and corpora read is here."""
    for each in _with_each_corpus(experiment):
        with each as variant:
            _check_files(variant.datamodule)


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


def _check_files(data: DataConfig) -> None:
    """Check that what a data module reads is here."""
    for kind, (choices, wanted) in _OWN_FILES.items():
        if not isinstance(data, kind):
            continue
        if choices:
            check_choice("datamodule.split", data.split, choices)  # type: ignore[attr-defined]
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
        if path is not None and not is_there(path, folder=True):
            fetched = (
                f"Type `python scripts/fetch.py {key}`, or pass"
                if path == f"outputs/{key}"
                else "Pass"
            )
            raise UserError(
                f"datamodule.{key}={path} is not a folder. {fetched} datamodule.{key}=<folder>."
            )


def is_there(path: str, *, folder: bool = False) -> bool:
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
            check_choice(f"{key}.corpora", name, known)
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
