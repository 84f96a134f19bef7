"""Measure how fast it trains, reads, loads and starts, beside the published design in the same process.

    python scripts/benchmark.py train
    python scripts/benchmark.py read batches=1,16 pages=232
    python scripts/benchmark.py data num_workers=0,4,8
    python scripts/benchmark.py start
    python scripts/benchmark.py read size=tiny            # seconds, on any machine

Prints a table; writes outputs/benchmarks/<subject>-<time>.json and a run in MLflow. Options by subject:
"""

import sys
from collections.abc import Callable
from importlib import import_module

from paragraph_ocr import arguments, console
from paragraph_ocr.benchmark.options import (
    DataOptions,
    Options,
    ReadOptions,
    StartOptions,
    TrainOptions,
)

SUBJECTS: dict[str, type[Options]] = {
    "train": TrainOptions,
    "read": ReadOptions,
    "data": DataOptions,
    "start": StartOptions,
}


def command(subject: str) -> Callable[[Options], None]:
    def run(options: Options) -> None:
        # torch takes seconds to import: not before the options are known to be good, and not at all
        # before a start is timed
        measured = import_module(f"paragraph_ocr.benchmark.{subject}").benchmark(options)
        path = measured.write()
        measured.show()
        console.say(f"written to {path}")
        if run_id := measured.track(path):
            console.say(f"logged to MLflow as run {run_id}")

    return run


def main() -> int:
    subjects = {name: (kind, command(name)) for name, kind in SUBJECTS.items()}
    return arguments.run_subject(subjects, about=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
