"""Memory in use: of GPUs through NVML, or resident memory of this process and its children on a CPU.

NVML is asked through its C library with ctypes (the library comes with the driver; no package is needed), or through
`nvidia-smi` where the library does not load.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from systems.common.errors import InputError

GIB = 2.0**30
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Environment of whatever engine is measured or decided about: memory in steps of 2 MiB. Torch's usual segments of 20 MiB and
more are noise, which depth multiplies, and lie idle."""


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def gpus_used() -> tuple[Mapping[str, int], str]:
    """Bytes in use on every GPU by its UUID (`GPU-...`), whoever uses them, and how they were read.

    Raises InputError where there is neither NVML nor nvidia-smi.
    """
    try:
        return _by_library(), "NVML"
    except OSError:
        return _by_program(), "NVML (nvidia-smi, whole MiB)"


def _by_library() -> dict[str, int]:
    library = ctypes.CDLL("libnvidia-ml.so.1")
    _must(library.nvmlInit_v2())
    try:
        count = ctypes.c_uint()
        _must(library.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        found = {}
        for index in range(count.value):
            device, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(96), _Memory()
            _must(library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)))
            _must(library.nvmlDeviceGetUUID(device, name, ctypes.c_uint(len(name))))
            _must(library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)))
            found[name.value.decode()] = int(memory.used)
        return found
    finally:
        library.nvmlShutdown()


def _must(code: int) -> None:
    if code:
        raise OSError(code, "NVML refused")


def _by_program() -> dict[str, int]:
    query = ["nvidia-smi", "--query-gpu=uuid,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        rows = [line.split(",") for line in done.stdout.splitlines() if line.strip()]
        return {uuid.strip(): int(float(used) * 2**20) for uuid, used in rows}
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise InputError("profile", "memory", "NVML", f"can't be asked ({error}): install the NVIDIA driver's tools") from error


def resident() -> Mapping[str, int]:
    """Resident bytes of this process and its children, by process id (Linux)."""
    own = os.getpid()
    return {str(pid): _resident(pid) for pid in (own, *_children(own))}


def _children(parent: int) -> Iterable[int]:
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = status.read_text().partition(" (")
            if int(rest.rpartition(") ")[2].split()[1]) == parent:
                yield int(pid)
        except (OSError, ValueError, IndexError):
            continue  # it has ended meanwhile


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def grown_gib(before: Mapping[str, int], now: Mapping[str, int], only: Iterable[str] | None = None) -> float:
    """GiB by which use has grown, summed over GPUs (or processes), those in `only` where given."""
    names = now if only is None else [name for name in now if name in set(only)]
    return sum(now[name] - before.get(name, 0) for name in names) / GIB
