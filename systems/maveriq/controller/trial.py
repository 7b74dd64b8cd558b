"""Several models on one GPU for real: the controller, its queues, loads and removals under traffic, deaths, memory by NVML.

    python -m systems.maveriq.controller.trial --fingerprints FILE.csv --out FILE.json [--device cuda] [--shapes A,B,C]

The node is virtual (four GPUs as budgets) on one real device; models go to different virtual GPUs, so their requests may run at
once. Every section is tried; one that fails leaves its error in the file and the others go on. On a CPU use
`--device cpu --shapes tiny`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from systems.common.errors import InputError
from systems.maveriq.controller.core import Core, Deployment
from systems.maveriq.controller.driver import Answer, Controller
from systems.maveriq.controller.library import Library
from systems.maveriq.controller.memory import Budgets, Nvml
from systems.maveriq.controller.queues import QUEUES
from systems.maveriq.search import Refusal, Wish

MODELS = ("llama-2-7b", "llama-2-13b", "gptj-6b")
PROMPT = "What does a controller for language models have to know about memory? "


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run is about. `shapes[i]` is the engine's shape for the i-th model."""

    library: Library
    shapes: tuple[str, ...]
    device: str
    kv_blocks: int
    requests: int
    rate_rps: float
    tokens: int

    def controller(self, queue: str) -> Controller:
        """A controller of four virtual GPUs on the one device."""

        def argv(deployment: Deployment) -> Sequence[str]:
            shape = self.shapes[MODELS.index(deployment.decision.wish.model) % len(self.shapes)]
            return (
                sys.executable, "-m", "systems.common.serve", "--model", shape, "--random-weights", "--port", "0",
                "--device", self.device, "--kv-blocks", str(self.kv_blocks), "--max-model-len", "512", "--max-num-seqs", "8",
            )  # fmt: skip

        devices = (0, 0, 0, 0) if self.device == "cuda" else ()
        memory = Budgets((47.98828,) * 4, (0.46527,) * 4, devices)
        return Controller(Core(self.library.search(), QUEUES[queue]()), memory, argv, self.library)

    def wish(self, model: str) -> Wish:
        """One virtual GPU each, the emptiest."""
        return Wish(model, "min_mem", output_length=self.tokens, strategy="none")


async def _deployed(node: Controller, setting: Setting) -> list[dict[str, Any]]:
    """Deploy all models one after the other; how long each took."""
    took = []
    for place, model in enumerate(MODELS):
        begun = time.monotonic()
        found = await node.deploy(f"m{place}", setting.wish(model))
        if isinstance(found, Refusal):
            raise RuntimeError(found.reason)
        took.append({"model": model, "load_s": time.monotonic() - begun, "gpus": list(found.gpus)})
    return took


async def _traffic(node: Controller, setting: Setting, seed: int) -> list[Answer]:
    """Poisson requests for all models alike."""
    pick, futures = random.Random(seed), []
    for _ in range(setting.requests):
        await asyncio.sleep(pick.expovariate(setting.rate_rps))
        name = pick.choice(sorted(node.core.deployments))
        futures.append(node.submit(name, PROMPT)[1])
    return list(await asyncio.gather(*futures))


def _summary(answers: Sequence[Answer]) -> dict[str, Any]:
    good = [answer for answer in answers if not answer.error]
    if not good:
        return {"requests": len(answers), "answered": 0, "errors": sorted({answer.error for answer in answers})}
    return {
        "requests": len(answers),
        "answered": len(good),
        "e2e_p50_s": statistics.median(answer.e2e_s for answer in good),
        "e2e_mean_s": statistics.fmean(answer.e2e_s for answer in good),
        "service_mean_s": statistics.fmean(answer.service_s for answer in good),
        "errors": sorted({answer.error for answer in answers if answer.error}),
    }


async def queues(setting: Setting) -> dict[str, Any]:
    """The same traffic under both queues."""
    told: dict[str, Any] = {}
    for queue in QUEUES:
        async with setting.controller(queue) as node:
            loads = await _deployed(node, setting)
            told[queue] = {"loads": loads, **_summary(await _traffic(node, setting, seed=1))}
    return told


async def memory(setting: Setting) -> dict[str, Any]:
    """GPU memory of every engine's processes as models come and go, by NVML."""
    steps = []
    async with setting.controller("per_model") as node:
        for place, model in enumerate(MODELS):
            await node.deploy(f"m{place}", setting.wish(model))
            await node.inference(f"m{place}", PROMPT)
            steps.append(await _held(node, f"{model} loaded"))
        for name in sorted(node.core.deployments):
            await node.remove(name)
            steps.append(await _held(node, f"{name} removed"))
    return {"steps": steps}


async def _held(node: Controller, what: str) -> dict[str, Any]:
    pids = {one["id"]: one["pid"] for one in node.status()}
    found = await asyncio.to_thread(Nvml().processes_gib)
    groups = {pid: _group(pid) for pid in found}
    return {
        "what": what,
        "gib": {name: sum(gib for pid, gib in found.items() if groups[pid] == main) for name, main in pids.items()},
        "all_processes_gib": sum(found.values()),
    }


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


async def removal_under_traffic(setting: Setting) -> dict[str, Any]:
    """One model leaves and comes back while requests arrive: who fails, and for how long."""
    async with setting.controller("per_model") as node:
        await _deployed(node, setting)
        traffic = asyncio.create_task(_traffic(node, setting, seed=2))
        await asyncio.sleep(setting.requests / setting.rate_rps / 3)
        lost = await node.remove("m0")
        begun = time.monotonic()
        await node.deploy("m0", setting.wish(MODELS[0]))
        back_s = time.monotonic() - begun
        return {"lost": lost, "back_s": back_s, **_summary(await traffic)}


async def death_under_traffic(setting: Setting) -> dict[str, Any]:
    """An engine is killed while requests run: retried once, the others unharmed."""
    async with setting.controller("per_model") as node:
        await _deployed(node, setting)
        traffic = asyncio.create_task(_traffic(node, setting, seed=3))
        await asyncio.sleep(setting.requests / setting.rate_rps / 3)
        victim = next(one for one in node.status() if one["id"] == "m0")
        os.killpg(victim["pid"], signal.SIGKILL)
        answers = await traffic
        others = [answer for answer in answers if answer.deployment != "m0"]
        retried = sum(answer.tries > 1 for answer in answers)
        return {**_summary(answers), "retried": retried, "others_failed": sum(bool(answer.error) for answer in others)}


SECTIONS: dict[str, Callable[[Setting], Awaitable[dict[str, Any]]]] = {
    "queues": queues,
    "memory": memory,
    "removal_under_traffic": removal_under_traffic,
    "death_under_traffic": death_under_traffic,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run all sections; 0 when none failed, 1 otherwise, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m systems.maveriq.controller.trial", description=__doc__)
    parser.add_argument("--fingerprints", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shapes", default="llama-2-7b,opt-6.7b,qwen2-0.5b")
    parser.add_argument("--kv-blocks", type=int, default=512)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--rate-rps", type=float, default=6.0)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    args = parser.parse_args(argv)
    try:
        library = Library.read(args.fingerprints)
        unknown = sorted(set(args.sections.split(",")) - set(SECTIONS))
        if unknown:
            raise InputError("command line", "--sections", ",".join(unknown), f"use some of {', '.join(SECTIONS)}")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    shapes = tuple(itertools.islice(itertools.cycle(args.shapes.split(",")), len(MODELS)))
    setting = Setting(library, shapes, args.device, args.kv_blocks, args.requests, args.rate_rps, args.tokens)
    told: dict[str, Any] = {"setting": _plain(setting)}
    for name in args.sections.split(","):
        told[name] = _tried(SECTIONS[name], setting)
        _write(args.out, told)  # what there is, also when the next one never ends
    return int(any("error" in told[name] for name in args.sections.split(",")))


def _plain(setting: Setting) -> dict[str, Any]:
    return {field.name: getattr(setting, field.name) for field in fields(setting) if field.name != "library"}


def _tried(section: Callable[[Setting], Awaitable[dict[str, Any]]], setting: Setting) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        return await section(setting)

    try:
        return asyncio.run(run())
    except Exception as error:
        return {"error": str(error), "trace": traceback.format_exc()}


def _write(file: Path, told: dict[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(told, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


if __name__ == "__main__":
    sys.exit(main())
