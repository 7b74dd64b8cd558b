"""Keep what H200s measured as MaverIQ's recorded figures: `snakemake maveriq --config backend=recorded` draws them.

    python benchmarks/maveriq_record.py [FIGURE ...]

For every figure under figures/maveriq that is recorded only, asks its experiment for each point
(systems/maveriq/experiments_recorded.py reads the tables under reference/) and writes table.csv and provenance.json into
reference/<gpu>/maveriq/<figure>/. A figure whose tables are not there is named on stderr in one line, and the others are
written. Exit status: 0; 1 where any was not.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from harness.figure_file import FigureFile, load_figure  # noqa: E402
from harness.provenance import commit  # noqa: E402
from harness.reference import Reference  # noqa: E402
from harness.rows import About, Row  # noqa: E402
from systems.registry import InputError, Trial, experiment  # noqa: E402

FIGURES = ROOT / "figures" / "maveriq"


def rows(figure: FigureFile, name: str) -> tuple[list[Row], set[str]]:
    """The points of one series that were measured (all, empty, where none was) and what they want said.

    Raises InputError where no table is there.
    """
    found: list[Row] = []
    notes: set[str] = set()
    for point in figure.points(name):
        trial = Trial("maveriq", figure.experiment, point.parameters, figure.testbed, "recorded")
        outcome = experiment("maveriq", figure.experiment)(trial)
        notes |= set(outcome.notes)
        row: Row = {"series": name, **point.at}
        row |= {key: outcome.metrics[key] for key in (figure.objective, *figure.columns)}
        found.append(row | {"feasible": True, "outcome": "recorded", "probes": 1, "trial": None})
    return [row for row in found if _measured(figure, row)] or found, notes


def _measured(figure: FigureFile, row: Row) -> bool:
    return not math.isnan(float(str(row[figure.objective])))


def record(path: Path, root: Path = ROOT / "reference") -> Path:
    """Write one figure's reference; its folder. Raises InputError where its tables are not there."""
    figure = load_figure(path)
    read = {series.name: rows(figure, series.name) for series in figure.series}
    if not any(_measured(figure, row) for found, _ in read.values() for row in found):
        raise InputError(path, "points", "none", "nothing of it was measured: run benchmarks/maveriq_gpu.py")
    told = commit(ROOT)
    code = f"{str(told['commit'])[:10]}{'+' if told['dirty'] is True else ''}"
    about = {
        name: About([figure.testbed], ["measured"], ["paper"], [0], [code], notes=sorted(notes))
        for name, (_, notes) in read.items()
    }
    kept = Reference.of("maveriq", path.stem, figure.testbed, root)
    kept.write(figure, [row for found, _ in read.values() for row in found], about, "benchmarks/maveriq_record.py")
    return kept.folder


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", help="names of figures (default: all that are recorded only)")
    options = parser.parse_args(arguments)
    paths = [FIGURES / f"{name}.yaml" for name in options.figures] or sorted(FIGURES.glob("*.yaml"))
    failed = 0
    for path in paths:
        try:
            if not options.figures and load_figure(path).backends != ["recorded"]:
                continue
            print(record(path).relative_to(ROOT))
        except InputError as error:
            failed += 1
            print(f"{path.stem}: {error}", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
