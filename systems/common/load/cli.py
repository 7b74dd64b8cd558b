"""Load an OpenAI-compatible server and measure its latencies.

    python -m systems.common.load --url http://127.0.0.1:8000/v1 --rate 4 --lengths sharegpt --duration 120 --out DIR

docs/load.md explains every option. Exit status: 0 done; 1 done, but the client was too slow for what it measured to count,
or no request finished; 2 bad input, or no server; 130, 143 interrupted (what was measured is written, marked `cut_off`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import platform
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from tqdm import tqdm

from systems.common.core import Request
from systems.common.errors import InputError
from systems.common.load import loops, options, plan, report, results
from systems.common.load.answer import message
from systems.common.load.api import Api
from systems.common.load.connection import Client, Page, Target
from systems.common.load.drive import Driver, kind_of
from systems.common.load.measurement import Limits, Measurement, RunClock
from systems.common.load.prompts import Prompts
from systems.common.workloads import Workload

PROBE_S = 20.0
"""How long the server may take to say which models it has."""
WARMUP_SEED = 1_000_003
"""Added to the seed for the prompts of warm-up requests, so that no prefix cache knows the run's own."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def models(client: Client, api: Api) -> list[str] | None:
    """The models that the server lists; None when it has no such list. Raises InputError when it does not answer."""
    page = Page()
    try:
        async with asyncio.timeout(PROBE_S):
            await client.exchange(api.get("/models"), page)
    except (OSError, ValueError) as error:
        why = f"{kind_of(error)}: {error}" if str(error) else kind_of(error)
        raise InputError("load", "--url", api.target.url, f"no server answers there ({why}): start it, or mend this") from error
    if page.status in (401, 403):
        said, given = api.hide(message(page.content)), "(hidden)" if api.api_key else None
        raise InputError("load", "--api-key", given, f"the server answers HTTP {page.status} ({said}): give the right one")
    try:
        return [str(entry["id"]) for entry in json.loads(page.content)["data"]] if page.status == 200 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


async def checked(client: Client, api: Api, workload: Workload, check: bool) -> Api:
    """`api` with a model name that the server knows. Raises InputError when it lists others only."""
    known = await models(client, api)
    if not api.model:
        if not known:
            raise InputError("load", "--model", None, "the server lists none: give its name")
        api = replace(api, model=known[0])
    if known is not None and check:
        for name in dict.fromkeys(
            api.model_for(adapter) for adapter in (None, *sorted(set(workload.adapters) - {None}, key=str))
        ):
            if name not in known:
                mend = f"the server lists {', '.join(known) or 'none'}: use one of them, --adapter-model or --no-check"
                raise InputError("load", "--model", name, mend)
    return api


async def measure(given: argparse.Namespace, api: Api, workload: Workload, limits: Limits) -> tuple[Api, Driver, Measurement]:
    """Ask the server for its models, warm it up, run."""
    clock = RunClock()
    client = Client(api.target, clock)
    try:
        api = await checked(client, api, workload, not given.no_check)
        driver = Driver(api, client, clock, options.prompts(given, given.seed), limits)
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, driver.interrupt, number)
        if given.warmup:
            await _warm_up(driver, options.prompts(given, given.seed + WARMUP_SEED), workload.requests[: given.warmup])
        with tqdm(total=len(workload), unit="req", disable=True if given.no_progress else None, smoothing=0.1) as bar:
            driver.progress = bar.update
            measurement = await driver.run(workload.requests)
        return api, driver, measurement
    finally:
        client.close()


async def _warm_up(driver: Driver, prompts: Prompts, requests: Sequence[Request]) -> None:
    """One request after another: servers compile, capture and allocate on the first."""
    before = driver.prompts, driver.limits, driver.name
    driver.prompts, driver.limits = prompts, Limits(concurrency=1, timeout_s=driver.limits.timeout_s)
    driver.name += "-warmup"
    await driver.run(requests)
    driver.prompts, driver.limits, driver.name = before


def provenance(given: argparse.Namespace, api: Api, workload: Workload, driver: Driver, started: datetime) -> dict[str, object]:
    """The section `run` of metrics.json: what was asked, of whom, by what. Holds no secret."""
    said = {key: str(value) for key, value in vars(given).items() if value is not None and key not in ("out", "no_progress")}
    return {
        "started": started.isoformat(timespec="seconds"),
        "monotonic_zero_s": driver.clock.zero_s,
        "name": driver.name,
        "url": api.target.url,
        "model": api.model,
        "loop": "closed" if driver.limits.concurrency is not None else "open",
        "concurrency": driver.limits.concurrency,
        "requests": len(workload),
        "notes": list(workload.notes),
        "options": said,
        "python": platform.python_version(),
        "event_loop": loops.name(),
        "client": platform.node(),
    }


def load(given: argparse.Namespace) -> tuple[Mapping[str, Any], int]:
    """Run the command: the content of metrics.json, and the exit status. Raises InputError before anything is sent."""
    slo = plan.slo(given.slo) if given.slo else None
    workload = plan.workload(options.sources(given), given.seed)
    limits = options.limits(given, len(workload))
    options.prompts(given, given.seed)
    target = Target.parse(given.url, "--url")
    key = options.api_key(given.api_key)
    extra = options.extra(given.extra)
    api = Api(target, given.model or "", given.kind, given.route, given.adapter_model, given.temperature, extra, key)
    if given.out:
        results.check_free(given.out, overwrite=given.overwrite)
    _many_files()
    started = datetime.now(UTC)
    api, driver, measurement = loops.run(measure(given, api, workload, limits))
    summary: dict[str, Any] = results.metrics(measurement, slo)
    if slo is not None:
        summary["slo"] = {"name": given.slo, **asdict(slo)}
    summary["run"] = provenance(given, api, workload, driver, started)
    if given.out:
        with _undisturbed():
            results.write(given.out, measurement, summary, overwrite=given.overwrite)
    if driver.signal:
        return summary, 128 + driver.signal
    return summary, 0 if summary["accurate"] and summary["metrics"]["finished"] else 1


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C must not cost what the first one kept."""
    before = [signal.signal(number, signal.SIG_IGN) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def _many_files() -> None:
    """As many connections as this machine lets one process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; see this module's text for the exit status."""
    given = options.parser().parse_args(arguments)
    try:
        summary, status = load(given)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before anything was sent", file=sys.stderr)
        return 130
    for note in summary["run"]["notes"]:
        print(f"note: {note}")
    print(report.shown(summary))
    if given.out:
        print(given.out)
    return status
