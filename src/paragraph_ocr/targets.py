"""Which classes a config may name: Hydra makes objects of `_target_` before the config is validated."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hydra._internal import hydra as engine
from omegaconf import DictConfig, OmegaConf

from paragraph_ocr.errors import UserError

_ALLOWED: dict[str, tuple[str, ...]] = {
    "hydra.sweeper.sampler": ("optuna.samplers.<Class>",),
    "hydra.sweeper.pruner": ("optuna.pruners.<Class>",),
    # of these Hydra itself takes none but the plugins that it has found
    "hydra.sweeper": ("hydra_plugins.<any>", "hydra._internal.core_plugins.<any>"),
    "hydra.launcher": ("hydra_plugins.<any>", "hydra._internal.core_plugins.<any>"),
    "hydra.callbacks": ("paragraph_ocr.sweep.ParentRun", "hydra.experimental.callbacks.<Class>"),
    "hydra.job_logging": ("logging.<Class>", "logging.handlers.<Class>", "colorlog.<Class>"),
    "hydra.hydra_logging": ("logging.<Class>", "logging.handlers.<Class>", "colorlog.<Class>"),
}
"""What a node, or one below it, may name; the longest key that fits counts.

No further dots: `logging.os.system` begins with `logging.` too.
"""

_WILD = {"<Class>": r"[A-Z][A-Za-z0-9]*", "<any>": r"[A-Za-z0-9_.]+"}

_NAMES_CODE = ("_target_", "class", "()", "cls", "factory")
_LOGGING = ("hydra.job_logging", "hydra.hydra_logging")


def check_targets(node: Any, path: str) -> None:
    """Check that every class which a node names is one that belongs there.

    Args:
        path: dotted key of the node in the config.

    Raises:
        UserError: a class or function outside of the allow-list.
    """
    tree = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    for key, target in _targets(tree, path):
        fits = [known for known in _ALLOWED if f"{key}.".startswith(f"{known}.")]
        allowed = _ALLOWED[max(fits, key=len)] if fits else ()
        if not any(_matches(target, pattern) for pattern in allowed):
            only = " or ".join(allowed) or "nothing"
            raise UserError(
                f"{key}={str(target)[:80]!r} names code, and {only} may be named there. Leave it out."
            )


def _matches(target: Any, pattern: str) -> bool:
    expression = re.escape(pattern)
    for wild, meaning in _WILD.items():
        expression = expression.replace(re.escape(wild), meaning)
    return isinstance(target, str) and re.fullmatch(expression, target) is not None


class CheckedCallbacks(engine.Callbacks):
    """Hydra's callbacks, the first of what it makes of a config: here the config is still but data."""

    def __init__(self, config: DictConfig | None = None) -> None:
        if config is not None:
            check_targets(config.hydra, "hydra")
        super().__init__(config)


def guard_hydra() -> None:
    """Have Hydra check the targets of a composed config before it makes anything of them."""
    engine.Callbacks = CheckedCallbacks  # type: ignore[misc]


def _targets(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and value of everything in a tree that names code."""
    if isinstance(tree, Mapping):
        in_logging = path.startswith(_LOGGING)
        for key, value in tree.items():
            if key == "_target_" or (in_logging and key in _NAMES_CODE):
                yield f"{path}.{key}", value
            else:
                yield from _targets(value, f"{path}.{key}")
    elif isinstance(tree, list):
        for value in tree:
            yield from _targets(value, path)
