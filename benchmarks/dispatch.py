"""What it costs to run a job on another host: the same series here and over SSH, on hosts of the lab on this machine.

    python benchmarks/dispatch.py [--runs 5] [--out FILE]         (root: the lab needs namespaces)

Every run but the first finds code and datasets on the host, as in a figure of many series. The floor is the same command here.
Prints a table, then one JSON object on its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def series(results: Path, number: int) -> list[str]:
    """A series of two points with a search each, that has not run before."""
    out = results / f"run{number}" / "chunked.parquet"
    config = json.dumps({"scale": "smoke", "seed": 1000 * number})
    options = ["--figure", "figures/llmstation/fig8a.yaml", "--series", "chunked", "--results", str(results)]
    manifest = results / "sharegpt_lengths.json"
    return ["python", "-m", "harness.series", *options, "--config-json", config, "--datasets", str(manifest), "--out", str(out)]


def timed(command: list[str], results: Path) -> tuple[float, int]:
    """Seconds, and how many trials they gave."""
    before = len(list(results.glob("trials/*")))
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began, len(list(results.glob("trials/*"))) - before


def main() -> None:
    """Measure and print."""
    from tests.labs.ssh_lab import SshLab

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    folder = Path(tempfile.mkdtemp(prefix="fivefold-bench-"))
    try:
        with SshLab(folder / "lab", hosts=1, keep=[sys.prefix]) as lab:
            (lab.hosts[0].root / "checkout").mkdir()
            (lab.hosts[0].root / "checkout" / ".venv").symlink_to(sys.prefix)
            inventory = lab.inventory(folder / "lab.yaml")
            dispatch = [sys.executable, "-m", "harness.dispatch", "--inventory", str(inventory), "--"]
            here, there = folder / "here", folder / "there"
            for results in (here, there):
                manifest = str(results / "sharegpt_lengths.json")
                subprocess.run(
                    [sys.executable, "-m", "harness.datasets", "sharegpt_lengths", "--offline", "--out", manifest],
                    cwd=ROOT,
                    check=True,
                )
            first, _ = timed(lab.command([*dispatch, *series(there, 0)], ROOT), there)
            local = [timed(series(here, number), here) for number in range(1, args.runs + 1)]
            remote = [timed(lab.command([*dispatch, *series(there, n)], ROOT), there) for n in range(1, args.runs + 1)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    trials = statistics.median(count for _, count in remote)
    extra_s = statistics.median(s for s, _ in remote) - statistics.median(s for s, _ in local)
    told = {
        "local_s": statistics.median(seconds for seconds, _ in local),
        "remote_s": statistics.median(seconds for seconds, _ in remote),
        "first_s": first,
        "extra_per_job_s": extra_s,
        "trials_per_job": trials,
        "extra_per_trial_s": extra_s / trials,
    }
    for name, value in told.items():
        print(f"{name:20} {value:8.3f}")
    line = json.dumps(told)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
