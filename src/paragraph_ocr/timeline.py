"""How far a command came and when, noted in a file for whoever measures its start."""

import os
import time
from pathlib import Path

VARIABLE = "PARAGRAPH_OCR_TIMELINE"
"""Environment variable with the file's path; without it nothing is noted."""


def mark(reached: str) -> None:
    """Note that the command reached this point now, in seconds of the system's clock."""
    if path := os.environ.get(VARIABLE):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{reached}\t{time.time()}\n")


def asked() -> bool:
    """Return whether anybody wants to know."""
    return VARIABLE in os.environ


def marks(path: Path) -> dict[str, float]:
    """Return what was reached, and when."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {reached: float(when) for reached, when in (line.split("\t") for line in lines)}
