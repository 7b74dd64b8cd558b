"""A real Docker Engine of its own, with a registry and a base image that has Python 3.11.

    python -m tests.labs.docker_lab up DIR                  (--private: own network with bridges, published ports, no way out)
    eval "$(python -m tests.labs.docker_lab env DIR)"; docker run --rm --network=host fivefold-lab/python:3.11 python -V
    python -m tests.labs.docker_lab stop-daemon DIR         (kill-daemon, start-daemon: see --help)
    python -m tests.labs.docker_lab down DIR

    with DockerLab(folder) as lab:
        lab.client().containers.run(lab.base_image(), ["python", "-V"], network_mode="host")

By default containers have the machine's network (`host`) or none, so that builds reach a package index; the machine's own
links and firewall are not touched.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tests.labs import base_image, netns, packages, processes
from tests.labs.engine import Engine
from tests.labs.errors import LabError
from tests.labs.lab import Lab
from tests.labs.rooms import Room, open_room

_ROOM = "engine"


class DockerLab(Lab):
    """A Docker Engine behind a socket in `folder`; it, its containers and its images go with the lab."""

    kind: ClassVar[str] = "docker"
    packages: ClassVar[Mapping[str, str]] = {
        "dockerd": "docker.io",
        "docker-registry": "docker-registry",
        "mmdebstrap": "mmdebstrap",
    }

    def __init__(self, folder: str | os.PathLike[str], *, private: bool = False, in_memory: bool = False) -> None:
        """An engine that is not up yet.

        Args:
            folder: where its files go.
            private: on a network of its own instead of the machine's.
            in_memory: images and containers in memory: `down` is faster, but files that a container writes count as its
                memory.
        """
        super().__init__(folder, private=private, in_memory=in_memory)
        self._private, self._in_memory = private, in_memory

    @property
    def docker_host(self) -> str:
        """What DOCKER_HOST is for this engine."""
        return f"unix://{self.folder / 'docker.sock'}"

    @property
    def registry(self) -> str:
        """The local registry, as the engine reaches it: `127.0.0.1:PORT`."""
        return f"127.0.0.1:{self.state.facts['registry_port']}"

    @property
    def missing_image(self) -> str:
        """An image that nobody has: pulling it ends in the registry's own "not found", at once."""
        return f"{self.registry}/no/such/image:1"

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which `docker` means this engine; with the builder that Debian's package has."""
        config = str(self.folder / "client")  # no credentials, contexts or plugins of the user's
        return {"DOCKER_HOST": self.docker_host, "DOCKER_CONFIG": config, "DOCKER_BUILDKIT": "0"}

    def client(self, **options: Any) -> Any:
        """A client of the Docker SDK (PyPI's `docker`, which the caller installs) for this engine; close it after use."""
        return importlib.import_module("docker").DockerClient(base_url=self.docker_host, **options)

    def command(self, argv: Sequence[str | os.PathLike[str]], folder: Path | None = None) -> list[str]:
        """`argv` as it is: the engine is reached through its socket, from anywhere on the machine."""
        return ["env", f"--chdir={folder or Path.cwd()}", *map(str, argv)]

    def run(self, argv: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a client command to its end, as `processes.run` does."""
        return processes.run(self.command(argv), environment={**os.environ, **self.environment}, **options)

    def base_image(self, cache: Path | None = None) -> str:
        """The name of the base image, which is imported on first use (from `cache`, where it is made on first use)."""
        if not self.run(["docker", "images", "-q", base_image.NAME]).stdout.strip():
            changes = [f"--change=ENV {name}={value}" for name, value in base_image.ENVIRONMENT.items()]
            self.run(["docker", "import", *changes, base_image.cached(cache), base_image.NAME])
        return base_image.NAME

    def push(self, image: str) -> str:
        """Push an image to the local registry; gives its name there with its digest, such as `127.0.0.1:5000/a@sha256:...`."""
        there = f"{self.registry}/{image}"
        self.run(["docker", "tag", image, there])
        self.run(["docker", "push", "-q", there])
        digests = self.run(["docker", "inspect", "-f", '{{join .RepoDigests " "}}', there]).stdout.split()
        return next(digest for digest in digests if digest.startswith(self.registry))

    def memory_limits(self) -> bool:
        """Whether a container's memory limit is enforced here (it needs the kernel's memory control group)."""
        return bool(self.engine.info()["MemoryLimit"])

    # -- what goes wrong ---------------------------------------------------------------------------------------------

    def stop_daemon(self) -> None:
        """End the engine in order (SIGTERM); containers are stopped."""
        self.engine.stop()

    def kill_daemon(self) -> None:
        """End the engine at once (SIGKILL); containers run on without it."""
        self.engine.kill()

    def start_daemon(self) -> None:
        """Start the engine with the images and containers that it had; returns when it answers."""
        self.engine.start()

    # -- coming up ---------------------------------------------------------------------------------------------------

    @property
    def room(self) -> Room:
        """Where the engine, its containers and the registry run."""
        return self.rooms[_ROOM]

    @property
    def engine(self) -> Engine:
        """The daemon."""
        return Engine(self.room, self.folder, self.id, self._private)

    def _start(self) -> None:
        for name in ("data", "registry", "client"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            self.state.data.append(str(self.folder / name))
        self.keep(self.folder / "docker.sock", self.folder / "registry.yml")
        steps = [["mount", "-t", "proc", "proc", "/proc"], ["mount", "-t", "tmpfs", "-o", "mode=755", "run", "/run"]]
        steps += [["ip", "link", "set", "lo", "up"]] if self._private else []
        steps += [["mount", "-t", "tmpfs", "images", str(self.folder / "data")]] if self._in_memory else []
        opening = open_room(self.id, _ROOM, steps, self.logs / "engine.log", leash=self.leash, own_network=self._private)
        self.rooms[_ROOM] = opening.ready()
        self.engine.start()
        self._start_registry()

    def _start_registry(self) -> None:
        port = self.state.facts["registry_port"] = self._free_port()
        config = self.folder / "registry.yml"
        config.write_text(
            f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {self.folder}/registry}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '127.0.0.1:{port}'}}\n"
        )
        program = packages.find("docker-registry") or "docker-registry"
        pid = self.room.spawn([program, "serve", config], self.logs / "registry.log")
        processes.wait_for(lambda: self._registry_answers(pid, port), "registry")

    def _registry_answers(self, pid: int, port: int) -> bool:
        if self.room.ended(pid):  # somebody else may have taken the port
            raise LabError(f"registry ended: {processes.tail((self.logs / 'registry.log').read_text())}")
        return netns.answers(self.room.init.pid, "127.0.0.1", port)

    def _free_port(self) -> int:
        with netns.network_of(self.room.init.pid), socket.create_server(("127.0.0.1", 0)) as server:
            return int(server.getsockname()[1])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    from tests.labs import cli

    words = ("base_image", "stop_daemon", "kill_daemon", "start_daemon")
    return cli.main((DockerLab,), argv, words, _options, on_machine=False)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--private", action="store_true", help="a network of its own, without a way out")
    parser.add_argument("--in-memory", action="store_true", help="images and containers in memory")


if __name__ == "__main__":
    sys.exit(main())
