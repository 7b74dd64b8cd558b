"""A replica that runs for real: the simulator's queue, KV bookkeeping and policies, with the runner in place of prices.

`begin` decides an iteration and runs it, `end` books it with the time that it took. Iterations are taken one at a time and
waited for, so the host's work between two of them (decision, launch) is part of every iteration's time. KV blocks are not
swapped to the host: a pool that would need it is refused.
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
from systems.dlora.costs import Iteration
from systems.dlora.lora_engine.runner import LoraRunner
from systems.dlora.policies import Plan, Policy
from systems.dlora.policies.credit import CreditRules
from systems.dlora.replica import Replica, Run
from systems.dlora.requests import LoraSequence
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
        answers: output tokens of finished requests.
    """

    def __init__(
        self, runner: LoraRunner, config: EngineConfig, policy: Policy, adapters: Sequence[str],
        prompt: Callable[[Request], Tokens], index: int = 0, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        """`adapters`: name of each adapter number. `prompt`: a request's tokens."""
        super().__init__(index, config, policy, _Unpriced(), Slots(runner.bank.capacity))
        self.runner, self.clock = runner, clock
        self.tokens: dict[int, list[int]] = {}
        self.answers: dict[int, list[int]] = {}
        self._adapters, self._prompt = adapters, prompt

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
        if batch.swapped_out_blocks:
            mend = "too few for what runs at once, and a live replica does not swap: raise it, or lower max_num_seqs"
            raise InputError("dlora", "num_gpu_blocks", self.config.num_gpu_blocks, mend)
        for sequence in batch.prefills:
            whole = np.array(self.tokens[sequence.index][: sequence.prompt_tokens], np.int64)
            self.runner.admit(sequence.index, whole, self._adapters[sequence.adapter])
            if sequence.scheduled_s != sequence.scheduled_s:
                sequence.scheduled_s = now_s
        prefills, decodes = ([s.index for s in part] for part in (batch.prefills, batch.decodes))
        launched = self.runner.launch(prefills, decodes, self._merged(plan))
        self.runner.prefetch([self._adapters[s.adapter] for s in self.queue.order[: LOOK_AHEAD * self.config.max_num_seqs]])
        for index, token in launched.read().items():
            self.tokens[index].append(token)
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
