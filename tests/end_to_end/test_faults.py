"""Bad input and faults, by real `snakemake` commands: one clear line, nothing half-written, and a rerun that mends it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import Project


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for `condition`; the limit only keeps a broken test from hanging."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def lines(text: str) -> list[str]:
    """What Snakemake itself does not say at every start."""
    return [line for line in text.splitlines() if line and not line.startswith("Using workflow specific profile")]


CONFIG, FIGURE, HOSTS = "config/config.yaml", "figures/fake/knee.yaml", "hosts/local.yaml"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (CONFIG, "backend:", "bakcend:", "bakcend: 'simulated': unknown key, did you mean backend?"),
        (CONFIG, "simulated", "simulate", "backend: 'simulate': unknown value, did you mean simulated?"),
        (CONFIG, "seed: 0", "seed: -1", "seed: -1: use greater than or equal to 0"),
        (CONFIG, "seed: 0", "seed: 0\nseed: 1", "line 8: 'seed': this key is there twice: keep one"),
        (FIGURE, "tolerance", "tolerence", "search.tolerence: 0.05: unknown key, did you mean tolerance?"),
        (
            FIGURE,
            "{latency_p99_s: 1}",
            "{latency_p99_s: 0}",
            "search.limits.latency_p99_s: 0.0: a limit must be above 0",
        ),
        (FIGURE, "grouped_bars", "grouped_bar", "plot.kind: 'grouped_bar': unknown kind of plot, did you mean grouped_bars?"),
        (FIGURE, "over: theirs", "over: their", "claims: ['K1', 'K2']: claim K1 names series 'their'"),
        (FIGURE, "parameters:", "datasets: [azure]\nparameters:", "datasets: 'azure': not in datasets/registry.yaml"),
        (FIGURE, "title: A", "title: [A", "line 2: "),
        (HOSTS, "local: true", "locale: true", "hosts.0.locale: True: unknown key, did you mean local?"),
    ],
)
def test_a_mistyped_file_ends_in_one_line(project: Project, file: str, old: str, new: str, said: str) -> None:
    project.edit(file, old, new)
    done = project.snakemake("knee")
    assert done.returncode != 0
    assert len(lines(done.stderr)) == 1 and f"{file}: {said}" in done.stderr, done.stderr
    assert not (project.root / "results").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("bakcend=measured", "--config: bakcend: 'measured': unknown key, did you mean backend?"),
        ("backend=measured", "config: backend: 'measured': figures/fake/knee.yaml has simulated"),
        ("hardware=h100x1", "config: hardware: 'h100x1': figures/fake/knee.yaml does not say how to rescale"),
        ("dataset_mirror=nowhere", "--config: dataset_mirror: 'nowhere': no such folder"),
    ],
)
def test_a_wrong_setting_ends_in_one_line(project: Project, setting: str, said: str) -> None:
    text = project.figure.read_text()
    project.figure.write_text(text[: text.index("rescale:")])
    done = project.snakemake("knee", "--config", setting)
    assert done.returncode != 0
    assert said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (project.root / "results").exists()


def test_a_parameter_that_the_experiment_refuses_is_named_with_its_series_and_point(project: Project) -> None:
    project.edit(project.figure, "parameters: {knee: 40}", "parameters: {knee: 40, nee: 2}")
    done = project.snakemake("knee", "--retries", "2")
    assert done.returncode != 0
    assert "figures/fake/knee.yaml: series ours at rate_rps=1, knob=" in done.stderr
    assert done.stderr.count("ours at rate_rps=1, knob=") == 1 and "Trying to restart" not in done.stderr, "it can't go better"
    assert ": fake: nee: 2: use one of knee, knob, rate_rps" in done.stderr
    assert not list(project.results.glob("series/*.parquet"))


def test_two_runs_in_one_folder(project: Project) -> None:
    project.environment["FAKE_SLEEP_S"] = "0.1"
    first = project.start("knee")
    until(project.ran)
    second = project.snakemake("knee")
    dry = project.snakemake("-n", "knee")
    out, err = first.communicate(timeout=300)
    assert second.returncode != 0
    said = [line for line in lines(second.stderr) if "is running Snakemake here" in line]
    assert len(said) == 1 and f"process {first.pid} on" in said[0]
    assert "Traceback" not in second.stderr and "--unlock" not in second.stderr
    assert dry.returncode == 0
    assert first.returncode == 0, out + err
    assert len(project.ran()) == len(set(project.ran()))
    assert "Nothing to be done" in project.build("knee").stderr


def series_processes(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Whatever runs series: their own processes, those that wait for them, and the server that they are forked from."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if {"harness.series", "harness.warm.server"} & set(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def finished(project: Project) -> set[str]:
    """The trials that are there, each as the fake system logs it."""
    specs = [json.loads(path.read_text()) for path in project.root.glob("results/trials/[!.]*/spec.json")]
    return {json.dumps({"parameters": spec["parameters"], "seed": spec["seed"]}, sort_keys=True) for spec in specs}


def killed_at_random(project: Project, whom: str, chance: random.Random) -> None:
    """Start a run and, at a random time after its first probe, `kill -9` Snakemake or one of its series."""
    before = len(project.ran())
    run = project.start("knee")
    until(lambda: len(project.ran()) > before or run.poll() is not None)
    time.sleep(chance.uniform(0, 1))
    children = series_processes(run) if run.poll() is None else []
    if whom == "snakemake":
        run.kill()
    elif children:
        chance.choice(children).kill()
    run.communicate(timeout=300)
    psutil.wait_procs(children, timeout=60)
    assert not [child for child in children if child.is_running()], "a series runs on without its Snakemake"


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["snakemake", "series"])
def test_kill_at_random_points_then_rerun(new_project: Callable[[str], Project], whom: str) -> None:
    undisturbed, project = new_project("undisturbed"), new_project("project")
    undisturbed.build("knee")
    project.environment["FAKE_SLEEP_S"] = "0.1"
    chance = random.Random(whom)
    for _ in range(10):
        done, ran = finished(project), project.ran()
        killed_at_random(project, whom, chance)
        assert not done & set(project.ran()[len(ran) :]), "a finished trial was run again"
        for metrics in project.root.glob("results/trials/[!.]*/metrics.json"):
            json.loads(metrics.read_text())
    project.environment.clear()
    project.build("knee")
    assert project.outputs() == undisturbed.outputs()
    assert finished(project) == finished(undisturbed)


def test_a_second_run_of_a_series_waits_for_the_first(project: Project) -> None:
    """An orphan, or two Snakemakes on two machines that share the folder."""
    project.build("knee")
    for product in (project.results / "series" / "ours.parquet", project.results / "table.csv"):
        product.unlink()
    holder = project.results / "series" / "ours.lock"
    command = f"exec 9>>{holder} && flock 9 && echo process $$ >&9 && echo held && read line"
    with subprocess.Popen(["bash", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        run = project.start("knee")
        log = project.results / "logs" / "ours.log"
        until(lambda: log.exists() and "waiting until it ends" in log.read_text())
        assert not (project.results / "series" / "ours.parquet").exists()
        other.communicate("done\n", timeout=60)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, out + err
    assert (project.results / "series" / "ours.parquet").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("left_kib", [0, 8, 40, 150])
def test_a_full_disk_ends_in_one_line_and_the_rerun_carries_on(project: Project, small_disk: Path, left_kib: int) -> None:
    setting = ["--config", f"results={small_disk}/results"]
    (small_disk / "results").mkdir()
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk)
    ballast.write_bytes(b"\0" * (free.f_bavail * free.f_frsize - left_kib * 1024))
    done = project.snakemake("knee", *setting)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "free some space" in line or "No space left" in line]
    assert said, done.stderr
    assert "Traceback (most recent" not in done.stderr, done.stderr
    assert not list(small_disk.rglob(".*.tmp"))
    for path in small_disk.rglob("[!.]*/*.json"):
        json.loads(path.read_text())
    ballast.unlink()
    project.build("knee", *setting)
    assert len(project.ran()) - len(set(project.ran())) <= 2  # at most the trial of each series that could not be kept


@pytest.mark.parametrize(("sent", "status", "said"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
def test_a_series_that_is_told_to_stop_keeps_what_is_finished(
    project: Project, sent: signal.Signals, status: int, said: str
) -> None:
    out = project.results / "series" / "ours.parquet"
    command = [
        "harness.series",
        "--figure",
        "figures/fake/knee.yaml",
        "--series",
        "ours",
        "--results",
        "results",
        "--out",
        str(out),
    ]
    environment = {**os.environ, "FAKE_LOG": str(project.log), "FAKE_SLEEP_S": "0.05"}
    start = partial(subprocess.Popen, cwd=project.root, env=environment, text=True, stderr=subprocess.PIPE)
    run = start([sys.executable, "-m", *command])
    until(lambda: len(project.ran()) >= 5)
    run.send_signal(sent)
    err = run.communicate(timeout=60)[1]
    assert run.returncode == status
    assert err.splitlines()[-1] == f"{said}; what is finished is kept" and "Traceback" not in err
    done, ran = finished(project), project.ran()
    assert len(done) >= 4 and not out.exists()
    again = start([sys.executable, "-m", *command])
    assert again.communicate(timeout=300) and again.returncode == 0
    assert out.exists() and not done & set(project.ran()[len(ran) :])


@pytest.mark.parametrize("read", [3, 34])
def test_a_run_whose_output_nobody_reads_any_more_is_finished(project: Project, read: int) -> None:
    """`snakemake knee 2>&1 | head -n N`: Snakemake by itself waits for ever when the pipe breaks under a running job."""
    project.environment["FAKE_SLEEP_S"] = "0.02"
    command = f'"{sys.executable}" -m snakemake knee 2>&1 | head -n {read}; exit "${{PIPESTATUS[0]}}"'
    environment = {**os.environ, **project.environment}
    done = subprocess.run(
        ["bash", "-c", command], cwd=project.root, env=environment, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0
    assert len(project.outputs()) == 4
