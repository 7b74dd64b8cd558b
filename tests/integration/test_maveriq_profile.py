"""The profiler with real engines on a CPU: end to end, ranks, what fails alone, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("torch")

from systems.common.errors import InputError
from systems.maveriq.controller.profiling import Profiler
from systems.maveriq.profile.crew import Crew, Worker
from systems.maveriq.profile.jobs import Job

ROOT = Path(__file__).resolve().parents[2]
TINY = Job("tiny", 1, (1,), output_lengths=(3,), prompt_tokens=8, compute="fp32", device="cpu", warmups=0, repeats=2)
QUICK = ["--device", "cpu", "--output-lengths", "3,5", "--prompt-tokens", "8", "--repeats", "2", "--warmups", "1"]
LIMIT_S = 120


def workers():
    """Our workers and ranks that run now, children of this process."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if {"systems.maveriq.profile.worker", "systems.common.torch_engine.parallel.rank"} & set(child.cmdline()):
                found.append(child)
    return found


def run(module, *options):
    command = [sys.executable, "-m", module, *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_a_profile_on_a_cpu_is_read_by_estimate(tmp_path):
    out = tmp_path / "tiny.csv"
    done = run(
        "systems.maveriq.profile", "--model", "tiny", *QUICK, "--out", out, "--layouts", "1x1,1x2", "--dtypes", "float16",
        "--batches", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.open()))
    assert [(row["PP"], row["PP_Map"], row["Output_Lenght"]) for row in rows] == [
        ("1", "1", "3"), ("1", "1", "5"), ("1", "2", "3"), ("1", "2", "5"), ("2", "1 1", "3"), ("2", "1 1", "5"),
    ]  # fmt: skip
    assert all(float(row[key]) > 0 for row in rows for key in ("Latency", "Memory-After-Run", "Time-Prof", "Latency-Served"))
    assert {row["Latency"] == row["Latency-Launched"] for row in rows} == {True}
    assert "1 of 4 engines left out: they need more layers" in done.stderr
    told = json.loads(out.with_suffix(".provenance.json").read_text())
    assert "no GPU memory was measured" in told["memory"]
    assert told["failed"] == {}
    said = run("systems.maveriq.estimate", "--fingerprints", out, "--model", "tiny", "--tp", 1, "--pp", 1, "--dtype", "float16")
    assert said.returncode == 0, said.stderr
    assert "latency" in said.stdout
    assert not workers()


def test_both_clocks_time_the_same_request():
    """More tokens, more time, by either clock: neither leaves the decode steps out."""
    timing = pytest.importorskip("systems.maveriq.profile.timing")
    job = Job("tiny", 1, (2,), output_lengths=(40,), prompt_tokens=8, compute="fp32", device="cpu", batch=2, repeats=3)
    with timing.engine(job) as live:
        asker = timing.Asker(live, job)
        taken = {}
        for way in ("served", "launched"):
            ask = getattr(asker, way)
            ask(40)
            taken[way] = [min(ask(length)[0] for _ in range(5)) for length in (2, 40)]
            assert live.executor.tables.free_blocks == live.engine.config.num_gpu_blocks or live.engine.finished
        for short, long in taken.values():
            assert long > 3 * short
        _, tokens = live.generate(asker._requests(5))  # the engine is as it was
        assert [len(one) for one in tokens] == [5, 5]


def test_launched_steps_decode_what_the_engine_decodes():
    """The launched steps run the model: keys of all new tokens are in the cache, as long as they should be."""
    timing = pytest.importorskip("systems.maveriq.profile.timing")
    import torch

    with timing.engine(TINY) as live:
        asker = timing.Asker(live, TINY)
        lengths = []
        half = live.executor.half
        plain = half.decode

        def watched(*given):
            tokens = plain(*given)
            lengths.append(int(live.executor.cache.lengths.max()))
            return tokens

        half.decode = watched
        asker.launched(6)
        assert lengths == [9, 10, 11, 12, 13]  # a prompt of 8, its first token by the prompt's step, five by these
        del half.decode
        with torch.inference_mode():
            assert live.generate(asker._requests(4))[1][0]


def test_ranks_are_measured_together_and_a_job_that_fails_fails_alone():
    with Crew() as crew:
        split = crew.do(Job.from_json({**TINY.to_json(), "tp": 2}), LIMIT_S)
        impossible = crew.do(Job.from_json({**TINY.to_json(), "tp": 3}), LIMIT_S)
        after = crew.do(TINY, LIMIT_S, more=0)
    assert len(split.rows) == 1, split.error
    assert split.rows[0]["memory_gib"] > after.rows[0]["memory_gib"]  # the other rank's process counts
    assert not impossible.rows
    assert "4 heads" in impossible.error
    assert not after.error
    assert not workers()


def test_a_job_that_takes_too_long_is_an_error_of_its_own():
    with Crew() as crew:
        slow = crew.do(Job.from_json({**TINY.to_json(), "repeats": 10**9}), 1.0, more=0)
    assert not slow.rows
    assert "took too long" in slow.error
    assert not workers()


def test_a_worker_that_is_killed_says_so():
    with Crew() as crew:
        crew._ready.append(Worker())
        os.kill(crew._ready[0].process.pid, signal.SIGKILL)
        found = crew.do(TINY, LIMIT_S, more=0)
    assert not found.rows
    assert found.error


def test_workers_end_with_the_profiler(tmp_path):
    command = [sys.executable, "-m", "systems.maveriq.profile", "--model", "tiny", *QUICK, "--repeats", "100000000"]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "x.csv")], cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + LIMIT_S
    while not (found := workers()) and time.monotonic() < until:
        process.poll()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert found
    psutil.wait_procs(found, timeout=LIMIT_S / 2)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in found)
    assert not (tmp_path / "x.csv").exists()


FAKE = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.write_text("from " + sys.argv[sys.argv.index("--model") + 1])
print("a line", file=sys.stderr)
sys.exit({code})
"""


@pytest.mark.parametrize("code", [0, 1, 2])
def test_register_takes_what_the_profiler_wrote(tmp_path, code):
    async def scenario():
        return await Profiler(tmp_path / "kept", (sys.executable, "-c", FAKE.format(code=code))).run("tiny")

    if code == 0:
        assert asyncio.run(scenario()).read_text() == "from tiny"
        return
    with pytest.raises(InputError) as error:
        asyncio.run(scenario())
    assert "a line" in str(error.value)
    assert ("takes what it has measured" in str(error.value)) == (code == 1)


def test_a_profiler_ends_with_the_controller(tmp_path):
    code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[-1]).write_text(str(os.getpid())); time.sleep(600)"

    async def scenario():
        profiler = Profiler(tmp_path, (sys.executable, "-c", code))
        task = asyncio.create_task(profiler.run("tiny"))
        file = tmp_path / "tiny.csv"
        while not (file.exists() and file.read_text()):
            await asyncio.sleep(0.01)
        await profiler.close()
        with pytest.raises(InputError):
            await task
        return int(file.read_text())

    pid = asyncio.run(asyncio.wait_for(scenario(), LIMIT_S))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
