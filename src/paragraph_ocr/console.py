"""The one console: everything that a person reads while something runs goes through here."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rapidfuzz.distance import Levenshtein
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

# Without a terminal (a file, CI) rich would fold at 80 columns and cut paths in two.
console = Console(width=None if "COLUMNS" in os.environ or Console().is_terminal else 120)
_errors = Console(stderr=True, soft_wrap=True)


def another() -> Console:
    """Return a console of the same width that goes on when the common one is silenced."""
    return Console(width=None if console.is_terminal else console.width)


def say(message: str, *, style: str = "") -> None:
    """Print one line; its brackets are text, not markup."""
    console.print(Text(message, style=style), soft_wrap=True)


def warn(message: str) -> None:
    """Print one line that asks for attention."""
    say(message, style="yellow")


def error(message: str) -> None:
    """Print one line on standard error."""
    _errors.print(Text(message, style="bold red"))


@contextmanager
def progress(description: str, *, apart: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes (done, total) and shows a bar from its first call on.

    Args:
        apart: where results are piped into a file, keep the bar out of it, on standard error.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    piped = apart and not console.is_terminal
    bar = Progress(*columns, console=_errors if piped else console)

    def advance(done: int, total: int) -> None:
        if not bar.tasks:
            bar.add_task(description)
            bar.start()
        bar.update(bar.tasks[0].id, completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()


def training_bar() -> Progress:
    """Return the bar of a training run: its task wants `rate` and `metrics` as texts."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[metrics]}"),
        console=console,
    )


def mark_differences(reading: str, truth: str) -> Text:
    """Return the reading with what differs from the truth marked.

    Red: written but not there, or another character; a red underscore: a character left out.
    Newlines stay.
    """
    marked = Text()
    for operation in Levenshtein.opcodes(truth, reading):
        part = reading[operation.dest_start : operation.dest_end]
        if operation.tag == "equal":
            marked.append(part)
        elif operation.tag == "delete":
            marked.append("_" * (operation.src_end - operation.src_start), style="bold red")
        else:
            marked.append(part.replace("\n", "⏎\n"), style="bold white on red")
    return marked


def show_table(
    columns: Sequence[str], sections: Mapping[str, Sequence[Sequence[str]]], *, title: str
) -> None:
    """Print a table whose rows stand below the names of their sections."""
    table = Table(*columns, title=title, title_justify="left")
    for name, rows in sections.items():
        table.add_row(Text(name, style="bold"))
        for index, row in enumerate(rows):
            table.add_row(*map(Text, row), end_section=index == len(rows) - 1)
    console.print(table)


def show_outcome(
    *,
    title: str,
    metrics: Mapping[str, float],
    samples: Sequence[tuple[str, str]],
    folder: Path,
    open_ui: str | None,
) -> None:
    """Print the panel that ends a run.

    Args:
        samples: (truth, reading) of a few paragraphs.
        open_ui: the command that opens the run in a browser, or None.
    """
    figures = Table("metric", "value", title="Metrics", title_justify="left")
    for name, value in metrics.items():
        figures.add_row(name, f"{value:.4g}")
    readings = Table(
        "truth", "reading (differences marked)", title="Paragraphs", title_justify="left"
    )
    for truth, reading in samples:
        readings.add_row(Text(truth), mark_differences(reading, truth), end_section=True)
    where = Text.assemble(("run folder  ", "bold"), str(folder))
    if open_ui:
        where.append_text(Text.assemble(("\nMLflow UI   ", "bold"), open_ui))
    parts: list[RenderableType] = [figures, *([readings] if samples else []), where]
    console.print(Panel(Group(*parts), title=title, border_style="green"))
