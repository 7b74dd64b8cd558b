"""vLLM on the workloads of benchmarks/engine.py, for a ratio on the same GPU.

    python benchmarks/engine_vllm.py --folder DIR --out FILE [--workload FILE] [--rate R] [--parts decode,...] [--limit-s S]

Needs vLLM (measured with 0.24.0). DIR gets a config.json of Llama-3.1-8B's shape and the adapters; weights are vLLM's random
ones (`load_format="dummy"`). vLLM's asynchronous engine runs as it does behind its server (core in a process of its own),
without HTTP, as ours runs. FILE is written after every part:

* `decode`: a decode step, the median time between two tokens of one sequence of a batch, contexts of 480 to 544.
* `prefill`: one prompt, submit to first token. `offline`: 512 requests at once.
* `saturation`: the workload's first 600 requests at once. `open`: the workload at `--rate`, else at 70 % of that saturation.
* `lora`: a second engine, started when the first has ended: 32 adapters of rank 16 on q, k, v and o in a batch of 32, over the
  same batch without. It runs without torch.compile and captures the one batch size that is measured, to start in half the time:
  adapters run in Triton kernels either way.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

PARTS = ("decode", "prefill", "offline", "saturation", "open", "lora")
CONTEXT, VOCAB, LAYERS, RANK = 512, 128256, 32, 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 4096,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "attention_bias": False,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
COMMON: dict[str, Any] = {
    "load_format": "dummy",
    "dtype": "bfloat16",
    "skip_tokenizer_init": True,
    "max_model_len": 8192,
    "enable_prefix_caching": False,
    "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.9,
    "disable_log_stats": True,
    "seed": 0,
}
MAIN = COMMON | {"max_num_seqs": 512}
ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",  # its log says where the start went
}
RESERVE_S = 45.0
"""Kept of the time limit for the second engine."""
RNG = np.random.default_rng(0)


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, quartiles and mean, milliseconds."""
    low, middle, high = statistics.quantiles([s * 1e3 for s in seconds], n=4)
    return {"ms": middle, "low_ms": low, "high_ms": high, "mean_ms": statistics.fmean(seconds) * 1e3, "runs": len(seconds)}


def prompt(tokens: int) -> list[int]:
    """A random prompt."""
    return [int(token) for token in RNG.integers(0, VOCAB, tokens)]


def adapted(rows: int) -> dict[str, Any]:
    """Options of the second engine: an adapter for each of `rows` sequences."""
    return {
        "max_num_seqs": rows,
        "gpu_memory_utilization": 0.5,
        "enable_lora": True,
        "max_loras": rows,
        "max_lora_rank": RANK,
        "lora_target_modules": ["qkv_proj", "o_proj"],
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [rows]},
    }


class Client:
    """One engine of vLLM and what is asked of it."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.asked = engine, 0

    @classmethod
    def start(cls, folder: Path, options: dict[str, Any]) -> Client:
        """Returns when the engine is ready."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **options))
        gc.freeze()  # as vLLM's server does
        return cls(engine)

    async def ask(self, tokens: list[int], outputs: int, adapter: Any = None, each: bool = False) -> list[float]:
        """When the answer came; with `each`, when each of its tokens came."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.asked += 1
        kind = RequestOutputKind.DELTA if each else RequestOutputKind.FINAL_ONLY
        want = SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False, output_kind=kind)
        told = self.engine.generate({"prompt_token_ids": tokens}, want, str(self.asked), lora_request=adapter)
        return [time.perf_counter() async for _ in told]

    async def batch(self, lengths: list[tuple[int, int]]) -> float:
        """Seconds to serve requests of (input, output) tokens, all at once."""
        prompts = [prompt(a) for a, _ in lengths]
        began = time.perf_counter()
        await asyncio.gather(*(self.ask(p, b) for p, (_, b) in zip(prompts, lengths, strict=True)))
        return time.perf_counter() - began

    async def step(self, rows: int, adapters: list[Any] | None = None, runs: int = 4) -> dict[str, float]:
        """A decode step of `rows` sequences: times between tokens once all decode; the first of `runs` batches is left out."""
        gaps: list[float] = []
        names = adapters or [None]
        for run in range(runs):
            prompts = [prompt(CONTEXT - 32) for _ in range(rows)]
            asked = (self.ask(p, 65, names[i % len(names)], each=True) for i, p in enumerate(prompts))
            last = max(await asyncio.gather(*asked), key=lambda times: times[0])
            if run or runs == 1:
                gaps += np.diff(last)[3:].tolist()
        return spread(gaps)

    async def decode(self) -> dict[str, dict[str, float]]:
        """By batch."""
        return {str(rows): await self.step(rows, runs=runs) for rows, runs in ((1, 4), (32, 4), (128, 3))}

    async def prefill(self) -> dict[str, dict[str, float]]:
        """By prompt."""
        return {str(n): spread([await self.batch([(n, 1)]) for _ in range(33)][3:]) for n in (128, 512, 2048)}

    async def offline(self, runs: int = 2) -> dict[str, float]:
        """Output tokens per second."""
        rates = [512 * 200 / await self.batch([(215, 200)] * 512) for _ in range(runs)]
        return {"output_tokens_per_s": statistics.median(rates), "low": min(rates), "high": max(rates), "runs": runs}

    async def saturation(self, workload: list[list[float]]) -> float:
        """Requests per second when many wait."""
        first = [(int(a), int(b)) for _, a, b in workload[:600]]
        return len(first) / await self.batch(first)

    async def open(self, workload: list[list[float]], rate_rps: float, span_s: float) -> dict[str, float]:
        """Requests as they arrive, for `span_s`."""
        asked = [(at / rate_rps, int(b), prompt(int(a))) for at, a, b in workload if at / rate_rps < span_s]
        await asyncio.gather(*(self.ask(p, 8) for _, _, p in asked[:64]))

        async def one(arrival: float, outputs: int, tokens: list[int]) -> tuple[float, float, float]:
            await asyncio.sleep(max(0.0, began + arrival - time.perf_counter()))
            lag = time.perf_counter() - began - arrival
            times = await self.ask(tokens, outputs, each=True)
            return times[0] - began - arrival, (times[-1] - times[0]) / max(1, outputs - 1), lag

        began = time.perf_counter()
        told = np.array(await asyncio.gather(*(one(*each) for each in asked)))
        many = np.array([outputs > 1 for _, outputs, _ in asked])
        return {
            "rate_rps": rate_rps,
            "span_s": span_s,
            "requests": len(asked),
            "ttft_p50_s": float(np.median(told[:, 0])),
            "ttft_p99_s": float(np.percentile(told[:, 0], 99)),
            "tpot_mean_s": float(told[many, 1].mean()),
            "tpot_p99_s": float(np.percentile(told[many, 1], 99)),
            "client_lag_p99_s": float(np.percentile(told[:, 2], 99)),
        }

    async def lora(self, folders: list[Path]) -> dict[str, Any]:
        """A batch without adapters and one with an adapter for each of its sequences."""
        from vllm.lora.request import LoRARequest

        adapters = [LoRARequest(folder.name, i + 1, str(folder)) for i, folder in enumerate(folders)]
        began = time.perf_counter()
        for adapter in adapters:
            await self.engine.add_lora(adapter)
        loaded = time.perf_counter() - began
        rows = len(adapters)
        found: dict[str, Any] = {"load_s": loaded, "options": adapted(rows)}
        for name, chosen in (("none", None), (str(rows), adapters)):
            found[name] = await self.step(rows, chosen)
        return found | {"ratio": found[str(rows)]["ms"] / found["none"]["ms"]}


def write_adapter(folder: Path, values: np.ndarray) -> None:
    """A PEFT adapter on q, k, v and o of every layer, of the bf16 numbers `values` (as uint16, as many as it takes)."""
    widths = {"q": 4096, "k": 1024, "v": 1024, "o": 4096}
    header, at = {}, 0
    for layer in range(LAYERS):
        for name, width in widths.items():
            for half, shape in (("A", [RANK, 4096]), ("B", [width, RANK])):
                end = at + shape[0] * shape[1] * 2
                header[f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_{half}.weight"] = {
                    "dtype": "BF16", "shape": shape, "data_offsets": [at, end]
                }  # fmt: skip
                at = end
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + np.resize(values, at // 2).tobytes())
    peft = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "target_modules": [f"{x}_proj" for x in widths]}
    (folder / "adapter_config.json").write_text(json.dumps(peft))


def write_adapters(folder: Path, count: int) -> list[Path]:
    """Adapters that are all different."""
    pool = ((RNG.standard_normal(1_000_003, dtype=np.float32) / 50).view(np.uint32) >> 16).astype(np.uint16)
    folders = [folder / f"adapter{i}" for i in range(count)]
    for i, each in enumerate(folders):
        write_adapter(each, np.roll(pool, 997 * i))
    return folders


class Run:
    """A measurement with a time limit: its result is written after every part, its processes end with it."""

    def __init__(self, out: Path, limit_s: float) -> None:
        self.out, self.result = out, dict[str, Any]()
        self.began = time.monotonic()
        self.ends = self.began + limit_s
        self.child: subprocess.Popen[bytes] | None = None

    def spawn(self, words: list[object], log: Path) -> None:
        """Start the second engine's process, which leads a group of its own."""
        with log.open("w") as file:
            self.child = subprocess.Popen(
                [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    def drop_child(self) -> None:
        """End the second engine with all that it started."""
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()
            self.child = None

    def left_s(self) -> float:
        """Until the limit."""
        return self.ends - time.monotonic()

    def say(self, *words: object) -> None:
        """With the time since the start."""
        print(f"# {time.monotonic() - self.began:6.1f} s", *words, flush=True)

    def save(self) -> None:
        """All or nothing."""
        near = self.out.with_name(self.out.name + ".part")
        near.write_text(json.dumps(self.result, indent=1) + "\n")
        near.replace(self.out)

    def failed(self, name: str, error: Exception) -> None:
        """Record it."""
        traceback.print_exception(error)
        self.result.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"

    async def part(self, name: str, work: Callable[[], Awaitable[Any]]) -> None:
        """One part, within what time is left; a failure is recorded and the other parts still run."""
        try:
            reserve_s = 0.0 if self.child is None else RESERVE_S
            self.result[name] = await asyncio.wait_for(work(), max(0.1, self.left_s() - reserve_s))
        except Exception as error:
            self.failed(name, error)
        self.say(name, json.dumps(self.result.get(name, "failed")))
        self.save()

    def end(self, why: str) -> None:
        """Leave at once, and take every process along."""
        self.save()
        self.say(why)
        self.drop_child()
        os.killpg(0, signal.SIGKILL)


async def until(file: Path, limit_s: float) -> bool:
    """Whether `file` appeared in time."""
    ends = time.monotonic() + limit_s
    while not file.exists() and time.monotonic() < ends:
        await asyncio.sleep(0.05)
    return file.exists()


def beside(chosen: argparse.Namespace) -> Path:
    """Where the second engine's process writes."""
    out: Path = chosen.out
    return out.with_name(out.stem + "_lora.json")


async def second(run: Run, chosen: argparse.Namespace) -> None:
    """The engine with adapters; until the GPU is free, only what needs no GPU."""
    folders = write_adapters(chosen.folder, chosen.adapters)
    run.say("adapters written")
    if await until(chosen.folder / "go", run.left_s()):
        began = time.monotonic()
        client = Client.start(chosen.folder, COMMON | adapted(chosen.adapters))
        run.result["lora_start_s"] = time.monotonic() - began
        run.say("second engine ready")
        await run.part("lora", lambda: client.lora(folders))


async def first(run: Run, chosen: argparse.Namespace, parts: list[str]) -> None:
    """The engine without adapters; then the second process may start the one with them."""
    if parts != ["lora"]:
        try:
            client = Client.start(chosen.folder, MAIN)
            run.result["start_s"] = time.monotonic() - run.began
            run.say("engine ready")
            await measure(run, chosen, parts, client)
            client.engine.shutdown()
        except Exception as error:  # the other engine may still do
            run.failed("start", error)
    if run.child is not None:
        (chosen.folder / "go").touch()
        while run.child.poll() is None and run.left_s() > 0:
            await asyncio.sleep(0.1)
        told = json.loads(beside(chosen).read_text()) if beside(chosen).is_file() else {}
        run.result |= {name: told[name] for name in ("lora", "lora_start_s") if name in told}
        if "lora" not in told:
            errors = told.get("errors", {"lora": "its engine did not come up in time"})
            run.result["errors"] = run.result.get("errors", {}) | {"lora": "; ".join(errors.values())}
        run.say("lora", json.dumps(run.result.get("lora", "failed")))


async def measure(run: Run, chosen: argparse.Namespace, parts: list[str], client: Client) -> None:
    """Everything that needs the first engine."""
    workload = json.loads(chosen.workload.read_text()) if chosen.workload else []
    await client.batch([(100 + i, 8) for i in range(64)])
    if "decode" in parts:
        await run.part("decode", client.decode)
    if "prefill" in parts:
        await run.part("prefill", client.prefill)
    if "offline" in parts:
        await run.part("offline", client.offline)
    if "saturation" in parts and workload:
        await run.part("saturation_rps", lambda: client.saturation(workload))
    rate_rps = chosen.rate or 0.7 * run.result.get("saturation_rps", 0.0)
    if "open" in parts and workload and rate_rps:
        await run.part("open", lambda: client.open(workload, rate_rps, chosen.span_s))


def options() -> argparse.Namespace:
    """The command line."""
    words = argparse.ArgumentParser()
    words.add_argument("--folder", type=Path, required=True, help="for the model's shape and the adapters (in memory, best)")
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--workload", type=Path, help="JSON list of [arrival at 1/s, input tokens, output tokens]")
    words.add_argument("--rate", type=float, help="of the open loop, requests/s")
    words.add_argument("--span-s", type=float, default=30.0, help="of the open loop")
    words.add_argument("--adapters", type=int, default=32, help="and rows of the batch that uses them")
    words.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    words.add_argument("--limit-s", type=float, default=600.0)
    words.add_argument("--second", action="store_true", help="(how the second engine's process is started)")
    return words.parse_args()


def main() -> None:
    """Measure and write."""
    chosen = options()
    parts = [part for part in PARTS if part in chosen.parts.split(",")]
    os.environ |= ENVIRONMENT | {"VLLM_ENGINE_READY_TIMEOUT_S": str(int(chosen.limit_s))}
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # what it starts ends with it
    run = Run(chosen.out, chosen.limit_s)
    watch = threading.Timer(chosen.limit_s + 10, run.end, ["out of time"])
    watch.daemon = True
    watch.start()
    signal.signal(signal.SIGTERM, lambda *_: run.end("told to end"))
    chosen.folder.mkdir(parents=True, exist_ok=True)
    (chosen.folder / "config.json").write_text(json.dumps(CONFIG))
    if "lora" in parts and not chosen.second:
        for old in (chosen.folder / "go", beside(chosen)):
            old.unlink(missing_ok=True)
        shared = ["--folder", chosen.folder, "--out", beside(chosen), "--limit-s", chosen.limit_s]
        shared += ["--adapters", chosen.adapters]
        run.spawn([sys.executable, __file__, "--second", *shared], beside(chosen).with_suffix(".log"))
    try:
        import vllm

        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        run.result |= {"vllm": vllm.__version__, "command": sys.argv, "date": now}
        run.say("imported")
        asyncio.run(second(run, chosen) if chosen.second else first(run, chosen, parts))
    except Exception as error:
        run.failed("start", error)
    if chosen.second:
        run.end("done")  # nothing here is worth a graceful end, and vLLM's may take its time
    run.drop_child()
    run.save()
    run.say("done", json.dumps(run.result.get("errors", {})))
    watch.cancel()
    sys.exit(1 if "errors" in run.result else 0)


if __name__ == "__main__":
    main()
