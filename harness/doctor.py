"""What this machine has and what it lacks, in one table: `make doctor`, `snakemake doctor`, `python -m harness.doctor`.

Each line is `ok`, `optional` (something that only some work needs is absent) or `missing` (with the way to mend it). Ends
with 1 when anything is missing, else with 0. It starts with the standard library alone, so that it can also say what
is wrong with a half-made environment.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness import checks, cli, provenance
from harness.checks import Finding, Level, Place
from harness.code_version import ROOT
from systems.registry import InputError


def examine(place: Place) -> Iterator[Finding]:
    """Everything, in the order of the table; a check that cannot run is itself a finding."""
    yield checks.check_python(sys.version_info[:2])
    lock = place.root / "requirements.lock"
    if lock.is_file():
        yield from checks.check_packages(checks.pins(lock.read_text(encoding="utf-8")), checks.installed_version)
    yield checks.check_torch(checks.installed_version("torch"), place.backend)
    yield checks.check_gpus(provenance.gpus())
    yield checks.check_disk(place.results)
    yield checks.check_writable(place.results)
    yield checks.check_writable(place.root)
    yield checks.check_commit(provenance.commit(place.root))
    yield from _guarded("hosts", lambda: list(checks.check_inventory(place.inventory, place.root)))
    yield from _guarded("figures", lambda: _contents(place))
    yield from checks.check_tools()


def _contents(place: Place) -> list[Finding]:
    findings, needed = checks.check_figures(place.root)
    return [*findings, *checks.check_datasets(place, needed)]


def _guarded(what: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except InputError as error:
        return [checks.from_error(what, error)]
    except ImportError as error:
        return [Finding(Level.MISSING, what, f"cannot be checked: {error}", "run `make clean environment`")]


def table(findings: Sequence[Finding]) -> str:
    """The findings as aligned lines, and a last one that sums them up."""
    wide = max(len(finding.what) for finding in findings)
    lines = [_line(finding, wide) for finding in findings]
    lacking = sum(finding.level is Level.MISSING for finding in findings)
    end = f"{lacking} missing: see above" if lacking else "everything that is required is here"
    return "\n".join([*lines, end])


def _line(finding: Finding, wide: int) -> str:
    return f"{finding.level:<8}  {finding.what:<{wide}}  {finding.found}" + (f": {finding.mend}" if finding.mend else "")


def find_place(root: Path, config: Path, inventory: Path | None) -> tuple[Place, list[Finding]]:
    """Where to look by the configuration in the file `config`; where that is bad, its defaults and what is wrong with it."""
    place = Place(root, root / "results", inventory or root / "hosts" / "local.yaml")
    try:
        from harness.config import load_config

        said = load_config(config)
    except InputError as error:
        return place, [checks.from_error("config", error)]
    except ImportError:
        return place, []  # the packages' own lines say it
    hosts = inventory or Path(said.inventory)
    found = Finding(Level.OK, "config", f"{config}: hardware {said.hardware}, backend {said.backend}, scale {said.scale}")
    return Place(root, Path(said.results), hosts, said.backend, said.mirror, said.offline), [found]


def _absolute(path: str) -> Path:
    return Path(path).absolute()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 when something required is missing."""
    parser = argparse.ArgumentParser(prog="python -m harness.doctor", description="What this machine has and what it lacks.")
    parser.add_argument("--config", type=_absolute, metavar="FILE", help="default: config/config.yaml")
    parser.add_argument("--inventory", type=_absolute, metavar="FILE", help="hosts (default: those that the config names)")
    given = parser.parse_args(argv)
    with contextlib.chdir(ROOT):  # what the configuration names is relative to it
        place, findings = find_place(ROOT, given.config or Path("config", "config.yaml"), given.inventory)
        findings += examine(place)
    print(table(findings))
    return int(any(finding.level is Level.MISSING for finding in findings))


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
