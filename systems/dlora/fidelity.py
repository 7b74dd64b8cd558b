"""Does the simulator predict what a GPU did? A held-out run of benchmarks/dlora_gpu.py, simulated with that GPU's constants.

    python -m systems.dlora.fidelity --measured FILE [--cluster FILE] [--slo-s-per-token 0.0075] [--out FILE]

FILE is what benchmarks/dlora_gpu.py wrote. From its part `iterations` come the prices: decode steps by rows, context and
adapters, batches with prompts by tokens and rows, changes of the merged adapter. From its part `heldout` come the requests and
the credit policy's constants as they were given to it, and, to compare with, what happened; no price is taken from there.
For every rate and policy: mean and 90th percentile of the latency per output token, and the share of requests within the SLO,
measured, simulated and their signed error. For every policy the SLO rate: the largest rate whose mean latency is within the
limit, read off the held-out rates.

`--cluster` takes what benchmarks/dlora_cluster_gpu.py wrote: its runs of several live replicas are all held out. They are
simulated with the prices of the one GPU, the placement and the migration rules of the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.errors import InputError
from systems.dlora.cluster.migration import MigrationRules
from systems.dlora.cluster.simulated import Cluster, ClusterRules
from systems.dlora.measured import MeasuredCosts, MeasuredReplica
from systems.dlora.policies import Policy
from systems.dlora.policies.credit import Credit, CreditRules
from systems.dlora.policies.static import Fcfs, Merge
from systems.dlora.replica import engine_config
from systems.dlora.requests import LoraSequence
from systems.dlora.slots import Slots

SLO_S_PER_TOKEN = 0.0075
"""Limit on the mean latency per output token: a third above an unmerged step of an H200. The paper's is 0.5 s, 18 steps."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """Of one run: latencies per output token in seconds, share of requests within the SLO, end of the last request."""

    mean_s_per_token: float
    p90_s_per_token: float
    within_slo: float
    ttft_mean_s: float
    ended_s: float
    iterations: int
    passes: int

    @classmethod
    def of(
        cls, requests: Sequence[Sequence[float]], first_s: Sequence[float], finish_s: Sequence[float], slo: float,
        iterations: int, passes: int,
    ) -> Numbers:  # fmt: skip
        """From the times of each of `requests` (arrival, input tokens, output tokens, adapter)."""
        latencies = [(end - r[0]) / r[2] for r, end in zip(requests, finish_s, strict=True)]
        ordered, count = sorted(latencies), len(latencies)
        ttft_s = statistics.fmean(first - r[0] for r, first in zip(requests, first_s, strict=True))
        within = sum(latency <= slo for latency in latencies) / count
        p90 = ordered[int(0.9 * count)]
        return cls(statistics.fmean(latencies), p90, within, ttft_s, max(finish_s), iterations, passes)


@dataclass(frozen=True, slots=True)
class Prediction:
    """One held-out run, measured and simulated."""

    policy: str
    rate_rps: float
    requests: int
    measured: Numbers
    simulated: Numbers

    def error_percent(self, name: str) -> float:
        """Signed, of one of the numbers; of `within_slo` in points."""
        mine, real = float(getattr(self.simulated, name)), float(getattr(self.measured, name))
        return 100 * (mine - real) if name == "within_slo" else 100 * (mine / real - 1)


def policy_of(name: str, rules: CreditRules, adapters: int, slots: int, batch: int) -> Policy:
    """`fcfs`, `merge` or `credit`, for the benchmark and for its simulation."""
    made: dict[str, Callable[[], Policy]] = {
        "fcfs": lambda: Fcfs(slots, batch),
        "merge": lambda: Merge(batch),
        "credit": lambda: Credit(adapters, slots, batch, rules),
    }
    return made[name]()


def rules_of(constants: Mapping[str, Any]) -> CreditRules:
    """The credit policy's constants as the benchmark gave them."""
    merged_s, unmerged_s = float(constants["t_merged_s"]), float(constants["t_unmerged_s"])
    return CreditRules(merged_s, max(merged_s, unmerged_s), float(constants["switch_s"]))


def sequence_of(index: int, told: Sequence[float]) -> LoraSequence:
    """A request from its arrival, input tokens, output tokens and adapter."""
    return LoraSequence(Request(index, float(told[0]), int(told[1]), int(told[2])), int(told[3]))


def simulate(
    requests: Sequence[Sequence[float]], policy: Policy, costs: MeasuredCosts, config: EngineConfig, slots: int, slo: float
) -> Numbers:
    """The same requests on the simulated replica; all adapters lie in its slots when it starts, as in the benchmark."""
    made = [sequence_of(i, told) for i, told in enumerate(requests)]
    adapters = max(int(r[3]) for r in requests) + 1
    replica = MeasuredReplica(config, policy, costs, Slots(slots, range(min(slots, adapters))))
    cluster = Cluster([replica], [set(range(adapters))], ClusterRules("none"))
    done = cluster.serve(made)
    times = [s.first_token_s for s in done], [s.finish_s for s in done]
    return Numbers.of(requests, *times, slo, replica.iterations, replica.switches)


def predict(report: Mapping[str, Any], slo: float = SLO_S_PER_TOKEN, where: str = "measured") -> list[Prediction]:
    """Every held-out run of `report` (the benchmark's file), simulated.

    Raises:
        InputError: the report lacks a part, or holds no run.
    """
    for part in ("iterations", "heldout"):
        if not isinstance(report.get(part), Mapping) or "error" in report[part]:
            mend = f"run benchmarks/dlora_gpu.py --parts iterations,heldout there: `{part}` is not in it"
            raise InputError(where, part, None, mend)
    held = report["heldout"]
    rules = rules_of(held["constants"])
    costs = MeasuredCosts(report["iterations"], rules, where)
    config = engine_config(int(held["kv_blocks"]), int(held["batch"]), int(held["budget"]))
    found = []
    for run in held["runs"]:
        for name, told in run["policies"].items():
            if "error" in told:
                continue
            policy = policy_of(name, rules, int(held["adapters"]), int(held["slots"]), int(held["batch"]))
            simulated = simulate(run["requests"], policy, costs, config, int(held["slots"]), slo)
            real = Numbers.of(
                run["requests"], told["first_token_s"], told["finish_s"], slo, int(told["iterations"]), int(told["passes"])
            )
            found.append(Prediction(name, float(run["rate_rps"]), len(run["requests"]), real, simulated))
    if not found:
        raise InputError(where, "heldout", "no run", "measure it again: benchmarks/dlora_gpu.py --parts iterations,heldout")
    return found


@dataclass(frozen=True, slots=True)
class ClusterPrediction:
    """One run of the live cluster: mean latency and queueing per output token, seconds, and requests that moved."""

    migration: str
    rate: float
    requests: int
    mean_s: tuple[float, float]
    """Measured and simulated; and so the next two."""
    queueing_s: tuple[float, float]
    moved: tuple[int, int]

    @property
    def error_percent(self) -> float:
        """Of the mean latency, signed."""
        return 100 * (self.mean_s[1] / self.mean_s[0] - 1)


def predict_cluster(report: Mapping[str, Any], live: Mapping[str, Any], where: str = "cluster") -> list[ClusterPrediction]:
    """The runs of `fig11a` in `live` (benchmarks/dlora_cluster_gpu.py), simulated with the prices in `report`.

    Raises:
        InputError: a part is not there.
    """
    runs, asked = live.get("parts", {}).get("fig11a"), live.get("asked")
    if not runs or not asked or "iterations" not in report:
        mend = "run benchmarks/dlora_cluster_gpu.py --parts fig11a, and benchmarks/dlora_gpu.py --parts iterations"
        raise InputError(where, "fig11a", None, mend)
    found = []
    for run in runs:
        if not ({"error", "left_out"} & run.keys()):
            found.append(_predict_run(report, live, run, asked[f"{run['rate']}, {run['adapters']} adapters"]))
    return found


def _predict_run(
    report: Mapping[str, Any], live: Mapping[str, Any], run: Mapping[str, Any], requests: Sequence[Sequence[float]]
) -> ClusterPrediction:
    config, slots = engine_config(int(live["kv_blocks"]), int(live["batch"]), int(live["budget"])), int(live["slots"])
    replicas, hosts = [], [set(hosted) for hosted in run["hosts"]]
    for index, hosted in enumerate(hosts):
        rules = rules_of(live["facts"][index]["constants"])
        costs = MeasuredCosts(report["iterations"], rules)
        policy = policy_of(str(run["policy"]), rules, int(run["adapters"]), slots, int(live["batch"]))
        replicas.append(MeasuredReplica(config, policy, costs, Slots(slots, sorted(hosted)[:slots]), index))
    rules_of_migration = MigrationRules(interval_s=float(live["interval_s"]), load_excess=float(live["load_excess"]))
    cluster = Cluster(replicas, hosts, ClusterRules(str(run["migration"]), rules_of_migration))
    done = cluster.serve([sequence_of(i, told) for i, told in enumerate(requests)])
    mean_s = statistics.fmean((s.finish_s - s.arrival_s) / s.output_tokens for s in done)
    queueing_s = statistics.fmean((s.finish_s - s.arrival_s - s.executed_s) / s.output_tokens for s in done)
    measured = float(run["mean_s_per_token"]), float(run["queueing_s_per_token"]), int(run["moved_requests"])
    moved = sum(s.migrations > 0 for s in done)
    return ClusterPrediction(
        str(run["migration"]),
        float(run["rate"]),
        len(done),
        (measured[0], mean_s),
        (measured[1], queueing_s),
        (measured[2], moved),
    )


def slo_rates(found: Sequence[Prediction], slo: float) -> dict[str, tuple[float | None, float | None]]:
    """Per policy the largest rate whose mean latency is within the limit, measured and simulated.

    Between two rates a straight line (sheet, 6); None where the limit is not crossed between the lowest and the highest rate.
    """
    rates: dict[str, tuple[float | None, float | None]] = {}
    for policy in dict.fromkeys(p.policy for p in found):
        mine = sorted((p for p in found if p.policy == policy), key=lambda p: p.rate_rps)
        measured = _crossing([(p.rate_rps, p.measured.mean_s_per_token) for p in mine], slo)
        rates[policy] = measured, _crossing([(p.rate_rps, p.simulated.mean_s_per_token) for p in mine], slo)
    return rates


def _crossing(curve: Sequence[tuple[float, float]], limit: float) -> float | None:
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y0 <= limit < y1:
            return x0 + (x1 - x0) * (limit - y0) / (y1 - y0)
    return None


def as_table(found: Sequence[Prediction], slo: float) -> str:
    """For people."""
    lines = [f"{'policy':8}{'req/s':>7}{'n':>5}  {'mean s/token':>24}  {'P90 s/token':>24}  {f'within {slo:g} s':>22}"]
    for p in found:
        cells = [f"{p.policy:8}{p.rate_rps:7.1f}{p.requests:5d}"]
        for name in ("mean_s_per_token", "p90_s_per_token"):
            real, mine = getattr(p.measured, name), getattr(p.simulated, name)
            cells.append(f"{real:8.4f}{mine:8.4f}{p.error_percent(name):+7.1f}%")
        cells.append(f"{p.measured.within_slo:7.1%}{p.simulated.within_slo:7.1%}{p.error_percent('within_slo'):+6.1f}")
        lines.append("  ".join(cells))
    for policy, (real_rps, mine_rps) in slo_rates(found, slo).items():
        told = "not crossed" if real_rps is None or mine_rps is None else f"{100 * (mine_rps / real_rps - 1):+.1f} %"
        lines.append(f"{policy}: SLO rate measured {_rate(real_rps)}, simulated {_rate(mine_rps)} ({told})")
    for name in ("mean_s_per_token", "p90_s_per_token"):
        errors = [p.error_percent(name) for p in found]
        worst = max(errors, key=abs)
        lines.append(f"{name}: mean of absolute errors {statistics.fmean(map(abs, errors)):.1f} %, worst {worst:+.1f} %")
    return "\n".join(lines)


def cluster_table(found: Sequence[ClusterPrediction]) -> str:
    """For people."""
    lines = [f"{'migration':12}{'rate':>6}{'n':>6}{'mean s/token':>27}{'queueing s/token':>20}{'moved':>10}"]
    for p in found:
        mean = f"{p.mean_s[0]:10.4f}{p.mean_s[1]:9.4f}{p.error_percent:+7.1f}%"
        queueing = f"{p.queueing_s[0]:10.4f}{p.queueing_s[1]:10.4f}"
        lines.append(f"{p.migration:12}{p.rate:6.2f}{p.requests:6d}{mean}{queueing}{p.moved[0]:5d}{p.moved[1]:5d}")
    return "\n".join(lines)


def _rate(value: float | None) -> str:
    return "outside the rates" if value is None else f"{value:.1f} req/s"


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module; 2 for a file that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, required=True, help="what benchmarks/dlora_gpu.py wrote")
    parser.add_argument("--cluster", type=Path, help="what benchmarks/dlora_cluster_gpu.py wrote")
    parser.add_argument("--slo-s-per-token", type=float, default=SLO_S_PER_TOKEN)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON too")
    given = parser.parse_args(arguments)
    try:
        report = read(given.measured)
        found = predict(report, given.slo_s_per_token, str(given.measured))
        live = predict_cluster(report, read(given.cluster), str(given.cluster)) if given.cluster is not None else []
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(as_table(found, given.slo_s_per_token))
    if live:
        print(cluster_table(live))
    if given.out is not None:
        given.out.write_text(json.dumps([asdict(p) for p in found] + [asdict(p) for p in live], indent=1) + "\n")
    return 0


def read(path: Path) -> dict[str, Any]:
    """A benchmark's file. Raises InputError when it is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(path, "file", type(error).__name__, "give what one of dLoRA's benchmarks wrote") from error
    if not isinstance(found, dict):
        raise InputError(path, "file", type(found).__name__, "give what one of dLoRA's benchmarks wrote")
    return found


if __name__ == "__main__":
    sys.exit(main())
