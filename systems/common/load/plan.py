"""Which requests a run sends: from a CSV file, a declaration in YAML, or flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from systems.common.core import SLO_PRESETS, Slo
from systems.common.errors import InputError
from systems.common.workloads.build import Workload, build, from_csv
from systems.common.workloads.catalogue import catalogue

SHORT_NAMES: Mapping[str, Mapping[str, object]] = {
    "sharegpt": {"lengths": "sharegpt_lengths", "lengths_filter": "vllm-sharegpt"},
}
"""What `--lengths` takes besides the rules and datasets of docs/workloads.md."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where requests come from.

    Attributes:
        requests: a CSV file of requests; it excludes the others.
        workload: a YAML file with a declaration.
        flags: keys of a declaration, which win over those of the file.
        datasets: the files of datasets; one that is not here is represented by its stand-in.
        ignore_arrivals: in a closed loop arrivals don't matter and need not be declared.
    """

    requests: Path | None = None
    workload: Path | None = None
    flags: Mapping[str, object] = field(default_factory=dict)
    datasets: Mapping[str, Path] = field(default_factory=dict)
    ignore_arrivals: bool = False


def workload(sources: Sources, seed: int) -> Workload:
    """The requests of a run. Raises InputError for a source that is unusable, or two that exclude each other."""
    if sources.requests is not None:
        others = ["workload"] if sources.workload else list(sources.flags)
        if others:
            raise InputError("load", "--requests", str(sources.requests), f"says which requests already: leave out {others[0]}")
        return from_csv(sources.requests)
    declared = dict(declaration(sources.workload)) if sources.workload else {}
    for one, other in (("requests", "seconds"), ("seconds", "requests")):
        if one in sources.flags:
            declared.pop(other, None)
    declared.update(sources.flags)
    declared.update(SHORT_NAMES.get(str(declared.get("lengths")), {}))
    if sources.ignore_arrivals:
        declared = _timeless(declared)
    elif "arrivals" not in declared:
        declared["arrivals"] = "poisson"
    for key in ("requests", "seconds"):
        if declared.get(key) is not None:
            break
    else:
        raise InputError("load", "--count, --duration", "neither", "say how many requests, or for how many seconds")
    files = {name: sources.datasets.get(name) for name in catalogue()}
    for name in sources.datasets:
        if name not in files:
            raise InputError("load", "--dataset", name, f"use one of {', '.join(sorted(files))}")
    made = build(declared, files, seed, where=str(sources.workload or "load"))
    if not len(made):
        raise InputError("load", "--duration", declared.get("seconds"), "no request arrives in it: make it longer")
    return made


_OF_ARRIVALS = ("rate_rps", "cv", "rates_rps", "interval_s", "durations_s", "dwell_s", "trace_start", "trace_model", "seconds")


def _timeless(declared: Mapping[str, object]) -> dict[str, object]:
    """The same requests without their arrivals; a trace that lends its lengths is still replayed."""
    if declared.get("requests") is None:
        raise InputError("load", "--count", None, "a closed loop needs the number of requests to draw from")
    if declared.get("lengths") == "trace":
        return {key: value for key, value in declared.items() if key not in ("rate_rps", "seconds")}
    left = {key: value for key, value in declared.items() if key not in _OF_ARRIVALS and key != "trace"}
    return {**left, "arrivals": "deterministic", "rate_rps": 1.0}


def declaration(path: Path) -> Mapping[str, object]:
    """The declaration in the YAML file `path`: its keys, or those below `workload`. Raises InputError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, "file", getattr(error, "strerror", None) or str(error), "give a readable YAML file") from error
    except yaml.YAMLError as error:
        raise InputError(path, "file", " ".join(str(error).split())[:80], "give YAML (docs/workloads.md)") from error
    if isinstance(content, dict) and isinstance(content.get("workload"), dict):
        content = content["workload"]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(path, "file", content, "give a mapping of keys such as `arrivals: poisson` (docs/workloads.md)")
    return content


def slo(text: str) -> Slo:
    """The limits that `text` names: a preset, or `ttft=0.5,tpot=0.05,e2e=10` in seconds. Raises InputError."""
    if text in SLO_PRESETS:
        return SLO_PRESETS[text]
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            limits[f"{name.strip()}_s"] = float(value)
        except ValueError:
            limits = {}
            break
    if not limits or not limits.keys() <= {"ttft_s", "tpot_s", "e2e_s"} or not all(value > 0 for value in limits.values()):
        known = ", ".join(sorted(SLO_PRESETS))
        raise InputError("load", "--slo", text, f"use ttft=0.5,tpot=0.05,e2e=10 (s, above 0), or one of {known}")
    return Slo(**limits)
