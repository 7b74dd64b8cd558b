"""The simulated executor: prices a batch with a hardware cost model, runs nothing."""

from __future__ import annotations

import math

from systems.common.engine.decoding import FOREVER
from systems.common.engine.executor import Batch, DecodeRun
from systems.common.hardware.cost import Chunk, OperatorCosts
from systems.common.models import ModelShape


class IterationCost:
    """Seconds of one engine iteration, composed from operator costs.

    One iteration is `layers` times (token-wise operators + attention + two all-reduces), plus embedding and LM head, plus
    `overhead_s` of host time that the GPU waits for.
    """

    def __init__(self, costs: OperatorCosts, shape: ModelShape, overhead_s: float = 0.0) -> None:
        self.costs = costs
        self.shape = shape
        self.overhead_s = overhead_s
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

    def batch_s(self, batch: Batch) -> float:
        """One iteration of `batch`."""
        chunks = [Chunk(tokens, past) for _, past, tokens in batch.chunks]
        tokens = batch.decodes + sum([chunk.tokens for chunk in chunks])
        attention = self.costs.attention_s(chunks, batch.decodes, batch.decode_context)
        return self.tokenwise_s(tokens) + self.shape.layers * attention + self.head_s(batch.decodes + len(chunks))

    def decode(self, decodes: int, context: int) -> DecodeRun:
        """The coming decode steps of `decodes` sequences holding `context` tokens, while the cost is one straight line."""
        line = self.costs.decode_attention(decodes, context)
        fixed = self.tokenwise_s(decodes) + self.head_s(decodes)
        first = fixed + self.shape.layers * line.at(context)
        steps = FOREVER if line.end == math.inf else max(1, -(-(math.ceil(line.end) - context) // decodes))
        return DecodeRun(first, self.shape.layers * line.slope_s * decodes, steps)


class SimulatedExecutor:
    """Answers how long each batch takes."""

    def __init__(self, cost: IterationCost) -> None:
        self.cost = cost

    def run(self, batch: Batch) -> float:
        """Seconds of one iteration."""
        return self.cost.batch_s(batch)

    def decode_run(self, batch: Batch) -> DecodeRun:
        """The coming decode steps."""
        return self.cost.decode(batch.decodes, batch.decode_context)

    def advanced(self, steps: int) -> None:
        """Nothing to do: no work is under way."""

    def idle(self, now_s: float, until_s: float) -> float:
        """Nothing to do until `until_s`."""
        return until_s
