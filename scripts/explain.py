"""Show what a model does while it reads an image: attention, residual stream, circuits, positions.

    python scripts/explain.py image=note.jpg    # the released model
    python scripts/explain.py checkpoint=outputs/runs/<run> image=note.jpg
    python scripts/explain.py model=tiny image=note.jpg    # a model that nobody has trained

Writes a picture of each, an animation, and explain.html with all of them. The image's true text, for teacher
forcing, is taken from the .txt file beside it if there is one.
"""

import glob
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from paragraph_ocr import arguments, console
from paragraph_ocr.errors import UserError
from paragraph_ocr.reading.checkpoint import DEFAULT, find_checkpoint

if TYPE_CHECKING:
    from paragraph_ocr.reading import Recognizer


@dataclass(frozen=True)
class Options:
    image: str = field(metadata={"help": "file, or a glob, of which the first is taken"})
    checkpoint: str | None = field(
        default=None,
        metadata={"help": f"run folder, MLflow run id, or released model; null: {DEFAULT}"},
    )
    model: str | None = field(
        default=None, metadata={"help": "instead: a choice of model= to show untrained"}
    )
    text: Path | None = field(
        default=None,
        metadata={"help": "file of the true text; null: the .txt file beside the image"},
    )
    folder: Path = field(
        default=Path("outputs/explain"), metadata={"help": "where pictures and page are written"}
    )


def explain(options: Options) -> None:
    """Write the pictures and the page."""
    if options.checkpoint is not None and options.model is not None:
        raise UserError(
            f"checkpoint={options.checkpoint} and model={options.model}, which is untrained, exclude each "
            "other. Pass one of them."
        )
    image = first_image(options.image)
    text = true_text(options.text, image)
    # torch takes seconds to import: not before the arguments are known to be good
    from paragraph_ocr.reading import Recognizer
    from paragraph_ocr.reading.explain_page import explain_image, write_explanation

    if options.model is None:
        checkpoint = find_checkpoint(options.checkpoint or DEFAULT)
        recognizer = Recognizer.load(checkpoint.weights, device="cpu")
        name = checkpoint.config.parent.name
    else:
        recognizer, name = untrained(options.model), f"model={options.model}, untrained"
    told = explain_image(recognizer, image, text=text)
    page = write_explanation(told, options.folder, title=f"How {name} reads {image.name}")
    console.say(f"wrote {page}")


def first_image(image: str) -> Path:
    """Return the file, or the first that a glob finds; a file that is not there is refused by its reader."""
    if Path(image).exists():
        return Path(image)
    return Path(min(glob.glob(image), default=image))  # noqa: PTH207  (Path.glob takes no absolute pattern)


def true_text(named: Path | None, image: Path) -> str | None:
    """Return the text of the image, None if there is none beside it.

    Raises:
        UserError: the file that was named cannot be read.
    """
    beside = image.with_suffix(".txt")
    file = named or beside
    if named is None and not beside.is_file():
        return None
    try:
        return file.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text={file} cannot be read: {error}. Pass text=<UTF-8 file>.") from error


def untrained(model: str) -> "Recognizer":
    """Return a model of the default data's canvas as it is before training, always the same.

    Raises:
        UserError: there is no such choice.
    """
    import torch
    from omegaconf import OmegaConf

    from paragraph_ocr.build_model import build_recognizer, vocabulary_from
    from paragraph_ocr.config import LineCnnModel
    from paragraph_ocr.reading import Recognizer
    from paragraph_ocr.reading.explain import NO_ATTENTION
    from paragraph_ocr.validation import compose, validate

    composed = compose([f"model={model}"])
    if OmegaConf.get_type(composed.model) is LineCnnModel:  # its data would be refused first
        raise UserError(NO_ATTENTION)
    experiment = validate(composed)
    torch.manual_seed(experiment.seed)
    vocabulary = vocabulary_from(experiment.vocabulary)
    return Recognizer(build_recognizer(experiment, vocabulary), vocabulary, experiment)


if __name__ == "__main__":
    sys.exit(arguments.run(Options, explain, about=__doc__ or ""))
