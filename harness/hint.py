"""Simulate to choose, measure to confirm: a measured search begins where the simulator's search ended (design.md, 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from harness.search import Answer, Probe, SearchRules, SearchSpace, search


@dataclass(frozen=True, slots=True)
class Hint:
    """What the simulator found at one point: its knobs, if any met the limits.

    `probes` is how many a search as coarse as the measured one takes from nothing.
    """

    knobs: Mapping[str, float] | None
    probes: int

    def on(self, space: SearchSpace) -> SearchSpace:
        """`space` with every knob's `start` where the simulator's search ended; as it is where that found nothing."""
        if self.knobs is None:
            return space
        knobs = {name: knob.model_copy(update={"start": self.knobs[name]}) for name, knob in space.knobs.items()}
        return space.model_copy(update={"knobs": knobs})


def hint(space: SearchSpace, fine: SearchRules, ask: Callable[[Probe], Answer]) -> Hint:
    """Search `space` by `ask`, which simulates: by the rules `fine` for where the answer is, by its own for their number.

    One seed a setting: what is simulated is the very workload that will be measured, whose noise both share.
    """
    finer = {"tolerance": fine.tolerance, "repeats": 1, "budget": fine.budget}
    verdict, _ = search(space.model_copy(update=finer), ask)
    _, answers = search(space.model_copy(update={"budget": fine.budget}), ask)
    return Hint(verdict.knobs, len(answers))


def saved(hints: Mapping[str, Hint], probes: Mapping[str, int], measured_s: float) -> str:
    """What a figure says of it: probes and seconds spent measuring, and those that a search from nothing would have added.

    How many that would have been is taken from the simulator's own search, which began from nothing.
    """
    count = sum(probes.values())
    fewer = sum(max(0, found.probes - probes[point]) for point, found in hints.items() if point in probes)
    mean_s = measured_s / count if count else 0.0
    spent = f"{count} probes measured in {measured_s / 60:.1f} min"
    return f"{spent}, {fewer} fewer ({fewer * mean_s / 60:.1f} min) than without the simulator's choice" if fewer else spent
