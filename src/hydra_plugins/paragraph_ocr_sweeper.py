"""Hydra's door to the search: it must stand here, and be light, for Hydra imports it at each start."""

from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _ComposedOnce:
    """Hydra's config loader, but a trial that was composed to be checked is not composed again."""

    def __init__(self, loader: ConfigLoader) -> None:
        self.loader = loader
        self.last: tuple[list[str], DictConfig] | None = None

    def load_sweep_config(self, master: DictConfig, overrides: list[str]) -> DictConfig:
        if self.last is not None and self.last[0] == overrides:
            (_, composed), self.last = self.last, None
            return composed
        composed = self.loader.load_sweep_config(master, overrides)
        self.last = (list(overrides), composed)
        return composed

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet, when this is unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)


class StudySweeper(Sweeper):
    """`hydra/sweeper=study`: an Optuna study over the jobs that Hydra's launcher runs."""

    def __init__(self, **options: Any) -> None:
        """Take what `conf/hydra/sweeper/study.yaml` holds; `setup` reads it from the whole config."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        loader: Any = _ComposedOnce(hydra_context.config_loader)
        hydra_context = HydraContext(config_loader=loader, callbacks=hydra_context.callbacks)
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from paragraph_ocr.search.search import Search

        loader = self.hydra_context.config_loader
        Search(self.config, arguments, loader=loader, launcher=self.launcher).run()
