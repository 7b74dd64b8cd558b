"""The edge where users' files come in: pydantic models that refuse unknown keys, and one line for what is wrong.

`python -m harness.validation --write-schemas` writes the JSON Schemas of these files into `workflows/schemas/`, for
editors and for readers; a test holds them in step with the models.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from harness.safe_yaml import read_mapping
from systems.registry import InputError

Given: TypeAlias = Any  # what YAML gave, of any shape
Kind: TypeAlias = Any  # a type annotation
ABSENT = "(absent)"
SCHEMAS = Path("workflows", "schemas")
#: Every kind of file that a user writes: its schema's name, and the model behind it as `module:class`.
MODELS: Mapping[str, str] = {
    "config": "harness.config:Config",
    "figure": "harness.figure_file:FigureFile",
    "hosts": "harness.inventory:Inventory",
}


class Model(BaseModel):
    """A piece of a file that a user writes: immutable, refuses unknown keys, numbers must be finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


M = TypeVar("M", bound=BaseModel)


class Wrong(ValueError):  # noqa: N818
    """Raised by a validator that looks at several keys: which of them is wrong, what it holds, how to mend it."""

    def __init__(self, key: str, value: object, mend: str) -> None:
        """`key` is relative to the model that the validator belongs to."""
        super().__init__(key, value, mend)
        self.key, self.value, self.mend = key, value, mend


def load(model: type[M], path: Path) -> M:
    """What the YAML file `path` says, as a `model`. Raises InputError for the first thing wrong with it."""
    return validate(model, read_mapping(path), path)


def validate(model: type[M], data: Mapping[str, Any], where: str | Path) -> M:
    """`data` as a `model`. Raises InputError, in the name of `where`, for the first thing wrong with it."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _first_problem(model, data, where, error) from error


def _first_problem(model: type[BaseModel], data: Given, where: str | Path, failure: ValidationError) -> InputError:
    """Misspelt keys come first: what they cause (a key missing, say) is then no second riddle."""
    errors = sorted(failure.errors(include_url=False), key=lambda error: error["type"] != "extra_forbidden")
    error = errors[0]
    keys = _keys(error["loc"], data)
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, Wrong):
        return InputError(where, ".".join(map(str, [*keys, cause.key])), cause.value, cause.mend)
    value = ABSENT if error["type"] == "missing" else error["input"]
    return InputError(where, ".".join(map(str, keys)) or "file", value, _mend(error, _names_beside(model, keys, data)))


def _mend(error: Mapping[str, Any], names: Sequence[str]) -> str:
    kind, message, context = error["type"], str(error["msg"]), error.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown key" + suggest(str(error["loc"][-1]), names)
    if kind == "missing":
        return "add this key"
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        expected = str(context.get("expected") or context.get("expected_tags"))
        choices = [word.strip(" '") for word in expected.replace(" or ", ", ").split(", ")]
        given = context.get("tag", error["input"])
        return "unknown value" + suggest(str(given), choices)
    if kind == "value_error":
        return str(context.get("error", message))
    return message.replace("Input should be", "use").replace("String should match", "use text of the")


def suggest(given: str, names: Sequence[str]) -> str:
    """Words that follow "unknown ...": the name that was meant, where one is close, else all names."""
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    if close:
        return f", did you mean {close[0]}?"
    return f", use one of {', '.join(names)}" if names else ""


def _keys(location: Sequence[str | int], data: Given) -> list[str | int]:
    """`location` less what pydantic adds to it (the names of a union's members)."""
    keys: list[str | int] = []
    for place, key in enumerate(location):
        inside_list = isinstance(data, list) and isinstance(key, int) and key < len(data)
        if inside_list or (isinstance(data, Mapping) and key in data):
            keys.append(key)
            data = data[key]
        elif place == len(location) - 1 and isinstance(data, Mapping) and isinstance(key, str) and "[" not in key:
            keys.append(key)
    return keys


def _names_beside(model: type[BaseModel], keys: Sequence[str | int], data: Given) -> list[str]:
    """The names that are allowed where the last of `keys` stands."""
    kinds: list[Any] = [model]
    for key in keys[:-1]:
        kinds = [deeper for kind in kinds for deeper in _below(kind, key)]
        data = data[key]
    models = [kind for outer in kinds for kind in _models(outer)]
    said = data.get("kind") if isinstance(data, Mapping) else None
    fitting = [
        kind for kind in models if "kind" in kind.model_fields and said in _choices(kind.model_fields["kind"].annotation)
    ]
    return sorted({name for kind in fitting or models for name in kind.model_fields})


def _choices(literal: Kind) -> tuple[object, ...]:
    return typing.get_args(literal)


def _models(kind: Kind) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    elif _origin(kind) in (typing.Union, types.UnionType, typing.Annotated):
        for inner in typing.get_args(kind):
            yield from _models(inner)


def _origin(kind: Kind) -> object:
    return typing.get_origin(kind)


def _below(kind: Kind, key: str | int) -> Iterator[Any]:
    for model in _models(kind):
        if key in model.model_fields:
            yield model.model_fields[str(key)].annotation
    for container in _containers(kind):
        inner = typing.get_args(container)
        if inner:
            yield inner[-1] if inner[-1] is not Ellipsis else inner[0]


def _containers(kind: Kind) -> Iterator[Any]:
    origin = _origin(kind)
    if isinstance(origin, type) and issubclass(origin, (list, tuple, Mapping, Sequence)):
        yield kind
    else:
        for inner in typing.get_args(kind):
            yield from _containers(inner)


def schema(name: str) -> str:
    """The JSON Schema (2020-12) of one kind of file, as text; unknown keys are refused by it too."""
    module, _, model = MODELS[name].partition(":")
    found: type[BaseModel] = getattr(importlib.import_module(module), model)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(head | found.model_json_schema(), indent=2, sort_keys=True) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the schemas of all kinds of file."""
    parser = argparse.ArgumentParser(prog="python -m harness.validation", description=__doc__)
    parser.add_argument("--write-schemas", action="store_true", required=True, help=f"write {SCHEMAS}/*.schema.json")
    parser.parse_args(argv)
    SCHEMAS.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        (SCHEMAS / f"{name}.schema.json").write_text(schema(name), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
