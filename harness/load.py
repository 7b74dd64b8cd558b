"""Send load to the server that a host of the inventory names, and measure it.

    python -m harness.load --inventory hosts/endpoint.yaml vllm --rate 4 --lengths sharegpt --duration 120 --out DIR

What follows the host's name goes to `python -m systems.common.load` as it is (docs/load.md); where the server is, what it is
called and which key it wants come from the inventory, and the datasets that the workload names from the mirror or the
cache. A key is passed on as its reference, so no command line shows it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from harness import cli
from harness.checks import Finding, Level
from harness.code_version import ROOT
from harness.config import CONFIG_FILE, Config, load_config
from harness.datasets import default_cache, load_registry, resolve, whereabouts
from harness.host import Endpoint, Host
from harness.inventory import Inventory, load_inventory
from harness.references import resolve as resolve_reference
from harness.safe_yaml import read_mapping
from systems.registry import InputError

CLIENT = "systems.common.load"
ASK_S = 3.0
"""How long `doctor` waits for a server."""


def endpoint_of(inventory: Inventory, name: str, where: Path) -> Endpoint:
    """The endpoint of the host `name`. Raises InputError when there is no such host, or it names none."""
    with_one = ", ".join(host.name for host in inventory.hosts if host.endpoint) or "none of them"
    for host in inventory.hosts:
        if host.name == name:
            if host.endpoint is None:
                raise InputError(where, f"{name}.endpoint", "(absent)", f"add it; hosts that have one: {with_one}")
            return host.endpoint
    raise InputError(where, "hosts", name, f"no such host; hosts with an endpoint: {with_one}")


def server_options(endpoint: Endpoint) -> list[str]:
    """What the client must know about the server, as its options."""
    given = {"--url": endpoint.url, "--kind": endpoint.kind, "--model": endpoint.model, "--api-key": endpoint.api_key}
    return [word for option, value in given.items() if value is not None for word in (option, value)]


def dataset_options(words: Sequence[str], config: Config) -> list[str]:
    """`--dataset NAME=FILE` for every dataset that `words` (options, or the declaration that they name) mention and that is at
    hand; the client uses the synthetic stand-in of any other, and says so."""  # noqa: D205, D209
    said = {*words, *_declared(words)}
    found = []
    for name, entry in load_registry().datasets.items():
        if said & {name, name.removesuffix("_lengths")} and whereabouts(entry, config.mirror, default_cache()) in (
            "mirror",
            "cache",
        ):
            path = resolve(name, config.mirror, default_cache(), offline=True).path
            found += ["--dataset", f"{name}={path}"]
    return found


def _declared(words: Sequence[str]) -> Iterator[str]:
    """The texts in the file of `--workload FILE`, if there is one."""
    for option, value in pairwise(words):
        if option == "--workload" and Path(value).is_file():
            content = read_mapping(Path(value))
            inner = content.get("workload")
            yield from map(str, (inner if isinstance(inner, Mapping) else content).values())


def command(argv: Sequence[str] | None) -> list[str]:
    """The client's command line. Raises InputError for a host without endpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.load", description="Send load to the server of a host, and measure it."
    )
    parser.add_argument("--inventory", type=Path, metavar="FILE", help="hosts (default: those that the config names)")
    parser.add_argument("host", metavar="HOST", help="a host with an endpoint")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help=f"options of python -m {CLIENT}")
    given = parser.parse_args(argv)
    config = load_config(ROOT / CONFIG_FILE)
    inventory = given.inventory or Path(config.inventory)
    endpoint = endpoint_of(load_inventory(inventory), given.host, inventory)
    if endpoint.api_key is not None:  # to say now, in the inventory's name, what the client could say only in its own
        resolve_reference(endpoint.api_key, inventory, f"{given.host}.endpoint.api_key")
    return [sys.executable, "-m", CLIENT, *server_options(endpoint), *dataset_options(given.rest, config), *given.rest]


def check(host: Host) -> Finding:
    """A line of `doctor` about the endpoint of `host`: the models that it serves, or why it says nothing."""
    assert host.endpoint is not None
    what, endpoint = f"{host.name}: endpoint", host.endpoint
    if host.placeholder:
        return Finding(Level.OPTIONAL, what, f"{endpoint.url}: only shows what an endpoint would look like")
    headers = {}
    if endpoint.api_key is not None:
        try:
            key = resolve_reference(endpoint.api_key, host.where, f"{host.name}.endpoint.api_key")
        except InputError as error:
            return Finding(Level.MISSING, what, f"{endpoint.url}: {error.value}", error.mend)
        headers = {"Authorization": f"Bearer {key.strip()}"}
    try:
        models = _models(endpoint, headers)
    except urllib.error.HTTPError as error:
        mend = "give the right `api_key`" if error.code in (401, 403) else "is its `url` right, /v1 included?"
        return Finding(Level.OPTIONAL, what, f"{endpoint.url}: HTTP {error.code}", mend)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return Finding(Level.OPTIONAL, what, f"{endpoint.url}: no answer ({reason})", "start the server before `harness.load`")
    if endpoint.model is not None and endpoint.model not in models:
        mend = f"`model: {endpoint.model}` is not among them: use one, or start the server with it"
        return Finding(Level.MISSING, what, f"{endpoint.url} serves {', '.join(models) or 'no model'}", mend)
    return Finding(Level.OK, what, f"{endpoint.url} serves {', '.join(models) or 'no model'}")


def _models(endpoint: Endpoint, headers: Mapping[str, str]) -> list[str]:
    """The models that it lists. Raises OSError (HTTPError among them), or ValueError for an answer of another kind."""
    path = endpoint.url.rstrip("/")
    path = path if path.count("/") > 2 else f"{path}/v1"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the client uses no proxy either
    with opener.open(urllib.request.Request(f"{path}/models", headers=dict(headers)), timeout=ASK_S) as answer:
        content = json.loads(answer.read(2**20))
    try:
        return [str(entry["id"]) for entry in content["data"]]
    except (KeyError, TypeError) as error:
        raise ValueError("not a list of models") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Become the client."""
    words = command(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(words[0], words)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
