"""Keep what H200s measured as dLoRA's recorded figures: `snakemake dlora --config backend=recorded` draws them.

    python benchmarks/dlora_record.py [--measured FILE ...] [--date DAY] [--commit TEXT] [--driver TEXT] [FIGURE ...]

`--measured` takes what benchmarks/dlora_gpu.py and benchmarks/dlora_cluster_gpu.py wrote: their parts go into
`reference/h200/benchmarks/dlora.json` and `reference/h200x2/benchmarks/dlora_cluster.json`, over parts of the same name, each
with what command on what machine measured it. Parts that failed stay out. Then, as always, for every figure under figures/dlora
that is recorded only, asks its experiment for each point (systems/dlora/experiments_recorded.py reads those files) and writes
table.csv and provenance.json into reference/h200/dlora/<figure>/. A figure whose tables are not there is named on stderr in one
line, and the others are written. Exit status: 0; 1 where any was not; 2 for a file that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from harness.atomic import write_atomically  # noqa: E402
from harness.figure_file import FigureFile, load_figure  # noqa: E402
from harness.provenance import commit  # noqa: E402
from harness.reference import Reference  # noqa: E402
from harness.rows import About, Row  # noqa: E402
from systems.dlora import experiments_recorded, fidelity  # noqa: E402
from systems.registry import InputError, Trial, experiment  # noqa: E402

FIGURES = ROOT / "figures" / "dlora"


# ---- what benchmarks wrote


def add_measured(path: Path, day: str, driver: str, measured_commit: str = "") -> Path:
    """Put the parts of a benchmark's file into the reference; the file written. Raises InputError for another file."""
    told = fidelity.read(path)
    target, parts, head = _kept(path, told)
    whole = fidelity.read(target) if target.is_file() else {}
    origin = _origin(told, day, driver, measured_commit)
    asked = {**whole.get("asked", {}), **told.get("asked", {})}
    newest = "fig11a" in parts or "parts" not in told  # fig11a is predicted with what stands at the file's head
    whole = {**whole, **head} if newest else {**head, **whole}
    if asked:
        whole["asked"] = asked
    whole["provenance"] = {**origin, "parts": {**whole.get("provenance", {}).get("parts", {}), **dict.fromkeys(parts, origin)}}
    if "parts" in told:
        whole["parts"] = {**whole.get("parts", {}), **parts}
    else:
        whole |= parts
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(whole), indent=1)
    # rows of numbers on one line each
    text = re.sub(r"\[\s+([-+.\de,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    write_atomically(target, text + "\n")
    return target


def _kept(path: Path, told: Mapping[str, Any]) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Which file keeps what `told` says, its parts that did not fail, and what they have in common."""
    root = experiments_recorded.REFERENCE
    if "parts" not in told and not (isinstance(told.get("machine"), Mapping) and "copy_bytes_per_s" in told):
        raise InputError(path, "benchmark", path.name, "give what benchmarks/dlora_gpu.py or dlora_cluster_gpu.py wrote")
    if _device(told) == "cpu":
        raise InputError(path, "machine", "cpu", "was measured without a GPU: nothing of it is kept")
    if "parts" in told:  # of dlora_cluster_gpu
        parts = {name: runs for name, runs in told["parts"].items() if runs}
        head = {key: value for key, value in told.items() if key not in ("parts", "command", "took_s")}
        return root / experiments_recorded.SEVERAL, parts, head
    parts = {
        name: part
        for name, part in told.items()
        if isinstance(part, Mapping) and name != "machine" and not ({"error", "skipped"} & part.keys())
    }
    return root / experiments_recorded.ONE, parts, {"copy_bytes_per_s": told["copy_bytes_per_s"]}


def _origin(told: Mapping[str, Any], day: str, driver: str, measured_commit: str) -> dict[str, Any]:
    code = commit(ROOT)
    return {
        "date": day, "commit": measured_commit or f"{str(code['commit'])[:10]}{'+' if code['dirty'] is True else ''}",
        "device": _device(told), "driver": driver or _driver(told), "torch": told.get("torch") or told["machine"].get("torch"),
        "model": told.get("model"), "seed": told.get("seed", 0), "command": _command(told.get("command") or []),
    }  # fmt: skip


def _device(told: Mapping[str, Any]) -> str:
    if "facts" in told:
        return str(told["facts"][0]["device"])
    return str(told.get("machine", {}).get("device", "unknown")).split(",")[0]


def _command(said: Sequence[str]) -> list[str]:
    """Without folders of the machine that ran it."""
    words = [str(word) for word in said]
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return [f"benchmarks/{Path(words[0]).name}", *words[1:]] if words else []


def _driver(told: Mapping[str, Any]) -> str:
    """What nvidia-smi said beside the device's name, where the benchmark asked it."""
    said = str(told.get("machine", {}).get("device", "")).split(", ")
    return said[1] if len(said) > 1 else "unknown"


def _rounded(value: Any) -> Any:  # JSON is anything
    """Seven digits: more were not measured, and files stay small; NaN is no JSON."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


# ---- figures


def rows(figure: FigureFile, name: str) -> tuple[list[Row], About]:
    """The points of one series, and what stands behind them. Raises InputError where nothing is recorded."""
    found: list[Row] = []
    notes: set[str] = set()
    sides: set[str] = set()
    for point in figure.points(name):
        trial = Trial("dlora", figure.experiment, point.parameters, figure.testbed, "recorded")
        outcome = experiment("dlora", figure.experiment)(trial)
        notes |= set(outcome.notes)
        sides.add("simulated" if trial.parameters.get("side") == "simulated" else "measured")
        row: Row = {"series": name, **point.at}
        row |= {key: outcome.metrics[key] for key in (figure.objective, *figure.columns)}
        found.append(row | {"feasible": True, "outcome": "recorded", "probes": 1, "trial": None})
    if all(row[figure.objective] is None for row in found):
        raise InputError(figure.title, name, "no point", "nothing of it was measured")
    return found, _about(figure.testbed, sides, notes)


def _about(testbed: str, sides: set[str], notes: set[str]) -> About:
    """The notes name the commits that were measured: those go where commits go."""
    commits = sorted({found for note in notes for found in re.findall(r", commit ([^ :]+)", note)})
    said = sorted(re.sub(r", commit [^ :]+", "", note) for note in notes)
    return About([testbed], sorted(sides), ["paper"], [0], commits, notes=said)


def record(path: Path, root: Path = ROOT / "reference") -> Path:
    """Write one figure's reference; its folder. Raises InputError where its tables are not there."""
    figure = load_figure(path)
    read = {series.name: rows(figure, series.name) for series in figure.series}
    kept = Reference.of("dlora", path.stem, figure.testbed, root)
    whole = [row for found, _ in read.values() for row in found]
    kept.write(figure, whole, {name: known for name, (_, known) in read.items()}, "benchmarks/dlora_record.py")
    return kept.folder


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", help="names of figures (default: all that are recorded only)")
    parser.add_argument("--measured", type=Path, action="append", default=[], help="a benchmark's file; may be given again")
    parser.add_argument("--driver", default="", help="the GPU driver's version, for the provenance")
    parser.add_argument("--commit", default="", help="what was measured, for the provenance (default: the tree as it is)")
    parser.add_argument("--date", default=f"{datetime.now(UTC):%Y-%m-%d}", help="when it was measured (default: today)")
    options = parser.parse_args(arguments)
    try:
        for measured in options.measured:
            print(add_measured(measured, options.date, options.driver, options.commit))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
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
