"""Tuning beside serving on one GPU: is it correct, what does it cost, and what do LLMStation and its baselines reach?

    python benchmarks/llmstation.py --out DIR [--hardware h200x1] [--seconds 12] [--rates 6,15,24]
        [--limit 460] [--sharegpt CSV] [--only PART,...]

One GPU, about eight minutes. Each part writes `DIR/llmstation.json` anew, so that what is done is kept:

* `correct`: tokens served with and without tuning beside; losses tuned with and without serving beside.
* `slowdown`: decode steps and prompts alone and beside tuning, tasklets alone and beside serving; also as
  `DIR/corun_slowdowns.csv`, which the simulator reads; `python -m systems.llmstation.calibrate` measures more of them.
* `policies`: P99 TTFT and TPOT and tuning samples/s of every system at some request rates, with fixed knobs, one workload.

`--hardware cpux1` runs all of it with a tiny model on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from systems.common.core import Request, Trial
from systems.llmstation.calibrate.beside import TINY, Effort, Sharing, slowdowns
from systems.llmstation.calibrate.rows import text
from systems.llmstation.corun.beside import Beside
from systems.llmstation.corun.measure import wanted_of
from systems.llmstation.corun.pace import Counted
from systems.llmstation.corun.session import Session, make_trainer, session
from systems.llmstation.experiments import colocation

KV_BLOCKS = 8_000
"""128,000 tokens: enough for these rates, and this process keeps its pool while pairs of others run."""
WORKLOAD = {
    "arrivals": "poisson",
    "lengths": "sharegpt_lengths",
    "lengths_filter": "vllm-sharegpt",
    "mean_input_tokens": 215.2,
    "mean_output_tokens": 198,
}
FIXED = {"forward_tasklets": 8, "forward_wait_s": 0.005, "backward_tasklets": 8, "backward_wait_s": 0.005}
POLICIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("inference only", {"policy": "inference_only"}),
    ("planner 10 ms", {"policy": "llmstation", "decode_target_s": 0.010}),
    ("planner 20 ms", {"policy": "llmstation", "decode_target_s": 0.020}),
    ("fixed", {"policy": "llmstation", "mode": "fixed", **FIXED}),
    ("feedback", {"policy": "llmstation", "mode": "feedback", "slo_ttft_s": 0.2, "slo_tpot_s": 0.02, **FIXED}),
    ("fineinfer", {"policy": "fineinfer", "defer_s": 0.1}),
    ("mps 30 %", {"policy": "mps", "thread_percentage": 30}),
    ("chunked 128", {"policy": "chunked", "chunk_tokens": 128}),
    ("mps 100 %", {"policy": "mps", "thread_percentage": 100}),
    ("planner, 66 SMs", {"policy": "llmstation", "decode_target_s": 0.020, "tuning_sms": 66}),
)
SLOW_TO_START = ("mps", "chunked", "planner, 66")
"""These need processes or a session of their own: only at the middle rate."""


class Script:
    """What the parts share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.began = time.perf_counter()
        self.found: dict[str, Any] = {"hardware": options.hardware, "errors": {}, "machine": machine(), "command": sys.argv}
        self.cpu = options.hardware == "cpux1"

    def trial(self, **parameters: object) -> Trial:
        """A trial of the benchmark's workload."""
        told = {"model": "llama-3.1-8b", "kv_blocks": 512 if self.cpu else KV_BLOCKS, "workload": WORKLOAD, **parameters}
        data = {"sharegpt_lengths": self.options.sharegpt}
        return Trial("llmstation", "colocation", told, self.options.hardware, "measured", 0, data)  # type: ignore[arg-type]

    def held(self) -> Session:
        """The session that all policies of one process share."""
        return session(wanted_of(self.trial()))

    def left_s(self) -> float:
        """Seconds until no further run is begun."""
        return float(self.options.limit) - (time.perf_counter() - self.began)

    def part(self, name: str, work: Callable[[], Any]) -> None:
        """Run one part; whatever it raises is written down, and the next one runs."""
        if self.options.only and name not in self.options.only.split(","):
            return
        began = time.perf_counter()
        try:
            self.found[name] = work()
        except Exception as error:  # the other parts run all the same
            traceback.print_exc()
            self.found["errors"][name] = f"{type(error).__name__}: {error}"
        self.found.setdefault("seconds", {})[name] = round(time.perf_counter() - began, 1)
        self.save()

    def save(self) -> None:
        """What there is so far."""
        path = self.options.out / "llmstation.json"
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(self.found, indent=1, default=str) + "\n", encoding="utf-8")
        draft.replace(path)

    # ---- correct

    def correct(self) -> dict[str, Any]:
        """Tokens with and without tuning; losses with and without serving."""
        held = self.held()
        steps = 24 if self.cpu else 96
        requests = [Request(i, 0.0, 16 + 7 * i % 60, steps - i % 3) for i in range(12 if self.cpu else 48)]
        alone = self._tokens(held, Beside(held.lanes), requests)
        losses: dict[str, list[float]] = {}
        for name in ("alone", "beside"):
            held.trainer = make_trainer(held.wanted.shape, held.weights, held.wanted)  # adapters from the same seed
            tuner = held.tuner()
            tokens = alone
            if name == "beside":
                tokens = self._tokens(held, Beside(held.lanes, tuner, Counted(6)), requests)
            else:
                while tuner.launched < 4 * tuner.length:
                    tuner.wait_for_room()
                    tuner.launch()
            tuner.drain()
            losses[name] = [float(loss) for loss in tuner.trainer.losses]
        both = min(map(len, losses.values()))
        pairs = list(zip(losses["alone"][:both], losses["beside"][:both], strict=True))
        return {
            "requests": len(requests),
            "tokens": sum(map(len, alone)),
            "requests_with_equal_tokens": sum(a == b for a, b in zip(alone, tokens, strict=True)),
            "losses_compared": both,
            "losses_bit_equal": sum(a == b for a, b in pairs),
            "largest_loss_difference": max((abs(a - b) / abs(a) for a, b in pairs), default=None),
            "losses": losses,
        }

    @staticmethod
    def _tokens(held: Session, beside: Beside, requests: list[Request]) -> list[list[int]]:
        held.colocated(beside).serve(requests, 120.0)
        return [list(held.executor.outputs[request.index]) for request in requests]

    # ---- slowdown

    def slowdown(self) -> dict[str, Any]:
        """Decode steps by batch, prompts by tokens, each alone and beside tuning."""
        sharing = Sharing(self.held(), TINY if self.cpu else Effort())
        tokens = self.held().wanted.tuning_tokens
        points = [("decode", batch) for batch in ((1, 4) if self.cpu else (1, 8, 32, 64, 128))]
        points += [("prefill", size) for size in ((16, 32) if self.cpu else (128, 512, 2000))]
        rows = [row for found in slowdowns(sharing, tokens, points) for row in found]
        (self.options.out / "corun_slowdowns.csv").write_text(text(rows), encoding="utf-8")
        return {
            "tasklet_alone_ms": {phase: 1e3 * s for phase, s in sharing.tasklet_s[tokens].items()},
            "alone_ms": {f"{phase} {size}": 1e3 * s for (phase, size), s in sharing.alone_s.items()},
            "rows": [row.cells() for row in rows],
        }

    # ---- policies

    def policies(self) -> list[dict[str, Any]]:
        """Every system at the given rates, those that are slow to start at the middle one only; saves after each run."""
        rates = [float(rate) for rate in self.options.rates.split(",")]
        middle = rates[len(rates) // 2]
        rows: list[dict[str, Any]] = []
        quick = [(rate, *entry) for rate in rates for entry in POLICIES if not entry[0].startswith(SLOW_TO_START)]
        slow = [(middle, *entry) for entry in POLICIES if entry[0].startswith(SLOW_TO_START)]
        quick.sort(key=lambda run: (run[0] != middle, run[0]))
        first = len(quick) // len(rates)
        # a session with fewer SMs takes the place of the one that the others share: last
        for rate, name, parameters in [*quick[:first], *slow[:-1], *quick[first:], slow[-1]]:
            if self.left_s() < 2 * self.options.seconds:
                rows.append({"policy": name, "rate_rps": rate, "left_out": "no time left"})
                continue
            rows.append(self._run(rate, name, parameters))
            self.found["policies"] = rows
            self.save()
        return rows

    def _run(self, rate: float, name: str, parameters: dict[str, Any]) -> dict[str, Any]:
        try:
            outcome = colocation(self.trial(rate_rps=rate, seconds=self.options.seconds, **parameters))
        except Exception as error:  # the other systems run all the same
            traceback.print_exc()
            return {"policy": name, "rate_rps": rate, "error": f"{type(error).__name__}: {error}"}
        metrics = outcome.metrics
        said = [f"{metrics[key]:.4g}" for key in ("ttft_p99_s", "tpot_p99_s", "peft_samples_per_s")]  # type: ignore[str-format]
        print(f"{name:18} {rate:6g} req/s: P99 TTFT {said[0]} s, P99 TPOT {said[1]} s, {said[2]} samples/s", flush=True)
        return {"policy": name, "rate_rps": rate, **parameters, "metrics": dict(metrics), "notes": list(outcome.notes)}


def machine() -> dict[str, Any]:
    """What ran it."""
    told: dict[str, Any] = {"torch": torch.__version__, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        told["gpu"] = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    return told


def main() -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hardware", default="h200x1")
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--rates", default="6,15,24")
    parser.add_argument("--limit", type=float, default=460.0, help="seconds after which no further run is begun")
    parser.add_argument("--sharegpt", type=Path, help="CSV of ShareGPT lengths; absent: the synthetic stand-in")
    parser.add_argument("--only", default="", help="parts to run")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    script = Script(options)
    script.part("correct", script.correct)
    script.part("slowdown", script.slowdown)
    script.part("policies", script.policies)
    print(json.dumps(script.found, default=str))
    return 1 if script.found["errors"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
