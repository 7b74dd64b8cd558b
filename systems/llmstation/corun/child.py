"""One side of a pair of processes: `python -m systems.llmstation.corun.child serve|tune` (started by `pair`, under MPS).

Speaks JSON lines and lives from trial to trial. Reads its orders from standard input: `prepare` (with the trial), which it
answers with `ready` once warm; `begin`; for tuning `end`; and answers `done` with what came out. Tuning runs between `begin`
and `end` alone. When standard input closes its owner is gone: it ends at once.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from systems.common.errors import InputError

ENDED = 3
Order = Mapping[str, Any]


def _orders() -> queue.Queue[Order]:
    """Orders as they come; the process ends when there can be no more."""
    orders: queue.Queue[Order] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            orders.put(json.loads(line))
        os._exit(ENDED)

    threading.Thread(target=read, daemon=True).start()
    return orders


def _say(**told: object) -> None:
    out = sys.__stdout__
    assert out is not None
    out.write(json.dumps(told) + "\n")
    out.flush()


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
            _say(ready=True, notes=list(job.notes))
            continue
        assert order["order"] == "begin" and job is not None, order
        samples, since_s = job.tuner.samples, time.perf_counter()
        while orders.empty():
            job.advance()
        job.tuner.drain()
        assert orders.get()["order"] == "end"
        _say(done=True, samples=job.tuner.samples - samples, seconds=time.perf_counter() - since_s)


def serve(orders: queue.Queue[Order]) -> None:
    """Serve the workload of each trial alone, from `begin` on."""
    from systems.llmstation.corun.measure import serve_alone, trial_of

    run = None
    while True:
        order = orders.get()
        if order["order"] == "prepare":
            os.environ.update(order["environment"])
            run = serve_alone(trial_of(order["trial"]))
            _say(ready=True, notes=[])
            continue
        assert order["order"] == "begin" and run is not None, order
        _say(done=True, **run())


def main() -> None:
    """Be one side."""
    sys.stdout = sys.stderr  # whatever a library prints must not get between the lines
    try:
        {"serve": serve, "tune": tune}[sys.argv[1]](_orders())
    except InputError as error:
        _say(refused=[error.where, error.key, str(error.value), error.mend])
    sys.stderr.flush()
    os._exit(0)  # the thread that reads orders would not let the interpreter end


if __name__ == "__main__":
    main()
