"""The one door through which YAML becomes Python, and one line for every mistake made before it."""

import re
import traceback
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from paragraph_ocr.checks import check_combinations, check_values
from paragraph_ocr.config import (
    SCHEMAS,
    DataConfig,
    Experiment,
    ModelConfig,
    StudyConfig,
    register_schema,
)
from paragraph_ocr.errors import UserError, nearest
from paragraph_ocr.help import CONF

REFUSALS = (HydraException, OmegaConfBaseException, YAMLError)
"""What composing a config raises; `explain` puts it in one line."""


def compose(overrides: list[str]) -> DictConfig:
    """Return `conf/train.yaml` under the overrides, as `train.py` would see it.

    Raises:
        UserError: what Hydra refuses, in one line.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_schema()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose("train", overrides)
    except Exception as error:
        if not is_refusal(error):
            raise
        raise explain(error) from error


_OF_A_MODEL = ("seed", "outputs", "model", "datamodule", "vocabulary", "decoding", "tracking")


def overridden(experiment: Experiment, overrides: list[str]) -> Experiment:
    """Return a stored experiment under overrides as `train.py` takes them, validated.

    Only what reading needs is taken from it: what it was trained on or with need not be here.

    Raises:
        UserError: see `compose` and `validate`.
    """
    groups = [word for word in overrides if (CONF / word.partition("=")[0]).is_dir()]
    chosen = {word.partition("=")[0] for word in groups}
    composed = compose(groups)
    try:
        for name in _OF_A_MODEL:
            if name not in chosen:
                value = getattr(experiment, name)
                composed[name] = OmegaConf.structured(value) if is_dataclass(value) else value
        composed.datamodule.placement = "disk"  # of the training, whose GPU need not be here
        parser = OverridesParser.create()
        for word in overrides:
            if word not in groups:
                parsed = parser.parse_override(word)
                OmegaConf.update(composed, parsed.key_or_group, parsed.value(), force_add=False)
    except REFUSALS as error:
        raise explain(error) from error
    return validate(composed)


def validate(composed: DictConfig) -> Experiment:
    """Return the composed config as plain dataclasses, every key known and every value possible.

    Hydra lets `+` add any key and OmegaConf drops it without a word, so every node is walked and
    compared with the fields of its own schema.

    Raises:
        UserError: an unknown key (named with the nearest known one), a missing or impossible value,
            or values that do not go together.
    """
    try:
        for path, node in _nodes(composed):
            schema = OmegaConf.get_type(node)
            if not is_dataclass(schema):
                continue  # an `extra` node: checked by what consumes it
            for key in sorted(set(node) - {field.name for field in fields(schema)}):
                raise _unknown_key(_join(path, str(key)), node[key])
        for missing in sorted(OmegaConf.missing_keys(composed)):
            raise UserError(f"{missing} has no value. Pass {missing}=<value>.")
        experiment = OmegaConf.to_object(composed)
    except Exception as error:
        if not is_refusal(error):
            raise
        raise explain(error) from error
    assert isinstance(experiment, Experiment)
    check_values(composed)
    check_combinations(experiment)
    return experiment


def is_refusal(error: Exception) -> bool:
    """Return whether Hydra or what it is made of raised this: it has plain ValueErrors for some mistakes."""
    if isinstance(error, UserError):
        return False
    frames = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    raised_in = frames[-1].partition(".")[0] if frames else ""
    return isinstance(error, REFUSALS) or raised_in in {"hydra", "omegaconf", "antlr4", "yaml"}


def explain(error: Exception) -> UserError:
    """Return one line for what Hydra or OmegaConf refused: key=value, what is allowed, what to type.

    Hydra's own texts run over several lines and advise `+key`, which `validate` refuses.
    """
    text = f"{error}\n{error.__cause__ or ''}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return _unknown_choice(group, choice, list(error.options or []))
    if isinstance(error, YAMLError):
        where = " ".join(str(getattr(error, "problem_mark", "")).split())
        return UserError(
            f"Not valid YAML {where}: {getattr(error, 'problem', error)}. Mend that line."
        )
    if isinstance(error, OverrideParseException):
        return UserError(
            f"{error.override!r} is not of the form key=value. Pass key=value, or group=choice; quote"
            " values that hold =, commas, parentheses or spaces: 'key=\"a b\"'."
        )
    if found := re.search(r"Could not override '([^']+)'.*?(\S+?)=(.*)", text, re.DOTALL):
        return _unknown_key(found[1], found[3].splitlines()[0])
    if found := re.search(r"Error merging override (\S+?)=(.*)", text):
        return _wrong_type(found[1].lstrip("+~"), found[2])
    if found := re.search(r"Key '\S+' (?:is )?not in .*?full_key: (\S+)", text, re.DOTALL):
        return _unknown_key(found[1])
    if found := re.search(r"Value '(.*?)' .*?full_key: (\S+)", text, re.DOTALL):
        return _wrong_type(found[2], found[1])
    first = next((line.strip() for line in text.splitlines() if line.strip()), repr(error))
    return UserError(f"{first} (`python train.py --help` lists groups and choices)")


def _nodes(config: DictConfig, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield every mapping of the config with its dotted path, the root first."""
    yield path, config
    for key in config:
        if not OmegaConf.is_missing(config, key) and OmegaConf.is_dict(config[key]):
            yield from _nodes(config[key], _join(path, str(key)))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _schema(node: type = Experiment, path: str = "") -> dict[str, Any]:
    """Return the type of every dotted key below a dataclass, of every kind of data module and model."""
    keys: dict[str, Any] = {}
    if node is Experiment:
        keys |= _schema(StudyConfig, "hydra.sweeper")
    kinds = [node]
    if node in (DataConfig, ModelConfig):
        kinds += [kind for kind in SCHEMAS.values() if issubclass(kind, node)]
    for kind in kinds:
        for key, hint in get_type_hints(kind).items():
            keys[_join(path, key)] = hint
            if is_dataclass(hint):
                keys |= _schema(hint, _join(path, key))  # type: ignore[arg-type]
    return keys


def _unknown_choice(group: str, choice: str, options: list[str]) -> UserError:
    close = nearest(choice, options)
    return UserError(
        f"{group}={choice} is not a choice of {group} ({', '.join(options)}). "
        f"Pass {group}={close[0] if close else '<one of these>'}."
    )


def _unknown_key(key: str, value: Any = None) -> UserError:
    written = key if value is None else f"{key}={value}"
    known = _schema()
    parent, _, last = key.rpartition(".")
    if "/" in key and key.replace("/", ".") in known:
        first = key.partition("/")[0]
        return UserError(
            f"{written} is no part of the chosen {first}. "
            f"Pass a {first}=<choice> that has it, or leave it out."
        )
    if is_dataclass(known.get(key)):
        return _wrong_type(key, value)
    if last == "extra":
        return UserError(f"{written} sets a whole open node. Pass +{key}.<argument>=<value>.")
    if parent.rpartition(".")[2] == "extra":
        return UserError(f"{written} is new in an open node. Pass +{written}.")
    if key in known:
        return UserError(
            f"{written} does not belong to this {key.partition('.')[0]}. "
            f"Pass a {key.partition('.')[0]}=<choice> that has it, or leave it out."
        )
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    names: dict[str, str] = {}  # last part to whole key; a sibling goes before a stranger
    for name in [*siblings, *known]:
        names.setdefault(name.rpartition(".")[2], name)
    close = nearest(last, [name.rpartition(".")[2] for name in siblings]) or nearest(last, names)
    if not close:
        return UserError(f"{written} is not a key of the config. See `python train.py --cfg job`.")
    similar = ", ".join(names[name] for name in close)
    return UserError(
        f"{written} is not a key of the config (nearest: {similar}). Pass {names[close[0]]}=<value>."
    )


def _wrong_type(key: str, value: Any) -> UserError:
    hint = _schema().get(key)
    if is_dataclass(hint):
        group = key.replace(".", "/")
        return UserError(
            f"{key}={value} sets a whole node. Pass {group}=<choice> for a file of conf/{group}, "
            f"or {key}.<key>=<value>."
        )
    return UserError(f"{key}={value} must be {_in_words(hint)}. Pass {key}=<value>.")


def _in_words(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if hint in words:
        return words[hint]
    if hint is type(None):
        return "null"
    if set(get_args(hint)) == {int, float}:
        return "a number (1 is one batch, 1.0 is all)"
    return " or ".join(_in_words(part) for part in get_args(hint)) or "a mapping {key: value}"
