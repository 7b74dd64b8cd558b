"""Which model of the hardware a simulated trial uses: what was measured on that GPU, or the roofline.

`hardware_model: auto` (the default) takes `reference/<gpu>/calibrated/<model>` for one GPU that has it, `calibrated` insists
on it, `roofline` never uses it. A calibration brings whole steps with their padding, host time and how early batches are
formed; `corun.csv` in it the co-run slowdowns; `tuning.csv` the tasklets. What it lacks comes from the models that are used
without any, and the sources say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from systems.common.engine.simulated import IterationCost
from systems.common.errors import InputError
from systems.common.hardware import Testbed, costs
from systems.common.hardware.interference import AnalyticInterference, Interference, Load, Slowdowns
from systems.common.hardware.interference_table import IDLE, MeasuredInterference, read_interference
from systems.common.models import ModelShape
from systems.common.simulate import executor_of
from systems.llmstation.tuning_cost import Layers
from systems.llmstation.tuning_table import TuningTable, read_tuning

REFERENCE = Path(__file__).resolve().parents[2] / "reference"
MODELS = ("auto", "roofline", "calibrated")


@dataclass(frozen=True, slots=True)
class HardwareModel:
    """What prices a trial.

    Attributes:
        layers: one layer, serving and tuning.
        cost: serving iterations.
        interference: co-run slowdowns.
        tuning: measured tasklets; None where the layers' prices must do.
        decode_lead_s: how long before a decode step's end the next batch is formed; None where the engine waits for the end.
        whole_steps: whether `interference` speaks of whole decode steps, head included, as measured ones do.
    """

    layers: Layers
    cost: IterationCost
    interference: Interference
    tuning: TuningTable | None = None
    decode_lead_s: float | None = None
    whole_steps: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """For a figure's footer."""
        tuned = () if self.tuning is None else (self.tuning.source,)
        return (self.cost.costs.source, *tuned)

    @classmethod
    def of(
        cls, parameters: Mapping[str, Any], shape: ModelShape, testbed: Testbed, corun: Path | None, reference: Path = REFERENCE
    ) -> HardwareModel:
        """The model that `parameters` ask for; `corun` is a table of co-run slowdowns that the user gave.

        Raises:
            InputError: an unknown `hardware_model`, no calibration where one is insisted on, an unusable table.
        """
        folder = _folder(parameters, shape, testbed, reference)
        if folder is None:
            priced = costs(shape, testbed, testbed.count, all_reduce=_all_reduce(parameters, testbed, reference))
            interference: Interference = AnalyticInterference() if corun is None else read_interference(corun)
            return cls(Layers.of(priced, shape, testbed.count), IterationCost(priced, shape), interference)
        priced = costs(shape, testbed, 1, operators=folder)
        executor = executor_of(priced, shape)
        layers = Layers.of(priced, shape, 1)
        table = folder / "corun.csv" if corun is None else corun
        measured = table.is_file()
        tuning = folder / "tuning.csv"
        return cls(
            layers,
            executor.cost,
            Measured(read_interference(table)) if measured else AnalyticInterference(),
            read_tuning(tuning) if tuning.is_file() else None,
            executor.decode_lead_s if executor.launches_ahead else None,
            whole_steps=measured,
        )


def _folder(parameters: Mapping[str, Any], shape: ModelShape, testbed: Testbed, reference: Path) -> Path | None:
    asked = parameters.get("hardware_model", "auto")
    if asked not in MODELS:
        raise InputError("llmstation", "hardware_model", asked, f"use one of {', '.join(MODELS)}")
    folder = reference / testbed.gpu.name / "calibrated" / shape.name
    if asked == "roofline" or (asked == "auto" and (testbed.count != 1 or not folder.is_dir())):
        return None
    if testbed.count != 1:
        raise InputError("llmstation", "hardware_model", asked, f"calibrations are of one GPU: not for {testbed.name}")
    return folder


def _all_reduce(parameters: Mapping[str, Any], testbed: Testbed, reference: Path) -> Path | None:
    """All-reduces measured between two such GPUs, if there are any and `hardware_model` does not insist on the roofline."""
    path = reference / testbed.gpu.name / "calibrated" / "all_reduce.csv"
    wanted = testbed.count == 2 and parameters.get("hardware_model", "auto") == "auto"
    return path if wanted and path.is_file() else None


class Measured:
    """Measured slowdowns in the ways and at the SM limits that were measured; at others what the analytic model says.

    For samples shorter than any measured one the nearest one's slowdowns stand. (Scaling them as the analytic model says was
    tried: chunked-training's TPOT came out 46 % too high instead of 32 %.)
    """

    def __init__(self, table: MeasuredInterference) -> None:
        self._table, self._analytic = table, AnalyticInterference()

    @property
    def source(self) -> str:
        """For a figure's footer."""
        return f"{self._table.source}; analytic at SM limits that were not"

    def alone(self, tuning: Load) -> float:
        """How many times longer tuning takes with nothing beside it."""
        return self._table.alone(tuning) if self._table.covers(IDLE, tuning) else self._analytic.alone(tuning)

    def slowdowns(self, serving: Load, tuning: Load) -> Slowdowns:
        """Slowdowns while both run."""
        source = self._table if self._table.covers(serving.phase, tuning) else self._analytic
        return source.slowdowns(serving, tuning)
