"""The only door from the harness to the systems: a system by its name, an experiment by its name.

Each system package has a module `experiments` with a dictionary `EXPERIMENTS` from the name that a figure file
uses to a function from a `Trial` to an `Outcome`. Adding a system means adding one line to `SYSTEMS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence

from systems.common.core import Outcome, Scalar, Trial
from systems.common.errors import InputError

__all__ = ["SYSTEMS", "Experiment", "InputError", "Outcome", "Scalar", "Trial", "experiment", "prepare"]

Experiment = Callable[[Trial], Outcome]

SYSTEMS: Mapping[str, str] = {
    "sirius": "Colocating ML inference and training with fast GPU memory handover (ATC '25)",
    "llmstation": "Resource multiplexing in tuning and serving large language models (ATC '25)",
    "spotserve": "Serving generative LLMs on preemptible instances (ASPLOS '24)",
    "maveriq": "Fingerprint-guided, intent-based LLM deployment (SC '25)",
    "dlora": "Dynamically orchestrating requests and adapters for LoRA LLM serving (OSDI '24)",
}


def experiment(system: str, name: str) -> Experiment:
    """The experiment `name` of `system`.

    Raises InputError when there is no such system or no such experiment.
    """
    if system not in SYSTEMS:
        raise InputError("systems/registry.py", "system", system, f"use one of {', '.join(sorted(SYSTEMS))}")
    known: Mapping[str, Experiment] = importlib.import_module(f"systems.{system}.experiments").EXPERIMENTS
    if name not in known:
        raise InputError(f"systems/{system}/experiments.py", "experiment", name, f"use one of {', '.join(sorted(known))}")
    return known[name]


def prepare(system: str, trials: Sequence[Trial]) -> None:
    """Tell `system` which trials will be asked next in this process, so that it may begin to start what they need.

    A hint: a system whose module `experiments` has no function `prepare` ignores it, and no result depends on it.
    """
    begin: Callable[[Sequence[Trial]], None] | None = getattr(
        importlib.import_module(f"systems.{system}.experiments"), "prepare", None
    )
    if begin is not None:
        begin(trials)
