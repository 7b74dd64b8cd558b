"""How the leash gets to where a role runs: as text on the standard input of any Python there, so nothing is installed first."""

from __future__ import annotations

from functools import cache
from pathlib import Path

MODULES = ("wire", "family", "files", "probes", "leash")
_FAR = Path(__file__).with_name("far")
_READ = """import sys
r = open(0, "rb", 0, closefd=False)
n = int(r.readline() or 0)
b = b""
while len(b) < n:
    d = r.read(n - len(b))
    if not d: sys.exit(1)
    b += d
exec(b)
"""
_START = """
import sys, types
for name in ("harness", "harness.launch", "harness.launch.far"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
for name, source in SOURCES.items():
    module = sys.modules["harness.launch.far." + name] = types.ModuleType("harness.launch.far." + name)
    setattr(sys.modules["harness.launch.far"], name, module)
    exec(compile(source, name + ".py", "exec"), module.__dict__)
sys.modules["harness.launch.far.leash"].main()
"""


def command(python: str) -> list[str]:
    """The command that waits for `program` on its standard input and becomes it."""
    return [python, "-I", "-S", "-c", _READ]


@cache
def program() -> bytes:
    """What to write to it first."""
    sources = {name: (_FAR / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
    text = f"SOURCES = {sources!r}{_START}".encode()
    return b"%d\n%s" % (len(text), text)
