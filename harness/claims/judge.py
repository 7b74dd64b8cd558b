"""Judge the claims of one figure: `python -m harness.claims.judge FIGURE.yaml TABLE.csv OUT.json`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.atomic import write_atomically
from harness.claims.data import Table, read_table
from harness.claims.evaluate import Judgement, evaluate
from harness.claims.judgement import untestable
from harness.claims.models import Claim
from harness.cli import run
from harness.figure_file import load_figure


def judge(claims: Sequence[Claim], table: Table, not_testable: str | None = None) -> list[dict[str, Any]]:
    """Each claim with its judgement, as plain data.

    With `not_testable`, nothing is judged and that is the reason given for every claim.
    """

    def entry(claim: Claim, judgement: Judgement) -> dict[str, Any]:
        about = {"id": claim.id, "kind": claim.kind, "text": claim.text, "source": claim.source, "note": claim.note}
        return about | asdict(judgement)

    return [entry(c, untestable(c, not_testable) if not_testable else evaluate(c, table)) for c in claims]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the judgements; 0 whatever they are. Raises InputError for bad input."""
    parser = argparse.ArgumentParser(prog="python -m harness.claims.judge", description="Judge the claims of one figure.")
    parser.add_argument("figure", type=Path, help="figures/<system>/<figure>.yaml")
    parser.add_argument("table", type=Path, help="the figure's table.csv")
    parser.add_argument("out", type=Path, help="claims.json to write")
    parser.add_argument(
        "--note", action="append", default=[], help="said under the verdicts, e.g. that a dataset is a stand-in"
    )
    parser.add_argument("--not-testable", metavar="WHY", help="judge nothing; this is the reason (e.g. smoke scale)")
    options = parser.parse_args(arguments)
    figure = load_figure(options.figure)
    table = read_table(options.table, tuple(figure.factors), figure.objective)
    document = {
        "system": options.figure.absolute().parent.name,
        "figure": options.figure.stem,
        "title": figure.title,
        "notes": options.note,
        "claims": judge(figure.claims, table, options.not_testable),
    }
    write_atomically(options.out, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
