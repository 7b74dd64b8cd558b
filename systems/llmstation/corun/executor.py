"""`TorchExecutor` with tuning beside its steps: the same batches, kernels and tokens, and tasklets on the other lane."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from systems.common.engine.engine import Engine
from systems.common.engine.executor import Batch, DecodeRun
from systems.common.torch_engine.device import DeviceHalf
from systems.common.torch_engine.executor import TorchExecutor
from systems.common.torch_engine.flights import Flight, Flights
from systems.llmstation.corun.beside import Beside
from systems.llmstation.corun.fusing import FusingHalf
from systems.llmstation.corun.observed import Place
from systems.llmstation.simulated import bucket


class Awaited(Flights):
    """Flights that know for how long the host has waited for the next one already, launching tasklets meanwhile.

    Without it every step would seem to have ended before the host came for it, and no launch would be put off any more: steps
    would be launched as soon as those before them begin, and tasklets find no step under way that is theirs.
    """

    awaited_s = 0.0

    def _note(self, flight: Flight, began: float) -> None:
        super()._note(flight, began - self.awaited_s)
        self.awaited_s = 0.0


class CoRunExecutor(TorchExecutor):
    """See the module. `beside` is set before serving starts."""

    beside: Beside
    _before = 0

    def may_fuse(self) -> None:
        """Ask `beside` before every decode step whether it is a fused one."""
        if not isinstance(self.half, FusingHalf):
            self.half = cast(DeviceHalf, FusingHalf(self.half, self._fused))

    def _fused(self, rows: int) -> Tensor | None:
        """The tokens of a fused step, if one is planned."""
        self.model.adapted = False
        return self.beside.fused(rows)

    @property
    def engine(self) -> Engine:
        """The engine that is served."""
        assert self._engine is not None
        return self._engine

    def run(self, batch: Batch) -> float:
        """One iteration that has prefill chunks; no tasklet is planned for it."""
        self._begin_step(None)
        return float(super().run(batch))

    def decode_run(self, batch: Batch) -> DecodeRun:
        """One decode step, with what the pace allows beside it."""
        rows = self.steps.size(batch.decodes)
        self._begin_step(Place(rows, bucket(rows, batch.decode_context)))
        return super().decode_run(batch)

    def _begin_step(self, place: Place | None) -> None:
        self._before = self._launches()
        self.beside.begin(place)

    def _launches(self) -> int:
        """Steps launched so far."""
        return len(self.flights._flying) + len(self.flights.ended_s)

    def _settle(self, keep: int) -> None:
        """Wait as ever, but launch tasklets meanwhile."""
        if self._launches() > self._before:  # else a preempted sequence asks for its tokens before the step is launched
            self._before = self._launches()
            self.beside.launched()
        flying = self.flights._flying
        if (place := len(flying) - keep - 1) >= 0 and (event := flying[place].event) is not None:
            began_s = self.clock()
            self.beside.wait(lambda: not event.query())
            if isinstance(self.flights, Awaited):
                self.flights.awaited_s = self.clock() - began_s
        super()._settle(keep)
        self.beside.harvest()

    def release_ended(self) -> None:
        """Take back what ended sequences held."""
        self.drain()
        self._reconcile()

    def renew(self, engine: Engine) -> None:
        """Serve another, idle engine of the same limits; the one before must have nothing left to run."""
        if self._engine is not None:
            self.release_ended()
        assert not self._slots, "sequences of the engine before still hold slots"
        self._finished = self._preemptions = 0
        self._before = 0
        self.flights = Awaited(self.clock)
        for kept in (self.outputs, self._prompts, self._samplings, self._over, self._stopped):
            kept.clear()
        self._stale = True
        self.attach(engine)
