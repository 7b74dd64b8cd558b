"""A replica's loop: takes jobs, aborts and withdrawals between two iterations, runs iterations while there is work.

The counterpart of `systems.common.serve.core.EngineLoop` for dLoRA's engine, which chooses at every iteration who runs and in
which mode. One thread owns the replica and runs `ReplicaLoop.run`; any other may put something into its inbox.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.errors import InputError
from systems.common.serve.messages import (
    Abort,
    Done,
    Family,
    Job,
    Load,
    LoadAdapter,
    Progress,
    Stop,
    UnloadAdapter,
)  # fmt: skip
from systems.common.torch_engine.sampling import Sampling
from systems.dlora.lora_engine.adapters import read
from systems.dlora.lora_engine.live import LiveReplica
from systems.dlora.lora_engine.runner import LoraRunner
from systems.dlora.policies import Policy
from systems.dlora.requests import LoraSequence
from systems.dlora.serving.messages import Host, Spent, Withdraw, Withdrawn

Inbox = SimpleQueue[Any]


class ReplicaLoop:
    """See the module. `report` is called in the replica's thread; `inbox` may have filled before the replica was there.

    Attributes:
        replica: what it runs.
    """

    def __init__(
        self, runner: LoraRunner, config: EngineConfig, policy: Policy, adapters: Sequence[str],
        report: Callable[[object], None], inbox: Inbox | None = None, base_model: str | None = None,
    ) -> None:  # fmt: skip
        """`adapters`: names, all known to `runner`; the policy knows them by these places, the base model by the next one.

        `base_model`: adapters that are loaded later and name another one are refused.
        """
        self._names: list[str | None] = [*adapters, None]
        self._numbers: dict[str | None, int] = {name: number for number, name in enumerate(self._names)}
        self.replica = LiveReplica(
            runner, config, policy, self._names, lambda request: self._jobs[request.index].prompt,
            clock=time.monotonic, sampling=lambda request: self._samplings[request.index], recompute=True,
        )  # fmt: skip
        self._report, self._base_model = report, base_model
        self._inbox: Inbox = inbox if inbox is not None else SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._samplings: dict[int, Sampling] = {}
        self._sequences: dict[int, LoraSequence] = {}
        self._stopping = False
        self._refused: list[tuple[int, InputError]] = []

    def run(self) -> None:
        """Serve until `Stop`."""
        self._tell([])
        while not self._stopping:
            self._take_in(wait=not len(self.replica.queue))
            if len(self.replica.queue):
                self._iterate()
            elif not self._stopping:
                self._tell([])

    def _iterate(self) -> None:
        replica = self.replica
        replica.begin(replica.clock())
        fresh = replica.last
        ended = {sequence.index: sequence for sequence in replica.end()}
        tokens = [(index, token, self._end(ended.get(index), token)) for index, token in fresh.items()]
        if ended:
            self._report(Spent(tuple((index, sequence.executed_s) for index, sequence in ended.items())))
        for index in ended:
            del replica.answers[index]
            self._forget(index)
        self._tell(tokens)

    def _end(self, ended: LoraSequence | None, token: int) -> str | None:
        """Why an answer ends with this token, if it does."""
        if ended is None:
            return None
        want = self._samplings[ended.index]
        return "stop" if token in want.stop_tokens and ended.generated > want.min_tokens else "length"

    def _take_in(self, wait: bool) -> None:
        """Do all that has been asked for; with nothing to run, wait for something."""
        if wait:
            self._do(self._inbox.get())
        while not self._stopping:
            try:
                self._do(self._inbox.get_nowait())
            except Empty:
                return

    def _do(self, command: object) -> None:
        match command:
            case Job():
                self._submit(command)
            case Abort(index):
                self._withdraw(index)
            case Withdraw(indices):
                found = [(index, self._withdraw(index)) for index in indices]
                self._report(Withdrawn(tuple((index, spent_s) for index, spent_s in found if spent_s is not None)))
            case Host(adapters):
                self.replica.runner.prefetch(adapters)
            case LoadAdapter() | UnloadAdapter():
                self._report(Done(command.ticket, self._change_adapters(command)))
            case Stop():
                self._stopping = True

    # ---- requests

    def _submit(self, job: Job) -> None:
        request = Request(job.index, 0.0, len(job.prompt), job.max_tokens, job.adapter)  # by number: the order of arrival
        try:
            if job.adapter not in self._numbers:
                raise InputError("request", "adapter", job.adapter, "no adapter of this name is loaded")
            sequence = LoraSequence(request, self._numbers[job.adapter])
            self._jobs[job.index] = job
            self.replica.submit(sequence)
        except InputError as error:
            self._jobs.pop(job.index, None)
            self._refused.append((job.index, error))
        else:
            self._samplings[job.index] = Sampling(job.temperature, job.top_p, job.seed, job.stop_tokens, job.min_tokens)
            self._sequences[job.index] = sequence

    def _withdraw(self, index: int) -> float | None:
        """Let a request go; the seconds that it ran here, None where it is not here (any more)."""
        if (sequence := self._sequences.get(index)) is None:
            return None
        self.replica.withdraw(sequence)
        del self.replica.tokens[index]
        self._forget(index)
        return sequence.executed_s

    def _forget(self, index: int) -> None:
        for kept in (self._jobs, self._samplings, self._sequences):
            del kept[index]

    # ---- adapters

    def _change_adapters(self, command: LoadAdapter | UnloadAdapter) -> InputError | None:
        """Load or unload one; why not."""
        runner, name = self.replica.runner, command.name
        try:
            if isinstance(command, LoadAdapter):
                runner.add(name, read(command.folder, runner.bank.shape, self._base_model, runner.bank.rank))
                if name not in self._numbers:
                    self._numbers[name] = len(self._names)
                    self._names.append(name)
            else:
                if self._numbers[name] in self.replica.queue.by_adapter:
                    raise InputError(f"adapter {name}", "name", name, "requests use it: let them end first")
                runner.remove(name)
        except InputError as error:
            return error
        except Exception as error:  # whatever is in that folder, other requests go on
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            return InputError(f"adapter {name}", "path", why, "not a peft LoRA adapter of this model")
        return None

    # ---- reports

    def _tell(self, tokens: list[tuple[int, int, str | None]]) -> None:
        replica = self.replica
        running = len(replica.runner.requests)
        used = replica.config.num_gpu_blocks - replica.pool.free_blocks
        more = tuple(
            Family(f"dlora_{name}_total", "counter", about, {"": value})
            for name, about, value in (
                ("iterations", "Iterations run.", replica.iterations),
                ("switches", "Changes of the weights (merges, unmerges in place, one adapter to another).", replica.switches),
                ("adapter_copies", "Adapters copied into the GPU's slots.", replica.runner.store.loads),
            )
        )
        load = Load(len(replica.queue) - running, running, used, replica.preemptions, more)
        self._report(Progress(load, tokens, self._refused))
        self._refused = []
