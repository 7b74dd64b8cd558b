"""The simulated executor: prices a batch with a hardware cost model, runs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

from systems.common.engine.decoding import FOREVER
from systems.common.engine.executor import Batch, DecodeRun
from systems.common.engine.padding import Padding
from systems.common.hardware.cost import Chunk, OperatorCosts
from systems.common.models import ModelShape

NO_PADDING = Padding()


class IterationCost:
    """Seconds of one engine iteration, composed from operator costs.

    One iteration is `layers` times (token-wise operators + attention + two all-reduces), plus embedding and LM head, plus
    `overhead_s` of host time that the GPU waits for. All but attention computes what `padding` makes of a batch, and comes from
    `rest_s` (decoding rows, prompt tokens) where whole steps have been measured.
    """

    def __init__(
        self,
        costs: OperatorCosts,
        shape: ModelShape,
        overhead_s: float = 0.0,
        padding: Padding = NO_PADDING,
        rest_s: Callable[[int, int], float] | None = None,
    ) -> None:
        self.costs = costs
        self.shape = shape
        self.overhead_s = overhead_s
        self.padding = padding
        self._measured_rest_s = rest_s
        self._all_reduce_bytes = int(shape.hidden * shape.dtype_bytes)
        self._by_tokens: dict[int, float] = {}
        self._by_sequences: dict[int, float] = {}

    def tokenwise_s(self, tokens: int) -> float:
        """Everything that depends only on the number of tokens in the batch, over all layers."""
        if (known := self._by_tokens.get(tokens)) is None:
            layer = self.costs.layer_linear_s(tokens) + 2 * self.costs.all_reduce_s(tokens * self._all_reduce_bytes)
            known = self.shape.layers * layer + self.costs.embedding_s(tokens) + self.overhead_s
            self._by_tokens[tokens] = known
        return known

    def head_s(self, sequences: int) -> float:
        """LM head and sampling for `sequences` rows."""
        if (known := self._by_sequences.get(sequences)) is None:
            known = self._by_sequences[sequences] = self.costs.head_s(sequences)
        return known

    def rest_s(self, rows: int, tokens: int, heads: int) -> float:
        """All but attention of a step of `rows` decoding sequences, `tokens` prompt tokens and `heads` rows of logits."""
        if self._measured_rest_s is not None:
            return self._measured_rest_s(rows, tokens) + self.overhead_s
        return self.tokenwise_s(rows + tokens) + self.head_s(heads)

    def batch_s(self, batch: Batch) -> float:
        """One iteration of `batch`."""
        chunks = [Chunk(tokens, past) for _, past, tokens in batch.chunks]
        rows, tokens, heads = self.padding.mixed(batch.decodes, sum([chunk.tokens for chunk in chunks]), len(chunks))
        attention = self.costs.attention_s(chunks, batch.decodes, batch.decode_context)
        return self.rest_s(rows, tokens, heads) + self.shape.layers * attention

    def decode(self, decodes: int, context: int) -> DecodeRun:
        """The coming decode steps of `decodes` sequences holding `context` tokens, while the cost is one straight line."""
        line = self.costs.decode_attention(decodes, context)
        rows = self.padding.decode_rows(decodes)
        fixed = self.rest_s(rows, 0, rows)
        first = fixed + self.shape.layers * line.at(context)
        steps = FOREVER if line.end == math.inf else max(1, -(-(math.ceil(line.end) - context) // decodes))
        return DecodeRun(first, self.shape.layers * line.slope_s * decodes, steps)


class SimulatedExecutor:
    """Answers how long each batch takes.

    With `launches_ahead` it is a `LaunchAhead` as `torch_engine` is one: a batch after a decode step is formed `decode_lead_s`
    before that step ends, one after a step with prompts when that step begins. `serve` must be told (`ahead=`).
    """

    def __init__(self, cost: IterationCost, decode_lead_s: float = 0.0, launches_ahead: bool = False) -> None:
        self.cost = cost
        self.decode_lead_s, self.launches_ahead = decode_lead_s, launches_ahead
        self._lead_s = 0.0

    def lead_s(self) -> float:
        """See `LaunchAhead`."""
        return self._lead_s

    def run(self, batch: Batch) -> float:
        """Seconds of one iteration."""
        took_s = self.cost.batch_s(batch)
        if self.launches_ahead:
            self._lead_s = took_s
        return took_s

    def decode_run(self, batch: Batch) -> DecodeRun:
        """The coming decode steps."""
        run = self.cost.decode(batch.decodes, batch.decode_context)
        if self.launches_ahead:
            self._lead_s = min(self.decode_lead_s, run.first_s)
        return run

    def advanced(self, steps: int) -> None:
        """Nothing to do: no work is under way."""

    def idle(self, now_s: float, until_s: float) -> float:
        """Nothing to do until `until_s`."""
        return until_s
