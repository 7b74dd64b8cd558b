"""Who may import whom (docs and design: the map), and what a job must not load before it starts."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

OURS = ("figures", "harness", "systems", "tests", "benchmarks")
FIGURES_MAY = {"figures", "pandas", "matplotlib", "numpy"} | sys.stdlib_module_names
HEAVY = ("pandas", "scipy", "matplotlib", "torch", "transformers")


def imported(source: str, module: str) -> Iterator[str]:
    """Every module that `source`, the text of the module `module`, imports, wherever in it; `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{base}.{name.name}" for name in node.names)


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def allowed(module: str, name: str) -> bool:
    """Whether `module` may import `name`."""
    top = name.partition(".")[0]
    if under(module, "figures"):
        return top in FIGURES_MAY
    if top not in OURS:
        return True
    if under(module, "systems.common"):
        return under(name, "systems.common")
    if under(module, "systems.registry"):
        return under(name, "systems.common")
    if under(module, "systems"):
        return under(name, "systems.common", ".".join(module.split(".")[:2]))
    return under(name, "harness", "figures", "systems.registry")


def modules(root: Path) -> list[tuple[str, Path]]:
    found = [path for package in ("figures", "harness", "systems") for path in sorted((root / package).rglob("*.py"))]
    return [(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"), path) for path in found]


def test_nobody_imports_what_is_not_theirs(root: Path) -> None:
    assert len(modules(root)) > 50
    for module, path in modules(root):
        wrong = [name for name in imported(path.read_text(), module) if not allowed(module, name)]
        assert not wrong, f"{path.relative_to(root)} imports {', '.join(wrong)}"


@pytest.mark.parametrize(
    ("module", "source", "name"),
    [
        ("systems.dlora.core", "from systems.sirius import pool", "systems.sirius.pool"),
        ("systems.dlora.core", "def f():\n    import systems.sirius.pool", "systems.sirius.pool"),
        ("systems.common.core", "import harness.trials", "harness.trials"),
        ("systems.common.core", "from systems.registry import experiment", "systems.registry.experiment"),
        ("harness.trials", "from systems.common.core import Trial", "systems.common.core.Trial"),
        ("harness.trials", "from systems import llmstation", "systems.llmstation"),
        ("figures.plots.lines", "from harness import trials", "harness.trials"),
        ("figures.plots.lines", "import scipy.stats", "scipy.stats"),
        ("systems.dlora.core", "from ..sirius import pool", "systems.sirius.pool"),
    ],
)
def test_the_rules_catch_what_they_are_for(module: str, source: str, name: str) -> None:
    assert list(imported(source, module)) == [name]
    assert not allowed(module, name)


def loaded(root: Path, *names: str) -> set[str]:
    """The heavy packages that importing `names` loads, in a fresh interpreter."""
    code = f"import sys; import {', '.join(names)}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_series_job_starts_without_heavy_packages(root: Path) -> None:
    experiments = [f"systems.{path.parent.name}.experiments" for path in root.glob("systems/*/experiments.py")]
    assert len(experiments) >= 2
    assert loaded(root, "harness.series", *experiments) == set()


def test_the_snakefile_starts_without_heavy_packages(root: Path) -> None:
    assert loaded(root, "harness.targets", "harness.runlock") == set()
