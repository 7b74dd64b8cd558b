"""From the sequences of an engine to the columns that metrics are computed on."""

from __future__ import annotations

from collections.abc import Sequence as List

import numpy as np

from systems.common.engine.engine import Engine
from systems.common.engine.sequence import Sequence
from systems.common.metrics import CUT, FINISHED, Records


def to_records(sequences: List[Sequence], engine: Engine | None = None) -> Records:
    """The records of `sequences`, in their order; with the times of all output tokens when their `engine` is given."""
    finish_s = np.array([s.finish_s for s in sequences], dtype=np.float64)
    done = ~np.isnan(finish_s)
    adapters = tuple(s.request.adapter for s in sequences)
    tokens, ends = _tokens(sequences, engine) if engine is not None else (np.empty(0), np.empty(0, dtype=np.int64))
    return Records(
        arrival_s=np.array([s.arrival_s for s in sequences], dtype=np.float64),
        scheduled_s=np.array([s.scheduled_s for s in sequences], dtype=np.float64),
        first_token_s=np.array([s.first_token_s for s in sequences], dtype=np.float64),
        finish_s=finish_s,
        input_tokens=np.array([s.request.input_tokens for s in sequences], dtype=np.int64),
        output_tokens=np.array([s.output_tokens for s in sequences], dtype=np.int64),
        preemptions=np.array([s.preemptions for s in sequences], dtype=np.int64),
        status=np.where(done, FINISHED, CUT).astype(np.int8),
        token_s=tokens,
        token_ends=ends,
        adapters=adapters if any(adapters) else (),
    )


def _tokens(sequences: List[Sequence], engine: Engine) -> tuple[np.ndarray, np.ndarray]:
    """Token times of all finished sequences, one after another, and where each one's end."""
    done = [s for s in sequences if s.finish_s == s.finish_s]
    times = engine.token_times_s(done)
    counts = np.array([s.output_tokens if s.finish_s == s.finish_s else 0 for s in sequences], dtype=np.int64)
    return (np.concatenate(times) if times else np.empty(0)), np.cumsum(counts)
