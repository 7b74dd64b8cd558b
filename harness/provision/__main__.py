"""`snakemake provision` and `snakemake deprovision`, and the same by hand.

    python -m harness.provision --inventory hosts/lab.yaml [HOST ...] [--until sync]
    python -m harness.provision --inventory hosts/lab.yaml --remove

Hosts are worked on side by side; one that fails does not stop the others. Ends with 1 when any did.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from harness import cli
from harness.code_version import ROOT
from harness.inventory import Host, load_inventory
from harness.provision import code, smoke
from harness.provision.layout import STEPS
from harness.provision.steps import Plan, deprovision, provision
from harness.remote.fan_out import Console, Gathered, fan_out


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.provision", description="Make hosts ready, or unmake them.")
    parser.add_argument("hosts", nargs="*", metavar="HOST", help="host, range, group or tag (all without any)")
    parser.add_argument("--inventory", type=Path, required=True, metavar="FILE")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="FOLDER", help="facts go into its hosts/")
    parser.add_argument("--mirror", type=Path, metavar="FOLDER", help="datasets are looked for here first")
    parser.add_argument("--offline", action="store_true", help="of no effect here: nothing is downloaded")
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1], help="the last step (all)")
    parser.add_argument("--remove", action="store_true", help="remove everything that provisioning made")
    return parser


def _once(work: Callable[[], str]) -> Callable[[], str]:
    """`work`, done once however many threads ask for it."""
    lock, cached = threading.Lock(), cache(work)

    def locked() -> str:
        with lock:
            return cached()

    return locked


def _say_all(hosts: Sequence[Host], gathered: Gathered[str]) -> None:
    wide = max(len(host.name) for host in hosts)
    for host in hosts:
        error = gathered.failed.get(host.name)
        said = f"FAILED: {str(error).removeprefix(f'{host.name}: ')}" if error else gathered.done[host.name]
        print(f"{host.name:<{wide}}  {said}")


def main(argv: Sequence[str] | None = None) -> int:
    """Provision or deprovision; 0 when every host is as wanted, 1 when one is not."""
    given = _arguments().parse_args(argv)
    inventory = load_inventory(given.inventory)
    hosts = [host for host in inventory.select(*given.hosts) if host.runner.kind != "none"]
    if not hosts:
        print(f"{given.inventory}: no host in it runs jobs")
        return 0
    console = Console(hosts, sys.stderr)
    if given.remove:
        gathered = fan_out(hosts, lambda host: deprovision(host, given.results))
    else:
        cargo = code.load(ROOT, given.mirror) if any(not host.local for host in hosts) else code.Cargo(ROOT, {})
        for note in cargo.notes:
            cli.say(f"note: {note}")
        plan = Plan(cargo, _once(smoke.metrics), given.results, given.until)
        gathered = fan_out(hosts, lambda host: provision(host, plan, console.of(host)).line)
    _say_all(hosts, gathered)
    return int(bool(gathered.failed))


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
