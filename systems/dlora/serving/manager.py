"""The manager of the replicas: between the HTTP process, to which it looks like an engine, and one engine process per replica.

It knows every request's tokens, so whatever happens to a replica the request goes on at another with what it has got: each
token is passed on once, by the one process that all of them come through. A move is a question to the source, whose answer
comes behind the last of its tokens; the death of a replica is the end of its pipe, behind the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from systems.common.errors import InputError
from systems.common.serve.messages import (
    Abort,
    Done,
    Ended,
    Job,
    Load,
    LoadAdapter,
    Progress,
    Report,
    UnloadAdapter,
)  # fmt: skip
from systems.dlora.serving.control import Control, Order, Question
from systems.dlora.serving.messages import Host, Spent, Withdraw, Withdrawn
from systems.dlora.serving.numbers import Totals, together
from systems.dlora.serving.solver import Answer, Ask

HTTP, SOLVER = -1, -2
"""Where a message is from, beside the replicas' numbers."""
GRACE_S = 0.5
"""What the solver may take beyond its limit: to build the program, and to tell of it."""
OURS = -1
"""A ticket of the manager's own; those of the HTTP process count from 0."""


class Engine(Protocol):
    """A replica's process, as far as the manager speaks to it."""

    def send(self, command: object) -> None:
        """Say something; one that is gone hears nothing."""
        ...


class Asking(Protocol):
    """The solver's process (`Solver`)."""

    @property
    def ready(self) -> bool:
        """Whether it takes questions."""
        ...

    @property
    def ended(self) -> str | None:
        """Why it has ended by itself, if it has."""
        ...

    def ask(self, question: Ask) -> None:
        """Have something solved."""
        ...

    def restart(self) -> None:
        """Begin anew."""
        ...


@dataclass(slots=True)
class _Change:
    """An adapter that is being loaded or unloaded everywhere."""

    command: LoadAdapter | UnloadAdapter
    waiting: set[int]
    error: InputError | None = None
    done: list[int] = field(default_factory=list)


class NobodyLeftError(Exception):
    """The last replica is gone."""


class Manager:
    """See the module. Single-threaded: `handle` for every message, `look` when it is time.

    Attributes:
        control: who serves what.
        totals: moves, deaths, solves.
    """

    def __init__(
        self, control: Control, replicas: Sequence[Engine], blocks: Sequence[int], report: Callable[[Report], None],
        solver: Asking | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`blocks`: KV blocks of each replica. `solver`: None where nobody migrates."""
        self.control, self.totals = control, Totals()
        self._replicas, self._blocks, self._report = replicas, blocks, report
        self._solver, self._clock = solver, clock
        self._loads = [Load() for _ in replicas]
        self._changes: dict[int, _Change] = {}
        self._asked: tuple[int, Question, float] | None = None
        self._tickets = 0
        self._next_look_s: float | None = None

    # ---- messages

    def handle(self, source: int, message: object) -> None:
        """One message from `HTTP`, `SOLVER` or a replica. Raises NobodyLeftError."""
        match message:
            case Job():
                self._submit(message)
            case Abort(index):
                if (order := self.control.drop(index)) is not None:
                    self._replicas[order.replica].send(message)
            case LoadAdapter() | UnloadAdapter():
                self._change(message)
            case Progress():
                self._progress(source, message)
            case Spent(executed):
                self._spent(executed)
            case Withdrawn(executed):
                self._moved(executed)
            case Done(ticket, error):
                self._done(source, ticket, error)
            case Answer():
                self._answered(message)
            case Ended():
                self._died(source, message)

    def _submit(self, job: Job) -> None:
        if self._next_look_s is None:
            self._next_look_s = self._clock() + self.control.rules.interval_s
        order = self.control.take(job)
        self._replicas[order.replica].send(order.rest())

    def _assign(self, order: Order) -> None:
        """Send a request that has left its replica, or lost it, where it should go."""
        self.control.assign(order, self.control.destination(order))
        self._replicas[order.replica].send(order.rest())

    def _progress(self, source: int, progress: Progress) -> None:
        fresh = []
        for index, token, end in progress.tokens:
            if (order := self.control.orders.get(index)) is None or order.replica != source:
                continue  # its client has gone
            order.tokens.append(token)
            fresh.append((index, token, end))
            if end is not None:
                self.control.finished(order)
        refused = [(index, error) for index, error in progress.refused if self.control.drop(index) is not None]
        self._loads[source] = progress.load
        self.control.reported(source)
        self._report(Progress(self._load(), fresh, refused))

    def _spent(self, executed: Sequence[tuple[int, float]]) -> None:
        for index, seconds in executed:
            if (order := self.control.orders.get(index)) is not None:
                order.executed_s += seconds

    # ---- migration

    def look(self) -> None:
        """Where it is time: is somebody overloaded? and has the solver taken too long?"""
        now_s = self._clock()
        if self._asked is not None and now_s >= self._asked[2]:
            self._asked = None
            self.totals.timeouts += 1  # serving goes on as it was
            assert self._solver is not None
            self._solver.restart()
            self._count()
        if self._next_look_s is None or now_s < self._next_look_s or self._solver is None:
            return
        self._next_look_s = now_s + self.control.rules.interval_s
        if self._solver.ended is not None:
            print(f"dlora: the solver: {self._solver.ended}: another one is started", file=sys.stderr)
            self._solver.restart()
        if self._asked is not None or not self._solver.ready:
            return
        question = self.control.question([load.blocks_used for load in self._loads], self._blocks)
        if question is not None:
            self._tickets += 1
            limit_s = self.control.rules.limit_s
            self._asked = self._tickets, question, now_s + limit_s + GRACE_S
            self._solver.ask(Ask(self._tickets, question.program, limit_s))

    def until_look_s(self) -> float | None:
        """Seconds until `look` has something to do; None while nothing is to come."""
        times = [at for at in (self._next_look_s if self._solver else None, self._asked and self._asked[2]) if at is not None]
        return max(0.0, min(times) - self._clock()) if times else None

    def _answered(self, answer: Answer) -> None:
        if self._asked is None or answer.ticket != self._asked[0]:
            return  # it is ready, or this one took too long
        _, question, due_s = self._asked
        self._asked = None
        self.totals.solves += 1
        self.totals.solver_s += self._clock() - (due_s - GRACE_S - self.control.rules.limit_s)
        if answer.found is None:
            self.totals.timeouts += 1
        else:
            before = [set(hosted) for hosted in self.control.hosts]
            leaving = self.control.answer(question, answer.found)
            self._tell_hosts(before)
            for source, indices in leaving.items():
                self._replicas[source].send(Withdraw(tuple(indices)))
        self._count()

    def _tell_hosts(self, before: Sequence[set[int]]) -> None:
        """Have replicas bring in the adapters that they did not host `before`."""
        names = {number: name for name, number in self.control.numbers.items()}
        for replica, old in enumerate(before):
            if (new := self.control.hosts[replica] - old) and self.control.alive[replica]:
                self._replicas[replica].send(Host(tuple(names[number] for number in sorted(new))))

    def _moved(self, executed: Sequence[tuple[int, float]]) -> None:
        """Requests have left their replica: they go on at another one."""
        self._spent(executed)
        for index, _ in executed:
            if (order := self.control.orders.get(index)) is not None:  # else its client has gone meanwhile
                self._assign(order)
                self.totals.moved += 1
        self._count()

    # ---- faults

    def _died(self, replica: int, ended: Ended) -> None:
        """A replica is gone: its requests go on elsewhere."""
        if not self.control.alive[replica]:
            return
        print(f"{ended.trace}dlora: replica {replica}: {ended.reason}: its requests go on elsewhere", file=sys.stderr)
        self.totals.deaths += 1
        self._loads[replica] = Load()
        before = [set(hosted) for hosted in self.control.hosts]
        orphans = self.control.died(replica)
        if not any(self.control.alive):
            raise NobodyLeftError
        self._tell_hosts(before)
        for order in orphans:
            self._assign(order)
        for ticket in list(self._changes):
            self._settle(ticket, replica)
        self._count()

    # ---- adapters

    def _change(self, command: LoadAdapter | UnloadAdapter) -> None:
        living = {replica for replica, alive in enumerate(self.control.alive) if alive}
        self._changes[command.ticket] = _Change(command, living)
        if isinstance(command, UnloadAdapter):
            self.control.remove(command.name)
        for replica in living:
            self._replicas[replica].send(command)

    def _done(self, replica: int, ticket: int, error: InputError | None) -> None:
        if (change := self._changes.get(ticket)) is None:
            return  # one of ours
        if error is not None:
            change.error = error
        else:
            change.done.append(replica)
        self._settle(ticket, replica)

    def _settle(self, ticket: int, replica: int) -> None:
        """`replica` has done its part of a change, or is gone; where it was the last one, the change is over."""
        change = self._changes[ticket]
        change.waiting.discard(replica)
        if change.waiting:
            return
        del self._changes[ticket]
        name = change.command.name
        if change.error is None and isinstance(change.command, LoadAdapter):
            self._replicas[self.control.add(name)].send(Host((name,)))
        elif change.error is not None and isinstance(change.command, LoadAdapter):
            for other in change.done:
                self._replicas[other].send(UnloadAdapter(OURS, name))
        self._report(Done(ticket, change.error))

    # ---- numbers

    def _count(self) -> None:
        """Have the numbers known, though no replica may have anything to tell."""
        self._report(Progress(self._load()))

    def _load(self) -> Load:
        return together(self._loads, self.control, self.totals)
