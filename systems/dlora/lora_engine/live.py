"""A replica that runs for real: the simulator's queue, KV bookkeeping and policies, with the runner in place of prices.

`begin` decides an iteration and runs it, `end` books it with the time that it took. Iterations are taken one at a time and
waited for, so the host's work between two of them (decision, launch) is part of every iteration's time. KV blocks are not
swapped to the host: a pool that would need it is refused, or (`recompute`) the cache is dropped and computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.engine.executor import DecodeRun
from systems.common.errors import InputError
from systems.common.torch_engine.device import GREEDY
from systems.common.torch_engine.sampling import Sampling
from systems.dlora.costs import Iteration
from systems.dlora.formation import Batch
from systems.dlora.lora_engine.runner import LoraRunner
from systems.dlora.policies import Plan, Policy
from systems.dlora.policies.credit import CreditRules
from systems.dlora.replica import Replica, Run
from systems.dlora.requests import LoraSequence, Place
from systems.dlora.slots import Slots

Tokens = NDArray[np.int64]
LOOK_AHEAD = 4
"""Adapters of so many full batches at the queue's head are brought in while a step runs, as far as slots reach."""


class _Unpriced:
    """Stands where a simulated replica has its prices: here nothing is priced."""

    source = "measured"

    @property
    def rules(self) -> CreditRules:
        raise AssertionError("a live replica measures")

    def run(self, iteration: Iteration) -> DecodeRun:
        raise AssertionError("a live replica measures")

    def switch_s(self) -> float:
        raise AssertionError("a live replica measures")

    def load_s(self, adapters: int) -> float:
        raise AssertionError("a live replica measures")

    def swap_s(self, blocks: int) -> float:
        raise AssertionError("a live replica measures")


class LiveReplica(Replica):
    """See the module.

    Attributes:
        runner: what runs the batches. tokens: prompt and answer so far of every unfinished request, by number.
        answers: output tokens of finished requests. last: tokens of the last iteration, by request.
        preemptions: caches dropped for want of room.
    """

    def __init__(
        self, runner: LoraRunner, config: EngineConfig, policy: Policy, adapters: Sequence[str | None],
        prompt: Callable[[Request], Tokens], index: int = 0, clock: Callable[[], float] = time.perf_counter,
        sampling: Callable[[Request], Sampling] = lambda _: GREEDY, recompute: bool = False,
    ) -> None:  # fmt: skip
        """`adapters`: name of each adapter number; None is the base model. `prompt`: a request's tokens.

        `sampling`: how a request wants its tokens; one of its stop tokens ends it early. `recompute`: where KV blocks, or
        places for requests that hold some, run out, those that came last lose their cache.
        """
        super().__init__(index, config, policy, _Unpriced(), Slots(runner.bank.capacity))
        self.runner, self.clock, self.recompute = runner, clock, recompute
        self.tokens: dict[int, list[int]] = {}
        self.answers: dict[int, list[int]] = {}
        self.last: dict[int, int] = {}
        self.preemptions = 0
        self._adapters, self._prompt, self._sampling = adapters, prompt, sampling

    def submit(self, sequence: LoraSequence) -> None:
        """As `Replica.submit`."""
        super().submit(sequence)
        self.tokens.setdefault(sequence.index, [int(token) for token in self._prompt(sequence.request)])

    def withdraw(self, sequence: LoraSequence, keep_cache: bool = False) -> None:
        """As `Replica.withdraw`; the KV cache never goes along. Who takes the request in needs its `tokens`."""
        super().withdraw(sequence, keep_cache=False)
        if sequence.index in self.runner.requests:
            self.runner.finish(sequence.index)

    def begin(self, now_s: float) -> float:
        """Decide the next iteration and run it; when it ended. Raises InputError when KV blocks would have to be swapped."""
        began_s = self.clock()
        assert self.run is None and len(self.queue)
        plan = self.policy.plan(self.queue)
        self.decisions += 1
        batch = self.pool.form(plan.order, self.queue)
        if self.recompute:
            self._make_room(batch)
        elif batch.swapped_out_blocks:
            mend = "too few for what runs at once, and a live replica does not swap: raise it, or lower max_num_seqs"
            raise InputError("dlora", "num_gpu_blocks", self.config.num_gpu_blocks, mend)
        for sequence in batch.prefills:
            whole = np.array(self.tokens[sequence.index][: sequence.prompt_tokens], np.int64)
            want = self._sampling(sequence.request)
            self.runner.admit(sequence.index, whole, self._adapters[sequence.adapter], want, sequence.generated)
            if sequence.scheduled_s != sequence.scheduled_s:
                sequence.scheduled_s = now_s
        prefills, decodes = ([s.index for s in part] for part in (batch.prefills, batch.decodes))
        launched = self.runner.launch(prefills, decodes, self._merged(plan))
        coming = [self._adapters[s.adapter] for s in self.queue.order[: LOOK_AHEAD * self.config.max_num_seqs]]
        self.runner.prefetch([name for name in coming if name is not None])
        self.last = launched.read()
        for sequence in batch.sequences:
            self._take(sequence, self.last[sequence.index])
        self.switches = self.runner.switches
        self.run = Run(plan, batch, now_s, 0.0, DecodeRun(self.clock() - began_s), 1)
        return self.run.end_s()

    def end(self) -> list[LoraSequence]:
        """As `Replica.end`."""
        done = super().end()
        for sequence in done:
            self.runner.finish(sequence.index)
            self.answers[sequence.index] = self.tokens.pop(sequence.index)[-sequence.output_tokens :]
        return done

    def _take(self, sequence: LoraSequence, token: int) -> None:
        """A request's next token; it ends with it where that is one of its stop tokens."""
        self.tokens[sequence.index].append(token)
        want, count = self._sampling(sequence.request), sequence.generated + 1
        if token in want.stop_tokens and count > want.min_tokens:
            sequence.output_tokens = count

    def _make_room(self, batch: Batch) -> None:
        """Drop the caches that `form` would have swapped out, and as many more as the batch's prompts need places."""
        swapped = [s for s in self.queue if s.place is Place.SWAPPED] if batch.swapped_out_blocks else []
        for sequence in swapped:  # its blocks are free already
            self._drop(sequence)
        short = len(self.runner.requests) + len(batch.prefills) - self.runner.live.engine.config.max_num_seqs
        if short > 0:
            running = set(batch.decodes)
            paused = [s for s in reversed(self.queue.order) if s.place is Place.READY and s not in running]
            for sequence in paused[:short]:
                self.pool.release(sequence)
                sequence.preemptions += 1
                self._drop(sequence)

    def _drop(self, sequence: LoraSequence) -> None:
        self.runner.finish(sequence.index)
        sequence.forget_cache()
        self.preemptions += 1

    def _merged(self, plan: Plan) -> str | None:
        return None if plan.merged is None else self._adapters[plan.merged]


def serve(
    replica: LiveReplica,
    requests: Iterable[tuple[Request, int]],
    wait: bool = True,
    sleep: Callable[[float], None] = time.sleep,
) -> list[LoraSequence]:
    """Serve requests (with adapter numbers, sorted by arrival) in real time from now; all, in order, times since now.

    Args:
        replica: idle.
        requests: what arrives.
        wait: keep to the arrival times (else all are there at once).
        sleep: how to wait.
    """
    pending = iter(requests)
    coming = next(pending, None)
    sequences: list[LoraSequence] = []
    began_s = replica.clock()
    while coming is not None or len(replica.queue):
        now_s = replica.clock() - began_s
        while coming is not None and (not wait or coming[0].arrival_s <= now_s):
            sequences.append(LoraSequence(*coming))
            replica.submit(sequences[-1])
            coming = next(pending, None)
        if len(replica.queue):
            replica.begin(now_s)
            replica.end()
        elif coming is not None:
            sleep(max(0.0, coming[0].arrival_s - now_s))
    return sequences
