"""What the rules of workflows/calibrate.smk are told: which GPUs can be measured, and which have been.

Measurements live under `reference/<gpu>/`. `calibrated/<model>/` is what `systems.common.calibrate` and
`systems.llmstation.calibrate` write, `fidelity/<model>/<workload>/` what `systems.common.measure` does, and
`colocation/<model>/<workload>/` holds runs of serving and tuning on one GPU, made by `systems.llmstation.colocation_fidelity`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from harness.config import Config
from harness.provenance import commit
from systems.registry import InputError

REFERENCE = Path("reference")
MODEL = "llama-3.1-8b"
"""The model shape that `snakemake calibrate` measures; `systems.common.calibrate` takes any."""


class Wildcards(Protocol):
    """Of the rules: a GPU of the datasheet, a model shape."""

    gpu: str
    model: str


def calibrations(config: Config, refuse: Callable[[InputError], object]) -> Callable[[object], list[str]]:
    """An input function: the calibration of the configured hardware; `refuse` is told when that names no GPU."""

    def files(_wildcards: object) -> list[str]:
        if config.hardware == "paper":
            mend = "say which GPU this machine has: --config hardware=h200x1"
            refuse(InputError("--config", "hardware", config.hardware, mend))
        count = re.search(r"(?<=\d)x(\d+)$", config.hardware)  # names of GPUs end in a digit, as in rtx4090x2
        gpu = config.hardware.removesuffix(count[0]) if count else config.hardware
        folder = f"{config.results}/calibrated/{gpu}"
        several = [f"{folder}/all_reduce.csv"] if count and int(count[1]) > 1 else []
        return [*(f"{folder}/{MODEL}/{name}.yaml" for name in ("meta", "corun")), *several]

    return files


def folder(_wildcards: Wildcards, output: Sequence[str]) -> str:
    """The folder of a calibration."""
    return str(Path(output[0]).parent)


def gpu_model(wildcards: Wildcards) -> str:
    """Which GPU a calibration must run on."""
    return wildcards.gpu


def measured_runs(wildcards: Wildcards) -> list[str]:
    """The recorded runs of one GPU and model."""
    return sorted(map(str, (REFERENCE / wildcards.gpu / "fidelity" / wildcards.model).glob("*/requests.csv")))


def fidelity(config: Config) -> list[str]:
    """The comparison of every GPU and model that has recorded runs."""
    pairs = sorted({(path.parts[1], path.parts[3]) for path in REFERENCE.glob("*/fidelity/*/*/requests.csv")})
    colocated = sorted({(path.parts[1], path.parts[3]) for path in REFERENCE.glob("*/colocation/*/*/runs.json")})
    return [
        *(f"{config.results}/fidelity/{gpu}/{model}/fidelity.pdf" for gpu, model in pairs),
        *(f"{config.results}/fidelity/{gpu}/{model}/colocation.pdf" for gpu, model in colocated),
    ]


def colocated_runs(wildcards: Wildcards) -> list[str]:
    """The recorded co-located runs of one GPU and model, and the calibration that simulates them again."""
    runs = (REFERENCE / wildcards.gpu / "colocation" / wildcards.model).glob("*/*.*")
    return sorted(map(str, (*runs, *(REFERENCE / wildcards.gpu / "calibrated" / wildcards.model).glob("*.*"))))


def colocation_version(_wildcards: object) -> str:
    """The version of the code that simulates them."""
    from harness.code_version import system_version

    return system_version("llmstation")[:16]


def fidelity_options(wildcards: Wildcards) -> list[str]:
    """Options of `systems.common.fidelity_table`."""
    calibrated = REFERENCE / wildcards.gpu / "calibrated" / wildcards.model
    operators = ["--operators", str(calibrated)] if (calibrated / "meta.yaml").is_file() else []
    return ["--measured", str(REFERENCE / wildcards.gpu / "fidelity" / wildcards.model), *operators]


def simulator_version(_wildcards: object) -> str:
    """The version of the code that simulates."""
    from harness.code_version import code_version

    return code_version("systems/common/engine", "systems/common/hardware", "systems/common/fidelity_table.py")[:16]


def commit_name(_wildcards: object) -> str:
    """The commit of this checkout, with `+` where files differ from it."""
    found = commit(Path.cwd())
    return f"{found['commit']}{'+' if found['dirty'] is True else ''}"
