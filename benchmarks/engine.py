# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Speed of the engine on one GPU, against the floor that its bytes and FLOPs set on the same GPU in the same run.

    python benchmarks/engine.py [--model llama-3.1-8b] [--seed 0] [--out FILE] [--parts decode,engine,...] [--limit-s S]
                                [--workload FILE] [--rate R] [--vllm FILE]
    python benchmarks/engine.py --sharegpt CSV --workload FILE

Random weights of the model's shape. Ceilings first (a large copy, a large matrix product), then correctness, then times:
medians of 30 or more with the quartiles (whole offline runs: 2). Prints a table; the JSON object goes to FILE after every part,
or to the last line. A part that would not end within `--limit-s` is left out. Parts:

* `logits`: against transformers in float32, and graphs against eager steps.
* `decode`, `mixed`: one graph of decoding rows, of decoding rows with a prompt beside them.
* `prefill`: one prompt through the whole engine, submit to first token. `engine`: decode steps as served; what the host adds.
* `offline`: 512 requests at once.
* `open`: `--workload`'s requests arriving at the rate of `--vllm`'s run, else at `--rate`, else at 70 % of our own saturation.
* `lora`: batches with adapters. `hf`: Hugging Face eager on the same weights.

benchmarks/engine_vllm.py measures vLLM the same way; `--vllm` takes what it wrote and prints the ratios.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.models import ModelShape, model
from systems.common.torch_engine import weights as weights_module
from systems.common.torch_engine.attention import Chunks
from systems.common.torch_engine.drivers import Live
from systems.common.torch_engine.executor import fitting_blocks
from systems.common.torch_engine.kernels.triton_guard import triton
from systems.common.torch_engine.lora import ATTENTION_SITES, AdapterBank, random_adapter
from systems.common.torch_engine.mixed import Bucket, Inputs, mixed_step, pack

PARTS = ("logits", "decode", "mixed", "prefill", "engine", "offline", "open", "lora", "hf")
RUNS = 30
CONTEXT = 512
# generous bounds of what a part takes on one H200, seconds (the open loop: beside its span)
COSTS_S = {"logits": 40, "decode": 12, "mixed": 6, "prefill": 12, "engine": 15, "offline": 18, "open": 8, "lora": 30, "hf": 40}


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, milliseconds."""
    low, middle, high = statistics.quantiles([s * 1e3 for s in seconds], n=4)
    return {"ms": middle, "low_ms": low, "high_ms": high, "runs": len(seconds)}


def on_gpu(work: Callable[[], object], runs: int = RUNS, before: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Time of `work` between two events on the GPU, `before` left out."""
    times = []
    for _ in range(runs + 3):
        before()
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return spread(times[3:])


def ceilings() -> dict[str, float]:
    """Copy bandwidth (bytes read plus written) and rate of a bf16 product, on random data."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = on_gpu(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = on_gpu(lambda: a @ b)
    return {"copy_bytes_per_s": 2 * 2**32 / copy["ms"] * 1e3, "matmul_flops": 2 * 8192**3 / product["ms"] * 1e3}


def decode_floor_s(shape: ModelShape, rows: int, context: int, peak: dict[str, float]) -> float:
    """A decode step reads every weight but the token table once, and the KV cache."""
    moved = shape.weight_bytes - shape.embedding_parameters * shape.dtype_bytes * (not shape.tied)
    moved += rows * context * shape.kv_bytes_per_token
    flops = rows * (shape.layers * shape.layer_flops_per_token + 2 * shape.vocab * shape.hidden)
    return max(moved / peak["copy_bytes_per_s"], flops / peak["matmul_flops"])


def prefill_floor_s(shape: ModelShape, tokens: int, peak: dict[str, float]) -> float:
    """All products of `tokens` tokens, attention, and one row of the head."""
    flops = shape.layers * (tokens * shape.layer_flops_per_token + shape.layer_attention_flops(tokens))
    return max((flops + 2 * shape.vocab * shape.hidden) / peak["matmul_flops"], shape.weight_bytes / peak["copy_bytes_per_s"])


class Bench:
    """One model on the GPU, and an engine over it."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self.shape, self.seed = shape, seed
        self.weights = weights_module.random_weights(shape, seed, "cuda")
        self.peak: dict[str, float] = {}
        self.live = self.small()
        self.capture_s = 0.0

    def small(self, **options: Any) -> Live:
        """An engine that leaves room for another model beside it."""
        return Live.build(
            self.shape, self.weights, EngineConfig(400, max_num_batched_tokens=512, max_num_seqs=24), max_tokens=1024, **options
        )

    def drop(self) -> None:
        """Give the engine's memory back."""
        del self.live
        gc.unfreeze()
        gc.collect()  # engine and executor hold each other
        torch.cuda.empty_cache()

    def build(self, utilisation: float = 0.9, warm: bool = True, **options: Any) -> None:
        """The engine under test, with its graphs captured."""
        self.drop()
        blocks = fitting_blocks(self.shape, utilisation)
        config = EngineConfig(blocks, max_num_batched_tokens=8192, max_num_seqs=512)
        self.live = Live.build(self.shape, self.weights, config, max_tokens=8192, **options)
        began = time.perf_counter()
        if warm:
            self.live.executor.warm()
        torch.cuda.synchronize()
        self.capture_s = time.perf_counter() - began

    @torch.inference_mode()
    def mixed_graph(self) -> dict[str, float]:
        """Logits of one batch (3 decoding rows, 3 chunks): its graph, the same padded batch eagerly, and the bare batch."""
        executor = self.live.executor
        cache, steps = executor.cache, executor.steps
        new, past, slots, rows = [20, 200, 33], np.array([0, 0, 64]), np.array([3, 4, 5]), np.array([0, 1, 2])
        prompts = [np.random.default_rng(n).integers(0, self.shape.vocab, n) for n in new]
        found = []
        for padded, graphed in ((True, True), (True, False), (False, False)):
            torch.manual_seed(self.seed)
            self.fill(6, CONTEXT)
            bucket = steps.bucket(3, sum(new), 3)[0] if padded else Bucket(3, sum(new), 3)
            packed = torch.from_numpy(
                pack(bucket, prompts, rows, np.full(3, CONTEXT + 1), past, slots, np.ones(3, bool), cache.pad_slot)
            ).cuda()
            step = (
                steps.mixed(packed, bucket)
                if graphed
                else mixed_step(executor.model, cache, Inputs.of(packed, bucket, None), True)
            )
            found.append(step.logits[[0, 1, 2, *range(bucket.rows, bucket.rows + 3)]].double())
        off = [float((x - found[0]).norm() / found[0].norm()) for x in found[1:]]
        return {"padded_eager": off[0], "bare_eager": off[1]}

    def open(self, workload: list[list[float]], rate_rps: float | None, span_s: float) -> dict[str, float]:
        """Arrivals at `rate_rps` (None: 70 % of the rate at which the first 600 are served at once) for `span_s`."""
        lengths = [Request(i, 0.0, int(a), int(b)) for i, (_, a, b) in enumerate(workload[:600])]
        self.serve(lengths[:64])
        found = {}
        if rate_rps is None:
            found["saturation_rps"] = len(lengths) / self.serve(lengths)
        rate = rate_rps or 0.7 * found["saturation_rps"]
        asked = [Request(i, at / rate, int(a), int(b)) for i, (at, a, b) in enumerate(workload) if at / rate < span_s]
        first = len(self.live.executor.flights.ended_s)
        sequences = self.live.serve(asked)
        executor = self.live.executor
        periods, rows = np.diff(executor.flights.ended_s[first:]), np.array(executor.flights.decode_rows[first + 1 :])
        ttft = np.array([s.first_token_s - s.arrival_s for s in sequences])
        tpot = np.array([(s.finish_s - s.first_token_s) / (s.output_tokens - 1) for s in sequences if s.output_tokens > 1])
        return found | {
            "rate_rps": rate,
            "span_s": span_s,
            "requests": len(asked),
            "ttft_p50_s": float(np.median(ttft)),
            "ttft_p99_s": float(np.percentile(ttft, 99)),
            "tpot_mean_s": float(tpot.mean()),
            "tpot_p99_s": float(np.percentile(tpot, 99)),
            "preemptions": sum(s.preemptions for s in sequences),
            "step_p50_s": float(np.median(periods)),
            "step_p99_s": float(np.percentile(periods, 99)),
            "step_max_s": float(periods.max()),
            "decode_steps": int((rows > 0).sum()),
            "decode_step_mean_s": float(periods[rows > 0].mean()),
            "decode_rows_mean": float(rows[rows > 0].mean()),
            "mixed_steps": int((rows == 0).sum()),
            "mixed_step_mean_s": float(periods[rows == 0].mean()),
            "mixed_step_p90_s": float(np.percentile(periods[rows == 0], 90)),
        }

    def served(self, rows: int, adapters: int = 0, steps: int = 64) -> tuple[dict[str, float], float]:
        """Periods of a batch's decode steps as served, contexts of 480 to 544; median host work of a step."""
        executor = self.live.executor
        first = len(executor.flights.ended_s)
        name: list[str | None] = [f"a{i}" for i in range(adapters)] or [None]
        self.serve([Request(i, 0.0, CONTEXT - steps // 2, steps, name[i % len(name)]) for i in range(rows)])
        ended, waited = np.array(executor.flights.ended_s[first:]), np.array(executor.flights.waited_s[first:])
        periods = np.diff(ended)[-steps + 4 :]  # the last steps are decode only
        return spread(periods.tolist()), float(np.median(periods - waited[-len(periods) :])) * 1e3

    def lora(self) -> dict[str, dict[str, float]]:
        """Batches of 32: without adapters, with one, with 32 of rank 16 on q, k, v and o; one graph step each, and served."""
        self.build(0.6, warm=False, adapters=(32, 16, ATTENTION_SITES))
        executor = self.live.executor
        bank = executor.adapters
        assert isinstance(bank, AdapterBank)
        for i in range(32):
            bank.load(f"a{i}", random_adapter(self.shape, 16, i, device="cuda"))
        found: dict[str, dict[str, float]] = {}
        rows = 32
        for name, adapters in (("none", 0), ("1", 1), ("32", 32)):
            self.fill(rows, CONTEXT)
            executor.model.adapted = adapters > 0
            with torch.inference_mode():
                bank.of_slot[:rows] = torch.arange(rows, device="cuda") % adapters + 1 if adapters else 0
                timed = on_gpu(lambda: executor.steps.decode(rows), before=lambda: self.rewind(rows, CONTEXT))
                found[name] = timed | {"ratio": timed["ms"] / found.get("none", timed)["ms"]}
            executor.model.adapted = False
        self.served(rows, 32)
        self.served(rows)
        found["none, served"], _ = self.served(rows)
        found["32, served"], _ = self.served(rows, 32)
        found["32, served"]["ratio"] = found["32, served"]["ms"] / found["none, served"]["ms"]
        return found

    @torch.inference_mode()
    def fill(self, rows: int, context: int) -> None:
        """Pretend that `rows` sequences of `context` tokens are in the cache (random keys and values)."""
        cache, steps = self.live.executor.cache, self.live.executor.steps
        width = -(-(context + 8) // cache.block_tokens)
        order = torch.randperm(rows * width, device="cuda").to(torch.int32) + 1
        cache.tables[:rows, :width] = order.view(rows, width)
        for layer in (*cache.k, *cache.v):
            layer[: rows * width + 1].normal_()
        cache.last_token.random_(0, self.shape.vocab)
        cache.lengths.zero_()
        steps.slots.fill_(cache.pad_slot)
        steps.slots[:rows] = torch.arange(rows)
        self.rewind(rows, context)

    @torch.inference_mode()
    def rewind(self, rows: int, context: int) -> None:
        """Set the lengths back."""
        self.live.executor.cache.lengths[:rows] = context

    @torch.inference_mode()
    def decode(self) -> dict[str, dict[str, float]]:
        """A decode step by graph: embedding to next token, committed."""
        found = {}
        for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            self.fill(rows, CONTEXT)
            timed = on_gpu(partial(self.live.executor.steps.decode, rows), before=partial(self.rewind, rows, CONTEXT))
            timed["floor_ms"] = decode_floor_s(self.shape, rows, CONTEXT, self.peak) * 1e3
            found[str(rows)] = timed
        return found

    def serve(self, requests: list[Request]) -> float:
        """Seconds to serve `requests` at once."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        self.live.generate(requests)
        return time.perf_counter() - began

    @torch.inference_mode()
    def mixed(self) -> dict[str, dict[str, float]]:
        """A decode step of 96 rows with one whole prompt beside it, by graph."""
        executor, found = self.live.executor, {}
        for tokens in (128, 256, 384, 512, 768, 1024):
            self.fill(96, CONTEXT)
            cache = executor.cache
            cache.tables[96, :64] = torch.arange(1, 65)
            bucket, graphed = executor.steps.bucket(96, tokens, 1)
            prompt = np.random.default_rng(0).integers(0, self.shape.vocab, tokens)
            lengths, past, slot = np.full(96, CONTEXT + 1), np.zeros(1, np.int64), np.array([96])
            packed = torch.from_numpy(
                pack(bucket, [prompt], np.arange(96), lengths, past, slot, np.ones(1, bool), cache.pad_slot)
            ).cuda()
            if graphed:
                timed = on_gpu(partial(executor.steps.mixed, packed, bucket), before=partial(self.rewind, 96, CONTEXT))
                found[f"96 + {tokens}"] = timed
        return found

    def prefill(self) -> dict[str, dict[str, float]]:
        """One prompt through the whole engine: submit to first token on the host."""
        found = {}
        for tokens in (128, 512, 1024, 2048, 4096):
            times = [self.serve([Request(i, 0.0, tokens, 1)]) for i in range(RUNS + 5)]
            found[str(tokens)] = spread(times[5:]) | {"floor_ms": prefill_floor_s(self.shape, tokens, self.peak) * 1e3}
        return found

    def engine(self, graph: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """Decode steps as the engine takes them; beside the graph alone at the same contexts (`graph`), what the host adds."""
        found = {}
        for rows in (1, 32, 128, 256):
            timed, host_ms = self.served(rows)
            found[str(rows)] = timed | {"host_work_ms": host_ms}
            if str(rows) in graph:
                alone_ms = graph[str(rows)]["ms"]
                found[str(rows)] |= {"graph_ms": alone_ms, "overhead_ms": timed["ms"] - alone_ms}
        return found

    def offline(self, runs: int = 2) -> dict[str, float]:
        """512 requests of 215 tokens in, 200 out, all at once; output tokens per second."""
        rates, asked = [], [Request(i, 0.0, 215, 200) for i in range(512)]
        for _ in range(runs):
            rates.append(512 * 200 / self.serve(asked))
        prefill = 512 * prefill_floor_s(self.shape, 215, self.peak)
        decode = sum(decode_floor_s(self.shape, 512, 215 + i, self.peak) for i in range(200))
        return {
            "output_tokens_per_s": statistics.median(rates),
            "low": min(rates),
            "high": max(rates),
            "runs": runs,
            "floor_output_tokens_per_s": 512 * 200 / (prefill + decode),
            "steps": self.live.engine.steps,
            "max_num_seqs": self.live.engine.config.max_num_seqs,
            "max_num_batched_tokens": self.live.engine.config.max_num_batched_tokens,
        }

    @torch.inference_mode()
    def logits(self) -> dict[str, float]:
        """Relative error of 64 tokens' logits against transformers in float32 on the same weights; its own in bf16."""
        exact = hugging_face(self.shape, self.weights, torch.float32)
        tokens = torch.randint(0, self.shape.vocab, (64,), device="cuda")
        expected = exact(tokens[None]).logits[0].double()
        del exact
        torch.cuda.empty_cache()

        def off(logits: torch.Tensor) -> float:
            return float((logits.double() - expected).norm() / expected.norm())

        transformer, cache = self.live.executor.model, self.live.executor.cache
        cache.tables[0, :64] = torch.arange(1, 65)
        none = torch.empty(0, dtype=torch.int64, device="cuda")
        found = {"prefill": off(transformer.forward(tokens, None, none, Chunks.of([0], [64], [0], "cuda"), None))}
        parts = [
            transformer.forward(tokens[a:b], None, none, Chunks.of([a], [b - a], [0], "cuda"), None)
            for a, b in ((0, 7), (7, 40), (40, 64))
        ]
        found["chunked_prefill"] = off(torch.cat(parts))
        slots = torch.zeros(1, dtype=torch.int64, device="cuda")
        for name, body in (("decode", lambda t: transformer.forward(t, None, slots, None, None)), ("decode_skinny", None)):
            rows = []
            for i, token in enumerate(tokens):
                cache.lengths[0] = i
                rows.append(body(token[None]) if body else transformer.forward_skinny(token[None], slots))
            found[name] = off(torch.cat(rows))
        found["transformers_bf16"] = off(hugging_face(self.shape, self.weights, torch.bfloat16)(tokens[None]).logits[0])
        torch.cuda.empty_cache()
        return found

    @torch.inference_mode()
    def graph_equals_eager(self) -> dict[str, bool]:
        """The same requests with and without graphs, one step at a time and overlapped: the very same tokens."""
        asked = [Request(i, 0.0, 30 + i, 24) for i in range(24)]
        told = []  # batches with prompts run eagerly in all: padding one changes the rounding of its products
        for options in ({"graphs": True}, {"graphs": False}, {"graphs": True, "overlap": False}):
            live = self.small(**options)
            live.executor.steps.mixed_rows = []
            told.append(live.generate(asked)[1])
        return {"graph_equals_eager": told[0] == told[1], "overlapped_equals_not": told[0] == told[2]}

    @torch.inference_mode()
    def hf(self) -> dict[str, dict[str, float]]:
        """Hugging Face eager on the same weights: decode steps and prefill."""
        other, found = hugging_face(self.shape, self.weights, torch.bfloat16), {}
        for rows in (1, 32, 128):
            tokens = torch.randint(0, self.shape.vocab, (rows, CONTEXT), device="cuda")
            cache = other(tokens, logits_to_keep=1).past_key_values

            def step(tokens: torch.Tensor = tokens, cache: Any = cache) -> None:
                other(tokens[:, :1], past_key_values=cache, logits_to_keep=1).logits.argmax(-1)

            found[f"decode {rows}"] = on_gpu(step, 20)
            del cache, step
            torch.cuda.empty_cache()
        for length in (512, 2048):
            prompt = torch.randint(0, self.shape.vocab, (1, length), device="cuda")

            def whole(prompt: torch.Tensor = prompt) -> None:
                other(prompt, logits_to_keep=1).logits.argmax(-1).item()

            found[f"prefill {length}"] = on_gpu(whole, 20)
        return found


def hugging_face(shape: ModelShape, given: weights_module.Weights, dtype: torch.dtype) -> Any:
    """Transformers' Llama on our weights, which it shares where the number format is the same."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    scaling = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.mlp, rms_norm_eps=1e-5, max_position_embeddings=131072,
        rope_parameters=scaling, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    names: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": given.embedding,
        "lm_head.weight": given.head,
        "model.norm.weight": given.norm.gain,
    }
    for i, layer in enumerate(given.layers):
        at = f"model.layers.{i}."
        q, k, v = layer.qkv.weight.split([shape.q_width, shape.kv_width, shape.kv_width])
        gate, up = layer.up.weight.chunk(2)
        parts = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.o.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down.weight,
            "input_layernorm": layer.norm1.gain,
            "post_attention_layernorm": layer.norm2.gain,
        }
        names |= {f"{at}{name}.weight": tensor for name, tensor in parts.items()}
    with torch.device("meta"):
        made = transformers.LlamaForCausalLM(config)
    made.load_state_dict({name: tensor.to(dtype) for name, tensor in names.items()}, assign=True)
    made.model.rotary_emb = type(made.model.rotary_emb)(config, device="cuda")
    return made.eval()


def machine() -> dict[str, str]:
    """What it ran on, as read."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    read = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    return dict(zip(query.split(","), map(str.strip, read.stdout.split(",")), strict=True)) | {
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def sharegpt(csv: Path) -> list[list[float]]:
    """3,000 Poisson arrivals at 1/s with ShareGPT's lengths, filtered as vLLM's benchmark client does."""
    from systems.common.workloads.build import build

    declared = {
        "arrivals": "poisson",
        "rate_rps": 1.0,
        "requests": 3000,
        "lengths": "sharegpt_lengths",
        "lengths_filter": "vllm-sharegpt",
    }
    made = build(declared, {"sharegpt_lengths": csv}, seed=0)
    return [
        list(row) for row in zip(made.arrival_s.tolist(), made.input_tokens.tolist(), made.output_tokens.tolist(), strict=True)
    ]


def compare(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """Ours over vLLM's, of what both measured: below 1 is faster for times, above 1 for rates (named `per_s`, `rps`).

    Decode steps are those served. `lora` compares the slowdown by 32 adapters, `lora step` the steps themselves; `lora step,
    over none of vLLM's` is our step with adapters over the faster of vLLM's two engines' without any.
    """
    ratios: dict[str, float] = {}
    for part, mine in (("decode", ours.get("engine", {})), ("prefill", ours.get("prefill", {}))):
        ratios |= {f"{part} {n}": mine[n]["ms"] / step["ms"] for n, step in peer.get(part, {}).items() if n in mine}
    for part, key in (
        ("offline", "output_tokens_per_s"),
        ("open", "ttft_p50_s"),
        ("open", "ttft_p99_s"),
        ("open", "tpot_mean_s"),
        ("open", "tpot_p99_s"),
    ):
        if part in ours and part in peer:
            ratios[f"{part} {key}"] = ours[part][key] / peer[part][key]
    if "lora" in ours and "lora" in peer:
        mine, other = ours["lora"]["32, served"], peer["lora"]
        base_ms = min(other["none"]["ms"], peer.get("decode", {}).get("32", other["none"])["ms"])
        ratios |= {"lora": mine["ratio"] / other["ratio"], "lora step": mine["ms"] / other["32"]["ms"]}
        ratios["lora step, over none of vLLM's"] = mine["ms"] / base_ms
    if "saturation_rps" in peer and "saturation_rps" in ours.get("open", {}):
        ratios["saturation_rps"] = ours["open"]["saturation_rps"] / peer["saturation_rps"]
    return ratios


def show(result: dict[str, Any]) -> None:
    """The table."""
    for part in ("decode", "mixed", "prefill", "engine", "hf", "lora"):
        for name, row in result.get(part, {}).items():
            floor = f"{row['ms'] / row['floor_ms']:6.2f} x floor" if "floor_ms" in row else ""
            extra = "".join(
                f"  {key} {row[key]:.3f}" for key in ("graph_ms", "overhead_ms", "host_work_ms", "ratio") if key in row
            )
            print(f"{part:9}{name:>14}{row['ms']:10.3f} ms  ({row['low_ms']:.3f} .. {row['high_ms']:.3f}){floor}{extra}")
    for name, ratio in result.get("ratio_to_vllm", {}).items():
        print(f"ours / vLLM  {name:42}{ratio:8.3f}")
    for part in ("ceilings", "logits", "tokens", "mixed_graph", "offline", "open"):
        if part in result:
            print(part, {key: round(value, 5) if isinstance(value, float) else value for key, value in result[part].items()})


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser()
    options.add_argument("--model", default="llama-3.1-8b")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--parts", default=",".join(PARTS), help="what to measure")
    options.add_argument("--without", default="", help="parts to leave out of these")
    options.add_argument("--limit-s", type=float, default=3600.0, help="leave out what would not end within this time")
    options.add_argument("--workload", type=Path, help="JSON list of [arrival at 1/s, input tokens, output tokens]")
    options.add_argument("--sharegpt", type=Path, help="write --workload from this CSV of ShareGPT lengths and do nothing else")
    options.add_argument("--rate", type=float, help="of the open loop, requests/s, unless --vllm's file tells one")
    options.add_argument("--span-s", type=float, default=30.0, help="of the open loop")
    options.add_argument("--vllm", type=Path, help="what benchmarks/engine_vllm.py wrote: kept and compared with")
    options.add_argument("--commit", default="unknown", help="of the code under test, where there is no git to ask")
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()
    if chosen.sharegpt:
        chosen.workload.write_text(json.dumps(sharegpt(chosen.sharegpt)))
        return
    began_s = time.perf_counter()
    parts = [part for part in PARTS if part in chosen.parts.split(",") and part not in chosen.without.split(",")]
    peer: dict[str, Any] = json.loads(chosen.vllm.read_text()) if chosen.vllm and chosen.vllm.is_file() else {}
    torch.manual_seed(chosen.seed)
    result: dict[str, Any] = {
        "machine": machine(),
        "command": sys.argv,
        "commit": chosen.commit,
        "model": chosen.model,
        "seed": chosen.seed,
        "ceilings": ceilings(),
    }
    torch.cuda.empty_cache()
    bench = Bench(model(chosen.model), chosen.seed)
    bench.peak = result["ceilings"]

    failed: list[str] = []

    def save() -> None:
        if chosen.out:
            chosen.out.write_text(json.dumps(result, indent=1) + "\n")

    def measure(part: str, work: Callable[[], dict[str, Any]]) -> None:
        cost_s = COSTS_S[part] + chosen.span_s * (part == "open")
        if part in parts and time.perf_counter() - began_s + cost_s > chosen.limit_s:
            failed.append(part)
            print(f"# {part}: no time left for it", flush=True)
        elif part in parts:
            began = time.perf_counter()
            try:
                result[part] = work()
            except Exception as error:  # the other parts still count; the exit code tells
                failed.append(part)
                print(f"# {part} failed: {type(error).__name__}: {error}", flush=True)
                traceback.print_exc()
            save()
            print(f"# {part}: {time.perf_counter() - began:.1f} s", flush=True)

    measure("logits", bench.logits)
    if "logits" in result:
        result["tokens"] = bench.graph_equals_eager()
    bench.build()
    result |= {
        "capture_s": bench.capture_s,
        "decode_graphs": len(bench.live.executor.steps.sizes),
        "attention": bench.live.executor.model.attention.name,
        "kv_blocks": bench.live.engine.config.num_gpu_blocks,
        "mixed_graph": bench.mixed_graph(),
    }
    print("# captured", round(bench.capture_s, 1), result["mixed_graph"], flush=True)
    bench.serve([Request(i, 0.0, 100 + i, 8) for i in range(64)])  # compiles what prompts need
    measure("decode", bench.decode)
    measure("prefill", bench.prefill)
    measure("mixed", bench.mixed)
    measure("engine", lambda: bench.engine(result.get("decode", {})))
    measure("offline", bench.offline)
    if chosen.workload:
        rate_rps = peer.get("open", {}).get("rate_rps") or chosen.rate
        measure("open", lambda: bench.open(json.loads(chosen.workload.read_text()), rate_rps, chosen.span_s))
    measure("lora", bench.lora)
    if "hf" in parts:
        bench.drop()
        measure("hf", bench.hf)
    result["machine_after"] = machine()
    if peer:
        result |= {"vllm": peer, "ratio_to_vllm": compare(result, peer)}
    show(result)
    save()
    if not chosen.out:
        print(json.dumps(result))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
