"""dLoRA's servers on GPUs: start, first tokens, streams under load, sampled answers, moves and a death; all through HTTP.

    python -m benchmarks.dlora_server_gpu [--model llama-2-7b] [--replicas 1] [--adapters 8] [--policy credit] [--out FILE]
        [--limit-s 240] [--device cuda]

A real `python -m systems.dlora.server` with random weights and random adapters. Parts, each written when it is done:

* `ready`: seconds until it serves, and what the replicas say of themselves (t_m, t_u, c_sw, how weights take adapters in).
* `alone`: one client; `streams`: 32 at once over all adapters; `skewed`: most of one; `drawn`: at temperature 1. Time to the
  first token, between tokens, tokens per second. Every stream must bring exactly the tokens that it asked for.
* `moves` (two replicas or more): 48 streams of the one adapter that a single replica hosts, so that requests move.
* `death` (the same): the first replica is killed under 32 streams, which must all end.

On a CPU: `--model tiny --device cpu`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.atomic import write_atomically

PROMPT = 64
TOKENS = 96
STREAMS = 32
END_S = 20.0


@dataclass(slots=True)
class Stream:
    """What one client saw: when each token came (seconds since it asked), and what was wrong."""

    model: str
    times_s: list[float] = field(default_factory=list)
    error: str = ""


class Server:
    """The server's process; ended with everything behind it by `close`."""

    def __init__(self, file: Path, log: Path) -> None:
        self._log = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "systems.dlora.server", str(file)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True,
        )  # fmt: skip
        self.port = int(self._line()["port"])

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended: {Path(self._log.name).read_text()[-2000:]}")
        told: dict[str, Any] = json.loads(line)
        return told

    def ready(self) -> list[dict[str, Any]]:
        """What the replicas say once all serve."""
        replicas: list[dict[str, Any]] = self._line()["replicas"]
        return replicas

    def stream(self, model: str, vocab: int, seed: int, temperature: float, tokens: int = TOKENS) -> Stream:
        """Ask for one answer and read it."""
        seen = Stream(model)
        prompt = [(seed * 7919 + i * 104_729) % vocab for i in range(PROMPT)]
        body = {
            "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": temperature, "seed": seed, "stream": True,
            "return_token_ids": True,
        }  # fmt: skip
        began_s = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body))
            response = connection.getresponse()
            if response.status != 200:
                seen.error = response.read().decode()[:200]
            while not seen.error and (line := response.readline()):
                if line.startswith(b"data: {"):
                    told = json.loads(line[6:])
                    if "error" in told:
                        seen.error = str(told["error"])
                    else:
                        seen.times_s += [time.perf_counter() - began_s] * len(told["choices"][0]["token_ids"])
        except (OSError, http.client.HTTPException) as error:
            seen.error = repr(error)
        finally:
            connection.close()
        if not seen.error and len(seen.times_s) != tokens:
            seen.error = f"{len(seen.times_s)} tokens instead of {tokens}"
        return seen

    def metrics(self) -> dict[str, float]:
        """DLoRA's own numbers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        finally:
            connection.close()
        return {
            name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if "fivefold_dlora_" in line[:16])
        }

    def close(self) -> int:
        """Ask it to end, and see to it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            return -1
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self._log.close()


def numbers(streams: Sequence[Stream], took_s: float) -> dict[str, object]:
    """What clients saw, in seconds; medians and 99th of a hundred."""
    whole = [stream for stream in streams if not stream.error]
    gaps = sorted(b - a for s in whole for a, b in zip(s.times_s, s.times_s[1:], strict=False))
    first = sorted(s.times_s[0] for s in whole)

    def at(values: Sequence[float], share: float) -> float | None:
        return values[min(len(values) - 1, int(share * len(values)))] if values else None

    tpot = [(s.times_s[-1] - s.times_s[0]) / (len(s.times_s) - 1) for s in whole if len(s.times_s) > 1]
    return {
        "streams": len(streams), "errors": [s.error for s in streams if s.error][:5], "wrong": len(streams) - len(whole),
        "ttft_s": [at(first, 0.5), at(first, 0.99)], "gap_s": [at(gaps, 0.5), at(gaps, 0.99)],
        "tpot_s": statistics.median(tpot) if tpot else None, "took_s": took_s,
        "tokens_per_s": sum(len(s.times_s) for s in streams) / took_s,
    }  # fmt: skip


class Bench:
    """A server, and clients that ask it together."""

    def __init__(self, server: Server, names: Sequence[str], vocab: int, pool: ThreadPoolExecutor) -> None:
        self.server, self.names, self._vocab, self._pool = server, names, vocab, pool

    def together(
        self, models: Sequence[str], temperature: float = 0.0, then: Callable[[], None] = lambda: None
    ) -> dict[str, object]:
        """Streams of `models` at once; `then` is called when they are under way."""
        began_s = time.perf_counter()
        asked = [self._pool.submit(self.server.stream, name, self._vocab, i, temperature) for i, name in enumerate(models)]
        then()
        streams = [one.result() for one in asked]
        return {**numbers(streams, time.perf_counter() - began_s), "metrics": self.server.metrics()}


def parts(bench: Bench, replicas: list[dict[str, Any]]) -> dict[str, Callable[[], dict[str, object]]]:
    """What is measured, by name, in order."""
    every = [bench.names[i % len(bench.names)] for i in range(STREAMS)]
    found: dict[str, Callable[[], dict[str, object]]] = {
        "alone": lambda: bench.together([bench.names[0]]),
        "again": lambda: bench.together([bench.names[0]]),
        "streams": lambda: bench.together(every),
        "skewed": lambda: bench.together([bench.names[0]] * (STREAMS - 4) + list(bench.names[:4])),
        "drawn": lambda: bench.together(every, 1.0),
        "drawn again": lambda: bench.together(every, 1.0),
    }
    if len(replicas) > 1:
        elsewhere = {name for one in replicas[1:] for name in one["adapters"]}
        mine = next((name for name in replicas[0]["adapters"] if name not in elsewhere), bench.names[0])

        def kill() -> None:
            time.sleep(0.3)  # somewhere in the middle of the streams: nothing depends on where
            os.kill(replicas[0]["pid"], signal.SIGKILL)

        found["moves"] = lambda: bench.together([mine] * 48)
        found["death"] = lambda: bench.together(every, 0.0, kill)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the exit code is 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="llama-2-7b")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--policy", default="credit")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit-s", type=float, default=240.0)
    given = parser.parse_args(arguments)
    began_s = time.perf_counter()
    report: dict[str, object] = {"command": sys.argv, "parts": (runs := dict[str, object]())}

    def write(name: str, found: object) -> None:
        runs[name] = found
        report["took_s"] = time.perf_counter() - began_s
        print(f"{name}: {time.perf_counter() - began_s:.1f} s", flush=True)
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(given.out, json.dumps(report, indent=1).encode())

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(64) as pool:
        file = Path(folder) / "servers.yaml"
        told = {
            "model": given.model, "random_weights": True, "random_adapters": given.adapters, "slots": given.slots,
            "replicas": given.replicas, "policy": given.policy, "device": given.device, "max_model_len": 1024,
            "migration": {"interval_s": 0.5, "load_excess": 8}, "drain_s": 5,
        }  # fmt: skip
        file.write_text(yaml.safe_dump(told))
        report["file"] = told
        try:
            server = Server(file, Path(folder) / "server.err")
        except Exception as error:
            write("ready", {"error": repr(error)})
            return 1
        watch = _watchdog(server, began_s + given.limit_s)
        try:
            replicas = server.ready()
            write("ready", {"s": time.perf_counter() - began_s, "replicas": replicas})
            from systems.common.models import model

            bench = Bench(server, [f"adapter-{i}" for i in range(given.adapters)], model(given.model).vocab, pool)
            for name, work in parts(bench, replicas).items():
                if time.perf_counter() - began_s > given.limit_s - 20:
                    write(name, {"error": "no time left"})
                    continue
                try:
                    write(name, work())
                except Exception as error:
                    write(name, {"error": repr(error), "trace": traceback.format_exc()})
        except Exception as error:
            write("serving", {"error": repr(error), "trace": traceback.format_exc()})
        finally:
            watch.cancel()
            code = server.close()
            write("end", {"code": code, "log": (Path(folder) / "server.err").read_text()[-4000:]})
    print(json.dumps(report))
    wrong = [name for name, found in runs.items() if isinstance(found, dict) and (found.get("error") or found.get("wrong"))]
    return int(bool(wrong) or code != 0)


def _watchdog(server: Server, until_s: float) -> Any:
    """Kill the server where it has not answered in time, so that whoever waits for it goes on."""
    import threading

    timer = threading.Timer(max(0.0, until_s - time.perf_counter()), lambda: os.killpg(server.process.pid, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    return timer


if __name__ == "__main__":
    sys.exit(main())
