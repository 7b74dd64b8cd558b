"""Draws how far simulations are from measurements: `python -m harness.fidelity --table table.csv --out fidelity.pdf`.

The table is what `python -m systems.common.fidelity_table` writes, or `python -m systems.llmstation.colocation_fidelity` (with
`--colocated`); `snakemake fidelity` makes all.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import cli
from harness.leftovers import sweep
from systems.registry import InputError

SERIES = {"calibrated": "calibrated", "roofline": "roofline"}
METRICS = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"}
COLOCATED = {"ttft": "TTFT", "tpot": "TPOT", "peft": "samples/s"}


def plot_of(gpu: str, series: Sequence[str], colocated: bool = False) -> Mapping[str, Any]:
    """What `figures.draw` is told."""
    if colocated:
        return {
            "title": f"Serving beside tuning, simulated against measured, {gpu}",
            "width": "page",
            "metrics": COLOCATED,
            "series": [{"name": name, "label": SERIES[name]} for name in series],
            "footer": f"recorded on {gpu}, one workload; positive: the simulated latency or throughput is higher",
        }
    return {
        "title": f"Simulated against measured, {gpu}",
        "width": "page",
        "metrics": METRICS,
        "series": [{"name": name, "label": SERIES[name]} for name in series],
        "footer": f"recorded on {gpu}, held-out workloads; positive: the simulator is pessimistic; band: what is aimed at",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Draw one PDF."""
    parser = argparse.ArgumentParser(prog="python -m harness.fidelity")
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--colocated", action="store_true", help="the table is of runs in which tuning shared the GPU")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    import pandas

    from figures import PlotError, draw

    table = pandas.read_csv(args.table).rename(columns={"hardware_model": "series"})
    present = [name for name in SERIES if name in set(table["series"])]
    sweep(args.out.parent)
    try:
        draw("errors", table, plot_of(args.gpu, present, args.colocated), args.out)
    except PlotError as error:
        raise InputError(args.table, "table", args.table.name, str(error)) from error
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
