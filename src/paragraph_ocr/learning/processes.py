"""Several processes that train one model, one a device: Lightning's DDP, which ends together and says why."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as distributed
from pytorch_lightning.plugins.layer_sync import LayerSync
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import nn

from paragraph_ocr.errors import Stopped
from paragraph_ocr.model.encoder import synchronise_batch_norms

_LOOK_S = 0.5
_PATIENCE_S = 10.0  # for a broken connection to be known as a process that is gone, or the reverse


class Processes(DDPStrategy):
    """As many processes as devices; the first starts the others, and none outlives another.

    Buffers are equal where BatchNorm is synchronised, so they are not sent at each step, but before
    each validation, by `Learner`.
    """

    def __init__(self) -> None:
        super().__init__(broadcast_buffers=False)

    def validation_step(self, *arguments: Any, **named: Any) -> Any:
        """Evaluate without DDP's wrapper, through which processes would wait for one another's batches."""
        assert self.lightning_module is not None
        with self.precision_plugin.val_step_context():
            return self.lightning_module.validation_step(*arguments, **named)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    @contextmanager
    def watched(self, on_loss: Callable[[str], None]) -> Iterator[None]:
        """Watch the other processes while the block trains.

        Args:
            on_loss: called in a thread of its own, with a line that says what happened, if this process
                is stuck waiting for one that is gone. It should not return.

        Raises:
            Stopped: another process is gone.
        """
        launcher = self._launcher
        assert isinstance(launcher, _Launcher)
        over = threading.Event()
        watch = threading.Thread(target=launcher.watch, args=(over, on_loss), daemon=True)
        watch.start()
        try:
            yield
        except Exception as error:
            if not _is_broken_connection(error):
                raise
            lost = launcher.wait_for_loss()
            if lost is None:
                raise
            over.set()
            launcher.kill(signal.SIGKILL)
            raise Stopped(lost) from error
        finally:
            over.set()


class _Launcher(_SubprocessScriptLauncher):
    """Starts the other processes; Lightning's own kills this one too as soon as one of them is gone."""

    def launch(self, function: Callable, *arguments: Any, trainer: Any = None, **named: Any) -> Any:
        self.cluster_environment.validate_settings(self.num_processes, self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.num_processes))
        return function(*arguments, **named)

    def loss(self) -> str | None:
        """Return what happened to another process, in a line; None if nothing did."""
        for rank, process in enumerate(self.procs, start=1):
            if process.poll():
                return f"{self._named(rank)} {_how(process)}, so training cannot go on."
        if int(os.environ.get("LOCAL_RANK", 0)) and os.getppid() != _PARENT:
            return f"{self._named(0)} is gone, so training cannot go on."
        return None

    def wait_for_loss(self) -> str | None:
        for _ in range(int(_PATIENCE_S / _LOOK_S)):
            lost = self.loss()
            if lost is not None:
                return lost
            time.sleep(_LOOK_S)
        return None

    def watch(self, over: threading.Event, on_loss: Callable[[str], None]) -> None:
        """Call `on_loss` if a process is gone and the block is not over soon after."""
        while not over.wait(_LOOK_S):
            lost = self.loss()
            if lost is not None and not over.wait(_PATIENCE_S):
                self.kill(signal.SIGKILL)
                on_loss(lost)
                return

    def _named(self, rank: int) -> str:
        return f"Process {rank + 1} of {self.num_processes}"


_PARENT = os.getppid()


def _how(process: subprocess.Popen) -> str:
    code = process.returncode
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with status {code} (what it said stands above)"


def _is_broken_connection(error: Exception) -> bool:
    if isinstance(error, distributed.DistError):
        return True
    words = ("gloo", "NCCL", "Connection", "connection", "timed out", "TCPStore", "CUDA error")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


class SynchronisedBatchNorm(LayerSync):
    """BatchNorm over the batches of all processes, as one process with all their pages would have it."""

    def apply(self, model: nn.Module) -> nn.Module:
        return synchronise_batch_norms(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave it: alone and in evaluation it does what BatchNorm does."""
        return model


def send_buffers(module: nn.Module) -> None:
    """Make the buffers of all processes those of the first."""
    for buffer in module.buffers():
        distributed.broadcast(buffer, 0)


def norms_that_differ(module: nn.Module) -> bool:
    """Return whether a BatchNorm of the module would learn other statistics in each process."""
    return any(
        isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
        for layer in module.modules()
    )
