"""Whether cost grows as expected, with batch, length and page, and never with time."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from paragraph_ocr import console
from paragraph_ocr.benchmark.setting import Setting, free
from paragraph_ocr.benchmark.table import Row, Spread
from paragraph_ocr.benchmark.timing import Work, in_turn, memory_mib, peak_mib, seconds_of

WARM_UP = 3

WINDOWS = 10
"""Parts of a long run: the first is compared with the last."""

GROWTH = 0.05
"""Share by which the time of a step may differ between the first part of a long run and the last."""


@runtime_checkable
class MakeWork(Protocol):
    """Makes work on a batch of some size; height, width (px) or tokens may be changed."""

    def __call__(self, size: int, **changed: int) -> Work: ...


def growth_rows(setting: Setting[Any], make: MakeWork, *, batches: Sequence[int] = ()) -> list[Row]:
    """Return time and peak memory of our side against batch, length and page size, one at a time.

    Args:
        batches: sizes of batches; empty is the setting's own.
    """
    size = setting.options.sized
    lengths = [length for length in size.growth_lengths if length <= setting.tokens]
    pages = {"half": (setting.height // 2, setting.width // 2)}
    pages |= {"whole": (setting.height, setting.width)}
    base = size.growth_batch
    cells: list[tuple[str, int, dict[str, int]]] = [
        *((f"batch {count}", count, {}) for count in batches or size.growth_batches),
        *((f"{length} tokens, batch {base}", base, {"tokens": length}) for length in lengths),
        *(
            (
                f"{name} page {height}x{width}, batch {base}",
                base,
                {"height": height, "width": width},
            )
            for name, (height, width) in pages.items()
        ),
    ]
    rows = []
    with console.progress("growth", apart=True) as told:
        for done, (name, count, changed) in enumerate(cells, start=1):
            work = make(count, **changed)
            peak = peak_mib(work, setting.device, first=WARM_UP)
            (seconds,) = in_turn(
                {name: work}, setting.device, repeats=setting.repeats, warm_up=0
            ).values()
            del work
            free(setting.device)
            milliseconds = Spread.of([1000 * one for one in seconds])
            beside = {"ms_a_page": milliseconds.median / count, "peak_mib": peak}
            rows.append(Row("growth", name, "ms", milliseconds, beside=beside))
            told(done, len(cells))
    return rows


def soak_row(work: Work, setting: Setting[Any], *, steps: int, name: str) -> Row:
    """Return time and memory of the first tenth of many steps, beside those of the last tenth."""
    device, count = setting.device, max(1, steps // WINDOWS)
    for _ in range(WARM_UP):
        work()
    windows, held = [], []
    with console.progress("soak", apart=True) as told:
        for window in range(WINDOWS):
            windows.append([1000 * seconds_of(work, device) for _ in range(count)])
            held.append(memory_mib(device))
            told(window + 1, WINDOWS)
    first, last = Spread.of(windows[0]), Spread.of(windows[-1])
    slower = last.median / first.median - 1
    return Row(
        "soak",
        f"{name}, last {count} of {count * WINDOWS} steps",
        "ms",
        last,
        first,
        against=f"first {count}",
        note="steady" if abs(slower) <= GROWTH else f"time moved by {slower:+.1%}",
        beside={
            "mib_after_first": held[0],
            "mib_at_end": held[-1],
            "mib_grown": held[-1] - held[0],
        },
    )
