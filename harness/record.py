"""Keeps a measured figure under `reference/`, for `--config backend=recorded` on machines without that GPU.

    python -m harness.record --figure figures/<system>/<figure>.yaml --results results --config-json '{"hardware": "h200x1"}'

Takes what `snakemake <figure> --config backend=measured hardware=...` left in the results folder: table.csv, what its series
say of themselves, the histories, the factors of the move, and where and when the trials ran. The folder appears whole or not
at all.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import cli
from harness.atomic import temporary_beside, write_atomically
from harness.config import Config, config_from_json
from harness.figure_file import FigureFile, load_figure, system_of
from harness.reference import REFERENCE, Reference
from harness.rows import read_rows
from harness.table import as_csv, columns
from harness.trials import TrialStore
from systems.registry import InputError


def record(path: Path, results: Path, config: Config, root: Path = REFERENCE) -> Path:
    """Keep the measured figure `path`; the folder it is in now.

    Raises:
        InputError: the run is not there, is not a measured one, or is of smoke scale.
    """
    if config.scale == "smoke":
        raise InputError("--config-json", "scale", "smoke", "record a run of paper scale")
    measured = config.model_copy(update={"backend": "measured"})
    figure, system = load_figure(path), system_of(path)
    run = results / measured.run_name / system / path.stem
    reference = Reference.of(system, path.stem, measured.testbed(figure.testbed), root)
    for series in figure.series:
        if not (run / "series" / f"{series.name}.parquet").is_file():
            raise InputError(run, "series", series.name, "was not measured: measure the figure first")
    read = {series.name: read_rows(run / "series" / f"{series.name}.parquet") for series in figure.series}
    store = TrialStore(results / "trials")
    origin = {
        "testbed": measured.testbed(figure.testbed),
        "about": {name: asdict(about) for name, (_, about) in read.items()},
        "trials": {name: [_trial(store, trial) for trial in about.trials] for name, (_, about) in read.items()},
    }
    draft = temporary_beside(reference.folder)
    draft.mkdir(parents=True)
    try:
        rows = [row for rows, _ in read.values() for row in rows]
        write_atomically(draft / "table.csv", as_csv(rows, columns(figure)))
        write_atomically(draft / "provenance.json", json.dumps(origin, indent=1, sort_keys=True) + "\n")
        _copy_if_there(figure, run, draft)
        if reference.folder.exists():
            shutil.rmtree(reference.folder)
        draft.rename(reference.folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return reference.folder


def _copy_if_there(figure: FigureFile, run: Path, draft: Path) -> None:
    names = {f"series/{series.name}.history.jsonl": f"{series.name}.history.jsonl" for series in figure.series}
    for source, target in {**names, "rescale.json": "rescale.json"}.items():
        if (run / source).is_file():
            write_atomically(draft / target, (run / source).read_bytes())


def _trial(store: TrialStore, name: str) -> Mapping[str, Any]:
    """Of one trial: its name, where, when, how long, its parameters and metrics."""
    origin, metrics = store.provenance(name), store.metrics(name)
    if origin is None or metrics is None:
        return {"trial": name}
    kept = ("start", "duration_s", "host", "gpus", "packages", "commit", "dirty", "seed", "notes")
    finite = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
    return {"trial": name, "metrics": finite, **{key: origin[key] for key in kept if key in origin}}


def main(argv: Sequence[str] | None = None) -> int:
    """Record one figure."""
    parser = argparse.ArgumentParser(prog="python -m harness.record")
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--config-json", default="{}", help="keys of config/config.yaml that the measured run was given")
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    args = parser.parse_args(argv)
    folder = record(args.figure, args.results, config_from_json(args.config_json), args.reference)
    cli.say(f"recorded in {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
