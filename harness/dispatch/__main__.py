"""`python -m harness.dispatch --inventory hosts/x.yaml [--tags T ...] -- python -m harness.series ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.dispatch.here import only_here

INVENTORY = "FIVEFOLD_INVENTORY"
"""The variable that names the inventory where no option does; the Snakefile sets it."""


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m harness.dispatch")
    parser.add_argument(
        "--inventory", type=Path, default=Path(os.environ.get(INVENTORY, "hosts/local.yaml")), help="the file of hosts"
    )
    parser.add_argument("--tags", nargs="*", default=[], metavar="TAG", help="only hosts with all of these tags")
    parser.add_argument("--slots", type=int, default=1, help="jobs at once on hosts that do not say how many")
    options = list(argv)
    command: list[str] = []
    if "--" in options:
        place = options.index("--")
        options, command = options[:place], options[place + 1 :]
    return parser.parse_args(options), command


def _main(argv: Sequence[str] | None = None) -> int:
    """Run the command on a host of the inventory."""
    from harness import cli
    from harness.dispatch.job import job_of
    from harness.dispatch.run import able, run_anywhere
    from harness.inventory import Host, load_inventory
    from harness.orphans import end_with_parent
    from systems.registry import InputError

    args, command = _parse(sys.argv[1:] if argv is None else argv)
    end_with_parent()
    job = job_of(command)
    inventory = load_inventory(args.inventory)
    workers = getattr(inventory, "workers", inventory.hosts)
    hosts: Sequence[Host] = [host for host in workers if set(args.tags) <= set(host.tags)]
    if not hosts:
        raise InputError(args.inventory, "tags", ", ".join(args.tags), "no host on which jobs run has all of these tags")
    hosts = able(job, hosts, args.inventory)
    return run_anywhere(job, hosts, args.inventory, args.slots, cli.say)


def main() -> int:
    """The command itself where it runs here, else its way to a host."""
    args, command = _parse(sys.argv[1:])
    if command and only_here(args.inventory):
        os.execvp(command[0], command)
    from harness import cli

    return cli.run(_main)


if __name__ == "__main__":
    raise SystemExit(main())
