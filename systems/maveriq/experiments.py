"""What a trial of each figure of this system means: what the authors measured, estimates, serving, and what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from systems.common.core import Outcome, Trial
from systems.maveriq.experiments_estimator import ESTIMATOR_EXPERIMENTS
from systems.maveriq.experiments_measured import MEASURED_EXPERIMENTS
from systems.maveriq.experiments_recorded import RECORDED_EXPERIMENTS
from systems.maveriq.experiments_serving import SERVING_EXPERIMENTS

EXPERIMENTS: Mapping[str, Callable[[Trial], Outcome]] = {
    **MEASURED_EXPERIMENTS,
    **ESTIMATOR_EXPERIMENTS,
    **SERVING_EXPERIMENTS,
    **RECORDED_EXPERIMENTS,
}
