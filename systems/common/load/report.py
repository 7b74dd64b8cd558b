"""The short table that a run ends with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ROWS: tuple[tuple[str, str], ...] = (
    ("TTFT", "ttft"),
    ("TTFT from send", "ttft_from_send"),
    ("TPOT", "tpot"),
    ("ITL", "itl"),
    ("E2E", "e2e"),
)


def shown(summary: Mapping[str, Any]) -> str:
    """`summary` as `results.metrics` made it, for people."""
    table = summary["metrics"]
    lines = [_counts(summary), *(f"{kind}: {said}" for kind, said in sorted(summary["error_examples"].items()) if said)]
    lines.append(f"{'':16}" + "".join(f"{of:>10}" for of in ("mean", "p50", "p90", "p99")))
    for label, name in ROWS:
        values = [table.get(f"{name}_{of}_s", math.nan) for of in ("mean", "p50", "p90", "p99")]
        lines.append(f"{label + ' (ms)':16}" + "".join(f"{1e3 * value:10.2f}" for value in values))
    lines.append(
        f"{table['requests_per_s']:.3f} requests/s, {table['output_tokens_per_s']:.1f} output tokens/s"
        f" in {table['duration_s']:.1f} s"
    )
    if "slo" in summary:
        lines.append(
            f"{summary['slo']['name']}: attainment {table['attainment']:.4f}, goodput {table['goodput_rps']:.3f} requests/s"
        )
    lines.append(_lag(summary))
    lines += [f"NOT ACCURATE: {reason}" for reason in summary["inaccurate_because"]]
    return "\n".join(lines)


def _counts(summary: Mapping[str, Any]) -> str:
    table = summary["metrics"]
    text = f"{table['finished']:g} finished, {table['failed']:g} failed, {table['cut']:g} cut off"
    if summary["unsent"]:
        text += f", {summary['unsent']} not sent"
    if summary["errors"]:
        text += " (" + ", ".join(f"{count} {kind}" for kind, count in summary["errors"].items()) + ")"
    return text


def _lag(summary: Mapping[str, Any]) -> str:
    table, client = summary["metrics"], summary["client"]
    parts = [f"{of} {1e3 * table[f'schedule_lag_{of}_s']:.2f}" for of in ("p50", "p99", "max")]
    return f"client's lag (ms): {', '.join(parts)}; it used {100 * client['cpu_share']:.0f} % of a core"
