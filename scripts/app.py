"""Try a model in the browser: give it an image, see the text and where it looked, correct it.

    python scripts/app.py
    python scripts/app.py checkpoint=outputs/runs/<run>

Without checkpoint= it is the released model. The page is on this machine's own address and loads nothing from
elsewhere. Corrections become a folder that datamodule=folder trains on.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from paragraph_ocr import arguments
from paragraph_ocr.errors import UserError
from paragraph_ocr.reading.checkpoint import DEFAULT


@dataclass(frozen=True)
class Options:
    checkpoint: str = field(
        default=DEFAULT, metadata={"help": "run folder, MLflow run id, or released model"}
    )
    port: int = field(default=7860, metadata={"help": "on 127.0.0.1; 0 takes a free one"})
    corrections: Path = field(
        default=Path("outputs/corrections"), metadata={"help": "folder of corrected images"}
    )


def app(options: Options) -> None:
    """Load the model and answer until interrupted."""
    if not 0 <= options.port <= 65535:
        raise UserError(f"port={options.port} must lie in 0 to 65535. Pass port=7860.")
    try:
        from paragraph_ocr.web.app import build_app, serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise UserError(
            f"The page needs {error.name}, which is not installed. Type pip install -e '.[web]'."
        ) from error
    from paragraph_ocr.reading import Recognizer

    recognizer = Recognizer.load(options.checkpoint, device="cpu")
    page = build_app(recognizer, title=options.checkpoint, corrections=options.corrections)
    serve(page, port=options.port)


if __name__ == "__main__":
    sys.exit(arguments.run(Options, app, about=__doc__ or ""))
