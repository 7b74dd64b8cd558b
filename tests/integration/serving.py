"""A real server process for tests, and a small HTTP client."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
START_S = 120
"""How long a start may take before a test gives up (it takes about 5 s)."""
TINY = ("--model", "tiny", "--random-weights", "--device", "cpu", "--seed", "7", "--max-model-len", "1024")


class Server:
    """`python -m systems.common.serve`, ready."""

    def __init__(self, process: subprocess.Popen[str], err: IO[str]) -> None:
        assert process.stdout is not None
        self.process, self._err = process, err
        self.hello = self._line()
        self.port: int = self.hello["port"]

    def _line(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, f"the server ended: {self.log()}"
        return json.loads(line)

    def wait_ready(self) -> dict[str, Any]:
        """Until the engine serves; what it says of itself."""
        ready = self._line()
        assert ready["ready"] is True
        return ready

    def log(self) -> str:
        """What it has written to stderr."""
        self._err.seek(0)
        return self._err.read()

    def request(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON (or text) of one exchange."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if isinstance(body, str | bytes | None) else json.dumps(body)
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            content = response.read().decode()
            self.headers = response.headers
            return response.status, json.loads(content) if response.headers.get_content_subtype() == "json" else content
        finally:
            connection.close()

    def complete(self, prompt: object = "hello", chat: bool = False, **fields: object) -> tuple[int, Any]:
        """One completion, greedy unless said otherwise."""
        path = "/v1/chat/completions" if chat else "/v1/completions"
        content = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        return self.request("POST", path, {"model": "tiny", "temperature": 0, "return_token_ids": True, **content, **fields})

    def stream(self, prompt: object = "hello", chat: bool = False, **fields: object) -> Iterator[dict[str, Any]]:
        """The pieces of a streamed answer; closing it early hangs up."""
        path = "/v1/chat/completions" if chat else "/v1/completions"
        content = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        body = {"model": "tiny", "temperature": 0, "return_token_ids": True, "stream": True, **content, **fields}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", path, json.dumps(body))
            response = connection.getresponse()
            assert response.status == 200, response.read()
            assert response.headers.get_content_type() == "text/event-stream"
            while line := response.readline().strip() or response.readline().strip():
                assert line.startswith(b"data: ")
                if line == b"data: [DONE]":
                    return
                yield json.loads(line.removeprefix(b"data: "))
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """`/metrics` by name and labels, without the prefix."""
        status, text = self.request("GET", "/metrics")
        assert status == 200
        samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name.removeprefix("fivefold_"): float(value) for name, _, value in samples}

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def server(
    tmp: Path, *options: str, command: Sequence[str] = ("-m", "systems.common.serve"), ready: bool = True, ulimit: str = ""
) -> Iterator[Server]:
    """A server with `options`; `ulimit` is given to the shell's command of that name first."""
    argv = [sys.executable, *command, *options]
    if ulimit:
        argv = ["sh", "-c", f'ulimit {ulimit} && exec "$@"', "sh", *argv]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with (tmp / "serve.err").open("w+") as err:
        process = subprocess.Popen(
            argv, cwd=tmp, env=environment, stdout=subprocess.PIPE, stderr=err, text=True, start_new_session=True
        )
        try:
            made = Server(process, err)
            if ready:
                made.wait_ready()
            yield made
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def run(tmp: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A server that should end by itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "systems.common.serve", *options]
    return subprocess.run(argv, cwd=tmp, env=environment, capture_output=True, text=True, timeout=START_S, check=False)
