"""Make a run's model ready for elsewhere: ONNX graphs, a model in MLflow, or a release kept with the code.

    python scripts/export.py checkpoint=outputs/runs/<run>
    python scripts/export.py checkpoint=outputs/runs/<run> images=scans
    python scripts/export.py checkpoint=outputs/runs/<run> to=mlflow register=handwriting
    python scripts/export.py checkpoint=outputs/runs/<run> to=release folder=models/<name>

With `images`, torch and onnxruntime read them in turns: whether the texts agree, and how fast each was.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from paragraph_ocr import arguments, console
from paragraph_ocr.errors import UserError

BATCH_SIZES = (1, 8)


@dataclass(frozen=True)
class Options:
    checkpoint: str = field(metadata={"help": "run folder, MLflow run id, or released model"})
    to: Literal["onnx", "mlflow", "release"] = field(
        default="onnx", metadata={"help": "onnx, mlflow or release"}
    )
    folder: Path | None = field(
        default=None,
        metadata={"help": "of the graphs, or the release; null is outputs/onnx/<checkpoint>"},
    )
    images: Path | None = field(
        default=None, metadata={"help": "folder of images to compare torch and ONNX on"}
    )
    register: str | None = field(
        default=None, metadata={"help": "name in MLflow's registry, with to=mlflow"}
    )
    outputs: Path = field(default=Path("outputs"), metadata={"help": "folder of the runs"})


def export(options: Options) -> None:
    """Write the graphs or the release, or log the model."""
    if options.to == "mlflow":
        to_mlflow(options)
    elif options.to == "release":
        to_release(options)
    else:
        to_onnx(options)


def to_onnx(options: Options) -> None:
    if options.register:
        raise UserError(f"register={options.register} needs MLflow. Pass to=mlflow.")
    images = sorted_images(options.images) if options.images else []
    # torch takes seconds to import: not before the arguments are known to be good
    import torch

    from paragraph_ocr.reading import Recognizer
    from paragraph_ocr.reading.checkpoint import find_checkpoint
    from paragraph_ocr.reading.export import compare, export_onnx
    from paragraph_ocr.reading.onnx import OnnxRecognizer

    recognizer = Recognizer.load(options.checkpoint, device="cpu", outputs=options.outputs)
    name = find_checkpoint(options.checkpoint, outputs=options.outputs).config.parent.resolve().name
    folder = options.folder or options.outputs / "onnx" / name
    if (decoding := recognizer.experiment.decoding.name) != "greedy":
        console.warn(f"decoding={decoding}: onnxruntime will read greedily.")
    export_onnx(recognizer, folder)
    for file in sorted(folder.iterdir()):
        console.say(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
    if not images:
        return
    exported = OnnxRecognizer.load(folder)
    recognizer.precision = torch.float32  # the graphs'
    for batch_size in BATCH_SIZES:
        found = compare(recognizer, exported, images, batch_size=batch_size)
        console.say(
            f"{found.batch_size} at once: torch {found.torch_s * 1000:.0f} ms, onnxruntime "
            f"{found.onnx_s * 1000:.0f} ms, {found.torch_s / found.onnx_s:.1f} times as fast; "
            f"{found.same} of {found.of} texts the same"
        )


def sorted_images(folder: Path) -> list[Path]:
    """Return the images of a folder, in order."""
    from paragraph_ocr.data.scan import SUFFIXES

    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"images={folder} holds no images. Pass images=<folder of images>.")
    return found


def to_release(options: Options) -> None:
    if options.folder is None:
        raise UserError("folder has no value. Pass folder=models/<name of the release>.")
    if options.images or options.register:
        raise UserError("images and register are not for to=release. Leave them out.")
    from paragraph_ocr.reading import Recognizer
    from paragraph_ocr.reading.checkpoint import find_checkpoint
    from paragraph_ocr.reading.release import release
    from paragraph_ocr.resume import read_story

    recognizer = Recognizer.load(options.checkpoint, device="cpu", outputs=options.outputs)
    run = find_checkpoint(options.checkpoint, outputs=options.outputs).config.parent
    story = read_story(run)
    name = story.get("name") or ""
    release(recognizer, options.folder, metrics=story.get("metrics", {}), run=name)
    for file in sorted(options.folder.iterdir()):
        console.say(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
    console.say(f"See what rounding costs: python scripts/evaluate.py checkpoint={options.folder}")


def to_mlflow(options: Options) -> None:
    if options.folder or options.images:
        raise UserError("folder and images are for to=onnx. Leave them out.")
    from paragraph_ocr.mlflow_model import log_finished, serve_command
    from paragraph_ocr.reading.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(options.checkpoint, outputs=options.outputs)
    logged, uri = log_finished(checkpoint, outputs=options.outputs, register=options.register)
    console.say(f"logged as {logged.uri}; serve it with")
    console.say(serve_command(logged, uri))


if __name__ == "__main__":
    sys.exit(arguments.run(Options, export, about=__doc__ or ""))
