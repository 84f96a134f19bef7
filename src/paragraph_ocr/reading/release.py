"""A release: a model small enough to be kept with the code, and what a person should know of it."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from paragraph_ocr.config import CurriculumConfig, Experiment
from paragraph_ocr.errors import UserError
from paragraph_ocr.quantised import quantise
from paragraph_ocr.reading.card import model_card
from paragraph_ocr.reading.checkpoint import BEST
from paragraph_ocr.reading.read import Recognizer
from paragraph_ocr.stored import write_config

CARD, METRICS = "README.md", "metrics.json"


def release(
    recognizer: Recognizer, folder: Path, *, metrics: Mapping[str, float], run: str = ""
) -> None:
    """Write config.yaml, best.safetensors (int8), metrics.json and a model card into a new folder.

    Args:
        metrics: of the run; of its test after the weights were rounded, if release=true.
        run: its name, for the card.

    Raises:
        UserError: the folder exists.
    """
    if folder.exists():
        raise UserError(f"folder={folder} exists. Pass another name for the release.")
    folder.mkdir(parents=True)
    write_config(_without_places(recognizer.experiment), folder)
    save_file(quantise(recognizer.model.state_dict()), folder / BEST)
    (folder / METRICS).write_text(json.dumps(dict(metrics), indent=1) + "\n")
    size = (folder / BEST).stat().st_size
    card = model_card(recognizer, run=run, metrics=metrics, num_bytes=size)
    (folder / CARD).write_text(card, encoding="utf-8")


def _without_places(experiment: Experiment) -> Experiment:
    """Return the experiment without absolute paths and addresses, and without its stages."""
    settled = copy.deepcopy(experiment)
    settled.outputs, settled.name = "outputs", None
    settled.model.weights = settled.tracking.uri = None
    for key in ("root", "fonts", "texts"):
        path = getattr(settled.datamodule, key, None)
        if path is not None and Path(path).is_absolute():
            setattr(settled.datamodule, key, None)
    settled.curriculum = CurriculumConfig()
    return settled
