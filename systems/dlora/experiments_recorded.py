"""What the figures of H200 measurements show: numbers that benchmarks/dlora_gpu.py and dlora_cluster_gpu.py wrote.

`python benchmarks/dlora_record.py` puts their files into `reference/h200/benchmarks/dlora.json` and
`reference/h200x2/benchmarks/dlora_cluster.json` and reads them once into `reference/h200/dlora/<figure>/`, which
`backend=recorded` draws. Nothing stands in for a part that is not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from systems.common.core import Outcome, Scalar, Trial
from systems.common.errors import InputError

REFERENCE = Path(__file__).resolve().parents[2] / "reference"
ONE, SEVERAL = Path("h200/benchmarks/dlora.json"), Path("h200x2/benchmarks/dlora_cluster.json")
SCRIPTS = {ONE: "benchmarks/dlora_gpu.py on an H200", SEVERAL: "benchmarks/dlora_cluster_gpu.py on two H200s"}


def branch(trial: Trial) -> Outcome:
    """Figure 5: a 4096 x 4096 product (`product: base`) or the rank-16 branch (`lora`) of `batch` rows, microseconds.

    Other parameters: `dtype` (float32, bfloat16), `timer` (`host` as the artifact's, `gpu` without launches).
    """
    name = {"base": "Wx", "lora": "BAx"}[_text(trial, "product")]
    found = _part(ONE, "figure5")["points"]
    wanted = {"series": name, "dtype": _text(trial, "dtype"), "batch": trial.parameters["batch"]}
    point = _row(ONE, "figure5", found, wanted)
    return Outcome({"product_us": float(point[f"{_text(trial, 'timer')}_us"])}, notes=(_note(ONE, "figure5"),))


def switching(trial: Trial) -> Outcome:
    """Milliseconds of a change of the weights, `kind` (merge, unmerge, a_to_b), `how`: an entry of the part, or `floor`.

    `copy` has one product for merge and a_to_b, and nothing to do for unmerge.
    """
    part, how, kind = _part(ONE, "merge"), _text(trial, "how"), _text(trial, "kind")
    floor_ms = float(part["floor_ms"])
    if how == "floor":
        switch_ms = floor_ms
    elif how == "copy":
        switch_ms = 0.0 if kind == "unmerge" else float(part["copy"]["ms"])
    else:
        entry = _entry(ONE, "merge", part, how)
        switch_ms = float(entry[kind]["ms"])
    return Outcome({"switch_ms": switch_ms, "over_floor": switch_ms / floor_ms}, notes=(_note(ONE, "merge"),))


def decode(trial: Trial) -> Outcome:
    """One decode step, batch 16, context 512: `how` names back end and adapters resident, `adapters` are in the batch.

    With `merged` the merged step of that entry.
    """
    part, how = _part(ONE, "decode"), _text(trial, "how")
    entry, count = _entry(ONE, "decode", part, how), trial.parameters["adapters"]
    merged = bool(trial.parameters.get("merged", False))
    key = "merged" if merged else f"{count} adapters"
    if key not in entry:  # more adapters than slots
        return Outcome({"step_ms": None, "over_merged": None}, notes=(_note(ONE, "decode"),))
    step_ms = float(entry[key]["ms"])
    return Outcome({"step_ms": step_ms, "over_merged": step_ms / float(entry["merged"]["ms"])}, notes=(_note(ONE, "decode"),))


def miss(trial: Trial) -> Outcome:
    """Milliseconds of a step (`entry` of the part `prefetch`): the first after a miss, or with all adapters there."""
    part = _part(ONE, "prefetch")
    entry = _entry(ONE, "prefetch", part, _text(trial, "entry"))
    numbers: dict[str, Scalar] = {"step_ms": float(entry["ms"]), "low_ms": float(entry["low_ms"])}
    return Outcome({**numbers, "high_ms": float(entry["high_ms"])}, notes=(_note(ONE, "prefetch"),))


POLICY_NUMBERS = {
    "latency_s_per_token": "mean_s_per_token", "latency_p90_s_per_token": "p90_s_per_token", "ttft_mean_s": "ttft_mean_s",
    "queueing_s_per_token": "queueing_s_per_token", "throughput_rps": "throughput_rps", "switches": "passes",
}  # fmt: skip


def served(trial: Trial) -> Outcome:
    """One replica under `policy`: of the part `policies` by `traffic`, of `adapters` by `adapters`."""
    part = _text(trial, "part")
    key = "traffic" if part == "policies" else "adapters"
    wanted = {"policy": _text(trial, "policy"), key: trial.parameters[key]}
    row = _row(ONE, part, _part(ONE, part)["points"], wanted)
    numbers: dict[str, Scalar] = {name: row.get(key) for name, key in POLICY_NUMBERS.items()}
    numbers["latency_ms_per_token"] = 1e3 * float(row["mean_s_per_token"])
    numbers["latency_p90_ms_per_token"] = 1e3 * float(row["p90_s_per_token"])
    constants = _part(ONE, part)["constants"]
    numbers |= {"top_share": row.get("top_share"), "rate_rps": row.get("rate_rps")}
    told = f"t_m {1e3 * constants['t_merged_s']:.2f} ms, t_u {1e3 * constants['t_unmerged_s']:.2f} ms"
    return Outcome(numbers, notes=(_note(ONE, part), f"{told}, switch {1e3 * constants['switch_s']:.1f} ms"))


def heldout(trial: Trial) -> Outcome:
    """Held-out run at `rate` under `policy`: `side` measured or simulated; the simulation is made here, from the constants."""
    from systems.dlora import fidelity  # numpy: not for figures that do not ask

    found = _predictions()
    rates = [float(run["rate"]) for run in _part(ONE, "heldout")["runs"]]
    rps = {float(run["rate_rps"]): float(run["rate"]) for run in _part(ONE, "heldout")["runs"]}
    wanted = float(str(trial.parameters["rate"]))
    mine = [p for p in found if p.policy == _text(trial, "policy") and rps[p.rate_rps] == wanted]
    if not mine:
        raise InputError(REFERENCE / ONE, "heldout", wanted, f"not measured; there are {', '.join(map(str, rates))}")
    numbers = getattr(mine[0], _text(trial, "side"))
    values: dict[str, Scalar] = {
        "latency_s_per_token": numbers.mean_s_per_token, "latency_p90_s_per_token": numbers.p90_s_per_token,
        "within_slo": numbers.within_slo, "rate_rps": mine[0].rate_rps, "requests": mine[0].requests,
    }  # fmt: skip
    return Outcome(values, notes=(_note(ONE, "heldout"), f"SLO {fidelity.SLO_S_PER_TOKEN:g} s per token"))


def slo_rate(trial: Trial) -> Outcome:
    """The largest rate whose mean latency is within the SLO, read off the held-out rates: `policy`, `side`; None if beyond."""
    from systems.dlora import fidelity

    rates = fidelity.slo_rates(_predictions(), fidelity.SLO_S_PER_TOKEN)
    policy = _text(trial, "policy")
    if policy not in rates:
        raise InputError(REFERENCE / ONE, "heldout, policy", policy, f"not measured; there are {', '.join(rates)}")
    rate_rps = rates[policy][{"measured": 0, "simulated": 1}[_text(trial, "side")]]
    return Outcome({"slo_rate_rps": rate_rps}, notes=(_note(ONE, "heldout"), f"SLO {fidelity.SLO_S_PER_TOKEN:g} s per token"))


def balanced(trial: Trial) -> Outcome:
    """A run of the live cluster: of `part`, by `migration`, `rate`, `adapters`; `replica` (1, 2, ...) for its queueing share.

    Shares of the run's time: `solver_pct`; `switching_pct` of the replica that switched most, passes times the measured one.
    """
    part = _text(trial, "part")
    wanted = {key: trial.parameters[key] for key in ("migration", "rate", "adapters")}
    row = _row(SEVERAL, part, _part(SEVERAL, part), wanted)
    duration_s = float(row["duration_s"])
    shares = [one["queueing_percent"] for one in row["replicas"]]
    values: dict[str, Scalar] = {
        "queueing_s_per_token": float(row["queueing_s_per_token"]), "latency_s_per_token": float(row["mean_s_per_token"]),
        "latency_p90_s_per_token": float(row["p90_s_per_token"]), "throughput_rps": float(row["throughput_rps"]),
        "unfinished": int(row["unfinished"]), "migrations": int(row["moved_requests"]), "solves": int(row["solves"]),
        "rate_rps": float(row["rate_rps"]), "top_share": float(row["top_share"]),
        "solver_pct": 100 * sum(row["solver_s"]) / duration_s, "switching_pct": 100 * max(row["switching_s"]) / duration_s,
        "busy_spread": max(r["busy_share"] for r in row["replicas"]) - min(r["busy_share"] for r in row["replicas"]),
    }  # fmt: skip
    values["inference_pct"] = 100 - float(values["solver_pct"] or 0) - float(values["switching_pct"] or 0)
    pauses = [seconds for moved, seconds in row["moves"] if moved]
    values["move_ms"] = 1e3 * sum(pauses) / len(pauses) if pauses else None
    if "replica" in trial.parameters:
        values["queueing_pct"] = shares[int(str(trial.parameters["replica"])) - 1]
    if "share" in trial.parameters:
        values["share_pct"] = values[f"{_text(trial, 'share')}_pct"]
    whole = _file(SEVERAL)
    told = f"window {whole['window_s']:g} s, a look every {whole['interval_s']:g} s, excess {whole['load_excess']:g} requests"
    return Outcome(values, notes=(_note(SEVERAL, part), told))


def cluster_heldout(trial: Trial) -> Outcome:
    """A run of the live cluster by `migration` and `rate`, `side` measured or simulated with the prices of the one GPU."""
    place = {"measured": 0, "simulated": 1}[_text(trial, "side")]
    wanted = trial.parameters["rate"]
    mine = [p for p in _cluster_predictions() if (p.migration, p.rate) == (_text(trial, "migration"), wanted)]
    if not mine:
        raise InputError(REFERENCE / SEVERAL, "fig11a, rate", wanted, "was not measured: run the benchmark again and record it")
    run = mine[0]
    values: dict[str, Scalar] = {"latency_s_per_token": run.mean_s[place], "queueing_s_per_token": run.queueing_s[place]}
    return Outcome({**values, "migrations": run.moved[place]}, notes=(_note(SEVERAL, "fig11a"), _note(ONE, "iterations")))


def solver(trial: Trial) -> Outcome:
    """Seconds of the integer program for `requests`, `adapters` and `replicas`."""
    wanted = {key: trial.parameters[key] for key in ("requests", "adapters", "replicas")}
    row = _row(SEVERAL, "ilp", _part(SEVERAL, "ilp"), wanted)
    before, after = float(row["makespan_before_s"]), float(row["makespan_after_s"])
    return Outcome({"solver_s": float(row["seconds"]), "makespan_share": after / before}, notes=(_note(SEVERAL, "ilp"),))


RECORDED_EXPERIMENTS: Mapping[str, Callable[[Trial], Outcome]] = {
    "recorded_branch": branch,
    "recorded_switching": switching,
    "recorded_decode": decode,
    "recorded_miss": miss,
    "recorded_served": served,
    "recorded_heldout": heldout,
    "recorded_slo_rate": slo_rate,
    "recorded_balanced": balanced,
    "recorded_cluster_heldout": cluster_heldout,
    "recorded_solver": solver,
}


@lru_cache(maxsize=4)
def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        mend = "not recorded yet: run the benchmark there, then benchmarks/dlora_record.py --measured FILE"
        raise InputError(path, "benchmark", type(error).__name__, mend) from error
    assert isinstance(found, dict), path
    return found


@lru_cache(maxsize=1)
def _predictions() -> Sequence[Any]:
    from systems.dlora import fidelity

    return fidelity.predict(_file(ONE), where=str(REFERENCE / ONE))


@lru_cache(maxsize=1)
def _cluster_predictions() -> Sequence[Any]:
    from systems.dlora import fidelity

    return fidelity.predict_cluster(_file(ONE), _file(SEVERAL), str(REFERENCE / SEVERAL))


def _file(name: Path) -> Mapping[str, Any]:
    return _read(REFERENCE / name)


def _part(name: Path, part: str) -> Any:  # noqa: ANN401  a part is what its benchmark wrote
    whole = _file(name)
    found = whole.get("parts", whole).get(part)
    if found is None or (isinstance(found, Mapping) and ("error" in found or "skipped" in found)):
        script = SCRIPTS[name].split(" on ")[0]
        raise InputError(REFERENCE / name, part, None, f"was not measured: run {script} --parts {part} and record it")
    return found


def _entry(name: Path, part: str, whole: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = whole.get(key)
    if not isinstance(found, Mapping) or "error" in found:
        known = ", ".join(k for k, value in whole.items() if isinstance(value, Mapping) and "error" not in value)
        raise InputError(REFERENCE / name, f"{part}, entry", key, f"was not measured; there are {known}")
    return found


def _row(name: Path, part: str, rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, object]) -> Mapping[str, Any]:
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    whole = [row for row in found if not ({"error", "left_out"} & row.keys()) and not row.get("errors")]
    if not whole:
        said = ", ".join(f"{key} {value}" for key, value in wanted.items())
        raise InputError(REFERENCE / name, part, said, "was not measured: run the benchmark again and record it")
    return whole[0]


def _note(name: Path, part: str) -> str:
    origin = _file(name).get("provenance", {})
    origin = origin.get("parts", {}).get(part, origin)
    when, commit = str(origin.get("date", "an unknown day"))[:10], str(origin.get("commit", "unknown"))
    return f"recorded by {SCRIPTS[name]}, {when}, commit {commit}: our engine, bf16, random weights"


def _text(trial: Trial, key: str) -> str:
    value = trial.parameters.get(key)
    if not isinstance(value, str):
        raise InputError("dlora", key, value, "give a word")
    return value
