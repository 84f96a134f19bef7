"""Hydra's door to the search: it must stand here, and be light, for Hydra imports it at each start."""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class StudySweeper(Sweeper):
    """`hydra/sweeper=study`: an Optuna study over the jobs that Hydra's launcher runs."""

    def __init__(self, **options: Any) -> None:
        """Take what `conf/hydra/sweeper/study.yaml` holds; `setup` reads it from the whole config."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from paragraph_ocr.search.search import Search

        loader = self.hydra_context.config_loader
        Search(self.config, arguments, loader=loader, launcher=self.launcher).run()
