"""Hydra's door to the search: it must stand here, and be light, for Hydra imports it at each start."""

import copy
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException


class QuickLoader:
    """Hydra's config loader, which composes from files only what it has not composed before.

    A trial that was composed to be checked is not composed again to be launched, and one that
    differs from another in plain values alone is that one's config with its own values.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        self.loader = loader
        self._last: tuple[list[str], DictConfig] | None = None
        self._alike: dict[
            tuple[str, ...], DictConfig
        ] = {}  # by choices of groups and keys of values

    def load_sweep_config(self, master: DictConfig, overrides: list[str]) -> DictConfig:
        if self._last is not None and self._last[0] == overrides:
            (_, composed), self._last = self._last, None
            return composed
        composed = self._compose(master, overrides)
        self._last = (list(overrides), composed)
        return composed

    def _compose(self, master: DictConfig, overrides: list[str]) -> DictConfig:
        values = {}
        kind = []
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            key = override.get_key_element()
            if key in master.hydra.runtime.choices or not key[0].isalpha() or "@" in key:
                kind.append(str(override.input_line))
            else:
                values[key] = override.value()
                kind.append(key)
        alike = self._alike.get(tuple(kind))
        if alike is None:
            composed = self.loader.load_sweep_config(master, list(overrides))
            self._alike[tuple(kind)] = copy.deepcopy(composed)
            return composed
        composed = copy.deepcopy(alike)
        try:
            for key, value in values.items():
                OmegaConf.update(composed, key, value)
        except OmegaConfBaseException:  # Hydra says it better
            return self.loader.load_sweep_config(master, list(overrides))
        with read_write(composed.hydra):
            composed.hydra.overrides.task = list(overrides)
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
        loader: Any = QuickLoader(hydra_context.config_loader)
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
