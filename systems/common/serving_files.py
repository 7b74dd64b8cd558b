"""What `simulate` and `measure` read and write: checked requests in, `requests.csv` and `summary.json` out."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path

from systems.common.engine.config import EngineConfig
from systems.common.errors import InputError
from systems.common.metrics import Records
from systems.common.workloads.build import Workload

COLUMNS = (
    "index", "input_tokens", "output_tokens", "queued_s", "scheduled_s", "first_token_s", "finish_s",
    "ttft_s", "tpot_s", "e2e_s", "preemptions", "status",
)  # fmt: skip


def check(workload: Workload, config: EngineConfig, file: Path) -> None:
    """Refuse the file before anything runs when one of its requests could never finish."""
    for row, request in enumerate(workload.requests, start=2):
        try:
            config.check(request.input_tokens, request.output_tokens)
        except InputError as error:
            raise InputError(f"{file} line {row}", error.key, error.value, error.mend) from error


def table(records: Records) -> str:
    """`requests.csv`: a row per request, times in seconds from the start."""
    columns = (
        range(len(records)), records.input_tokens.tolist(), records.output_tokens.tolist(), records.arrival_s.tolist(),
        records.scheduled_s.tolist(), records.first_token_s.tolist(), records.finish_s.tolist(), records.ttft_s.tolist(),
        records.tpot_s.tolist(), records.e2e_s.tolist(), records.preemptions.tolist(), records.columns()["status"],
    )  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue()


def write(path: Path, text: str) -> None:
    """Under a temporary name first, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            path, "--out", str(path.parent), f"cannot be written ({error.strerror}): free space or choose another folder"
        ) from error


def shown(summary: Mapping[str, object]) -> str:
    """The latencies for a terminal."""
    rows = [f"{'':12}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}"]
    for name in ("ttft", "tpot", "itl", "e2e", "queue"):
        values = [summary.get(f"{name}_{of}_s", math.nan) for of in ("mean", "p50", "p90", "p99")]
        rows.append(f"{name + ' (s)':12}" + "".join(f"{value:10.4f}" for value in values))
    return "\n".join(rows)


def plain(summary: Mapping[str, object]) -> dict[str, object]:
    """NaN is not JSON: a number that no request defines becomes null."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in summary.items()}
