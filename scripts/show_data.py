"""Look at a data module: contact sheets, plain and augmented, and a report of what it holds.

    python scripts/show_data.py datamodule=synthetic_notes regularization=standard

Takes the overrides of train.py. Writes data.png, augmented.png (as training sees it), levels.png (every
choice of regularization) and report.html under outputs/show_data, and logs them to MLflow as a run of
kind "data" unless tracking=off.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from paragraph_ocr import console
from paragraph_ocr.config import Experiment
from paragraph_ocr.errors import UserError
from paragraph_ocr.validation import compose, validate

if TYPE_CHECKING:
    from PIL.Image import Image

    from paragraph_ocr.data.store import Store
    from paragraph_ocr.vocabulary import Vocabulary

NUM_PARAGRAPHS = 12
NUM_IN_LEVELS = 2
LEVELS = ("none", "light", "reference", "standard", "strong", "scans")
SHEET_PX = 1600
HEADINGS = {
    "data": "Paragraphs",
    "augmented": "The same as training sees them",
    "levels": "Every choice of regularization",
}


def main(overrides: list[str]) -> int:
    try:
        show(overrides)
    except UserError as error:
        console.error(str(error))
        return 2
    return 0


def show(overrides: list[str]) -> None:
    """Prepare the store if need be; write and log sheets and report."""
    experiment = validate(compose(overrides))
    from paragraph_ocr import build
    from paragraph_ocr.data.store import Store
    from paragraph_ocr.data.survey import report, survey

    with console.progress("prepare") as progress:
        vocabulary = build.build_vocabulary(experiment, progress=progress)
        datamodule = build.build_pages(experiment, vocabulary, progress=progress)
        datamodule.prepare_data()
    datamodule.setup()
    console.say(repr(datamodule))
    store = Store(datamodule.corpus.prepare(datamodule.root, num_workers=0))
    pictures = draw(experiment, overrides, store, vocabulary)
    splits = survey(store, vocabulary)
    page = report(
        f"datamodule={experiment.datamodule.name}",
        splits,
        notes=[repr(datamodule), " ".join(overrides)],
        pictures=[(HEADINGS[name], picture) for name, picture in pictures.items()],
    )
    folder = Path(experiment.outputs) / "show_data"
    folder.mkdir(parents=True, exist_ok=True)
    files = [*(folder / f"{name}.png" for name in pictures), folder / "report.html"]
    for path, picture in zip(files[:-1], pictures.values(), strict=True):
        picture.save(path)
    files[-1].write_text(page, encoding="utf-8")
    for path in files:
        console.say(f"wrote {path}")
    counts = {f"{name}_paragraphs": float(found.paragraphs) for name, found in splits.items()}
    log(experiment, overrides, files=files, metrics=counts)


def draw(
    experiment: Experiment, overrides: list[str], store: "Store", vocabulary: "Vocabulary"
) -> dict[str, "Image"]:
    """Return the sheets by name: some paragraphs, the same augmented, a few at every level."""
    import torch

    from paragraph_ocr import build
    from paragraph_ocr.data.contact_sheet import contact_sheet
    from paragraph_ocr.data.dataset import ParagraphDataset, collate

    torch.manual_seed(experiment.seed)
    split = next(split for split in ("val", "train", "test") if store.rows(split))
    some = ParagraphDataset(store, store.rows(split)[:NUM_PARAGRAPHS], vocabulary)
    texts = [vocabulary.prepare(store.texts[row]) for row in some.rows]
    items = [some[index] for index in range(len(some))]
    batch, few = collate(items), collate(items[:NUM_IN_LEVELS])

    def sheet(images, texts, columns):
        return contact_sheet([page[0].numpy() for page in images], texts, columns=columns)

    width = batch.images.shape[-1]
    columns = max(1, SHEET_PX // width)
    own = [override for override in overrides if not override.startswith("regularization")]
    levels = [
        build.augment_somewhere(few, validate(compose([*own, f"regularization={level}"])))
        for level in LEVELS
    ]
    return {
        "data": sheet(batch.images, texts, columns),
        "augmented": sheet(build.augment_somewhere(batch, experiment), texts, columns),
        "levels": sheet(
            [page for pages in zip(*levels, strict=True) for page in pages],
            LEVELS * len(few),
            len(LEVELS) if len(LEVELS) * width < 2 * SHEET_PX else 1,
        ),
    }


def log(
    experiment: Experiment, overrides: list[str], *, files: list[Path], metrics: dict[str, float]
) -> None:
    """Leave the files in MLflow, as a run of its own among the others."""
    tracking = experiment.tracking
    if tracking.name == "off":
        return
    from paragraph_ocr.tracking import TrackedRun

    run = TrackedRun(
        Path(experiment.outputs),
        name=",".join(["data", *overrides]),
        parameters={
            f"datamodule.{key}": value for key, value in asdict(experiment.datamodule).items()
        },
        tags={"kind": "data"},
        experiment_name=tracking.experiment_name,
        uri=tracking.uri,
    )
    with run.ending():
        run.log_metrics(metrics, step=0)
        for file in files:
            run.log_file(file)
    console.say(f"logged to MLflow as run {run.run_id}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
