"""Read images with a trained model.

    python scripts/read.py image=note.jpg
    python scripts/read.py image=scans write=txt,page into=readings
    python scripts/read.py checkpoint=outputs/runs/<run> image=note.jpg

Without checkpoint= the released model reads. Text goes to the screen; `write` makes a file of each image too.
Exit status: 0 all images were read, 2 some could not be (a line each), or a mistake.
"""

import glob
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from paragraph_ocr import arguments, console
from paragraph_ocr.errors import UserError
from paragraph_ocr.reading.checkpoint import DEFAULT


@dataclass(frozen=True)
class Options:
    image: str = field(metadata={"help": "file, folder or glob"})
    checkpoint: str = field(
        default=DEFAULT, metadata={"help": "run folder, MLflow run id, or released model"}
    )
    write: tuple[Literal["txt", "json", "page", "alto"], ...] = field(
        default=(), metadata={"help": "txt, json, page, alto: one or several, with commas"}
    )
    into: Path = field(
        default=Path("outputs/readings"), metadata={"help": "folder of the written files"}
    )
    normalise: bool | None = field(
        default=None,
        metadata={"help": "true, false; null: as the model's datamodule.normalise says"},
    )
    decoding: str | None = field(
        default=None,
        metadata={"help": "greedy, beam, vote (fewer errors, longer); null: the model's"},
    )
    lexicon: str | None = field(
        default=None,
        metadata={
            "help": "en, de, ...: language of the words that a vote takes for what is none; "
            "none: as it was read; null: the model's"
        },
    )
    batch_size: int = field(default=16, metadata={"help": "images read together"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:<n>"})
    outputs: Path = field(
        default=Path("outputs"), metadata={"help": "folder of MLflow's database, for run ids"}
    )


def read(options: Options) -> int:
    """Print the reading of each image, write the files asked for; return the exit status."""
    if not 1 <= options.batch_size <= 4096:
        raise UserError(
            f"batch_size={options.batch_size} must lie in 1 to 4096. Pass batch_size=16."
        )
    paths, base = find_images(options.image)
    names = file_names(paths, base)
    if options.write:
        keep_transcriptions(paths, names, options)
    # torch takes seconds to import: not before the arguments are known to be good
    from paragraph_ocr.reading import Recognizer, Refusal
    from paragraph_ocr.reading.write import FORMATS

    recognizer = Recognizer.load(options.checkpoint, device=options.device, outputs=options.outputs)
    if options.normalise is not None:
        recognizer.normalise = options.normalise
    typed = [] if options.decoding is None else [f"decoding={options.decoding}"]
    if options.lexicon is not None:
        language = "null" if options.lexicon == "none" else options.lexicon
        typed.append(f"decoding.lexicon={language}")
    if typed:
        from paragraph_ocr.build_model import build_decoding
        from paragraph_ocr.validation import overridden

        chosen = overridden(recognizer.experiment, typed)
        recognizer.decoding = build_decoding(chosen, recognizer.vocabulary)
    created, refused, began = datetime.now(UTC), 0, time.perf_counter()
    several = len(paths) > 1
    with console.progress("read", apart=True) as progress:
        read = recognizer.read_all(paths, batch_size=options.batch_size)
        for done, (path, name, result) in enumerate(zip(paths, names, read, strict=True), 1):
            if isinstance(result, Refusal):
                refused += 1
                console.error(result.reason)
            else:
                if several:
                    console.say(f"==> {path} <==", style="bold")
                console.say(result.text)
                for form in options.write:
                    suffix, written = FORMATS[form]
                    file = options.into / f"{name}{suffix}"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    text = written(result, model=options.checkpoint, created=created)
                    file.write_text(text, encoding="utf-8")
            if several:
                progress(done, len(paths))
    if several:
        seconds = time.perf_counter() - began
        console.say(
            f"{len(paths) - refused:,} of {len(paths):,} images read in {seconds:.1f} s "
            f"({len(paths) / seconds:.1f} a second)"
        )
    if options.write:
        console.say(f"written into {options.into}", style="dim")
    return 2 if refused else 0


def find_images(image: str) -> tuple[list[Path], Path]:
    """Return the images that are meant, in order, and the folder that they are named from.

    Of a folder those files, at any depth, that have an image's suffix; of a file or a glob whatever
    it names.

    Raises:
        UserError: there is none.
    """
    from paragraph_ocr.data.scan import SUFFIXES

    path = Path(image)
    if path.is_dir():
        inside = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES)
        if not inside:
            raise UserError(
                f"image={image} holds no {', '.join(sorted(SUFFIXES))}. Pass image=<another folder>."
            )
        return inside, path
    if path.is_file():
        return [path], path.parent
    found = sorted(Path(one) for one in glob.glob(image, recursive=True) if Path(one).is_file())  # noqa: PTH207
    if not found:
        raise UserError(f"image={image} does not exist. Pass image=<file, folder or glob>.")
    folders = {one.parent for one in found}
    common = next(
        folder
        for folder in (found[0].parent, *found[0].parent.parents)
        if all(one.is_relative_to(folder) for one in folders)
    )
    return found, common


def file_names(paths: list[Path], base: Path) -> list[Path]:
    """Return a name without suffix for what is written of each image; alike ones keep the image's suffix."""
    short = [path.relative_to(base).with_suffix("") for path in paths]
    count = Counter(short)
    return [
        name if count[name] == 1 else path.relative_to(base)
        for name, path in zip(short, paths, strict=True)
    ]


def keep_transcriptions(paths: list[Path], names: list[Path], options: Options) -> None:
    """Refuse to write over a text that lies beside its image: it may be the transcription."""
    from paragraph_ocr.reading.write import FORMATS

    for path, name in zip(paths, names, strict=True):
        for form in options.write:
            file = options.into / f"{name}{FORMATS[form][0]}"
            if file.exists() and file.parent.resolve() == path.parent.resolve():
                raise UserError(
                    f"into={options.into}: {file.name} lies beside {path.name} and may be its "
                    "transcription. Pass into=<another folder>."
                )


if __name__ == "__main__":
    sys.exit(arguments.run(Options, read, about=__doc__ or ""))
