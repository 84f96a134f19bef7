"""What a benchmark found: rows with their ratios, shown, kept as JSON and in MLflow."""

import json
import math
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from paragraph_ocr import console
from paragraph_ocr.benchmark.options import Options

JSON_VERSION = 1

TOLERANCE = 0.1
"""Share by which the reference may be slower than its published figure: more, and ratios are void."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure measured several times."""

    median: float
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""

    @classmethod
    def of(cls, figures: Sequence[float]) -> "Spread":
        low, median, high = np.percentile(figures, [25, 50, 75])
        return cls(float(median), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Row:
    """A piece of work, how long it took us, and what it is compared with."""

    group: str
    work: str
    unit: str
    """A rate, such as images/s, or a time, s or ms: of a rate more is better."""
    ours: Spread
    theirs: Spread | None = None
    against: str = "reference"
    """What `theirs` is."""
    void: str = ""
    """Why the ratio does not count; empty if it does."""
    note: str = ""
    beside: dict[str, float] = field(default_factory=dict)
    """Other figures of the work, their units in their names."""

    @property
    def ratio(self) -> float | None:
        """How many times as fast as `theirs`; None if there is nothing to compare, or it is void."""
        if self.theirs is None or self.void:
            return None
        if self.unit.endswith("/s"):
            return self.ours.median / self.theirs.median
        return self.theirs.median / self.ours.median

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def announced(rows: Iterable[Row]) -> list[Row]:
    """Return the rows, each told in a line once it is measured: a benchmark may be cut short."""
    told = []
    for row in rows:
        ratio = "" if row.ratio is None else f", {row.ratio:.3g} times ({row.against})"
        console.say(
            f"{row.group}, {row.work}: {row.ours.median:.4g} {row.unit}{ratio}", style="dim"
        )
        told.append(row)
    return told


def rates(seconds: Sequence[float], amount: float | int) -> Spread:
    """Return how much a second was done, where each measurement did `amount`."""
    return Spread.of([amount / one for one in seconds])


def judge(measured_s: float, published_s: float | None, device: str) -> tuple[str, str]:
    """Return why a ratio to the reference is void, or nothing, and what a reader has to know of it.

    Args:
        measured_s: seconds of the reference here.
        published_s: seconds of the published figure of this very work; None if there is none.
        device: name of the GPU, or of what else computed.
    """
    if published_s is None:
        return "", "no published figure for this work"
    if "H100" not in device:
        return "", f"no published figure for {device}"
    said = f"reference {measured_s:.3g} s, published {published_s:.3g} s"
    if measured_s > (1 + TOLERANCE) * published_s:
        return f"{said}: over {TOLERANCE:.0%} slower here", ""
    return "", said


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of a benchmark, and on what they were measured."""

    subject: str
    options: Options
    environment: dict[str, str]
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        return {
            "format": "paragraph-ocr benchmark",
            "version": JSON_VERSION,
            "subject": self.subject,
            "environment": self.environment,
            "options": {key: _plain(value) for key, value in asdict(self.options).items()},
            "rows": [row.as_json() for row in self.rows],
        }

    def write(self) -> Path:
        """Return the path of the JSON file, newly written into the outputs."""
        folder = self.options.outputs / "benchmarks"
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self.subject}-{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        taken = len(list(folder.glob(f"{stem}*.json")))
        path = folder / (f"{stem}_{taken + 1}.json" if taken else f"{stem}.json")
        text = json.dumps(self.as_json(), ensure_ascii=False, indent=1, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    def show(self) -> None:
        """Print where it was measured, and a table."""
        console.say("  ".join(f"{key} {value}" for key, value in self.environment.items()))
        sections: dict[str, list[list[str]]] = {}
        for row in self.rows:
            sections.setdefault(row.group, []).append(_cells(row))
        console.show_table(
            ("work", "ours", "compared with", "ratio", "beside it"),
            sections,
            title=f"Benchmark of {self.subject} (medians, quartiles in brackets)",
        )

    def track(self, path: Path) -> str | None:
        """Return the id of the MLflow run that keeps figures, options and the JSON file."""
        if self.options.tracking == "off":
            return None
        # MLflow takes seconds to import
        from paragraph_ocr.tracking import TrackedRun

        options = {key: _plain(value) for key, value in asdict(self.options).items()}
        run = TrackedRun(
            self.options.outputs,
            name=path.stem,
            parameters={**options, **self.environment},
            tags={"kind": "benchmark", "subject": self.subject},
        )
        with run.ending():
            run.log_metrics(self.metrics(), step=0)
            run.log_file(path)
        return run.run_id

    def metrics(self) -> dict[str, float]:
        """Return every figure under a name that MLflow takes."""
        metrics: dict[str, float] = {}
        for row in self.rows:
            name = re.sub(r"[^A-Za-z0-9._/ -]+", "_", f"{row.group}/{row.work}")
            found = {f"{name}/ours": row.ours.median}
            if row.theirs is not None:
                found[f"{name}/theirs"] = row.theirs.median
            if row.ratio is not None:
                found[f"{name}/ratio"] = row.ratio
            found |= {f"{name}/{key}": value for key, value in row.beside.items()}
            metrics |= {key: value for key, value in found.items() if math.isfinite(value)}
        return metrics


def environment(device: str, **more: str) -> dict[str, str]:
    """Return device, versions and commit, which figures are nothing without."""
    return {
        "device": device,
        "python": platform.python_version(),
        "torch": version("torch"),
        "torchvision": version("torchvision"),
        **more,
        "commit": _commit(),
    }


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
        )
    except OSError:  # no git here
        return "unknown"
    return found.stdout.strip() or "unknown"


def _plain(value: Any) -> Any:
    """Return an option's value as JSON has it."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _cells(row: Row) -> list[str]:
    compared = "" if row.theirs is None else f"{row.against} {_spread(row.theirs, row.unit)}"
    ratio = f"{row.ratio:.2f}" if row.ratio is not None else ("void" if row.void else "")
    figures = [f"{key} {_short(value)}" for key, value in row.beside.items()]
    beside = "; ".join([*figures, *filter(None, [row.void, row.note])])
    return [row.work, _spread(row.ours, row.unit), compared, ratio, beside]


def _spread(spread: Spread, unit: str) -> str:
    return f"{_short(spread.median)} {unit} ({_short(spread.low)} to {_short(spread.high)})"


def _short(figure: float) -> str:
    return f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:.3g}"
