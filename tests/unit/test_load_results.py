"""What a run's files and numbers say, and that files are whole."""

from __future__ import annotations

import asyncio
import csv
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from systems.common.core import Request, Slo, Status
from systems.common.errors import InputError
from systems.common.load import results
from systems.common.load.answer import Answer, CutShortError, ServerError
from systems.common.load.connection import DisconnectedError
from systems.common.load.drive import kind_of
from systems.common.load.measurement import Exchange, Measurement
from systems.common.load.report import shown
from systems.common.load.wire import BadResponseError
from systems.common.workloads.build import from_csv


def exchange(
    index: int, *, lag_s: float = 0.001, status: Status = Status.FINISHED, error: str = "", adapter: str | None = None
) -> Exchange:
    answer = Answer()
    planned_s = 0.1 * index
    if status is Status.FINISHED:
        answer.token_s = [planned_s + 0.2 + 0.05 * k for k in range(5)]
        answer.prompt_tokens, answer.completion_tokens, answer.events = 7, 5, 5
    request = Request(index, planned_s, 7, 5, adapter)
    return Exchange(request, planned_s, planned_s + lag_s, answer, status, error, 'it, said\n"no"' if error else "")


def measurement(*exchanges: Exchange, interrupted: bool = False, unsent: int = 0, loop_lag_s: float = 0.0005) -> Measurement:
    return Measurement(exchanges, unsent, [loop_lag_s] * 50, 10.0, 2.0, False, interrupted)


MIXED = (
    *(exchange(i, adapter="a" if i % 2 else None) for i in range(6)),
    exchange(6, status=Status.FAILED, error="refused"),
    exchange(7, status=Status.FAILED, error="http-500"),
    exchange(8, status=Status.CUT),
)


def test_numbers_of_a_run() -> None:
    summary: dict[str, Any] = results.metrics(measurement(*MIXED, interrupted=True, unsent=3), Slo(ttft_s=0.3))
    table = summary["metrics"]
    assert (table["requests"], table["finished"], table["failed"], table["cut"]) == (9, 6, 2, 1)
    assert table["attainment"] == pytest.approx(6 / 8) and summary["errors"] == {"http-500": 1, "refused": 1}
    assert table["ttft_p50_s"] == pytest.approx(0.2) and table["ttft_from_send_p50_s"] == pytest.approx(0.199)
    assert table["tpot_mean_s"] == pytest.approx(0.05) and table["itl_p99_s"] == pytest.approx(0.05)
    assert table["schedule_lag_p50_s"] == table["schedule_lag_max_s"] == pytest.approx(0.001)
    assert summary["cut_off"] and summary["unsent"] == 3 and summary["accurate"] and summary["client"]["cpu_share"] == 0.2
    assert summary["error_examples"]["refused"] == 'it, said\n"no"'
    text = shown(summary)
    assert "6 finished, 2 failed, 1 cut off, 3 not sent (1 http-500, 1 refused)" in text and "NOT ACCURATE" not in text


@pytest.mark.parametrize(
    ("lag_s", "loop_lag_s", "part"), [(0.011, 0.0, "sent 11.0 ms late"), (0.0, 0.02, "woke up 20.0 ms late")]
)
def test_a_client_that_is_late_says_so(lag_s: float, loop_lag_s: float, part: str) -> None:
    summary = results.metrics(measurement(*(exchange(i, lag_s=lag_s) for i in range(5)), loop_lag_s=loop_lag_s))
    assert summary["accurate"] is False and part in str(summary["inaccurate_because"]) and part in shown(summary)


def test_answers_of_another_length_are_counted() -> None:
    short = exchange(1)
    short.answer.completion_tokens = 4
    table: Any = results.metrics(measurement(exchange(0), short))["metrics"]
    assert table["other_length"] == 1
    assert short.record().request.output_tokens == 4, "what came is what counts"


def test_a_run_of_nothing_is_still_a_table(tmp_path: Path) -> None:
    nothing = Measurement([], 4, [], 0.0, 0.0, False, True)
    summary = results.metrics(nothing)
    results.write(tmp_path / "out", nothing, summary)
    assert len(results.read_records(tmp_path / "out")) == 0
    assert "0 finished" in shown(summary) and math.isnan(summary["metrics"]["ttft_p50_s"])  # type: ignore[index]


def test_files_say_all_and_can_be_read_back(tmp_path: Path) -> None:
    run = measurement(*MIXED)
    summary = results.metrics(run)
    results.write(tmp_path / "deep" / "out", run, summary)
    folder = tmp_path / "deep" / "out"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "requests.csv", "requests.parquet"]
    with (folder / "requests.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished"] * 6 + ["failed"] * 2 + ["cut"]
    assert rows[6]["message"] == 'it, said\n"no"' and rows[6]["finish_s"] == "" and rows[1]["adapter"] == "a"
    read, ours = results.read_records(folder), results.records(run)
    assert [repr(read.record(i)) for i in range(len(read))] == [repr(ours.record(i)) for i in range(len(ours))]
    assert json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)["metrics"]["queue_p50_s"] is None
    again = from_csv(folder / "requests.csv")
    assert [(r.arrival_s, r.input_tokens, r.output_tokens, r.adapter) for r in again.requests] == [
        (e.planned_s, 7, 5, e.request.adapter) for e in MIXED
    ]


def test_nothing_is_replaced_unasked_and_nothing_is_lost_by_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = measurement(exchange(0)), tmp_path / "out"
    results.write(folder, run, {"a": 1})
    with pytest.raises(InputError, match="--overwrite"):
        results.write(folder, run, {"a": 2})
    with pytest.raises(InputError, match="is a file"):
        results.check_free(folder / "metrics.json")
    results.write(folder, run, {"a": 3}, overwrite=True)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        results.write(folder, run, {"a": 4}, overwrite=True)
    assert json.loads((folder / "metrics.json").read_text()) == {"a": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_made_is_said_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out"):
        results.check_free(tmp_path / "file" / "out")
    results.check_free(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", [b"", b"no parquet"])
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "requests.parquet").write_bytes(content)
    with pytest.raises(InputError, match="load generator"):
        results.read_records(tmp_path)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TimeoutError(), "timeout"),
        (ConnectionRefusedError(), "refused"),
        (DisconnectedError(), "disconnected"),
        (ConnectionResetError(), "disconnected"),
        (CutShortError(), "cut-short"),
        (BadResponseError(), "bad-response"),
        (ServerError("http-503", "busy"), "http-503"),
        (OSError(errno.EMFILE, "too many"), "client-limit"),
        (OSError(errno.EHOSTUNREACH, "no route"), "unreachable"),
    ],
)
def test_failures_by_kind(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


def test_a_fault_of_ours_is_no_kind_of_failure() -> None:
    with pytest.raises(UnicodeError):
        kind_of(UnicodeError())
    with pytest.raises(asyncio.InvalidStateError):
        kind_of(asyncio.InvalidStateError())
