"""The profiler: measures fingerprints, whole models and uneven pipelines with our engine, into the authors' columns.

Rooms, in reading order:

* `jobs`: what is measured, as data: one job is one engine, in a process of its own.
* `memory`: what the GPUs hold, by NVML; resident memory on a CPU.
* `timing`: whole requests of a built engine, timed two ways. `worker`: the process that does one job.
* `crew`: starts workers, one ahead of time, and ends them. `run`: job after job within a budget.
* `tables`: rows as CSV, provenance beside. `judge`: how far the estimators are from whole models measured here.

`python -m systems.maveriq.profile --help` says how to use it. Only `timing` and `worker` import torch.
"""
