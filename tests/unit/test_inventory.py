"""The file of hosts: what it accepts, and the one line that it refuses anything else with."""

from __future__ import annotations

import base64
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harness.inventory import Inventory, load_inventory
from harness.references import HIDDEN, looks_like_secret, resolve
from systems.registry import InputError


def public_key(kind: str = "ssh-ed25519", inside: str | None = None) -> str:
    blob = b"".join(struct.pack(">I", len(part)) + part for part in ((inside or kind).encode(), bytes(range(32))))
    return f"{kind} {base64.b64encode(blob).decode()}"


def remote(**changes: Any) -> dict[str, Any]:
    host = {
        "name": "gpu1",
        "address": "gpu1.example.org",
        "user": "me",
        "host_key": f"{public_key()} root@gpu1",
        "gpus": [{"model": "rtx3090", "count": 2, "memory_gib": 24}],
        "environment": {"HF_TOKEN": "env:MY_TOKEN", "OMP_NUM_THREADS": 8},
        "tags": ["serving"],
    }
    return {key: value for key, value in {**host, **changes}.items() if value is not None}


def load(tmp_path: Path, *hosts: Any) -> Inventory:
    path = tmp_path / "hosts.yaml"
    path.write_text(yaml.safe_dump({"hosts": list(hosts)}))
    return load_inventory(path)


def refusal(tmp_path: Path, *hosts: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(tmp_path, *hosts)
    line = str(caught.value)
    assert line.startswith(str(tmp_path / "hosts.yaml")) and "\n" not in line
    return line.removeprefix(f"{tmp_path / 'hosts.yaml'}: ")


def test_the_file_that_comes_with_the_project_is_this_machine(root: Path) -> None:
    (host,) = load_inventory(root / "hosts" / "local.yaml").hosts
    assert host.local and host.name == "local" and host.runner.kind == "venv" and host.gpus == ()


def test_the_example_in_the_readme_is_right_but_for_its_key(root: Path, tmp_path: Path) -> None:
    example = (root / "hosts" / "README.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    path = tmp_path / "hosts.yaml"
    path.write_text(example)
    with pytest.raises(InputError, match=r"hosts\.0\.host_key.*cut short"):
        load_inventory(path)
    path.write_text(example.replace("ssh-ed25519 AAAA...", public_key()))
    host = load_inventory(path).host("gpu1")
    assert (host.gpu_count, host.port, host.environment["OMP_NUM_THREADS"]) == (2, 22, "8")


def test_a_remote_host_is_read_and_its_key_loses_the_comment(tmp_path: Path) -> None:
    inventory = load(tmp_path, remote(), {"name": "local", "local": True})
    assert inventory.host("gpu1").host_key == public_key()
    assert inventory.tagged("serving") == (inventory.host("gpu1"),)
    assert inventory.tagged() == inventory.hosts
    with pytest.raises(InputError, match="use one of gpu1, local"):
        inventory.host("gpu2")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adress": "x"}, "hosts.0.adress: 'x': unknown key, did you mean address?"),
        ({"address": None}, "hosts.0.address: '(absent)': add this key, or `local: true`"),
        ({"user": None}, "hosts.0.user: '(absent)': add this key"),
        ({"name": None}, "hosts.0.name: '(absent)': add this key"),
        ({"local": True}, "hosts.0.address: 'gpu1.example.org': a local host is not connected to"),
        ({"address": "me@gpu1"}, "hosts.0.address: 'me@gpu1': use a host name or an IP address"),
        ({"address": "-oProxyCommand=x"}, "hosts.0.address: '-oProxyCommand=x': use a host name"),
        ({"address": "300.1.1.1"}, "hosts.0.address: '300.1.1.1': use a host name"),
        ({"user": "-l"}, "hosts.0.user: '-l'"),
        ({"port": 0}, "hosts.0.port: 0"),
        ({"key_file": "id_ed25519"}, "hosts.0.key_file: 'id_ed25519'"),
        ({"work_dir": "/scratch\n/me"}, "hosts.0.work_dir"),
        ({"gpus": [{"model": "h100", "count": 0}]}, "hosts.0.gpus.0.count: 0"),
        ({"gpus": [{"modle": "h100"}]}, "hosts.0.gpus.0.modle: 'h100': unknown key, did you mean model?"),
        ({"runner": {"kind": "container"}}, "hosts.0.runner.image: '(absent)': add this key"),
        ({"runner": {"kind": "conda"}}, "unknown value"),
        ({"host_key": public_key()[:-8]}, "hosts.0.host_key"),
        ({"host_key": public_key(inside="ssh-rsa")}, "is cut short or mistyped"),
        ({"host_key": "SHA256:abc"}, "use the host's public key, which begins with one of ssh-ed25519"),
        ({"environment": {"A B": "x"}}, "hosts.0.environment.A B"),
        ({"environment": {"A": "x\ny"}}, "hosts.0.environment.A"),
        ({"environment": {"FAST": True}}, "hosts.0.environment.FAST: True: write it in quotes"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, remote(**changes))


def test_a_file_needs_hosts_with_different_names(tmp_path: Path) -> None:
    assert "hosts" in refusal(tmp_path)
    local = {"name": "local", "local": True}
    assert refusal(tmp_path, local, local).startswith("hosts.1.name: 'local': another host has this name")
    assert "port: 22: a local host is not connected to" in refusal(tmp_path, {**local, "port": 22})


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3dE6gH9j" * 3,
        "ghp_" + "x7" * 18,
        "sk-proj-" + "a1B2" * 8,
        "https://me:hunter2@example.org/x",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "Zx81kQpL0vNm37RtYw92Bc",
        "9f86d081884c7d659a2feaa0c55ad015",
    ],
)
def test_a_secret_is_refused_wherever_it_stands_and_never_shown(tmp_path: Path, secret: str) -> None:
    for host in (remote(environment={"X": secret}), remote(tags=[secret]), remote(work_dir=secret), remote(unknown=secret)):
        line = refusal(tmp_path, host)
        assert HIDDEN in line and secret not in line and "env:NAME" in line


@pytest.mark.parametrize("name", ["password", "api_key", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db.credentials"])
def test_a_key_that_is_named_like_a_secret_takes_references_only(tmp_path: Path, name: str) -> None:
    line = refusal(tmp_path, remote(environment={name: "short"}))
    assert HIDDEN in line and "short" not in line


@pytest.mark.parametrize(
    "text",
    [
        "~/fivefold",
        "/scratch/experiments/Llama-3.1-8B-Instruct-finetuned-2026",
        "registry.example.org/fivefold/server@sha256:" + "0123456789abcdef" * 4,
        public_key() + " root@gpu1",
        "max_num_batched_tokens",
        "internationalisation_of_everything",
        "http://127.0.0.1:8000/v1",
        "11111111111111111111111111111111",
    ],
)
def test_ordinary_values_are_no_secrets(text: str) -> None:
    assert not looks_like_secret(text)


def test_common_variables_with_token_in_their_name_are_fine(tmp_path: Path) -> None:
    environment = {"TOKENIZERS_PARALLELISM": "false", "MAX_TOKENS": 5}
    assert load(tmp_path, remote(environment=environment)).host("gpu1").environment["MAX_TOKENS"] == "5"


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=40, max_size=40))
def test_nearly_every_long_random_word_is_taken_for_a_secret(word: str) -> None:
    # hypothesis also draws words such as forty zeros, which are none
    varied = len(set(word)) >= 20
    kinds = any(c.isdigit() for c in word) and any(c.islower() for c in word) and any(c.isupper() for c in word)
    assert looks_like_secret(word) or not (varied and kinds)


def test_references_are_resolved_late_and_a_missing_one_says_what_to_do(tmp_path: Path) -> None:
    host = load(tmp_path, remote(environment={"HF_TOKEN": "env:MY_TOKEN", "N": "2"})).host("gpu1")
    assert host.resolved_environment("hosts.yaml", {"MY_TOKEN": "s3"}) == {"HF_TOKEN": "s3", "N": "2"}
    with pytest.raises(
        InputError, match=r"hosts.yaml: gpu1.environment.HF_TOKEN: 'env:MY_TOKEN': set the environment variable MY_"
    ):
        host.resolved_environment("hosts.yaml", {})
    secret = tmp_path / "secret"
    secret.write_text("s3\n")
    assert resolve(f"file:{secret}", "f", "k") == "s3"
    with pytest.raises(InputError, match="name a text file that can be read"):
        resolve(f"file:{tmp_path / 'none'}", "f", "k")
