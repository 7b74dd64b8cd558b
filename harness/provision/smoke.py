"""A trial so small that it takes a second, run on a host and here: both must give the very same numbers.

python -m harness.provision.smoke        # prints the metrics as JSON, floats in full
"""

from __future__ import annotations

import math

from harness.code_version import code_version, system_version
from harness.trials import canonical
from systems.registry import Trial, experiment

TRIAL = Trial(
    system="llmstation",
    experiment="colocation",
    parameters={
        "model": "llama-3.1-8b",
        "seconds": 20,
        "workload": {"arrivals": "poisson", "lengths": "sharegpt_lengths", "lengths_filter": "vllm-sharegpt"},
        "rate_rps": 1,
        "policy": "chunked",
        "chunk_tokens": 64,
    },
    hardware="rtx3090x2",
    datasets={"sharegpt_lengths": None},
)


def metrics() -> str:
    """What the trial gives on this machine, as JSON."""
    found = experiment(TRIAL.system, TRIAL.experiment)(TRIAL).metrics
    return canonical({key: _finite(value) for key, value in found.items()})


def key() -> str:
    """What the numbers depend on, besides the machine."""
    return f"{system_version(TRIAL.system)[:16]}-{code_version('harness/provision/smoke.py')[:8]}"


def _finite(value: object) -> object:
    plain = value.item() if hasattr(value, "item") else value
    return str(plain) if isinstance(plain, float) and not math.isfinite(plain) else plain


if __name__ == "__main__":
    print(metrics())
