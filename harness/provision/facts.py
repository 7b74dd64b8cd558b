"""What a host has: asked by one small script that needs nothing but a shell, judged by plain functions."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.atomic import write_atomically

if TYPE_CHECKING:  # so that a bare Python can gather facts of its own machine (benchmarks/host_facts.py)
    from harness.inventory import Gpu, Host

NEEDED_GIB = 2.0
"""Free disk for the environment while it is made: packages, and the files unpacked from them."""
CLOCK_S = 1.0
"""By how much a host's clock may be off before logs of several hosts cannot be read side by side."""
# $1: the work folder; $2: `make` it, or only look
SCRIPT = r"""LC_ALL=C; export LC_ALL
say() { printf '%s=%s\n' "$1" "$(printf %s "$2" | tr '\n' ' ')"; }
say time "$(date +%s.%N)"
top=; d=$1; while [ ! -d "$d" ] && [ "$d" != / ]; do top=$d; d=$(dirname -- "$d"); done
if [ "$2" = make ]; then mkdir -p -- "$1" || exit 3; [ -w "$1" ] || { echo "$1 cannot be written" >&2; exit 3; }; d=$1; say made "$top"; fi
if [ -e "$1/checkout" ]; then say taken yes; fi
if [ -e "$1/.fivefold.json" ]; then say state "$(cat -- "$1/.fivefold.json")"; fi
say hostname "$(hostname 2>/dev/null || uname -n)"
say system "$(uname -sr)"
say machine "$(uname -m)"
say os "$(sed -n 's/^PRETTY_NAME="\{0,1\}\([^"]*\).*/\1/p' /etc/os-release 2>/dev/null)"
say cpu "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say cpus "$(getconf _NPROCESSORS_ONLN 2>/dev/null)"
say memory_kib "$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo 2>/dev/null)"
say free_kib "$(df -Pk -- "$d" 2>/dev/null | sed -n '2p' | tr -s ' ' | cut -d ' ' -f 4)"
say clock_synchronised "$(timedatectl show -p NTPSynchronized --value 2>/dev/null)"
for p in python3 python3.13 python3.12 python3.11; do
  found=$("$p" -I -c 'import sys, platform, importlib.util as u
print(platform.python_version(), "venv" if u.find_spec("ensurepip") else "no-venv", sys.executable)
sys.exit(10 if sys.version_info >= (3, 11) and u.find_spec("ensurepip") else 0)' 2>/dev/null); good=$?
  if [ -n "$found" ]; then say python "$p $found"; fi
  if [ $good -eq 10 ]; then break; fi
done
for e in docker podman; do if command -v $e >/dev/null 2>&1; then say engine $e; fi; done
if command -v nvidia-smi >/dev/null 2>&1; then
  say nvidia_smi yes
  say cuda "$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p' | head -n 1)"
  nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm,clocks.max.mem --format=csv,noheader,nounits 2>/dev/null |
    while IFS= read -r line; do say gpu "$line"; done
fi
say end yes
"""  # noqa: E501


@dataclass(frozen=True, slots=True)
class Python:
    """An interpreter on the host: the word to call it by, its version, and whether it can make environments."""

    name: str
    version: str
    venv: bool
    path: str

    @property
    def minor(self) -> tuple[int, int]:
        """Such as (3, 11)."""
        major, minor, *_ = self.version.split(".")
        return int(major), int(minor)


@dataclass(frozen=True, slots=True)
class FoundGpu:
    """One GPU as its driver describes it; clocks are the highest that it may take."""

    name: str
    memory_mib: float
    driver: str
    sm_mhz: float
    memory_mhz: float


@dataclass(frozen=True, slots=True)
class Facts:
    """What a host has. `lasting` is what does not change from one minute to the next."""

    hostname: str
    system: str
    machine: str
    os: str
    cpu: str
    cpus: int
    memory_gib: float
    pythons: tuple[Python, ...]
    engines: tuple[str, ...]
    gpus: tuple[FoundGpu, ...]
    cuda: str
    clock_synchronised: str
    free_gib: float
    clock_offset_s: float
    clock_error_s: float

    @property
    def lasting(self) -> dict[str, Any]:
        """As plain data, without free disk and clock."""
        changing = {"free_gib", "clock_offset_s", "clock_error_s"}
        return {key: value for key, value in asdict(self).items() if key not in changing}

    @property
    def python(self) -> Python | None:
        """The interpreter to make the environment with: new enough and able to."""
        return next((python for python in self.pythons if python.minor >= (3, 11) and python.venv), None)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the script said: the facts, the state of the host's work folder, and the topmost folder that was made for it."""

    facts: Facts
    state: Mapping[str, Any] | None
    made: str
    taken: bool


def ask(run: Callable[[list[str]], str], root: str, *, make: bool) -> Answer:
    """Ask a host for its facts. `run` gives what a command there prints."""
    before = time.time()
    text = run(["sh", "-c", SCRIPT, "facts", root, "make" if make else "look"])
    return parse(text, before, time.time())


def parse(text: str, before: float, after: float) -> Answer:
    """The answer in what the script printed; it was asked `before` and had answered `after`, in seconds since the epoch."""
    said: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition("=")
        said.setdefault(key, []).append(value.strip())
    one = {key: values[0] for key, values in said.items()}
    facts = Facts(
        **{key: one.get(key, "") for key in ("hostname", "system", "machine", "os", "cpu", "cuda", "clock_synchronised")},
        cpus=int(_number(one.get("cpus"))),
        memory_gib=round(_number(one.get("memory_kib")) / 2**20, 1),
        pythons=tuple(_pythons(said.get("python", []))),
        engines=tuple(said.get("engine", [])),
        gpus=tuple(_gpus(said.get("gpu", []))),
        free_gib=_number(one.get("free_kib")) / 2**20,
        clock_offset_s=_number(one.get("time")) - (before + after) / 2,
        clock_error_s=(after - before) / 2,
    )
    return Answer(facts, _state(one.get("state", "")), one.get("made", ""), "taken" in one)


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _pythons(lines: list[str]) -> Iterator[Python]:
    for line in lines:
        words = line.split(maxsplit=3)
        if len(words) == 4 and re.fullmatch(r"\d+\.\d+\S*", words[1]):
            yield Python(words[0], words[1], words[2] == "venv", words[3])


def _gpus(lines: list[str]) -> Iterator[FoundGpu]:
    for line in lines:
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 5:
            yield FoundGpu(cells[0], _number(cells[1]), cells[2], _number(cells[3]), _number(cells[4]))


def _state(text: str) -> Mapping[str, Any] | None:
    try:
        found = json.loads(text) if text else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


# -- judging -----------------------------------------------------------------------------------------------------------


def problems(host: Host, facts: Facts, *, needs_space: bool = True) -> Iterator[tuple[str, str]]:
    """What keeps the host from doing what the inventory says: what it is, and the mend."""
    if host.runner.kind == "venv" and facts.python is None:
        yield _no_python(facts)
    if host.runner.kind == "container" and not facts.engines:
        yield "no container engine", "install Docker or Podman there, or use `runner: {kind: venv}`"
    if needs_space and facts.free_gib < NEEDED_GIB:
        yield f"{facts.free_gib:.1f} GiB free at work_dir", f"free some space: {NEEDED_GIB:g} GiB, or choose another work_dir"
    for gpu in host.gpus:
        found = sum(is_model(gpu.model, here.name) for here in facts.gpus)
        if found < gpu.count:
            has = ", ".join(sorted({here.name for here in facts.gpus})) or "no GPU that nvidia-smi lists"
            yield f"{found} of {gpu.count} x {gpu.model} ({has})", "mend `gpus` in the inventory, or the driver there"
        elif short := _memory_short(gpu, facts):
            yield short, "mend `memory_gib` in the inventory"


def _no_python(facts: Facts) -> tuple[str, str]:
    found = ", ".join(f"{python.version}" + ("" if python.venv else " without venv") for python in facts.pythons)
    mend = "install Python 3.11 or newer there (Debian, Ubuntu: apt-get install python3 python3-venv)"
    return f"no Python 3.11 that can make environments ({found or 'no Python at all'})", mend


def _memory_short(gpu: Gpu, facts: Facts) -> str:
    here = [found.memory_mib / 1024 for found in facts.gpus if is_model(gpu.model, found.name)]
    # drivers keep some of the memory to themselves
    if gpu.memory_gib and here and min(here) < 0.9 * gpu.memory_gib:
        return f"{gpu.model} has {min(here):.0f} GiB, not {gpu.memory_gib:g}"
    return ""


def is_model(model: str, name: str) -> bool:
    """Whether the GPU that its driver calls `name` is what figures call `model`: NVIDIA A100-SXM4-80GB is a100-80gb."""
    joined = re.sub(r"[^a-z0-9]", "", name.lower())
    return all(part in joined for part in re.findall(r"[a-z0-9]+", model.lower()))


def notes(facts: Facts) -> Iterator[str]:
    """What a reader of measurements should know."""
    if abs(facts.clock_offset_s) > CLOCK_S + facts.clock_error_s:
        yield f"its clock is {facts.clock_offset_s:+.1f} s off"


def summary(facts: Facts) -> str:
    """The facts in a few words."""
    gpus = [gpu.name for gpu in facts.gpus]
    counted = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "no GPU"
    python = facts.python.version if facts.python else "none"
    memory = f"{facts.memory_gib:.0f} GiB memory, {facts.free_gib:.0f} GiB disk free"
    return f"{counted}, {facts.cpus} CPUs, {memory}, Python {python}"


# -- keeping -----------------------------------------------------------------------------------------------------------


def facts_file(results: Path, host: str) -> Path:
    """Where the facts of a host are kept on this machine."""
    return results / "hosts" / f"{host}.json"


def keep(results: Path, host: Host, facts: Facts) -> bool:
    """Write the facts where provenance finds them; False when they are there already."""
    path = facts_file(results, host.name)
    known = read(results, host.name)
    if known is not None and all(known.get(key) == value for key, value in _plain(facts.lasting).items()):
        return False
    told = {"host": host.name, **_plain(asdict(facts))}
    write_atomically(path, json.dumps(told, indent=1, sort_keys=True) + "\n")
    return True


def read(results: Path, host: str) -> Mapping[str, Any] | None:
    """The facts that are kept of a host: for provenance. None when it was never provisioned."""
    try:
        found = json.loads(facts_file(results, host).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(data))
    return found
