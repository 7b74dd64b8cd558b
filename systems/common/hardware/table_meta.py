"""What a folder of operator tables says about itself, and whether that fits what is to be simulated.

`profile_meta.yaml` is optional, and only the keys named here are read; others are the profiler's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from systems.common.errors import InputError
from systems.common.models import ModelShape

SHAPE = {
    "hidden_size": "hidden",
    "intermediate_size": "mlp",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "vocab_size": "vocab",
}  # fmt: skip
"""Keys under `engine_effective.hf_overrides` that describe the model, and our names for them."""


@dataclass(frozen=True, slots=True)
class TableMeta:
    """Degrees measured, GPU (empty: not said), and the model's sizes as far as they are said."""

    path: Path
    tp_degrees: tuple[int, ...] = (1,)
    hardware: str = ""
    shape: Mapping[str, int] = field(default_factory=dict)

    def check(self, model: ModelShape, gpu: str, known_gpus: Mapping[str, object]) -> None:
        """Refuse tables that say of themselves that they are of another model shape or another GPU that we know.

        Raises InputError naming the key that contradicts.
        """
        for key, value in self.shape.items():
            ours = getattr(model, SHAPE[key])
            if value != ours:
                raise InputError(self.path, key, value, f"use tables of {model.name}, where it is {ours}")
        named = self.hardware.lower().replace(" ", "").replace("_", "-")
        if named in known_gpus and named != gpu:
            raise InputError(self.path, "hardware", self.hardware, f"use tables of {gpu}, or simulate {named}")


def read_meta(folder: Path) -> TableMeta:
    """Read `profile_meta.yaml` or `meta.yaml` in `folder`; the defaults where there is none.

    Raises InputError for a file that is no YAML mapping or whose keys hold the wrong kind of value.
    """
    for path in (folder / "profile_meta.yaml", folder / "meta.yaml"):
        if path.is_file():
            return _parse(path, _load(path))
    return TableMeta(folder)


def _load(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(path, "file", str(error), "give valid YAML in UTF-8") from None


def _parse(path: Path, loaded: object) -> TableMeta:
    meta = _mapping(path, "file", loaded)
    engine = _mapping(path, "engine_effective", meta.get("engine_effective", {}))
    said = _mapping(path, "engine_effective.hf_overrides", engine.get("hf_overrides", {}))
    degrees = meta.get("tp_degrees", [1])
    if not isinstance(degrees, list) or not all(type(degree) is int and degree > 0 for degree in degrees):
        raise InputError(path, "tp_degrees", degrees, "give a list of whole numbers above 0, such as [1, 2]")
    hardware = meta.get("hardware", "")
    if not isinstance(hardware, str):
        raise InputError(path, "hardware", hardware, "give the GPU's name as text")
    shape = {key: said[key] for key in SHAPE if key in said}
    for key, size in shape.items():
        if type(size) is not int:
            raise InputError(path, key, size, "give a whole number")
    return TableMeta(path, tuple(degrees), hardware, shape)


def _mapping(path: Path, key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(path, key, value, "give a mapping of keys to values")
    return value
