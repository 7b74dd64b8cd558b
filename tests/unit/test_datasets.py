"""The dataset registry and `resolve`: mirror, cache, download, stand-in; and never wrong bytes."""

from __future__ import annotations

import hashlib
import http.server
import json
import logging
import re
import socket
import subprocess
import sys
import threading

import pytest
import yaml

from harness import datasets
from harness.datasets import DatasetEntry, Registry, load_registry, resolve
from systems.registry import InputError

CONTENT = b"arrival_s,input_tokens,output_tokens\n" + b"0.5,10,20\n" * 5000
SHA = hashlib.sha256(CONTENT).hexdigest()
STAND_IN = {"kind": "quantiles", "rows": 10, "input_tokens": {0: 1, 100: 2}}
COMMON = {
    "title": "t",
    "source": "https://example.org",
    "licence": "CC-BY-4.0",
    "redistribute": True,
    "citation": "c",
    "reader": None,
}


def registry_of(**entry):
    return Registry(datasets={"d": DatasetEntry(**COMMON, **entry)})


def one_file(url=None, sha256=SHA, **more):
    return registry_of(path="folder/d.csv", url=url, sha256=sha256, ask=None if url else "ask the authors for d.csv", **more)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT in good and bad ways, by path; counts requests per path on the server object."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append(self.path)
        first = self.server.seen.count(self.path) == 1
        if self.path == "/missing":
            self.send_error(404)
            return
        body = b"wrong" + CONTENT[5:] if self.path == "/wrong" else CONTENT
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        cut = self.path == "/truncated" or (self.path == "/flaky" and first)
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = True

    def log_message(self, *_args):
        pass


@pytest.fixture
def server():
    """A server on a free port of the loopback; `.address` and `.seen`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.seen = []
        running.address = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def files_under(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def put(root, content=CONTENT, path="folder/d.csv"):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(content)


def test_mirror_comes_first_then_cache(tmp_path):
    mirror, cache = tmp_path / "mirror", tmp_path / "cache"
    put(cache)
    registry = one_file(url="http://127.0.0.1:9/never")
    found = resolve("d", mirror, cache, offline=False, registry=registry)
    assert (found.path, found.sha256, found.source) == (cache / "folder/d.csv", SHA, "cache")
    put(mirror)
    assert resolve("d", mirror, cache, offline=False, registry=registry).source == "mirror"
    assert resolve("d", None, cache, offline=True, registry=registry).source == "cache"


@pytest.mark.parametrize("place", ["mirror", "cache"])
def test_a_wrong_checksum_is_an_error_and_nothing_else_is_used(tmp_path, place, server):
    put(tmp_path / place, CONTENT + b"x")
    registry = one_file(url=f"{server.address}/good", stand_in=STAND_IN)
    with pytest.raises(InputError) as caught:
        resolve("d", tmp_path / "mirror", tmp_path / "cache", offline=False, registry=registry)
    line = str(caught.value)
    assert "\n" not in line
    for part in (str(tmp_path / place / "folder/d.csv"), SHA, hashlib.sha256(CONTENT + b"x").hexdigest(), "delete"):
        assert part in line
    assert server.seen == []


def test_unknown_checksum_takes_the_users_file_and_reports_its_own(tmp_path):
    put(tmp_path)
    found = resolve("d", tmp_path, tmp_path / "cache", offline=True, registry=one_file(sha256=None))
    assert found.sha256 == SHA


def test_download_goes_to_the_cache(tmp_path, server):
    registry = one_file(url=f"{server.address}/good", stand_in=STAND_IN)
    found = resolve("d", tmp_path / "no-mirror", tmp_path, offline=False, registry=registry)
    assert (found.source, found.sha256, found.path.read_bytes()) == ("download", SHA, CONTENT)
    assert files_under(tmp_path) == ["folder/d.csv"]
    assert resolve("d", None, tmp_path, offline=True, registry=registry).source == "cache"
    assert server.seen == ["/good"]


def test_broken_off_download_is_tried_again(tmp_path, server):
    found = resolve("d", None, tmp_path, offline=False, registry=one_file(url=f"{server.address}/flaky"))
    assert found.path.read_bytes() == CONTENT
    assert server.seen == ["/flaky", "/flaky"]
    assert files_under(tmp_path) == ["folder/d.csv"]


@pytest.mark.parametrize(("path", "reason"), [("/truncated", "broke off after"), ("/missing", "404")])
def test_failed_download_falls_back_to_the_stand_in_or_says_why(tmp_path, server, caplog, path, reason):
    url = server.address + path
    with caplog.at_level(logging.WARNING):
        found = resolve("d", None, tmp_path, offline=False, registry=one_file(url=url, stand_in=STAND_IN))
    assert (found.path, found.sha256, found.source) == (None, None, "stand-in")
    assert reason in caplog.text
    with pytest.raises(InputError, match=re.escape(url)) as caught:
        resolve("d", None, tmp_path, offline=False, registry=one_file(url=url))
    assert reason in str(caught.value) or len(caught.value.value) > 77  # long values are shortened in the line
    assert reason in caught.value.value
    assert files_under(tmp_path) == []


def test_wrong_bytes_from_the_server_are_refused_even_with_a_stand_in(tmp_path, server):
    registry = one_file(url=f"{server.address}/wrong", stand_in=STAND_IN)
    with pytest.raises(InputError, match=SHA):
        resolve("d", None, tmp_path, offline=False, registry=registry)
    assert files_under(tmp_path) == []


def test_nobody_listens(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/d.csv"
    found = resolve("d", None, tmp_path, offline=False, registry=one_file(url=url, stand_in=STAND_IN))
    assert found.source == "stand-in"
    with pytest.raises(InputError, match="can't be reached"):
        resolve("d", None, tmp_path, offline=False, registry=one_file(url=url))
    assert files_under(tmp_path) == []


def test_silent_server_is_given_up(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        registry = one_file(url=f"http://127.0.0.1:{silent.getsockname()[1]}/d.csv", stand_in=STAND_IN)
        assert resolve("d", None, tmp_path, offline=False, registry=registry, timeout_s=0.05).source == "stand-in"


def test_offline_never_connects(tmp_path, server):
    registry = one_file(url=f"{server.address}/good", stand_in=STAND_IN)
    assert resolve("d", None, tmp_path, offline=True, registry=registry).source == "stand-in"
    with pytest.raises(InputError, match="offline"):
        resolve("d", None, tmp_path, offline=True, registry=one_file(url=f"{server.address}/good"))
    assert server.seen == []


def test_what_must_be_asked_for_says_how_and_where(tmp_path):
    with pytest.raises(InputError, match=r"ask the authors for d\.csv, and put it at .*folder/d\.csv"):
        resolve("d", tmp_path, tmp_path / "cache", offline=False, registry=one_file(sha256=None))


def test_folder_dataset(tmp_path, server):
    files = {
        "a.csv": {"sha256": SHA, "bytes": len(CONTENT), "source": "good"},
        "b/c.csv": {"sha256": SHA, "bytes": len(CONTENT)},
    }
    registry = registry_of(path="folder", base_url=server.address, files=files)
    put(tmp_path / "mirror", path="folder/a.csv")  # incomplete, so passed over
    found = resolve("d", tmp_path / "mirror", tmp_path / "cache", offline=False, registry=registry)
    assert (found.source, found.path) == ("download", tmp_path / "cache/folder")
    assert files_under(found.path) == ["a.csv", "b/c.csv"]
    assert sorted(server.seen) == ["/b/c.csv", "/good"]
    assert found.sha256 == hashlib.sha256(f"{SHA}  a.csv\n{SHA}  b/c.csv\n".encode()).hexdigest()
    put(tmp_path / "cache", b"other", path="folder/b/c.csv")
    with pytest.raises(InputError, match=r"c\.csv: sha256"):
        resolve("d", None, tmp_path / "cache", offline=False, registry=registry)


def test_full_disk_during_a_download(tmp_path, server, monkeypatch):
    def refuse(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.os, "fsync", refuse)
    with pytest.raises(InputError, match="disk: 'full'"):
        resolve("d", None, tmp_path, offline=False, registry=one_file(url=f"{server.address}/good", stand_in=STAND_IN))
    assert files_under(tmp_path) == []


def test_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(InputError, match="azure_conv"):
        resolve("azure_conf", None, tmp_path, offline=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licens": "MIT"}, "licens"),
        ({"sha256": "abc"}, "sha256"),
        ({"path": "../secrets"}, "path"),
        ({"path": "/etc/passwd"}, "path"),
        ({"url": "file:///etc/passwd"}, "https"),
        ({"url": "http://example.org/d"}, "https"),
        ({"sha256": None}, "needs a `sha256`"),
        ({"url": None}, "`ask`"),
        ({"files": {"a": {"sha256": SHA, "bytes": 1}}}, "no url"),
        ({"base_url": "https://example.org"}, "base_url"),
        ({"redistribute": "yes"}, "redistribute"),
        ({"bytes": -1}, "bytes"),
    ],
)
def test_registry_refuses(tmp_path, change, message):
    entry = {**COMMON, "path": "d.csv", "url": "https://example.org/d.csv", "sha256": SHA} | change
    path = tmp_path / "registry.yaml"
    path.write_text(yaml.safe_dump({"datasets": {"d": entry}}))
    with pytest.raises(InputError, match=message) as caught:
        load_registry(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "", "datasets: {}\nmore: 1"])
def test_registry_file_must_be_right(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError):
        load_registry(tmp_path / "r.yaml")


REAL = sorted(load_registry().datasets)


@pytest.mark.parametrize("name", REAL)
def test_every_dataset_of_the_mirror_has_its_checksum(name, mirror, tmp_path):
    entry = load_registry().entry(name)
    if not all((mirror / part.path).is_file() for part in entry.parts()):
        assert entry.ask or entry.url  # not mirrored: then there is a way to get it
        return
    assert resolve(name, mirror, tmp_path, offline=True).source == "mirror"
    for part in entry.parts():
        assert (mirror / part.path).stat().st_size == part.bytes


def test_mirror_and_registry_agree_on_what_there_is(mirror):
    listed = {line.split("  ./")[1]: line.split()[0] for line in (mirror / "SHA256SUMS").read_text().splitlines()}
    registered = {str(p.path): p.sha256 for e in load_registry().datasets.values() for p in e.parts() if str(p.path) in listed}
    assert registered == listed


def test_unlicensed_data_is_not_to_be_redistributed():
    for entry in load_registry().datasets.values():
        assert not (entry.redistribute and entry.licence in ("none stated", "CC-BY-NC-4.0"))


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "harness.datasets", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_command_writes_a_manifest(tmp_path, root):
    out = tmp_path / "manifests" / "alpaca.json"
    done = command("alpaca", "--cache", tmp_path / "cache", "--offline", "--out", out, cwd=root)
    assert done.returncode == 0
    assert json.loads(out.read_text()) == {"name": "alpaca", "path": None, "sha256": None, "source": "stand-in"}
    assert "stand-in" in done.stderr


def test_command_says_what_is_wrong_in_one_line(tmp_path, root):
    out = tmp_path / "x.json"
    for name in ("nonsense", "sharegpt_v3"):
        done = command(name, "--cache", tmp_path / "cache", "--offline", "--out", out, cwd=root)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert name in done.stderr
    assert not out.exists()


def test_command_lists(tmp_path, capsys):
    put(tmp_path, path="azure_llm_2023/AzureLLMInferenceTrace_code.csv")
    assert datasets.main(["--list", "--mirror", str(tmp_path), "--cache", str(tmp_path / "none")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} >= set(REAL)
    (code,) = (line for line in lines if line.startswith("azure_code"))
    assert code.split()[1:3] == ["CC-BY-4.0", "mirror"]
    (burst,) = (line for line in lines if line.startswith("burstgpt"))
    assert "download or stand-in" in burst
