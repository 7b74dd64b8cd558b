"""Workloads: when requests arrive, how long they are, which adapter they name.

A workload is declared as flat data and built by `build`; everything in it follows from the declaration, the datasets
and a seed. docs/workloads.md lists every key. Modules, from the ground up:

* `streams`: one independent random stream per purpose, from one seed;
* `arrivals`: arrival processes; `lengths`: token counts; `adapters`: which LoRA adapter each request names;
* `readers`: recorded traces and users' own files; `standins`: synthetic data in place of a dataset that is absent;
* `catalogue`: what a dataset is called, how to read it, what stands in for it;
* `declaration` and `build`: from a declaration to a `Workload`.
"""

from systems.common.workloads.build import Workload, build

__all__ = ["Workload", "build"]
