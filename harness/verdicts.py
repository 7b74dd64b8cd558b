"""Judges the claims of one figure, telling the judge what the numbers are made of.

    python -m harness.verdicts --figure figures/<system>/<figure>.yaml --table table.csv --series NAME.parquet... --out X.json

At smoke scale and on other hardware nothing is judged: it is not the paper's experiment (a `portable` figure is, on any GPU).
A synthetic stand-in is noted under the verdicts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from harness import cli
from harness.claims import judge
from harness.figure_file import load_figure
from harness.rows import About, merged, read_rows


def options(about: About, testbed: str, portable: bool = False) -> list[str]:
    """What the judge must know of the numbers, as options of its command; `testbed` is the paper's.

    The claims of a `portable` figure are judged on any hardware, with a note.
    """
    reasons = ["smoke scale is not the paper's experiment"] if "smoke" in about.scales else []
    reasons += [f"{name} is a tiny model on a CPU" for name in about.hardware if name.startswith("cpux")]
    elsewhere = [f"{name} is not the paper's testbed" for name in about.hardware if name != testbed]
    reasons += [] if portable else elsewhere
    notes = elsewhere if portable else []
    notes += [f"{name}: a synthetic stand-in, not the dataset itself" for name in about.stand_ins]
    refused = ["--not-testable", "; ".join(reasons)] if reasons else []
    return [*refused, *(word for note in notes for word in ("--note", note))]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the verdicts of one figure."""
    parser = argparse.ArgumentParser(prog="python -m harness.verdicts")
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--series", type=Path, nargs="+", required=True, help="parquet files of harness.series")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    about = merged(read_rows(path)[1] for path in args.series)
    figure = load_figure(args.figure)
    return judge.main([*options(about, figure.testbed, figure.portable), str(args.figure), str(args.table), str(args.out)])


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
