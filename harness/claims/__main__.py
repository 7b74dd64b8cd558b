"""One table of every figure's verdicts: `python -m harness.claims CLAIMS.json... --docs docs`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from harness.claims.table import collect, render
from harness.cli import run
from systems.registry import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a difference is not explained. Raises InputError for bad input."""
    parser = argparse.ArgumentParser(prog="python -m harness.claims", description="The papers' claims and our verdicts.")
    parser.add_argument("claims", type=Path, nargs="*", help="claims.json files")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of <system>.md, which explain differences")
    options = parser.parse_args(arguments)
    if not options.claims:
        raise InputError(
            "harness.claims", "CLAIMS.json", "none", "nothing to judge: name claims.json of figures that have claims"
        )
    report = collect(options.claims, options.docs)
    print(render(report), end="")
    return 1 if report.unexplained else 0


if __name__ == "__main__":
    raise SystemExit(run(main))
