"""How a run that did not reach its aim ended: one clear line for what a person can mend."""

import errno
from pathlib import Path

import torch

from paragraph_ocr.config import Experiment
from paragraph_ocr.errors import Stopped


def explain_end(error: Exception, experiment: Experiment, folder: Path) -> Stopped | None:
    """Return the reason and the remedy in one line; None for what is no known kind of end."""
    if isinstance(error, Stopped):
        return error
    data = experiment.datamodule
    first = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
    if isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, MemoryError | RuntimeError) and _wants_memory(first)
    ):
        half = max(1, data.batch_size // 2)
        return Stopped(
            f"Out of memory in a batch of {data.batch_size} ({first}). Pass datamodule.batch_size={half} "
            f"trainer.accumulate_grad_batches={2 * experiment.trainer.accumulate_grad_batches}, which "
            "learns the same."
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
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
    if (isinstance(error, OSError) and "HDF5" in first) or "h5py" in first:
        return Stopped(f"The data went away while it was read ({first}). Bring the file back.")
    return None


def _reads_hdf5(error: BaseException) -> bool:
    """Return whether the error was raised within the library that reads the stores."""
    frame = error.__traceback__
    names = []
    while frame is not None:
        names.append(frame.tb_frame.f_globals.get("__name__", ""))
        frame = frame.tb_next
    return any(name.startswith("h5py") for name in names) or "h5py" in str(error)


def _wants_memory(text: str) -> bool:
    return any(
        words in text for words in ("out of memory", "can't allocate memory", "not enough memory")
    )
