"""Rows as CSV with the authors' columns, and where they come from beside it."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from systems.common.errors import InputError
from systems.maveriq.files import write
from systems.maveriq.profile.crew import ROOT, Done

AUTHORS = (
    "Model", "TP", "PP", "PP_Map", "DTYPE", "INT8_KV_Cache", "Output_Lenght", "Batch_Size", "Latency", "Memory-Pre-Run",
    "Memory-After-Run", "Time-Gen-Graph", "Time-Prof",
)  # fmt: skip
OURS = (
    "Num_layers", "Prompt_Tokens", "Compute", "Clock", "Latency-Low", "Latency-High", "Latency-Served", "Latency-Launched",
    "Host-Share", "Runs",
)  # fmt: skip
"""Beside the authors': depth, prompt, number format, which of the two latencies counts, its quartiles, both of them, share of
the time in which the host did not wait for the GPU (empty on a CPU), timed runs."""
HOST_BOUND = 0.9
"""A host that waits for the GPU less than a tenth of the time has set the pace."""


def rows_of(done: Done) -> list[dict[str, object]]:
    """The table's rows of one job. Loading is shared out among its output lengths, so that `Time-Prof` adds up."""
    job, found = done.job, []
    load_s = (done.import_s + done.built_s) / max(1, len(done.rows))
    for row in done.rows:
        cells = (
            job.model, job.tp, len(job.pp_map), " ".join(map(str, job.pp_map)), job.weights, job.int8_kv, row["output_length"],
            job.batch, row["latency_s"], row["loaded_gib"], row["memory_gib"], done.built_s, load_s + row["ran_s"],
            job.layers, job.prompt_tokens, job.compute, job.clock, row["low_s"], row["high_s"], row["served_s"],
            row["launched_s"], row["host_share"], job.repeats,
        )  # fmt: skip
        found.append(dict(zip((*AUTHORS, *OURS), cells, strict=True)))
    return found


def as_csv(rows: Iterable[Mapping[str, object]]) -> str:
    """A CSV file's text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, (*AUTHORS, *OURS), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{cell:.6g}" if isinstance(cell, float) else cell for key, cell in row.items()} for row in rows)
    return text.getvalue()


def put(path: Path, text: str) -> None:
    """Write a file whole, in a folder that is made where it is missing. Raises InputError where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            path, "--out", str(path.parent), f"cannot be made ({error.strerror}): choose another folder"
        ) from error
    write(path, text)


def provenance(jobs: Sequence[Done], skipped: Sequence[str], began: datetime.datetime, commit: str = "") -> dict[str, Any]:
    """What stands beside the tables: machine, code, command, how memory was read, what failed, GPU seconds."""
    facts = next((done.facts for done in jobs if done.facts), {})
    return {
        "date": began.isoformat(timespec="seconds"),
        "command": [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]],
        "commit": commit or head_commit(),
        "host": platform.node(),
        "python": platform.python_version(),
        "torch": facts.get("torch", "unknown"),
        "device": facts.get("device", "unknown"),
        "gpus": gpus() if facts.get("device") != "cpu" else [],
        "memory": facts.get("memory", "unknown"),
        "weights": "random, seed 0",
        "jobs": len(jobs),
        "gpu_seconds": round(sum(done.wall_s * done.job.gpus for done in jobs), 1),
        "failed": {done.job.name: done.error for done in jobs if done.error},
        "skipped": list(skipped),
    }


def host_bound(rows: Iterable[Mapping[str, object]]) -> int:
    """How many of `rows` the host has set the pace of."""
    return sum(isinstance(share := row["Host-Share"], float) and share > HOST_BOUND for row in rows)


def head_commit() -> str:
    """The commit of this code, with a + where files differ from it."""
    if told := os.environ.get("FIVEFOLD_COMMIT"):
        return told
    found = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changed = "+" if found and _output(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"]) else ""
    return found + changed if found else "unknown"


def gpus() -> list[str]:
    """Every GPU in a line: name, driver, memory, clocks, power limit."""
    keys = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    return _output(["nvidia-smi", f"--query-gpu={keys}", "--format=csv,noheader"]).splitlines()


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def as_json(value: object) -> str:
    """JSON for people."""
    return json.dumps(value, indent=1) + "\n"


def read(path: Path) -> list[dict[str, str]]:
    """The cells of a table as they stand there. Raises OSError."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))
