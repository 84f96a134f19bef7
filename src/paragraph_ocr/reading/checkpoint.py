"""Where a trained model lies: a run folder, an exported folder, an MLflow run, or a released name."""

import re
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from paragraph_ocr.errors import UserError, nearest
from paragraph_ocr.stored import CONFIG

RELEASED = Path(__file__).resolve().parents[3] / "models"
"""Folder of the repository in which each released model has a folder of its name."""

DEFAULT = "models/paragraphs"
"""What reads where no checkpoint is named; below the working directory, or else below the repository."""

BEST = "best.safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's config and its weights."""

    config: Path
    weights: Path


def find_checkpoint(path: str | Path, *, outputs: Path = Path("outputs")) -> Checkpoint:
    """Return the files of a model.

    Args:
        path: a folder that holds config.yaml and best.safetensors; another weights file in such a
            folder; a pattern, of which the newest such folder is meant; the id of an MLflow run; or
            the name of a released model, with models/ before it or not.
        outputs: where MLflow's database is looked for, unless MLFLOW_TRACKING_URI says it.

    Raises:
        UserError: it is none of these, or a file is missing.
    """
    named, here = str(path), Path(path)
    if here.is_file() and here.suffix == ".safetensors":
        return _checked(here.parent, here)
    if here.is_dir():
        return _checked(here, here / BEST)
    matches = map(Path, glob(named))  # noqa: PTH207  (Path.glob takes no absolute pattern)
    if found := [match for match in matches if (match / CONFIG).is_file()]:
        newest = max(found, key=lambda folder: (folder / CONFIG).stat().st_mtime_ns)
        return _checked(newest, newest / BEST)
    if re.fullmatch(r"[0-9a-f]{32}", named):
        # MLflow takes seconds to import, and a folder needs none of it
        from paragraph_ocr.tracking import folder_of_run

        folder = folder_of_run(named, outputs=outputs)
        return _checked(folder, folder / BEST)
    released = sorted(folder.name for folder in RELEASED.glob("*") if folder.is_dir())
    name = named.removeprefix("models/")
    if name in released:
        return _checked(RELEASED / name, RELEASED / name / BEST)
    if named == DEFAULT:
        raise UserError(
            f"checkpoint={DEFAULT}, the released model, is not here. Train one with python train.py "
            "experiment=ten_minutes, and pass checkpoint=outputs/runs/<run>."
        )
    listed = ", ".join(released) or "none so far"
    close = nearest(name, released, count=1)
    wanted = close[0] if close else "outputs/runs/<run>"
    raise UserError(
        f"checkpoint={named} is no run folder, no MLflow run id and no released model ({listed}). "
        f"Pass checkpoint={wanted}."
    )


def _checked(folder: Path, weights: Path) -> Checkpoint:
    config = folder / CONFIG
    if not config.is_file():
        raise UserError(
            f"checkpoint={folder} holds no {CONFIG}. Pass checkpoint=outputs/runs/<run>."
        )
    if not weights.is_file():
        last = folder / "last.safetensors"
        instead = last if last.is_file() else "outputs/runs/<another run>"
        raise UserError(
            f"checkpoint={folder} holds no {weights.name}: no validation was finished. "
            f"Pass checkpoint={instead}."
        )
    return Checkpoint(config, weights)
