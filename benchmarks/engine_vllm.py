"""vLLM on the workloads of benchmarks/engine.py, for a ratio on the same GPU.

    python benchmarks/engine_vllm.py --folder DIR [--workload FILE] [--rate R] [--out FILE] --part closed|open|lora

Needs vLLM. DIR gets a config.json of Llama-3.1-8B's shape; weights are vLLM's random ones (`load_format="dummy"`). A decode
step is (time of 65 tokens - time of 1 token) / 64 of a whole batch with contexts of 480 to 544; a prefill is one prompt to its
first token; `open` runs vLLM's asynchronous engine in this process, without HTTP, as ours runs. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np

CONTEXT, VOCAB = 512, 128256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
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
COMMON = {
    "load_format": "dummy",
    "dtype": "bfloat16",
    "skip_tokenizer_init": True,
    "max_model_len": 8192,
    "enable_prefix_caching": False,
    "gpu_memory_utilization": 0.9,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 512,
    "seed": 0,
}
RNG = np.random.default_rng(0)


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, milliseconds."""
    low, middle, high = statistics.quantiles([s * 1e3 for s in seconds], n=4)
    return {"ms": middle, "low_ms": low, "high_ms": high, "runs": len(seconds)}


def prompts(lengths: list[int]) -> list[dict]:
    """Random prompts."""
    return [{"prompt_token_ids": RNG.integers(0, VOCAB, n).tolist()} for n in lengths]


def seconds(engine, lengths: list[int], tokens: int | list[int], **more) -> float:
    """Time to serve prompts of `lengths` at once, `tokens` output tokens each."""
    from vllm import SamplingParams

    each = tokens if isinstance(tokens, list) else [tokens] * len(lengths)
    wants = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in each]
    asked = prompts(lengths)
    began = time.perf_counter()
    engine.generate(asked, wants, use_tqdm=False, **more)
    return time.perf_counter() - began


def decode(engine, rows: int, **more) -> dict[str, float]:
    """A decode step of `rows` sequences."""
    lengths = [CONTEXT - 32] * rows
    seconds(engine, lengths, 65, **more)
    return spread([(seconds(engine, lengths, 65, **more) - seconds(engine, lengths, 1, **more)) / 64 for _ in range(5)])


def closed(folder: Path, workload: list[list[float]]) -> dict:
    """Everything that is served at once."""
    from vllm import LLM

    began = time.perf_counter()
    engine = LLM(str(folder), **COMMON)
    result: dict = {"start_s": time.perf_counter() - began}
    result["decode"] = {str(rows): decode(engine, rows) for rows in (1, 32, 128)}
    result["prefill"] = {str(n): spread([seconds(engine, [n], 1) for _ in range(33)][3:]) for n in (128, 512, 2048)}
    rates = [512 * 200 / seconds(engine, [215] * 512, 200) for _ in range(3)]
    result["offline"] = {"output_tokens_per_s": statistics.median(rates), "low": min(rates), "high": max(rates), "runs": 3}
    if workload:
        first = workload[:600]
        result["saturation_rps"] = len(first) / seconds(engine, [int(a) for _, a, _ in first], [int(b) for *_, b in first])
    return result


async def _open(folder: Path, workload: list[list[float]], rate: float) -> dict[str, float]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **COMMON))

    async def one(name: str, arrival: float, began: float, inputs: int, outputs: int) -> tuple[float, float, float]:
        await asyncio.sleep(max(0.0, began + arrival - time.perf_counter()))
        lag = time.perf_counter() - began - arrival
        want = SamplingParams(
            temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        first = 0.0
        async for _ in engine.generate(prompts([inputs])[0], want, name):
            first = first or time.perf_counter() - began
        return first - arrival, (time.perf_counter() - began - first) / max(1, outputs - 1), lag

    await asyncio.gather(*(one(f"w{i}", 0.0, time.perf_counter(), int(a), 8) for i, (_, a, _) in enumerate(workload[:64])))
    began = time.perf_counter()
    asked = [(at / rate, int(a), int(b)) for at, a, b in workload if at / rate < 30]
    told = np.array(await asyncio.gather(*(one(str(i), at, began, a, b) for i, (at, a, b) in enumerate(asked))))
    engine.shutdown()
    many = np.array([b > 1 for *_, b in asked])
    return {
        "rate_rps": rate,
        "requests": len(asked),
        "ttft_p50_s": float(np.median(told[:, 0])),
        "ttft_p99_s": float(np.percentile(told[:, 0], 99)),
        "tpot_mean_s": float(told[many, 1].mean()),
        "tpot_p99_s": float(np.percentile(told[many, 1], 99)),
        "client_lag_p99_s": float(np.percentile(told[:, 2], 99)),
    }


def lora(folder: Path) -> dict:
    """32 adapters of rank 16 on q, k, v, o in a batch of 32, over the same batch without."""
    import torch
    from safetensors.torch import save_file
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    widths = {"q": 4096, "k": 1024, "v": 1024, "o": 4096}
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": [f"{x}_proj" for x in widths], "bias": "none"}
    adapters = []
    for i in range(32):
        where = folder / f"adapter{i}"
        where.mkdir(exist_ok=True)
        (where / "adapter_config.json").write_text(json.dumps(config))
        tensors = {}
        for layer in range(32):
            for name, width in widths.items():
                at = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_"
                tensors |= {
                    f"{at}A.weight": torch.randn(16, 4096).bfloat16() / 64,
                    f"{at}B.weight": torch.randn(width, 16).bfloat16() / 40,
                }
        save_file(tensors, where / "adapter_model.safetensors")
        adapters.append(LoRARequest(f"a{i}", i + 1, str(where)))
    engine = LLM(str(folder), **COMMON, enable_lora=True, max_loras=32, max_lora_rank=16)
    found = {"none": decode(engine, 32), "32": decode(engine, 32, lora_request=adapters)}
    return found | {"ratio": found["32"]["ms"] / found["none"]["ms"]}


def main() -> None:
    """Measure one part and print."""
    options = argparse.ArgumentParser()
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--workload", type=Path)
    options.add_argument("--rate", type=float)
    options.add_argument("--part", required=True, choices=("closed", "open", "lora"), help="a process each; --out gathers them")
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()
    os.environ |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    import vllm

    chosen.folder.mkdir(parents=True, exist_ok=True)
    (chosen.folder / "config.json").write_text(json.dumps(CONFIG))
    workload = json.loads(chosen.workload.read_text()) if chosen.workload else []
    result: dict = {"vllm": vllm.__version__}
    if chosen.out and chosen.out.is_file():
        result = json.loads(chosen.out.read_text())
    if chosen.part == "closed":
        result |= closed(chosen.folder, workload)
    elif chosen.part == "open":
        result["open"] = asyncio.run(_open(chosen.folder, workload, chosen.rate or 0.7 * result["saturation_rps"]))
    elif chosen.part == "lora":
        result["lora"] = lora(chosen.folder)
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
