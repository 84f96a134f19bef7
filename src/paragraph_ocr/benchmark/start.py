"""How long until something happens: help on the screen, and the first training step done.

The commands are those that a person types, in processes of their own. Nothing here imports torch
before the clock has stopped: a file that this process maps stays in memory, and no start would be cold.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from paragraph_ocr import console, timeline
from paragraph_ocr.benchmark.options import StartOptions
from paragraph_ocr.benchmark.table import Report, Row, Spread, environment
from paragraph_ocr.data.parallel import cores
from paragraph_ocr.errors import UserError

ROOT = Path(__file__).resolve().parents[3]

REPEATS = 5

FIRST_STEP = ("trainer.max_steps=1", "trainer.limit_val_batches=0", "trainer.limit_test_batches=0")

TINY = ("model=tiny", "datamodule=fake", "trainer=cpu")

PHASES = {
    "composed": "interpreter, Hydra, config",
    "imported": "imports of torch, Lightning, MLflow",
    "built": "vocabulary, model, optimizer",
    "data": "MLflow run, store opened",
    "first step": "Trainer, loader, first step",
}
"""Marks that `train.py` leaves, and what lies between each and the one before."""


def benchmark(options: StartOptions) -> Report:
    if options.cold and not hasattr(os, "posix_fadvise"):
        raise UserError(
            "cold=true needs Linux, which can be told to forget files. Pass cold=false."
        )
    (options.outputs / "benchmarks").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.outputs / "benchmarks") as folder:
        rows = [help_row(options), *first_step_rows(options, Path(folder))]
    import torch  # not before the last start was timed

    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU ({cores()} cores)"
    return Report("start", options, environment(device), rows)


def help_row(options: StartOptions) -> Row:
    """Return the seconds of `python train.py --help`."""
    first = _seconds(["--help"], cold=options.cold)  # after it files are in memory
    cold = first if options.cold else None
    warm = [_seconds(["--help"]) for _ in range(_repeats(options))]
    return _row("help", "python train.py --help", warm, cold)


def first_step_rows(options: StartOptions, folder: Path) -> list[Row]:
    """Return the seconds from the command to the end of the first step, whole and by phase.

    A run that is not measured makes the store; the tiny one is noise, made in no time.
    """
    words = [
        *(TINY if options.size == "tiny" else ()),
        *FIRST_STEP,
        *options.override,
        f"outputs={folder}",
    ]
    repeats = _repeats(options)
    with console.progress("start", apart=True) as told:
        if options.size == "full":
            _phases(words, folder, compiled="warm")
        told(1, repeats + 2)
        cold = _phases(words, folder, compiled="cold", cold=True) if options.cold else {}
        told(2, repeats + 2)
        warm = []
        for turn in range(repeats):
            warm.append(_phases(words, folder, compiled="warm"))
            told(turn + 3, repeats + 2)
    command = " ".join(["python train.py", *words[:-1]])
    whole = [sum(phases.values()) for phases in warm]
    rows = [_row("first step", command, whole, sum(cold.values()) if cold else None)]
    for mark, meaning in PHASES.items():
        seconds = [phases[mark] for phases in warm]
        rows.append(_row("first step", f"  {meaning}", seconds, cold.get(mark)))
    return rows


def _repeats(options: StartOptions) -> int:
    return options.repeats or (1 if options.size == "tiny" else REPEATS)


def _row(group: str, work: str, warm: Sequence[float], cold: float | None) -> Row:
    theirs = None if cold is None else Spread.of([cold])
    return Row(group, work, "s", Spread.of(warm), theirs, against="cold")


def _phases(
    words: Sequence[str], folder: Path, *, compiled: str, cold: bool = False
) -> dict[str, float]:
    """Return the seconds between each mark and the one before, of one training process.

    Args:
        compiled: name of the folder in which torch keeps what it compiled.
    """
    file = folder / "timeline.tsv"
    file.unlink(missing_ok=True)
    variables = {
        timeline.VARIABLE: str(file),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"compiled_{compiled}"),
    }
    began = _start(words, cold=cold, **variables)
    reached = timeline.marks(file)
    times = [began, *(reached[mark] for mark in PHASES)]
    return {
        mark: after - before
        for mark, before, after in zip(PHASES, times[:-1], times[1:], strict=True)
    }


def _seconds(words: Sequence[str], *, cold: bool = False) -> float:
    began = _start(words, cold=cold)
    return time.time() - began


def _start(words: Sequence[str], *, cold: bool = False, **variables: str) -> float:
    """Run train.py to its end, and return when it was started.

    Raises:
        RuntimeError: it failed; says how.
    """
    if cold:
        forget_files(Path(sysconfig.get_path("purelib")))
        forget_files(Path(sysconfig.get_path("stdlib")))
        forget_files(ROOT / "src")
    before = {key: value for key, value in os.environ.items() if key != timeline.VARIABLE}
    began = time.time()
    ended = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        env={**before, **variables},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        raise RuntimeError(f"train.py {' '.join(words)} ended with {ended.stderr or ended.stdout}")
    return began


def forget_files(folder: Path) -> None:
    """Have the system forget what it holds of these files in memory, as after a restart.

    A file that some process has mapped is kept.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
