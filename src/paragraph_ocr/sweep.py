"""The parent run of a multirun, whatever its sweeper and launcher."""

import atexit
import contextlib
import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class ParentRun(Callback):
    """Open one MLflow run before the jobs of `-m` start and close it after them.

    The jobs find its id in an environment variable, which their processes inherit. Database and
    experiment exist before any of them starts. MLflow is imported only if there is a sweep.
    """

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.tracking.name == "off" or config.hydra.sweeper.get("study_name"):
            return  # a study's run is the search's own, shared by its processes and restarts
        from paragraph_ocr import tracking

        run = tracking.TrackedRun(
            Path(config.outputs),
            name=",".join(config.hydra.overrides.task) or "sweep",
            parameters={},
            tags={"kind": "sweep"},
            experiment_name=config.tracking.experiment_name,
            uri=config.tracking.uri,
        )
        self._open.enter_context(run.ending())
        assert run.run_id is not None
        os.environ[tracking.PARENT_VARIABLE] = run.run_id
        self._open.callback(os.environ.pop, tracking.PARENT_VARIABLE, None)
        # Hydra leaves out on_multirun_end when a job fails
        atexit.register(self._fail)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        atexit.unregister(self._fail)
        self._open.close()

    def _fail(self) -> None:
        failure = RuntimeError("a job of the sweep failed")
        with contextlib.suppress(RuntimeError):
            self._open.__exit__(RuntimeError, failure, None)
