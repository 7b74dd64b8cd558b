"""Everything of a step but its attention, from whole steps that were timed.

Kernel times alone leave out the gaps between kernels, what one kernel leaves in the caches for the next, and small kernels
that nobody listed. So whole steps are timed at the sizes that the engine runs, less the attention that the table knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from systems.common.hardware.cost import Chunk
from systems.common.hardware.curve import Curve, neighbours
from systems.common.hardware.tables import AttentionPoint

Attention = Callable[[Sequence[Chunk], int, int], float]


class StepRest:
    """Seconds of a step less its attention, by decoding rows and prompt tokens."""

    def __init__(self, steps: Mapping[AttentionPoint, float], layers: int, attention_s: Attention) -> None:
        """Split `steps` (chunk, past, decodes, context of each) by what `attention_s` says of one layer."""
        decode: dict[int, float] = {}
        mixed: dict[int, dict[int, float]] = {}
        for (chunk, past, rows, context), step_s in steps.items():
            rest_s = step_s - layers * attention_s([Chunk(chunk, past)] if chunk else [], rows, rows * context)
            if chunk:
                mixed.setdefault(rows, {})[chunk] = rest_s
            else:
                decode[rows] = rest_s
        self._decode = Curve.of(decode.items())
        self._rows = tuple(sorted(mixed))
        self._mixed = [Curve.of(mixed[rows].items()) for rows in self._rows]
        self._known: dict[tuple[int, int], float] = {}

    def __call__(self, rows: int, tokens: int) -> float:
        """Seconds for `rows` decoding sequences and `tokens` prompt tokens in all, both as the engine pads them."""
        if (known := self._known.get((rows, tokens))) is None:
            known = self._known[rows, tokens] = self._at(rows, tokens)
        return known

    def _at(self, rows: int, tokens: int) -> float:
        if not tokens:
            return self._decode.at(rows)
        return sum(weight * self._mixed[i].at(tokens) for i, weight in neighbours(self._rows, rows))
