"""A replica priced by what a GPU measured (`iterations` of benchmarks/dlora_gpu.py), with the engine's ways of switching."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from systems.common.engine.config import EngineConfig
from systems.common.engine.executor import DecodeRun
from systems.common.errors import InputError
from systems.dlora.costs import Iteration, ReplicaCosts
from systems.dlora.formation import Batch
from systems.dlora.policies import Plan, Policy
from systems.dlora.policies.credit import CreditRules
from systems.dlora.replica import Replica
from systems.dlora.slots import Slots


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """A decode iteration of one number of rows in one mode, a plane through what was measured, seconds."""

    base_s: float
    per_context_s: float
    per_adapter_s: float

    def at(self, context: float, adapters: int) -> float:
        """Seconds with `context` tokens in the cache and `adapters` distinct adapters."""
        return self.base_s + self.per_context_s * context + self.per_adapter_s * (adapters - 1)


class MeasuredCosts:
    """Prices of iterations as `iterations` measured them (a `ReplicaCosts`).

    Decode steps: for each number of rows a plane over context and adapters, in between straight lines. Batches with prompts:
    straight lines over tokens, at no rows, one, and the most that were measured; the rows' context and what every further
    prompt adds on top.
    """

    source = "measured"

    def __init__(self, table: Mapping[str, Any], rules: CreditRules, where: str = "iterations", load_s: float = 0.0) -> None:
        """Raises InputError for a table that lacks something."""
        self._rules, self._load_s = rules, load_s
        try:
            self._decode = {merged: _decode_costs(table["decode"], merged) for merged in (True, False)}
            self._extra_s = {merged: _per_prompt_s(table["prompts"], merged) for merged in (True, False)}
            self._prompts = {
                merged: _prompt_costs(table["prompts"], merged, self._decode[merged], self._extra_s[merged])
                for merged in (True, False)
            }
            self.switching_s: float = max(0.0, float(table["changes"]["a_to_b_ms"]) / 1e3)
            self.other_rows_s: float = max(0.0, float(table["changes"]["other_rows_ms"]) / 1e3)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise InputError(where, "iterations", repr(error), "measure it again: benchmarks/dlora_gpu.py") from error

    @property
    def rules(self) -> CreditRules:
        """What the credit policy of the measured run was told."""
        return self._rules

    def decode(self, merged: bool, rows: int) -> DecodeCost:
        """The plane of `rows` rows."""
        known = self._decode[merged]
        return known[min(rows, len(known)) - 1]

    def run(self, iteration: Iteration) -> DecodeRun:
        """See `ReplicaCosts`."""
        rows, tokens = iteration.decodes, sum(iteration.chunks)
        if not tokens:
            cost = self.decode(iteration.merged, rows)
            return DecodeRun(cost.at(iteration.context, iteration.distinct), cost.per_context_s * rows)
        return DecodeRun(self._mixed_s(iteration.merged, rows, iteration.context, tokens, len(iteration.chunks)))

    def _mixed_s(self, merged: bool, rows: int, context: int, tokens: int, prompts: int) -> float:
        lines, further_s = self._prompts[merged], (prompts - 1) * self._extra_s[merged]
        if not rows:
            return _line(lines[0], tokens) + further_s
        many = max(lines)
        low, high = (_line(lines[level], tokens) for level in (1, many))
        between_s = low + (rows - 1) / (many - 1) * (high - low)
        return between_s + self.decode(merged, rows).per_context_s * context + further_s

    def switch_s(self) -> float:
        """A change of the merged adapter: one pass, whatever was merged before."""
        return self.switching_s

    def load_s(self, adapters: int) -> float:
        """Copies of adapters, in full."""
        return adapters * self._load_s

    def swap_s(self, blocks: int) -> float:
        """Never asked for: the measured replica does not swap."""
        return math.inf if blocks else 0.0


def _decode_costs(points: Sequence[Mapping[str, Any]], merged: bool) -> list[DecodeCost]:
    """For 1, 2, ... rows; those not measured lie between their neighbours."""
    mine = [p for p in points if p["merged"] == merged]
    levels = sorted({int(p["rows"]) for p in mine})
    fitted = []
    for rows in levels:
        here = [p for p in mine if p["rows"] == rows]
        columns = [[1.0, p["context"], p["adapters"] - 1.0] for p in here]
        found, *_ = np.linalg.lstsq(np.array(columns), np.array([p["ms"] / 1e3 for p in here]), rcond=None)
        fitted.append([float(found[0]), max(0.0, float(found[1])), max(0.0, float(found[2]))])
    every = range(1, levels[-1] + 1)
    curves = [np.interp(every, levels, [fit[i] for fit in fitted]).tolist() for i in range(3)]
    return [DecodeCost(*values) for values in zip(*curves, strict=True)]


def _per_prompt_s(points: Sequence[Mapping[str, Any]], merged: bool) -> float:
    """What every prompt after the first adds, tokens and rows being equal; seconds, the median."""
    mine = [p for p in points if p["merged"] == merged]
    one = {(p["rows"], p["tokens"]): p["ms"] for p in mine if p["prompts"] == 1}
    more = [p for p in mine if p["prompts"] > 1 and (p["rows"], p["tokens"]) in one]
    found = [(p["ms"] - one[p["rows"], p["tokens"]]) / 1e3 / (p["prompts"] - 1) for p in more]
    return max(0.0, statistics.median(found)) if found else 0.0


def _prompt_costs(
    points: Sequence[Mapping[str, Any]], merged: bool, decode: Sequence[DecodeCost], per_prompt_s: float
) -> dict[int, list[tuple[float, float]]]:
    """(tokens, seconds) of one prompt beside no, one and most rows, without the rows' context; several brought to one."""
    mine = [p for p in points if p["merged"] == merged]
    many = max(p["rows"] for p in mine if p["prompts"] == 1)
    lines: dict[int, dict[float, list[float]]] = {0: {}, 1: {}, many: {}}
    for p in mine:
        if p["rows"] in lines:
            context_s = decode[p["rows"] - 1].per_context_s * p["context"] if p["rows"] else 0.0
            one_s = p["ms"] / 1e3 - context_s - (p["prompts"] - 1) * per_prompt_s
            lines[p["rows"]].setdefault(p["tokens"], []).append(one_s)
    return {rows: [(tokens, statistics.fmean(line[tokens])) for tokens in sorted(line)] for rows, line in lines.items()}


def _line(points: Sequence[tuple[float, float]], at: float) -> float:
    """Straight between points, and on beyond the last two."""
    xs, ys = zip(*points, strict=True)
    if at > xs[-1]:
        return float(ys[-1] + (at - xs[-1]) * (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))
    return float(np.interp(at, xs, ys))


class MeasuredReplica(Replica):
    """The simulated replica with the engine's ways of changing modes: a copy of the weights holds what was merged last.

    Merging it again and unmerging cost nothing, a -> b is one pass; other rows than in the step before cost an upload.
    """

    def __init__(self, config: EngineConfig, policy: Policy, costs: MeasuredCosts, slots: Slots, index: int = 0) -> None:
        super().__init__(index, config, policy, costs, slots)
        self._measured, self._held = costs, -1
        self._rows: tuple[int, ...] = ()

    def _prepare(self, plan: Plan, batch: Batch, adapters: list[int]) -> float:
        loads = self.slots.take(adapters, self.queue.outstanding)
        load_s = self.costs.load_s(len(loads)) if loads else 0.0
        self.loading_s += load_s
        rows, before = tuple([s.index for s in batch.decodes]), self._rows
        self._rows = rows
        if plan.merged is not None and plan.merged != self._held:
            self._held = plan.merged
            self.switches += 1
            self.switching_s += self._measured.switching_s
            return load_s + self._measured.switching_s
        return load_s + (self._measured.other_rows_s if rows != before and not batch.prefills else 0.0)


_: Callable[[MeasuredCosts], ReplicaCosts] = lambda costs: costs  # noqa: E731  it is one
