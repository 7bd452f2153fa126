"""Recipes: YAML files of settings, and plain words for what is wrong with a setting."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moco.command.paths import find_recipe
from moco.config import UserError
from moco.config.setting import nearest_name


def with_contents(argv: Sequence[str], names: list[str]) -> list[str]:
    """Put the checked settings of each recipe before all other words.

    Of options that say different things the last one counts: so the command line, wherever a recipe
    stands in it. An empty one stays in the place of each, so that no value moves beside another.
    """
    recipes, words, rest = [], [], iter(argv)
    for word in rest:
        option, equals, value = word.partition("=")
        path = value if equals else next(rest, None) if option == "--config" else None
        if option == "--config" and path is not None:
            path = find_recipe(path)
            content = _read_yaml(Path(path))
            _check_settings(content, names, path)
            recipes.append(as_option(content))
            word = as_option({})
        words.append(word)
    return recipes + words


def as_option(content: dict[str, Any]) -> str:
    """Write settings as the option that the parser reads them from."""
    return f"--config={yaml.safe_dump(content, sort_keys=False)}"


def _read_yaml(path: Path) -> dict[Any, Any]:
    """Read a recipe, or the config.yaml of a run without what the run has decided.

    Raises:
        UserError: No YAML, a key given twice, or no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"--config {path}: {plain_words(error)}") from None
    if not isinstance(content, dict | None):
        raise UserError(
            f"--config {path} holds no settings: write GROUP:, then FIELD: VALUE below it"
        )
    return {group: fields for group, fields in (content or {}).items() if group != "decided"}


def known_settings(content: dict[Any, Any], names: list[str]) -> dict[Any, Any]:
    """Leave out what is no setting; `moco.training.run` tells which were left out."""
    return {
        group: {field: value for field, value in fields.items() if f"{group}.{field}" in names}
        for group, fields in content.items()
        if isinstance(fields, dict)
    }


def _check_settings(content: dict[Any, Any], names: list[str], path: str) -> None:
    """Raise UserError for unknown settings."""
    groups = {name.split(".")[0] for name in names if "." in name}
    for group, fields in content.items():
        nested = fields if isinstance(fields, dict) and group in groups else None
        if group in groups and nested is None:
            raise UserError(
                f"--config {path}: {group} is a group: write its fields below it, indented"
            )
        for name in [str(group)] if nested is None else [f"{group}.{field}" for field in nested]:
            if name not in names or name in ("config", "help", "print_config"):
                raise UserError(f"--config {path}: unknown setting {name}{nearest(name, names)}")


def nearest(name: str, names: list[str]) -> str:
    """Name the option that is spelt most like `name`, with or without its group."""
    near = nearest_name(name, names, ".")
    return f": did you mean --{near}?" if near else ": see --help"


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key which is given twice, and to which true and false alone are
    truth values: `on`, `off`, `yes` and `no` are choices and names of settings."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {key!r} is no setting's name")
        if keys.count(key) > 1:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {key} is given twice")
    return loader.construct_mapping(node, deep=True)


_BOOL = "tag:yaml.org,2002:bool"
_UniqueKeys.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_TRUTH = re.compile("^(?:true|True|TRUE|false|False|FALSE)$")
_UniqueKeys.add_implicit_resolver(_BOOL, _TRUTH, [*"tTfF"])
_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def plain_words(error: BaseException) -> str:
    """Return an error's message on one line, without the usage text that jsonargparse adds."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    text = " ".join(line for line in lines if not line.startswith(("usage:", "tip:")))[:500]
    mistyped = re.search(
        r'[Kk]ey "([^"]+)":.*?Expected an? (.+?)\.? (?:Got value:|Expected) ?(.*)', text
    )
    if not mistyped:
        return text
    name, kind, value = mistyped.groups()
    value = value.rsplit("Given value: ", 1)[-1]
    for pattern, plain in _PLAIN_TYPES:
        kind = re.sub(pattern, plain, kind)
    return f"{name} is {value!r}: give {kind}"


_PLAIN_TYPES = (
    (r"<class 'int'>", "a whole number"),
    (r"<class 'float'>", "a number"),
    (r"<class 'bool'>", "true or false"),
    (r"<class 'str'>", "a text"),
    (r"<class 'list'>", "a list such as [1,2]"),
    (r"typing\.Literal\[(.*)\]", r"one of \1"),
)
