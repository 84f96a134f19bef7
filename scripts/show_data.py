"""Look at a data module: contact sheets, plain and augmented, and a report of what it holds.

    python scripts/show_data.py datamodule=synthetic_notes regularization=standard

Takes the overrides of train.py. Writes data.png, augmented.png (as training sees it), levels.png (every
choice of regularization) and report.html under outputs/show_data, and logs them to MLflow as a run of
kind "data" unless tracking=off.
"""

import sys
from dataclasses import asdict
from pathlib import Path

from paragraph_ocr import console
from paragraph_ocr.config import Experiment
from paragraph_ocr.errors import UserError
from paragraph_ocr.validation import compose, validate

NUM_PARAGRAPHS = 12
NUM_IN_LEVELS = 2
LEVELS = ("none", "light", "reference", "standard", "strong")
SHEET_PX = 1600


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
    import torch

    from paragraph_ocr import build
    from paragraph_ocr.data.contact_sheet import contact_sheet
    from paragraph_ocr.data.dataset import ParagraphDataset, collate
    from paragraph_ocr.data.store import Store
    from paragraph_ocr.data.survey import report, survey

    torch.manual_seed(experiment.seed)
    with console.progress("prepare") as progress:
        vocabulary = build.build_vocabulary(experiment, progress=progress)
        datamodule = build.build_datamodule(experiment, vocabulary, progress=progress)
        datamodule.prepare_data()
    datamodule.setup()
    console.say(repr(datamodule))
    store = Store(datamodule.corpus.prepare(datamodule.root, num_workers=0))
    split = next(split for split in ("val", "train", "test") if store.rows(split))
    some = ParagraphDataset(store, store.rows(split)[:NUM_PARAGRAPHS], vocabulary)
    batch = collate([some[index] for index in range(len(some))])
    few = collate([some[index] for index in range(min(NUM_IN_LEVELS, len(some)))])
    images = batch.images
    texts = [vocabulary.prepare(store.texts[row]) for row in some.rows]

    columns = max(1, SHEET_PX // images.shape[-1])
    seen = build.augment_somewhere(batch, experiment)
    sheets = {
        "data": contact_sheet([page[0].numpy() for page in images], texts, columns=columns),
        "augmented": contact_sheet([page[0].numpy() for page in seen], texts, columns=columns),
    }
    own = [override for override in overrides if not override.startswith("regularization")]
    levels = [
        build.augment_somewhere(few, validate(compose([*own, f"regularization={level}"])))
        for level in LEVELS
    ]
    sheets["levels"] = contact_sheet(
        [page[0].numpy() for pages in zip(*levels, strict=True) for page in pages],
        [level for _ in range(len(few)) for level in LEVELS],
        columns=len(LEVELS) if len(LEVELS) * images.shape[-1] < 2 * SHEET_PX else 1,
    )

    folder = Path(experiment.outputs) / "show_data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, sheet in sheets.items():
        sheet.save(folder / f"{name}.png")
    splits = survey(store, vocabulary)
    page = report(
        f"datamodule={experiment.datamodule.name}",
        splits,
        notes=[repr(datamodule), " ".join(overrides)],
        pictures=[
            (f"Paragraphs of {split}", sheets["data"]),
            ("The same as training sees them", sheets["augmented"]),
            ("Every choice of regularization", sheets["levels"]),
        ],
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    files = [*(folder / f"{name}.png" for name in sheets), folder / "report.html"]
    for path in files:
        console.say(f"wrote {path}")
    counts = {f"{name}_paragraphs": float(found.paragraphs) for name, found in splits.items()}
    log(experiment, overrides, files=files, metrics=counts)


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
