"""Measure what tuning and serving do to each other on this machine's GPU, for the simulator.

    python -m systems.llmstation.calibrate --model llama-3.1-8b --gpu h200 --out reference/h200/calibrated/llama-3.1-8b

adds `corun.csv` (co-run slowdowns), `tuning.csv` (tasklets alone) and `corun.yaml` (how they were measured, and what there was
no time for) to the calibration in that folder, or makes the folder. Takes up to `--budget-s` seconds with one GPU to itself;
files are written after each part. Parts, in order: `mps` (two processes), `streams` (one process), `tasklets`, `green` (some of
the SMs), `lengths` (other samples than 500 tokens). `snakemake calibrate` runs it where a GPU is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from systems.common.calibrate.budget import Budget
from systems.common.errors import InputError
from systems.common.hardware.datasheet import gpu
from systems.common.models import model

PARTS = ("mps", "streams", "tasklets", "green", "lengths")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="python -m systems.llmstation.calibrate", description="Measure co-run slowdowns and tuning tasklets of this GPU."
    )
    made.add_argument("--model", default="llama-3.1-8b", help="a model shape (default: %(default)s)")
    made.add_argument("--gpu", required=True, help="the GPU's name in the datasheet, such as h200")
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a small shape and few points, for tests")
    made.add_argument("--parts", default=",".join(PARTS), help="parts to measure (default: all)")
    made.add_argument("--quick", action="store_true", help="only the most telling points of each part")
    made.add_argument("--budget-s", type=float, default=240.0, help="seconds after which no point is begun (%(default)s)")
    made.add_argument("--commit", default="unknown", help="of this code, where there is no git to ask")
    made.add_argument("--out", type=Path, required=True, help="folder of the calibration")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 2 for bad input, said in one line; 1 when nothing was measured. Parts that failed are in corun.yaml."""
    options = parser().parse_args(arguments)
    try:
        shape, card = model(options.model, "--model"), gpu(options.gpu, "--gpu")
        parts = tuple(options.parts.split(","))
        for part in parts:
            if part not in PARTS:
                raise InputError("calibrate", "--parts", part, f"use some of {','.join(PARTS)}")
        if not options.budget_s > 0:
            raise InputError("calibrate", "--budget-s", options.budget_s, "give seconds, more than 0")
        budget = Budget(options.budget_s)
        try:
            from systems.llmstation.calibrate.run import Run, points
        except ModuleNotFoundError as error:
            raise InputError("calibrate", "torch", "not installed", "`make torch` installs it") from error
        run = Run(shape, card, options.device, options.out, budget, points(options.device, options.quick), options.commit)
        measured = run.all(parts)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(options.out)
    return 0 if measured else 1


if __name__ == "__main__":
    sys.exit(main())
