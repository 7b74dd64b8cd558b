# mypy: disable-error-code="no-untyped-call"
"""Shape, weights and adapters from what a user set: a warm engine."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine
from systems.common.errors import InputError
from systems.common.models import ModelShape, model
from systems.common.serve.config import ServeConfig
from systems.common.torch_engine.cache import token_bytes
from systems.common.torch_engine.drivers import Live
from systems.common.torch_engine.executor import fitting_blocks
from systems.common.torch_engine.lora import ATTENTION_SITES, MODULES, Adapter
from systems.common.torch_engine.numerics import Llama3Scaling, Numerics, numerics
from systems.common.torch_engine.parallel.executor import ParallelExecutor, start
from systems.common.torch_engine.placement import layout
from systems.common.torch_engine.weights import Weights, load, load_safetensors, random_weights

LONGEST = 8192
"""Default limit of a context, tokens, for models that could take more."""
CPU_CACHE_BYTES = 1 << 28
DTYPE_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class Given:
    """What an engine is to run: the model's shape in its number format, its numbers, the device, the longest context."""

    shape: ModelShape
    numerics: Numerics
    device: str
    most: int


def resolve(config: ServeConfig) -> Given:
    """What `config` means on this machine. Raises InputError."""
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("serve", "device", "cuda", "PyTorch finds no GPU: use --device cpu")
    shape, given, longest = _shape(config)
    shape = shape.with_dtype(config.dtype if config.dtype != "auto" else (shape.dtype if device == "cuda" else "fp32"))
    most = config.max_model_len or min(longest, LONGEST)
    if most > longest:
        raise InputError("serve", "max_model_len", most, f"the model's positions end at {longest}: lower it")
    return Given(shape, given, device, most)


@contextmanager
def engine(config: ServeConfig) -> Iterator[Live]:
    """The engine, warm, with its adapters, and its other ranks for as long as it is used.

    Raises InputError for what is missing, broken, or does not fit together.
    """
    given = resolve(config)
    adapters = {name: read_adapter(folder) for name, folder in config.adapter.items()}
    room = _room(config, adapters)
    try:
        live = _live(config, given.shape, given.numerics, given.device, given.most, room)
    except torch.OutOfMemoryError as error:
        mend = "lower gpu_memory_utilization, kv_blocks, max_num_seqs or max_num_batched_tokens, or take a smaller model"
        raise InputError("serve", "gpu memory", str(error).splitlines()[0], mend) from error
    with live.executor if isinstance(live.executor, ParallelExecutor) else nullcontext():
        live.executor.warm()
        for name, adapter in adapters.items():
            add_adapter(live, name, adapter)
        yield live


def read_adapter(folder: Path) -> Adapter:
    """A peft LoRA checkpoint: `adapter_config.json` and `adapter_model.safetensors`. Raises InputError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    described = folder / "adapter_config.json"
    config = _json(described)
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise InputError(described, "peft_type", kind, "the engine applies LORA only")
    for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if config.get(key):
            raise InputError(described, key, config[key], "plain LoRA only: train it without")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(described, "r, lora_alpha", (rank, alpha), "give both as numbers")
    file = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
        adapter = Adapter.from_peft(tensors, rank, alpha)
    except KeyError as error:
        raise InputError(file, "tensor", str(error), "missing: every lora_A needs its lora_B") from error
    except (OSError, SafetensorError) as error:
        raise InputError(file, "weights", str(error), "not a whole safetensors file: copy it again") from error
    if len(tensors) != 2 * len(adapter.modules) or not tensors:
        other = next((name for name in tensors if ".lora_A." not in name and ".lora_B." not in name), None)
        raise InputError(file, "tensor", other, "the file must hold pairs of lora_A.weight and lora_B.weight, and nothing else")
    for module, (a, b) in adapter.modules.items():
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise InputError(file, module, (tuple(a.shape), tuple(b.shape)), f"not A and B of rank {rank}: copy it again")
    return adapter


def add_adapter(live: Live, name: str, adapter: Adapter) -> None:
    """Copy an adapter in. Raises InputError for one that the bank cannot hold."""
    if (bank := live.executor.adapters) is None:
        mend = "this server was started without adapters: start it with --max-lora-rank or --adapter"
        raise InputError(f"adapter {name}", "name", name, mend)
    for module, (a, b) in adapter.modules.items():
        if (given := (b.shape[0], a.shape[1])) != (wanted := _sizes(live.executor.shape, module)):
            mend = f"not an adapter of this model's shape, which has {wanted or 'no such layer'}"
            raise InputError(f"adapter {name}", module, given, mend)
    bank.load(name, adapter)


def _sizes(shape: ModelShape, module: str) -> tuple[int, int] | None:
    """Outputs and inputs of a layer's product by its Hugging Face name; None where the model has none of that name."""
    found = re.fullmatch(r"model\.layers\.(\d{1,6})\.(.+)", module, re.ASCII)
    if found is None or int(found[1]) >= shape.layers:
        return None
    return {
        "self_attn.q_proj": (shape.q_width, shape.hidden),
        "self_attn.k_proj": (shape.kv_width, shape.hidden),
        "self_attn.v_proj": (shape.kv_width, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.q_width),
        "mlp.gate_proj": (shape.mlp, shape.hidden),
        "mlp.up_proj": (shape.mlp, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.mlp),
    }.get(found[2])


def _live(
    config: ServeConfig,
    shape: ModelShape,
    given: Numerics,
    device: str,
    most: int,
    room: tuple[int, int, tuple[str, ...]] | None,
) -> Live:
    def limits(blocks: int) -> EngineConfig:
        return EngineConfig(
            config.kv_blocks or blocks,
            config.policy,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            kv_dtype=config.kv_dtype,
        )

    backends: dict[str, Any] = {"backend": config.attention_backend, "quantised": config.quantized_backend}
    split = layout(shape, config.tensor_parallel_size, config.stages, config.pipeline_layers)
    on_cpu = max(1, min(config.max_num_seqs * -(-most // 16), CPU_CACHE_BYTES // (token_bytes(shape, config.kv_dtype) * 16)))
    known = config.kv_blocks is not None or device == "cpu"
    if config.ranks == 1:
        weights = read_weights(config, shape, device)
        if device == "cuda":
            torch.cuda.empty_cache()  # what loading left, for who else is on the GPU
        share, tokens = config.gpu_memory_utilization, config.max_num_batched_tokens
        blocks = on_cpu if known else fitting_blocks(shape, share, tokens, kv_dtype=config.kv_dtype)
        return Live.build(shape, weights, limits(blocks), max_tokens=most, given=given, adapters=room, **backends)
    executor = start(
        shape, split, limits(on_cpu) if known else limits, seed=config.seed, dtype=config.quantization, device=device,
        folder=str(config.weights) if config.weights is not None else None, given=given, max_tokens=most, adapters=room,
        utilisation=config.gpu_memory_utilization, **backends,
    )  # fmt: skip
    live = Live(Engine(executor.config, executor), executor)
    executor.attach(live.engine)
    return live


def _room(config: ServeConfig, adapters: Mapping[str, Adapter]) -> tuple[int, int, tuple[str, ...]] | None:
    """Capacity, highest rank and sites of the adapters' bank; None where there will be no adapters."""
    ranks = [a.shape[0] for adapter in adapters.values() for a, _ in adapter.modules.values()]
    rank = max([config.max_lora_rank, *ranks])
    if rank == 0:
        return None
    kinds = {module.split(".", 3)[3] for adapter in adapters.values() for module in adapter.modules}
    used = {site for site, modules in MODULES.items() if kinds & set(modules)}
    sites = tuple(MODULES) if config.max_lora_rank else tuple(s for s in MODULES if s in used) or ATTENTION_SITES
    return config.max_adapters, rank, sites


# ---- shapes and weights


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise InputError(file, "file", error.strerror or str(error), "name a folder that holds it") from error
    except ValueError as error:
        raise InputError(file, "json", str(error), "is no JSON: copy it again") from error
    if not isinstance(values, dict):
        raise InputError(file, "json", type(values).__name__, "is no JSON object: copy it again")
    return values


def _shape(config: ServeConfig) -> tuple[ModelShape, Numerics, int]:
    """Shape, its numbers, and how long a context may be."""
    if config.gguf is not None:
        from transformers import AutoConfig

        try:
            found = AutoConfig.from_pretrained(config.gguf.parent, gguf_file=config.gguf.name, local_files_only=True)
        except Exception as error:  # transformers raises a dozen kinds for a file that is no GGUF
            raise InputError(config.gguf, "gguf", str(error), "not a GGUF file that transformers reads (pip: gguf)") from error
        return shape_of(found.to_dict(), config.gguf, config.model or config.gguf.stem)
    if config.weights is not None and config.model is None:
        file = config.weights / "config.json"
        return shape_of(_json(file), file, config.weights.resolve().name)
    assert config.model is not None
    shape = model(config.model, "serve")
    given = numerics(shape)
    return shape, given, shape.positions - given.position_offset if shape.positions else 131_072


def shape_of(config: Mapping[str, Any], where: Path, name: str) -> tuple[ModelShape, Numerics, int]:
    """Shape, numbers and longest context of a Hugging Face `config.json` of the Llama or Qwen2 kind. Raises InputError."""
    kind = config.get("model_type")
    if kind not in ("llama", "qwen2"):
        raise InputError(
            where, "model_type", kind, "the engine reads llama and qwen2; give --model for a shape it knows by name"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(where, "rope_parameters", rope, "is no JSON object: copy the model's config.json again")
    scaling = None
    if (style := rope.get("rope_type", rope.get("type", "default"))) == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        factor, low, high, original = (_above_0(rope, key, where) for key in keys)
        scaling = Llama3Scaling(factor, low, high, int(original))
    elif style != "default":
        raise InputError(where, "rope_type", style, "the engine knows default and llama3")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise InputError(where, "attention_bias", True, "the engine has no Llama with biases")
    stored = str(config.get("dtype") or config.get("torch_dtype"))
    layers, hidden, heads, mlp, vocab, longest = (_count(config, key, where) for key in SIZES)
    kv_heads = _count(config, "num_key_value_heads", where, heads)
    head_dim = _count(config, "head_dim", where, hidden // heads)
    if heads % kv_heads:
        raise InputError(where, "num_key_value_heads", kv_heads, f"does not divide num_attention_heads ({heads})")
    if head_dim % 2:
        raise InputError(where, "head_dim", head_dim, "rotary embedding needs an even one")
    shape = ModelShape(
        name, layers, hidden, heads, kv_heads, head_dim, mlp, vocab,
        tied=bool(config.get("tie_word_embeddings", False)), qkv_biases=kind == "qwen2",
        dtype=DTYPE_NAMES.get(stored.removeprefix("torch."), "bf16"),
    )  # fmt: skip
    theta = _above_0(rope, "rope_theta", where, _above_0(config, "rope_theta", where, 10_000.0))
    return shape, Numerics(_above_0(config, "rms_norm_eps", where), theta, scaling), longest


SIZES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "max_position_embeddings",
)  # fmt: skip


def _above_0(values: Mapping[str, Any], key: str, where: Path, default: float | None = None) -> float:
    """A number of a config.json; `default` where it is missing or null. Raises InputError."""
    if (value := values.get(key)) is None:
        value = default
    if value is None:
        raise InputError(where, key, None, "missing: copy the model's config.json again")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(where, key, value, "give a number above 0: copy the model's config.json again")
    return float(value)


def _count(values: Mapping[str, Any], key: str, where: Path, default: int | None = None) -> int:
    """The same, a whole one."""
    if (value := _above_0(values, key, where, default)) != int(value):
        raise InputError(where, key, value, "give a whole number: copy the model's config.json again")
    return int(value)


def read_weights(config: ServeConfig, shape: ModelShape, device: str) -> Weights:
    """The model's weights, from where `config` says. Raises InputError."""
    if config.weights is not None:
        return load_safetensors(shape, config.weights, device, dtype=config.quantization)
    if config.gguf is None:
        return random_weights(shape, config.seed, device, dtype=config.quantization)
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[shape.dtype]
    whole = AutoModelForCausalLM.from_pretrained(
        config.gguf.parent, gguf_file=config.gguf.name, dtype=dtype, local_files_only=True
    )
    return load(shape, whole.state_dict(), device, where=str(config.gguf), dtype=config.quantization)
