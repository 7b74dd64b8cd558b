"""Token counts of requests: how long prompts and answers are.

A `Lengths` is a pair of columns. It is made from a rule (`fixed`, `uniform`, `lognormal`) or sampled from a table
(`sample`), whose rows stay together: a long prompt keeps its own answer. A table may be filtered (`keep`) and stretched
to given means (`scale_to_mean`) first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from systems.common.errors import InputError

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Caps:
    """Which lengths a serving engine admits, in tokens, bounds included."""

    min_input_tokens: int = 1
    min_output_tokens: int = 1
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None

    @property
    def longest_input(self) -> int | None:
        """The longest prompt that leaves room for the shortest answer."""
        room = None if self.max_total_tokens is None else self.max_total_tokens - self.min_output_tokens
        return min((limit for limit in (self.max_input_tokens, room) if limit is not None), default=None)


VLLM_SHAREGPT = Caps(min_input_tokens=4, min_output_tokens=4, max_input_tokens=1024, max_total_tokens=2048)
"""vLLM's benchmark client (0.6.3, `sample_sharegpt_requests`): prompt >= 4, answer >= 4, prompt <= 1024, sum <= 2048."""

FILTERS: dict[str, Caps] = {"none": Caps(), "vllm-sharegpt": VLLM_SHAREGPT}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and answer lengths in tokens; entry i of both arrays belongs to request (or table row) i."""

    input_tokens: IntArray
    output_tokens: IntArray

    def __post_init__(self) -> None:
        assert len(self.input_tokens) == len(self.output_tokens)

    def __len__(self) -> int:
        return len(self.input_tokens)

    def take(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Lengths:
        """The chosen `rows` (indices or a mask)."""
        return Lengths(self.input_tokens[rows], self.output_tokens[rows])


def fixed(count: int, input_tokens: int, output_tokens: int) -> Lengths:
    """`count` requests of one size."""
    return Lengths(
        np.full(count, _whole("input_tokens", input_tokens), dtype=np.int64),
        np.full(count, _whole("output_tokens", output_tokens), dtype=np.int64),
    )


def uniform(rng: np.random.Generator, count: int, input_range: tuple[int, int], output_range: tuple[int, int]) -> Lengths:
    """Both lengths uniform and independent; a range is (least, most), both included."""
    columns = []
    for name, (low, high) in (("input_tokens", input_range), ("output_tokens", output_range)):
        if _whole(name, low) > high:
            raise InputError("workload", name, [low, high], "give the least first, then the most")
        columns.append(rng.integers(low, high, size=count, endpoint=True))
    return Lengths(*columns)


def lognormal(rng: np.random.Generator, count: int, mean_tokens: float, p50_tokens: float, most: int | None = None) -> IntArray:
    """One column of log-normal lengths with the given mean and median, at least 1 and (if given) at most `most` tokens.

    The median fixes mu = ln(p50) and the mean then sigma^2 = 2 ln(mean / p50). Cutting at `most` lowers the mean.

    Raises InputError unless 0 < median <= mean.
    """
    if not (math.isfinite(mean_tokens) and 0 < p50_tokens <= mean_tokens):
        raise InputError(
            "workload", "p50_tokens", p50_tokens, f"a log-normal's median is above 0 and not above its mean ({mean_tokens:g})"
        )
    sigma = math.sqrt(2 * math.log(mean_tokens / p50_tokens))
    drawn = np.rint(np.exp(math.log(p50_tokens) + sigma * rng.standard_normal(count)))
    return np.clip(drawn, 1, most).astype(np.int64)


def keep(table: Lengths, caps: Caps) -> Lengths:
    """The rows of `table` that `caps` admits, as vLLM's client drops the others.

    Raises InputError when none is left.
    """
    mask = (table.input_tokens >= caps.min_input_tokens) & (table.output_tokens >= caps.min_output_tokens)
    if caps.max_input_tokens is not None:
        mask &= table.input_tokens <= caps.max_input_tokens
    if caps.max_total_tokens is not None:
        mask &= table.input_tokens + table.output_tokens <= caps.max_total_tokens
    if not mask.any():
        raise InputError("workload", "lengths_filter", repr(caps), "no row of the table passes: use a wider filter")
    return table.take(mask)


def sample(table: Lengths, rng: np.random.Generator, count: int, replacement: bool = False) -> Lengths:
    """`count` rows of `table` in random order.

    Without replacement every row comes once before any comes again: for up to the table's length that is a shuffle's
    beginning (as vLLM's client samples), beyond it further shuffles follow.
    """
    assert len(table), "sample of an empty table"
    if replacement:
        return table.take(rng.integers(0, len(table), size=count))
    passes = -(-count // len(table)) if count else 1
    return table.take(np.concatenate([rng.permutation(len(table)) for _ in range(passes)])[:count])


def scale_to_mean(
    table: Lengths, input_mean: float | None = None, output_mean: float | None = None, caps: Caps = VLLM_SHAREGPT
) -> Lengths:
    """All prompts times one factor and all answers times another, such that the table's means become those given.

    Lengths are rounded, and the bounds of `caps` still hold afterwards: too short ones are raised to the minimum, too
    long prompts cut to the maximum, answers cut where the sum is too large. The factors are found with that in
    force, so the means of the result are right and not those of the uncut product.

    Raises InputError when the caps put a mean out of reach.
    """
    inputs, outputs = table.input_tokens, table.output_tokens
    if input_mean is not None:
        inputs = _stretch("mean_input_tokens", inputs, input_mean, caps.min_input_tokens, caps.longest_input)
    if output_mean is not None or input_mean is not None:
        room = None if caps.max_total_tokens is None else caps.max_total_tokens - inputs
        if output_mean is not None:
            outputs = _stretch("mean_output_tokens", outputs, output_mean, caps.min_output_tokens, room)
        elif room is not None:
            outputs = np.minimum(outputs, room)
    return Lengths(inputs, outputs)


def _stretch(key: str, values: IntArray, mean: float, least: int, most: int | IntArray | None) -> IntArray:
    """`values` times a factor, rounded and kept within [least, most], such that their mean is `mean`; by bisection."""

    def stretched(factor: float) -> IntArray:
        scaled: IntArray = np.clip(np.rint(values * factor), least, most).astype(np.int64)
        return scaled

    if not (math.isfinite(mean) and mean > 0):
        raise InputError("workload", key, mean, "give a finite number above 0")
    low, high = 0.0, 2 * mean / float(values.mean())
    for _ in range(20):
        if stretched(high).mean() >= mean:
            break
        high *= 2
    if not stretched(low).mean() <= mean <= stretched(high).mean():
        raise InputError("workload", key, mean, "out of reach within the length limits: choose another mean or other limits")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if stretched(middle).mean() < mean else (low, middle)
    # Whole tokens jump where rows round together, so the mean is met to half a token: take the nearer side of the jump.
    return min(stretched(low), stretched(high), key=lambda column: abs(float(column.mean()) - mean))


def _whole(key: str, value: int) -> int:
    if value != int(value) or value < 1:
        raise InputError("workload", key, value, "give a whole number of tokens, at least 1")
    return int(value)
