"""Reads the YAML files that users write: no code, no duplicate keys, no surprises of YAML 1.1.

Scalars follow the core schema of YAML 1.2: `1e-3` is a number, `on`, `no` and `1:30` are text, `010` is text.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from systems.registry import InputError


class _Loader(yaml.CSafeLoader):
    """The safe loader of libyaml, with the scalars of YAML 1.2; refuses a key that a mapping holds twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and isinstance(key_node, yaml.ScalarNode):
                raise _DuplicateKeyError(str(key_node.value), key_node.start_mark.line + 1)
            seen.add(key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep)


class _DuplicateKeyError(Exception):
    def __init__(self, key: str, line: int) -> None:
        super().__init__(key, line)
        self.key, self.line = key, line


_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that the YAML file `path` holds; an empty file is an empty mapping.

    Raises:
        InputError: the file cannot be read, is no YAML, holds a key twice, or holds something else than a mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a safe loader (see its base)
    except FileNotFoundError as error:
        raise InputError(path, "file", str(path), "no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, "file", str(error), "make it a readable text file (UTF-8)") from error
    except _DuplicateKeyError as error:
        raise InputError(path, f"line {error.line}", error.key, "this key is there twice: keep one") from error
    except yaml.YAMLError as error:
        raise _syntax_error(path, error) from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError(path, "line 1", data, "write a mapping of names to values")
    return data


def _syntax_error(path: Path, error: yaml.YAMLError) -> InputError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    if mark is None:
        return InputError(path, "YAML", problem, "mend the syntax")
    return InputError(path, f"line {mark.line + 1}", problem, f"mend the YAML at column {mark.column + 1}")
