"""What a run gave, as records, metrics and files.

`DIR` holds `requests.csv` and `requests.parquet` (a row per request; the second also has every token's time) and
`metrics.json`. It appears whole or not at all. `requests.csv` is itself a file of requests: `--requests DIR/requests.csv`
sends the same again, and `python -m systems.common.simulate --requests DIR/requests.csv` simulates it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from systems.common.core import Slo
from systems.common.errors import InputError
from systems.common.load.measurement import Measurement
from systems.common.metrics import FINISHED, STATUSES, FloatArray, Records, distribution, percentile, summarise

LAG_LIMIT_S = 0.010
"""A client whose median lag is this or more did not make the load that it says (inference-perf's rule)."""

Column = Sequence[int | float | str | None]


def records(measurement: Measurement) -> Records:
    """The records of all requests that were sent, in order of arrival."""
    return Records.from_records([exchange.record() for exchange in measurement.exchanges])


def metrics(measurement: Measurement, slo: Slo | None = None) -> dict[str, object]:
    """Everything that the run's numbers say: the sections `metrics`, `errors` and `client` of `metrics.json`."""
    kept = records(measurement)
    exchanges = measurement.exchanges
    finished = kept.status == FINISHED
    sent_s = _array(exchange.sent_s for exchange in exchanges)
    lag_s = sent_s - kept.arrival_s
    table: dict[str, object] = {**summarise(kept, slo, schedule_lag_s=lag_s)}
    table |= distribution("ttft_from_send", (kept.first_token_s - sent_s)[finished])
    table["schedule_lag_max_s"] = float(lag_s.max()) if len(lag_s) else math.nan
    table["other_length"] = sum(
        exchange.answer.output_tokens != exchange.request.output_tokens
        for exchange, done in zip(exchanges, finished.tolist(), strict=True)
        if done
    )
    client = _client(measurement)
    wrong = _inaccuracies(table, client)
    return {
        "metrics": table,
        "errors": dict(sorted(Counter(exchange.error for exchange in exchanges if exchange.error).items())),
        "error_examples": {exchange.error: exchange.message for exchange in reversed(exchanges) if exchange.error},
        "client": client,
        "accurate": not wrong,
        "inaccurate_because": wrong,
        "cut_off": measurement.interrupted,
        "unsent": measurement.unsent,
    }


def _client(measurement: Measurement) -> dict[str, float]:
    lags = _array(measurement.loop_lag_s)
    client = {f"loop_lag_p{percent}_s": percentile(lags, percent) for percent in (50, 99)}
    client["loop_lag_max_s"] = float(lags.max()) if len(lags) else math.nan
    client["cpu_share"] = measurement.cpu_s / measurement.wall_s if measurement.wall_s > 0 else math.nan
    return client


def _inaccuracies(table: Mapping[str, object], client: Mapping[str, float]) -> list[str]:
    """Why this run says less about the server than it seems to; nothing for a good one."""
    reasons = []
    for what, lag_s in (("requests were sent", table["schedule_lag_p50_s"]), ("the client woke up", client["loop_lag_p50_s"])):
        assert isinstance(lag_s, float)
        if lag_s >= LAG_LIMIT_S:
            reasons.append(
                f"{what} {1e3 * lag_s:.1f} ms late (median; limit {1e3 * LAG_LIMIT_S:g}): lower the load or use a faster client"
            )
    return reasons


def table(measurement: Measurement) -> dict[str, Column]:
    """One column per name, a row per request: those of `Records.columns`, then what only a client knows."""
    kept, exchanges = records(measurement), measurement.exchanges
    base = kept.columns()
    return {
        "index": [exchange.request.index for exchange in exchanges],
        **base,
        "adapter": [exchange.request.adapter for exchange in exchanges],
        "ttft_s": kept.ttft_s.tolist(),
        "tpot_s": kept.tpot_s.tolist(),
        "e2e_s": kept.e2e_s.tolist(),
        "sent_s": [exchange.sent_s for exchange in exchanges],
        "lag_s": [exchange.sent_s - exchange.planned_s for exchange in exchanges],
        "ttft_from_send_s": [exchange.answer.first_token_s - exchange.sent_s for exchange in exchanges],
        "requested_output_tokens": [exchange.request.output_tokens for exchange in exchanges],
        "events": [exchange.answer.events for exchange in exchanges],
        "error": [exchange.error for exchange in exchanges],
        "message": [exchange.message for exchange in exchanges],
    }


def write(folder: Path, measurement: Measurement, summary: Mapping[str, object], *, overwrite: bool = False) -> None:
    """Put the three files of a run into `folder`, in one step.

    Raises InputError when the disk refuses, or `folder` has content and `overwrite` is not set.
    """
    check_free(folder, overwrite=overwrite)
    columns = table(measurement)
    with _becoming(folder) as temporary:
        _put(temporary / "requests.csv", _csv(columns).encode())
        _put(temporary / "requests.parquet", _parquet(columns, [exchange.answer.token_s for exchange in measurement.exchanges]))
        _put(temporary / "metrics.json", (json.dumps(_plain(summary), indent=2) + "\n").encode())


def check_free(folder: Path, *, overwrite: bool = False) -> None:
    """Raises InputError when results can't go to `folder`: to be asked before the time is spent that they cost."""
    if folder.exists() and not folder.is_dir():
        raise InputError("load", "--out", str(folder), "is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError("load", "--out", str(folder), "holds something: name another folder, or say --overwrite")
    with _becoming(folder, keep=False):
        pass


def read_records(folder: Path) -> Records:
    """The records in `folder`/requests.parquet, token times included. Raises InputError for a file that is not one of ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "requests.parquet"
    try:
        content = pq.read_table(path).to_pydict()
        counts = [len(times) for times in content["token_s"]]
        words = [kind.value for kind in STATUSES]
        return Records(
            arrival_s=_array(content["arrival_s"]),
            scheduled_s=_array(content["scheduled_s"]),
            first_token_s=_array(content["first_token_s"]),
            finish_s=_array(content["finish_s"]),
            input_tokens=np.array(content["input_tokens"], dtype=np.int64),
            output_tokens=np.array(content["output_tokens"], dtype=np.int64),
            preemptions=np.array(content["preemptions"], dtype=np.int64),
            status=np.array([words.index(word) for word in content["status"]], dtype=np.int8),
            token_s=_array(at for times in content["token_s"] for at in times),
            token_ends=np.cumsum(counts, dtype=np.int64) if any(counts) else np.empty(0, dtype=np.int64),
            adapters=tuple(content["adapter"]) if any(content["adapter"]) else (),
        )
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise InputError(
            path, "file", " ".join(str(error).split())[:80], "give a folder that the load generator wrote"
        ) from error


def _csv(columns: Mapping[str, Column]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow("" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row)
    return text.getvalue()


def _parquet(columns: Mapping[str, Column], token_s: Sequence[Sequence[float]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"adapter": pa.string(), "error": pa.string(), "message": pa.string()}
    arrays = {name: pa.array(column, type=kinds.get(name)) for name, column in columns.items()}
    arrays["token_s"] = pa.array(token_s, type=pa.list_(pa.float64()))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays), sink)
    return bytes(sink.getvalue())


def _plain(value: object) -> object:
    """NaN and infinity are not JSON: they become null."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _array(values: Iterable[float]) -> FloatArray:
    return np.array(list(values), dtype=np.float64)


def _put(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _becoming(folder: Path, *, keep: bool = True) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place at the end of the block (if `keep`), and vanishes otherwise."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    old = temporary.with_suffix(".old.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if keep:
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        mend = f"cannot be written ({error.strerror or error}): free space or choose another folder"
        raise InputError("load", "--out", str(folder), mend) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
