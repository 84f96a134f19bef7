"""The config that a run leaves in its folder, written once and read back as data.

It may come from a stranger: nothing in it names code, and every key, type and range is checked.
"""

from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from paragraph_ocr.checks import check_together, check_values
from paragraph_ocr.config import SCHEMAS, DataConfig, Experiment
from paragraph_ocr.errors import UserError

CONFIG = "config.yaml"

_MAX_BYTES = 1_000_000
_KINDS = ("model", "datamodule")
"""Nodes whose dataclass depends on a choice, which is stored under `schema`."""


def write_config(experiment: Experiment, folder: Path) -> Path:
    """Write the experiment's config into a folder, renamed into place; return its path."""
    names = {kind: name for name, kind in SCHEMAS.items()}
    corpora = experiment.curriculum.corpora
    schemas: dict[str, Any] = {node: names[type(getattr(experiment, node))] for node in _KINDS}
    if corpora:
        schemas["corpora"] = {name: names[type(data)] for name, data in corpora.items()}
    tree = {"schema": schemas}
    text = yaml.safe_dump(tree | asdict(experiment), sort_keys=False, allow_unicode=True)
    aside = folder / f".{CONFIG}.part"
    aside.write_text(text, encoding="utf-8")
    return aside.replace(folder / CONFIG)


def read_config(path: Path) -> Experiment:
    """Return the experiment of a run folder, or of a config file from one.

    Paths in it are as they were written, and need not exist here.

    Raises:
        UserError: there is none, or it is no config of this version.
    """
    file = path / CONFIG if path.is_dir() else path
    try:
        if not file.is_file():
            raise UserError(f"{file} is no file. Pass a run folder.")
        with file.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise UserError(f"{file} is larger than any config. Pass a run folder.")
        tree = yaml.load(content.decode(), Loader=_PlainLoader)
    except (OSError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{file} cannot be read: {said}. Pass a run folder.") from error
    # YAML's own numbers and dates may be none, or have more digits than Python reads
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError, TypeError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is no config of a run: {first}. Pass a run folder.") from error
    return experiment_of(tree, source=str(file))


def experiment_of(tree: Any, *, source: str) -> Experiment:
    """Return the experiment in a tree of plain values, as `write_config` wrote it.

    Raises:
        UserError: a key is unknown or missing, or a value of the wrong type or out of its range.
    """
    remedy = "It belongs to another version, or was changed by hand."
    schemas = tree.get("schema") if isinstance(tree, dict) else None
    if not isinstance(schemas, dict) or not all(
        isinstance(schemas.get(node), str) and schemas[node] in SCHEMAS for node in _KINDS
    ):
        raise UserError(f"{source} is no config of a run: it names no schema. {remedy}")
    node = OmegaConf.structured(Experiment)
    try:
        for kind in _KINDS:
            node[kind] = OmegaConf.structured(SCHEMAS[schemas[kind]])
        rest = {key: value for key, value in tree.items() if key != "schema"}
        for name, schema in _corpora(tree, schemas, source).items():
            node.curriculum.corpora[name] = OmegaConf.structured(SCHEMAS[schema])
        _refuse_unknown(rest, node, source)
        # they could read environment variables: the values of a stored config are settled
        for text in _interpolations(rest):
            raise UserError(f"{source}: {text[:80]!r} is an interpolation. {remedy}")
        merged = OmegaConf.merge(node, rest)
        assert isinstance(merged, DictConfig)
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"{source}: {key} has no value. {remedy}")
        check_values(merged)
        experiment = OmegaConf.to_object(merged)
    except (
        OmegaConfBaseException, TypeError, ValueError, OverflowError, RecursionError, AttributeError,
    ) as error:  # fmt: skip
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: {first}. {remedy}") from error
    assert isinstance(experiment, Experiment)
    check_together(experiment)
    return experiment


def _corpora(tree: dict[str, Any], schemas: dict[str, Any], source: str) -> dict[str, str]:
    """Return the schema of each corpus of the curriculum, which must all be data modules'."""
    named, curriculum = schemas.get("corpora", {}), tree.get("curriculum", {})
    found = curriculum.get("corpora", {}) if isinstance(curriculum, dict) else None
    data = {name for name, kind in SCHEMAS.items() if issubclass(kind, DataConfig)}
    if (
        not isinstance(named, dict)
        or not isinstance(found, dict)
        or named.keys() != found.keys()
        or not all(isinstance(schema, str) and schema in data for schema in named.values())
    ):
        raise UserError(
            f"{source}: schema.corpora does not name a schema for each of curriculum.corpora. "
            "It belongs to another version, or was changed by hand."
        )
    return named


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases, by which a few lines could grow to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias")
        return super().compose_node(parent, index)


def _refuse_unknown(tree: Any, node: DictConfig, source: str, path: str = "") -> None:
    """Check that each key is a field of its node's dataclass; open nodes may hold what they like."""
    if not isinstance(tree, dict):
        raise UserError(f"{source}: {path[:-1]} must be a mapping. It was changed by hand.")
    schema = OmegaConf.get_type(node)
    if not is_dataclass(schema):
        return
    known = {field.name for field in fields(schema)}
    for key, value in tree.items():
        if key not in known:
            raise UserError(
                f"{source}: {path}{key} is not a key of the config. It belongs to another version, "
                "or was changed by hand."
            )
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _refuse_unknown(value, child, source, f"{path}{key}.")


def _interpolations(tree: Any) -> Iterator[str]:
    """Yield the texts in a tree that OmegaConf would look up or compute."""
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _interpolations(value)
    elif isinstance(tree, str) and "${" in tree:
        yield tree
