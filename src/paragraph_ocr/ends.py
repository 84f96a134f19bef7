"""How a run that did not reach its aim ended: one clear line for what a person can mend."""

import errno
import traceback
from pathlib import Path

import torch

from paragraph_ocr.config import Experiment
from paragraph_ocr.errors import Stopped, UserError


def explain_end(error: Exception, experiment: Experiment, folder: Path) -> Exception | None:
    """Return the reason and the remedy in one line; None for what is no known kind of end."""
    if isinstance(error, Stopped | UserError):
        whole = str(error.args[0])
        if "DataLoader worker" not in whole:
            return error
        # a worker's comes with its traceback, and itself as the last line
        return type(error)(whole.strip().splitlines()[-1].partition(": ")[2])
    data = experiment.datamodule
    first = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
    if isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, MemoryError | RuntimeError) and _wants_memory(first)
    ):
        half = max(1, data.batch_size // 2)
        said = ". ".join(first.split(". ")[:2])  # a GPU's allocator goes on with its whole state
        return Stopped(
            f"Out of memory in a batch of {data.batch_size} ({said}). If nothing else held the memory, "
            f"begin anew with datamodule.batch_size={half} trainer.accumulate_grad_batches="
            f"{2 * experiment.trainer.accumulate_grad_batches}, which learns the same."
        )
    if (isinstance(error, RuntimeError) and "DataLoader worker" in str(error)) or _lost_worker(
        error
    ):
        return Stopped(
            f"A worker that loads data died ({first}). If the host ran out of memory, pass "
            f"datamodule.num_workers={data.num_workers // 2}."
        )
    if "No space left" in str(error) or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    ):
        return Stopped(f"The disk of {folder} is full. Make room there.")
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return Stopped(f"{folder} cannot be written to: {error.strerror}. Give it back its rights.")
    return None


def _lost_worker(error: Exception) -> bool:
    """Return whether a worker has died while it was handing a batch over: no error of its own says so."""
    # the socket by which tensors change hands: reset, at its end, or gone
    if not isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        return False
    files = [
        Path(frame.f_code.co_filename).name for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return "dataloader.py" in files and files[-1] in ("connection.py", "resource_sharer.py")


def _wants_memory(text: str) -> bool:
    return any(
        words in text for words in ("out of memory", "can't allocate memory", "not enough memory")
    )
