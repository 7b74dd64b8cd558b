"""One side of a pair of processes: `python -m systems.llmstation.corun.child serve|tune` (started by `pair`, under MPS).

Speaks JSON lines and lives from trial to trial. Reads its orders from standard input: `prepare` (with the trial), which it
answers with `ready` once warm; `begin`; for tuning `end`; and answers `done` with what came out. Tuning runs between `begin`
and `end` alone. When standard input closes its owner is gone: it ends at once.
"""

from __future__ import annotations

import os
import queue
import sys
import time
from dataclasses import replace

from systems.common.errors import InputError
from systems.llmstation.orders import Order, say
from systems.llmstation.orders import orders as orders_of_owner


def tune(orders: queue.Queue[Order]) -> None:
    """Tune without a break from every `begin` to the next `end`, and count samples."""
    # before the first order: who waits for orders has imported everything; nothing here touches the GPU yet
    from systems.llmstation.corun.measure import wanted_of
    from systems.llmstation.corun.tuning_only import TuningOnly

    job: TuningOnly | None = None
    while True:
        order = orders.get()
        if order["order"] == "prepare":
            os.environ.update(order["environment"])  # MPS reads it when the process first touches the GPU
            # torchtune runs with activation checkpointing (sheet 3)
            wanted = replace(wanted_of(order["trial"], tuning_tokens=order["tuning_tokens"]), recompute=True)
            if job is None or job.wanted != wanted:
                job = None  # its trainer's memory first
                job = TuningOnly.start(wanted)
            say(ready=True, notes=list(job.notes))
            continue
        assert order["order"] == "begin" and job is not None, order
        samples, since_s = job.tuner.samples, time.perf_counter()
        while orders.empty():
            job.advance()
        job.tuner.drain()
        assert orders.get()["order"] == "end"
        say(done=True, samples=job.tuner.samples - samples, seconds=time.perf_counter() - since_s)


def serve(orders: queue.Queue[Order]) -> None:
    """Serve the workload of each trial alone, from `begin` on."""
    from systems.llmstation.corun.measure import serve_alone, trial_of

    run = None
    while True:
        order = orders.get()
        if order["order"] == "prepare":
            os.environ.update(order["environment"])
            run = serve_alone(trial_of(order["trial"]))
            say(ready=True, notes=[])
            continue
        assert order["order"] == "begin" and run is not None, order
        say(done=True, **run())


def main() -> None:
    """Be one side."""
    sys.stdout = sys.stderr  # whatever a library prints must not get between the lines
    try:
        {"serve": serve, "tune": tune}[sys.argv[1]](orders_of_owner())
    except InputError as error:
        say(refused=[error.where, error.key, str(error.value), error.mend])
    sys.stderr.flush()
    os._exit(0)  # the thread that reads orders would not let the interpreter end


if __name__ == "__main__":
    main()
