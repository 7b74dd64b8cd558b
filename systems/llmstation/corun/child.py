"""One side of a pair of processes: `python -m systems.llmstation.corun.child serve|tune` (started by `pair`, under MPS).

Speaks JSON lines. Reads its orders from standard input: first what to do, then `begin`, then (tuning only) `end`. Says `ready`
once warm and `done` with what came out. When standard input closes its owner is gone: it ends at once.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from dataclasses import replace
from typing import Any

from systems.common.errors import InputError

ENDED = 3


def _orders() -> queue.Queue[dict[str, Any]]:
    """Orders as they come; the process ends when there can be no more."""
    orders: queue.Queue[dict[str, Any]] = queue.Queue()

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


def tune(orders: queue.Queue[dict[str, Any]]) -> None:
    """Tune without a break; count samples between `begin` and `end`."""
    from systems.llmstation.corun.measure import wanted_of
    from systems.llmstation.corun.tuning_only import TuningOnly

    order = orders.get()
    # torchtune runs with activation checkpointing (sheet 3)
    job = TuningOnly.start(replace(wanted_of(order["trial"], tuning_tokens=order["tuning_tokens"]), recompute=True))
    _say(ready=True, notes=list(job.notes))
    begun: tuple[float, float] | None = None
    while True:
        try:
            order = orders.get_nowait()
        except queue.Empty:
            job.advance()
            continue
        job.tuner.drain()
        if order.get("order") == "begin":
            begun = job.tuner.samples, time.perf_counter()
        else:
            samples, since_s = begun or (job.tuner.samples, time.perf_counter())
            _say(done=True, samples=job.tuner.samples - samples, seconds=time.perf_counter() - since_s)
            return


def serve(orders: queue.Queue[dict[str, Any]]) -> None:
    """Serve the workload of a trial alone, from `begin` on."""
    from systems.llmstation.corun.measure import serve_alone, trial_of

    run = serve_alone(trial_of(orders.get()["trial"]))
    _say(ready=True, notes=[])
    assert orders.get()["order"] == "begin"
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
