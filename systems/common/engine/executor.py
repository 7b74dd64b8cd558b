"""What the engine asks of whoever runs its batches.

The simulated executor answers with a duration, the PyTorch one runs the model and answers with what it took. A
system that co-runs tuning with serving wraps one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from systems.common.engine.decoding import FOREVER
from systems.common.engine.sequence import Sequence


@dataclass(slots=True)
class Batch:
    """One iteration: prefill chunks, and whether the decoding sequences run beside them.

    Attributes:
        chunks: per prefill chunk, the sequence, tokens already in its KV cache, and new tokens.
        decodes: decoding sequences in the batch (all of them or 0).
        decode_context: tokens that those hold in the KV cache before the step.
    """

    chunks: list[tuple[Sequence, int, int]] = field(default_factory=list)
    decodes: int = 0
    decode_context: int = 0


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Decode-only steps whose durations form an arithmetic progression from `first_s` in steps of `increment_s`.

    A step's duration grows with the context it reads, and the context grows by the batch size each step, so wherever the
    cost is a straight line in the context the steps can be added up in closed form. `steps` says how far that holds.
    """

    first_s: float
    increment_s: float = 0.0
    steps: int = FOREVER

    def duration_s(self, steps: int) -> float:
        """Seconds that the first `steps` steps take."""
        return steps * self.first_s + self.increment_s * (steps * (steps - 1) // 2)

    def steps_until(self, seconds: float) -> int:
        """Fewest steps, at least one, that take `seconds` or longer."""
        first, increment = self.first_s, self.increment_s
        if increment * seconds < 1e-9 * first * first:  # as good as constant
            steps = seconds / first if first > 0 else 1.0
        else:  # increment/2 k^2 + (first - increment/2) k = seconds
            half = first - increment / 2
            steps = (-half + (half * half + 2 * increment * seconds) ** 0.5) / increment
        guess = max(1, int(steps) - 1)
        while self.duration_s(guess) < seconds:
            guess += 1
        while guess > 1 and self.duration_s(guess - 1) >= seconds:
            guess -= 1
        return guess


class Executor(Protocol):
    """Runs batches, or prices them."""

    def run(self, batch: Batch) -> float:
        """Run one iteration that has prefill chunks; seconds it took."""
        ...

    def decode_run(self, batch: Batch) -> DecodeRun:
        """Price the coming decode-only steps. A real executor runs one step and returns that."""
        ...

    def advanced(self, steps: int) -> None:
        """The engine took `steps` steps of the last `decode_run`."""
        ...

    def idle(self, now_s: float, until_s: float) -> float:
        """Nothing to serve from `now_s` until `until_s`; when the engine may start again (never before `until_s`)."""
        ...
