"""The sections of `trial`: what is done with the models on a node, and what is read off while they serve."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from systems.common.errors import InputError
from systems.maveriq.controller.driver import Answer, Controller
from systems.maveriq.controller.engines import session
from systems.maveriq.controller.memory import Budgets, Nvml
from systems.maveriq.controller.queues import QUEUES
from systems.maveriq.controller.trial_node import Node, Tenant
from systems.maveriq.profile.memory import gpus_used, grown_gib
from systems.maveriq.search import Refusal

PROMPT = "What does a controller for language models have to know about memory? " * 14
LONE = 4
"""Requests of each model alone on the node; the first is not counted."""
LOAD = 0.7
"""Share of the time that the busiest GPU is to work under the queues."""
SECTION_S = {"load": 0.0, "queues": 16.0, "removal_under_traffic": 10.0, "death_under_traffic": 10.0, "unload": 0.0}
"""Least time that must be left for a section to begin, seconds."""


@dataclass
class Trial:
    """A run: the node, its books (the controller's own), the controller, and what the sections found.

    `traffic_s` is the length of each stretch of traffic.
    """

    node: Node
    budgets: Budgets
    controller: Controller
    prompt_tokens: int
    traffic_s: float
    rate_rps: float | None
    service_s: dict[str, float] = field(default_factory=dict)

    # ---- sections

    async def load(self) -> dict[str, Any]:
        """All models come, one after the other; each is asked some requests while nobody else is."""
        found = []
        for tenant in self.node.tenants:
            try:
                found.append(await self._comes(tenant))
            except InputError as error:
                found.append({"name": tenant.name, "model": tenant.wish.model, "refusal": str(error)})
            print(f"  {tenant.name}: {_line(found[-1])}", flush=True)
        return {"tenants": found}

    async def _comes(self, tenant: Tenant) -> dict[str, Any]:
        before = await _used()
        self._leave(tenant)
        begun = time.monotonic()
        deployed = await self.controller.deploy(tenant.name, tenant.wish)
        deploy_s = time.monotonic() - begun
        if isinstance(deployed, Refusal):
            return {"name": tenant.name, "model": tenant.wish.model, "refusal": deployed.reason}
        answers = [await self.controller.inference(tenant.name, self.prompt) for _ in range(LONE)]
        failed = [answer.error for answer in answers if answer.error]
        served = [answer.service_s for answer in answers[1:] if not answer.error]
        self.service_s[tenant.name] = statistics.median(served) if served else 1.0
        told, decision = self._status(tenant.name), deployed.decision
        return {
            "name": tenant.name, "model": tenant.wish.model, "intent": tenant.wish.intent,
            "configuration": asdict(decision.configuration), "pp_map": list(decision.placement.pp_map),
            "gpus": list(deployed.gpus), "devices": told["devices"], "differs": told["differs"],
            "deploy_s": deploy_s, "load_s": told["load_s"], "service_s": served, "errors": failed,
            "estimate": {key: _number(value) for key, value in asdict(decision.estimate).items() if key != "notes"},
            "memory": await _grown(before), "processes": await _processes(told["pid"]),
        }  # fmt: skip

    def _leave(self, tenant: Tenant) -> None:
        """What others leave on the node for `tenant`."""
        idle_gib = self.budgets.idle_gib = self.node.budgets().idle_gib
        if tenant.room is not None:
            states = self.budgets.states(lambda _: 0.0)
            used = [gpu.used_gib - gib for gpu, gib in zip(states, idle_gib, strict=True)]
            room = tenant.room(self.controller.core.search, tenant.wish)
            free = zip(self.node.total_gib, used, room, strict=True)
            self.budgets.idle_gib = tuple(max(0.0, total - held - gib) for total, held, gib in free)

    async def queues(self) -> dict[str, Any]:
        """The same traffic under both queues."""
        told: dict[str, Any] = {"rate_rps": self._rate()}
        for queue in QUEUES:
            self.controller.core.queue = QUEUES[queue]()  # nothing waits now
            answers, refused = await self._traffic(seed=1)
            told[queue] = {**_summary(answers), "refused": refused}
            print(f"  {queue}: mean {told[queue].get('e2e_mean_s', float('nan')):.3f} s", flush=True)
        return told

    async def removal_under_traffic(self) -> dict[str, Any]:
        """The last model leaves and comes back while requests arrive: who fails, and for how long."""
        tenant = self.node.tenants[-1]
        traffic = asyncio.create_task(self._traffic(seed=2))
        await asyncio.sleep(self.traffic_s / 4)
        begun = time.monotonic()
        lost = await self.controller.remove(tenant.name)
        removed_s = time.monotonic() - begun
        self._leave(tenant)
        back = await self.controller.deploy(tenant.name, tenant.wish)
        back_s = time.monotonic() - begun
        answers, refused = await traffic
        others = [answer for answer in answers if answer.deployment != tenant.name]
        return {
            "who": tenant.name, "lost": lost, "removed_s": removed_s, "back_s": back_s, "back": not isinstance(back, Refusal),
            "refused": refused, "all": _summary(answers), "others": _summary(others),
        }  # fmt: skip

    async def death_under_traffic(self) -> dict[str, Any]:
        """A process of the first model's engine is killed while requests run: retried once, the others unharmed."""
        tenant = self.node.tenants[0]
        before, pid = await _used(), self._status(tenant.name)["pid"]
        traffic = asyncio.create_task(self._traffic(seed=3))
        await asyncio.sleep(self.traffic_s / 4)
        limit = time.monotonic() + 5.0
        while tenant.name not in self.controller.core.running() and time.monotonic() < limit:
            await asyncio.sleep(0.001)
        who, what = victim(pid)
        mid_request = tenant.name in self.controller.core.running()
        os.kill(who, signal.SIGKILL)
        begun = time.monotonic()
        again = await self.controller.inference(tenant.name, self.prompt)
        back_s = time.monotonic() - begun
        answers, _ = await traffic
        others = [answer for answer in answers if answer.deployment != tenant.name]
        return {
            "who": tenant.name, "killed": what, "mid_request": mid_request, "back_s": back_s, "answer_error": again.error,
            "retried": sum(answer.tries > 1 for answer in answers), "others_failed": sum(bool(a.error) for a in others),
            "processes_left": len(session(pid)), "memory_after_restart": await _grown(before),
            "all": _summary(answers), "others": _summary(others),
        }  # fmt: skip

    async def unload(self) -> dict[str, Any]:
        """All models leave, one after the other: what each gives back."""
        steps = []
        for name in sorted(self.controller.core.deployments):
            before, begun = await _used(), time.monotonic()
            await self.controller.remove(name)
            steps.append({"name": name, "removed_s": time.monotonic() - begun, "memory": await _grown(before)})
        return {"steps": steps}

    # ---- parts

    @property
    def prompt(self) -> str:
        """A prompt of `prompt_tokens` tokens: the stand-in tokenizer reads one per byte."""
        return PROMPT[: self.prompt_tokens]

    def _status(self, name: str) -> dict[str, Any]:
        return next(one for one in self.controller.status() if one["id"] == name)

    def _rate(self) -> float:
        """Requests per second of all models together at which the busiest device works `LOAD` of the time."""
        names = [name for name in self.controller.core.deployments if name in self.service_s]
        if not names:
            raise InputError("trial", "traffic", None, "no model has been deployed: see section load")
        if self.rate_rps is not None:
            return self.rate_rps
        busy: dict[int, float] = {}
        for name in names:
            gpus = self.controller.core.deployments[name].gpus
            for device in set(self.controller.memory.devices(gpus) or gpus):
                busy[device] = busy.get(device, 0.0) + self.service_s[name]
        return LOAD * len(names) / max(busy.values())

    async def _traffic(self, seed: int) -> tuple[list[Answer], int]:
        """Poisson requests for all models alike; the answers, and how many found nobody."""
        pick, futures, refused = random.Random(seed), [], 0
        names, rate, at_s = sorted(tenant.name for tenant in self.node.tenants), self._rate(), 0.0
        begun = time.monotonic()
        while (at_s := at_s + pick.expovariate(rate)) < self.traffic_s:
            name = pick.choice(names)
            await asyncio.sleep(max(0.0, begun + at_s - time.monotonic()))
            try:
                futures.append(self.controller.submit(name, self.prompt)[1])
            except InputError:
                refused += 1
        return list(await asyncio.gather(*futures)), refused


def victim(pid: int) -> tuple[int, str]:
    """The process of an engine to kill: its last rank, else the one that holds the model, else itself."""
    words = {one: _command(one) for one in session(pid)}
    for what in ("parallel.rank", "spawn_main"):
        if found := [one for one in words if what in words[one]]:
            return max(found), what
    return pid, "server"


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _summary(answers: Sequence[Answer]) -> dict[str, Any]:
    good = [answer for answer in answers if not answer.error]
    told: dict[str, Any] = {"requests": len(answers), "answered": len(good)}
    told["errors"] = sorted({answer.error for answer in answers if answer.error})
    if good:
        times = sorted(answer.e2e_s for answer in good)
        told |= {f"e2e_p{share}_s": times[min(len(times) - 1, len(times) * share // 100)] for share in (50, 95)}
        told["e2e_mean_s"] = statistics.fmean(times)
        told["service_mean_s"] = statistics.fmean(answer.service_s for answer in good)
    return told


async def _used() -> Mapping[str, int] | None:
    """Bytes in use on every GPU; None where there is none."""
    try:
        return (await asyncio.to_thread(gpus_used))[0]
    except InputError:
        return None


async def _grown(before: Mapping[str, int] | None) -> dict[str, Any]:
    """GiB by which use has grown since, in all and by GPU."""
    now = await _used()
    if before is None or now is None:
        return {"gib": None, "by_gpu": [], "how": "no GPU memory here"}
    by_gpu = [grown_gib(before, now, [name]) for name in now]
    return {"gib": sum(by_gpu), "by_gpu": by_gpu, "how": "NVML: in use on all GPUs, less what was before"}


async def _processes(pid: int | None) -> dict[str, Any]:
    """GiB of each process of an engine, by NVML; where it names processes as another namespace does, none of them is ours."""
    try:
        found = await asyncio.to_thread(Nvml().processes_gib)
    except InputError as error:
        return {"error": str(error)}
    ours = {} if pid is None else {one: found[one] for one in session(pid) if one in found}
    return {"gib": sum(ours.values()) if ours else None, "by_process": list(ours.values()), "seen": len(found)}


def _number(value: object) -> object:
    return None if isinstance(value, float) and value != value else value


def _line(one: Mapping[str, Any]) -> str:
    if "refusal" in one:
        return f"refused: {one['refusal']}"
    c, gib = one["configuration"], one["memory"]["gib"]
    held = "" if gib is None else f", {gib:.2f} GiB (estimate {one['estimate']['memory_gib']:.2f})"
    served = f"{statistics.median(one['service_s']):.3f} s" if one["service_s"] else f"failed: {one['errors']}"
    return f"TP {c['tp']} {c['dtype']} layers {one['pp_map']}, loaded in {one['load_s']:.1f} s, served in {served}{held}"


# ---- the command
