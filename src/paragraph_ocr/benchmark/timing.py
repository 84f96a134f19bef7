"""Seconds and memory of work: works take turns, so that what disturbs one disturbs all."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import torch

Work = Callable[[], object]


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Work, device: torch.device, *, steps: int = 1) -> float:
    """Return the seconds that a step takes of `steps` done without a pause between them."""
    synchronise(device)
    began = time.perf_counter()
    for _ in range(steps):
        work()
    synchronise(device)
    return (time.perf_counter() - began) / steps


def in_turn(
    works: Mapping[str, Work],
    device: torch.device,
    *,
    repeats: int,
    warm_up: int = 1,
    steps: int = 1,
    told: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Return `repeats` times the seconds of a step of each work, measured one after another.

    Args:
        warm_up: steps of each before all, unmeasured: they compile, plan and fill caches.
        steps: done without a pause in each measurement, as training does them.
        told: takes measurements done and in all.
    """
    for work in works.values():
        for _ in range(warm_up):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats):
        order = list(works) if turn % 2 == 0 else list(works)[::-1]
        for name in order:
            seconds[name].append(seconds_of(works[name], device, steps=steps))
        if told is not None:
            told(turn + 1, repeats)
    return seconds


def memory_mib(device: torch.device) -> float:
    """Return the MiB held: by torch on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def peak_mib(work: Work, device: torch.device, *, first: int = 1) -> float:
    """Return the most MiB held during a work's first times: of a GPU, or of the whole process on a CPU.

    From its first time on, for what is recorded as a graph takes its memory then, and none that torch
    counts when it is replayed.
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(first):
            work()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError):  # of a process that may not: its peak so far
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range(first):
        work()
    status = Path("/proc/self/status")
    if not status.exists():
        return memory_mib(device)
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024
