"""The load generator against a server whose latencies are known: real processes, real connections."""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from systems.common.load.results import read_records
from systems.common.metrics import CUT, FAILED, FINISHED

LENGTHS = ("--input-tokens", "20", "--output-tokens", "10")


@dataclass
class Server:
    """A mock server that runs."""

    url: str
    log: Path

    def answers(self) -> dict[str, dict[str, Any]]:
        """What it did, by the name of the request."""
        return {entry["name"]: entry for entry in map(json.loads, self.log.read_text().splitlines())}


@contextmanager
def serving(tmp_path: Path, *words: str) -> Iterator[Server]:
    log = tmp_path / "mock.log"
    command = [sys.executable, "-m", "systems.common.load.mock", "--log", str(log), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Server(process.stdout.readline().strip(), log)
    finally:
        process.terminate()
        process.communicate(timeout=20)


def begin(out: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "systems.common.load", "--out", str(out), "--no-progress", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@dataclass
class Ran:
    """A run of the client that ended."""

    code: int
    said: str
    complained: str
    out: Path

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "metrics.json").read_text())
        return found

    @property
    def done(self) -> bool:
        """Whether it came to its end; on a machine that is busy with other tests it may rightly call itself too slow."""
        return self.code == (0 if self.summary["accurate"] else 1)

    @property
    def rows(self) -> list[dict[str, str]]:
        with (self.out / "requests.csv").open() as file:
            return list(csv.DictReader(file))


def run(out: Path, *words: str) -> Ran:
    process = begin(out, *words)
    try:
        said, complained = process.communicate(timeout=100)
    finally:
        process.kill()
    assert "Traceback" not in complained, complained
    return Ran(process.returncode, said, complained, out)


def test_it_measures_what_the_server_did(tmp_path: Path) -> None:
    with serving(tmp_path, "--ttft", "0.2", "--itl", "0.02") as server:
        ran = run(tmp_path / "out", "--url", server.url, "--rate", "40", "--count", "80", *LENGTHS, "--slo", "ttft=9,tpot=9")
        answers = server.answers()
    summary, zero_s = ran.summary, ran.summary["run"]["monotonic_zero_s"]
    assert ran.done, ran.complained
    assert summary["metrics"]["finished"] == 80 and summary["metrics"]["attainment"] == 1.0
    records = read_records(tmp_path / "out")
    ttft_off, tpot_off = [], []
    for i, row in enumerate(ran.rows):
        truth = answers[f"{summary['run']['name']}-{row['index']}"]
        assert (
            truth["prompt_tokens"] == int(row["input_tokens"]) == 20
            and len(truth["token_s"]) == int(row["output_tokens"]) == 10
        )
        token_s = records.record(i).token_s
        assert all(got >= sent - zero_s for got, sent in zip(token_s, truth["token_s"], strict=True)), "before it was sent"
        ttft_s = truth["token_s"][0] - truth["received_s"]
        tpot_s = (truth["token_s"][-1] - truth["token_s"][0]) / 9
        ttft_off.append(abs(float(row["ttft_from_send_s"]) - ttft_s) - 0.01 * ttft_s)
        tpot_off.append(abs(float(row["tpot_s"]) - tpot_s) - 0.01 * tpot_s)
        assert float(row["ttft_s"]) == pytest.approx(float(row["lag_s"]) + float(row["ttft_from_send_s"]))
        assert float(row["e2e_s"]) == pytest.approx(float(row["ttft_s"]) + 9 * float(row["tpot_s"]))
    assert statistics.median(ttft_off) <= 0.001 and statistics.median(tpot_off) <= 0.001
    lags = sorted(float(row["lag_s"]) for row in ran.rows)
    assert summary["metrics"]["schedule_lag_max_s"] == pytest.approx(lags[-1])
    assert summary["metrics"]["schedule_lag_p50_s"] == pytest.approx(statistics.median(lags))


def test_a_thousand_requests_at_once_are_a_thousand_answers(tmp_path: Path) -> None:
    with serving(tmp_path, "--ttft", "0.1", "--itl", "0.05") as server:
        ran = run(tmp_path / "out", "--url", server.url, "--rate", "inf", "--count", "1000", *LENGTHS)
        answers = server.answers()
    assert ran.done, ran.complained
    assert ran.summary["metrics"]["finished"] == 1000 == len(answers) and ran.summary["errors"] == {}
    assert len({tuple(entry["prompt_head"]) for entry in answers.values()}) == 1000
    assert all(entry["ignore_eos"] and entry["max_tokens"] == 10 for entry in answers.values())


def test_an_open_loop_does_not_wait_for_a_slow_server(tmp_path: Path) -> None:
    with serving(tmp_path, "--ttft", "3", "--itl", "0.001") as server:
        ran = run(
            tmp_path / "out", "--url", server.url, "--arrivals", "deterministic", "--rate", "300", "--count", "300", *LENGTHS
        )
        received = sorted(entry["received_s"] for entry in server.answers().values())
    assert ran.summary["metrics"]["finished"] == 300
    assert received[-1] - received[0] < 3, "all were sent before the first answer could come"


def test_a_closed_loop_keeps_so_many_and_its_connections(tmp_path: Path) -> None:
    with serving(tmp_path, "--ttft", "0.02", "--itl", "0.005") as server:
        ran = run(tmp_path / "out", "--url", server.url, "--concurrency", "4", "--count", "20", *LENGTHS, "--warmup", "2")
        answers = list(server.answers().values())
    assert ran.done and ran.summary["metrics"]["finished"] == 20 and len(answers) == 22
    assert len({tuple(entry["prompt_head"]) for entry in answers}) == 22, "warm-up prompts are others"
    edges = sorted((float(row[key]), step) for row in ran.rows for key, step in (("sent_s", 1), ("finish_s", -1)))
    under_way = most = 0
    for _, step in edges:
        under_way += step
        most = max(most, under_way)
    assert most == 4
    assert [float(row["arrival_s"]) for row in ran.rows] == sorted(float(row["arrival_s"]) for row in ran.rows)


FAULTS = {
    "500": ("http-500", "out of memory or so"),
    "refuse": ("disconnected", ""),
    "half": ("cut-short", ""),
    "stop": ("cut-short", ""),
    "garbage": ("bad-response", "this is no JSON"),
    "nonsense": ("bad-response", "no HTTP"),
    "error": ("server-error", "the engine died"),
    "silent": ("timeout", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_kind_of_failure_has_its_name_and_spoils_nothing_else(tmp_path: Path, fault: str) -> None:
    kind, message = FAULTS[fault]
    words = ("--timeout", "2") if fault == "silent" else ()
    with serving(tmp_path, "--ttft", "0.02", "--itl", "0.002", "--fault", fault, "--every", "3") as server:
        ran = run(tmp_path / "out", "--url", server.url, "--rate", "60", "--count", "12", *LENGTHS, "--slo", "ttft=5", *words)
    metrics = ran.summary["metrics"]
    assert ran.summary["errors"] == {kind: 4} and (metrics["finished"], metrics["failed"], metrics["cut"]) == (8, 4, 0)
    assert metrics["attainment"] == pytest.approx(8 / 12), "a failure is not good"
    failed = [row for row in ran.rows if row["status"] == "failed"]
    assert len(failed) == 4 and all(
        message in row["message"] and row["error"] == kind and not row["finish_s"] for row in failed
    )
    assert f"4 {kind}" in ran.said and message in ran.said


def test_a_slow_answer_is_slow_and_not_failed(tmp_path: Path) -> None:
    with serving(tmp_path, "--ttft", "0.05", "--itl", "0.002", "--fault", "slow", "--every", "5") as server:
        ran = run(tmp_path / "out", "--url", server.url, "--rate", "60", "--count", "20", *LENGTHS, "--slo", "ttft=0.45")
    assert ran.summary["metrics"]["finished"] == 20 and ran.summary["errors"] == {}
    slow = sum(float(row["ttft_s"]) > 0.45 for row in ran.rows)
    assert slow >= 4 and ran.summary["metrics"]["attainment"] == pytest.approx(1 - slow / 20)


def test_a_server_that_dies_meanwhile_is_refused_connections_afterwards(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(tmp_path, "--ttft", "0.01", "--itl", "0.001", "--no-keep-alive"))
        process = begin(
            tmp_path / "out", "--url", server.url, "--arrivals", "deterministic", "--rate", "20", "--count", "60", *LENGTHS
        )
        wait_for(server.log)
        stack.close()
        said, complained = process.communicate(timeout=60)
    errors = json.loads((tmp_path / "out" / "metrics.json").read_text())["errors"]
    assert errors["refused"] >= 1 and process.returncode in (0, 1) and "Traceback" not in complained, (said, complained)


def wait_for(log: Path) -> None:
    end_s = time.monotonic() + 30
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < end_s, "no request ended"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path, number: int) -> None:
    with serving(tmp_path, "--ttft", "0.05", "--itl", "0.05") as server:
        process = begin(
            tmp_path / "out", "--url", server.url, "--arrivals", "deterministic", "--rate", "20", "--count", "4000", *LENGTHS
        )
        wait_for(server.log)
        process.send_signal(number)
        said, complained = process.communicate(timeout=60)
    ran = Ran(process.returncode, said, complained, tmp_path / "out")
    assert ran.code == 128 + number and "Traceback" not in complained, complained
    summary, records = ran.summary, read_records(tmp_path / "out")
    assert summary["cut_off"] is True and summary["unsent"] == 4000 - len(records) and "not sent" in said
    assert (
        (records.status == FINISHED).sum() >= 1 and (records.status == CUT).sum() >= 1 and not (records.status == FAILED).any()
    )
    assert summary["metrics"]["attainment"] == 1.0, "what was cut off is neither good nor bad"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mock.log", "out"]


def test_a_killed_client_leaves_nothing_half_written(tmp_path: Path) -> None:
    with serving(tmp_path, "--ttft", "0.01", "--itl", "0.01") as server:
        process = begin(
            tmp_path / "out", "--url", server.url, "--arrivals", "deterministic", "--rate", "20", "--count", "4000", *LENGTHS
        )
        wait_for(server.log)
        process.kill()
        process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["mock.log"]


def test_the_end_of_grace_cuts_off_what_is_under_way(tmp_path: Path) -> None:
    with serving(tmp_path, "--ttft", "0.02", "--itl", "0.001", "--fault", "silent", "--every", "4") as server:
        ran = run(tmp_path / "out", "--url", server.url, "--rate", "50", "--count", "12", *LENGTHS, "--grace", "2")
        left = [entry for entry in server.answers().values() if entry["fault"] == "silent"]
    metrics = ran.summary["metrics"]
    assert (metrics["finished"], metrics["failed"], metrics["cut"]) == (9, 0, 3) and not ran.summary["cut_off"]
    assert metrics["attainment"] == 1.0 and len(left) == 3


def test_adapters_are_models_and_unknown_ones_stop_the_run_before_it_begins(tmp_path: Path) -> None:
    flags = ("--rate", "50", "--count", "6", *LENGTHS, "--adapters", "2")
    with serving(tmp_path, "--model", "base", "--model", "adapter-0", "--model", "adapter-1", "--ttft", "0.01") as server:
        ran = run(tmp_path / "out", "--url", server.url, *flags)
        assert ran.done and [row["adapter"] for row in ran.rows] == ["adapter-0", "adapter-1"] * 3
        models = [entry["model"] for entry in server.answers().values()]
        assert sorted(models) == ["adapter-0"] * 3 + ["adapter-1"] * 3
        other = run(tmp_path / "other", "--url", server.url, *flags, "--adapter-model", "lora-{adapter}")
        assert other.code == 2 and "lora-adapter-0" in other.complained and not other.out.exists()
        assert run(tmp_path / "x", "--url", server.url, *flags, "--model", "nobody").code == 2


@pytest.mark.parametrize("words", [(), ("--no-usage",), ("--tokens-per-event", "3"), ("--no-keep-alive",)])
@pytest.mark.parametrize("route", ["completions", "chat"])
def test_tokens_are_counted_however_the_server_sends_them(tmp_path: Path, route: str, words: tuple[str, ...]) -> None:
    kind = ("--route", "chat", "--kind", "openai") if route == "chat" else ()
    with serving(tmp_path, "--ttft", "0.01", "--itl", "0.001", *words) as server:
        ran = run(tmp_path / "out", "--url", server.url, "--concurrency", "2", "--count", "4", *LENGTHS, *kind)
    assert ran.summary["metrics"]["finished"] == 4 and ran.summary["metrics"]["other_length"] == 0, ran.said
    assert {(row["input_tokens"], row["output_tokens"]) for row in ran.rows} == {("20", "10")}
    assert {row["events"] for row in ran.rows} == {"4" if "3" in words else "10"}


def test_nobody_there_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        ran = run(tmp_path / "out", "--url", url, "--rate", "5", "--count", "6", *LENGTHS)
    assert ran.code == 2 and ran.complained.count("\n") == 1 and "no server answers there (refused" in ran.complained
    assert not ran.out.exists()


def test_tls_is_spoken_and_certificates_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = tmp_path / "mock.pem"
    pem.write_bytes(self_signed("localhost"))
    with serving(tmp_path, "--ttft", "0.01", "--itl", "0.001", "--host", "localhost", "--certificate", str(pem)) as server:
        assert server.url.startswith("https://localhost:")
        flags = ("--url", server.url, "--concurrency", "2", "--count", "4", *LENGTHS)
        refused = run(tmp_path / "refused", *flags)
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        ran = run(tmp_path / "out", *flags)
    assert refused.code == 2 and "certificate" in refused.complained and refused.complained.count("\n") == 1
    assert ran.done and ran.summary["metrics"]["finished"] == 4


def self_signed(name: str) -> bytes:
    """A key and its certificate for `name`, PEM."""
    now = datetime.datetime.now(datetime.UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    made = (
        made.serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    encoded = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return encoded + made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_what_it_measured_can_be_sent_again_and_simulated(tmp_path: Path) -> None:
    with serving(tmp_path, "--ttft", "0.01", "--itl", "0.001") as server:
        flags = ("--url", server.url, "--rate", "50", "--count", "10", *LENGTHS)
        first = run(tmp_path / "first", *flags)
        again = run(tmp_path / "again", "--url", server.url, "--requests", str(tmp_path / "first" / "requests.csv"))
        occupied = run(tmp_path / "first", *flags)
        replaced = run(tmp_path / "first", *flags, "--overwrite", "--seed", "1")
    assert first.done and [row["arrival_s"] for row in again.rows] != [row["arrival_s"] for row in replaced.rows]
    assert again.summary["metrics"]["finished"] == 10
    assert occupied.code == 2 and "--overwrite" in occupied.complained and replaced.done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "first", "mock.log"]
    simulate = ["--model", "llama-3.1-8b", "--hardware", "h100", "--out", str(tmp_path / "simulated")]
    command = [
        sys.executable,
        "-m",
        "systems.common.simulate",
        "--requests",
        str(tmp_path / "again" / "requests.csv"),
        *simulate,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_host_may_name_the_server_and_its_key_is_never_shown(tmp_path: Path, root: Path) -> None:
    hosts = tmp_path / "hosts.yaml"
    with serving(tmp_path, "--ttft", "0.01", "--itl", "0.001") as server:
        entry = {"url": server.url, "kind": "vllm", "model": "mock", "api_key": "env:LOAD_TEST_KEY"}
        hosts.write_text(json.dumps({"hosts": [{"name": "there", "endpoint": entry}]}))
        out = tmp_path / "out"
        words = ["--concurrency", "2", "--count", "4", *LENGTHS, "--no-progress", "--out", str(out)]
        command = [sys.executable, "-m", "harness.load", "--inventory", str(hosts), "there", *words]
        environment = {**os.environ, "LOAD_TEST_KEY": "aVerySecretKey123"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False, timeout=100)
        without = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, timeout=100)
        doctor = [sys.executable, "-m", "harness.doctor", "--inventory", str(hosts)]
        looked = subprocess.run(doctor, capture_output=True, text=True, env=environment, cwd=root, check=False, timeout=100)
    assert done.returncode in (0, 1) and "4 finished" in done.stdout, done.stderr
    written = "".join(path.read_text(errors="replace") for path in (*out.iterdir(), server.log))
    assert "aVerySecretKey123" not in done.stdout + done.stderr + looked.stdout + looked.stderr + written
    assert "serves mock" in looked.stdout and "there: endpoint" in looked.stdout
    assert without.returncode == 2 and "there.endpoint.api_key" in without.stderr and "LOAD_TEST_KEY" in without.stderr
