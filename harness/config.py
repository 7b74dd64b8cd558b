"""`config/config.yaml` and what `snakemake --config key=value` puts over it; `config/README.md` explains every key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from harness.references import refuse_secrets
from harness.safe_yaml import read_mapping
from harness.validation import Model, validate
from systems.registry import InputError

CONFIG_FILE = Path("config", "config.yaml")
COMMAND_LINE = "--config"
_PATH = r"^[^{}<>\x00-\x1f]+$"
_MIRROR = "../shared/data"


class Config(Model):
    """What a run is about. Paths are relative to the folder that Snakemake runs in."""

    hardware: str = Field(default="paper", pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """`paper`: every figure on its own testbed. Any other name, such as `h100x2`, rescales every figure to that testbed."""
    backend: Literal["simulated", "measured", "recorded"] = "simulated"
    """What answers "how long": a cost model, a GPU, or the tables under `reference/`."""
    scale: Literal["paper", "smoke"] = "paper"
    """`paper`: everything. `smoke`: two points and few requests, for CI and first contact."""
    dataset_mirror: str | None = Field(default=_MIRROR, pattern=_PATH)
    """The folder to look in for dataset files before downloading them; null for none."""
    results: str = Field(default="results", pattern=_PATH)
    """Where everything that a run writes goes."""
    seed: int = Field(default=0, ge=0)
    """The first seed; repeats of a trial count up from it."""
    inventory: str = Field(default="hosts/local.yaml", pattern=_PATH)
    """The hosts to run on."""
    offline: bool = False
    """Never download: a dataset that is in no mirror and no cache gets its synthetic stand-in."""

    @property
    def run_name(self) -> str:
        """The folder under `results` that this hardware, backend and scale have to themselves."""
        return f"{self.hardware}-{self.backend}" + ("-smoke" if self.scale == "smoke" else "")

    def testbed(self, of_paper: str) -> str:
        """The testbed to run on, where the paper ran on `of_paper`."""
        return of_paper if self.hardware == "paper" else self.hardware

    @property
    def mirror(self) -> Path | None:
        """The folder of the dataset mirror, or None where there is none."""
        folder = Path(self.dataset_mirror) if self.dataset_mirror else None
        return folder if folder and folder.is_dir() else None


def load_config(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration in the file `path` with `overrides` (from `--config`) put over it.

    Raises:
        InputError: a key or a value in either is wrong or a secret, or a dataset mirror that was named does not exist.
    """
    said = read_mapping(path)
    refuse_secrets(said, path)  # first, so that no other message can show one
    validate(Config, said, path)
    given = {key: value for key, value in (overrides or {}).items() if said.get(key, Ellipsis) != value}
    refuse_secrets(given, COMMAND_LINE)
    config = validate(Config, {**said, **given}, COMMAND_LINE if given else path)
    if config.dataset_mirror not in (None, _MIRROR) and config.mirror is None:
        where = COMMAND_LINE if "dataset_mirror" in given else path
        raise InputError(where, "dataset_mirror", config.dataset_mirror, "no such folder: name one that exists, or null")
    return config


def config_from_json(text: str) -> Config:
    """The configuration that a command was given as JSON; keys that are absent have their default."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError("--config-json", "JSON", text, str(error)) from error
    if not isinstance(found, dict):
        raise InputError("--config-json", "JSON", text, "give an object")
    return validate(Config, found, "--config-json")
