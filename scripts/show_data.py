"""Write a contact sheet of a data module's paragraphs, plain and as training sees them.

    python scripts/show_data.py datamodule=synthetic_notes regularization=standard

Takes the overrides of train.py; writes data.png and augmented.png under outputs/show_data.
"""

import sys
from pathlib import Path

from paragraph_ocr import console
from paragraph_ocr.errors import UserError
from paragraph_ocr.validation import compose, validate

NUM_PARAGRAPHS = 12


def main(overrides: list[str]) -> int:
    try:
        show(overrides)
    except UserError as error:
        console.error(str(error))
        return 2
    return 0


def show(overrides: list[str]) -> None:
    """Prepare the store if need be, and write both sheets."""
    experiment = validate(compose(overrides))
    from paragraph_ocr import build
    from paragraph_ocr.data.contact_sheet import contact_sheet

    vocabulary = build.build_vocabulary(experiment)
    with console.progress("render") as progress:
        datamodule = build.build_datamodule(experiment, vocabulary, progress=progress)
        datamodule.prepare_data()
    datamodule.setup()
    console.say(repr(datamodule))
    batch = next(iter(datamodule.val_dataloader()))
    images = batch.images[:NUM_PARAGRAPHS]
    texts = [vocabulary.decode(row) for row in batch.tokens[:NUM_PARAGRAPHS, 1:].tolist()]
    augment = build.build_augment(experiment)
    folder = Path(experiment.outputs) / "show_data"
    folder.mkdir(parents=True, exist_ok=True)
    columns = max(1, 1600 // images.shape[-1])
    for name, pages in (("data", images), ("augmented", augment(images))):
        sheet = contact_sheet([page[0].numpy() for page in pages], texts, columns=columns)
        path = folder / f"{name}.png"
        sheet.save(path)
        console.say(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
