"""A release: a model small enough to be kept with the code, and what a person should know of it."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from paragraph_ocr.config import CurriculumConfig, Experiment
from paragraph_ocr.errors import UserError
from paragraph_ocr.quantised import quantise
from paragraph_ocr.reading.checkpoint import BEST
from paragraph_ocr.reading.read import Recognizer
from paragraph_ocr.stored import write_config

CARD, METRICS = "README.md", "metrics.json"


def release(recognizer: Recognizer, folder: Path, *, metrics: Mapping[str, float]) -> None:
    """Write config.yaml, best.safetensors (int8), metrics.json and a model card into a new folder.

    Args:
        metrics: of the run, measured before its weights were rounded.

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
    (folder / CARD).write_text(_card(recognizer, folder.name, metrics, size), encoding="utf-8")


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


def _card(recognizer: Recognizer, name: str, metrics: Mapping[str, float], size: int) -> str:
    experiment = recognizer.experiment
    data, millions = (
        experiment.datamodule,
        sum(p.numel() for p in recognizer.model.parameters()) / 1e6,
    )
    measured = "\n".join(
        f"| {key} | {value:.4g} |"
        for key, value in sorted(metrics.items())
        if key.startswith(("val/", "test/"))
    )
    return f"""# {name}

Reads paragraphs of up to {recognizer.max_length - 2} characters on pages of {data.height}x{data.width} px.
Others are scaled.

```sh
python scripts/read.py checkpoint={name} image=scan.jpg
python scripts/evaluate.py checkpoint={name}
```

{millions:.2f} M parameters, matrices and convolutions as int8 ({size / 1e6:.1f} MB). Trained on
`datamodule={data.name}`, seed {experiment.seed}; the whole config is beside this file.

| of the run, before rounding to int8 | |
| --- | --- |
{measured}

Characters it can write: `{"".join(recognizer.vocabulary.characters)!r}`

Limits: it knows the hands that it was trained on, and one language's words. It writes something for
every page, also for one without writing; confidences say how sure it is of each character.
"""
