# mypy: disable-error-code="no-untyped-call"
"""One of the processes that `mps` measures: `python -m systems.llmstation.calibrate.child serve|tune`.

Speaks JSON lines: the first order says what to be, the answer is `ready`. Then, for serving, every order is a batch to time;
for tuning they are `run` (answered at once) and `stop`, answered with what the tasklets took. When standard input closes the
owner is gone: the process ends at once.
"""

from __future__ import annotations

import os
import queue
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from systems.common.errors import InputError
from systems.llmstation.orders import Order, say
from systems.llmstation.orders import orders as orders_of_owner

IN_FLIGHT = 4
PHASES = ("forward", "backward")


def serve(orders: queue.Queue[Order]) -> None:
    """Time batches: the mean of those that fit into the time given."""
    import torch

    from systems.common.calibrate.bench import Bench
    from systems.common.calibrate.steps import decode_work, prompts_work
    from systems.common.models import model
    from systems.llmstation.corun.lanes import lanes_of

    told = orders.get()
    device = torch.device(told["device"])
    bench = Bench.build(model(told["model"]), device, told["max_num_seqs"], told["blocks"])
    lanes = lanes_of(device)
    say(ready=True)
    while True:
        order = orders.get()
        phase, size, context = order["phase"], order["size"], order["context"]
        with lanes.serving(), torch.inference_mode():  # a stream of high priority, as in a served run
            if phase == "decode":
                work, before = decode_work(bench, size, context)
            else:
                work, before = prompts_work(bench, (0, context, size, 0, 1), rested=False)
            took_s = _mean_s(work, before, order["seconds"], device)
        say(mean_s=statistics.fmean(took_s), count=len(took_s))


def _mean_s(work: Callable[[], object], before: Callable[[], object], seconds: float, device: Any) -> list[float]:  # noqa: ANN401
    """Seconds of each run, for about `seconds`; the first ones, which compile and capture, left out."""
    import torch

    gpu = device.type == "cuda"
    for _ in range(3):
        before()
        work()
    if gpu:
        torch.cuda.synchronize()
    began, spans = time.perf_counter(), []
    took_s: list[float] = []
    while time.perf_counter() - began < seconds or not took_s:
        before()
        if not gpu:
            at = time.perf_counter()
            work()
            took_s.append(time.perf_counter() - at)
            continue
        span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        span[0].record()
        work()
        span[1].record()
        spans.append(span)
        if len(spans) > IN_FLIGHT:
            first = spans.pop(0)
            first[1].synchronize()
            took_s.append(first[0].elapsed_time(first[1]) * 1e-3)
    return took_s


def tune(orders: queue.Queue[Order]) -> None:
    """Tune without a pause from `run` to `stop`, at the length that `run` names."""
    from systems.common.models import model
    from systems.llmstation.corun.session import Wanted
    from systems.llmstation.corun.tuning_only import TuningOnly

    told = orders.get()
    # as torchtune runs: activation checkpointing (sheet 3)
    wanted = Wanted(model(told["model"]), device=told["device"], recompute=True)
    jobs = {tokens: TuningOnly.start(replace(wanted, tuning_tokens=tokens)) for tokens in told["tokens"]}
    say(ready=True, notes=[note for job in jobs.values() for note in job.notes][:1])
    while True:
        order = orders.get()
        assert order["order"] == "run", order
        job = jobs[order["tokens"]]
        tuner = job.tuner
        say(running=True)
        samples, began = tuner.samples, time.perf_counter()
        took_s: dict[str, list[float]] = {}
        while orders.empty() or len(took_s) < len(PHASES):  # a stop that comes early waits for a tasklet of each phase
            tuner.wait_for_room()
            tuner.launch()
            for ran in tuner.take():
                took_s.setdefault(ran.phase, []).append(ran.end.after_s(ran.begin))
        tuner.drain()
        tuner.take()
        orders.get()
        spent_s = time.perf_counter() - began
        means = {phase: statistics.fmean(times) for phase, times in took_s.items()}
        say(tasklet_s=means, samples=tuner.samples - samples, seconds=spent_s)


def main() -> None:
    """Be one of them."""
    sys.stdout = sys.stderr  # whatever a library prints must not get between the lines
    try:
        {"serve": serve, "tune": tune}[sys.argv[1]](orders_of_owner())
    except InputError as error:
        say(refused=[error.where, error.key, str(error.value), error.mend])
    except Exception as error:  # the owner tells it in its own words
        say(failed=f"{type(error).__name__}: {error}"[:500])
    sys.stderr.flush()
    os._exit(0)  # the thread that reads orders would not let the interpreter end


if __name__ == "__main__":
    main()
