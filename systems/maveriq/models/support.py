"""Unsupported configurations and the accuracy table, read from YAML (`support.yaml`, or a user's file beside it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from systems.common.errors import InputError
from systems.maveriq.configuration import DTYPES, Configuration

AccuracyTable = Mapping[tuple[str, bool], float]
"""(dtype, int8_kv) to MMLU in percent of fp16's."""

BUILT_IN = Path(__file__).parent / "support.yaml"
_Percent = StrictFloat | StrictInt


class _Unsupported(BaseModel):
    """One line of `unsupported`: keys that are absent agree with everything."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: StrictStr
    tp: StrictInt | None = None
    pp: StrictInt | None = None
    dtype: StrictStr | None = None
    int8_kv: StrictBool | None = None
    reason: StrictStr = Field(min_length=1)

    def agrees(self, configuration: Configuration) -> bool:
        """Whether `configuration` is one of those meant."""
        pairs = (
            (self.tp, configuration.tp),
            (self.pp, configuration.pp),
            (self.dtype, configuration.dtype),
            (self.int8_kv, configuration.int8_kv),
        )
        return all(wanted is None or wanted == has for wanted, has in pairs)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, Any] = Field(default_factory=dict, description="read by systems.maveriq.configuration")
    unsupported: list[_Unsupported] = Field(default_factory=list)
    accuracy: dict[str, dict[str, _Percent | dict[str, _Percent]]] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Support:
    """What can run, and how accurate it is. Pure data; `load_support` reads it."""

    unsupported: tuple[_Unsupported, ...] = ()
    accuracy: Mapping[str, AccuracyTable] = field(default_factory=dict)

    def reason(self, model: str, configuration: Configuration) -> str | None:
        """Why `configuration` of `model` can't run; None when nothing is known against it."""
        found = (entry for entry in self.unsupported if entry.model == model and entry.agrees(configuration))
        return next((entry.reason for entry in found), None)

    def accuracy_of(self, model: str) -> AccuracyTable:
        """The accuracy of `model` by precision, percent of fp16.

        Raises InputError when there is no table: an accuracy floor can't be promised then.
        """
        if model not in self.accuracy:
            known = ", ".join(sorted(self.accuracy)) or "no model"
            raise InputError(
                "accuracy table", "model", model, f"add it under `accuracy` in a file for --models; known: {known}"
            )
        return self.accuracy[model]


def load_support(file: Path | None = None) -> Support:
    """The built-in tables, with those of a user's `file` over them.

    Raises InputError when the file can't be read or holds something else.
    """
    built_in = _read(BUILT_IN)
    if file is None:
        return built_in
    own = _read(file)
    return Support((*built_in.unsupported, *own.unsupported), {**built_in.accuracy, **own.accuracy})


@cache
def _read(file: Path) -> Support:
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER)
        parsed = _File.model_validate({} if raw is None else raw)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(file, "file", str(error), "give a YAML file with the keys models, unsupported, accuracy") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise InputError(file, where, first.get("input"), first["msg"]) from error
    return Support(tuple(parsed.unsupported), {name: _table(file, name, entry) for name, entry in parsed.accuracy.items()})


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _table(file: Path, model: str, entry: Mapping[str, Any]) -> AccuracyTable:
    plain = {dtype: value for dtype, value in entry.items() if dtype != "int8_kv"}
    with_kv = entry.get("int8_kv", {})
    if not isinstance(with_kv, Mapping):
        raise InputError(file, f"accuracy.{model}.int8_kv", with_kv, "map a dtype to its accuracy with an int8 KV cache")
    table: dict[tuple[str, bool], float] = {("float16", False): 100.0, ("float16", True): 100.0}
    for dtype, value in (*plain.items(), *with_kv.items()):
        if dtype not in DTYPES:
            raise InputError(file, f"accuracy.{model}", dtype, f"use one of {', '.join(DTYPES)}")
        if not isinstance(value, int | float) or not 0 <= value <= 200:
            raise InputError(file, f"accuracy.{model}.{dtype}", value, "write a percentage of fp16's accuracy, 0 to 200")
    for dtype, value in plain.items():
        table[dtype, False] = table[dtype, True] = float(value)
    for dtype, value in with_kv.items():
        table[dtype, True] = float(value)
    return table
