"""What provisioning would find out about this machine, and the same asked in other ways, as JSON.

    python -m benchmarks.host_facts [--gpus h200x1 ...] [--work-dir DIR] [--out FILE]      (from the checkout's root)

Any Python from 3.11 on, without a package. `facts` is what `snakemake provision` would keep of this machine as a host, by the
same script and the same reading of its answer; `problems` is why it would refuse a host with the GPUs of `--gpus`, `notes` what
it would remark. `beside` has what Python, /proc and PyTorch (where installed) say; `differs` names what does not agree.
Ends with 1 when something differs or is a problem.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.provision import facts
from harness.provision.facts import Facts

_GIB = 2**30


@dataclass(frozen=True)
class Runner:
    """How jobs would run."""

    kind: str = "venv"


@dataclass(frozen=True)
class Gpu:
    """GPUs as an inventory describes them."""

    model: str
    count: int
    memory_gib: float | None = None


@dataclass(frozen=True)
class Machine:
    """This machine as an inventory would describe it: what `facts.problems` asks of a host."""

    gpus: tuple[Gpu, ...]
    runner: Runner = Runner()


def main() -> int:
    """Ask, print, and say whether all agrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="*", default=[], metavar="MODELxN", help="GPUs that it is said to have, such as h200x1")
    parser.add_argument("--work-dir", default=str(Path.cwd()), help="where the project's files would go")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    told = gather(tuple(map(_gpu, args.gpus)), args.work_dir)
    text = json.dumps(told, indent=1, sort_keys=True)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    return int(bool(told["differs"] or told["problems"]))


def _gpu(text: str) -> Gpu:
    model, _, count = text.rpartition("x")
    if not (model and count.isdigit()):
        raise SystemExit(f"--gpus: {text!r}: use <model>x<count>, such as h200x1")
    return Gpu(model, int(count))


def gather(gpus: tuple[Gpu, ...], work_dir: str) -> dict[str, Any]:
    """The facts of this machine, judged and compared."""
    began = time.perf_counter()
    answer = facts.ask(_run, work_dir, make=False)
    took_s = time.perf_counter() - began
    machine: Any = Machine(gpus)
    beside = others(work_dir)
    return {
        "facts": asdict(answer.facts),
        "summary": facts.summary(answer.facts),
        "took_s": round(took_s, 3),
        "problems": [f"{what}: {mend}" for what, mend in facts.problems(machine, answer.facts)],
        "notes": list(facts.notes(answer.facts)),
        "beside": beside,
        "differs": list(differences(answer.facts, beside)),
    }


def _run(argv: list[str]) -> str:
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True, stdin=subprocess.DEVNULL).stdout


def others(work_dir: str) -> dict[str, Any]:
    """The same in other ways, as far as there are any; what cannot be asked is left out."""
    found: dict[str, Any] = {
        "hostname": platform.node(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB, 1),
        "free_gib": shutil.disk_usage(work_dir).free / _GIB,
        "python": platform.python_version(),
        "engines": [name for name in ("docker", "podman") if shutil.which(name)],
    }
    if models := sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        found["gpus"] = [_field("Model", path) for path in models]
    if (version := Path("/proc/driver/nvidia/version")).is_file():
        found["driver"] = next(iter(re.findall(r"(?:Module|x86_64)\s+(\d+\.[\d.]+)", version.read_text())), "")
    return {**found, **_torch()}


def _field(name: str, path: Path) -> str:
    return next((line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith(name)), "")


def _torch() -> dict[str, Any]:
    """What PyTorch sees, in a process of its own: it may be absent, and it takes the GPU."""
    code = (
        "import json, torch; t = torch.cuda; print(json.dumps([torch.version.cuda, "
        "[[p.name, p.total_memory] for p in map(t.get_device_properties, range(t.device_count()))]]))"
    )
    try:
        cuda, gpus = json.loads(_run([sys.executable, "-c", code]))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    memory_mib = [memory / 2**20 for _, memory in gpus]
    return {"torch_cuda": cuda, "torch_gpus": [name for name, _ in gpus], "torch_memory_mib": memory_mib}


def differences(found: Facts, beside: Mapping[str, Any]) -> Iterator[str]:
    """What the facts say otherwise; sizes may differ by a twentieth (drivers and kernels keep some memory to themselves)."""
    gpus = [gpu.name for gpu in found.gpus]
    said = {**asdict(found), "engines": list(found.engines), "gpus": gpus, "torch_gpus": gpus}
    said |= {"driver": found.gpus[0].driver if found.gpus else "", "torch_memory_mib": [gpu.memory_mib for gpu in found.gpus]}
    for name, value in beside.items():
        if name not in said:
            continue
        if not _alike(said[name], value):
            yield f"{name}: {said[name]!r}, and asked otherwise {value!r}"


def _alike(one: object, other: object) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, sorted(one), sorted(other)))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 0.05 * max(abs(one), abs(other))
    return one == other


if __name__ == "__main__":
    raise SystemExit(main())
