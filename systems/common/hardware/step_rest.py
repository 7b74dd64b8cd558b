"""Everything of a step but its attention, from whole steps that were timed.

Kernel times alone leave out the gaps between kernels, what one kernel leaves in the caches for the next, and small kernels
that nobody listed. So whole steps are timed at the sizes that the engine runs, less the attention that the table knows.

Three kinds of step: decode steps, by rows; steps with prompts that have a CUDA graph, at the graph's own sizes (rows, tokens);
larger ones, launched kernel by kernel. In the last kind nothing but attention tells a decoding row from a prompt's token: they
lie on one curve over all tokens of the step. Beyond the largest that was measured they go on in proportion to their tokens, as
steps bound by arithmetic do: a slope through noisy points would not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from systems.common.engine.padding import Padding
from systems.common.hardware.cost import Chunk
from systems.common.hardware.curve import Curve, neighbours
from systems.common.hardware.tables import AttentionPoint

Attention = Callable[[Sequence[Chunk], int, int], float]
NO_GRAPHS = Padding()


class StepRest:
    """Seconds of a step less its attention, by decoding rows and prompt tokens."""

    def __init__(
        self,
        steps: Mapping[AttentionPoint, float],
        layers: int,
        attention_s: Attention,
        padding: Padding = NO_GRAPHS,
    ) -> None:
        """Split `steps` (chunk, past, decodes, context of each) by what `attention_s` says of one layer.

        `padding` says which of them ran as graphs.
        """
        decode: dict[int, float] = {}
        graphs: dict[int, dict[int, float]] = {}
        eager: list[tuple[float, float]] = []
        for (chunk, past, rows, context), step_s in steps.items():
            rest_s = step_s - layers * attention_s([Chunk(chunk, past)] if chunk else [], rows, rows * context)
            if not chunk:
                decode[rows] = rest_s
            elif padding.is_graph(rows, chunk):
                graphs.setdefault(rows, {})[chunk] = rest_s
            else:
                eager.append((rows + chunk, rest_s))
        self._padding = padding
        self._decode = Curve.of(decode.items())
        self._rows = tuple(sorted(graphs))
        self._graphs = [Curve.of(graphs[rows].items()) for rows in self._rows]
        self._eager = Curve.of(eager) if eager else None
        most = max((tokens for tokens, _ in eager), default=0)
        self._token_s = fmean(rest_s / tokens for tokens, rest_s in eager if tokens >= most / 2) if eager else 0.0
        self._known: dict[tuple[int, int], float] = {}

    def __call__(self, rows: int, tokens: int) -> float:
        """Seconds for `rows` decoding sequences and `tokens` prompt tokens in all, both as the engine pads them."""
        if (known := self._known.get((rows, tokens))) is None:
            known = self._known[rows, tokens] = self._at(rows, tokens)
        return known

    def _at(self, rows: int, tokens: int) -> float:
        if not tokens:
            return self._decode.at(rows)
        total, eager = rows + tokens, self._eager
        graphed = self._graphs and (eager is None or self._padding.is_graph(rows, tokens) or total < eager.xs[0])
        if eager is not None and not graphed:
            within = min(total, eager.xs[-1])
            return max(eager.at(within), self._token_s * total if within < total else 0.0)
        return sum(weight * self._graphs[i].at(tokens) for i, weight in neighbours(self._rows, rows))
