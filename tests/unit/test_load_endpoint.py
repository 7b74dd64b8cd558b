"""A host that is nothing but a server to send load to, and the command that does it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import load
from harness.inventory import Inventory, load_inventory
from harness.provision import status
from harness.remote import trust
from systems.registry import InputError

ENDPOINT = {"url": "http://127.0.0.1:1/v1", "model": "m", "kind": "sglang", "api_key": "env:LLM_KEY"}


def inventory(tmp_path: Path, *hosts: Any, **more: Any) -> Inventory:
    path = tmp_path / "hosts.yaml"
    path.write_text(yaml.safe_dump({"hosts": list(hosts), **more}))
    return load_inventory(path)


def refusal(tmp_path: Path, **changes: Any) -> str:
    host = {"name": "there", "endpoint": ENDPOINT, **changes}
    with pytest.raises(InputError) as caught:
        inventory(tmp_path, host)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_endpoint_is_no_machine(tmp_path: Path) -> None:
    found = inventory(tmp_path, {"name": "there", "endpoint": ENDPOINT}, {"name": "here", "local": True})
    host = found.host("there")
    assert host.only_endpoint and host.runner.kind == "none" and host not in found.workers
    assert trust._remote(found, ()) == trust._remote(found, ("there",)) == []
    assert all("there" not in finding.what for finding in status.findings(found, []))


def test_defaults_for_machines_are_not_for_endpoints(tmp_path: Path) -> None:
    defaults = {
        "user": "me",
        "port": 2222,
        "runner": {"kind": "venv"},
        "gpus": [{"model": "h200"}],
        "tags": ["x"],
        "work_dir": "/w",
    }
    found = inventory(tmp_path, {"name": "there", "endpoint": ENDPOINT}, defaults=defaults)
    assert found.host("there").user is None and found.host("there").tags == ("x",)


def test_a_machine_may_have_an_endpoint_too(tmp_path: Path) -> None:
    found = inventory(tmp_path, {"name": "here", "local": True, "endpoint": {"url": "http://h/v1"}})
    assert found.workers and not found.host("here").only_endpoint and found.host("here").endpoint is not None


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"endpoint": {**ENDPOINT, "url": "ftp://h"}}, "http://host:port/v1"),
        ({"endpoint": {**ENDPOINT, "url": "http://h/v1?x=1"}}, "http://host:port/v1"),
        ({"endpoint": {**ENDPOINT, "kind": "vlm"}}, "vllm"),
        ({"endpoint": {**ENDPOINT, "modle": "m"}}, "did you mean model?"),
        ({"endpoint": {"model": "m"}}, "url"),
        ({"endpoint": {**ENDPOINT, "model": "a\nb"}}, "model"),
        ({"user": "me"}, "nobody logs in"),
        ({"gpus": [{"model": "h200"}]}, "gpus"),
        ({"runner": {"kind": "venv"}}, "no job runs"),
        ({"name": "node[1-2]"}, "one by one"),
    ],
)
def test_what_an_endpoint_cannot_be(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    assert part in refusal(tmp_path, **changes)


@pytest.mark.parametrize(
    "endpoint", [{**ENDPOINT, "api_key": "hunter2hunter2"}, {**ENDPOINT, "url": "http://me:hunter2hunter2@h/v1"}]
)
def test_a_key_in_the_file_is_refused_and_not_shown(tmp_path: Path, endpoint: dict[str, Any]) -> None:
    line = refusal(tmp_path, endpoint=endpoint)
    assert "hunter2" not in line and "(hidden)" in line


def test_the_clients_command_line_has_the_reference_and_not_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inventory(tmp_path, {"name": "there", "endpoint": ENDPOINT}, {"name": "here", "local": True})
    argv = ["--inventory", str(tmp_path / "hosts.yaml"), "there", "--rate", "4", "--count", "3"]
    with pytest.raises(InputError, match="LLM_KEY"):
        load.command(argv)
    monkeypatch.setenv("LLM_KEY", "the-key-itself")
    server = ["--url", "http://127.0.0.1:1/v1", "--kind", "sglang", "--model", "m", "--api-key", "env:LLM_KEY"]
    assert load.command(argv) == [sys.executable, "-m", "systems.common.load", *server, "--rate", "4", "--count", "3"]
    for name, part in (("here", "endpoint"), ("nobody", "no such host")):
        with pytest.raises(InputError, match=part):
            load.command([*argv[:2], name])


def test_datasets_that_are_at_hand_are_passed_on(tmp_path: Path, mirror: Path, root: Path) -> None:
    from harness.config import Config

    config = Config(dataset_mirror=str(mirror))
    file = tmp_path / "w.yaml"
    file.write_text("workload: {arrivals: replay, trace: azure_conv, rate_rps: 2, seconds: 9, lengths: sharegpt_lengths}\n")
    short = load.dataset_options(["--lengths", "sharegpt"], config)
    assert short[0] == "--dataset" and short[1].startswith("sharegpt_lengths=") and Path(short[1].partition("=")[2]).is_file()
    both = load.dataset_options(["--workload", str(file)], config)
    assert {word.partition("=")[0] for word in both} == {"--dataset", "sharegpt_lengths", "azure_conv"}
    assert load.dataset_options(["--lengths", "fixed"], config) == []


def test_doctor_says_what_an_endpoint_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = inventory(tmp_path, {"name": "there", "endpoint": ENDPOINT}).host("there")
    monkeypatch.delenv("LLM_KEY", raising=False)
    assert load.check(host).level.value == "missing" and "LLM_KEY" in load.check(host).mend
    monkeypatch.setenv("LLM_KEY", "the-key-itself")
    found = load.check(host)
    assert found.level.value == "optional" and "no answer" in found.found and "the-key-itself" not in str(found)


def test_the_example_is_right(root: Path) -> None:
    found = load_inventory(root / "hosts" / "endpoint.yaml")
    assert {host.name for host in found.hosts} == {"vllm", "sglang", "fivefold"} and not found.workers
