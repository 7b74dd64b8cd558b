"""Many hosts in one file: ranges, defaults, groups, jump hosts, pinned keys, and files that take in others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harness.inventory import Inventory, keys_file, load_inventory
from harness.ranges import RangeError, expand
from systems.registry import InputError
from tests.unit.test_inventory import public_key

RACK = {"name": "node[01-03]", "address": "10.0.0.[11-13]"}
EXAMPLES = {
    "sirius-v100x4": ("v100-16", 4, 1),
    "llmstation-rtx3090x2": ("rtx3090", 2, 1),
    "spotserve-t4x48": ("t4", 48, 12),
    "maveriq-a6000x8": ("a6000", 8, 1),
    "dlora-a100x32": ("a100-80", 32, 5),
}


def load(folder: Path, told: dict[str, Any], name: str = "hosts.yaml") -> Inventory:
    (folder / name).write_text(yaml.safe_dump(told))
    return load_inventory(folder / name)


def refusal(folder: Path, told: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, told)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{folder}/")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node", ["node"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[08-11]", ["node08", "node09", "node10", "node11"]),
        ("n[1,3,5-6]x", ["n1x", "n3x", "n5x", "n6x"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_a_range_is_its_names_in_order(text: str, names: list[str]) -> None:
    assert expand(text) == names


@pytest.mark.parametrize(
    "text", ["n[", "n]", "n[]", "n[a-b]", "n[3-1]", "n[1-2", "n[[1-2]]", "n[1-99999]", "n[-1]", "n[1-100][1-100]"]
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(RangeError):
        expand(text)


@given(st.integers(0, 500), st.integers(0, 60), st.integers(0, 4))
def test_a_range_has_every_number_once_and_keeps_its_width(first: int, more: int, width: int) -> None:
    names = expand(f"n[{first:0{width}}-{first + more:0{width}}]")
    assert [int(name[1:]) for name in names] == list(range(first, first + more + 1))
    if len(str(first)) < width:
        assert {len(name) for name in names} == {width + 1} or first + more >= 10**width


def test_a_range_of_hosts_with_what_all_of_them_have(tmp_path: Path) -> None:
    told = {
        "defaults": {"user": "me", "gpus": [{"model": "t4", "count": 4}], "environment": {"N": 8}},
        "hosts": [
            {**RACK, "tags": ["worker"]},
            {"name": "client", "address": "c.example.org", "gpus": []},
            {"name": "here", "local": True},
        ],
    }
    inventory = load(tmp_path, told)
    assert [host.name for host in inventory.hosts] == ["node01", "node02", "node03", "client", "here"]
    assert inventory.host("node02").address == "10.0.0.12" and inventory.host("node02").environment == {"N": "8"}
    assert [host.gpu_count for host in inventory.hosts] == [4, 4, 4, 0, 4]
    assert inventory.host("here").user is None and inventory.host("client").user == "me"
    assert [host.name for host in inventory.select("worker")] == ["node01", "node02", "node03"]
    assert [host.name for host in inventory.select("node[02-03]", "client", "node02")] == ["node02", "node03", "client"]
    assert inventory.select() == inventory.hosts
    with pytest.raises(InputError, match="no host, group or tag of this name, did you mean worker"):
        inventory.select("workre")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"hosts": [{**RACK, "user": "me", "address": "10.0.0.[1-2]"}]},
            "hosts.0.address: '10.0.0.[1-2]': stands for 2 and the name for 3",
        ),
        ({"hosts": [{**RACK, "user": "me", "host_key": public_key()}]}, "every host has a key of its own"),
        ({"hosts": [{**RACK, "user": "me", "name": "node[3-1]"}]}, "hosts.0.name: 'node[3-1]': [3-1] runs from 3 to 1"),
        ({"hosts": [{**RACK, "user": "me", "name": "Node[1-3]"}]}, "use lower-case letters"),
        (
            {"hosts": [{**RACK, "user": "me"}, {**RACK, "user": "me", "name": "n[1-2]node", "address": "a[1-3]"}]},
            "hosts.1.address",
        ),
        (
            {"hosts": [{**RACK, "user": "me"}, {"name": "node02", "local": True}]},
            "hosts.1.name: 'node02': another host has this name",
        ),
        ({"defaults": {"usr": "me"}, "hosts": [RACK]}, "defaults.usr: 'me': unknown key, did you mean user?"),
        ({"groups": {"g": ["node04"]}}, "groups.g: 'node04': no host or group of this name, did you mean"),
        ({"groups": {"g": ["h"], "h": ["g"]}}, "contains itself"),
        ({"groups": {"node01": ["node02"]}}, "a host has this name"),
        ({"groups": {"G": ["node02"]}}, "groups"),
        ({"hosts": [{**RACK, "user": "me", "jump": "gate"}]}, "node01.jump: 'gate': no such host"),
        ({"hosts": [{**RACK, "user": "me", "jump": "node01"}]}, "the way leads in a circle"),
        ({"include": ["hosts.yaml"]}, "includes itself"),
        ({"include": ["none.yaml"]}, "no such file"),
        ({"hosts": [], "include": []}, "describe a host, or include a file that does"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, {"hosts": [{**RACK, "user": "me"}], **changes})


def test_groups_hold_hosts_ranges_and_groups(tmp_path: Path) -> None:
    groups = {"first": ["node[01-02]"], "all-of-them": ["first", "node03", "node01"]}
    inventory = load(tmp_path, {"hosts": [{**RACK, "user": "me"}], "groups": groups})
    assert [host.name for host in inventory.group("all-of-them")] == ["node01", "node02", "node03"]
    assert inventory.select("first") == inventory.group("first")
    with pytest.raises(InputError, match="did you mean first"):
        inventory.group("frist")


def test_a_jump_host_is_known_to_those_behind_it(tmp_path: Path) -> None:
    hosts = [{"name": "gate", "address": "gate.example.org", "runner": {"kind": "none"}}, {**RACK, "work_dir": "/x"}]
    inventory = load(tmp_path, {"defaults": {"user": "me", "jump": "gate"}, "hosts": hosts})
    node = inventory.host("node03")
    assert node.via == inventory.host("gate") and inventory.host("gate").via is None
    assert node.where == str(tmp_path / "hosts.yaml") and node.work_dir == "/x"
    assert [host.name for host in inventory.workers] == ["node01", "node02", "node03"]


def test_files_take_in_others_with_their_own_defaults_and_keys(tmp_path: Path) -> None:
    (tmp_path / "racks").mkdir()
    load(tmp_path / "racks", {"defaults": {"user": "you"}, "hosts": [RACK], "groups": {"rack": ["node[01-03]"]}}, "a.yaml")
    keys_file(tmp_path / "racks" / "a.yaml").write_text(f"# pinned\nnode02 {public_key()} a comment\n")
    told = {
        "include": ["racks/a.yaml"],
        "hosts": [{"name": "gate", "address": "g", "user": "me"}],
        "groups": {"both": ["rack", "gate"]},
    }
    inventory = load(tmp_path, told)
    assert [host.name for host in inventory.group("both")] == ["node01", "node02", "node03", "gate"]
    assert inventory.host("node02").host_key == public_key() and inventory.host("node01").host_key is None
    assert inventory.host("node01").user == "you" and inventory.host("node01").where.endswith("racks/a.yaml")
    told["hosts"][0]["name"] = "node01"
    assert "another host has this name" in refusal(tmp_path, told)


def test_a_file_of_keys_that_is_wrong_is_refused_by_line(tmp_path: Path) -> None:
    keys_file(tmp_path / "hosts.yaml").write_text("# fine\nnode01 ssh-ed25519 AAAA\n")
    assert refusal(tmp_path, {"hosts": [{**RACK, "user": "me"}]}).startswith("hosts.keys: line 2: 'node01': is cut short")


def test_a_key_in_the_file_itself_comes_first(tmp_path: Path) -> None:
    import base64
    import struct

    blob = b"".join(struct.pack(">I", len(part)) + part for part in (b"ssh-ed25519", bytes(32)))
    other = f"ssh-ed25519 {base64.b64encode(blob).decode()}"
    keys_file(tmp_path / "hosts.yaml").write_text(f"a {public_key()}\nb {public_key()}\n")
    hosts = [{"name": "a", "address": "a", "user": "me", "host_key": other}, {"name": "b", "address": "b", "user": "me"}]
    inventory = load(tmp_path, {"hosts": hosts})
    assert inventory.host("a").host_key == other and inventory.host("b").host_key == public_key()


def test_a_host_without_a_key_is_read_but_not_trusted(tmp_path: Path) -> None:
    from harness.remote import HostKeyError, PlaceholderError, connect

    host = load(tmp_path, {"hosts": [{**RACK, "user": "me"}]}).host("node01")
    with pytest.raises(HostKeyError, match="node01: no key is pinned"):
        connect(host)
    with pytest.raises(PlaceholderError):
        connect(host.model_copy(update={"placeholder": True}))


def test_secrets_are_known_by_name(tmp_path: Path) -> None:
    host = load(tmp_path, {"hosts": [{**RACK, "user": "me", "environment": {"A": "env:B", "C": "file:/d", "E": "f"}}]}).hosts[0]
    assert host.secrets == {"A", "C"}
    with pytest.raises(InputError, match=r"hosts\.yaml: node01\.environment\.A: 'env:B': set the environment variable B"):
        host.resolved_environment(environ={})


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_papers_testbeds_are_examples_that_nothing_connects_to(root: Path, name: str) -> None:
    gpu, count, workers = EXAMPLES[name]
    inventory = load_inventory(root / "hosts" / "examples" / f"{name}.yaml")
    assert sum(host.gpu_count for host in inventory.hosts) == count and len(inventory.workers) == workers
    assert {found.model for host in inventory.hosts for found in host.gpus} == {gpu}
    assert all(host.placeholder and host.host_key is None for host in inventory.hosts)


def test_every_example_is_one_of_a_paper(root: Path) -> None:
    assert {path.stem for path in (root / "hosts" / "examples").glob("*.yaml")} == set(EXAMPLES)
