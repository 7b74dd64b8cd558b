"""Tuning alone in a process of its own, as torchtune is beside vLLM: its own copy of the weights, no suspending."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from systems.common.errors import InputError
from systems.llmstation.corun.lanes import lanes_of
from systems.llmstation.corun.session import Wanted, make_trainer, samples, weights_of
from systems.llmstation.corun.tuner import Tuner


@dataclass(slots=True)
class TuningOnly:
    """A tuning job that runs whenever it is asked to."""

    wanted: Wanted
    tuner: Tuner
    notes: tuple[str, ...]

    @classmethod
    def start(cls, wanted: Wanted) -> TuningOnly:
        """Weights (kept from job to job) and trainer, two samples done.

        Raises:
            InputError: no such device.
        """
        if wanted.device == "cuda" and not torch.cuda.is_available():
            raise InputError("llmstation", "hardware", "cuda", "no GPU here: measure on a GPU host, or use hardware=cpux1")
        shape = wanted.shape
        trainer = make_trainer(shape, weights_of(shape, wanted.device), wanted)
        tokens = wanted.tuning_tokens
        plan = trainer.plan(1, tokens)
        tuner = Tuner(trainer, samples(shape, tokens, 0, wanted.device), plan, lanes_of(torch.device(wanted.device)))
        job = cls(wanted, tuner, _seen(wanted.device))
        for _ in range(2 * len(plan)):
            job.advance()
        tuner.drain()
        return job

    def advance(self) -> None:
        """Launch one tasklet as soon as there is room for it."""
        self.tuner.wait_for_room()
        self.tuner.launch()
        self.tuner.log.clear()


def _seen(device: str) -> tuple[str, ...]:
    """How many SMs this process sees: under an MPS thread percentage, fewer than the GPU has."""
    if device != "cuda":
        return ()
    return (f"tuning process: {torch.cuda.get_device_properties(0).multi_processor_count} SMs",)
