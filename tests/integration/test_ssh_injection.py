"""Every text of an inventory set to what a careless shell would run: it is refused, or taken as the mere text that it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.host import Endpoint
from harness.inventory import Container, Host, Inventory, Venv, load_inventory
from harness.provision.far import Far
from harness.remote import RemoteError, connect
from harness.remote.trees import sent
from systems.registry import InputError
from tests.integration.ssh_hosts import ONCE, Traps
from tests.labs.inventory import entry
from tests.labs.ssh_lab import SshLab

pytest_plugins = ["tests.integration.ssh_hosts"]

#: Everything of a host entry that could be given a text, as the place to write to.
FIELDS = [
    ("name",),
    ("address",),
    ("user",),
    ("key_file",),
    ("host_key",),
    ("jump",),
    ("work_dir",),
    ("runner", "image"),
    ("runner", "kind"),
    ("environment", "VALUE"),
    ("environment",),
    ("tags", 0),
    ("gpus", 0, "model"),
    *(("endpoint", name) for name in ("url", "model", "kind", "api_key")),
    *((name,) for name in ("local", "port", "slots", "placeholder")),
]


def test_every_text_of_an_entry_is_among_those_that_are_tried() -> None:
    assert {str(field[0]) for field in FIELDS} == set(Host.model_fields)
    assert set(Inventory.model_fields) == {"hosts", "include", "groups", "defaults"}
    assert {field[1] for field in FIELDS if field[0] == "runner"} == {*Container.model_fields, *Venv.model_fields}
    assert {field[1] for field in FIELDS if field[0] == "endpoint"} == set(Endpoint.model_fields)


def with_text(host: dict[str, Any], field: tuple[Any, ...], text: str) -> dict[str, Any]:
    if field == ("environment",):
        return {**host, "environment": {text: "x"}}
    if field == ("runner", "image"):
        return {**host, "runner": {"kind": "container", "image": text}}
    if field[0] == "endpoint":
        return {**host, "endpoint": {"url": "http://127.0.0.1:9/v1", field[1]: text}}
    value: Any = text
    for key in reversed(field[1:]):
        value = [value] if key == 0 else {key: value}
    return {**host, field[0]: value}


def use(path: Path, local: Path) -> None:
    """What provisioning does with a host: facts, a command with its environment, files into its work folder."""
    for host in load_inventory(path).hosts:
        with connect(host, timing=ONCE) as remote:
            far = Far(remote)
            far.ask(make=True)
            remote.run(["true"], env=host.resolved_environment(), cwd=host.work_dir)
            far.place({f"checkout/{host.name}": sent(local)})
            assert far.digests([f"checkout/{host.name}"])


@pytest.mark.slow
@pytest.mark.parametrize("field", FIELDS, ids=lambda field: ".".join(map(str, field)))
def test_no_text_of_a_host_is_ever_run(lab: SshLab, traps: Traps, tmp_path: Path, field: tuple[Any, ...]) -> None:
    path, local = tmp_path / "hosts.yaml", tmp_path / "file"
    local.write_text("x")
    outcomes = []
    for text in traps.texts:
        for said in (text, f"/srv/fivefold/{text}") if field[0] in ("work_dir", "key_file") else (text,):
            path.write_text(yaml.safe_dump({"hosts": [with_text(entry(lab.hosts[0]), field, said)]}))
            try:
                use(path, local)
                outcomes.append("used")
            except InputError as error:
                assert "\n" not in str(error)
                outcomes.append("failed" if isinstance(error, RemoteError) else "refused")
    made = [found for found in traps.sprung() if found.is_file()]
    assert not made
    if field == ("work_dir",):
        assert outcomes.count("used") >= 5  # such folders were made, entered and filled
    if field == ("environment", "VALUE"):
        assert outcomes.count("used") >= 4


@pytest.mark.parametrize("key", ["include", "groups", "defaults"])
def test_no_other_text_of_an_inventory_is_ever_run(lab: SshLab, traps: Traps, tmp_path: Path, key: str) -> None:
    path, local = tmp_path / "hosts.yaml", tmp_path / "file"
    local.write_text("x")
    for text in traps.texts:
        for value in {"include": [[text]], "groups": [{text: ["node01"]}, {"g": [text]}], "defaults": [{"user": text}]}[key]:
            told = {"hosts": [entry(lab.hosts[0])], key: value}
            if key == "defaults":
                del told["hosts"][0]["user"]
            path.write_text(yaml.safe_dump(told))
            with pytest.raises(InputError):
                use(path, local)
    assert not traps.sprung()
