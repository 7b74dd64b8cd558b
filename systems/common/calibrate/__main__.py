"""Measure this machine's GPU for the simulator.

    python -m systems.common.calibrate --model llama-3.1-8b --gpu h200 --out reference/h200/calibrated/llama-3.1-8b

takes up to `--budget-s` seconds with one GPU to itself: a thin grid first (all of it with `--quick`, under a minute), then what
the full one adds, most telling first. The folder is written after each part; `left_out` in its meta.yaml says what there was no
time for. `snakemake calibrate` runs it where a GPU is. Use the result with `--operators FOLDER` of
`python -m systems.common.simulate`, or `costs(..., operators=FOLDER)`.
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


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(prog="python -m systems.common.calibrate", description="Measure this GPU for the simulator.")
    made.add_argument("--model", default="llama-3.1-8b", help="a model shape (default: %(default)s)")
    made.add_argument("--gpu", required=True, help="the GPU's name in the datasheet, such as h200")
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a small shape and few points, for tests")
    made.add_argument("--quick", action="store_true", help="the thin grid alone")
    made.add_argument("--budget-s", type=float, default=240.0, help="seconds after which no point is begun (%(default)s)")
    made.add_argument("--runs", type=int, default=5, help="timed runs per point (default: %(default)s)")
    made.add_argument("--commit", default="unknown", help="of this code, where there is no git to ask")
    made.add_argument("--out", type=Path, required=True, help="folder for the tables; a calibration there is replaced")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 2 for bad input, said in one line."""
    options = parser().parse_args(arguments)
    try:
        shape, card = model(options.model, "--model"), gpu(options.gpu, "--gpu")
        if options.runs < 3:
            raise InputError("calibrate", "--runs", options.runs, "give at least 3")
        if not options.budget_s > 0:
            raise InputError("calibrate", "--budget-s", options.budget_s, "give seconds, more than 0")
        budget = Budget(options.budget_s)
        try:
            from systems.common.calibrate.run import calibrate
        except ModuleNotFoundError as error:
            raise InputError("calibrate", "torch", "not installed", "`make torch` installs it") from error
        calibrate(
            shape, card.name, options.device, options.runs, options.commit, options.quick, budget,
            save=lambda folder: folder.write(options.out),
        )  # fmt: skip
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
