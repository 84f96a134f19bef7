"""The model card of a release: what it reads, what it learnt from and how, how well, and where it fails."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from paragraph_ocr.config import (
    PAGES,
    DataConfig,
    EmnistData,
    Experiment,
    FolderData,
    IamData,
    RenderedData,
)
from paragraph_ocr.data.fonts import Face, load_faces
from paragraph_ocr.errors import UserError
from paragraph_ocr.reading.read import Recognizer

_LICENCES = {"open font license": "SIL OFL 1.1", "apache license": "Apache 2.0"}
_OF_PACKAGES = "SIL OFL 1.1 or Apache 2.0, as their packages say"


def model_card(
    recognizer: Recognizer, *, run: str, metrics: Mapping[str, float], num_bytes: int
) -> str:
    """Return the card in Markdown; no path of this machine is in it.

    Args:
        run: its name, from which the recipe is taken; "" if it is not known.
        metrics: those of the run, "minutes" among them where they are known.
        num_bytes: of the weights' file.
    """
    experiment, vocabulary = recognizer.experiment, "".join(recognizer.vocabulary.characters)
    data = experiment.datamodule
    millions = sum(parameter.numel() for parameter in recognizer.model.parameters()) / 1e6
    bullets = [line for source in _sources(experiment) for line in _described(source, vocabulary)]
    learnt = "\n".join(f"- {line}" for line in dict.fromkeys(bullets))
    normalised = ", made level and to their pitch of lines" if data.normalise else ""
    lower = ", ".join(map(str, experiment.decoding.heights))
    lower = f" Shorter texts are read on canvases of {lower} px in height." if lower else ""
    rounding = (
        "test/ after rounding to int8, val/ before" if experiment.release else "before rounding"
    )
    count, words = experiment.decoding.readings, experiment.decoding.lexicon
    looks = f"; test/ by the vote of {count} readings of each page, val/ by one" if count else ""
    looks += f"; words that no dictionary ({words}) has are taken for likely ones" if words else ""
    measured = "\n".join(
        f"| {key} | {value:.4g} |"
        for key, value in sorted(metrics.items())
        if key.startswith(("val/", "test/"))
    )
    return f"""# A model that reads paragraphs

Up to {recognizer.max_length - 2} characters on pages of {data.height}x{data.width} px.
Images are cleaned and scaled to that{normalised}.{lower}

```sh
python scripts/read.py checkpoint=<this folder> image=scan.jpg
python scripts/evaluate.py checkpoint=<this folder>
```

{millions:.2f} M parameters, matrices and convolutions as int8 ({num_bytes / 1e6:.1f} MB).
Characters it can write: `{vocabulary!r}`

## Data

{learnt}

## Training

{_training(experiment, run, metrics.get("minutes"))} The whole config is beside this file.
{_stages(experiment)}
## Figures

| of the run, {rounding}{looks} | |
| --- | --- |
{measured}

## Limits

It knows the hands that it was trained on, and one language's words. Rates on rendered pages say little about
real handwriting: evaluate it on your own pages. It writes something for every page, also for one without
writing; confidences say how sure it is of each character.
"""


def _sources(experiment: Experiment) -> list[DataConfig]:
    """Return what was trained on: the corpora that stages name, or the data module alone."""
    config = experiment.curriculum
    named = list(dict.fromkeys(name for stage in config.stages for name in stage.corpora)) or [
        PAGES
    ]
    known = {**config.corpora, PAGES: experiment.datamodule}
    # validated and tested on the data module whatever training took
    return [*(known[name] for name in named), experiment.datamodule]


def _described(data: DataConfig, characters: str) -> Iterator[str]:
    """Yield lines on where paragraphs come from and under which licences."""
    match data:
        case RenderedData():
            yield f"Pages rendered by the program itself. Texts: {_texts(data.texts)}."
            yield from _faces(data, characters)
        case IamData():
            yield "The IAM handwriting database, which is for non-commercial research."
        case EmnistData():
            yield "EMNIST: handwritten characters of NIST Special Database 19."
        case FolderData():
            yield "A folder of pages with their transcriptions, of the person who trained it."
        case _:
            yield f"`datamodule={data.name}`: no writing."


def _texts(texts: str | None) -> str:
    """Return which texts were drawn; a folder may say in its file LICENSE what it holds."""
    if texts is None:
        return "Shakespeare's plays, which are in the public domain"
    said = Path(texts) / "LICENSE"
    first = said.read_text(encoding="utf-8").partition("\n")[0] if said.is_file() else ""
    return f"`{_place(texts)}`" + (f": {first.rstrip('.')}" if first else "")


def _faces(data: RenderedData, characters: str) -> Iterator[str]:
    try:
        faces, _ = load_faces(
            None if data.fonts is None else Path(data.fonts), characters=characters
        )
    except UserError:
        yield f"Faces: those of `{_place(data.fonts or '')}`, which was not there to be listed."
        return
    by_licence: dict[str, list[str]] = {}
    for face in faces:
        by_licence.setdefault(_licence(face), []).append(face.name)
    listed = "; ".join(
        f"{licence}: {_names(by_licence[licence])}" for licence in sorted(by_licence)
    )
    yield f"{len(faces)} faces under open licences. {listed}."
    if data.held_out:
        yield f"Held out, so that validation and test see new hands: {_names(data.held_out)}."
    else:
        yield "No face is held out: validation and test see those of training, with other texts."


def _licence(face: Face) -> str:
    """Return the licence that lies beside a font, as scripts/fetch.py puts it there."""
    beside = face.path.with_suffix(".LICENSE")
    if not beside.is_file():
        return _OF_PACKAGES
    text = beside.read_text(encoding="utf-8", errors="replace").lower()
    return next((name for words, name in _LICENCES.items() if words in text), beside.name)


def _training(experiment: Experiment, run: str, minutes: float | None) -> str:
    # a name made of overrides may hold paths: the recipe is told, and whether there were others
    recipe = re.search(r"\bexperiment=[\w-]+", run)
    others = re.sub(r"\b(experiment|outputs|seed|tracking(\.\w+)?)=[^,]*,?", "", run)
    more = " and overrides" if others else ""
    name = f"`python train.py {recipe[0]}`{more}, seed" if recipe else "Seed"
    took = f", {minutes:.1f} minutes from start to test" if minutes is not None else ""
    return f"{name} {experiment.seed}{took}."


def _stages(experiment: Experiment) -> str:
    """Return the curriculum as a table; nothing where there was none."""
    config, rows = experiment.curriculum, []
    known = {**config.corpora, PAGES: experiment.datamodule}
    for stage in config.stages:
        data = [known[name] for name in stage.corpora]
        canvases = _names(dict.fromkeys(f"{one.height}x{one.width}" for one in data))
        over = [] if stage.below is None else [f"loss below {stage.below:g}"]
        over += [] if stage.max_steps is None else [f"{stage.max_steps:,} steps"]
        until = " or ".join(over) or "the end"
        rows.append(f"| {_names(stage.corpora)} | {canvases} | {stage.batch_size} | {until} |")
    if not rows:
        return ""
    head = [
        "",
        "| pages | canvas, px | paragraphs in a step | until |",
        "| --- | --- | --- | --- |",
    ]
    on = [] if config.wait else ["", "Each goes on until the next one's pages have been rendered."]
    return "\n".join([*head, *rows, *on, ""])


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


def _place(path: str) -> str:
    """Return a path as it may be told: of an absolute one the name alone."""
    return Path(path).name if Path(path).is_absolute() else path
