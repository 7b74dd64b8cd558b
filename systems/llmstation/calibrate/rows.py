"""Rows of `corun.csv`: from seconds alone and together to slowdowns. Pure."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from systems.common.hardware.interference import STREAMS
from systems.common.hardware.interference_table import COLUMNS, IDLE, WAY
from systems.llmstation.corun.observed import Step, co_run

PURE = 3
"""So many steps beside one phase of tuning alone are enough to go by; of fewer, those beside several phases count too."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line; slowdowns are against running alone and unlimited, and never below 1."""

    serving_phase: str
    tuning_phase: str
    serving_size: int
    tuning_tokens: int
    sm_limit: float
    serving_slowdown: float
    tuning_slowdown: float
    way: str = STREAMS

    def cells(self) -> dict[str, object]:
        """By column."""
        numbers = {"serving_slowdown": max(1.0, self.serving_slowdown), "tuning_slowdown": max(1.0, self.tuning_slowdown)}
        told = {name: getattr(self, name) for name in (*COLUMNS, WAY)} | numbers
        return {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in told.items()}


def text(rows: Iterable[Row]) -> str:
    """The file."""
    out = io.StringIO()
    writer = csv.DictWriter(out, (*COLUMNS, WAY), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.cells() for row in rows)
    return out.getvalue()


def of_steps(
    serving: tuple[str, int], alone_s: float, steps: Sequence[Step], tasklet_s: Mapping[str, float], tokens: int, layers: int,
    limit: float = 1.0, way: str = STREAMS,
) -> list[Row]:  # fmt: skip
    """A row per tuning phase from steps that tuning ran beside.

    Args:
        serving: phase and size.
        alone_s: such a step alone.
        steps: the steps; those with no tasklet beside say nothing.
        tasklet_s: a tasklet of each phase, alone and unlimited.
        tokens: of a tuning sample.
        layers: of the model.
        limit: share of the SMs left to tuning.
        way: how the two share the GPU.
    """
    rows = []
    for phase, tasklet_alone_s in tasklet_s.items():
        having = [step for step in steps if step.overlap_s > 0 and phase in step.tasklets_s]
        pure = [step for step in having if len(step.tasklets_s) == 1]
        mine = pure if len(pure) >= PURE else having
        if not mine:
            continue
        seen = [co_run(alone_s, s.took_s, min(s.overlap_s, s.took_s), tasklet_alone_s, layers) for s in mine]
        slow = statistics.median(one.decode_s / one.decode_alone_s for one in seen)
        beside_s = statistics.median(took_s for step in mine for took_s in step.tasklets_s[phase])
        rows.append(Row(serving[0], phase, serving[1], tokens, limit, slow, beside_s / tasklet_alone_s, way))
    return rows


def of_limit(tasklet_s: Mapping[str, float], limited_s: Mapping[str, float], tokens: int, limit: float, way: str) -> list[Row]:
    """Rows that say what a limit alone does to tuning."""
    shared = [phase for phase in tasklet_s if phase in limited_s]
    return [Row(IDLE, phase, 0, tokens, limit, 1.0, limited_s[phase] / tasklet_s[phase], way) for phase in shared]


def of_means(
    serving: tuple[str, int], alone_s: float, shared_s: float, tasklet_s: Mapping[str, float], beside_s: Mapping[str, float],
    tokens: int, limit: float, way: str,
) -> list[Row]:  # fmt: skip
    """Rows from means over whole samples: two processes do not know which of the other's tasklets ran beside what.

    So both phases have the same slowdown of serving.
    """
    shared = [phase for phase in tasklet_s if phase in beside_s]
    return [
        Row(serving[0], phase, serving[1], tokens, limit, shared_s / alone_s, beside_s[phase] / tasklet_s[phase], way)
        for phase in shared
    ]
