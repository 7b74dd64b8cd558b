"""What the Snakefile knows: the configuration, the figures, and for each rule what its files depend on.

Rules stay thin because everything that needs thought is here, in plain Python. Methods that rules name as input
functions or parameters take Snakemake's wildcards, of which they read `system`, `figure` and `series`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Protocol

from harness import cli
from harness.code_version import code_version, executing_version, system_version
from harness.config import CONFIG_FILE, Config, load_config
from harness.datasets import default_cache, load_registry, whereabouts
from harness.dispatch.here import only_here
from harness.figure_file import FigureFile, load_figure, system_of
from harness.inventory import load_inventory
from harness.reference import REFERENCE, Reference
from systems.registry import SYSTEMS, InputError

FIGURES = Path("figures")
#: Targets that are no figure and no system.
TARGETS = frozenset(
    {
        "all",
        "claims",
        "report",
        "fidelity",
        "doctor",
        "estimate",
        "provision",
        "deprovision",
        "trust",
        "containers",
        "calibrate",
    }
)
#: What of the harness decides how a series comes about; a change of it runs the series again, from the trials it has.
SERIES_CODE = (
    "harness/series.py",
    "harness/figure_file.py",
    "harness/search",
    "harness/rows.py",
    "harness/columns.py",
    "harness/rescale.py",
    "harness/hint.py",
    "harness/reference.py",
)
DRAW_CODE = ("harness/draw.py", "figures/__init__.py", "figures/style.py", "figures/plots")


class Wildcards(Protocol):
    """The wildcards of a rule of one figure; those of series rules have `series` too."""

    system: str
    figure: str


@dataclass(frozen=True)
class Figure:
    """A figure file, by the names that rules know it by."""

    path: Path
    file: FigureFile

    @property
    def system(self) -> str:
        """The system whose figure it is."""
        return self.path.parent.name

    @property
    def name(self) -> str:
        """The figure's name among those of its system, such as `fig8a`."""
        return self.path.stem

    @property
    def target(self) -> str:
        """The rule that makes this figure alone, such as `llmstation_fig8a`."""
        return f"{self.system}_{self.name}"


@dataclass(frozen=True)
class Project:
    """All figures under one configuration."""

    config: Config
    figures: Sequence[Figure]

    @cached_property
    def _by_name(self) -> Mapping[tuple[str, str], Figure]:
        return {(figure.system, figure.name): figure for figure in self.figures}

    @property
    def run(self) -> str:
        """The folder of everything that depends on hardware, backend and scale."""
        return f"{self.config.results}/{self.config.run_name}"

    @property
    def groups(self) -> Mapping[str, Sequence[Figure]]:
        """Targets that make several figures: every figure name, and every system."""
        groups: dict[str, list[Figure]] = {}
        for figure in self.figures:
            groups.setdefault(figure.name, []).append(figure)
            groups.setdefault(figure.system, []).append(figure)
        return groups

    def products(self, figures: Iterable[Figure]) -> list[str]:
        """The files that a user wants of those `figures` that can be made under this configuration."""
        return [product for figure in figures if not self.obstacle(figure) for product in self._products(figure)]

    def _products(self, figure: Figure) -> list[str]:
        names = [f"{figure.name}.pdf", "table.csv"]
        names += ["search.pdf"] if figure.file.knobs else []
        names += ["claims.json"] if figure.file.claims else []
        return [f"{self.run}/{figure.system}/{figure.name}/{name}" for name in names]

    def claims(self) -> list[str] | Callable[[object], list[str]]:
        """The verdicts of all figures; where there are none, an input function that says so in one line."""
        return [path for path in self.products(self.figures) if path.endswith("/claims.json")] or self._no_claims

    def _no_claims(self, _wildcards: object) -> NoReturn:
        made, backend = sum(not self.obstacle(figure) for figure in self.figures), self.config.backend
        mend = f"none of the {made} figures that it makes has a claim: use another backend or hardware"
        refuse(InputError("config", "backend, hardware", f"{backend}, {self.config.hardware}", mend))

    def obstacle(self, figure: Figure) -> InputError | None:
        """Why `figure` cannot be made under this configuration, if it cannot."""
        backends = figure.file.backends
        if self.config.backend not in backends:
            return InputError("config", "backend", self.config.backend, f"{figure.path} has {', '.join(backends)}")
        if self.config.backend == "recorded":
            return self._not_recorded(figure)
        if self.config.hardware != "paper" and not (figure.file.rescale or figure.file.portable):
            mend = f"{figure.path} does not say how to rescale: use paper, or add `rescale` to it"
            return InputError("config", "hardware", self.config.hardware, mend)
        return None

    def reference(self, figure: Figure) -> Reference:
        """Where measurements of `figure` on the configured hardware are recorded."""
        return Reference.of(figure.system, figure.name, self.config.testbed(figure.file.testbed))

    def _not_recorded(self, figure: Figure) -> InputError | None:
        reference = self.reference(figure)
        if reference.exists:
            return None
        there = sorted({path.parts[1] for path in REFERENCE.glob(f"*/{figure.system}/{figure.name}/table.csv")})
        mend = f"{figure.path} is recorded on {', '.join(there) or 'nothing'}: use hardware=<gpu>x1 of these, or measure it"
        return InputError("config", "hardware", self.config.hardware, mend)

    def wanted(self, *figures: Figure) -> Callable[[object], list[str]]:
        """An input function for the products of `figures`; it ends the process with one line if none can be made."""

        def files(_wildcards: object) -> list[str]:
            obstacles = [self.obstacle(figure) for figure in figures]
            if obstacles and all(obstacles):
                refuse(obstacles[0])
            return self.products(figures)

        return files

    # what the rules of one figure ask

    def figure(self, wildcards: Wildcards) -> Figure:
        """The figure that the wildcards name."""
        return self._by_name[wildcards.system, wildcards.figure]

    def manifests(self, wildcards: Wildcards) -> list[str]:
        """The manifests of the figure's datasets; what is recorded needs none."""
        if self.config.backend == "recorded":
            return []
        return [f"{self.config.results}/datasets/{name}.json" for name in self.figure(wildcards).file.datasets]

    def rescale(self, wildcards: Wildcards) -> list[str]:
        """The factors by which the figure moves to other hardware; none on the paper's own."""
        if self.config.backend == "recorded" and not self.reference(self.figure(wildcards)).rescale.is_file():
            return []
        folder = f"{self.run}/{wildcards.system}/{wildcards.figure}"
        moves = self.config.hardware != "paper" and not self.figure(wildcards).file.portable
        return [f"{folder}/rescale.json"] if moves else []

    def series(self, wildcards: Wildcards) -> list[str]:
        """The parquet files of all series of the figure, in the order of the figure file."""
        folder = f"{self.run}/{wildcards.system}/{wildcards.figure}/series"
        return [f"{folder}/{series.name}.parquet" for series in self.figure(wildcards).file.series]

    def series_config(self, _wildcards: Wildcards) -> str:
        """The part of the configuration that decides what a series gives, as JSON."""
        return json.dumps(self.config.model_dump(mode="json", include={"hardware", "backend", "scale", "seed"}))

    def series_code(self, wildcards: Wildcards) -> str:
        """The version of the code that decides what a series gives."""
        if self.config.backend == "recorded":
            return self.reference(self.figure(wildcards)).version()[:16] + code_version(*SERIES_CODE)[:16]
        executing = "".join(executing_version(self.config.backend))
        return system_version(wildcards.system)[:16] + code_version(*SERIES_CODE)[:16] + executing[:16]

    @property
    def group(self) -> str | None:
        """The group of series jobs, so that a cluster may run several in one job; none where each needs GPUs for itself."""
        return None if self.config.backend == "measured" else "series"

    def gpu(self, wildcards: Wildcards) -> int:
        """How many GPUs a series of the figure needs: those of its testbed, where it is measured."""
        return self._gpus(wildcards)[1]

    def gpu_model(self, wildcards: Wildcards) -> str:
        """Which GPUs, as testbeds name them; empty where none are needed."""
        return self._gpus(wildcards)[0]

    def _gpus(self, wildcards: Wildcards) -> tuple[str, int]:
        if self.config.backend != "measured":
            return "", 0
        model, _, count = self.config.testbed(self.figure(wildcards).file.testbed).rpartition("x")
        return model, int(count)

    def inventory(self, _wildcards: object) -> str:
        """The file of hosts."""
        return self.config.inventory

    def results(self, _wildcards: object) -> str:
        """The folder of all results."""
        return self.config.results

    def table_code(self, _wildcards: object) -> str:
        """The version of the code that writes tables."""
        return code_version("harness/table.py", "harness/figure_file.py")[:16]

    def draw_code(self, _wildcards: object) -> str:
        """The version of the code that draws."""
        return code_version(*DRAW_CODE)[:16]

    def claims_code(self, _wildcards: object) -> str:
        """The version of the code that judges claims."""
        return code_version("harness/claims", "harness/verdicts.py")[:16]

    def dataset_options(self, _wildcards: object) -> list[str]:
        """Options of `python -m harness.datasets`."""
        mirror = ["--mirror", str(self.config.mirror)] if self.config.mirror else []
        return [*mirror, *(["--offline"] if self.config.offline else [])]

    def dataset_state(self, wildcards: Any) -> str:  # noqa: ANN401
        """Where the dataset would be taken from now, and how its files look: when that changes it is checked again."""
        entry = load_registry().entry(wildcards.dataset)
        place = whereabouts(entry, self.config.mirror, default_cache())
        root = {"mirror": self.config.mirror, "cache": default_cache()}.get(place)
        found = [(root / part.path).stat() for part in entry.parts()] if root else []
        return f"{place} {sum(stat.st_size for stat in found)} {max((stat.st_mtime_ns for stat in found), default=0)}"


def load(overrides: Mapping[str, Any]) -> Project:
    """The project in the current folder, under config/config.yaml with `overrides` over it.

    Ends the process with one line where a file or an override is wrong.
    """
    try:
        project = Project(load_config(CONFIG_FILE, overrides), [_figure(path) for path in sorted(FIGURES.glob("*/*.yaml"))])
        _check_names(project.figures)
        _check_inventory(Path(project.config.inventory))
    except InputError as error:
        refuse(error)
    return project


def _figure(path: Path) -> Figure:
    system_of(path)
    figure = Figure(path, load_figure(path))
    for name in figure.file.datasets:
        if name not in load_registry().datasets:
            known = ", ".join(sorted(load_registry().datasets))
            raise InputError(path, "datasets", name, f"not in datasets/registry.yaml: use one of {known}")
    return figure


def _check_names(figures: Iterable[Figure]) -> None:
    for figure in figures:
        if not figure.name.isidentifier() or figure.name in {*TARGETS, *SYSTEMS}:
            raise InputError(figure.path, "file name", figure.name, "is no name for a target: use a name such as fig8a")


def _check_inventory(path: Path) -> None:
    """A bad file of hosts ends a run before it begins; the default one need not be there, for it says only "this machine"."""
    if path.exists() or str(path) != Config().inventory:
        load_inventory(path)


def refuse(error: InputError | None) -> NoReturn:
    """End the process with the error's one line."""
    cli.say(str(error))
    raise SystemExit(cli.UNUSABLE)


def use_this_python() -> None:
    """Make `python` in rules the interpreter that runs Snakemake, whether its environment is activated or not."""
    folder = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([folder, *os.environ.get("PATH", os.defpath).split(os.pathsep)])


def use_inventory(config: Config) -> None:
    """Let the rules of series send their jobs to the hosts of the inventory; on this machine alone they stay as they are.

    By variables and not by what rules are made of: where a job runs must not decide whether it runs again.
    """
    here = only_here(Path(config.inventory))
    os.environ["FIVEFOLD_DISPATCH"] = "" if here else "python -m harness.dispatch --"
    os.environ["FIVEFOLD_INVENTORY"] = config.inventory
