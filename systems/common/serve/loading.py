# mypy: disable-error-code="no-untyped-call"
"""Shape, weights and adapters from what a user set: a warm engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine
from systems.common.errors import InputError
from systems.common.models import ModelShape, model
from systems.common.serve.config import ServeConfig
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


@contextmanager
def engine(config: ServeConfig) -> Iterator[Live]:
    """The engine, warm, with its adapters, and its other ranks for as long as it is used.

    Raises InputError for what is missing, broken, or does not fit together.
    """
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("serve", "device", "cuda", "PyTorch finds no GPU: use --device cpu")
    shape, given, longest = _shape(config)
    shape = shape.with_dtype(config.dtype if config.dtype != "auto" else (shape.dtype if device == "cuda" else "fp32"))
    most = config.max_model_len or min(longest, LONGEST)
    if most > longest:
        raise InputError("serve", "max_model_len", most, f"the model's positions end at {longest}: lower it")
    adapters = {name: read_adapter(folder) for name, folder in config.adapter.items()}
    room = _room(config, adapters)
    try:
        live = _live(config, shape, given, device, most, room)
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

    config = _json(folder / "adapter_config.json")
    for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise InputError(folder / "adapter_config.json", key, config[key], "plain LoRA only: train it without")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise InputError(folder / "adapter_config.json", "r, lora_alpha", (rank, alpha), "give both as numbers")
    file = folder / "adapter_model.safetensors"
    try:
        return Adapter.from_peft(load_file(file), rank, alpha)
    except KeyError as error:
        raise InputError(file, "tensor", str(error), "missing: every lora_A needs its lora_B") from error
    except (OSError, SafetensorError) as error:
        raise InputError(file, "weights", str(error), "not a whole safetensors file: copy it again") from error


def add_adapter(live: Live, name: str, adapter: Adapter) -> None:
    """Copy an adapter in. Raises InputError for one that the bank cannot hold."""
    if (bank := live.executor.adapters) is None:
        mend = "this server was started without adapters: start it with --max-lora-rank or --adapter"
        raise InputError(f"adapter {name}", "name", name, mend)
    try:
        bank.load(name, adapter)
    except (RuntimeError, LookupError) as error:  # what copying a matrix of another size raises, or a layer that is not there
        raise InputError(f"adapter {name}", "path", str(error), "not an adapter of this model's shape") from error


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
        )

    on_cpu = max(1, min(config.max_num_seqs * -(-most // 16), CPU_CACHE_BYTES // (shape.kv_bytes_per_token * 16)))
    if config.ranks == 1:
        weights = _weights(config, shape, device)
        known = config.kv_blocks is not None or device == "cpu"
        blocks = on_cpu if known else fitting_blocks(shape, config.gpu_memory_utilization, config.max_num_batched_tokens)
        return Live.build(shape, weights, limits(blocks), max_tokens=most, given=given, adapters=room)
    split = layout(shape, config.tensor_parallel_size, config.pipeline_parallel_size)
    executor = start(
        shape, split, limits if device == "cuda" else limits(on_cpu), seed=config.seed, dtype=config.quantization,
        device=device,
        folder=str(config.weights) if config.weights is not None else None, given=given, max_tokens=most, adapters=room,
        utilisation=config.gpu_memory_utilization,
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
    scaling = None
    if (style := rope.get("rope_type", rope.get("type", "default"))) == "llama3":
        scaling = Llama3Scaling(
            rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        )
    elif style != "default":
        raise InputError(where, "rope_type", style, "the engine knows default and llama3")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise InputError(where, "attention_bias", True, "the engine has no Llama with biases")
    stored = str(config.get("dtype") or config.get("torch_dtype"))
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        shape = ModelShape(
            name, config["num_hidden_layers"], hidden, heads, config.get("num_key_value_heads") or heads,
            config.get("head_dim") or hidden // heads, config["intermediate_size"], config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)), qkv_biases=kind == "qwen2",
            dtype=DTYPE_NAMES.get(stored.removeprefix("torch."), "bf16"),
        )  # fmt: skip
        theta = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
        given = Numerics(config["rms_norm_eps"], float(theta), scaling)
        return shape, given, int(config["max_position_embeddings"])
    except KeyError as error:
        raise InputError(where, str(error.args[0]), None, "missing: copy the model's config.json again") from error


def _weights(config: ServeConfig, shape: ModelShape, device: str) -> Weights:
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
