"""The process that does one job:  `python -m systems.maveriq.profile.worker`, started by `crew`.

It imports what it needs, says so, waits for one job as a line of JSON on its input, measures, and writes what it found as lines
of JSON: `ready`, a `row` per output length, then `done` or `error`. The end of its input ends it at once.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from typing import IO, Any

from systems.common.errors import InputError
from systems.maveriq.profile import memory
from systems.maveriq.profile.jobs import CLOCKS, Job

LEAST_GIB = 2.0**-20
"""Resident memory may shrink meanwhile; a table needs a number above 0."""


class Gauge:
    """Memory over what was in use when it was made; on GPUs over those that the ranks are on."""

    def __init__(self, job: Job) -> None:
        self.job, self.names = job, None
        self.how = "resident memory of the ranks' processes on a CPU: no GPU memory was measured"
        if job.device == "cuda":
            self.before, self.how = memory.gpus_used()
        else:
            self.before = memory.resident()

    def gib(self) -> float:
        """GiB more than at the start."""
        if self.job.device != "cuda":
            return max(LEAST_GIB, memory.grown_gib(self.before, memory.resident()))
        now, _ = memory.gpus_used()
        return memory.grown_gib(self.before, now, _ranks_gpus(self.job.gpus, now))


def _ranks_gpus(ranks: int, known: Any) -> list[str] | None:  # noqa: ANN401 - only its keys
    """UUIDs of the GPUs that ranks are on; None (all of them) where torch and NVML call them differently."""
    import torch

    ours = [torch.cuda.get_device_properties(rank) for rank in range(min(ranks, torch.cuda.device_count()))]
    names = [f"GPU-{getattr(properties, 'uuid', None)}" for properties in ours]
    return names if set(names) <= set(known) else None


def measure(job: Job, say: Any) -> None:  # noqa: ANN401 - a function of JSON values
    """Do `job`; tell every row by `say`. Raises InputError where the engine can't be built."""
    import torch

    from systems.maveriq.profile import timing

    began, gauge = time.perf_counter(), Gauge(job)
    if job.device == "cuda" and torch.cuda.device_count() < job.gpus:
        raise InputError("profile", "GPUs", torch.cuda.device_count(), f"{job.name} needs {job.gpus}: leave it out")
    with timing.engine(job) as live:
        _wait(job)
        loaded_gib, built_s = gauge.gib(), time.perf_counter() - began
        asker = timing.Asker(live, job)
        for place, length in enumerate(sorted(job.output_lengths)):
            start = time.perf_counter()
            asker.served(length)
            if not place:
                gc.collect()
                gc.freeze()  # what loading made is never garbage: no pause while requests are timed
            ways = {way: asker.median(getattr(asker, way), length, way == job.clock) for way in CLOCKS}
            after_gib = gauge.gib()  # after many requests: the first few still make the allocator take more
            say(row=_row(job, length, ways, loaded_gib, after_gib, time.perf_counter() - start), built_s=built_s)
    say(done=True, memory=gauge.how, device=_device(job), torch=str(torch.__version__))


def _row(job: Job, length: int, ways: dict[str, Any], loaded_gib: float, after_gib: float, ran_s: float) -> dict[str, Any]:
    chosen = ways[job.clock]
    return {
        "output_length": length, "latency_s": chosen.latency_s, "low_s": chosen.low_s, "high_s": chosen.high_s,
        "served_s": ways["served"].latency_s, "launched_s": ways["launched"].latency_s, "host_share": chosen.host_share,
        "loaded_gib": loaded_gib, "memory_gib": after_gib, "ran_s": ran_s,
    }  # fmt: skip


def _wait(job: Job) -> None:
    if job.device == "cuda":
        import torch

        torch.cuda.synchronize()


def _device(job: Job) -> str:
    import torch

    return torch.cuda.get_device_name(0) if job.device == "cuda" else "cpu"


def _end_with_input(stream: IO[str]) -> None:
    stream.read()
    os._exit(1)


def main() -> int:
    """See the module; exit code 0 also where the job failed: the answer says so."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not end up among the answers

    def say(**message: Any) -> None:  # noqa: ANN401 - JSON
        print(json.dumps(message), file=out, flush=True)

    began = time.perf_counter()
    try:
        import systems.maveriq.profile.timing  # noqa: F401 - the slow imports, before there is a job
    except ModuleNotFoundError as error:
        say(error=f"profile: {error.name} is not installed: `make torch` installs it")
        return 0
    say(ready=True, import_s=time.perf_counter() - began)
    line = sys.stdin.readline()
    if not line:
        return 0
    threading.Thread(target=_end_with_input, args=(sys.stdin,), daemon=True).start()
    try:
        measure(Job.from_json(json.loads(line)), say)
    except InputError as error:
        say(error=str(error))
    except Exception as error:  # whatever it was, the parent must hear of it; ranks end with this process
        import traceback

        traceback.print_exc()
        say(error=f"{type(error).__name__}: {error}".splitlines()[0][:500])
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no teardown: the driver takes the GPU's memory back
